"""Philox and the normal numbers made of it: known answers, equal bits everywhere, the right law."""

import math

import pytest
import torch
from torch import Tensor

from leedl_fast.backends import cpu_modules
from leedl_fast.reference import philox

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
SEEDS = torch.tensor([0, 1, -1, 42, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
STREAMS = torch.tensor([0, 1, 999, 0, 2**32 - 1, 7, 1])

every_isa = pytest.mark.parametrize("isa", list(cpu_modules.modules()))


def randn(
    isa: str,
    n: int,
    seeds: Tensor,
    streams: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    num_threads: int = 2,
) -> Tensor:
    """The compiled noise, in a tensor with guards on both sides that must stay as they are."""
    guard = 64
    buffer = torch.full((len(seeds) * n + 2 * guard,), float("nan"), dtype=dtype)
    out = buffer[guard : guard + len(seeds) * n]
    cpu_modules.modules()[isa].randn(out.view(len(seeds), n), seeds, streams, num_threads)
    assert buffer[:guard].isnan().all()
    assert buffer[guard + len(seeds) * n :].isnan().all()
    return out.view(len(seeds), n)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def box_muller_float64(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, without any of the tricks: a and b are words in int64 tensors."""
    u = (a.double() + 0.5) * 2.0**-32
    radius = torch.where(
        a < 2**31, -2 * torch.log(u), -2 * torch.log1p(-((2**32 - a).double() - 0.5) * 2.0**-32)
    ).sqrt()
    angle = b.double() * (2 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    got = philox.philox4x32(
        tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key)
    )
    assert tuple(int(word) for word in got) == words
    for module in cpu_modules.modules().values():
        assert tuple(module.philox4x32_10(counter, key)) == words


@every_isa
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 31, 32, 33, 127, 129, 1023, 1025, 8193, 20011])
def test_compiled_noise_is_the_reference_bit_for_bit(isa: str, n: int) -> None:
    for streams in (None, STREAMS):
        expected = philox.standard_normal(n, SEEDS, streams)
        assert torch.equal(bits(randn(isa, n, SEEDS, streams)), bits(expected))
        doubles = randn(isa, n, SEEDS, streams, dtype=torch.float64)
        assert torch.equal(doubles, expected.double())


EDGE_WORDS = sorted(
    {(base + offset) % 2**32 for base in range(0, 2**32, 2**29) for offset in (-129, -1, 0, 1, 130)}
)


def test_no_word_is_special() -> None:
    """Words at every edge of the recipe: both ends of u, the half, and each eighth of a turn."""
    a, b = torch.meshgrid(torch.tensor(EDGE_WORDS), torch.tensor(EDGE_WORDS), indexing="ij")
    z0, z1 = philox._normal_pair(a, b)
    exact0, exact1 = box_muller_float64(a, b)
    assert max((z0 - exact0).abs().max(), (z1 - exact1).abs().max()) <= 2e-6
    assert z0.abs().max() < 6.77
    for module in cpu_modules.modules().values():
        words = zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
        pairs = torch.tensor([module.normal_pair(*pair) for pair in words])
        compiled0, compiled1 = pairs.unbind(1)
        assert torch.equal(bits(compiled0), bits(z0.ravel()))
        assert torch.equal(bits(compiled1), bits(z1.ravel()))


def test_error_against_float64() -> None:
    n, seed = 1 << 20, torch.tensor([2024])
    block, zero = torch.arange(n // 4), torch.tensor(0)
    words = philox.philox4x32((block, zero, zero, zero), (seed, zero))
    pairs = (*box_muller_float64(words[0], words[1]), *box_muller_float64(words[2], words[3]))
    exact = torch.stack(pairs, dim=-1).ravel()
    isa = next(iter(cpu_modules.modules()))
    assert (randn(isa, n, seed)[0] - exact).abs().max() <= 2e-6


@pytest.fixture(scope="module")
def sample() -> Tensor:
    """Four million numbers of one seed, in float64."""
    return randn(next(iter(cpu_modules.modules())), 1 << 22, torch.tensor([7]))[0].double()


def test_moments(sample: Tensor) -> None:
    n = len(sample)
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        # The variance of z^p is E z^2p - (E z^p)^2, and E z^2p = (2p - 1)!!.
        variance = math.prod(range(1, 2 * power, 2)) - expected**2
        deviation = (sample.pow(power).mean() - expected) / math.sqrt(variance / n)
        assert abs(deviation) < 4, f"moment {power} is {deviation} standard errors off"


def test_kolmogorov_smirnov(sample: Tensor) -> None:
    n = len(sample)
    cdf = torch.special.ndtr(sample.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(cdf - steps[:-1], steps[1:] - cdf).max()
    assert distance * math.sqrt(n) < 1.95  # exceeded by one sample in a thousand


def test_tails(sample: Tensor) -> None:
    for bound in (3.0, 4.0, 4.5, 5.0):
        expected = len(sample) * math.erfc(bound / math.sqrt(2))
        count = int((sample.abs() > bound).sum())
        assert abs(count - expected) < 4 * math.sqrt(expected) + 1


def test_seeds_streams_and_neighbours_are_independent() -> None:
    n = 1 << 18
    seeds = torch.tensor([5, 5, 5, 6, 5 + 2**32, -5])
    streams = torch.tensor([0, 1, 2, 0, 0, 0])
    rows = randn(next(iter(cpu_modules.modules())), n, seeds, streams).double()
    shifted = torch.stack([rows[0].roll(shift) for shift in (1, 2, 3, 4, 64)])
    series = torch.cat([rows, rows.square() - 1, shifted, shifted.square() - 1])
    correlation = torch.corrcoef(series) - torch.eye(len(series), dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(n)


@every_isa
def test_noise_does_not_depend_on_batch_length_or_threads(isa: str) -> None:
    n = 30_001
    whole = randn(isa, n, SEEDS, STREAMS, num_threads=2)
    for num_threads in (1, 3):
        assert torch.equal(whole, randn(isa, n, SEEDS, STREAMS, num_threads=num_threads))
    for i in range(len(SEEDS)):
        alone = randn(isa, n, SEEDS[i : i + 1], STREAMS[i : i + 1])
        assert torch.equal(whole[i : i + 1], alone)
    assert torch.equal(whole[:, :1234], randn(isa, 1234, SEEDS, STREAMS))
