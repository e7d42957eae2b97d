import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leedl_fast.models.decoding import decode
from leedl_fast.models.pointing import CopyAttention, guided_attention_loss
from leedl_fast.models.transformer import BEGIN, END, Transformer, TransformerConfig

VOCAB_SIZE = 13
SMALL = {
    "source_vocab_size": VOCAB_SIZE,
    "target_vocab_size": VOCAB_SIZE,
    "max_length": 12,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "embed_dim": 32,
    "dropout": 0.0,
}
LENGTHS = torch.tensor([9, 3, 6, 1])
TARGET_LENGTHS = torch.tensor([4, 12, 1, 7])

variants = pytest.mark.parametrize(
    "options",
    [{}, {"norm_first": False}, {"window": 2}, {"copying": True}],
    ids=str,
)


def small(**options):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SMALL | options)).eval()


def batch():
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, VOCAB_SIZE, (4, 9), generator=generator)
    target = torch.randint(3, VOCAB_SIZE, (4, 12), generator=generator)
    target[torch.arange(4), TARGET_LENGTHS - 1] = END
    return source, LENGTHS, target, TARGET_LENGTHS


def plain_log_probabilities(model, source, lengths, inputs):
    """The same weights in torch.nn's own Transformer."""
    config = model.config
    options = {"dropout": 0.0, "batch_first": True, "norm_first": config.norm_first}
    sizes = (config.embed_dim, config.num_heads, 4 * config.embed_dim)
    norms = [nn.LayerNorm(config.embed_dim) if config.norm_first else None for _ in range(2)]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(*sizes, **options), 2, norms[0], enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, **options), 2, norms[1])
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    padding = torch.arange(source.shape[1]) >= lengths[:, None]
    near = config.window if config.window is not None else 99

    def embed(embedding, tokens):
        x = embedding(tokens) * math.sqrt(config.embed_dim)
        return x + model.positions.table[: tokens.shape[1]]

    def hidden(seqlen, right):
        distance = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
        return (distance > near) | (distance < -right)

    memory = encoder(
        embed(model.source_embedding, source),
        mask=hidden(source.shape[1], near),
        src_key_padding_mask=padding,
    )
    out = decoder(
        embed(model.target_embedding, inputs),
        memory,
        tgt_mask=hidden(inputs.shape[1], 0),
        memory_key_padding_mask=padding,
    )
    logits = F.linear(out, model.target_embedding.weight)
    if model.copy is None:
        return logits.log_softmax(-1)
    scores = model.copy.query(out) @ model.copy.key(memory).mT / math.sqrt(config.embed_dim)
    weights = scores.masked_fill(padding[:, None], -math.inf).softmax(-1)
    gate = model.copy.gate(out).sigmoid()
    copied = weights @ F.one_hot(source, VOCAB_SIZE).float()
    return (gate * logits.softmax(-1) + (1 - gate) * copied).log()


@variants
def test_it_is_torchs_transformer(options):
    model = small(**options)
    source, lengths, target, _ = batch()
    torch.testing.assert_close(
        model(source, lengths, target),
        plain_log_probabilities(model, source, lengths, target),
        atol=2e-5,
        rtol=1e-5,
    )


@variants
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_teacher_forcing(options, label_smoothing):
    model = small(**options)
    source, lengths, target, target_lengths = batch()
    inputs = torch.cat((torch.full((4, 1), BEGIN), target[:, :-1]), dim=1)
    log_probabilities = plain_log_probabilities(model, source, lengths, inputs)
    counted = torch.arange(12) < target_lengths[:, None]
    expected = F.cross_entropy(
        log_probabilities[counted], target[counted], label_smoothing=label_smoothing
    )
    loss = model.loss(source, lengths, target, target_lengths, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected)


def test_what_pads_changes_nothing():
    model = small()
    source, lengths, target, target_lengths = batch()
    junk = (source + 1) % VOCAB_SIZE
    other = torch.where(torch.arange(9) < lengths[:, None], source, junk)
    assert not torch.equal(other, source)
    losses = [model.loss(s, lengths, target, target_lengths) for s in (source, other)]
    assert torch.equal(*losses)


