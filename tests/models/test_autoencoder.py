import math

import pytest
import torch

from leedl_fast import use_backend
from leedl_fast.models.autoencoder import VAE, Autoencoder, AutoencoderConfig, kl_divergence
from leedl_fast.models.vqvae import VQVAE, VectorQuantizer, VQVAEConfig, perplexity

SMALL = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "num_layers": 1}


def images(batch=6, seed=1):
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def small(kind, **options):
    torch.manual_seed(0)
    config = VQVAEConfig if kind is VQVAE else AutoencoderConfig
    return kind(config(**SMALL | options))


def train(model, data, steps, learning_rate=5e-3):
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    for _ in range(steps):
        loss = model.loss(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("kind", [Autoencoder, VAE, VQVAE])
def test_both_backends_have_one_loss_and_gradient(kind):
    model = small(kind).eval()

    def run(backend):
        torch.manual_seed(3)
        with use_backend(backend):
            loss = model.loss(images())
            parameters = [p for p in model.parameters() if p.requires_grad]
            return loss, torch.autograd.grad(loss, parameters)

    eager, eager_gradients = run("eager")
    fused, fused_gradients = run("cpu")
    torch.testing.assert_close(fused, eager)
    assert all(gradient.abs().max() > 0 for gradient in eager_gradients)
    for fused_gradient, gradient in zip(fused_gradients, eager_gradients, strict=True):
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(fused_gradient, gradient, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("kind", [Autoencoder, VAE, VQVAE])
def test_samples_follow_their_generator_and_are_images(kind):
    model = small(kind).eval()
    draws = [model.sample(7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].shape == (7, 1, 8, 8)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].min() >= 0
    assert draws[0].max() <= 1


def test_a_denoising_autoencoder_sees_noise_and_is_asked_for_the_clean_image():
    model = small(Autoencoder, noise=0.5)
    torch.manual_seed(3)
    loss = model.loss(images())
    torch.manual_seed(3)
    noisy = images() + 0.5 * torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(loss, (model(noisy) - images()).square().mean())


def test_anomalies_are_what_training_did_not_have():
    """Trained on pictures of horizontal stripes, it reconstructs vertical ones badly."""
    phase = torch.rand(64, 1, 1, 1) * 2 * math.pi
    rows = 0.5 + 0.5 * torch.sin(torch.arange(8.0)[:, None] + phase).expand(-1, 1, 8, 8)
    model = train(small(Autoencoder, latent_dim=2), rows[:48], 120)
    known, unknown = model.anomaly_score(rows[48:]), model.anomaly_score(rows[48:].mT)
    assert known.shape == (16,)
    assert known.max() < unknown.min()


def test_the_latents_moments_are_those_of_training():
    model = train(small(Autoencoder), images(32), 200, learning_rate=1e-4)
    latents = model.encoder(images(32)).detach()
    torch.testing.assert_close(model.latent_mean, latents.mean(0), atol=0.1, rtol=0.1)
    torch.testing.assert_close(model.latent_std, latents.std(0), atol=0.1, rtol=0.1)


def test_the_divergence_is_torchs():
    mean, log_variance = torch.randn(2, 5, 4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (0.5 * log_variance).exp()), normal(torch.zeros(4), torch.ones(4))
    )
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected.sum(-1))


def test_the_bound_is_sums_over_pixels_and_latents():
    model = small(VAE)
    torch.manual_seed(3)
    loss = model.loss(images())
    torch.manual_seed(3)
    mean, log_variance = model.encode(images())
    z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    pixel = torch.distributions.Normal(model.decoder(z), 0.2)
    constant = 64 * math.log(0.2 * math.sqrt(2 * math.pi))
    reconstruction = -pixel.log_prob(images()).flatten(1).sum(1) - constant
    torch.testing.assert_close(loss, (reconstruction + kl_divergence(mean, log_variance)).mean())


def test_a_mean_over_pixels_would_collapse_what_the_sum_keeps():
    pattern = torch.randn(4, 64)
    data = (0.5 + 0.2 * torch.randn(128, 4) @ pattern / 2).view(-1, 1, 8, 8)
    model = train(small(VAE, latent_dim=6), data, 150)
    assert 3 <= model.num_active(data) <= 6
    # The weight of a mean over the 64 pixels of an image.
    model = train(small(VAE, latent_dim=6, output_std=0.2 * 8), data, 150)
    assert model.num_active(data) == 0


