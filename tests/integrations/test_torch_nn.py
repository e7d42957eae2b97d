"""torch.nn's own attention and Transformer layers, patched."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leedl_fast
from leedl_fast.ops.contract import OPERATORS

WIDTH, HEADS = 24, 3


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The operator and the Problem of every forward pass of a fused kernel."""
    found = []

    def record(name: str, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def run(problem: Any, *inputs: Any) -> Any:
            found.append((name, problem))
            return allocate(problem, *inputs)

        return run

    for name in ("attention_forward", "add_layer_norm_forward"):
        operator = OPERATORS[name]
        monkeypatch.setattr(operator, "allocate", record(name, operator.allocate))
    return found


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def agree(model: nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Outputs and gradients of the model, and of a patched copy."""
    patched = copy.deepcopy(model)
    assert leedl_fast.patch(patched).replaced
    results = []
    for module in (model, patched):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = module(*leaves, **options)
        out = output[0] if isinstance(output, tuple) else output
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        wanted = [*leaves, *module.parameters()]
        results.append([out, *torch.autograd.grad((out * weights).sum(), wanted)])
    for plain, fused in zip(*results, strict=True):
        assert torch.allclose(fused, plain, rtol=1e-9, atol=1e-11)


CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)
PADDED = {
    "left": torch.tensor([[True] * 2 + [False] * 5, [False] * 7]),
    "right": torch.tensor([[False] * 4 + [True] * 3, [False] * 7]),
    "numbers": torch.tensor([[0.0] * 4 + [-1e9] * 3, [0.5] * 7], dtype=torch.float64),
}
MASKS = {
    "none": {},
    "booleans": {"attn_mask": torch.eye(7).bool().roll(1, 0)},
    "numbers": {"attn_mask": randn(7, 7)},
    "by head": {"attn_mask": randn(2 * HEADS, 7, 7)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal, right padding": {
        "attn_mask": CAUSAL,
        "is_causal": True,
        "key_padding_mask": PADDED["right"],
    },
    "a mask and left padding": {
        "attn_mask": torch.eye(7).bool(),
        "key_padding_mask": torch.tensor([[True] + [False] * 6] * 2),
    },
    **{f"padding, {name}": {"key_padding_mask": mask} for name, mask in PADDED.items()},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_self_attention(name: str, batch_first: bool) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).double()
    x = randn(2, 7, WIDTH) if batch_first else randn(7, 2, WIDTH)
    agree(_Itself(module), x, need_weights=False, **MASKS[name])


class _Itself(nn.Module):
    """One tensor as query, key and value: the very same object, as a Transformer passes it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, **options)


class _Memory(_Itself):
    def forward(self, x: Tensor, memory: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, memory, memory, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention(batch_first: bool, bias: bool) -> None:
    options = {"batch_first": batch_first, "bias": bias}
    q, k = (5, 2), (7, 2)
    if batch_first:
        q, k = q[::-1], k[::-1]
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    agree(_Memory(module), randn(*q, WIDTH), randn(*k, WIDTH), need_weights=False)
    tensors = randn(*q, WIDTH), randn(*k, WIDTH), randn(*k, WIDTH)
    agree(module, *tensors, need_weights=False)
    module = nn.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=11, **options).double()
    agree(module, randn(*q, WIDTH), randn(*k, 10), randn(*k, 11), need_weights=False)


def test_without_a_batch() -> None:
    for batch_first in (True, False):
        module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).double()
        padding = torch.tensor([False] * 4 + [True] * 3)
        for options in ({}, {"key_padding_mask": padding}, {"attn_mask": randn(HEADS, 7, 7)}):
            agree(_Itself(module), randn(7, WIDTH), need_weights=False, **options)


def test_weights_come_from_torch(runs: list[Any]) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    x = randn(2, 7, WIDTH)
    expected = module(x, x, x, average_attn_weights=False)
    leedl_fast.patch(module)
    actual = module(x, x, x, average_attn_weights=False)
    assert torch.equal(actual[1], expected[1])
    assert not runs
    module(x, x, x, need_weights=False)
    assert [name for name, _ in runs] == ["attention_forward"]


def layer(kind: type[nn.Module], **options: Any) -> nn.Module:
    module = kind(WIDTH, HEADS, 40, dropout=0.0, dtype=torch.float64, **options)
    for name, parameter in module.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter)
    return module


