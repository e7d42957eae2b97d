"""Diffusion steps beside what people write: the same formulas in plain PyTorch, torch's own noise.

Counted is the traffic of the tensors that must be read and written; fused kernels make the noise on
the way and never store it. The library's eager backend is the reference here and no contender: it
makes the library's noise in plain PyTorch, integer operation by integer operation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leedl_fast import diffusion
from leedl_fast.benchmarks.suite import (
    COMPILED,
    EAGER,
    OURS,
    SEED,
    Case,
    Expected,
    Implementation,
    Measure,
    Settings,
    Work,
)

TORCH_RANDN = "torch.randn"
CLIP_RANGE = 1.0
GUIDANCE_SCALE = 3.0
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class DiffusionCase:
    """tensors: how many tensors of `shape` the operation reads and writes, at the least."""

    name: str
    tensors: int
    shape: tuple[int, ...]
    bars: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    compiled: bool = True

    @property
    def backward(self) -> bool:
        return "gradient" in self.name

    @property
    def sizes(self) -> str:
        return " x ".join(map(str, self.shape))


@dataclass(frozen=True)
class Problem:
    """The inputs of every operation."""

    sample: Tensor
    model_output: Tensor
    unconditional_output: Tensor
    timesteps: Tensor
    schedule: diffusion.NoiseSchedule

    def double(self) -> "Problem":
        tensors = (self.sample, self.model_output, self.unconditional_output)
        copies = (t.detach().double().requires_grad_(t.requires_grad) for t in tensors)
        return Problem(*copies, self.timesteps, self.schedule)


def cases(settings: Settings) -> list[DiffusionCase]:
    tiny = settings.tier == "tiny"
    shape = (2, 3, 8, 8) if tiny else (16, 3, 256, 256)
    main = [
        DiffusionCase("randn", 1, shape, {TORCH_RANDN: 5}),
        DiffusionCase("randn + add_noise", 2, shape, {EAGER: 8}),
        DiffusionCase("add_noise + loss + gradient", 5, shape, compiled=not tiny),
        DiffusionCase("ddpm_step", 3, shape, {EAGER: 8}, compiled=not tiny),
        DiffusionCase("ddim_step", 3, shape, compiled=not tiny),
    ]
    if settings.tier != "quick":
        main.append(DiffusionCase("ddim_step, guidance", 4, shape, compiled=not tiny))
    if settings.tier == "full":
        main += [
            DiffusionCase("randn + add_noise", 2, (64, 3, 32, 32)),
            DiffusionCase("ddpm_step", 3, (64, 3, 32, 32)),
            DiffusionCase("ddpm_step", 3, (1, 4, 64, 64)),
        ]
    return main


def test_diffusion(case: DiffusionCase, measure: Measure) -> None:
    problem = make_problem(case, measure.settings)
    exact = problem.double()
    operation, plain = OPERATIONS[case.name]

    def library(problem: Problem, backend: str, **noise: Any) -> Outputs:
        return finish(case, problem, operation(problem, backend=backend, **noise))

    expected = outcome(library(exact, "eager", seed=SEED), library(problem, "eager", seed=SEED))
    implementations = {
        OURS: Implementation(lambda: library(problem, measure.settings.backend, seed=SEED))
    }
    if plain is None:
        implementations[TORCH_RANDN] = Implementation(
            lambda: torch.randn(case.shape, dtype=case.dtype, device=measure.settings.device),
            random=True,
        )
    else:
        tables = make_tables(problem)

        def written_out(function: Callable[..., Outputs] = plain) -> Outputs:
            return finish(case, problem, function(problem, tables))

        # The plain version draws its noise with torch.randn_like, as its first act.
        torch.manual_seed(SEED)
        drawn = torch.randn_like(problem.sample).double()
        torch.manual_seed(SEED)
        own = outcome(library(exact, "eager", noise=drawn), written_out())
        implementations[EAGER] = Implementation(written_out, expected=own)
        if case.compiled:
            compiled = torch.compile(plain, dynamic=False, fullgraph=True)
            implementations[COMPILED] = Implementation(
                lambda: written_out(compiled), compiled=True, random="ddim" not in case.name
            )
    measure(
        Case(
            op="diffusion",
            name=case.name,
            sizes=case.sizes,
            dtype=case.dtype,
            work=Work(bytes=float(case.tensors * problem.sample.nbytes)),
            bars=case.bars,
        ),
        implementations,
        expected,
    )


def make_problem(case: DiffusionCase, settings: Settings) -> Problem:
    generator = torch.Generator().manual_seed(0)
    sample, model_output, unconditional_output = (
        torch.randn(case.shape, generator=generator).to(settings.device, case.dtype)
        for _ in range(3)
    )
    schedule = diffusion.NoiseSchedule.linear(1000)
    timesteps = torch.randint(1, 1000, case.shape[:1], generator=generator).to(settings.device)
    model_output.requires_grad_(case.backward)
    return Problem(sample, model_output, unconditional_output, timesteps, schedule)


def finish(case: DiffusionCase, problem: Problem, outputs: Outputs) -> Outputs:
    """The outputs, and the gradient where the case has one."""
    if not case.backward:
        return outputs
    noisy, loss = outputs
    return noisy, loss, *torch.autograd.grad(loss, problem.model_output)


def outcome(reference: Outputs, plain: Outputs) -> list[Expected]:
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (reference, plain)), strict=True)
    return [
        Expected.of(f"output {i}", exact, rounded, torch.float32)
        for i, (exact, rounded) in enumerate(pairs)
    ]


def randn(problem: Problem, *, backend: str, seed: int) -> Tensor:
    dtype = problem.sample.dtype
    return diffusion.randn(problem.sample.shape, seed=seed, dtype=dtype, backend=backend)


def add_noise(problem: Problem, **options: Any) -> Tensor:
    return diffusion.add_noise(problem.sample, problem.timesteps, problem.schedule, **options)


def noise_and_loss(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """A training step without the model, which would make model_output of noisy."""
    noisy = add_noise(problem, **options)
    arguments = problem.model_output, problem.sample, problem.timesteps, problem.schedule
    return noisy, diffusion.noise_prediction_loss(*arguments, **options)


def ddpm_step(problem: Problem, **options: Any) -> Tensor:
    arguments = problem.model_output, problem.timesteps, problem.sample, problem.schedule
    return diffusion.ddpm_step(*arguments, clip_range=CLIP_RANGE, **options)


def ddim_step(problem: Problem, *, backend: str, **noise: Any) -> Tensor:
    arguments = problem.model_output, problem.timesteps, problem.sample, problem.schedule
    return diffusion.ddim_step(*arguments, clip_range=CLIP_RANGE, backend=backend)


def guided_ddim_step(problem: Problem, *, backend: str, **noise: Any) -> Tensor:
    return diffusion.ddim_step(
        problem.model_output,
        problem.timesteps,
        problem.sample,
        problem.schedule,
        clip_range=CLIP_RANGE,
        unconditional_output=problem.unconditional_output,
        guidance_scale=GUIDANCE_SCALE,
        backend=backend,
    )


@dataclass(frozen=True)
class Tables:
    """float32 tables of a scheduler that works in plain PyTorch."""

    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor


def make_tables(problem: Problem) -> Tables:
    abar = problem.schedule.alphas_cumprod.to(problem.sample.device, torch.float32)
    return Tables(abar, torch.cat([abar.new_ones(1), abar[:-1]]))


def at(table: Tensor, problem: Problem) -> Tensor:
    return table[problem.timesteps].view(-1, 1, 1, 1).to(problem.sample.dtype)


def plain_add_noise(problem: Problem, tables: Tables) -> Tensor:
    return mix(problem, tables, torch.randn_like(problem.sample))


def mix(problem: Problem, tables: Tables, noise: Tensor) -> Tensor:
    abar = at(tables.alphas_cumprod, problem)
    return abar.sqrt() * problem.sample + (1 - abar).sqrt() * noise


def plain_noise_and_loss(problem: Problem, tables: Tables) -> tuple[Tensor, ...]:
    noise = torch.randn_like(problem.sample)
    return mix(problem, tables, noise), F.mse_loss(problem.model_output, noise)


def plain_ddpm_step(problem: Problem, tables: Tables) -> Tensor:
    noise = torch.randn_like(problem.sample)
    abar, abar_prev = (
        at(table, problem) for table in (tables.alphas_cumprod, tables.alphas_cumprod_prev)
    )
    alpha = abar / abar_prev
    x0 = (problem.sample - (1 - abar).sqrt() * problem.model_output) / abar.sqrt()
    x0 = x0.clamp(-CLIP_RANGE, CLIP_RANGE)
    mean = abar_prev.sqrt() * (1 - alpha) / (1 - abar) * x0
    mean = mean + alpha.sqrt() * (1 - abar_prev) / (1 - abar) * problem.sample
    deviation = ((1 - abar_prev) / (1 - abar) * (1 - alpha)).sqrt()
    return mean + deviation * noise


def plain_ddim_step(problem: Problem, tables: Tables) -> Tensor:
    return implicit_step(problem, tables, problem.model_output)


def plain_guided_ddim_step(problem: Problem, tables: Tables) -> Tensor:
    unconditional = problem.unconditional_output
    guided = unconditional + GUIDANCE_SCALE * (problem.model_output - unconditional)
    return implicit_step(problem, tables, guided)


def implicit_step(problem: Problem, tables: Tables, model_output: Tensor) -> Tensor:
    abar, abar_prev = (
        at(table, problem) for table in (tables.alphas_cumprod, tables.alphas_cumprod_prev)
    )
    x0 = (problem.sample - (1 - abar).sqrt() * model_output) / abar.sqrt()
    x0 = x0.clamp(-CLIP_RANGE, CLIP_RANGE)
    return abar_prev.sqrt() * x0 + (1 - abar_prev).sqrt() * model_output


# By case: the library's operation, and the same in plain PyTorch.
OPERATIONS: dict[str, tuple[Callable[..., Outputs], Callable[..., Outputs] | None]] = {
    "randn": (randn, None),
    "randn + add_noise": (add_noise, plain_add_noise),
    "add_noise + loss + gradient": (noise_and_loss, plain_noise_and_loss),
    "ddpm_step": (ddpm_step, plain_ddpm_step),
    "ddim_step": (ddim_step, plain_ddim_step),
    "ddim_step, guidance": (guided_ddim_step, plain_guided_ddim_step),
}
