import pytest
import torch

from leedl_fast import use_backend
from leedl_fast.models.cyclegan import CycleGAN, CycleGANConfig

SMALL = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "channels": 4}


def small_cyclegan(**options):
    torch.manual_seed(0)
    return CycleGAN(CycleGANConfig(**SMALL | options))


def domain(seed, batch=4):
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("num_discriminators", [1, 2])
def test_losses_are_the_formulas(num_discriminators):
    model = small_cyclegan(num_discriminators=num_discriminators)
    x, y = domain(1), domain(2)
    g, f = model.generator_xy, model.generator_yx
    expected = (model.discriminator_y(g(x)) - 1).square().mean() + 10 * (f(g(x)) - x).abs().mean()
    low = 0.5 * (
        (model.discriminator_y(y) - 1).square().mean() + model.discriminator_y(g(x)).square().mean()
    )
    if num_discriminators == 2:
        expected = expected + (model.discriminator_x(f(y)) - 1).square().mean()
        expected = expected + 10 * (g(f(y)) - y).abs().mean()
        low = low + 0.5 * (
            (model.discriminator_x(x) - 1).square().mean()
            + model.discriminator_x(f(y)).square().mean()
        )
    torch.testing.assert_close(model.generator_loss(x, y), expected)
    torch.testing.assert_close(model.discriminator_loss(x, y), low)


def test_one_discriminator_leaves_the_other_domain_alone():
    """The tutorial's first form: nothing but the cycle x -> y -> x trains y -> x."""
    model = small_cyclegan(num_discriminators=1)
    assert model.discriminator_x is None
    x = domain(1)
    assert torch.equal(model.generator_loss(x, domain(2)), model.generator_loss(x, domain(3)))
    model.discriminator_loss(x, domain(2)).backward()
    assert all(p.grad is None for p in model.generator_xy.parameters())


def test_both_backends_have_one_loss_and_gradient():
    model = small_cyclegan()

    def run(backend):
        with use_backend(backend):
            x, y = domain(1), domain(2)
            loss = model.generator_loss(x, y) + model.discriminator_loss(x, y)
            return loss, torch.autograd.grad(loss, list(model.parameters()))

    eager, eager_gradients = run("eager")
    fused, fused_gradients = run("cpu")
    torch.testing.assert_close(fused, eager)
    assert all(gradient.abs().max() > 0 for gradient in eager_gradients)
    torch.testing.assert_close(fused_gradients, eager_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, r"image_size must be a positive multiple of patch_size \(3\), got 8"),
        ({"num_discriminators": 3}, "num_discriminators must be 1 or 2, got 3"),
        ({"cycle_weight": -1.0}, "cycle_weight must not be negative, got -1.0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        CycleGANConfig(**SMALL | options)


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"\(batch, 1, size, size\), got \(2, 1, 8, 6\)"):
        small_cyclegan()(torch.zeros(2, 1, 8, 6))
