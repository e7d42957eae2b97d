"""Residual + LayerNorm: normed = layer_norm(x + residual), returning the sum as well.

Memory-bound. Forward moves 4 tensors (reads x and residual, writes normed and summed), backward 4
more (reads dnormed, dsummed and summed, writes the one gradient that x and residual share).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from leedl_fast import add_layer_norm
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

BARS = {EAGER: 2.0, COMPILED: 1.3}
CHECKED_ROWS = 1024  # of each output; the gradients of weight and bias depend on all rows


@dataclass(frozen=True)
class AddLayerNormCase:
    """overhead: forward only, but with gradients on, so that the autograd graph is built.
    preallocated: ours fills outputs that it is given, so that no fresh memory is written.
    """

    rows: int
    n: int
    backward: bool = False
    overhead: bool = False
    preallocated: bool = False
    norm: str = "layer"
    dtype: torch.dtype = torch.float32
    bars: dict[str, float] = field(default_factory=dict)
    peers: tuple[str, ...] = (EAGER, COMPILED)

    @property
    def name(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        if self.overhead:
            passes += ", gradients on"
        if self.preallocated:
            passes += ", out="
        return passes if self.norm == "layer" else f"{passes}, rms"

    @property
    def sizes(self) -> str:
        return f"{self.rows} x {self.n}"

    @property
    def bytes(self) -> float:
        return float((8 if self.backward else 4) * self.rows * self.n * self.dtype.itemsize)


def cases(settings: Settings) -> list[AddLayerNormCase]:
    if settings.tier == "tiny":
        return [
            AddLayerNormCase(8, 32, bars={EAGER: 1.7}),
            AddLayerNormCase(8, 32, preallocated=True, peers=()),
            AddLayerNormCase(8, 32, backward=True, peers=(EAGER,)),
            AddLayerNormCase(4, 16, overhead=True, bars={EAGER: 1.0}, peers=(EAGER,)),
        ]
    main = [
        AddLayerNormCase(16384, 1024, bars={EAGER: 1.7}),
        AddLayerNormCase(16384, 1024, preallocated=True, peers=(EAGER,)),
        AddLayerNormCase(16384, 1024, backward=True, bars=BARS),
        AddLayerNormCase(16384, 1024, backward=True, dtype=torch.bfloat16, bars=BARS),
        AddLayerNormCase(64, 256, overhead=True, bars={EAGER: 1.0}),
    ]
    if settings.tier == "quick":
        return main
    for backward in (False, True):
        for rows, n in ((131072, 128), (4096, 768), (4096, 4096), (1024, 16384)):
            main.append(AddLayerNormCase(rows, n, backward=backward))
        main.append(AddLayerNormCase(16384, 1024, backward=backward, norm="rms"))
        main.append(AddLayerNormCase(8192, 1024, backward=backward, dtype=torch.float64))
    return main


def test_add_layer_norm(case: AddLayerNormCase, measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(case.rows, case.n), (case.rows, case.n), (case.n,), (case.n,)]
    tensors = [
        torch.randn(shape, generator=generator).to(measure.settings.device, case.dtype)
        for shape in shapes
    ]
    grads = [torch.randn_like(tensors[0]) for _ in range(2)]
    for tensor in tensors:
        tensor.requires_grad_(case.backward or case.overhead)
    reference, plain = (
        run(eager(case), *cast(tensors, grads, dtype), case.backward)()
        for dtype in (torch.float64, plain_dtype(case.dtype))
    )
    names = ("normed", "summed", "dx", "dresidual", "dweight", "dbias")[: len(plain)]
    some_rows = (slice(None, None, max(1, case.rows // CHECKED_ROWS)),)
    expected = []
    for name, exact, rounded in zip(names, reference, plain, strict=True):
        index = some_rows if exact.dim() == 2 else (...,)
        expected.append(Expected.of(name, exact[index], rounded[index], case.dtype, index))
    out = (
        (torch.empty_like(tensors[0]), torch.empty_like(tensors[1])) if case.preallocated else None
    )
    functions = {
        OURS: lambda x, residual, weight, bias: add_layer_norm(
            x, residual, weight, bias, norm=case.norm, out=out, backend=measure.settings.backend
        ),
        EAGER: eager(case),
        COMPILED: torch.compile(eager(case), dynamic=False, fullgraph=True),
    }
    implementations = {
        name: Implementation(
            run(function, tensors, grads, case.backward), compiled=name == COMPILED
        )
        for name, function in functions.items()
        if name == OURS or name in case.peers
    }
    reported = Case(
        op="add_layer_norm",
        name=case.name,
        sizes=case.sizes,
        dtype=case.dtype,
        work=Work(bytes=case.bytes),
        bars=case.bars,
    )
    measure(reported, implementations, expected)


def cast(
    tensors: list[Tensor], grads: list[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors]
    return leaves, [grad.to(dtype) for grad in grads]


Norm = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(case: AddLayerNormCase) -> Norm:
    """What people write without this library."""

    def layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        summed = x + residual
        if case.norm == "rms":
            return F.rms_norm(summed, (case.n,), weight, 1e-5) + bias, summed
        return F.layer_norm(summed, (case.n,), weight, bias, 1e-5), summed

    return layer_norm


def run(
    function: Norm, tensors: list[Tensor], grads: list[Tensor], backward: bool
) -> Callable[[], tuple[Tensor, ...]]:
    if not backward:
        return lambda: function(*tensors)

    def both() -> tuple[Tensor, ...]:
        outputs = function(*tensors)
        return *outputs, *torch.autograd.grad(outputs, tensors, grads)

    return both
