import math

import pytest
import torch
import torch.nn.functional as F

from leedl_fast import use_backend
from leedl_fast.models.gan import GAN, GANConfig, gradient_penalty
from leedl_fast.models.patches import patchify, unpatchify

SMALL = {
    "image_size": 8,
    "num_labels": 3,
    "vocab_size": 9,
    "text_length": 6,
    "latent_dim": 8,
    "condition_dim": 8,
    "embed_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
}


def small_gan(**options):
    torch.manual_seed(0)
    return GAN(GANConfig(**SMALL | options))


def images(batch=5):
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def conditions(kind, batch=5):
    """Right ones and mismatched ones."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(3, (batch,), generator=generator)
    if kind == "label":
        return (labels,), ((labels + 1) % 3,)
    if kind == "text":
        tokens = torch.randint(9, (batch, 6), generator=generator)
        lengths = torch.randint(1, 7, (batch,), generator=generator)
        return (tokens, lengths), (tokens.roll(1, 0), lengths.roll(1, 0))
    return (), ()


def test_patches_go_there_and_back():
    picture = torch.arange(36.0).view(1, 1, 6, 6)
    patches = patchify(picture, 2)
    assert patches[0, 1].tolist() == [2, 3, 8, 9]  # row by row, within and between patches
    assert patches[0, 3].tolist() == [12, 13, 18, 19]
    assert torch.equal(unpatchify(patches, 2), picture)


def plain_scores(model, x, condition):
    """The discriminator's formula in plain torch calls."""
    tokens = F.linear(
        patchify(x, model.embedding.patch_size),
        model.embedding.projection.weight,
        model.embedding.projection.bias,
    )
    tokens = tokens + model.embedding.position
    if condition:
        token = model.condition_token(model.encoder.embedding.weight[condition[0]])
        tokens = torch.cat((token[:, None], tokens), dim=1)
    size = tokens.shape[-1:]
    for layer in model.transformer.layers:
        attention = layer.self_attn
        normed = F.layer_norm(tokens, size, layer.norm1.weight, layer.norm1.bias, 1e-5)
        projected = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (
            y.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for y in projected.chunk(3, 2)
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        tokens = tokens + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        normed = F.layer_norm(tokens, size, layer.norm2.weight, layer.norm2.bias, 1e-5)
        tokens = tokens + layer.linear2(F.gelu(layer.linear1(normed)))
    norm = model.transformer.norm
    tokens = F.layer_norm(tokens, size, norm.weight, norm.bias, 1e-5)
    return model.score(tokens.flatten(1))[:, 0]


def penalty_gradients(penalty, model):
    constants = ("score.bias", "transformer.norm.bias")  # added last: no slope depends on them
    parameters = {name: p for name, p in model.named_parameters() if name not in constants}
    gradients = torch.autograd.grad(penalty, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("condition", ["none", "label"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_the_second_derivatives_of_the_penalty_are_those_of_plain_float64(backend, condition):
    model = small_gan(condition=condition).discriminator
    right, _ = conditions(condition)
    with use_backend(backend):
        penalty = gradient_penalty(model, images(), right)
        gradients = penalty_gradients(penalty, model)

    model = model.double()
    x = images().double().requires_grad_()
    scores = plain_scores(model, x, right)
    torch.testing.assert_close(model(x, right), scores)
    (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    expected = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(penalty.double(), expected, atol=1e-6, rtol=1e-5)
    for name, wanted in penalty_gradients(expected, model).items():
        scale = wanted.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            gradients[name].double(),
            wanted,
            atol=2e-5 * scale,
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("loss", ["js", "wgan-gp"])
@pytest.mark.parametrize("condition", ["none", "label", "text"])
def test_both_backends_have_one_loss_and_gradient(loss, condition):
    model = small_gan(loss=loss, condition=condition)
    right, mismatched = conditions(condition)

    def run(backend):
        torch.manual_seed(3)
        with use_backend(backend):
            total = model.discriminator_loss(images(), right, mismatched)
            total = total + model.generator_loss(5, right)
            return total, torch.autograd.grad(
                total, list(model.parameters()), allow_unused=True, materialize_grads=True
            )

    eager, eager_gradients = run("eager")
    fused, fused_gradients = run("cpu")
    torch.testing.assert_close(fused, eager)
    assert any(gradient.abs().max() > 0 for gradient in eager_gradients)
    torch.testing.assert_close(fused_gradients, eager_gradients, atol=1e-5, rtol=1e-4)


def test_losses_are_the_papers_formulas():
    right, mismatched = conditions("label")
    for loss in ("js", "wgan-gp"):
        model = small_gan(loss=loss, condition="label")
        torch.manual_seed(4)
        value = model.discriminator_loss(images(), right, mismatched)
        torch.manual_seed(4)
        fake = model(model.latents(5), right).detach()
        real, low, wrong = (
            model.discriminator(*pair)
            for pair in ((images(), right), (fake, right), (images(), mismatched))
        )
        if loss == "js":
            expected = (
                -real.sigmoid().log().mean()
                - 0.5 * (1 - low.sigmoid()).log().mean()
                - 0.5 * (1 - wrong.sigmoid()).log().mean()
            )
        else:
            share = torch.rand(5, 1, 1, 1)
            between = share * images() + (1 - share) * fake
            expected = -real.mean() + 0.5 * low.mean() + 0.5 * wrong.mean()
            expected = expected + 10 * gradient_penalty(model.discriminator, between, right)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("latent", ["gaussian", "uniform", "binomial"])
def test_latents_have_mean_0_and_variance_1(latent):
    z = small_gan(latent=latent).latents(5000)
    assert z.mean().item() == pytest.approx(0, abs=0.02)
    assert z.var().item() == pytest.approx(1, abs=0.02)
    bound = {"gaussian": math.inf, "uniform": math.sqrt(3), "binomial": 1}[latent]
    assert z.abs().max() <= bound
    if latent == "binomial":
        assert z.unique().tolist() == [-1, 1]


def test_a_condition_is_added_when_the_sizes_match_and_concatenated_otherwise():
    adds = small_gan(condition="label").generator
    assert adds.projection.in_features == 8
    z, labels = torch.randn(2, 8), torch.tensor([0, 2])
    moved = z + adds.encoder(labels)
    plain = small_gan().generator
    plain.load_state_dict(adds.state_dict(), strict=False)
    torch.testing.assert_close(adds(z, (labels,)), plain(moved))
    assert small_gan(condition="label", condition_dim=5).generator.projection.in_features == 13


def test_what_stands_after_a_text_does_not_count():
    model = small_gan(condition="text")
    (tokens, lengths), _ = conditions("text")
    after = torch.arange(6) >= lengths[:, None]
    assert after.any()
    z = model.latents(5)
    changed = torch.where(after, (tokens + 1) % 9, tokens)
    torch.testing.assert_close(model(z, (tokens, lengths)), model(z, (changed, lengths)))
    torch.testing.assert_close(
        model.discriminator(images(), (tokens, lengths)),
        model.discriminator(images(), (changed, lengths)),
    )
    assert not torch.allclose(model(z, (tokens, lengths)), model(z, ((tokens + 1) % 9, lengths)))


def test_the_discriminator_learns_to_look_at_the_condition():
    """Label i belongs to images of brightness i: only mismatched pairs tell that."""
    model = small_gan(condition="label", loss="js")
    labels = torch.arange(3).repeat(8)
    bright = (labels - 1.0)[:, None, None, None].expand(-1, 1, 8, 8)
    optimizer = torch.optim.Adam(model.discriminator.parameters(), 1e-2)
    for step in range(40):
        mismatched = (labels + 1 + step % 2) % 3
        loss = model.discriminator_loss(bright, (labels,), (mismatched,))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = model.discriminator(bright, (labels,))
        for shift in (1, 2):
            assert (right > model.discriminator(bright, ((labels + shift) % 3,)) + 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, r"image_size must be a positive multiple of patch_size \(3\), got 8"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"embed_dim": -4}, "embed_dim must be at least 1, got -4"),
        ({"latent": "cauchy"}, "latent must be one of gaussian, uniform, binomial, got 'cauchy'"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        (
            {"condition": "label", "num_labels": 0},
            'num_labels must be at least 1 for condition "label", got 0',
        ),
        ({"gradient_penalty": -1.0}, "gradient_penalty must not be negative, got -1.0"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        GANConfig(**SMALL | options)


def test_bad_inputs():
    model = small_gan()
    with pytest.raises(ValueError, match=r"z must have shape \(batch, 8\), got \(2, 7\)"):
        model(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"\(batch, 1, size, size\), got \(2, 3, 8, 8\)"):
        model.discriminator(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("latent", ["gaussian", "uniform", "binomial"])
def test_latents_are_the_same_at_every_precision(latent, dtype):
    model = small_gan(latent=latent)
    torch.manual_seed(5)
    expected = model.latents(7)
    torch.manual_seed(5)
    assert torch.equal(model.to(dtype).latents(7), expected.to(dtype))


@pytest.mark.parametrize("loss", ["js", "wgan-gp"])
def test_a_gan_in_float64_has_the_loss_of_one_in_float32(loss):
    model = small_gan(loss=loss)
    torch.manual_seed(5)
    expected = model.discriminator_loss(images())
    torch.manual_seed(5)
    found = model.double().discriminator_loss(images().double())
    torch.testing.assert_close(found.float(), expected)
