"""Each AMX instruction against a computation in numpy; `test_amx.py` runs this file in a process of
its own. Without AMX in the processor this tests the emulator, with it the tests themselves.
"""

import ctypes
import os
import resource
import signal
import threading

import numpy as np
import pytest
from libraries import instructions
from numpy.typing import NDArray

Array = NDArray[np.generic]
Shapes = dict[int, tuple[int, int]]  # rows and bytes of a row, by tile

RNG = np.random.default_rng(0)
FULL: Shapes = dict.fromkeys(range(8), (16, 64))


def configuration(shapes: Shapes, palette: int = 1) -> NDArray[np.uint8]:
    """What ldtilecfg reads."""
    config = np.zeros(64, np.uint8)
    config[0] = palette
    for tile, (rows, row_bytes) in shapes.items():
        config[16 + 2 * tile] = row_bytes
        config[48 + tile] = rows
    return config


def call(name: str, *arguments: Array | int) -> None:
    """The function of instructions.c: arrays are pointers, numbers 64 bits wide."""
    getattr(instructions(), name)(
        *(
            ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_void_p(x.ctypes.data)
            for x in arguments
        )
    )


def random_bytes(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape, np.uint8)


def bfloat16(numbers: Array) -> NDArray[np.uint16]:
    """The bits of numbers that are cut to bfloat16."""
    return (np.asarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return flushed((bits.astype(np.uint32) << 16).view(np.float32)).astype(np.float64)


def flushed(x: Array) -> NDArray[np.float32]:
    """x in float32, subnormal numbers as zeros of their sign."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def product(c: Array, a: Array, b: Array) -> NDArray[np.float32]:
    """c + a . b as the manual adds it up: float32 c (m, n), bits of bfloat16 a (m, 2k), b (k, 2n).

    A product of two bfloat16 numbers is exact in float64, and so is its sum with a float32 whose
    exponent is not too far from its own: the rounding to float32 is that of one fma.
    """
    a, b = widened(a), widened(b)
    sums = []
    for half in (0, 1):
        total = np.zeros((a.shape[0], b.shape[1] // 2), np.float32)
        for k in range(b.shape[0]):
            products = a[:, 2 * k + half, None] * b[k, half::2]
            total = flushed(total.astype(np.float64) + products)
        sums.append(total)
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))


def padded(matrix: Array) -> NDArray[np.uint8]:
    """A matrix as 16 rows of 64 bytes; what does not belong to it is noise."""
    memory = random_bytes(16, 64)
    rows = np.ascontiguousarray(matrix).view(np.uint8)
    memory[: rows.shape[0], : rows.shape[1]] = rows
    return memory


def multiplied(c: Array, a: Array, b: Array, function: str = "multiply") -> NDArray[np.float32]:
    """c + a . b by tdpbf16ps, with tiles of these very shapes."""
    (m, n), k = c.shape, b.shape[0]
    tiles = (0, 1, 2) if function == "multiply" else (7, 6, 5)
    shapes = dict(zip(tiles, ((m, 4 * n), (m, 4 * k), (k, 4 * n)), strict=True))
    memory = padded(c)
    before = memory.copy()
    call(function, configuration(shapes), memory, padded(a), padded(b))
    result = memory[:m, : 4 * n].copy().view(np.float32)
    memory[:m, : 4 * n] = before[:m, : 4 * n]
    assert np.array_equal(memory, before), "tilestored wrote beyond the tile"
    return result


def same_bits(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    return np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_sttilecfg_stores_what_ldtilecfg_loaded() -> None:
    config, stored = configuration({0: (16, 64), 3: (1, 4), 7: (9, 12)}), random_bytes(64)
    call("load_and_store_config", config, stored)
    assert np.array_equal(stored, config)


def test_palette_0_and_tilerelease_leave_no_configuration() -> None:
    config, stored = configuration(FULL), random_bytes(64)
    call("store_config_after_release", config, stored)
    assert not stored.any()
    config[0], stored = 0, random_bytes(64)
    call("load_and_store_config", config, stored)
    assert not stored.any()


@pytest.mark.parametrize("streamed", [0, 1], ids=["tileloadd", "tileloaddt1"])
@pytest.mark.parametrize("shape", [(16, 64), (1, 4), (7, 20), (16, 4), (3, 64), (5, 7)])
@pytest.mark.parametrize("stride", [64, 96, 1000, -80])
def test_tileloadd_and_tilestored_move_the_rows(
    shape: tuple[int, int], stride: int, streamed: int
) -> None:
    rows, row_bytes = shape
    memory, to = random_bytes(16 * 1000 + 64), random_bytes(16 * 72 + 64)
    expected = to.copy()
    start = 15 * 80 if stride < 0 else 0
    for row in range(rows):
        at = start + row * stride
        expected[72 * row : 72 * row + row_bytes] = memory[at : at + row_bytes]
    call("copy", configuration({0: shape}), memory[start:], stride, to, 72, streamed)
    assert np.array_equal(to, expected)


def test_every_form_of_address() -> None:
    memory, to = random_bytes(16, 128), random_bytes(8, 16, 64)
    call("copy_by_every_form_of_address", configuration({3: (16, 64)}), memory, to)
    for copy in to:
        assert np.array_equal(copy, memory[:, :64])


def test_without_an_index_rows_have_one_address() -> None:
    memory, to = random_bytes(64), random_bytes(16, 64)
    call("load_without_index", configuration({0: (16, 64)}), memory, to)
    assert np.array_equal(to, np.broadcast_to(memory, (16, 64)))


def test_tilezero_leaves_other_tiles_alone() -> None:
    memory, zeroed, kept = random_bytes(16, 64), random_bytes(16, 64), random_bytes(16, 64)
    call("zero_one_of_two", configuration(FULL), memory, zeroed, kept)
    assert not zeroed.any()
    assert np.array_equal(kept, memory)


def test_ldtilecfg_zeroes_the_tiles() -> None:
    to = random_bytes(16, 64)
    call("configure_again", configuration(FULL), random_bytes(16, 64), to)
    assert not to.any()


@pytest.mark.parametrize("function", ["multiply", "multiply_on_the_last_tiles"])
@pytest.mark.parametrize(
    "sizes", [(16, 16, 16), (1, 1, 1), (3, 5, 7), (16, 1, 16), (1, 16, 1), (8, 16, 2)]
)
def test_tdpbf16ps_rounds_as_the_manual_says(sizes: tuple[int, int, int], function: str) -> None:
    m, n, k = sizes
    for _ in range(20):
        c = RNG.standard_normal((m, n)).astype(np.float32)
        a, b = RNG.standard_normal((m, 2 * k)), RNG.standard_normal((k, 2 * n))
        a, b = (bfloat16(np.where(np.abs(x) < 1 / 128, 0, x)) for x in (a, b))
        assert same_bits(multiplied(c, a, b, function), product(c, a, b))


def test_tdpbf16ps_keeps_sums_of_even_and_odd_products_apart() -> None:
    """2^30 and -2^30 meet at the end, when the ones that were added to either are lost."""
    a = bfloat16(np.array([[2.0**30, -(2.0**30), 1, 1]]))
    ones = bfloat16(np.ones((2, 2)))
    assert multiplied(np.full((1, 1), 3, np.float32), a, ones) == 3
    # One after the other these would cancel first, and leave 3 + 2.
    a = bfloat16(np.array([[2.0**30, 1, -(2.0**30), 1]]))
    assert multiplied(np.full((1, 1), 3, np.float32), a, ones) == 5


TINY = np.float32(2.0**-126)


@pytest.mark.parametrize(
    ("c", "a", "b", "expected"),
    [
        (0, 2.0**-127, 2.0**100, 0),  # a subnormal operand
        (0, 2.0**100, 2.0**-127, 0),
        (TINY / 2, 0, 1, 0),  # a subnormal sum so far
        (0, 2.0**-70, 2.0**-60, 0),  # a subnormal result
        (0, 2.0**-63, 2.0**-63, TINY),
        (-TINY, 1.5 * 2.0**-63, 2.0**-63, 0),
        (1, np.inf, 1, np.inf),
        (1, np.inf, -1, -np.inf),
        (1, 2.0**127, 2.0**127, np.inf),
        (0, -0.0, 1, 0),
    ],
)
def test_tdpbf16ps_at_the_ends_of_the_range(c: float, a: float, b: float, expected: float) -> None:
    left = bfloat16(np.array([[a, 0]], np.float32))
    right = bfloat16(np.array([[b, 0]], np.float32))
    actual = multiplied(np.full((1, 1), c, np.float32), left, right)
    assert same_bits(actual, np.full((1, 1), expected, np.float32))


def test_tdpbf16ps_keeps_nan() -> None:
    one = bfloat16(np.ones((1, 2)))
    for a, c in ((np.nan, 0), (1, np.nan), (np.inf, -np.inf)):
        left = bfloat16(np.array([[a, 1]], np.float32))
        assert np.isnan(multiplied(np.full((1, 1), c, np.float32), left, one)).all()


def test_threads_have_tiles_of_their_own() -> None:
    failures = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        memory = rng.integers(0, 256, (16, 64), np.uint8)
        config = configuration({0: (int(rng.integers(1, 17)), 64)})
        rows = int(config[48])
        for _ in range(200):
            to = np.zeros((16, 64), np.uint8)
            call("copy", config, memory, 64, to, 64, 0)
            if not np.array_equal(to[:rows], memory[:rows]) or to[rows:].any():
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def dies_of(function: str, *arguments: Array) -> int:
    """The signal that ends a process that calls a function of instructions.c, or 0."""
    instructions()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        call(function, *arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 2),  # a palette that does not exist
        (9, 1),  # reserved
        (32, 64),  # a ninth tile
        (48, 17),  # rows
        (18, 65),  # bytes of a row
        (50, 0),  # bytes without rows
    ],
)
def test_a_bad_configuration_is_a_fault(at: int, value: int) -> None:
    config = configuration(FULL)
    assert dies_of("load_and_store_config", config, np.zeros(64, np.uint8)) == 0
    config[at] = value
    assert dies_of("load_and_store_config", config, np.zeros(64, np.uint8)) == signal.SIGSEGV


FITTING: Shapes = {0: (4, 16), 1: (4, 16), 2: (4, 16)}


@pytest.mark.parametrize(
    "shapes",
    [
        {**FITTING, 1: (4, 12)},  # the depths differ
        {**FITTING, 1: (5, 16)},  # the rows differ
        {**FITTING, 2: (4, 12)},  # the columns differ
        {0: (4, 16), 1: (4, 16)},  # there is no second operand
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_undefined(shapes: Shapes) -> None:
    matrices = np.zeros((3, 16, 64), np.uint8)
    assert dies_of("multiply", configuration(FITTING), *matrices) == 0
    assert dies_of("multiply", configuration(shapes), *matrices) == signal.SIGILL


def test_instructions_that_are_undefined() -> None:
    assert dies_of("use_without_configuration") == signal.SIGILL
    assert dies_of("multiply_a_tile_with_itself", configuration(FULL)) == signal.SIGILL
