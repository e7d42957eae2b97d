"""Properties of diffusion steps that a comparison of numbers does not show, and their errors."""

import math

import pytest
import torch

from leedl_fast import diffusion
from leedl_fast.backends import cpu_modules
from leedl_fast.ops.seeds import sample_seeds

ISA = pytest.mark.parametrize("isa", cpu_modules.modules())
SCHEDULE = diffusion.NoiseSchedule.linear(1000)
SHAPE = (3, 4, 10, 11)


@ISA
def test_the_loss_sees_the_noise_that_was_added(isa: str) -> None:
    sample, t = torch.randn(SHAPE), torch.tensor([0, 400, 999])
    with cpu_modules.use_isa(isa):
        noisy = diffusion.add_noise(sample, t, SCHEDULE, seed=5, backend="cpu")
        noise = diffusion.randn(SHAPE, seed=5, backend="cpu")
        loss = diffusion.noise_prediction_loss(noise, sample, t, SCHEDULE, seed=5, backend="cpu")
    assert loss == 0
    abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, (abar.sqrt() * sample + (1 - abar).sqrt() * noise).float())


@ISA
def test_threads_batch_and_backend_change_no_bit_of_the_noise(isa: str) -> None:
    shape = (3, 50_001)
    with cpu_modules.use_isa(isa):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(diffusion.randn(shape, seed=11, backend="cpu"))
        alone = diffusion.randn((1, 50_001), seed=11, backend="cpu")
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone[0], results[0][0])
    assert torch.equal(results[0][:, :999], diffusion.randn((3, 999), seed=11, backend="eager"))


def test_every_timestep_has_noise_of_its_own() -> None:
    zeros = torch.zeros(2, 1000)
    noises = [diffusion.ddpm_step(zeros, t, zeros, SCHEDULE, seed=3, backend="cpu") for t in (5, 6)]
    noises.append(diffusion.randn((2, 1000), seed=3, backend="cpu"))
    for i in range(3):
        for j in range(i):
            correlation = torch.corrcoef(torch.stack([noises[i][0], noises[j][0]]))[0, 1]
            assert abs(correlation) < 0.15


def test_the_reverse_steps_undo_the_noise() -> None:
    """With the true noise as the model's output, DDIM walks back to the clean sample."""
    sample = torch.randn(SHAPE, dtype=torch.float64)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    x = diffusion.add_noise(sample, 999, SCHEDULE, noise=noise)
    for t in range(999, -1, -1):
        x = diffusion.ddim_step(noise, t, x, SCHEDULE)
    torch.testing.assert_close(x, sample)


def test_ddim_with_eta_1_is_ddpm() -> None:
    """Song et al. 2021, section 4.1."""
    model_output, sample = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
    for t in (999, 500, 1):
        ancestral = diffusion.ddpm_step(model_output, t, sample, SCHEDULE, seed=1)
        implicit = diffusion.ddim_step(model_output, t, sample, SCHEDULE, eta=1.0, seed=1)
        torch.testing.assert_close(ancestral, implicit)


def test_the_last_step_adds_no_noise() -> None:
    x = torch.randn(SHAPE)
    for variance in ("fixed_small", "fixed_large"):
        a, b = (
            diffusion.ddpm_step(x, 0, x, SCHEDULE, seed=seed, variance=variance) for seed in (1, 2)
        )
        assert torch.equal(a, b)


def test_a_generator_means_torchs_own_stream() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(9)

    expected = torch.randn(SHAPE, generator=generator())
    assert torch.equal(diffusion.randn(SHAPE, seed=generator()), expected)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(
        diffusion.add_noise(x, 7, SCHEDULE, seed=generator()),
        diffusion.add_noise(x, 7, SCHEDULE, noise=expected),
        rtol=0,
        atol=0,
    )


def test_the_loss_of_v_and_sample_prediction() -> None:
    sample, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    abar = SCHEDULE.alphas_cumprod[300].item()
    v = math.sqrt(abar) * noise - math.sqrt(1 - abar) * sample
    options = {"noise": noise, "backend": "cpu"}
    loss = diffusion.noise_prediction_loss(
        v, sample, 300, SCHEDULE, prediction_type="v_prediction", **options
    )
    assert loss < 1e-12
    loss = diffusion.noise_prediction_loss(
        sample, sample, 300, SCHEDULE, prediction_type="sample", backend="cpu"
    )
    assert loss == 0


