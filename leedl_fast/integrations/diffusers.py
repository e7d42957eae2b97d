"""Hugging Face diffusers on the fused kernels: the attention of its models, and two schedulers.

`changes` finds every `Attention` module that runs one of the two plain processors, AttnProcessor2_0
and AttnProcessor. Modules of diffusers' newer kind (`AttentionModuleMixin`: Flux, Wan, ...) are
left: their processors call a dispatcher whose backends are the members of an enumeration, which
takes no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import diffusers
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from leedl_fast.integrations.changes import Change
from leedl_fast.ops import checks, diffusion
from leedl_fast.ops.noise_schedule import PREDICTION_TYPES, NoiseSchedule
from leedl_fast.ops.scaled_dot_product_attention import scaled_dot_product_attention

Generators = torch.Generator | list[torch.Generator] | None

# Of diffusers' variance types, those of `ddpm_step`; "_log" goes through a logarithm and back.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
}


def changes(model: nn.Module) -> Iterator[Change]:
    """The attention modules of diffusers in `model`, but those that are on the kernels already."""
    for path, module in model.named_modules():
        if not isinstance(module, Attention | AttentionModuleMixin):
            continue
        if not isinstance(module.processor, AttentionProcessor):
            yield _change(path, module)


def _change(path: str, module: Any) -> Change:
    before = module.processor
    was = f"diffusers {type(before).__name__}"
    if not isinstance(module, Attention):
        reason = "its attention dispatcher takes no backend but diffusers' own"
        return Change(path, was, reason=reason)
    if type(before) is AttnProcessor2_0:
        processor = AttentionProcessor()
    elif type(before) is AttnProcessor:
        processor = AttentionProcessor(softmax_scale=module.scale, norm_qk=False)
    else:
        reason = "its processor is neither AttnProcessor2_0 nor AttnProcessor"
        return Change(path, was, reason=reason)

    def undo(module: Any) -> None:
        if module.processor is processor:  # what somebody else has set since is theirs
            module.set_processor(before)

    def apply(module: Any) -> None:
        module.set_processor(processor)

    return Change(path, was, "attention", apply=apply, undo=undo)


class AttentionProcessor(AttnProcessor2_0):
    """What AttnProcessor2_0 computes, on `attention`.

    Scores and softmax are float32 (float64 for float64) whatever `upcast_attention` and
    `upcast_softmax` say.

    Args:
        softmax_scale: factor on the scores; None means 1 / sqrt(head_dim), which AttnProcessor2_0
            takes whatever `attn.scale` is; AttnProcessor takes `attn.scale`.
        norm_qk: apply `attn.norm_q` and `attn.norm_k` where there are any; AttnProcessor does not.
    """

    def __init__(self, *, softmax_scale: float | None = None, norm_qk: bool = True) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.norm_qk = norm_qk

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.dim() == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        memory = hidden_states
        if encoder_hidden_states is not None:
            memory = encoder_hidden_states
            if attn.norm_cross is not None:
                memory = attn.norm_encoder_hidden_states(memory)
        query, key, value = attn.to_q(hidden_states), attn.to_k(memory), attn.to_v(memory)
        batch, seqlen_k, width = key.shape
        # Views (batch, heads, seqlen, head_dim), as the op takes them without a copy.
        heads = batch, -1, attn.heads, width // attn.heads
        query, key, value = (x.view(heads).transpose(1, 2) for x in (query, key, value))
        if self.norm_qk and attn.norm_q is not None:
            query = attn.norm_q(query)
        if self.norm_qk and attn.norm_k is not None:
            key = attn.norm_k(key)

        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, seqlen_k, batch)
            attention_mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, scale=self.softmax_scale
        )
        hidden_states = attn.to_out[0](out.transpose(1, 2).flatten(2))
        hidden_states = attn.to_out[1](hidden_states)  # dropout
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """A scheduler's constructor, with its signature, which diffusers reads, that refuses what the
    kernels do not have.
    """

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._settings()
        self._schedule()

    return checked


class _OnKernels:
    """What both schedulers share: their settings in the op's terms, and `add_noise`."""

    config: Any
    alphas_cumprod: Tensor
    _made_of: Tensor | None = None
    _made: NoiseSchedule

    def _schedule(self) -> NoiseSchedule:
        """Of `alphas_cumprod`, the numbers that diffusers computes with, also when others have been
        put in their place."""
        if self._made_of is not self.alphas_cumprod:
            abar = self.alphas_cumprod.to("cpu", torch.float64)
            self._made = NoiseSchedule(1 - abar / torch.cat([abar.new_ones(1), abar[:-1]]))
            self._made_of = self.alphas_cumprod
        return self._made

    def _settings(self) -> dict[str, Any]:
        """prediction_type and clip_range as the ops take them; they may change with the config."""
        config = self.config
        checks.check_choice("prediction_type", config.prediction_type, PREDICTION_TYPES)
        clip_range = config.clip_sample_range if config.clip_sample else None
        if clip_range is not None and not clip_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {clip_range}")
        if config.thresholding:
            raise ValueError("thresholding must be False: no kernel has it, got True")
        if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr must be False with prediction_type 'epsilon', which says "
                "nothing of the clean sample where there is only noise, got True"
            )
        return {"prediction_type": config.prediction_type, "clip_range": clip_range}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar_t) original_samples + sqrt(1 - abar_t) noise in one pass."""
        original_samples, noise = _same_dtype(original_samples, noise)
        timesteps = timesteps.to(original_samples.device).flatten()
        if len(timesteps) == 1:
            timesteps = timesteps.expand(len(original_samples))
        return diffusion.add_noise(original_samples, timesteps, self._schedule(), noise=noise)


class DDPMScheduler(_OnKernels, diffusers.DDPMScheduler):
    """diffusers.DDPMScheduler with `step` and `add_noise` on the kernels.

    `DDPMScheduler.from_config(pipe.scheduler.config)` takes the place of a pipeline's own. With a
    generator `step` adds the noise that diffusers would; without one the library's, whose seed
    comes from torch's default generator.

    Raises:
        ValueError: a setting that the kernels do not have: a learned variance or
            "fixed_large_log", thresholding, or zero terminal SNR for a model that predicts noise.
    """

    __init__ = _checked(diffusers.DDPMScheduler.__init__)

    def _settings(self) -> dict[str, Any]:
        checks.check_choice("variance_type", self.config.variance_type, _VARIANCES)
        return super()._settings()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """As diffusers' own: (prev_sample, pred_original_sample)."""
        settings, schedule = self._settings(), self._schedule()
        variance = _VARIANCES[self.config.variance_type]
        t, prev = int(timestep), int(self.previous_timestep(timestep))
        # The op adds none on the step from 0 to -1.
        noise = _noise(model_output, sample, generator) if t > 0 else {"seed": 0}
        model_output, sample = _same_dtype(model_output, sample)
        clean = diffusion.ddim_step(
            model_output, t, sample, schedule, prev_timesteps=-1, **settings
        )
        prev_sample = diffusion.ddpm_step(
            model_output,
            t,
            sample,
            schedule,
            prev_timesteps=prev,
            variance=variance,
            **noise,
            **settings,
        )
        if t > 0 > prev and variance == "fixed_large":
            # diffusers adds it also here: timesteps that were subsampled may end above 0.
            drawn = noise.get("noise")
            if drawn is None:
                drawn = diffusion.randn(
                    sample.shape, dtype=sample.dtype, device=sample.device, **noise
                )
            prev_sample = prev_sample + (1 - schedule.alphas_cumprod[t].item()) ** 0.5 * drawn
        if not return_dict:
            return prev_sample, clean
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)


