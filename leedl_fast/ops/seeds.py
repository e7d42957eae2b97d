"""Seeds: int64 keys on the device that draws with them, of a dropout mask or of each sample."""

import torch
from torch import Tensor

from leedl_fast.backends import cpu_modules
from leedl_fast.ops import checks
from leedl_fast.ops.contract import traced


def dropout_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """(1,) int64: the key of a dropout mask; None draws one from torch's default generator.

    Raises TypeError or ValueError for what is not an int of 64 bits nor an int64 tensor of one
    element on `device`.
    """
    if seed is None:
        drawn = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
        if device.type == "cpu" or torch.compiler.is_compiling():
            return drawn.to(device)
        return _filled(int(drawn), device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got a tensor of {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
        checks.check_same_device("seed", seed.device, device, "the other tensors")
        return seed.reshape(1)
    checks.check_int("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return _filled(_signed(seed), device)


def _filled(key: int, device: torch.device) -> Tensor:
    """Made on the device: a copy from the host would wait for it, and no CUDA graph takes one."""
    return torch.full((1,), key, dtype=torch.int64, device=device)


def check_dropout_p(value: float) -> None:
    checks.check_finite("dropout_p", value)
    if not 0 <= value < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {value}")


def sample_seeds(seed: int | Tensor, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """(batch,) int64 keys of the samples' random numbers.

    A tensor of int64 keys is taken as it is. From an int, sample b gets the b-th output of the
    SplitMix64 generator (Steele et al. 2014) that starts at `seed`: well-mixed keys, the same for
    sample b whatever the batch around it.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got a tensor of {seed.dtype}")
        checks.check_integer_vector("seed", seed, batch, torch.device(device))
        return seed.contiguous()
    checks.check_int("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    seeds = torch.empty(batch, dtype=torch.int64, device=device)
    if seeds.device.type == "cpu" and cpu_modules.isa() is not None and not traced(seeds):
        # At once, where each operator below costs as much as a small kernel.
        cpu_modules.entry_points.sample_seeds(seeds, _signed(seed))
        return seeds
    golden, first, second = (
        _signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    )
    state = torch.arange(1, batch + 1, dtype=torch.int64, device=device) * golden + _signed(seed)
    state = (state ^ _logical_shift(state, 30)) * first
    state = (state ^ _logical_shift(state, 27)) * second
    return state ^ _logical_shift(state, 31)


def _signed(value: int) -> int:
    """The int64 with the bits of value."""
    return (value + 2**63) % 2**64 - 2**63


def _logical_shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & (2 ** (64 - bits) - 1)
