"""One stream of noise: what a backend makes of a seed is bit for bit what the CPU backend makes."""

from typing import Any

import torch
from torch import Tensor

from leedl_fast.ops import diffusion
from leedl_fast.testing.compare import equal_bits

_SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF)


def noise_is_the_cpus(backend: str, n: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether n numbers of each of several seeds are, on CPU tensors."""
    seeds = torch.tensor(_SEEDS)
    own, cpus = (
        diffusion.randn((len(seeds), n), seed=seeds, dtype=dtype, backend=name)
        for name in (backend, "cpu")
    )
    return equal_bits(own, cpus)


def steps_are_the_cpus(backend: str, n: int) -> bool:
    """Whether add_noise and ddpm_step, plain and guided, of samples of 3 n numbers are."""
    sample, output, unconditional = torch.randn(3, 3, n)
    schedule = diffusion.NoiseSchedule.linear(1000)
    timesteps = torch.tensor([999, 500, 0])

    def run(name: str) -> list[Tensor]:
        def step(**guidance: Any) -> Tensor:
            return diffusion.ddpm_step(
                output, timesteps, sample, schedule, seed=5, backend=name, **guidance
            )

        return [
            diffusion.add_noise(sample, timesteps, schedule, seed=5, backend=name),
            step(),
            step(unconditional_output=unconditional, guidance_scale=3.0, clip_range=1.0),
        ]

    return all(map(equal_bits, run(backend), run("cpu")))
