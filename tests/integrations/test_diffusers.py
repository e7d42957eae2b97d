"""diffusers' own models and schedulers are what ours are compared with."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
)
from torch import Tensor, nn

from leedl_fast.integrations.diffusers import (
    AttentionProcessor,
    DDIMScheduler,
    DDPMScheduler,
    changes,
)
from leedl_fast.ops import diffusion
from leedl_fast.testing.compare import allowed_error, max_error, poisoned_outputs

THEIRS = {DDPMScheduler: diffusers.DDPMScheduler, DDIMScheduler: diffusers.DDIMScheduler}
SCHEDULERS = pytest.mark.parametrize("scheduler", THEIRS, ids=lambda cls: cls.__name__)


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def conditional_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )


def transformer() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=4
    )


def with_plain_processors(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    model.set_attn_processor(AttnProcessor())
    return model


def keys(lengths: tuple[int, ...], seqlen: int) -> Tensor:
    return torch.arange(seqlen) < torch.tensor(lengths)[:, None]


TIMESTEPS = torch.tensor([3, 700])
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "UNet2DModel": (unet, lambda: {"sample": torch.randn(2, 3, 8, 8), "timestep": TIMESTEPS}),
    "UNet2DConditionModel": (
        conditional_unet,
        lambda: {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": TIMESTEPS,
            "encoder_hidden_states": torch.randn(2, 5, 12),
        },
    ),
    "UNet2DConditionModel, masks": (
        conditional_unet,
        lambda: {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": TIMESTEPS,
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "attention_mask": keys((16, 9), 16),
            "encoder_attention_mask": keys((2, 5), 5),
        },
    ),
    "UNet2DConditionModel, masks, AttnProcessor": (
        partial(with_plain_processors, conditional_unet),
        lambda: {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": TIMESTEPS,
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "attention_mask": keys((16, 9), 16),
            "encoder_attention_mask": keys((2, 5), 5),
        },
    ),
    "AutoencoderKL": (autoencoder, lambda: {"sample": torch.randn(2, 3, 8, 8)}),
    "DiTTransformer2DModel": (
        transformer,
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": TIMESTEPS,
            "class_labels": torch.tensor([1, 5]),
        },
    ),
}


def patched(model: nn.Module) -> nn.Module:
    """A copy with all that `changes` says, which is some."""
    model = copy.deepcopy(model)
    found = list(changes(model))
    assert found
    assert all(change.now and not change.reason for change in found)
    for change in found:
        change.apply()
    return model


def output_and_gradients(
    model: nn.Module, batch: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The output, and the gradients of all parameters and inputs in one vector."""
    model = copy.deepcopy(model).to(dtype)
    leaves = []

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        leaves.append(x.to(dtype, copy=True).requires_grad_())
        return leaves[-1]

    output = model(**{name: leaf(x) for name, x in batch.items()})
    output = output if isinstance(output, Tensor) else output[0]
    weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
    wanted = [*leaves, *(x for x in model.parameters() if x.requires_grad)]
    gradients = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    flat = [x.flatten() for x in gradients if x is not None]
    return output.detach(), torch.cat(flat)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def agree(model: nn.Module, batch: dict[str, Any], num_attentions: int) -> None:
    """In float64 to rounding; in float32 at most twice as far from float64 as the model itself."""
    exact = output_and_gradients(model, batch, torch.float64)
    plain = output_and_gradients(model, batch, torch.float32)
    model = patched(model)
    with poisoned_outputs() as ran:
        double = output_and_gradients(model, batch, torch.float64)
    assert ran == ["attention_forward"] * num_attentions + ["attention_backward"] * num_attentions
    single = output_and_gradients(model, batch, torch.float32)
    for expected, ours, theirs, ours64 in zip(exact, single, plain, double, strict=True):
        assert rms(ours64 - expected) <= 1e-12 * rms(expected)
        ulp = torch.finfo(torch.float32).eps * rms(expected)
        assert rms(ours - expected) <= 2 * rms(theirs - expected) + ulp


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    make, batch = MODELS[name]
    model = make().eval()
    num_attentions = sum(isinstance(module, Attention) for module in model.modules())
    agree(model, batch(), num_attentions)


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
MEMORY = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "residual": ({"residual_connection": True, "rescale_output_factor": 2.5}, {"hidden_states": X}),
    "image": (
        {"norm_num_groups": 4, "residual_connection": True, "bias": True},
        {"hidden_states": X.transpose(1, 2).unflatten(2, (3, 3))},
    ),
    "spatial norm": (
        {"spatial_norm_dim": 4},
        {
            "hidden_states": torch.ones(2, 32, 3, 3).cumsum(1).sin(),
            "temb": torch.ones(2, 4, 3, 3).cumsum(1).cos(),
        },
    ),
    "norm_cross layer": (
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        {"hidden_states": X, "encoder_hidden_states": MEMORY},
    ),
    "norm_cross group": (
        {
            "cross_attention_dim": 12,
            "cross_attention_norm": "group_norm",
            "cross_attention_norm_num_groups": 3,
        },
        {"hidden_states": X, "encoder_hidden_states": MEMORY},
    ),
    "q/k layer norm": ({"qk_norm": "layer_norm"}, {"hidden_states": X}),
    "q/k rms norm": ({"qk_norm": "rms_norm"}, {"hidden_states": X}),
    "no scale": ({"scale_qk": False}, {"hidden_states": X}),
    "mask of queries": ({}, {"hidden_states": X, "attention_mask": X[:, :, :9] * 3}),
    "mask of heads": (
        {"cross_attention_dim": 12},
        {
            "hidden_states": X,
            "encoder_hidden_states": MEMORY,
            "attention_mask": MEMORY[:, :1, :5].repeat_interleave(4, 0)
            * torch.arange(8)[:, None, None],
        },
    ),
}


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("name", ATTENTION)
def test_options_of_attention(name: str, processor: type) -> None:
    options, batch = ATTENTION[name]
    width = 32 if name == "spatial norm" else 16
    attention = Attention(width, heads=4, dim_head=4, processor=processor(), **options)
    agree(attention, batch, 1)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_scores_need_no_upcasting(processor: type) -> None:
    """The flags are for half precision: in float64 they would round."""
    options = {"upcast_attention": True, "upcast_softmax": True}
    model = Attention(16, heads=4, dim_head=4, processor=processor(), **options).bfloat16()
    batch = {"hidden_states": X.bfloat16() * 3}
    plain = output_and_gradients(model, batch, torch.bfloat16)
    ours = output_and_gradients(patched(model), batch, torch.bfloat16)
    model.upcast_attention = model.upcast_softmax = False
    exact = output_and_gradients(model, batch, torch.float64)
    for expected, got, theirs in zip(exact, ours, plain, strict=True):
        assert rms(got - expected) <= 2 * rms(theirs - expected)


