import math

import pytest
import torch
import torch.nn.functional as F

from leedl_fast import use_backend
from leedl_fast.models.gpt import GPT, GPTConfig, sample_tokens

SMALL = {"vocab_size": 11, "context_length": 24, "num_layers": 2, "num_heads": 4, "embed_dim": 32}


def small_gpt(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | options))


def tokens(batch=2, seqlen=24):
    return torch.randint(11, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def plain_gpt(model, tokens):
    """The model's formula in plain torch calls, straight from the papers."""
    config = model.config
    x = model.token_embedding.weight[tokens] + model.position_embedding.weight[: tokens.shape[1]]

    def norm(x, module):
        return F.layer_norm(x, (config.embed_dim,), module.weight, module.bias, 1e-5)

    position = torch.arange(tokens.shape[1])
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance > (config.window if config.window is not None else 999))
    for layer in model.transformer.layers:
        projected = F.linear(
            norm(x, layer.norm1), layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        )
        q, k, v = (
            y.unflatten(2, (config.num_heads, -1)).transpose(1, 2) for y in projected.chunk(3, 2)
        )
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
        heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + layer.self_attn.out_proj(heads)
        x = x + layer.linear2(F.gelu(layer.linear1(norm(x, layer.norm2))))
    return norm(x, model.transformer.norm) @ model.token_embedding.weight.T


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("window", [None, 5, 0])
def test_logits_and_gradients_are_the_formulas(backend, window):
    model = small_gpt(window=window)
    inputs, targets = tokens(), tokens().roll(1)
    expected = F.cross_entropy(plain_gpt(model, inputs).flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    with use_backend(backend):
        torch.testing.assert_close(model(inputs), plain_gpt(model, inputs))
        loss = model.loss(inputs, targets)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, expected)
    for (name, _), gradient, wanted in zip(
        model.named_parameters(), gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_it_compiles_into_one_graph():
    model = small_gpt(window=5)
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    arguments = tokens(), tokens().roll(1)
    parameters = list(model.parameters())
    compiled = torch.autograd.grad(loss(*arguments), parameters)
    for gradient, wanted in zip(
        compiled, torch.autograd.grad(model.loss(*arguments), parameters), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


def test_a_new_model_knows_nothing():
    """Its loss is that of the uniform distribution."""
    loss = small_gpt().loss(tokens(8), tokens(8).roll(1))
    assert loss.item() == pytest.approx(math.log(11), abs=0.02)


def test_the_head_is_the_embedding():
    model = small_gpt()
    assert model.head.weight is model.token_embedding.weight
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_grouped_heads_train():
    model = small_gpt(num_heads_k=2, dropout=0.1)
    model.loss(tokens(), tokens().roll(1)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def seen(model, text):
    """What the model sees of a text: its beginning moves by 12, half a context, at a time."""
    if model.config.is_unlimited:
        return text
    while text.shape[1] > 24:
        text = text[:, 12:]
    return text


generating = pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 5},
        {"window": 5, "num_heads_k": 2, "positions": "rotary"},
        {"num_heads_k": 1, "positions": "rotary"},
    ],
    ids=str,
)


@generating
@pytest.mark.parametrize("length", [1, 20, 30])
def test_generation_continues_with_the_models_own_choices(options, length):
    """Greedy, and past the context: each token is the likeliest after what is seen before it."""
    model = small_gpt(**options).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # a new model's choices are too near to one another
    if length > 24 and not model.config.is_unlimited:
        with pytest.raises(ValueError, match="context_length"):
            model(tokens(seqlen=length))
    text = tokens(seqlen=length)
    for new in model.generate(text, 40, temperature=0):
        expected = model(seen(model, text))[:, -1].argmax(-1)
        assert torch.equal(new, expected)
        assert not new.requires_grad
        text = torch.cat((text, new[:, None]), dim=1)
    assert text.shape == (2, length + 40)


@generating
def test_the_cache_changes_no_token(options):
    model = small_gpt(**options).eval()

    def draw(use_cache):
        generator = torch.Generator().manual_seed(3)
        new = model.generate(tokens(3, 10), 60, generator=generator, use_cache=use_cache)
        return torch.stack(list(new))

    assert torch.equal(draw(True), draw(False))


def test_what_a_windowed_text_costs_does_not_grow():
    """Each step reads one token and keeps window + 1 keys per layer, however long the text."""
    model = small_gpt(window=5, positions="rotary").eval()
    read, hidden = [], model.hidden

    def spy(tokens, *, caches):
        read.append((tokens.shape[1], caches))
        return hidden(tokens, caches=caches)

    model.hidden = spy
    assert len(list(model.generate(tokens(1, 10), 300, temperature=0))) == 300
    assert [seqlen for seqlen, _ in read] == [10] + [1] * 299
    assert {cache.kept[0].untyped_storage().nbytes() for cache in read[-1][1]} == {6 * 32 * 4}


def test_generation_ends_with_the_end_token():
    model = small_gpt().eval()
    new = torch.stack(list(model.generate(tokens(4), 500, end_token=7)), dim=1)
    assert new.shape[1] < 500
    for row in new.tolist():
        end = row.index(7)
        assert row[end:] == [7] * (len(row) - end)
    assert new[:, -2].ne(7).any()


def test_generation_follows_its_generator():
    model = small_gpt().eval()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack(list(model.generate(tokens(), 12, generator=generator)))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.35}, {1}),
        ({"top_p": 0.65}, {1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.75}, {1, 3}),  # 0.4 and 0.3 of the 0.9 that top_k leaves: 0.78
        ({"temperature": 0}, {1}),
        ({"temperature": 1e-30}, {1}),
        ({"top_k": 1}, {1}),
    ],
)
def test_sampling_takes_allowed_tokens_in_proportion(options, allowed):
    logits = PROBABILITIES.log().expand(20_000, 4)
    drawn = sample_tokens(logits, **options, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    expected = PROBABILITIES * torch.tensor([float(token in allowed) for token in range(4)])
    torch.testing.assert_close(share, expected / expected.sum(), atol=0.015, rtol=0)


def test_temperature_sharpens():
    logits = PROBABILITIES.log().expand(20_000, 4)
    drawn = sample_tokens(logits, temperature=0.5, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"window": -2}, "window must not be negative, got -2"),
        ({"positions": "none"}, 'positions must be "learned" or "rotary", got \'none\''),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL | options)


def test_bad_inputs():
    model = small_gpt()
    with pytest.raises(ValueError, match="at most context_length = 24 positions, got 25"):
        model(tokens(seqlen=25))
    with pytest.raises(ValueError, match=r"tokens must have shape \(batch, seqlen\), got \(24,\)"):
        model(tokens()[0])
    with pytest.raises(ValueError, match=r"seqlen >= 1\), got \(2, 0\)"):
        next(model.generate(tokens(seqlen=0), 1))
    logits = torch.zeros(1, 4)
    for options, message in (
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
        ({"temperature": math.nan}, "temperature must be finite and not negative, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_tokens(logits, **options)
