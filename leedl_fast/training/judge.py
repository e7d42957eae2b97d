"""Measures of generated images: a classifier trained on real ones, and nearness to those."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

JUDGE_STEPS = 500
JUDGE_BATCH_SIZE = 128
NEIGHBOURS = 3  # of `precision`, which needs more real images than these


class Judge(nn.Module):
    """A classifier of images (batch, 1, size, size) in [0, 1], which never sees a generated one."""

    def __init__(self, image_size: int, num_labels: int, *, hidden_dim: int = 256) -> None:
        super().__init__()
        self.linear1 = nn.Linear(image_size**2, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, num_labels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_labels)."""
        centred = 2 * images.flatten(1) - 1
        return self.linear2(F.gelu(self.linear1(centred)))

    def labels(self, images: Tensor) -> Tensor:
        """The likeliest label of each image, int64 (batch,)."""
        return self(images).argmax(dim=1)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return (self.labels(images) == labels).float().mean().item()


@torch.enable_grad()
def train_judge(images: Tensor, labels: Tensor, num_labels: int) -> Judge:
    """A Judge trained on `images` with noise, which teaches it not to lean on single pixels."""
    judge = Judge(images.shape[-1], num_labels).to(images.device)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    for _ in range(JUDGE_STEPS):
        chosen = torch.randint(len(images), (JUDGE_BATCH_SIZE,), device=images.device)
        noisy = images[chosen] + 0.1 * torch.randn_like(images[chosen])
        loss = F.cross_entropy(judge(noisy), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.requires_grad_(False)


def precision(images: Tensor, real: Tensor) -> float:
    """Share of `images` that lie within the distance of some real image to its third neighbour.

    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
    equation 1, here in the space of pixels.
    """
    real, images = real.flatten(1), images.flatten(1)
    radius = torch.cdist(real, real).kthvalue(NEIGHBOURS + 1, dim=1).values  # the first is itself
    return (torch.cdist(images, real) <= radius).any(dim=1).float().mean().item()