class DDIMScheduler(_OnKernels, diffusers.DDIMScheduler):
    """diffusers.DDIMScheduler with `step` and `add_noise` on the kernels, as `DDPMScheduler`.

    Raises:
        ValueError: a setting that the kernels do not have: thresholding, or zero terminal SNR for
            a model that predicts noise; in `step`, eta outside of [0, 1].
    """

    __init__ = _checked(diffusers.DDIMScheduler.__init__)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """As diffusers' own: (prev_sample, pred_original_sample)."""
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps must be called before step")
        if eta > 0 and generator is not None and variance_noise is not None:
            raise ValueError("generator must be None when variance_noise is given, got both")
        settings, schedule = self._settings(), self._schedule()
        t = int(timestep)
        prev = t - self.config.num_train_timesteps // self.num_inference_steps
        if prev < 0:
            prev = -1 if self.config.set_alpha_to_one else 0
        noise = {}
        if eta > 0:
            noise = _noise(model_output, sample, generator, variance_noise)
        model_output, sample = _same_dtype(model_output, sample)
        clean = diffusion.ddim_step(
            model_output, t, sample, schedule, prev_timesteps=-1, **settings
        )
        if use_clipped_model_output:
            # The noise that the step keeps is what the clipped sample leaves of the noisy one.
            model_output, settings = clean, {"prediction_type": "sample"}
        prev_sample = diffusion.ddim_step(
            model_output, t, sample, schedule, prev_timesteps=prev, eta=eta, **noise, **settings
        )
        if not return_dict:
            return prev_sample, clean
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)


def _same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Both in the wider dtype of the two, that of diffusers' results."""
    first, second = tensors
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def _noise(
    model_output: Tensor,
    sample: Tensor,
    generator: Generators,
    noise: Tensor | None = None,
) -> dict[str, Any]:
    """The noise of a step, or the seed of it, as the ops take them."""
    if noise is None and generator is None:
        return {"seed": int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))}
    if noise is None:
        shape, device, dtype = model_output.shape, model_output.device, model_output.dtype
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return {"noise": noise.to(torch.promote_types(model_output.dtype, sample.dtype))}
