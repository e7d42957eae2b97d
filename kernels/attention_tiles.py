"""What the kernels of both passes of attention share: tile ranges, masks, loads and dots.

csrc/common/attention_tiles.h says the same to C++.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# The interpreter keeps bfloat16 numbers as integers, and would multiply those.
_PROMOTE_DOT = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Matrix(NamedTuple):
    """The rows of one head. ptr is the first; descriptor, a tensor descriptor of tiles of rows or
    None, finds it at (batch, head, first_row).
    """

    ptr: Any
    stride: Any
    descriptor: Any
    batch: Any
    head: Any
    first_row: Any


class Window(NamedTuple):
    """Query i < seqlen_q sees key j < key_end when i + shift - window_left <= j <= i + shift +
    window_right, with shift = seqlen_k - seqlen_q.
    """

    shift: Any
    window_left: Any
    window_right: Any
    seqlen_q: Any
    key_end: Any


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, acc float32."""
    if _PROMOTE_DOT:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_of(number, tiles, num_heads):
    """(tile, head, batch) of the tile of this number, which is the program's, if it owns one alone.
    The tiles of one head follow each other, the last, which has the most work under a causal mask,
    first.
    """
    row = (number // tiles).to(tl.int64)
    return tiles - 1 - number % tiles, row % num_heads, row // num_heads


@triton.jit
def tile_in_pack(cu_seqlens_ptr, tile, num_sequences, BLOCK: tl.constexpr):
    """(sequence, first row in it) of a tile of packed sequences.

    The tiles of sequence s begin at number cu_seqlens[s] // BLOCK + s, which leaves room for a last
    partial one; those that are left over begin at or after the sequence's end.
    """
    sequence = tile * 0
    after = sequence + num_sequences
    while sequence + 1 < after:
        middle = (sequence + after) // 2
        is_before = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= tile
        sequence = tl.where(is_before, middle, sequence)
        after = tl.where(is_before, after, middle)
    begin = (tl.load(cu_seqlens_ptr + sequence) // BLOCK).to(tl.int32) + sequence
    return sequence, (tile - begin) * BLOCK


@triton.jit
def key_end_of(key_lengths_ptr, batch, seqlen_k):
    """Keys from here on are padding, and are not read."""
    if key_lengths_ptr is not None:
        length = tl.load(key_lengths_ptr + batch)
        end = tl.minimum(tl.maximum(length, 0), seqlen_k).to(tl.int32)
    else:
        end = seqlen_k
    return end


@triton.jit
def key_tiles(first_query, end_query, window, BLOCK: tl.constexpr):
    """(begin, inner_begin, inner_end, end) of the key tiles that queries first_query .. end_query -
    1 see; all of them see all keys of the inner ones.
    """
    shift, window_left, window_right, _, key_end = window
    # Clamped before they are divided: integer division rounds towards zero.
    begin = tl.maximum(first_query + shift - window_left, 0) // BLOCK
    end = tl.cdiv(tl.minimum(tl.maximum(end_query + shift + window_right, 0), key_end), BLOCK)
    inner_begin = tl.cdiv(tl.maximum(end_query - 1 + shift - window_left, 0), BLOCK)
    last_inner = tl.maximum(first_query + shift + window_right + 1, 0)
    inner_end = tl.minimum(last_inner, key_end) // BLOCK
    inner_begin = tl.minimum(tl.maximum(inner_begin, begin), end)
    inner_end = tl.minimum(tl.maximum(inner_end, inner_begin), end)
    return begin, inner_begin, inner_end, end


@triton.jit
def query_tiles(first_key, window, BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The same for the query tiles that see one tile of keys; none is inner where keys are
    padding.
    """
    shift, window_left, window_right, seqlen_q, key_end = window
    end_key = tl.minimum(first_key + BLOCK_KEYS, key_end)
    begin = tl.maximum(first_key - shift - window_right, 0) // BLOCK
    end = tl.cdiv(tl.minimum(tl.maximum(end_key - shift + window_left, 0), seqlen_q), BLOCK)
    end = tl.where(first_key < key_end, end, 0)
    inner_begin = tl.cdiv(tl.maximum(end_key - 1 - shift - window_right, 0), BLOCK)
    last_inner = tl.maximum(first_key - shift + window_left + 1, 0)
    inner_end = tl.minimum(last_inner, seqlen_q) // BLOCK
    inner_end = tl.where(first_key + BLOCK_KEYS <= key_end, inner_end, 0)
    inner_begin = tl.minimum(tl.maximum(inner_begin, begin), end)
    inner_end = tl.minimum(tl.maximum(inner_end, inner_begin), end)
    return begin, inner_begin, inner_end, end


@triton.jit
def sees_one_key(query, window):
    """The probability of such a query's key is 1 whatever the score: its dp and delta, equal but
    for their rounding, are left out of ds.
    """
    shift, window_left, window_right, _, key_end = window
    position = query + shift
    first = tl.maximum(position - window_left, 0)
    return first == tl.minimum(position + window_right, key_end - 1)


@triton.jit
def load_rows(
    ptr, row, stride, row_end, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of a (rows, DIM) matrix, [rows, BLOCK]; zeros from DIM on, and from row_end on if
    MASKED.
    """
    column = tl.arange(0, BLOCK)
    pointer = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        tile = tl.load(pointer, (row < row_end)[:, None] & (column < DIM)[None, :], other=0)
    elif DIM != BLOCK:
        tile = tl.load(pointer, (column < DIM)[None, :], other=0)
    else:
        tile = tl.load(pointer)
    return tile


@triton.jit
def load_tile(
    matrix,
    first,
    row_end,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows first .. first + ROWS - 1, as load_rows has them; by the descriptor, if there is one,
    where no row needs a mask: one instruction copies the tile to shared memory.
    """
    if MASKED or matrix.descriptor is None:
        row = first + tl.arange(0, ROWS)
        tile = load_rows(matrix.ptr, row, matrix.stride, row_end, DIM, BLOCK, MASKED)
    else:
        row = (matrix.first_row + first).to(tl.int32)
        place = [matrix.batch.to(tl.int32), matrix.head.to(tl.int32), row, 0]
        tile = matrix.descriptor.load(place).reshape(ROWS, BLOCK)
    return tile


@triton.jit
def load_own(matrix, first, row_end, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A program's own rows: zeros from row_end on, or by the descriptor the next rows of the pack,
    whose results nobody stores, and zeros past its end.
    """
    return load_tile(matrix, first, row_end, ROWS, DIM, BLOCK, matrix.descriptor is None)


@triton.jit
def store_own(
    matrix, tile, first, row_end, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """A program's own rows; a descriptor, which stores up to the tensor's end, is for rows that are
    not packed.
    """
    if matrix.descriptor is None:
        row = first + tl.arange(0, ROWS)
        store_rows(matrix.ptr, tile, row, matrix.stride, row_end, DIM, BLOCK)
    else:
        place = [matrix.batch.to(tl.int32), matrix.head.to(tl.int32), first.to(tl.int32), 0]
        rows = tile.to(matrix.descriptor.dtype).reshape(1, 1, ROWS, BLOCK)
        matrix.descriptor.store(place, rows)


@triton.jit
def store_rows(ptr, tile, row, stride, row_end, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    pointer = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (row < row_end)[:, None] & (column < DIM)[None, :]
    tl.store(pointer, tile.to(ptr.dtype.element_ty), mask)


def padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Of dots. float32 ones are IEEE's unless the user allows torch the faster ones, by
    `allow_tf32` or by `fp32_precision` (the first cannot be read once the second was written), and
    the GPU has them. Of other dots it changes nothing, but most of AMD's GPUs refuse "tf32".
    """
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if _has_tf32(device) else "ieee"


def _has_tf32(device: torch.device) -> bool:
    if torch.version.hip is None:
        return True
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")
