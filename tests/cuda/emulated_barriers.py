"""What the emulator sees: waits that are missing, and waits that never end."""

import ctypes
from functools import cache
from pathlib import Path

import pytest
import torch
from emulated_module import compile_emulated
from torch import Tensor

SEEDS = range(20)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(
        str(compile_emulated("planted", [Path(__file__).with_name("planted.cu")]))
    )
    library.run.restype = ctypes.c_char_p
    return library


def _run(kernel: str, seed: int = 0, threads: int = 96) -> tuple[str, Tensor]:
    """(what the emulator says, what the kernel makes of 0, 1, 2 ...)"""
    out = torch.arange(float(threads))
    address = ctypes.c_void_p(out.data_ptr())
    arguments = ctypes.c_uint64(seed), threads, ctypes.c_size_t(4 * threads), address
    return _library().run(kernel.encode(), *arguments).decode(), out


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("reverse", torch.arange(96.0).flip(0)),
        ("reverse-copies", torch.arange(96.0).flip(0)),
        ("shift-twice", torch.arange(96.0).roll(-2)),
        ("sum", torch.arange(96.0).sum().expand(96)),
        ("end-early", torch.cat((torch.ones(32), torch.arange(32.0, 96)))),
    ],
)
def test_kernels_that_wait(kernel: str, expected: Tensor) -> None:
    for seed in SEEDS:
        said, out = _run(kernel, seed)
        assert not said
        assert torch.equal(out, expected)


@pytest.mark.parametrize("kernel", ["reverse", "reverse-copies"])
def test_reading_too_early_gives_nan(kernel: str) -> None:
    for seed in SEEDS:
        said, out = _run(f"{kernel}-without-waiting", seed)
        assert not said
        assert out.isnan().any()


def test_writing_too_early_gives_other_numbers() -> None:
    expected = torch.arange(96.0).roll(-2)
    results = [_run("shift-twice-without-waiting", seed)[1] for seed in SEEDS]
    assert not any(torch.equal(out, expected) for out in results)


def test_a_place_that_is_taken_too_early() -> None:
    """By the next sum over the block, while some threads still read the last one there."""
    expected = torch.arange(96.0).sum().expand(96)
    results = [_run("sum-in-one-place", seed)[1] for seed in SEEDS]
    assert not all(torch.equal(out, expected) for out in results)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("half-of-a-warp", "a warp waits for lanes that never come, at __syncwarp"),
        ("different-instructions", "lanes of a warp wait at different instructions"),
        ("one-warp", "a warp waits for lanes that never come, at __syncwarp"),
    ],
)
def test_waits_that_never_end(kernel: str, expected: str) -> None:
    for seed in SEEDS:
        assert expected in _run(kernel, seed)[0]
    assert not _run("sum")[0]  # the emulator is whole again


def test_too_many_threads() -> None:
    assert _run("sum", threads=2048)[0] == "cudaErrorInvalidConfiguration"