def test_scheduled_sampling_reads_its_own_tokens():
    """At probability 1 every token but BEGIN is what the first pass took for the likeliest."""
    model = small()
    source, lengths, target, target_lengths = batch()
    inputs = torch.cat((torch.full((4, 1), BEGIN), target[:, :-1]), dim=1)
    own = model(source, lengths, inputs).argmax(-1)
    own_inputs = torch.cat((inputs[:, :1], own[:, :-1]), dim=1)
    counted = torch.arange(12) < target_lengths[:, None]
    expected = F.nll_loss(model(source, lengths, own_inputs)[counted], target[counted])
    arguments = (source, lengths, target, target_lengths)
    torch.testing.assert_close(model.loss(*arguments, sampling_probability=1.0), expected)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.loss(*arguments, sampling_probability=0.5, generator=generator).item()

    assert draw(1) == draw(1) != draw(2)


def uncached_greedy(model, source, length):
    target = torch.tensor([[BEGIN]])
    while target.shape[1] <= model.config.max_length and target[0, -1] != END:
        new = model(source[None, :length], length[None], target)[0, -1].argmax()
        target = torch.cat((target, new.view(1, 1)), dim=1)
    return [token for token in target[0, 1:].tolist() if token != END]


@variants
def test_greedy_decoding_takes_the_likeliest_tokens(options):
    """In a batch and with caches: what each sample alone gives without them."""
    model = small(**options)
    for parameter in model.parameters():
        parameter.data *= 2
    source, lengths, *_ = batch()
    expected = [uncached_greedy(model, *sample) for sample in zip(source, lengths, strict=True)]
    assert decode(model, source, lengths) == expected


def score(model, source, length, tokens):
    """The log-probability of a target, with END if it is not as long as it may be."""
    target = [BEGIN, *tokens]
    target += [END] if len(tokens) < model.config.max_length else []
    new = model(source[None, :length], length[None], torch.tensor([target[:-1]]))
    return new[0].gather(1, torch.tensor(target[1:])[:, None]).sum().item()


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"copying": True}], ids=str)
def test_a_wide_beam_finds_the_best_target(options):
    """Compared with all targets there are: up to 3 tokens of a vocabulary of 5."""
    model = small(source_vocab_size=5, target_vocab_size=5, max_length=3, **options)
    source, lengths = torch.tensor([[3, 4, 4], [4, 3, 3]]), torch.tensor([3, 2])
    targets = [
        list(tokens)
        for length in range(4)
        for tokens in itertools.product((0, 1, 3, 4), repeat=length)
    ]
    with torch.no_grad():
        found = decode(model, source, lengths, beam_size=125, length_penalty=0.0)
        best = [
            max(targets, key=lambda tokens: score(model, *sample, tokens))
            for sample in zip(source, lengths, strict=True)
        ]
    assert found == best


def test_a_beam_is_never_worse_than_greedy():
    model = small()
    with torch.no_grad():
        model.target_embedding.weight *= 3
    source, lengths, *_ = batch()
    greedy = decode(model, source, lengths)
    beam = decode(model, source, lengths, beam_size=6, length_penalty=0.0)
    better = 0
    for one, other, *sample in zip(greedy, beam, source, lengths, strict=True):
        gain = score(model, *sample, other) - score(model, *sample, one)
        assert gain >= -1e-5
        better += gain > 1e-5
    assert better or greedy == beam


