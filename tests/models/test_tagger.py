import pytest
import torch
import torch.nn.functional as F

from leedl_fast.models.tagger import Tagger, TaggerConfig
from leedl_fast.ops.linear_cross_entropy import IGNORED

SIZES = {"vocab_size": 9, "num_tags": 9, "max_length": 12, "num_heads": 2, "embed_dim": 32}


def tagger(table=None, **options):
    torch.manual_seed(0)
    return Tagger(TaggerConfig(**SIZES | {"num_layers": 1, "dropout": 0.0} | options), table)


def letters(seed, batch=32):
    return torch.randint(1, 9, (batch, 12), generator=torch.Generator().manual_seed(seed))


def trained(model, targets_of, steps=100):
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(letters(step), targets_of(letters(step))).backward()
        optimizer.step()
    tokens = letters(10**6, 200)
    right = model.eval()(tokens).argmax(-1) == targets_of(tokens)
    return right[:, 1:].float().mean().item()


def previous(tokens):
    return tokens.roll(1, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input": "one-hot"},
        {"window": 1},
        {"positions": "sinusoidal"},
        {"positions": "learned"},
        {"normalizer": "relu"},
        {"normalizer": "sigmoid", "window": 1},
    ],
    ids=str,
)
def test_it_learns_to_name_the_letter_before(options):
    assert trained(tagger(**options), previous) > 0.9


def test_with_the_additive_score_it_learns_to_name_the_first_letter():
    """All queries ask the same; to look beside itself, each its own way, is learnt slowly."""

    def first(tokens):
        return tokens[:, :1].expand_as(tokens)

    assert trained(tagger(score="additive", positions="learned"), first) > 0.9


def test_it_learns_from_positions_given_by_hand():
    table = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    assert trained(tagger(table, positions="given"), previous) > 0.9


def test_without_attention_it_knows_the_letter_itself_and_no_other():
    assert trained(tagger(attention=False), lambda tokens: tokens) > 0.99
    assert trained(tagger(attention=False), previous) < 0.25  # one in eight by chance


def test_the_loss_is_cross_entropy_of_the_logits_that_count():
    model, tokens = tagger(), letters(0, 3)
    lengths = torch.tensor([12, 5, 1])
    targets = previous(tokens).masked_fill(torch.arange(12) >= lengths[:, None], IGNORED)
    logits = model(tokens, lengths)
    assert logits.shape == (3, 12, 9)
    counted = targets != IGNORED
    torch.testing.assert_close(
        model.loss(tokens, targets, lengths), F.cross_entropy(logits[counted], targets[counted])
    )


def test_bad_options():
    with pytest.raises(ValueError, match="num_tags must be at least 1, got 0"):
        tagger(num_tags=0)
    with pytest.raises(ValueError, match="embed_dim must be a positive multiple of num_heads"):
        tagger(num_heads=5)
