"""Seeds of dropout: one int64 key, on the device that draws with it."""

import torch
from torch import Tensor

from leedl_fast.ops import checks


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
    return _filled((seed + 2**63) % 2**64 - 2**63, device)


def _filled(key: int, device: torch.device) -> Tensor:
    """Made on the device: a copy from the host would wait for it, and no CUDA graph takes one."""
    return torch.full((1,), key, dtype=torch.int64, device=device)


def check_dropout_p(value: float) -> None:
    checks.check_finite("dropout_p", value)
    if not 0 <= value < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {value}")
