import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leedl_fast import use_backend
from leedl_fast.layers import (
    AddLayerNorm,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

WIDTH, HEADS, HIDDEN = 32, 4, 72
BATCH, SEQLEN, SEQLEN_MEMORY = 3, 13, 9
LENGTHS = torch.tensor([13, 5, 8])
PADDING = torch.arange(SEQLEN) >= LENGTHS[:, None]
MEMORY_LENGTHS = torch.tensor([2, 9, 6])
MEMORY_PADDING = torch.arange(SEQLEN_MEMORY) >= MEMORY_LENGTHS[:, None]
CAUSAL_MASK = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)

norm_orders = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
activations = pytest.mark.parametrize("activation", ["relu", "gelu"])


def torch_layer(kind, **options):
    """One of torch's layers whose norms are not the identity that they begin as."""
    torch.manual_seed(0)
    layer = kind(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, **options)
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
    return layer


def x_and_memory():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, SEQLEN, WIDTH, generator=generator)
    return x, torch.randn(BATCH, SEQLEN_MEMORY, WIDTH, generator=generator)


@norm_orders
@activations
@pytest.mark.parametrize("bias", [True, False])
def test_encoder_layer_is_torchs(backend, parity, norm_first, activation, bias):
    options = {"norm_first": norm_first, "activation": activation, "bias": bias}
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, **options
    )
    layer = TransformerEncoderLayer.from_torch(module)
    parity(module, layer, x_and_memory()[:1], lambda m, x: m(x), lambda m, x: m(x))


@norm_orders
def test_causal_encoder_layer_with_padding_is_torchs(backend, parity, norm_first):
    module = torch_layer(nn.TransformerEncoderLayer, norm_first=norm_first)
    parity(
        module,
        TransformerEncoderLayer.from_torch(module, causal=True),
        x_and_memory()[:1],
        lambda m, x: m(x, src_mask=CAUSAL_MASK, src_key_padding_mask=PADDING),
        lambda m, x: m(x, key_lengths=LENGTHS),
    )


@norm_orders
@activations
def test_decoder_layer_is_torchs(backend, parity, norm_first, activation):
    module = torch_layer(nn.TransformerDecoderLayer, norm_first=norm_first, activation=activation)
    parity(
        module,
        TransformerDecoderLayer.from_torch(module),
        x_and_memory(),
        lambda m, x, memory: m(x, memory, tgt_mask=CAUSAL_MASK),
        lambda m, x, memory: m(x, memory),
    )


@norm_orders
def test_decoder_layer_with_padding_is_torchs(backend, parity, norm_first):
    module = torch_layer(nn.TransformerDecoderLayer, norm_first=norm_first)
    parity(
        module,
        TransformerDecoderLayer.from_torch(module, causal=False),
        x_and_memory(),
        lambda m, x, memory: m(
            x, memory, tgt_key_padding_mask=PADDING, memory_key_padding_mask=MEMORY_PADDING
        ),
        lambda m, x, memory: m(x, memory, key_lengths=LENGTHS, memory_lengths=MEMORY_LENGTHS),
    )


@norm_orders
@pytest.mark.parametrize("with_norm", [True, False])
def test_encoder_stack_is_torchs(backend, parity, norm_first, with_norm):
    layer = torch_layer(nn.TransformerEncoderLayer, norm_first=norm_first)
    norm = nn.LayerNorm(WIDTH) if with_norm else None
    module = nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=False)
    stack = TransformerEncoder.from_torch(module)
    parity(module, stack, x_and_memory()[:1], lambda m, x: m(x), lambda m, x: m(x))


@norm_orders
@pytest.mark.parametrize("with_norm", [True, False])
def test_decoder_stack_is_torchs(backend, parity, norm_first, with_norm):
    layer = torch_layer(nn.TransformerDecoderLayer, norm_first=norm_first)
    norm = nn.LayerNorm(WIDTH) if with_norm else None
    module = nn.TransformerDecoder(layer, 2, norm)
    parity(
        module,
        TransformerDecoder.from_torch(module),
        x_and_memory(),
        lambda m, x, memory: m(x, memory, tgt_mask=CAUSAL_MASK),
        lambda m, x, memory: m(x, memory),
    )


@norm_orders
def test_inference_is_torchs_fast_path(norm_first):
    module = torch_layer(nn.TransformerEncoderLayer, norm_first=norm_first).eval()
    layer = TransformerEncoderLayer.from_torch(module)
    x, _ = x_and_memory()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), module(x))


@pytest.mark.parametrize(
    ("fast", "plain"),
    [
        (TransformerEncoderLayer, nn.TransformerEncoderLayer),
        (TransformerDecoderLayer, nn.TransformerDecoderLayer),
    ],
)
def test_state_dicts_are_interchangeable(fast, plain):
    layer, module = fast(WIDTH, HEADS, hidden_dim=HIDDEN), plain(WIDTH, HEADS, HIDDEN)
    layer.load_state_dict(module.state_dict())
    module.load_state_dict(layer.state_dict())


