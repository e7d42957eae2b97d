"""Models of diffusers, patched."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers_models
import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
)
from diffusers_models import patched
from torch import Tensor, nn

import leedl_fast
from leedl_fast.integrations.diffusers import AttentionProcessor, changes
from leedl_fast.testing.compare import poisoned_outputs


def with_plain_processors(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    model.set_attn_processor(AttnProcessor())
    return model


def keys(lengths: tuple[int, ...], seqlen: int) -> Tensor:
    return torch.arange(seqlen) < torch.tensor(lengths)[:, None]


def images(channels: int) -> dict[str, Any]:
    return {"sample": torch.randn(2, channels, 8, 8), "timestep": torch.tensor([3, 700])}


def with_text(**masks: Tensor) -> dict[str, Any]:
    return images(4) | {"encoder_hidden_states": torch.randn(2, 5, 12)} | masks


def with_masks(seqlen: int = 16) -> dict[str, Any]:
    return with_text(
        attention_mask=keys((seqlen, 9), seqlen), encoder_attention_mask=keys((2, 5), 5)
    )


def with_classes() -> dict[str, Any]:
    batch = images(4)
    return {"hidden_states": batch.pop("sample"), "class_labels": torch.tensor([1, 5])} | batch


Make = tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]
MODELS: dict[str, Make] = {
    "UNet2DModel": (diffusers_models.unet, lambda: images(3)),
    "UNet2DConditionModel": (diffusers_models.conditional_unet, with_text),
    "UNet2DConditionModel, masks": (diffusers_models.conditional_unet, with_masks),
    "UNet2DConditionModel, masks, AttnProcessor": (
        partial(with_plain_processors, diffusers_models.conditional_unet),
        with_masks,
    ),
    "AutoencoderKL": (diffusers_models.autoencoder, lambda: {"sample": torch.randn(2, 3, 8, 8)}),
    "DiTTransformer2DModel": (diffusers_models.transformer, with_classes),
}


def output_and_gradients(
    model: nn.Module,
    batch: dict[str, Any],
    dtype: torch.dtype,
    wrap: Callable[[nn.Module], Callable] = lambda model: model,
) -> tuple[Tensor, Tensor]:
    """The output, and the gradients of all parameters and inputs in one vector."""
    model = copy.deepcopy(model).to(dtype)
    leaves = []

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        leaves.append(x.to(dtype, copy=True).requires_grad_())
        return leaves[-1]

    output = wrap(model)(**{name: leaf(x) for name, x in batch.items()})
    output = output if isinstance(output, Tensor) else output[0]
    weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
    wanted = [*leaves, *(x for x in model.parameters() if x.requires_grad)]
    gradients = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    flat = [x.flatten() for x in gradients if x is not None]
    return output.detach(), torch.cat(flat)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def agree(model: nn.Module, batch: dict[str, Any], num_attentions: int) -> None:
    """In float64 to rounding; in float32 at most twice as far from float64 as the model itself."""
    exact = output_and_gradients(model, batch, torch.float64)
    plain = output_and_gradients(model, batch, torch.float32)
    model = patched(model)
    with poisoned_outputs() as ran:
        double = output_and_gradients(model, batch, torch.float64)
    assert ran == ["attention_forward"] * num_attentions + ["attention_backward"] * num_attentions
    single = output_and_gradients(model, batch, torch.float32)
    for expected, ours, theirs, ours64 in zip(exact, single, plain, double, strict=True):
        assert rms(ours64 - expected) <= 1e-12 * rms(expected)
        ulp = torch.finfo(torch.float32).eps * rms(expected)
        assert rms(ours - expected) <= 2 * rms(theirs - expected) + ulp


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    make, batch = MODELS[name]
    model = make().eval()
    num_attentions = sum(isinstance(module, Attention) for module in model.modules())
    agree(model, batch(), num_attentions)


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
MEMORY = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "residual": ({"residual_connection": True, "rescale_output_factor": 2.5}, {"hidden_states": X}),
    "image": (
        {"norm_num_groups": 4, "residual_connection": True, "bias": True},
        {"hidden_states": X.transpose(1, 2).unflatten(2, (3, 3))},
    ),
    "spatial norm": (
        {"spatial_norm_dim": 4},
        {
            "hidden_states": torch.ones(2, 32, 3, 3).cumsum(1).sin(),
            "temb": torch.ones(2, 4, 3, 3).cumsum(1).cos(),
        },
    ),
    "norm_cross layer": (
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        {"hidden_states": X, "encoder_hidden_states": MEMORY},
    ),
    "norm_cross group": (
        {
            "cross_attention_dim": 12,
            "cross_attention_norm": "group_norm",
            "cross_attention_norm_num_groups": 3,
        },
        {"hidden_states": X, "encoder_hidden_states": MEMORY},
    ),
    "q/k layer norm": ({"qk_norm": "layer_norm"}, {"hidden_states": X}),
    "q/k rms norm": ({"qk_norm": "rms_norm"}, {"hidden_states": X}),
    "no scale": ({"scale_qk": False}, {"hidden_states": X}),
    "mask of queries": ({}, {"hidden_states": X, "attention_mask": X[:, :, :9] * 3}),
    "mask of heads": (
        {"cross_attention_dim": 12},
        {
            "hidden_states": X,
            "encoder_hidden_states": MEMORY,
            "attention_mask": MEMORY[:, :1, :5].repeat_interleave(4, 0)
            * torch.arange(8)[:, None, None],
        },
    ),
}


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("name", ATTENTION)
def test_options_of_attention(name: str, processor: type) -> None:
    options, batch = ATTENTION[name]
    width = 32 if name == "spatial norm" else 16
    attention = Attention(width, heads=4, dim_head=4, processor=processor(), **options)
    agree(attention, batch, 1)


@pytest.mark.parametrize("name", ["q/k rms norm", "mask of heads"])
def test_under_autocast(name: str) -> None:
    """Norms give float32 beside a bfloat16 value."""
    options, batch = ATTENTION[name]
    with torch.autocast("cpu", torch.bfloat16):
        lines = leedl_fast.verify(Attention(16, heads=4, dim_head=4, **options), batch)
    assert not [line for line in lines if not line.holds]


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_scores_need_no_upcasting(processor: type) -> None:
    """The flags are for half precision: in float64 they would round."""
    options = {"upcast_attention": True, "upcast_softmax": True}
    model = Attention(16, heads=4, dim_head=4, processor=processor(), **options).bfloat16()
    batch = {"hidden_states": X.bfloat16() * 3}
    plain = output_and_gradients(model, batch, torch.bfloat16)
    ours = output_and_gradients(patched(model), batch, torch.bfloat16)
    model.upcast_attention = model.upcast_softmax = False
    exact = output_and_gradients(model, batch, torch.float64)
    for expected, got, theirs in zip(exact, ours, plain, strict=True):
        assert rms(got - expected) <= 2 * rms(theirs - expected)


def test_a_boolean_mask_is_taken_where_diffusers_takes_it() -> None:
    attention = Attention(16, heads=4, dim_head=4)
    agree(attention, {"hidden_states": X, "attention_mask": keys((9, 4), 9)[:, None]}, 1)


def test_state_dicts_stay_and_undo_restores_the_processors() -> None:
    model = diffusers_models.conditional_unet()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    before = dict(model.attn_processors)
    found = list(changes(model))
    assert dict(model.attn_processors) == before
    paths = {change.path for change in found}
    assert paths == {name.removesuffix(".processor") for name in before}
    assert {change.was for change in found} == {"diffusers AttnProcessor2_0"}
    for change in found:
        change.apply(model.get_submodule(change.path))
    assert all(type(x) is AttentionProcessor for x in model.attn_processors.values())
    assert list(changes(model)) == []
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    for change in found:
        change.undo(model.get_submodule(change.path))
    assert dict(model.attn_processors) == before


def test_undo_leaves_a_processor_that_was_set_since() -> None:
    attention = Attention(16, heads=4, dim_head=4)
    (change,) = changes(attention)
    assert change.path == ""
    change.apply(attention)
    other = AttnProcessor()
    attention.set_processor(other)
    change.undo(attention)
    assert attention.processor is other


def test_other_processors_are_left_for_a_reason() -> None:
    attention = Attention(16, heads=4, dim_head=4, added_kv_proj_dim=8)
    processor = AttnAddedKVProcessor2_0()
    attention.set_processor(processor)
    (change,) = changes(nn.ModuleDict({"block": attention}))
    assert (change.path, change.was) == ("block", "diffusers AttnAddedKVProcessor2_0")
    assert change.now == ""
    assert change.reason == "its processor is neither AttnProcessor2_0 nor AttnProcessor"
    change.apply(attention)
    change.undo(attention)
    assert attention.processor is processor


def test_attention_behind_the_dispatcher_is_left_for_a_reason() -> None:
    model = diffusers_models.transformer_behind_the_dispatcher()
    found = list(changes(model))
    assert {change.was for change in found} == {"diffusers FluxAttnProcessor"}
    assert {change.now for change in found} == {""}
    assert len(found) == 2
    assert all("dispatcher" in change.reason for change in found)


def test_a_patched_unet_compiles_without_a_graph_break() -> None:
    model = diffusers_models.conditional_unet_of_one_block()
    batch = with_masks(64)
    expected = output_and_gradients(model, batch, torch.float64)
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    results = output_and_gradients(patched(model), batch, torch.float64, compiled)
    for ours, theirs in zip(results, expected, strict=True):
        assert rms(ours - theirs) <= 1e-12 * rms(theirs)


def test_the_package_does_not_import_diffusers() -> None:
    code = "import leedl_fast, leedl_fast.integrations, sys; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_patch_verify_and_unpatch() -> None:
    torch.manual_seed(0)
    model, batch = diffusers_models.unet(), images(3)
    lines = leedl_fast.verify(model, batch)  # the model returns a class of its own
    assert [line.name for line in lines][:2] == ["output['sample']", "gradient of batch['sample']"]
    assert not [line for line in lines if not line.holds]
    report = leedl_fast.patch(model)
    assert {change.was for change in report.replaced} == {"diffusers AttnProcessor2_0"}
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert all(type(module.processor) is AttentionProcessor for module in attentions)
    leedl_fast.unpatch(model)
    assert all(type(module.processor) is AttnProcessor2_0 for module in attentions)