def train(model, make_batch, steps, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(*make_batch(step), **options).backward()
        optimizer.step()
    return model.eval()


def reversals(step, size=32):
    """Targets are the sources from right to left."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(2, 7, (size,), generator=generator)
    source = torch.randint(3, VOCAB_SIZE, (size, 6), generator=generator)
    target = torch.full((size, 7), END)
    for i, length in enumerate(lengths.tolist()):
        target[i, :length] = source[i, :length].flip(0)
    return source, lengths, target, lengths + 1


def share_reversed(model, **options):
    source, lengths, target, _ = reversals(10**6)
    said = decode(model, source, lengths, **options)
    wanted = [row[: row.index(END)] for row in target.tolist()]
    return sum(one == other for one, other in zip(said, wanted, strict=True)) / len(said)


@pytest.mark.parametrize(
    ("options", "steps", "training"),
    [
        ({}, 250, {"label_smoothing": 0.1, "sampling_probability": 0.1}),
        ({"autoregressive": False}, 400, {}),
    ],
    ids=["autoregressive", "non-autoregressive"],
)
def test_it_learns_to_reverse(options, steps, training):
    model = train(small(**options), reversals, steps, **training)
    assert share_reversed(model) > 0.9
    if model.config.autoregressive:
        assert share_reversed(model, beam_size=3) > 0.9


def copies(step, size=32, first=3, end=150):
    generator = torch.Generator().manual_seed(step)
    source = torch.randint(first, end, (size, 4), generator=generator)
    target = torch.cat((source, torch.full((size, 1), END)), dim=1)
    return source, torch.full((size,), 4), target, torch.full((size,), 5)


def test_copying_says_tokens_that_it_has_never_read():
    """Trained on tokens 3 to 149, it copies 150 to 199, which no other way of it can."""
    losses = {}
    for copying in (True, False):
        model = small(copying=copying, source_vocab_size=200, target_vocab_size=200)
        train(model, copies, 150)
        with torch.no_grad():
            losses[copying] = model.loss(*copies(10**6, first=150, end=200)).item()
    assert losses[True] < 0.5 * losses[False]


def test_guided_attention_makes_attention_monotonic():
    """A task that does not say where to look: the loss alone brings attention to the diagonal."""

    def off_diagonal(model):
        source, lengths, target, target_lengths = reversals(10**6)
        inputs = torch.cat((torch.full((32, 1), BEGIN), target[:, :-1]), dim=1)
        with torch.no_grad():
            memory = model.encode(source, lengths)
            weights = model.cross_attention_weights(inputs, memory, lengths)
        return guided_attention_loss(weights, target_lengths, lengths).item()

    before = off_diagonal(small())
    guided = off_diagonal(train(small(), reversals, 60, guided_attention=5.0))
    assert guided < 0.5 * before


def test_guided_attention_loss_is_the_formula():
    weights = torch.tensor([[[[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]]]])
    lengths = torch.tensor([2]), torch.tensor([2])

    def cost(distance):
        return 1 - math.exp(-(distance**2) / 0.08)

    expected = (0.25 * cost(0.5) + 0.5 * cost(0.5)) / 2
    assert guided_attention_loss(weights, *lengths).item() == pytest.approx(expected)
    diagonal = torch.eye(6)[None, None]
    six = torch.tensor([6])
    assert guided_attention_loss(diagonal, six, six) == 0


def test_copying_is_a_distribution():
    copy = CopyAttention(8)
    logits, hidden, memory = torch.randn(2, 3, 11), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    source = torch.randint(11, (2, 5))
    log_probabilities = copy(logits, hidden, memory, source, torch.tensor([5, 2]))
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(2, 3))


def test_bad_configs():
    for options, message in (
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"embed_dim": -4}, "embed_dim must be at least 1, got -4"),
        ({"target_vocab_size": 2}, "target_vocab_size must be at least 3, got 2"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"copying": True, "source_vocab_size": 9}, "got sizes 9 and 13"),
        ({"copying": True, "autoregressive": False}, "copying needs autoregressive=True"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformerConfig(**SMALL | options)


def test_bad_inputs():
    model = small()
    source, lengths, target, target_lengths = batch()
    with pytest.raises(ValueError, match="source must have at most max_length = 12 positions"):
        model.encode(source.repeat(1, 2), lengths)
    for options, message in (
        ({"sampling_probability": 1.5}, r"sampling_probability must be in \[0, 1\], got 1.5"),
        ({"guided_attention": -1.0}, "guided_attention must not be negative, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.loss(source, lengths, target, target_lengths, **options)
    with pytest.raises(ValueError, match=r"source must have shape \(batch, seqlen >= 1\)"):
        model.encode(source[0], lengths)
    with pytest.raises(ValueError, match="target must have at most max_length = 12 positions"):
        model.loss(source, lengths, target.repeat(1, 2), target_lengths)
    with pytest.raises(ValueError, match=r"max_length must be in \[1, 12\], got 13"):
        decode(model, source, lengths, max_length=13)
    with pytest.raises(ValueError, match="beam_size must be at least 1, got 0"):
        decode(model, source, lengths, beam_size=0)
    with pytest.raises(ValueError, match="beam_size must be 1 for a model that is not autoregres"):
        decode(small(autoregressive=False), source, lengths, beam_size=2)
    with pytest.raises(ValueError, match="autoregressive must be False for a length, got True"):
        model.length_logits(model.encode(source, lengths), lengths)
