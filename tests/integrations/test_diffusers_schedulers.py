"""Schedulers of diffusers, on the kernels: diffusers' own are what they are compared with."""

import copy
import sys
from typing import Any

import diffusers
import diffusers_models
import pytest
import torch

from leedl_fast.integrations.diffusers import DDIMScheduler, DDPMScheduler
from leedl_fast.ops import diffusion
from leedl_fast.testing.compare import allowed_error, max_error, poisoned_outputs

THEIRS = {DDPMScheduler: diffusers.DDPMScheduler, DDIMScheduler: diffusers.DDIMScheduler}
SCHEDULERS = pytest.mark.parametrize("scheduler", THEIRS, ids=lambda cls: cls.__name__)


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
    model = diffusers_models.unet().to(dtype).eval()
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
    theirs = diffusers.DDPMPipeline(diffusers_models.unet().eval(), diffusers.DDPMScheduler())
    scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    ours = diffusers.DDPMPipeline(diffusers_models.patched(theirs.unet), scheduler)
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