def test_what_the_loss_does_not_need_is_not_read() -> None:
    poison = torch.full(SHAPE, torch.nan)
    loss = diffusion.noise_prediction_loss(
        torch.zeros(SHAPE), poison, 3, SCHEDULE, seed=1, backend="cpu"
    )
    assert loss.isfinite()


def test_sample_seeds_are_splitmix64() -> None:
    """The first outputs of the generator from state 1234567 (Vigna's splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [seed % 2**64 for seed in sample_seeds(1234567, 3).tolist()] == expected


@pytest.mark.parametrize("isa", cpu_modules.modules())
@pytest.mark.parametrize("seed", [0, -1, 7, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
def test_sample_seeds_without_a_compiled_module_are_the_same(
    monkeypatch: pytest.MonkeyPatch, seed: int, isa: str
) -> None:
    with cpu_modules.use_isa(isa):
        compiled = sample_seeds(seed, 37)
    monkeypatch.setattr(cpu_modules, "isa", lambda: None)
    assert torch.equal(sample_seeds(seed, 37), compiled)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (torch.ones(2, 2), r"betas must have shape \(T,\) with T >= 1, got \(2, 2\)"),
        (torch.ones(0), r"betas must have shape \(T,\)"),
        (torch.tensor([0.1, 1.5]), r"betas must lie in \(0, 1\], got"),
        (torch.tensor([0.1, float("nan")]), r"betas must lie in \(0, 1\], got"),
    ],
)
def test_a_bad_schedule_is_named(betas: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffusion.NoiseSchedule(betas)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"timesteps": 1000}, ValueError, r"timesteps must lie in \[0, 999\], got 1000"),
        ({"timesteps": torch.tensor([1, 2, -1])}, ValueError, r"timesteps must lie in .* got -1"),
        ({"timesteps": torch.tensor([1, 2])}, ValueError, r"timesteps must have shape \(3,\)"),
        ({"timesteps": 3.0}, TypeError, "timesteps must be an int, got 3.0"),
        ({"timesteps": torch.ones(3)}, TypeError, "timesteps must be int64 or int32"),
        ({"seed": float("nan")}, TypeError, "seed must be an int, got nan of type float"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ({"seed": torch.ones(3)}, TypeError, "seed must be an int or an int64 tensor"),
        ({"seed": torch.ones(2).long()}, ValueError, r"seed must have shape \(3,\), got \(2,\)"),
        ({"seed": None}, ValueError, "just one of seed and noise must be given, got neither"),
        ({"noise": torch.ones(SHAPE)}, ValueError, "just one of seed and noise .* got both"),
        (
            {"seed": None, "noise": torch.ones(3)},
            ValueError,
            r"noise must have shape \(3, 4, 10, 11\), got \(3,\)",
        ),
        ({"sample": torch.ones(3, 2)}, ValueError, r"sample must have shape|model_output must"),
        ({"sample": torch.ones(())}, ValueError, r"sample must have shape"),
        ({"prediction_type": "noise"}, ValueError, "prediction_type must be one of .* 'noise'"),
        ({"variance": "learned"}, ValueError, "variance must be one of .*, got 'learned'"),
        ({"clip_range": 0}, ValueError, "clip_range must be positive, got 0"),
        ({"guidance_scale": 2.0}, ValueError, "must be given together, got only guidance_scale"),
        ({"prev_timesteps": -2}, ValueError, r"prev_timesteps must lie in \[-1, 999\], got -2"),
        ({"backend": "tpu"}, ValueError, "backend must be one of .*, got 'tpu'"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "model_output": torch.ones(SHAPE),
        "timesteps": 5,
        "sample": torch.ones(SHAPE),
        "schedule": SCHEDULE,
        "seed": 1,
        **change,
    }
    with pytest.raises(error, match=message):
        diffusion.ddpm_step(**arguments)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((), ValueError, "shape must be"),
        ((2, -1), ValueError, r"shape must have sizes of at least 0, got \(2, -1\)"),
        ((2, 1.5), TypeError, "shape must be an int, got 1.5"),
    ],
)
def test_a_bad_shape_is_named(shape: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diffusion.randn(shape, seed=0)
