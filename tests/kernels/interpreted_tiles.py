"""Tiles of the attention kernels in Triton's interpreter: which there are, and how they are loaded;
`conftest.py` runs this file with `interpreted.py`.
"""

import random
from functools import partial
from typing import Any

import pytest
import rounded_interpreter  # noqa: F401  (before any kernel)
import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels import attention_arguments, attention_blocks, attention_tiles
from leedl_fast.ops import attention
from leedl_fast.testing.compare import equal_bits


def test_tensor_descriptors_load_what_pointers_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """And store it, bit for bit, with NaN in the padding, for one head_dim that fills its tile and
    one that does not; strides that descriptors cannot have are left to pointers.
    """
    lengths = torch.tensor([200, 101, 0])
    for head_dim, expected in ((16, True), (20, True), (18, False)):
        q, k, v = torch.randn(3, 3, 4, 200, head_dim)
        k, v = k[:, :2].contiguous(), v[:, :2].contiguous()
        for sample, length in enumerate(lengths.tolist()):
            k[sample, :, length:] = v[sample, :, length:] = torch.nan
        options = {"key_lengths": lengths, "window": (120, 90)}
        described = _same_by_descriptors(monkeypatch, (q, k, v), **options)
        assert set(described) == {expected}


def test_tensor_descriptors_of_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of the next sequence is touched: its queries are NaN."""
    cuts = torch.tensor([0, 70, 133, 200])
    q, k, v = torch.randn(3, 1, 2, 200, 16)
    q[:, :, 133:] = torch.nan
    assert _same_by_descriptors(monkeypatch, (q, k, v), cu_seqlens_q=cuts, causal=True)


def _same_by_descriptors(
    monkeypatch: pytest.MonkeyPatch, tensors: tuple[Tensor, ...], **options: Any
) -> list[bool]:
    """Whether each tensor that was looked at can be described, once the results are the same."""
    described = []

    def record(x: Tensor) -> bool:
        described.append(is_describable(x))
        return described[-1]

    def run() -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attention(*leaves, **options, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    is_describable = attention_arguments._is_describable
    with monkeypatch.context() as patch:
        patch.setattr(attention_arguments, "_is_describable", record)
        by_pointers = run()
        assert not described
        with attention_blocks.changed(descriptors=True):
            described_run = run()
        for ours, theirs in zip(described_run, by_pointers, strict=True):
            assert equal_bits(ours, theirs)
    return described


@pytest.mark.parametrize("packed", [False, True], ids=["window", "packed"])
def test_few_programs_that_walk_the_tiles_make_the_same_bits(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = torch.randn(3, 1, 3, 300, 16)
    options: dict[str, Any] = {"window": (20, 0), "return_lse": True, "backend": "triton"}
    if packed:
        options["cu_seqlens_q"] = torch.tensor([0, 70, 70, 71, 133, 300])

    def run() -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, **options)
        return out, lse, *torch.autograd.grad((out.square().sum(), lse.sum()), leaves)

    alone = run()
    grids = []
    programs_for = attention_blocks.programs_for

    def record(*args: Any) -> int:
        grids.append((args[1], programs_for(*args)))
        return grids[-1][1]

    monkeypatch.setattr(attention_blocks, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(attention_arguments, "programs_for", record)
    with attention_blocks.changed(programs_per_sm=2):
        shared = run()
    for ours, theirs in zip(shared, alone, strict=True):
        assert equal_bits(ours, theirs)
    assert len(grids) == 3  # the forward kernel's, the query and the key_value kernel's
    assert all(programs == 4 < tiles for tiles, programs in grids)


@triton.jit
def _tiles_kernel(
    out_ptr,
    first,
    end,
    shift,
    window_left,
    window_right,
    seqlen_q,
    key_end,
    OF_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    window = (shift, window_left, window_right, seqlen_q, key_end)
    if OF_QUERIES:
        tiles = attention_tiles.query_tiles(first, window, BLOCK_KEYS, BLOCK)
    else:
        tiles = attention_tiles.key_tiles(first, end, window, BLOCK)
    for i in tl.static_range(4):
        tl.store(out_ptr + i, tiles[i])


def _attends(
    query: int, key: int, seqlen_q: int, seqlen_k: int, window: tuple[int, int], key_end: int
) -> bool:
    """The definition, pair by pair."""
    distance = key - (query + seqlen_k - seqlen_q)
    return -window[0] <= distance <= window[1] and query < seqlen_q and key < key_end


@pytest.mark.parametrize("of_queries", [False, True], ids=["key-tiles", "query-tiles"])
def test_tile_ranges_are_exact(of_queries: bool) -> None:
    """Every tile with a visible pair and no other, and as many unmasked ones as there can be."""
    generator = random.Random(0)
    own, step = 4, 8
    for _ in range(60):
        seqlen_q, seqlen_k = generator.randint(1, 40), generator.randint(1, 40)
        key_end = generator.choice([seqlen_k, generator.randint(0, seqlen_k)])
        window = generator.choice([0, 3, 11, 80]), generator.choice([0, 3, 11, 80])
        shift = seqlen_k - seqlen_q
        attends = partial(
            _attends, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=window, key_end=key_end
        )
        first = own * generator.randrange(-(-(seqlen_k if of_queries else seqlen_q) // own))
        end = min(first + own, seqlen_q)
        out = torch.empty(4, dtype=torch.int32)
        _tiles_kernel[(1,)](
            out, first, end, shift, *window, seqlen_q, key_end, of_queries, own, step
        )
        begin, inner_begin, inner_end, stop = out.tolist()

        mine = range(first, first + own if of_queries else end)
        seen, full = [], []
        for tile in range(-(-max(seqlen_q, seqlen_k) // step)):
            others = range(tile * step, (tile + 1) * step)
            pairs = [
                attends(other, i) if of_queries else attends(i, other)
                for i in mine
                for other in others
            ]
            if any(pairs):
                seen.append(tile)
            if all(pairs):
                full.append(tile)
        assert list(range(begin, stop)) == seen
        assert list(range(inner_begin, inner_end)) == full
