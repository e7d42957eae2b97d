"""Tile sizes of the kernels of attention and add_layer_norm: one table, and the one that
`leedl-fast tune` measured on this GPU, which goes first.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from leedl_fast.config import cache_folder
from leedl_fast.kernels.attention_tiles import padded

KERNELS = ("forward", "decode", "query", "key_value", "bias")
_changes: dict[str, dict[str, Any]] = {}  # by kernel, see `changed`
_NARROW = 256  # of a window of at most so many keys, large tiles would compute mostly hidden pairs


class Blocks(NamedTuple):
    """Tile sizes of one kernel: the rows that a program owns, and those of a step of its loop.

    "decode" owns so many keys and steps through them; "bias" owns queries and a step of keys.
    descriptors: whether tiles that need no mask, and a program's own rows, are loaded and stored
    by tensor descriptors. programs_per_sm: how many programs each multiprocessor gets, which walk
    the tiles between them; 0: one program per tile. "decode" and "bias" know 0 alone.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    programs_per_sm: int = 0


class Key(NamedTuple):
    """What tile sizes depend on: head_dim is the larger one, rounded up to 64, 128 or 256."""

    kernel: str
    itemsize: int
    head_dim: int
    narrow: bool = False


def _everywhere(*blocks: int) -> dict[str, Blocks]:
    return dict.fromkeys(("blackwell", "hopper", "ampere", "cdna"), Blocks(*blocks))


def _each(
    hopper: tuple, ampere: tuple, cdna: tuple, blackwell: tuple | None = None
) -> dict[str, Blocks]:
    return {
        "blackwell": Blocks(*blackwell or hopper),
        "hopper": Blocks(*hopper),
        "ampere": Blocks(*ampere),
        "cdna": Blocks(*cdna),
    }


