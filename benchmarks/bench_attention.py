"""Scaled dot-product attention: windowed, causal and full, beside what PyTorch offers.

Every pair of a query and a key that it sees costs 4 head_dim flops forward (score, weighted sum)
and 2.5 times that backward (the score again, and four products for dP, dq, dk and dv). Pairs
outside the window count for nothing, whoever computes them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from leedl_fast import attention, reference
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

SDPA = "SDPA"
SDPA_MASK = "SDPA, mask"
FLEX = "FlexAttention"
HEADS_OF_Q = ("out", "dq")
SERIES = "attention forward, window (128, 128)"
# The longest sequences that these are run at; beyond, they take many seconds and gigabytes.
LONGEST = {
    "quick": {EAGER: 4096, SDPA_MASK: 4096, FLEX: 4096, COMPILED: 4096},
    "full": {EAGER: 8192, SDPA_MASK: 16384, FLEX: 8192, COMPILED: 8192},
}


@dataclass(frozen=True)
class AttentionCase:
    seqlen: int = 4096
    queries: int | None = None  # the last ones alone; None: all
    head_dim: int = 64
    window: int | None = None  # the same on both sides
    causal: bool = False
    backward: bool = False  # beside the forward pass
    alone: bool = False  # the backward pass of a graph that is there already
    batch: int = 1
    num_heads: int = 8
    num_heads_k: int = 8
    dtype: torch.dtype = torch.float32
    bars: dict[str, float] = field(default_factory=dict)
    series: bool = False
    peers: tuple[str, ...] = (EAGER, SDPA)

    @property
    def sides(self) -> tuple[int, int]:
        """(left, right) of the window that this comes to, always finite."""
        left = self.seqlen if self.window is None else self.window
        return left, 0 if self.causal else left

    @property
    def forward(self) -> bool:
        return not self.alone

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("out",) * self.forward + ("dq", "dk", "dv") * self.backward

    @property
    def seqlen_q(self) -> int:
        return self.seqlen if self.queries is None else self.queries

    @property
    def name(self) -> str:
        passes = " + ".join(["forward"] * self.forward + ["backward"] * self.backward)
        if self.queries is not None:
            return f"decode, {self.queries} query" + ("" if self.queries == 1 else "s")
        if self.window is not None:
            return f"{passes}, window ({self.sides[0]}, {self.sides[1]})"
        return f"{passes}, {'causal' if self.causal else 'full'}"

    @property
    def sizes(self) -> str:
        heads = f"H{self.num_heads}"
        if self.num_heads_k != self.num_heads:
            heads += f"/{self.num_heads_k}"
        return f"B{self.batch} {heads} S{self.seqlen} D{self.head_dim}"

    @property
    def flops(self) -> float:
        left, right = self.sides
        last = self.seqlen - 1
        queries = range(self.seqlen - self.seqlen_q, self.seqlen)
        pairs = sum(min(i, left) + min(last - i, right) + 1 for i in queries)
        per_pair = 4 * self.head_dim * (self.forward + 2.5 * self.backward)
        return float(self.batch * self.num_heads * pairs * per_pair)

    @property
    def work(self) -> Work:
        """Few queries read all keys and values, and do little else."""
        if self.queries is None:
            return Work(flops=self.flops)
        numbers = 2 * self.batch * self.num_heads_k * self.seqlen * self.head_dim
        return Work(read_bytes=float(numbers * self.dtype.itemsize))


BACKWARD = {"backward": True, "alone": True}
WINDOWED = (EAGER, COMPILED, SDPA_MASK, FLEX)


def cases(settings: Settings) -> list[AttentionCase]:
    if settings.tier == "tiny":
        small = {"seqlen": 48, "head_dim": 16, "num_heads": 2, "num_heads_k": 2}
        bars = {SDPA_MASK: 8, EAGER: 30}
        return [
            AttentionCase(**small, window=8, bars=bars, series=True, peers=(EAGER, SDPA_MASK)),
            AttentionCase(**(small | {"seqlen": 96}), window=8, series=True, peers=()),
            AttentionCase(**small, window=8, backward=True, peers=(EAGER, SDPA_MASK)),
            AttentionCase(**small, window=8, **BACKWARD, peers=(EAGER, SDPA_MASK)),
            AttentionCase(**small, causal=True, bars={SDPA: 1.3}),
            AttentionCase(**small, queries=1, peers=(SDPA,)),
            AttentionCase(**(small | {"num_heads_k": 1}), queries=1, peers=(SDPA,)),
        ]
    main = [
        AttentionCase(
            window=128, bars={SDPA_MASK: 8, FLEX: 2.5, EAGER: 30}, series=True, peers=WINDOWED
        ),
        AttentionCase(window=128, backward=True, bars={SDPA_MASK: 8, EAGER: 25}, peers=WINDOWED),
        AttentionCase(bars={SDPA: 1.0}),
        AttentionCase(causal=True, bars={SDPA: 1.3}),
        AttentionCase(dtype=torch.bfloat16, bars={SDPA: 1.5}, peers=(SDPA,)),
        AttentionCase(dtype=torch.bfloat16, backward=True, peers=(SDPA,)),
        AttentionCase(**BACKWARD, peers=(SDPA,)),
        AttentionCase(dtype=torch.bfloat16, **BACKWARD, peers=(SDPA,)),
        AttentionCase(dtype=torch.bfloat16, window=128, **BACKWARD, peers=(SDPA_MASK,)),
        AttentionCase(seqlen=32768, queries=1, bars={SDPA: 1.0}, peers=(SDPA,)),
        *(
            AttentionCase(
                seqlen=32768,
                queries=1,
                head_dim=head_dim,
                dtype=torch.bfloat16,
                bars={SDPA: 1.5},
                peers=(SDPA,),
            )
            for head_dim in (64, 128)
        ),
        *(
            AttentionCase(seqlen=8192, queries=1, num_heads=64, dtype=dtype, peers=(SDPA,))
            for dtype in (torch.float32, torch.bfloat16)
        ),
        *(
            AttentionCase(
                window=128,
                backward=backward,
                dtype=torch.bfloat16,
                bars={SDPA_MASK: bar},
                peers=(SDPA_MASK,),
            )
            for backward, bar in ((False, 15), (True, 25))
        ),
    ]
    longest = LONGEST[settings.tier]
    for seqlen in (1024, 2048, 8192, 16384, 32768, 65536):
        peers = (EAGER, SDPA_MASK, FLEX)
        if settings.tier == "quick" and seqlen == 2048:
            peers = (
                EAGER,
                SDPA_MASK,
            )  # compiling FlexAttention once more would take longer than it tells
        main.append(
            AttentionCase(
                seqlen=seqlen,
                window=128,
                series=True,
                peers=tuple(peer for peer in peers if seqlen <= longest[peer]),
            )
        )
    if settings.tier == "quick":
        return main
    for backward in (False, True):
        for head_dim in (32, 80, 96, 128, 256):
            options = {"head_dim": head_dim, "seqlen": 2048, "backward": backward}
            main.append(AttentionCase(**options))
            main.append(AttentionCase(**options, window=128, peers=(EAGER, SDPA_MASK)))
            main.append(AttentionCase(**options, dtype=torch.bfloat16, peers=(SDPA,)))
        main.append(AttentionCase(causal=True, window=256, backward=backward, peers=WINDOWED))
        main.append(AttentionCase(num_heads_k=2, backward=backward))
        main.append(AttentionCase(batch=4, seqlen=1024, backward=backward))
        main.append(
            AttentionCase(
                seqlen=2048,
                window=128,
                dtype=torch.float64,
                backward=backward,
                peers=(EAGER, SDPA_MASK),
            )
        )
    main.append(AttentionCase(backward=True))
    main.append(AttentionCase(causal=True, backward=True))
    main.append(AttentionCase(causal=True, **BACKWARD, peers=(SDPA,)))
    main.append(AttentionCase(causal=True, dtype=torch.bfloat16, **BACKWARD, peers=(SDPA,)))
    main.append(AttentionCase(window=128, **BACKWARD, peers=(SDPA_MASK,)))
    return main


def test_attention(case: AttentionCase, measure: Measure) -> None:
    q, k, v, dout = inputs(case, measure.settings)
    heads = [0, case.num_heads - 1]
    left, right = case.sides
    groups = case.num_heads // case.num_heads_k
    if groups > 1:
        heads = list(
            range(case.num_heads)
        )  # a key head's gradient needs all the query heads that share it
    head_k = sorted({head // groups for head in heads})
    part = [q[:, heads], k[:, head_k], v[:, head_k], dout[:, heads]]
    exact = chunked_attention([t.double() for t in part], left, right, backward=case.backward)
    low = plain_dtype(case.dtype)
    plain = chunked_attention([t.to(low) for t in part], left, right, backward=case.backward)
    expected = [
        Expected.of(name, *pair, case.dtype, (slice(None), heads if name in HEADS_OF_Q else head_k))
        for name, *pair in zip(case.outputs, exact[case.alone :], plain[case.alone :], strict=True)
    ]
    functions = {OURS: ours(case, measure.settings), **peers(case, measure.settings)}
    reported = Case(
        op="attention",
        name=case.name,
        sizes=case.sizes,
        dtype=case.dtype,
        work=case.work,
        bars=case.bars,
        series=SERIES if case.series else None,
        x=case.seqlen if case.series else None,
        memory=case.series,
        note="errors over heads " + " and ".join(map(str, heads)) if groups == 1 else None,
    )
    implementations = {
        name: Implementation(
            passes(case)(function, q, k, v, dout),
            compiled=name in (COMPILED, FLEX),
        )
        for name, function in functions.items()
        if name == OURS or name in case.peers
    }
    measure(reported, implementations, expected)


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(case: AttentionCase, settings: Settings) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (case.batch, heads, seqlen, case.head_dim)
        for heads, seqlen in (
            (case.num_heads, case.seqlen_q),
            (case.num_heads_k, case.seqlen),
            (case.num_heads_k, case.seqlen),
            (case.num_heads, case.seqlen_q),
        )
    ]
    tensors = [
        torch.randn(shape, generator=generator).to(settings.device, case.dtype) for shape in shapes
    ]
    for tensor in tensors[:3]:
        tensor.requires_grad_(case.backward)
    return tensors


def ours(case: AttentionCase, settings: Settings) -> Attention:
    return lambda q, k, v: attention(
        q, k, v, causal=case.causal, window=case.window, backend=settings.backend
    )


def peers(case: AttentionCase, settings: Settings) -> dict[str, Attention]:
    """The other implementations; what is expensive to set up only where the case asks for it."""
    left, right = case.sides
    windowed = case.window is not None
    gqa = case.num_heads != case.num_heads_k

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(
            q,
            k,
            v,
            None,
            softmax_scale=1 / math.sqrt(case.head_dim),
            window_left=left,
            window_right=right,
            return_lse=False,
        )[0]

    functions: dict[str, Attention] = {EAGER: eager}
    if COMPILED in case.peers:
        functions[COMPILED] = torch.compile(eager, dynamic=False, fullgraph=True)
    if windowed and SDPA_MASK in case.peers:
        position = torch.arange(case.seqlen, device=settings.device)
        offset = position[None, :] - position[:, None]  # (seqlen_q, seqlen_k): key - query
        mask = (offset >= -left) & (offset <= right)
        functions[SDPA_MASK] = lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=gqa
        )
    if not windowed:
        functions[SDPA] = lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=gqa
        )
    if FLEX in case.peers:
        block_mask = create_block_mask(
            lambda b, h, i, j: (j >= i - left) & (j <= i + right),
            None,
            None,
            case.seqlen,
            case.seqlen,
            device=settings.device.type,
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        functions[FLEX] = lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)
    return functions


def passes(case: AttentionCase) -> Callable[..., Callable[[], Tensor | tuple[Tensor, ...]]]:
    """What makes a case's measured function of an implementation, q, k, v and dout."""
    if case.alone:
        return gradients_alone
    if case.backward:
        return with_gradients
    return lambda function, q, k, v, _: lambda: function(q, k, v)


