r"""A linear layer and the cross-entropy of its logits in plain PyTorch.

    z_nv = hidden_n . weight_v + bias_v            lse_n = log sum_v exp(z_nv)
    loss_n = lse_n - (1 - s) z_n,target(n) - s / vocab_size sum_v z_nv

with the label smoothing s of Szegedy et al. 2016 (section 7); rows whose target is ignore_index
have loss_n = 0. reduction="mean" divides the sum by the number of the other rows. With dloss_n the
gradient of each loss_n,

    dz_nv = dloss_n (exp(z_nv - lse_n) - (1 - s) [v = target(n)] - s / vocab_size)
    dhidden_n = sum_v dz_nv weight_v               dweight_v = sum_n dz_nv hidden_n
    dbias_v = sum_n dz_nv

Where dloss_n is one number for all n, as it is for "mean" and "sum", a fused kernel may make these
gradients in its forward pass, for dloss = 1, while it holds the logits of a few rows: the logits
are made once, and not again in the backward pass (as in Liger, Hsu et al. 2024).
"""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """The loss of hidden (rows, in_features) and targets (rows,): (rows,) for "none", else ()."""
    return F.cross_entropy(
        F.linear(hidden, weight, bias),
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
