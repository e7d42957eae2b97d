"""Models of transformers with the attention implementation "leedl_fast"."""

import copy
import io
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

import leedl_fast
from leedl_fast.backends import use_backend
from leedl_fast.integrations.transformers import VisibleKeys, attention_forward, attention_mask
from leedl_fast.ops.contract import OPERATORS

SEQLEN = 17
PADDING = {"all": slice(0, 0), "left": slice(0, 4), "right": slice(-6, None)}


def batch_of(name: str, hidden: slice | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    if name.startswith("vit"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    batch = {"input_ids": torch.randint(1, 60, (2, SEQLEN))}
    if hidden is not None:
        batch["attention_mask"] = torch.ones(2, SEQLEN, dtype=torch.int64)
        batch["attention_mask"][0, hidden] = 0
    if name.startswith("t5"):
        batch["decoder_input_ids"] = batch["input_ids"][:, :7]
    return batch


@pytest.fixture
def attention_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The Problem of every forward pass of the fused kernel."""
    runs = []
    allocate = OPERATORS["attention_forward"].allocate

    def record(problem: Any, *inputs: Any) -> Any:
        runs.append(problem)
        return allocate(problem, *inputs)

    monkeypatch.setattr(OPERATORS["attention_forward"], "allocate", record)
    return runs


@pytest.mark.parametrize("hidden", [None, *PADDING.values()], ids=["no mask", *PADDING])
@pytest.mark.parametrize("name", models.ALL)
def test_outputs_and_gradients(name: str, hidden: slice | None, attention_runs: list[Any]) -> None:
    torch.manual_seed(0)
    lines = leedl_fast.verify(models.make(name), batch_of(name, hidden))
    assert attention_runs
    assert [line for line in lines if line.name.startswith("output")]
    assert [line for line in lines if line.name.startswith("gradient")]
    assert not [line for line in lines if not line.holds]


@pytest.mark.parametrize("name", models.DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens(name: str, cache: str, attention_runs: list[Any]) -> None:
    """Longer than the window, one sample padded on the left."""
    torch.manual_seed(0)
    model = models.make(name)
    batch = batch_of(name, PADDING["left"])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**batch, **options)
    assert not attention_runs
    leedl_fast.patch(model)
    assert torch.equal(model.generate(**batch, **options), expected)
    assert attention_runs


def windows(runs: list[Any]) -> set[tuple[int, int]]:
    return {(problem.window_left, problem.window_right) for problem in runs}


def test_a_window_reaches_the_kernel(attention_runs: list[Any]) -> None:
    model = models.make("mistral, a window")
    leedl_fast.patch(model)
    model(**batch_of("mistral"))
    assert windows(attention_runs) == {(4, 0)}
    assert all(problem.bias_shape is None for problem in attention_runs)


def test_an_own_pattern_is_never_dropped() -> None:
    """Packed sequences and a mask of the caller's own are dense masks."""
    torch.manual_seed(0)
    model = models.make("llama, grouped queries").double()
    positions = torch.tensor([[*range(9), *range(8)]])
    ids = torch.randint(1, 60, (1, SEQLEN))
    mask = torch.rand(1, 1, SEQLEN, SEQLEN).gt(0.4) | torch.eye(SEQLEN, dtype=torch.bool)
    packed, masked = {"position_ids": positions}, {"attention_mask": mask}
    expected = [model(ids, **options).logits for options in ({}, packed, masked)]
    leedl_fast.patch(model)
    for options, logits in zip(({}, packed, masked), expected, strict=True):
        assert torch.allclose(model(ids, **options).logits, logits, atol=1e-12)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


MASK_FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, (None, 0)),
    "bidirectional": (masking_utils.bidirectional_mask_function, (None, None)),
    "window": (masking_utils.sliding_window_causal_mask_function(3), (2, 0)),
    "window on both sides": (
        masking_utils.sliding_window_bidirectional_mask_function(3),
        (3, 3),
    ),
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=int)), None),
    "another": (lambda batch, head, q, k: (q + k) % 2 == 0, None),
    "causal or another": (
        masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k == 0),
        None,
    ),
}


@pytest.mark.parametrize("sizes", [(2, 7, 7, 0, 0), (2, 1, 9, 8, 0), (2, 3, 6, 8, 5)], ids=str)
@pytest.mark.parametrize("name", MASK_FUNCTIONS)
def test_masks_are_what_sdpa_would_get(name: str, sizes: tuple[int, ...]) -> None:
    function, window = MASK_FUNCTIONS[name]
    batch, seqlen_q, seqlen_k, q_offset, kv_offset = sizes
    seen = torch.ones(batch, kv_offset + seqlen_k, dtype=torch.bool)
    seen[0, : kv_offset + 2] = False
    for padding in (None, seen):
        arguments = {
            "batch_size": batch,
            "q_length": seqlen_q,
            "kv_length": seqlen_k,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": function,
            "attention_mask": padding,
            "allow_is_causal_skip": False,
        }
        mask = attention_mask(**arguments)
        assert isinstance(mask, VisibleKeys) == (window is not None)
        expected = masking_utils.sdpa_mask(**arguments)
        assert mask.shape == expected.shape
        assert mask.dtype == torch.bool
        assert torch.equal(mask & True, expected)  # whoever computes with it sees the dense mask
        if window is None:
            continue
        assert mask.pattern.window == window
        q, k, v = (torch.randn(batch, 2, s, 4) for s in (seqlen_q, seqlen_k, seqlen_k))
        ours, theirs = (
            attention_forward(torch.nn.Identity(), q, k, v, m)[0] for m in (mask, expected)
        )
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "hidden", "expected"),
    [
        ("mistral, a window", PADDING["right"], {(4, 0)}),
        ("mistral, a window", None, {None}),  # may be packed sequences: a dense mask
        ("modernbert, a window on both sides", PADDING["left"], {(3, 3), None}),
        ("bert", None, {None}),
    ],
    ids=str,
)
def test_a_graph_of_a_patched_model(
    name: str, hidden: slice | None, expected: set[Any], attention_runs: list[Any]
) -> None:
    """Without a break, and with the windows in it."""
    torch.manual_seed(0)
    model, batch = models.make(name), batch_of(name, hidden)
    if "input_ids" in batch and name in models.DECODERS:
        batch["use_cache"] = False
    plain = model(**batch)[0]
    leedl_fast.patch(model)
    actual = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)[0]
    seen = batch.get("attention_mask", torch.ones(2, SEQLEN)).bool()
    assert torch.allclose(actual[seen], plain[seen], atol=1e-5)
    wide = (2 * SEQLEN, 2 * SEQLEN)
    assert {window if window != wide else None for window in windows(attention_runs)} == expected