def quantizer(**options):
    torch.manual_seed(0)
    config = VQVAEConfig(**SMALL | {"num_codes": 8, "code_dim": 3, "embed_dim": 4} | options)
    return VectorQuantizer(config)


def test_quantisation_takes_the_nearest_code_straight_through():
    module = quantizer(codebook="loss").eval()
    latents = torch.randn(5, 4, 3, requires_grad=True)
    out, indices, loss = module(latents)
    distance = (latents[:, :, None] - module.codes).square().sum(-1)
    assert torch.equal(indices, distance.argmin(-1))
    torch.testing.assert_close(out, module.codes[indices])
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), latents)
    torch.testing.assert_close(gradient, weight)

    difference = (latents - module.codes[indices]).detach()
    to_latents, to_codes = torch.autograd.grad(loss, (latents, module.codes))
    torch.testing.assert_close(to_latents, 0.25 * 2 * difference / latents.numel())
    expected = torch.zeros(8, 3).index_add(0, indices.flatten(), -2 * difference.flatten(0, 1))
    torch.testing.assert_close(to_codes, expected / latents.numel())


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_the_codes_move_to_the_latents(codebook):
    """Latents in 8 clusters: in the end each has a code at its centre, and all codes are used."""
    module = quantizer(codebook=codebook, decay=0.8)
    centres = 3 * torch.randn(8, 3)
    optimizer = torch.optim.Adam([module.codes], 0.05) if codebook == "loss" else None
    for _ in range(300):
        latents = centres[torch.randint(8, (16, 4))] + 0.05 * torch.randn(16, 4, 3)
        loss = module(latents)[2]
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    nearest = torch.cdist(centres, module.codes).min(dim=1)
    assert nearest.values.max() < 0.2
    assert len(nearest.indices.unique()) == 8


def test_eval_mode_changes_nothing():
    model = small(VQVAE).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.loss(images())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(model.decode(model.encode(images())), model(images()))


def test_samples_have_the_codes_of_their_positions():
    model = small(VQVAE).eval()
    model.quantizer.counts.zero_()
    chosen = torch.tensor([3, 1, 60, 7])
    model.quantizer.counts[torch.arange(4), chosen] = 1
    torch.testing.assert_close(model.sample(2), model.decode(chosen.expand(2, -1)).clamp(0, 1))


def test_perplexity():
    assert perplexity(torch.tensor([[0, 1], [2, 3]]), 9) == pytest.approx(4)
    assert perplexity(torch.zeros(5, 2, dtype=torch.int64), 9) == pytest.approx(1)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (AutoencoderConfig, {"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        (AutoencoderConfig, {"noise": -0.1}, "noise must not be negative, got -0.1"),
        (AutoencoderConfig, {"output_std": 0.0}, "output_std must be positive, got 0.0"),
        (VQVAEConfig, {"num_codes": 0}, "num_codes must be at least 1, got 0"),
        (VQVAEConfig, {"codebook": "sgd"}, "codebook must be ema or loss, got 'sgd'"),
        (VQVAEConfig, {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        (VQVAEConfig, {"commitment": -1.0}, "commitment must not be negative, got -1.0"),
    ],
)
def test_bad_configs(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**SMALL | options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_noise_is_the_same_at_every_precision(dtype):
    model, clean = small(Autoencoder, noise=1.0), torch.zeros(3, 1, 8, 8)
    torch.manual_seed(5)
    expected = model.add_noise(clean)
    torch.manual_seed(5)
    assert torch.equal(model.add_noise(clean.to(dtype)), expected.to(dtype))


def test_a_vae_in_float64_has_the_loss_of_one_in_float32():
    """The latents are drawn: torch's own float64 draws would be others."""
    model = small(VAE)
    torch.manual_seed(5)
    expected = model.loss(images())
    torch.manual_seed(5)
    loss = model.double().loss(images().double())
    torch.testing.assert_close(loss.float(), expected)
