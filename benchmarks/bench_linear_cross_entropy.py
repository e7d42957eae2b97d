"""Linear layer + cross-entropy: the loss of a language model's hidden states, and its gradients.

Compute-bound. Forward is one matrix product of 2 * rows * in_features * vocab_size operations, and
the gradients of hidden and weight are two more. Memory is what a fused loss saves: plain PyTorch
holds the logits, their softmax and its gradient, (rows, vocab_size) each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from leedl_fast import linear_cross_entropy
from leedl_fast.benchmarks.suite import (
    COMPILED,
    EAGER,
    OURS,
    Case,
    Expected,
    Implementation,
    Measure,
    Settings,
    Work,
    plain_dtype,
)

CHUNKED = "F.linear_cross_entropy"  # torch's own, in chunks


@dataclass(frozen=True)
class LinearCrossEntropyCase:
    """memory: measure peak memory too."""

    rows: int
    in_features: int
    vocab_size: int
    backward: bool = True
    dtype: torch.dtype = torch.float32
    bars: dict[str, float] = field(default_factory=dict)
    peers: tuple[str, ...] = (EAGER, COMPILED)
    memory: bool = False

    @property
    def name(self) -> str:
        return "forward + backward" if self.backward else "forward"

    @property
    def sizes(self) -> str:
        return f"{self.rows} x {self.in_features}, {self.vocab_size} classes"

    @property
    def flops(self) -> float:
        products = 3 if self.backward else 1
        return 2.0 * products * self.rows * self.in_features * self.vocab_size


def cases(settings: Settings) -> list[LinearCrossEntropyCase]:
    if settings.tier == "tiny":
        return [
            LinearCrossEntropyCase(8, 16, 32, bars={EAGER: 1.0}, peers=(EAGER, CHUNKED)),
            LinearCrossEntropyCase(8, 16, 32, backward=False, peers=(EAGER,), memory=True),
        ]
    gpt = LinearCrossEntropyCase(
        4096, 256, 100, bars={EAGER: 1.0}, peers=(EAGER, COMPILED, CHUNKED)
    )
    bert = LinearCrossEntropyCase(2048, 256, 30522, bars={EAGER: 1.0}, peers=(EAGER,), memory=True)
    half = [
        LinearCrossEntropyCase(
            *sizes, dtype=torch.bfloat16, bars={EAGER: 1.0}, peers=(EAGER,), memory=memory
        )
        for sizes, memory in (((4096, 256, 100), False), ((1024, 256, 30522), True))
    ]
    if settings.tier == "quick":
        return [gpt, bert, *half]
    return [
        gpt,
        bert,
        *half,
        LinearCrossEntropyCase(1024, 256, 30522, peers=(EAGER, COMPILED, CHUNKED)),
        LinearCrossEntropyCase(4096, 256, 100, backward=False),
        LinearCrossEntropyCase(2048, 256, 30522, backward=False),
        LinearCrossEntropyCase(1024, 768, 8192),
        LinearCrossEntropyCase(4096, 256, 100, dtype=torch.float16),
    ]


def test_linear_cross_entropy(case: LinearCrossEntropyCase, measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (case.rows, case.in_features), (case.vocab_size, case.in_features)
    hidden, weight = (
        (scale * torch.randn(shape, generator=generator)).to(measure.settings.device, case.dtype)
        for shape, scale in zip(shapes, (1.0, 0.1), strict=True)
    )
    targets = torch.randint(case.vocab_size, (case.rows,), generator=generator)
    targets = targets.to(measure.settings.device)
    tensors = [tensor.requires_grad_(case.backward) for tensor in (hidden, weight)]
    reference, plain = (
        run(eager, [t.detach().to(dtype).requires_grad_(case.backward) for t in tensors], targets)()
        for dtype in (torch.float64, plain_dtype(case.dtype))
    )
    names = ("loss", "dhidden", "dweight")[: len(plain)]
    expected = [
        Expected.of(name, exact, rounded, case.dtype)
        for name, exact, rounded in zip(names, reference, plain, strict=True)
    ]
    functions = {
        OURS: lambda hidden, weight, targets: linear_cross_entropy(
            hidden, weight, targets, backend=measure.settings.backend
        ),
        EAGER: eager,
        COMPILED: torch.compile(eager, dynamic=False, fullgraph=True),
        CHUNKED: chunked,
    }
    implementations = {
        name: Implementation(run(function, tensors, targets), compiled=name == COMPILED)
        for name, function in functions.items()
        if name == OURS or name in case.peers
    }
    reported = Case(
        op="linear_cross_entropy",
        name=case.name,
        sizes=case.sizes,
        dtype=case.dtype,
        work=Work(flops=case.flops),
        bars=case.bars,
        memory=case.memory,
    )
    measure(reported, implementations, expected)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What people write without this library."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def run(function: Loss, tensors: list[Tensor], targets: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    if not tensors[0].requires_grad:
        return lambda: (function(*tensors, targets),)

    def both() -> tuple[Tensor, ...]:
        loss = function(*tensors, targets)
        return loss, *torch.autograd.grad(loss, tensors)

    return both