# For NVIDIA's "blackwell" (of data centres), "hopper" and "ampere", and for AMD's "cdna". Chosen by
# what the compiler reports: the largest tiles that spill no registers; those of "ampere" fit the
# 99 KiB of shared memory of a GeForce card (sm_86, sm_89, sm_120). float32 dots run out of
# registers, not on tensor cores; their "query" kernel spills a few above head_dim 64 whatever its
# tiles. A narrow window takes the wide one's tiles where it has no line.
_BLOCKS = {
    Key("forward", 2, 64): _each((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2)),
    Key("forward", 2, 128): _each((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    Key("forward", 2, 256): _each((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 4, 1)),
    Key("forward", 2, 64, True): _each((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    Key("forward", 2, 128, True): _each((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
    Key("decode", 2, 64): _everywhere(256, 64, 4, 2),
    Key("decode", 2, 128): _everywhere(256, 64, 4, 2),
    Key("decode", 2, 256): _everywhere(256, 32, 4, 2),
    Key("query", 2, 64): _each((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    Key("query", 2, 128): _each(
        (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), blackwell=(64, 32, 8, 2)
    ),
    Key("query", 2, 256): _each((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1)),
    Key("key_value", 2, 64): _each((128, 32, 8, 3), (128, 32, 8, 2), (64, 32, 4, 1)),
    Key("key_value", 2, 128): _each((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
    Key("key_value", 2, 256): _each((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1)),
    Key("bias", 2, 64): _each((64, 64, 4, 1), (64, 64, 8, 1), (64, 64, 4, 1)),
    Key("bias", 2, 128): _everywhere(64, 64, 8, 1),
    Key("bias", 2, 256): _everywhere(32, 32, 4, 1),
    Key("forward", 4, 64): _everywhere(64, 32, 8, 1),
    Key("forward", 4, 128): _everywhere(32, 32, 8, 1),
    Key("forward", 4, 256): _everywhere(16, 16, 8, 1),
    Key("decode", 4, 64): _everywhere(256, 32, 4, 1),
    Key("decode", 4, 128): _everywhere(256, 32, 4, 1),
    Key("decode", 4, 256): _everywhere(256, 16, 8, 1),
    Key("query", 4, 64): _everywhere(32, 32, 8, 1),
    Key("query", 4, 128): _everywhere(16, 16, 8, 1),
    Key("query", 4, 256): _everywhere(16, 16, 8, 1),
    Key("key_value", 4, 64): _everywhere(32, 16, 8, 1),
    Key("key_value", 4, 128): _everywhere(16, 16, 8, 1),
    Key("key_value", 4, 256): _everywhere(16, 16, 8, 1),
    Key("bias", 4, 64): _everywhere(32, 32, 8, 1),
    Key("bias", 4, 128): _everywhere(16, 16, 8, 1),
    Key("bias", 4, 256): _everywhere(16, 16, 8, 1),
}


@cache
def architecture(device: torch.device) -> str:
    """The column of the table; the interpreter takes any."""
    if torch.version.hip is not None:
        return "cdna"
    if device.type != "cuda":
        return "hopper"
    # 12.x is a Blackwell with Ampere's matrix instructions, and a GeForce's shared memory.
    columns = {9: "hopper", 10: "blackwell", 11: "blackwell"}
    return columns.get(torch.cuda.get_device_capability(device)[0], "ampere")


def key_of(kernel: str, problem: Any) -> Key:
    """kernel: of KERNELS."""
    head_dim = max(padded(problem.head_dim), padded(problem.head_dim_v), 64)
    is_narrow = problem.window_left + problem.window_right < _NARROW
    return Key(kernel, problem.dtype.itemsize, head_dim, is_narrow)


def _first(table: dict[Key, Any], keys: Sequence[Key]) -> Any:
    for key in keys:
        if key in table:
            return table[key]
    return None


def blocks_for(kernel: str, problem: Any) -> Blocks:
    """kernel: of KERNELS. Bias, softcap and dropout need registers: smaller steps leave them."""
    key = key_of(kernel, problem)
    keys = (key, key._replace(narrow=False)) if key.narrow else (key,)
    measured = tuned(problem.device) if problem.device.type == "cuda" else {}
    blocks = _first(measured, keys) or _first(_BLOCKS, keys)[architecture(problem.device)]
    if kernel in _changes:
        blocks = blocks._replace(**_changes[kernel])
    needs_registers = problem.bias_shape is not None or problem.softcap is not None
    if needs_registers or problem.dropout_p > 0:
        blocks = blocks._replace(step=max(blocks.step // 2, 16))
    return blocks


@contextmanager
def changed(kernels: Sequence[str] = KERNELS, **fields: Any) -> Iterator[None]:
    """Inside, these kernels take the tiles that they would take, but for these fields of Blocks."""
    before = dict(_changes)
    for kernel in kernels:
        _changes[kernel] = _changes.get(kernel, {}) | fields
    try:
        yield
    finally:
        _changes.clear()
        _changes.update(before)


def key_of_rows(itemsize: int, block_n: int) -> Key:
    """add_layer_norm's line in the measured table: block_n is the length of rows, rounded up."""
    return Key("add_layer_norm", itemsize, block_n)


def blocks_for_rows(problem: Any, default: Blocks) -> Blocks:
    """What add_layer_norm's forward kernel takes: default unless something was measured.

    own: rows at a time; step: their length, rounded up.
    """
    if problem.device.type != "cuda":
        return default
    return tuned(problem.device).get(key_of_rows(problem.dtype.itemsize, default.step), default)


def programs_for(blocks: Blocks, tiles: int, device: torch.device) -> int:
    """How many programs share so many tiles."""
    if blocks.programs_per_sm == 0:
        return tiles
    return min(tiles, blocks.programs_per_sm * multiprocessors(device))


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuned_path(device: torch.device) -> Path:
    """Where `leedl-fast tune` keeps what it measured for this kind of GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache_folder() / f"attention-blocks-{name}.json"


@cache
def tuned(device: torch.device) -> dict[Key, Blocks]:
    """The measured table, empty where nothing was measured."""
    path = tuned_path(device)
    return read_table(path) if path.exists() else {}


def read_table(path: Path) -> dict[Key, Blocks]:
    """Raises ValueError where the file is not such a table."""
    try:
        rows = json.loads(path.read_text())
        return {Key(*row["key"]): Blocks(*map(int, row["blocks"])) for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must be a table that `leedl-fast tune` wrote, got {error!r}; delete it"
        ) from error


def table_content(table: dict[Key, Blocks]) -> bytes:
    """What `read_table` reads."""
    rows = [{"key": list(key), "blocks": list(blocks)} for key, blocks in table.items()]
    return (json.dumps(rows, indent=1) + "\n").encode()
