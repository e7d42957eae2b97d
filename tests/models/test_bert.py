import math

import pytest
import torch

from leedl_fast.models.bert import (
    BERT,
    IGNORED,
    BERTConfig,
    BERTForPretraining,
    MaskedLanguageModel,
    mask_tokens,
)
from leedl_fast.models.bert_heads import BERTForClassification, BERTForSpan, BERTForTagging

SMALL = {"vocab_size": 12, "max_length": 16, "num_layers": 2, "embed_dim": 32, "eps": 1e-5}
CLS, SEP, MASK = 9, 10, 11


def config(**options):
    torch.manual_seed(0)
    return BERTConfig(**SMALL | options)


def letters(seed, *shape):
    return torch.randint(9, shape, generator=torch.Generator().manual_seed(seed))


def train(model, loss, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    return model.eval()


def test_masking_is_80_10_10_of_15():
    tokens = letters(0, 400, 500)
    maskable = torch.arange(500) % 5 != 0
    inputs, targets = mask_tokens(
        tokens, mask_token=MASK, replacements=(0, 9), maskable=maskable.expand(400, 500)
    )
    chosen = targets != IGNORED
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert not chosen[:, ~maskable].any()
    assert chosen[:, maskable].float().mean().item() == pytest.approx(0.15, abs=0.005)
    became_mask = inputs[chosen] == MASK
    assert became_mask.float().mean().item() == pytest.approx(0.8, abs=0.01)
    # One in nine of the tokens that are drawn is the one that was there.
    unchanged = (inputs[chosen] == tokens[chosen]).float().mean().item()
    assert unchanged == pytest.approx(0.1 + 0.1 / 9, abs=0.01)
    replaced = inputs[chosen & (inputs != MASK) & (inputs != tokens)]
    assert set(replaced.tolist()) == set(range(9))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_what_comes_after_a_length_changes_nothing(norm_first, positions):
    model = BERT(config(norm_first=norm_first, positions=positions)).eval()
    tokens, lengths = letters(0, 2, 16), torch.tensor([16, 7])
    other = tokens.clone()
    other[1, 7:] = MASK
    hidden, same = (model(x, lengths=lengths) for x in (tokens, other))
    torch.testing.assert_close(hidden[0], same[0])
    torch.testing.assert_close(hidden[1, :7], same[1, :7])
    alone = model(tokens[1:, :7])
    torch.testing.assert_close(hidden[1:, :7], alone)


def test_segments_tell_halves_apart():
    model = BERT(config()).eval()
    tokens = letters(0, 1, 16)
    first = model(tokens)
    torch.testing.assert_close(model(tokens, torch.zeros_like(tokens)), first)
    assert (model(tokens, torch.ones_like(tokens)) - first).abs().max() > 1e-3


def test_the_loss_of_blanks_is_cross_entropy_of_the_logits():
    model = MaskedLanguageModel(config())
    tokens = letters(0, 3, 16)
    targets = tokens.masked_fill(tokens % 2 == 0, IGNORED)
    expected = torch.nn.functional.cross_entropy(model(tokens).transpose(1, 2), targets)
    torch.testing.assert_close(model.loss(tokens, targets), expected)
    assert expected.item() == pytest.approx(math.log(12), abs=0.1)  # it knows nothing yet


def framed(first, second):
    """[CLS] first [SEP] second [SEP], and the segments."""
    size = len(first)
    cls, sep = torch.full((size, 1), CLS), torch.full((size, 1), SEP)
    tokens = torch.cat((cls, first, sep, second, sep), dim=1)
    return tokens, (torch.arange(tokens.shape[1]) >= 2 + first.shape[1]).long().expand_as(tokens)


def rows_of_an_alphabet(seed, size=32):
    """4 letters and the next 4, which make a pair; half of the pairs are swapped."""
    text = letters(seed, size, 1) % 2 + torch.arange(8)
    swapped = letters(seed + 1, size) % 2
    first, second = text.split(4, dim=1)
    swap = swapped[:, None] == 1
    pair = torch.where(swap, second, first), torch.where(swap, first, second)
    return *framed(*pair), swapped


def test_pretraining_learns_blanks_and_order():
    model = BERTForPretraining(config(norm_first=True, positions="rotary"))

    def loss(step):
        tokens, segments, swapped = rows_of_an_alphabet(2 * step)
        inputs, targets = mask_tokens(
            tokens, mask_token=MASK, replacements=(0, 9), maskable=tokens < 9,
            share=0.4, generator=torch.Generator().manual_seed(step),
        )  # fmt: skip
        return sum(model.losses(inputs, targets, swapped, segments))

    train(model, loss, 130)
    tokens, segments, swapped = rows_of_an_alphabet(10**6, 200)
    blank = torch.zeros_like(tokens, dtype=torch.bool)
    blank[:, 3] = True
    filled = model(tokens.masked_fill(blank, MASK), segments).argmax(-1)
    assert (filled == tokens)[blank].float().mean() > 0.95
    order = model.pair_logits(tokens, segments).argmax(-1)
    assert (order == swapped).float().mean() > 0.95


def pairs(seed, size=32):
    """Two texts of 6 letters; the letter 0 stands in one of them, and the class says in which."""
    texts = 1 + letters(seed, 2, size, 6) % 8
    which = letters(seed + 1, size) % 2
    texts[which, torch.arange(size), letters(seed + 2, size) % 6] = 0
    return *framed(*texts), which


def test_heads_of_fine_tuning_learn():
    """A pair's class; and tags, of each letter the next one."""
    pair_model = BERTForClassification(BERT(config(norm_first=True)), 2)

    def pair_loss(step):
        tokens, segments, which = pairs(3 * step)
        return pair_model.loss(tokens, which, segments)

    train(pair_model, pair_loss, 100)
    tokens, segments, which = pairs(10**6, 300)
    right = (pair_model(tokens, segments).argmax(-1) == which).float().mean()
    assert right > 0.95

    tagger = BERTForTagging(BERT(config(norm_first=True)), 9)

    def tags(tokens):
        return tokens.roll(-1, 1).masked_fill(torch.arange(tokens.shape[1]) == 8, IGNORED)

    train(tagger, lambda step: tagger.loss(letters(step, 32, 9), tags(letters(step, 32, 9))), 80)
    tokens = letters(10**6, 300, 9)
    right = (tagger(tokens).argmax(-1) == tags(tokens))[:, :-1].float().mean()
    assert right > 0.95


def spans(seed, size=32):
    """The answer to every question: from the letter 0 to the letter 1 in the second text."""
    texts = 2 + letters(seed, 2, size, 6) % 7
    first = letters(seed + 1, size) % 3
    last = first + letters(seed + 2, size) % 3
    rows = torch.arange(size)
    texts[1, rows, last], texts[1, rows, first] = 1, 0
    return *framed(*texts), 8 + torch.stack((first, last), dim=1)


def test_spans_are_found():
    model = BERTForSpan(BERT(config(norm_first=True)))

    def loss(step):
        tokens, segments, places = spans(3 * step)
        return model.loss(tokens, places, segments)

    train(model, loss, 80)
    tokens, segments, places = spans(10**6, 300)
    assert (model.answer(tokens, segments) == places).float().mean() > 0.9
    logits = model(tokens, segments, torch.full((300,), 12))
    assert torch.isinf(logits[:, :, :8]).all()
    assert torch.isinf(logits[:, :, 12:]).all()
    short = model.answer(tokens, segments, max_span=1)
    assert torch.equal(short[:, 0], short[:, 1])


def test_bad_input():
    for options, message in (
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"positions": "none"}, 'positions must be "learned" or "rotary", got \'none\''),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**options)
    model = BERT(config())
    with pytest.raises(ValueError, match="at most max_length = 16 positions, got 17"):
        model(letters(0, 1, 17))
    with pytest.raises(ValueError, match=r"tokens must have shape \(batch, seqlen\), got \(5,\)"):
        model(letters(0, 5))
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        BERTForTagging(model, 0)
    with pytest.raises(ValueError, match="max_span must be at least 1, got 0"):
        BERTForSpan(model).answer(letters(0, 1, 4), max_span=0)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        mask_tokens(
            letters(0, 2), mask_token=MASK, replacements=(0, 9), maskable=letters(0, 2) < 9, share=0
        )