@norm_orders
def test_every_residual_addition_is_fused(monkeypatch, norm_first):
    """A stack of n pre-norm layers adds 2 n times: each time in the norm that follows."""
    import leedl_fast.layers.add_layer_norm as module

    calls = []

    def spy(*arguments, **options):
        calls.append(arguments)
        return add_layer_norm(*arguments, **options)

    add_layer_norm = module.add_layer_norm
    monkeypatch.setattr(module, "add_layer_norm", spy)
    stack = TransformerEncoder(
        [TransformerEncoderLayer(WIDTH, HEADS, norm_first=norm_first) for _ in range(3)],
        AddLayerNorm(WIDTH),
    )
    stack(x_and_memory()[0])
    assert len(calls) == 6


def test_windowed_layer_sees_its_window_only(backend):
    """Two layers of window (2, 0): a change at one place reaches the 4 places after it."""
    torch.manual_seed(0)
    stack = TransformerEncoder(
        [TransformerEncoderLayer(WIDTH, HEADS, causal=True, window=2) for _ in range(2)]
    )
    x, _ = x_and_memory()
    changed = x.clone()
    changed[:, 3] += 1
    difference = (stack(changed) - stack(x)).abs().amax(dim=(0, 2))
    assert (difference > 0).tolist() == [3 <= i <= 7 for i in range(SEQLEN)]


class Scale(nn.Module):
    """In a dropout's place: shows where it acts, whatever torch's draws are."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@norm_orders
def test_dropout_acts_where_torchs_does(norm_first):
    x, memory = x_and_memory()
    for kind, fast, inputs in (
        (nn.TransformerEncoderLayer, TransformerEncoderLayer, (x,)),
        (nn.TransformerDecoderLayer, TransformerDecoderLayer, (x, memory)),
    ):
        module = torch_layer(kind, norm_first=norm_first)
        layer = fast.from_torch(module, causal=False)
        names = [name for name, child in module.named_children() if isinstance(child, nn.Dropout)]
        for factor, name in enumerate(names, start=2):
            setattr(module, name, Scale(1 / factor))
            setattr(layer, name, Scale(1 / factor))
        torch.testing.assert_close(layer(*inputs), module(*inputs))


@norm_orders
def test_dropout_is_that_of_eager_mode_and_off_in_evaluation(norm_first):
    x, memory = x_and_memory()
    for kind, inputs in ((TransformerEncoderLayer, (x,)), (TransformerDecoderLayer, (x, memory))):
        layer = kind(WIDTH, HEADS, dropout=0.4, norm_first=norm_first)
        outputs = []
        for backend in ("cpu", "eager"):
            torch.manual_seed(1)
            with use_backend(backend):
                outputs.append(layer(*inputs))
                assert not torch.equal(layer(*inputs), outputs[-1])  # another draw
        torch.testing.assert_close(*outputs)
        layer.eval()
        assert torch.equal(layer(*inputs), layer(*inputs))
        assert not torch.allclose(layer(*inputs), outputs[0])


def test_dropout_probability_is_copied():
    module = nn.TransformerEncoderLayer(WIDTH, HEADS, dropout=0.3)
    layer = TransformerEncoderLayer.from_torch(module)
    assert [layer.dropout.p, layer.dropout1.p, layer.dropout2.p] == [0.3] * 3
    assert layer.self_attn.dropout == 0.3


def test_activation_may_be_a_function_or_a_module():
    for activation in (F.silu, nn.SiLU()):
        module = torch_layer(nn.TransformerEncoderLayer, activation=activation)
        x, _ = x_and_memory()
        torch.testing.assert_close(TransformerEncoderLayer.from_torch(module)(x), module(x))


def test_bad_options():
    with pytest.raises(ValueError, match=r"embed_dim must be a positive multiple of num_heads"):
        TransformerEncoderLayer(33, HEADS)
    for layer in (TransformerEncoderLayer, TransformerDecoderLayer):
        with pytest.raises(ValueError, match="hidden_dim must be at least 1, got -4"):
            layer(WIDTH, HEADS, hidden_dim=-4)
    layers = [TransformerEncoderLayer(WIDTH, HEADS, norm_first=order) for order in (False, True)]
    with pytest.raises(ValueError, match="layers must be at least one and of one norm_first"):
        TransformerEncoder(layers)
    with pytest.raises(ValueError, match="layers must be at least one"):
        TransformerEncoder([])


@pytest.mark.parametrize(
    ("score", "normalizer"), [("additive", "softmax"), ("dot", "relu"), ("dot", "sigmoid")]
)
def test_an_encoder_layer_hands_score_and_normalizer_to_its_attention(score, normalizer):
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(
        WIDTH, HEADS, score=score, normalizer=normalizer, norm_first=True
    )
    attention = layer.self_attn
    assert (attention.score, attention.normalizer) == (score, normalizer)
    x, _ = x_and_memory()
    after = x + attention(F.layer_norm(x, (WIDTH,)), key_lengths=LENGTHS)
    expected = after + layer.linear2(F.relu(layer.linear1(F.layer_norm(after, (WIDTH,)))))
    torch.testing.assert_close(layer(x, key_lengths=LENGTHS), expected)


def test_a_post_norm_residual_keeps_its_digits_under_autocast():
    layer = TransformerEncoderLayer(WIDTH, HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x_and_memory()[0]).dtype == torch.float32
    layer = TransformerDecoderLayer(WIDTH, HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(*x_and_memory()).dtype == torch.float32