def test_a_boolean_mask_is_taken_where_diffusers_takes_it() -> None:
    attention = Attention(16, heads=4, dim_head=4)
    agree(attention, {"hidden_states": X, "attention_mask": keys((9, 4), 9)[:, None]}, 1)


def test_state_dicts_stay_and_undo_restores_the_processors() -> None:
    model = conditional_unet()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    before = dict(model.attn_processors)
    found = list(changes(model))
    assert dict(model.attn_processors) == before
    paths = {change.path for change in found}
    assert paths == {name.removesuffix(".processor") for name in before}
    assert {change.was for change in found} == {"diffusers AttnProcessor2_0"}
    for change in found:
        change.apply()
    assert all(type(x) is AttentionProcessor for x in model.attn_processors.values())
    assert list(changes(model)) == []
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    for change in found:
        change.undo()
    assert dict(model.attn_processors) == before


def test_undo_leaves_a_processor_that_was_set_since() -> None:
    attention = Attention(16, heads=4, dim_head=4)
    (change,) = changes(attention)
    assert change.path == ""
    change.apply()
    other = AttnProcessor()
    attention.set_processor(other)
    change.undo()
    assert attention.processor is other


def test_other_processors_are_left_for_a_reason() -> None:
    attention = Attention(16, heads=4, dim_head=4, added_kv_proj_dim=8)
    processor = AttnAddedKVProcessor2_0()
    attention.set_processor(processor)
    (change,) = changes(nn.ModuleDict({"block": attention}))
    assert (change.path, change.was) == ("block", "diffusers AttnAddedKVProcessor2_0")
    assert change.now == ""
    assert change.reason == "its processor is neither AttnProcessor2_0 nor AttnProcessor"
    change.apply()
    change.undo()
    assert attention.processor is processor