def with_gradients(function: Attention, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    q, k, v, dout = tensors

    def run() -> tuple[Tensor, ...]:
        out = function(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    return run


def gradients_alone(function: Attention, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The first call makes the graph, which the others use again."""
    q, k, v, dout = tensors
    graph = functools.cache(lambda: function(q, k, v))
    return lambda: torch.autograd.grad(graph(), (q, k, v), dout, retain_graph=True)


def chunked_attention(
    tensors: list[Tensor], left: int, right: int, *, backward: bool, chunk: int = 256
) -> list[Tensor]:
    """[out], or [out, dq, dk, dv], in plain PyTorch: a chunk of queries and its keys at a time.

    Holds chunk x (chunk + left + right) scores, so that it serves as the reference at any length.
    """
    q, k, v, dout = (tensor.detach() for tensor in tensors)
    seqlen, scale = q.shape[2], 1 / math.sqrt(q.shape[3])
    shift = k.shape[2] - seqlen
    results = [torch.empty_like(q), *(torch.zeros_like(t) for t in (q, k, v))]
    for start in range(0, seqlen, chunk):
        rows = slice(start, min(start + chunk, seqlen))
        keys = slice(max(0, start + shift - left), min(k.shape[2], rows.stop + shift + right))
        part = [q[:, :, rows], k[:, :, keys], v[:, :, keys]]
        part = [tensor.clone().requires_grad_(backward) for tensor in part]
        groups = q.shape[1] // k.shape[1]
        part_k, part_v = (tensor.repeat_interleave(groups, 1) for tensor in part[1:])
        i = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + shift
        j = torch.arange(keys.start, keys.stop, device=q.device)[None, :]
        scores = part[0] @ part_k.mT * scale
        scores = scores.masked_fill((j < i - left) | (j > i + right), -torch.inf)
        out = torch.softmax(scores, -1) @ part_v
        results[0][:, :, rows] = out.detach()
        if backward:
            dq, dk, dv = torch.autograd.grad(out, part, dout[:, :, rows])
            results[1][:, :, rows] += dq
            results[2][:, :, keys] += dk
            results[3][:, :, keys] += dv
    return results if backward else results[:1]
