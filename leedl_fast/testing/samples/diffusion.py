"""Sample problems of diffusion: noise, its loss, and the samplers' steps."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from leedl_fast.ops import diffusion
from leedl_fast.testing.samples.case import Case, Tensors

_SCHEDULE = diffusion.NoiseSchedule.linear(1000)
_SHAPE = (3, 5, 7, 9)
_TIMESTEPS = (999, 0, 417)


def _timesteps(values: int | tuple[int, ...], device: torch.device) -> int | Tensor:
    return values if isinstance(values, int) else torch.tensor(values, device=device)


def _diffusion(
    tensors: Tensors,
    backend: str | None,
    *,
    function: str,
    t: int | tuple[int, ...],
    **options: Any,
) -> tuple[Tensor]:
    tensors = dict(tensors)
    first = tensors.pop(next(iter(tensors)))
    timesteps = _timesteps(t, first.device)
    if "prev_timesteps" in options:
        options["prev_timesteps"] = _timesteps(options["prev_timesteps"], first.device)
    if function == "add_noise":
        arguments = (first, timesteps, _SCHEDULE)
    else:
        sample = tensors.pop("sample")
        order = (sample, timesteps) if function == "noise_prediction_loss" else (timesteps, sample)
        arguments = (first, *order, _SCHEDULE)
    call = getattr(diffusion, function)
    return (call(*arguments, backend=backend, **tensors, **options),)


def _diffusion_case(
    name: str,
    function: str,
    shape: tuple[int, ...] = _SHAPE,
    t: int | tuple[int, ...] = _TIMESTEPS,
    *,
    extra: tuple[str, ...] = (),
    **options: Any,
) -> Case:
    names = ("sample",) if function == "add_noise" else ("model_output", "sample")
    shapes = dict.fromkeys((*names, *extra), shape)
    call = partial(_diffusion, function=function, t=t)
    return Case("diffusion", f"{function}-{name}", shapes, call, options=options)


_BIG = (2, 3, 100, 101)
DIFFUSION = (
    _diffusion_case("seed", "add_noise", seed=7),
    _diffusion_case("noise", "add_noise", extra=("noise",)),
    _diffusion_case("parallel", "add_noise", _BIG, 500, seed=-1),
    _diffusion_case("vector", "add_noise", (5,), 3, seed=2**63),
    _diffusion_case("empty", "add_noise", (0, 3), 3, seed=1),
    *(
        _diffusion_case(kind, "noise_prediction_loss", seed=7, prediction_type=kind)
        for kind in ("epsilon", "v_prediction", "sample")
    ),
    _diffusion_case("sum", "noise_prediction_loss", _BIG, 500, seed=3, reduction="sum"),
    _diffusion_case(
        "noise", "noise_prediction_loss", extra=("noise",), prediction_type="v_prediction"
    ),
    *(
        _diffusion_case(kind, "ddpm_step", seed=7, prediction_type=kind)
        for kind in ("epsilon", "v_prediction", "sample")
    ),
    _diffusion_case("clip", "ddpm_step", t=(1, 500, 30), seed=7, clip_range=1.0),
    _diffusion_case("large", "ddpm_step", t=40, seed=7, variance="fixed_large"),
    _diffusion_case("noise", "ddpm_step", extra=("noise",)),
    _diffusion_case("parallel", "ddpm_step", _BIG, 500, seed=3),
    _diffusion_case("stride", "ddpm_step", t=(40, 20, 19), prev_timesteps=(20, -1, 0), seed=1),
    *(
        _diffusion_case(kind, "ddim_step", prediction_type=kind, prev_timesteps=(899, -1, 317))
        for kind in ("epsilon", "v_prediction", "sample")
    ),
    _diffusion_case("eta", "ddim_step", t=500, prev_timesteps=400, eta=0.7, seed=7),
    _diffusion_case("clip", "ddim_step", t=300, prev_timesteps=250, clip_range=1.0),
    _diffusion_case(
        "guidance", "ddim_step", t=500, extra=("unconditional_output",), guidance_scale=7.5
    ),
    _diffusion_case(
        "guidance-clip",
        "ddpm_step",
        t=500,
        extra=("unconditional_output",),
        guidance_scale=3.0,
        clip_range=1.5,
        seed=1,
    ),
)