def test_attention_behind_the_dispatcher_is_left_for_a_reason() -> None:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    found = list(changes(model))
    assert {change.was for change in found} == {"diffusers FluxAttnProcessor"}
    assert {change.now for change in found} == {""}
    assert len(found) == 2
    assert all("dispatcher" in change.reason for change in found)


def test_a_patched_unet_compiles_without_a_graph_break() -> None:
    model = diffusers.UNet2DConditionModel(
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    )
    _, batch = MODELS["UNet2DConditionModel, masks"]
    model, inputs = patched(model), batch() | {"attention_mask": keys((64, 30), 64)}
    expected = output_and_gradients(model, inputs, torch.float32)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    leaves = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    output = compiled(**leaves).sample
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    wanted = [x for x in leaves.values() if x.requires_grad] + list(model.parameters())
    gradients = torch.autograd.grad((output * weights).sum(), wanted)
    assert torch.allclose(output, expected[0], rtol=1e-5, atol=1e-6)
    together = torch.cat([x.flatten() for x in gradients])
    assert rms(together - expected[1]) <= 1e-6 * rms(expected[1])


def exact(scheduler: Any, config: Any) -> Any:
    """A scheduler of diffusers that makes its coefficients in float64."""
    scheduler = scheduler.from_config(config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def check_steps(
    ours: Any, num_steps: int | None, dtype: torch.dtype = torch.float64, **options: Any
) -> None:
    """Steps from the first, a middle and the last timesteps."""
    theirs, plain = (
        exact(THEIRS[type(ours)], ours.config),
        THEIRS[type(ours)].from_config(ours.config),
    )
    for scheduler in (ours, theirs, plain):
        if num_steps is not None:
            scheduler.set_timesteps(num_steps)
    ts = theirs.timesteps
    for t in (ts[0], ts[len(ts) // 2], ts[-2], ts[-1]):
        sample, output = torch.randn(2, 2, 2, 3, 5, dtype=torch.float64).to(dtype)
        generators = [generator() for _ in range(3)]
        got = ours.step(output, t, sample, generator=generators[0], **options)
        rounded = plain.step(output, t, sample, generator=generators[1], **options)
        # diffusers draws its noise in the dtype of the output.
        noise = torch.randn(output.shape, dtype=dtype, generator=generators[2]).double()
        with pytest.MonkeyPatch.context() as patch:
            module = sys.modules[type(theirs).__module__]
            patch.setattr(module, "randn_tensor", lambda *_, **__: noise)  # noqa: B023
            expected = theirs.step(output.double(), t, sample.double(), generator=None, **options)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        assert type(got) is type(rounded)
        for name in ("prev_sample", "pred_original_sample"):
            assert got[name].dtype == dtype
            error = max_error(got[name], expected[name])
            if dtype == torch.float64:
                assert error <= 1e-9  # diffusers adds noise times 1e-10 where there is none
            else:
                assert error <= allowed_error(rounded[name], expected[name], dtype)


SETTINGS = [
    {},
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01 + 0.001 * i for i in range(60)], "num_train_timesteps": 60},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 1},
]
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_of_ddpm(settings: dict[str, Any], prediction_type: str) -> None:
    for variance_type in VARIANCES:
        ours = DDPMScheduler(
            prediction_type=prediction_type, variance_type=variance_type, **settings
        )
        for num_steps in (None, 10, 50):
            check_steps(ours, num_steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("settings", [*SETTINGS, {"set_alpha_to_one": False}], ids=str)
def test_steps_of_ddim(settings: dict[str, Any], prediction_type: str) -> None:
    ours = DDIMScheduler(prediction_type=prediction_type, **settings)
    for num_steps in (10, 50):
        for eta in (0.0, 0.3, 1.0):
            for use_clipped in (False, True):
                check_steps(ours, num_steps, eta=eta, use_clipped_model_output=use_clipped)


@SCHEDULERS
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_steps_from_nothing_but_noise(scheduler: Any, prediction_type: str) -> None:
    ours = scheduler(
        prediction_type=prediction_type, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    check_steps(ours, 10)


@SCHEDULERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_in_other_dtypes(scheduler: Any, dtype: torch.dtype) -> None:
    for num_steps in (10, 50):
        check_steps(scheduler(), num_steps, dtype)


def test_custom_timesteps() -> None:
    for variance_type in VARIANCES:
        ours = DDPMScheduler(variance_type=variance_type)
        theirs = exact(diffusers.DDPMScheduler, ours.config)
        sample, output = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(timesteps=[900, 400, 7])
        for t in (900, 400, 7):
            got, expected = (
                scheduler.step(output, t, sample, generator=generator(), return_dict=False)
                for scheduler in (ours, theirs)
            )
            assert type(got) is tuple
            for ours_, theirs_ in zip(got, expected, strict=True):
                assert torch.allclose(ours_, theirs_, rtol=0, atol=1e-9)


@SCHEDULERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sampling_loop(scheduler: Any, dtype: torch.dtype) -> None:
    model = unet().to(dtype).eval()
    config = scheduler(beta_schedule="squaredcos_cap_v2").config
    start = torch.randn(2, 3, 8, 8, dtype=dtype)
    options = {"eta": 0.5} if scheduler is DDIMScheduler else {}
    results = []
    for each in (scheduler.from_config(config), THEIRS[scheduler].from_config(config)):
        each.set_timesteps(10)
        noise, sample = generator(), start
        for t in each.timesteps:
            with torch.no_grad():
                output = model(sample, t).sample
            sample = each.step(output, t, sample, generator=noise, **options).prev_sample
        results.append(sample)
    # Their coefficients are float32 in both dtypes.
    assert torch.allclose(*results, rtol=1e-4, atol=1e-5)


def test_a_pipeline() -> None:
    theirs = diffusers.DDPMPipeline(unet().eval(), diffusers.DDPMScheduler())
    scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    ours = diffusers.DDPMPipeline(patched(theirs.unet), scheduler)
    images = []
    for pipeline in (theirs, ours):
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 4, "output_type": "np"}
        images.append(pipeline(generator=generator(), **options).images)
    assert abs(images[0] - images[1]).max() < 1e-4


def test_generators_of_samples_and_given_noise() -> None:
    sample, output = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    ddpm = DDPMScheduler()
    theirs = exact(diffusers.DDPMScheduler, ddpm.config)
    got, expected = (
        each.step(output, 500, sample, generator=[generator(), torch.Generator().manual_seed(7)])
        for each in (ddpm, theirs)
    )
    assert torch.allclose(got.prev_sample, expected.prev_sample, rtol=1e-9)
    ddim = DDIMScheduler()
    theirs = exact(diffusers.DDIMScheduler, ddim.config)
    noise = torch.randn_like(sample)
    for each in (ddim, theirs):
        each.set_timesteps(10)
    got, expected = (
        each.step(output, 500, sample, eta=0.7, variance_noise=noise) for each in (ddim, theirs)
    )
    assert torch.allclose(got.prev_sample, expected.prev_sample, rtol=1e-9)
    with pytest.raises(ValueError, match="generator must be None when variance_noise is given"):
        ddim.step(output, 500, sample, eta=0.7, variance_noise=noise, generator=generator())


@SCHEDULERS
def test_noise_without_a_generator_is_the_librarys(scheduler: Any) -> None:
    ours = scheduler()
    ours.set_timesteps(10)
    options = {"eta": 1.0} if scheduler is DDIMScheduler else {}
    sample, output = torch.zeros(2, 3, 5, 7)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(ours.step(output, 500, sample, **options).prev_sample)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.manual_seed(3)
    seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    expected = diffusion.ddpm_step(
        output, 500, sample, ours._schedule(), seed=seed, prev_timesteps=400
    )
    assert torch.allclose(draws[0], expected, rtol=1e-5)


def test_the_last_noise_without_a_generator() -> None:
    ours = DDPMScheduler(variance_type="fixed_large")
    ours.set_timesteps(timesteps=[900, 400])
    zeros = torch.zeros(4, 4096)
    prev = ours.step(zeros, 400, zeros).prev_sample
    assert prev.std().item() == pytest.approx(
        (1 - ours.alphas_cumprod[400].item()) ** 0.5, rel=0.02
    )


def test_mixed_dtypes_give_the_wider_one() -> None:
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    sample, output = torch.randn(2, 2, 3, 4)
    got, expected = (
        each.step(output.bfloat16(), 500, sample, generator=generator()) for each in (ours, theirs)
    )
    assert got.prev_sample.dtype == expected.prev_sample.dtype == torch.float32
    assert torch.allclose(got.prev_sample, expected.prev_sample, atol=0.02)


def test_steps_have_gradients() -> None:
    for scheduler in THEIRS:
        ours = scheduler(clip_sample=False)
        theirs = exact(THEIRS[scheduler], ours.config)
        gradients = []
        for each in (ours, theirs):
            each.set_timesteps(10)
            sample, output = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4).unbind()
            leaves = [x.clone().requires_grad_() for x in (sample, output)]
            result = each.step(leaves[1], 500, leaves[0], generator=generator())
            total = result.prev_sample.square().sum() + result.pred_original_sample.sum()
            gradients.append(torch.autograd.grad(total, leaves))
        for got, expected in zip(*gradients, strict=True):
            assert torch.allclose(got, expected, rtol=1e-9)


@SCHEDULERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_add_noise(scheduler: Any, dtype: torch.dtype) -> None:
    ours = scheduler()
    theirs, plain = exact(THEIRS[scheduler], ours.config), THEIRS[scheduler]()
    sample, noise = torch.randn(2, 3, 2, 4, 4).to(dtype)
    for timesteps in (torch.tensor([0, 500, 999]), torch.tensor([20]), torch.tensor(20)):
        with poisoned_outputs() as ran:
            got = ours.add_noise(sample, noise, timesteps)
        assert ran == ["diffusion_add_noise"]
        expected = theirs.add_noise(sample.double(), noise.double(), timesteps)
        rounded = plain.add_noise(sample, noise, timesteps)
        assert got.dtype == rounded.dtype
        assert max_error(got, expected) <= allowed_error(rounded, expected, dtype)


@SCHEDULERS
def test_other_alphas_cumprod_are_followed(scheduler: Any) -> None:
    ours, theirs = scheduler(), THEIRS[scheduler]()
    for each in (ours, theirs):
        each.alphas_cumprod = each.alphas_cumprod**2
        each.set_timesteps(10)
    sample, output = torch.randn(2, 2, 3, 4)
    got, expected = (
        each.step(output, 500, sample, generator=generator()) for each in (ours, theirs)
    )
    assert torch.allclose(got.prev_sample, expected.prev_sample, atol=1e-6)


