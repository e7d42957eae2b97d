import pytest
import torch
import torch.nn.functional as F

from leedl_fast.layers.attention_maps import record_attention
from leedl_fast.models.text_classifier import TextClassifier, TextClassifierConfig

SIZES = {"vocab_size": 20, "num_classes": 2, "max_length": 12, "num_heads": 2, "embed_dim": 32}


def classifier(**options):
    torch.manual_seed(0)
    return TextClassifier(
        TextClassifierConfig(**SIZES | {"num_layers": 0, "dropout": 0.0} | options)
    )


def texts(seed, batch=32):
    """Of 12 letters one is 1 or 2, and says the class; the others say nothing."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 20, (batch, 12), generator=generator)
    targets = torch.randint(2, (batch,), generator=generator)
    places = torch.randint(12, (batch,), generator=generator)
    tokens[torch.arange(batch), places] = targets + 1
    return tokens, targets, places


@pytest.mark.parametrize(
    "options",
    [{}, {"score": "additive"}, {"normalizer": "sigmoid"}, {"num_layers": 1}, {"pooling": "mean"}],
    ids=str,
)
def test_it_finds_the_letter_that_counts(options):
    model = classifier(**options)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        optimizer.zero_grad()
        tokens, targets, _ = texts(step)
        model.loss(tokens, targets).backward()
        optimizer.step()
    tokens, targets, places = texts(10**6, 300)
    with record_attention(model.pooling) as maps, torch.no_grad():
        right = model.eval()(tokens).argmax(-1) == targets
    assert right.float().mean() > 0.95
    if not options:  # the query looks where the letter is
        weights = maps["attention"][:, :, 0].mean(1)
        assert (weights.argmax(-1) == places).float().mean() > 0.9


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_what_comes_after_a_length_changes_nothing(pooling):
    model = classifier(pooling=pooling, num_layers=1).eval()
    tokens, _, _ = texts(0, 2)
    logits = model(tokens, torch.tensor([12, 7]))
    torch.testing.assert_close(logits[:1], model(tokens[:1]))
    torch.testing.assert_close(logits[1:], model(tokens[1:, :7]))


def test_mean_pooling_is_the_mean():
    model = classifier(pooling="mean", positions="none").eval()
    tokens, targets, _ = texts(0, 3)
    logits = model.head(model.encoder(tokens).mean(dim=1))
    torch.testing.assert_close(model(tokens), logits)
    torch.testing.assert_close(model.loss(tokens, targets), F.cross_entropy(logits, targets))


def test_bad_options():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        classifier(num_classes=1)
    with pytest.raises(ValueError, match='pooling must be "attention" or "mean", got \'max\''):
        classifier(pooling="max")
