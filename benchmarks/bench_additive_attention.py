"""Additive attention, softmax_j(score_weight . tanh(q_i + k_j)) v_j, beside plain PyTorch.

Every pair of a query and a key costs 2 (head_dim + head_dim_v) flops forward, each tanh counted as
none, and 2.5 times that backward, as in attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leedl_fast import additive_attention, reference
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


@dataclass(frozen=True)
class AdditiveCase:
    seqlen: int = 1024
    head_dim: int = 64
    num_heads: int = 1
    window: int | None = None  # the same on both sides
    backward: bool = False
    dtype: torch.dtype = torch.float32
    bars: dict[str, float] = field(default_factory=dict)
    peers: tuple[str, ...] = (EAGER, COMPILED)

    @property
    def side(self) -> int:
        return self.seqlen if self.window is None else self.window

    @property
    def name(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        window = "full" if self.window is None else f"window ({self.window}, {self.window})"
        return f"{passes}, {window}"

    @property
    def sizes(self) -> str:
        return f"B1 H{self.num_heads} S{self.seqlen} D{self.head_dim}"

    @property
    def flops(self) -> float:
        last = self.seqlen - 1
        pairs = sum(min(i, self.side) + min(last - i, self.side) + 1 for i in range(self.seqlen))
        return float(self.num_heads * pairs * 4 * self.head_dim * (3.5 if self.backward else 1))


def cases(settings: Settings) -> list[AdditiveCase]:
    bars = {EAGER: 5.0}
    if settings.tier == "tiny":
        small = {"seqlen": 40, "head_dim": 16, "bars": bars, "peers": (EAGER,)}
        return [AdditiveCase(**small), AdditiveCase(**small, backward=True, window=7)]
    main = [AdditiveCase(bars=bars), AdditiveCase(bars=bars, backward=True)]
    if settings.tier == "quick":
        return main
    for backward in (False, True):
        main.append(AdditiveCase(backward=backward, window=128, peers=(EAGER,)))
        main.append(AdditiveCase(backward=backward, dtype=torch.bfloat16, peers=(EAGER,)))
        main.append(AdditiveCase(backward=backward, seqlen=8192, window=128, peers=()))
    return main


def test_additive_attention(case: AdditiveCase, measure: Measure) -> None:
    *inputs, dout = tensors(case, measure.settings)
    names = ("out", "dq", "dk", "dv", "dscore_weight") if case.backward else ("out",)
    exact = chunked(case, [x.double() for x in inputs], dout.double())
    low = plain_dtype(case.dtype)
    plain = chunked(case, [x.to(low) for x in inputs], dout.to(low))
    expected = [
        Expected.of(name, *pair, case.dtype)
        for name, *pair in zip(names, exact, plain, strict=True)
    ]
    functions = {OURS: ours(case, measure.settings), EAGER: eager(case)}
    if COMPILED in case.peers:
        functions[COMPILED] = torch.compile(eager(case), dynamic=False, fullgraph=True)
    reported = Case(
        op="additive_attention",
        name=case.name,
        sizes=case.sizes,
        dtype=case.dtype,
        work=Work(flops=case.flops),
        bars=case.bars,
    )
    implementations = {
        name: Implementation(
            with_gradients(function, inputs, dout)
            if case.backward
            else lambda f=function: f(*inputs),
            compiled=name == COMPILED,
        )
        for name, function in functions.items()
        if name == OURS or name in case.peers
    }
    measure(reported, implementations, expected)


Attention = Callable[..., Tensor]


def tensors(case: AdditiveCase, settings: Settings) -> list[Tensor]:
    """q, k, v, score_weight, dout."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.num_heads, case.seqlen, case.head_dim)
    shapes = (shape, shape, shape, (case.num_heads, case.head_dim), shape)
    made = [torch.randn(s, generator=generator).to(settings.device, case.dtype) for s in shapes]
    made[3] /= case.head_dim**0.5
    for tensor in made[:4]:
        tensor.requires_grad_(case.backward)
    return made


def ours(case: AdditiveCase, settings: Settings) -> Attention:
    return lambda *inputs: additive_attention(*inputs, window=case.window, backend=settings.backend)


def eager(case: AdditiveCase) -> Attention:
    return lambda *inputs: reference.additive_attention(
        *inputs, None, window_left=case.side, window_right=case.side
    )


def with_gradients(
    function: Attention, inputs: list[Tensor], dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, dout)

    return run


def chunked(
    case: AdditiveCase, inputs: list[Tensor], dout: Tensor, *, chunk: int = 64
) -> list[Tensor]:
    """[out], or [out, dq, dk, dv, dscore_weight], in plain PyTorch: a chunk of queries and the keys
    that it sees at a time.
    """
    leaves = [x.detach().requires_grad_(case.backward) for x in inputs]
    q, k, v, score_weight = leaves
    outputs, gradients = [], [torch.zeros_like(x) for x in leaves]
    for start in range(0, case.seqlen, chunk):
        end = min(start + chunk, case.seqlen)
        first, last = max(0, start - case.side), min(case.seqlen, end + case.side)
        # Queries stand at the last keys: shift = seqlen_k - seqlen_q, where it is start - first.
        shift = (last - first) - (end - start) - (start - first)
        out = reference.additive_attention(
            *(q[:, :, start:end], k[:, :, first:last], v[:, :, first:last], score_weight, None),
            window_left=case.side + shift,
            window_right=case.side - shift,
        )
        outputs.append(out.detach())
        if case.backward:
            for total, part in zip(
                gradients, torch.autograd.grad(out, leaves, dout[:, :, start:end]), strict=True
            ):
                total += part
    out = torch.cat(outputs, dim=2)
    return [out, *gradients] if case.backward else [out]