LAYERS = [
    {},
    {"norm_first": True, "activation": "gelu"},
    {"bias": False, "layer_norm_eps": 0.1},
    {"batch_first": True, "norm_first": True},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_layers(options: dict[str, Any], training: bool, runs: list[Any]) -> None:
    encoder = layer(nn.TransformerEncoderLayer, **options).train(training)
    decoder = layer(nn.TransformerDecoderLayer, **options).train(training)
    batch_first = options.get("batch_first", False)
    x, memory = ((2, 7), (2, 5)) if batch_first else ((7, 2), (5, 2))
    agree(encoder, randn(*x, WIDTH))
    assert {name for name, _ in runs} == {"attention_forward", "add_layer_norm_forward"}
    agree(encoder, randn(*x, WIDTH), src_mask=CAUSAL, is_causal=True)
    agree(encoder, randn(*x, WIDTH), src_key_padding_mask=PADDED["right"])
    agree(decoder, randn(*x, WIDTH), randn(*memory, WIDTH))
    agree(
        decoder,
        randn(*x, WIDTH),
        randn(*memory, WIDTH),
        tgt_mask=CAUSAL,
        tgt_is_causal=True,
        memory_key_padding_mask=torch.tensor([[False] * 3 + [True] * 2, [False] * 5]),
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_whole_transformer_and_its_padding(runs: list[Any]) -> None:
    model = nn.Transformer(WIDTH, 4, 2, 2, 40, 0.0, batch_first=True, dtype=torch.float64)
    source, target = randn(2, 7, WIDTH), randn(2, 5, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = PADDED["right"]
    options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    agree(model.eval(), source, target, tgt_mask=mask, **options)
    with torch.no_grad():  # where torch.nn makes nested tensors
        expected = model(source, target, tgt_mask=mask, **options)
        leedl_fast.patch(model)
        runs.clear()
        assert torch.allclose(model(source, target, tgt_mask=mask, **options), expected)
    causal = [p for name, p in runs if name == "attention_forward" and p.window_right == 0]
    assert len(runs) == 2 * (1 + 2) + 2 * (2 + 3)
    assert len(causal) == 2


def test_dropout_while_training() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, dropout=0.5, batch_first=True)
    leedl_fast.patch(model)
    x = torch.randn(2, 7, WIDTH)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_state_hooks_and_class_stay() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 40)
    before = copy.deepcopy(model.state_dict())
    calls = []
    model.self_attn.register_forward_hook(lambda *_: calls.append(1))
    leedl_fast.patch(model)
    assert type(model) is nn.TransformerEncoderLayer
    assert list(model.state_dict()) == list(before)
    model.load_state_dict(before)
    model(torch.randn(7, 2, WIDTH))
    assert calls == [1]
    copied = copy.deepcopy(model)
    assert copied.forward.args == (copied,)
    leedl_fast.unpatch(model)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.self_attn)


def test_a_patched_model_that_was_saved_whole_is_patched(runs: list[Any]) -> None:
    model = layer(nn.TransformerEncoderLayer)
    leedl_fast.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = randn(7, 2, WIDTH)
    assert torch.equal(loaded(x), model(x))
    assert [name for name, _ in runs].count("attention_forward") == 2
    assert loaded.forward.args == (loaded,)


def test_unpatch_leaves_a_forward_that_was_set_since() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 40)
    leedl_fast.patch(model)
    model.forward = own = lambda x: x
    leedl_fast.unpatch(model)
    assert model.forward is own
    assert "forward" not in vars(model.self_attn)


def test_patch_keeps_no_model_alive() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 40)
    report = leedl_fast.patch(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert report.replaced


def test_a_graph_of_a_patched_layer() -> None:
    model = layer(nn.TransformerEncoderLayer, batch_first=True)
    x = randn(2, 7, WIDTH)
    expected = model(x, src_key_padding_mask=PADDED["left"])
    leedl_fast.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, src_key_padding_mask=PADDED["left"]), expected)


def test_what_is_left_has_a_reason() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *inputs: Any) -> Any:
            return inputs

    encoder = nn.TransformerEncoderLayer(WIDTH, HEADS)
    encoder.norm2 = nn.Identity()
    model = nn.ModuleDict(
        {
            "kv": nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True),
            "zero": nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True),
            "own": Own(WIDTH, HEADS),
            "encoder": encoder,
        }
    )
    report = leedl_fast.patch(model)
    assert str(report).splitlines() == [
        "encoder.self_attn: torch.nn.MultiheadAttention -> attention",
        "kv: torch.nn.MultiheadAttention left as it is: add_bias_kv is on",
        "zero: torch.nn.MultiheadAttention left as it is: add_zero_attn is on",
        "encoder: torch.nn.TransformerEncoderLayer left as it is: norm2 is Identity(), "
        "not a LayerNorm over one dimension",
    ]
    assert str(leedl_fast.patch(nn.Linear(2, 2))) == "nothing in this model has a fused kernel"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        leedl_fast.patch(3)
    with pytest.raises(ValueError, match="model must have been patched, got a Linear that was not"):
        leedl_fast.unpatch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must have something to patch, got a Linear"):
        leedl_fast.verify(nn.Linear(2, 2), torch.randn(3, 2))
    module = nn.MultiheadAttention(WIDTH, HEADS)
    leedl_fast.patch(module)
    x = torch.randn(7, 2, WIDTH)
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True, got None"):
        module(x, x, x, need_weights=False, is_causal=True)


def test_verify() -> None:
    model = nn.Transformer(WIDTH, 4, 1, 1, 40, batch_first=True)
    batch = {"src": torch.randn(2, 7, WIDTH), "tgt": torch.randn(2, 5, WIDTH)}
    for given in (batch, tuple(batch.values())):
        lines = leedl_fast.verify(model, given)
        assert all(line.holds for line in lines)
        assert len(lines) == 1 + 2 + len(list(model.parameters()))
    assert all("forward" not in vars(module) for module in model.modules())


def test_verify_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from leedl_fast.integrations import torch_nn

    right = torch_nn.attention
    monkeypatch.setattr(torch_nn, "attention", lambda *a, **options: right(*a, **options) * 1.001)
    lines = leedl_fast.verify(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 40), torch.randn(7, 2, WIDTH)
    )
    assert not all(line.holds for line in lines)


@pytest.mark.parametrize("norm_first", [False, True])
def test_under_autocast(norm_first: bool, runs: list[tuple[str, Any]]) -> None:
    """GELU, for ReLU's gradient jumps where a sum that was rounded changes its sign."""
    options = {"activation": "gelu", "norm_first": norm_first}
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 40, **options), 2)
    with torch.autocast("cpu", torch.bfloat16):
        lines = leedl_fast.verify(model, (torch.randn(7, 2, WIDTH), torch.randn(5, 2, WIDTH)))
    assert {p.dtype for name, p in runs if name == "attention_forward"} >= {torch.bfloat16}
    assert not [line for line in lines if not line.holds]