@pytest.mark.parametrize("name", ["llama, grouped queries", "t5, position bias, cross-attention"])
def test_under_autocast(name: str, attention_runs: list[Any]) -> None:
    """As exact as torch's own under autocast, and in its dtype, whatever rotary positions give."""

    class WithoutCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = models.make(name)

        def forward(self, **batch: Tensor) -> Tensor:
            return self.model(**batch, use_cache=False).logits

    with torch.autocast("cpu", torch.bfloat16):
        lines = leedl_fast.verify(WithoutCache(), batch_of(name, PADDING["right"]))
    assert {problem.dtype for problem in attention_runs} == {torch.bfloat16}
    assert not [line for line in lines if not line.holds]


def test_it_can_be_asked_for_by_name() -> None:
    import transformers

    config = transformers.LlamaConfig(**models.GROUPED)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="leedl_fast")
    assert model.config._attn_implementation == "leedl_fast"
    with pytest.raises(ValueError, match="model must have something to patch, got a Llama"):
        leedl_fast.verify(model, batch_of("llama"))


def refusals() -> list[tuple[dict[str, Any], type[Exception], str]]:
    return [
        ({"output_attentions": True}, ValueError, "output_attentions must be False"),
        ({"cache": object()}, NotImplementedError, "no paged cache"),
    ]


@pytest.mark.parametrize(("options", "error", "message"), refusals())
def test_what_it_cannot_do_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(error, match=message):
        attention_forward(torch.nn.Identity(), q, q, q, None, **options)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3), (3, 5), (1, 5)], ids=str)
def test_causal_without_a_mask_is_aligned_as_torch_aligns_it(lengths: tuple[int, int]) -> None:
    q, k, v = (torch.randn(2, 2, s, 4) for s in (lengths[0], lengths[1], lengths[1]))
    actual, _ = attention_forward(torch.nn.Identity(), q, k, v, None, is_causal=True)
    causal = lengths[0] > 1  # a query alone is the last
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert torch.allclose(actual, expected.transpose(1, 2), atol=1e-6)


def test_dropout_while_training() -> None:
    model = models.make("gpt2")
    model.config.resid_pdrop = model.config.embd_pdrop = 0.0
    leedl_fast.patch(model)
    batch = batch_of("gpt2")
    model.train()
    first, second = model(**batch).logits, model(**batch).logits
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_unpatch_and_a_second_patch(attention_runs: list[Any]) -> None:
    model = models.make("t5, position bias, cross-attention")
    before = model.config._attn_implementation
    state = {name: x.clone() for name, x in model.state_dict().items()}
    report = leedl_fast.patch(model)
    assert str(report) == (
        f"the model: transformers T5ForConditionalGeneration, attention {before!r} -> attention"
    )
    assert str(leedl_fast.patch(model)) == "nothing in this model has a fused kernel"
    leedl_fast.unpatch(model)
    assert model.config._attn_implementation == before
    model(**batch_of("t5"))
    assert not attention_runs
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name])


def test_a_model_inside_of_another(attention_runs: list[Any]) -> None:
    class Classifier(torch.nn.Module):
        def __init__(self, encoder: PreTrainedModel) -> None:
            super().__init__()
            self.encoder = encoder
            self.head = torch.nn.Linear(32, 2)

        def forward(self, **batch: Tensor) -> Tensor:
            return self.head(self.encoder(**batch).last_hidden_state[:, 0])

    model = Classifier(models.make("bert"))
    report = leedl_fast.patch(model)
    assert [change.path for change in report.replaced] == ["encoder"]
    model(**batch_of("bert"))
    assert attention_runs


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_the_backend_can_be_asked_for(backend: str) -> None:
    model = models.make("llama, grouped queries")
    expected = model(**batch_of("llama")).logits
    leedl_fast.patch(model)
    with use_backend(backend):
        actual = model(**batch_of("llama")).logits
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    gradients = []
    plain = models.make("llama, grouped queries")
    patched = copy.deepcopy(plain)
    leedl_fast.patch(patched)
    batch = batch_of("llama", PADDING["left"])
    for model in (plain, patched):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([x.grad for x in model.parameters()])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients, strict=True))


def test_beam_search() -> None:
    torch.manual_seed(0)
    model, batch = models.make("mistral, a window"), batch_of("mistral", PADDING["left"])
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**batch, **options)
    leedl_fast.patch(model)
    assert torch.equal(model.generate(**batch, **options), expected)


def test_a_patched_model_that_was_saved_whole_is_patched(attention_runs: list[Any]) -> None:
    model, batch = models.make("bert"), batch_of("bert")
    leedl_fast.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = model(**batch)[0]
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        attention_runs.clear()
        assert torch.equal(other(**batch)[0], expected)
        assert attention_runs