@SCHEDULERS
def test_configs_go_both_ways(scheduler: Any, tmp_path: Any) -> None:
    theirs = THEIRS[scheduler](prediction_type="v_prediction", beta_end=0.013, steps_offset=1)
    ours = scheduler.from_config(theirs.config)
    assert isinstance(ours, THEIRS[scheduler])
    assert {**ours.config} == {**theirs.config}
    ours.save_pretrained(tmp_path)
    for cls in (scheduler, THEIRS[scheduler]):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is cls
        assert torch.equal(again.betas, theirs.betas)
        assert again.config.prediction_type == "v_prediction"
    ours.set_timesteps(5)
    again = copy.deepcopy(ours)
    sample, output = torch.randn(2, 2, 3, 4)
    steps = [each.step(output, 601, sample, generator=generator()) for each in (ours, again)]
    assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)


@SCHEDULERS
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholding": True}, "thresholding must be False"),
        ({"prediction_type": "flow"}, "prediction_type must be one of .* got 'flow'"),
        ({"clip_sample_range": 0.0}, "clip_sample_range must be positive, got 0.0"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be False"),
    ],
)
def test_settings_without_a_kernel(scheduler: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler(**settings)
    with pytest.raises(ValueError, match=message):
        scheduler.from_config(THEIRS[scheduler](**settings).config)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range", "fixed_large_log"])
def test_variances_without_a_kernel(variance_type: str) -> None:
    message = f"variance_type must be one of .* got '{variance_type}'"
    with pytest.raises(ValueError, match=message):
        DDPMScheduler(variance_type=variance_type)


def test_settings_that_change_later_are_seen() -> None:
    ours = DDPMScheduler()
    ours.register_to_config(thresholding=True)
    with pytest.raises(ValueError, match="thresholding must be False"):
        ours.step(torch.zeros(1, 2), 5, torch.zeros(1, 2))


def test_wrong_steps_of_ddim() -> None:
    ours, zeros = DDIMScheduler(), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="set_timesteps must be called before step"):
        ours.step(zeros, 5, zeros)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1.5"):
        ours.step(zeros, 5, zeros, eta=1.5)


def test_the_package_does_not_import_diffusers() -> None:
    code = "import leedl_fast, leedl_fast.integrations, sys; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
