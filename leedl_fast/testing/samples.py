"""Sample problems of every op: the sizes at which kernels break."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leedl_fast.ops import (
    add_layer_norm,
    additive_attention,
    attention,
    diffusion,
    linear_cross_entropy,
)

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """One problem of one op.

    shapes: of the differentiable inputs, by name, in the order of the function's arguments.
    call: function(tensors, backend) -> outputs.
    scale: factor on the standard normal inputs.
    transposed: the inputs lie in memory as (batch, seqlen, heads, head_dim).
    """

    op: str
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    call: Callable[..., tuple[Tensor, ...]]
    scale: float = 1.0
    transposed: bool = False
    offset: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def tensors(self, draw: int = 0) -> dict[str, Tensor]:
        """The inputs in float64, the same at every call with the same draw."""
        generator = torch.Generator().manual_seed(draw)
        return {
            name: self.scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in self.shapes.items()
        }

    def inputs(
        self,
        rounded_to: torch.dtype,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        draw: int = 0,
    ) -> dict[str, Tensor]:
        """The inputs rounded to one dtype and kept in another, as leaves, in the case's layout."""
        return {
            name: self._laid_out(x.to(rounded_to).to(device, dtype)).requires_grad_()
            for name, x in self.tensors(draw).items()
        }

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.transposed and x.dim() == 4:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.offset:  # the same numbers, not aligned to a vector
            storage = x.new_empty(x.numel() + self.offset)
            return storage[self.offset :].view(x.shape).copy_(x)
        return x

    def run(self, tensors: Tensors, backend: str | None) -> tuple[Tensor, ...]:
        return self.call(tensors, backend=backend, **self.options)


def _attention(tensors: Tensors, backend: str | None, **options: Any) -> tuple[Tensor, ...]:
    arguments: dict[str, Any] = {**tensors, **options, "backend": backend}
    device = tensors["q"].device
    for name in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            arguments[name] = torch.tensor(options[name], dtype=torch.int64, device=device)
    if "alibi_slopes" in options:
        arguments["alibi_slopes"] = torch.tensor(options["alibi_slopes"], device=device)
    if options.get("normalizer", "softmax") != "softmax":
        return (attention(**arguments),)
    return attention(**arguments, return_lse=True)


def _attention_case(
    name: str,
    batch: int,
    heads: int,
    seqlen_q: int,
    head_dim: int,
    *,
    heads_k: int | None = None,
    seqlen_k: int | None = None,
    head_dim_v: int | None = None,
    bias: tuple[int, ...] | None = None,
    sinks: bool = False,
    scale: float = 1.0,
    transposed: bool = False,
    offset: int = 0,
    **options: Any,
) -> Case:
    heads_k = heads if heads_k is None else heads_k
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, heads, seqlen_q, head_dim),
        "k": (batch, heads_k, seqlen_k, head_dim),
        "v": (batch, heads_k, seqlen_k, head_dim_v),
    }
    shapes |= {"bias": bias} if bias is not None else {}
    shapes |= {"sinks": (heads,)} if sinks else {}
    return Case("attention", name, shapes, _attention, scale, transposed, offset, options)


_case = _attention_case
ATTENTION = (
    _case("one", 1, 1, 1, 1),
    _case("full", 2, 3, 64, 32),
    _case("full-odd", 1, 2, 67, 17),
    _case("full-long", 1, 1, 700, 64),
    _case("causal", 2, 2, 65, 64, causal=True),
    _case("causal-prime", 1, 3, 257, 40, causal=True),
    _case("causal-more-keys", 1, 2, 33, 16, seqlen_k=97, causal=True),
    _case("causal-fewer-keys", 1, 2, 97, 16, seqlen_k=33, causal=True),
    _case("window", 1, 2, 300, 64, window=(31, 17)),
    _case("window-causal", 2, 1, 513, 32, window=100, causal=True),
    _case("window-self-only", 1, 1, 50, 8, window=(0, 0)),
    _case("window-left-unlimited", 1, 1, 200, 24, window=(None, 5)),
    _case("window-right-unlimited", 1, 1, 200, 24, window=(5, None)),
    _case("window-as-wide-as-the-sequence", 1, 2, 96, 16, window=96),
    _case("window-more-keys", 1, 2, 129, 48, seqlen_k=400, window=(64, 3)),
    _case("window-fewer-keys", 1, 2, 400, 48, seqlen_k=129, window=(64, 3)),
    _case("gqa", 2, 6, 63, 32, heads_k=2, causal=True),
    _case("mqa-window", 1, 4, 190, 16, heads_k=1, window=(20, 9)),
    _case("key-lengths", 4, 2, 70, 32, key_lengths=(70, 1, 0, 33)),
    _case("key-lengths-window", 3, 2, 150, 16, window=(40, 20), key_lengths=(150, 77, 64)),
    _case("cross", 2, 2, 5, 64, seqlen_k=129),
    _case("one-query", 2, 4, 1, 64, seqlen_k=333, heads_k=2),
    _case("one-key", 1, 2, 100, 16, seqlen_k=1),
    _case("value-wider", 1, 2, 80, 16, head_dim_v=72),
    _case("value-narrower", 1, 2, 80, 72, head_dim_v=3),
    _case("head-dim-80", 1, 2, 130, 80, causal=True),
    _case("head-dim-96", 1, 1, 130, 96, window=(33, 0)),
    _case("head-dim-128", 1, 1, 140, 128, causal=True),
    _case("head-dim-256", 1, 1, 90, 256, window=16),
    _case("transposed", 2, 3, 100, 32, transposed=True, window=(30, 30)),
    _case("unaligned", 1, 2, 77, 20, offset=1, causal=True),
    _case("huge-scores", 1, 2, 90, 32, scale=40.0, window=(50, 50)),
    _case("scaled", 1, 2, 64, 32, softmax_scale=0.3),
    _case("no-keys", 1, 2, 9, 8, seqlen_k=0),
    _case("no-queries", 1, 2, 0, 8, seqlen_k=9),
    _case("no-batch", 0, 2, 9, 8),
)
_SLOPES = (0.5, 0.0625, 0.25, 2.0)
_PACK: dict[str, Any] = {"cu_seqlens_q": (0, 70, 70, 71, 133), "cu_seqlens_k": (0, 40, 57, 57, 200)}
_SAME_PACK: dict[str, Any] = {"cu_seqlens_q": (0, 33, 34, 34, 150)}
ATTENTION_EXTRAS = (
    _case("bias", 2, 3, 65, 32, bias=(2, 3, 65, 65)),
    _case("bias-for-all", 3, 4, 70, 16, heads_k=2, seqlen_k=131, bias=(131,), causal=True),
    _case("bias-of-heads", 2, 2, 130, 40, bias=(1, 2, 130, 130), window=(40, 9)),
    _case("bias-of-samples", 2, 3, 33, 16, seqlen_k=97, bias=(2, 1, 1, 97)),
    _case("bias-key-lengths", 3, 2, 50, 16, bias=(50, 50), key_lengths=(50, 0, 17)),
    _case("alibi", 1, 4, 130, 32, alibi_slopes=_SLOPES, causal=True),
    _case("alibi-of-samples", 2, 2, 70, 16, seqlen_k=97, alibi_slopes=(_SLOPES[:2], _SLOPES[2:])),
    _case("softcap", 2, 2, 97, 32, softcap=2.5, scale=2.0, window=(50, 20)),
    _case("softcap-huge", 1, 2, 64, 16, softcap=30.0, scale=40.0, causal=True),
    _case("sinks", 2, 4, 75, 32, heads_k=2, sinks=True, window=(20, 0)),
    _case("sinks-and-no-keys", 2, 2, 40, 16, sinks=True, key_lengths=(0, 40)),
    _case("dropout", 2, 2, 67, 32, dropout_p=0.3, seed=7, causal=True),
    _case("dropout-one-query", 2, 4, 1, 64, seqlen_k=77, heads_k=2, dropout_p=0.5, seed=-1),
    _case("few-queries", 2, 6, 5, 32, heads_k=2, seqlen_k=700, window=(400, 0)),
    _case("few-queries-relu", 1, 4, 1, 16, heads_k=1, seqlen_k=530, normalizer="relu"),
    _case(
        *("few-queries-everything", 2, 6, 3, 24),
        heads_k=2,
        seqlen_k=600,
        head_dim_v=40,
        bias=(2, 1, 3, 600),
        sinks=True,
        alibi_slopes=(0.01, 0.02, 0.005, 0.0, 0.03, 0.1),
        softcap=3.0,
        dropout_p=0.2,
        seed=11,
        causal=True,
        key_lengths=(600, 290),
    ),
    _case("relu", 2, 2, 80, 32, normalizer="relu", window=(30, 30)),
    _case("relu-key-lengths", 2, 2, 50, 16, normalizer="relu", key_lengths=(0, 33)),
    _case("sigmoid", 2, 2, 80, 32, normalizer="sigmoid", causal=True),
    _case("sigmoid-bias", 1, 2, 65, 16, seqlen_k=90, normalizer="sigmoid", bias=(2, 1, 90)),
    _case("packed", 1, 4, 133, 32, heads_k=2, seqlen_k=200, **_PACK),
    _case("packed-window", 1, 2, 150, 16, window=(20, 3), **_SAME_PACK),
    _case("packed-causal", 1, 2, 133, 64, seqlen_k=200, causal=True, transposed=True, **_PACK),
    _case("packed-alibi", 1, 2, 150, 16, alibi_slopes=((0.5, 1.0),) * 4, **_SAME_PACK),
    _case("packed-none", 1, 2, 0, 16, cu_seqlens_q=(0,)),
    _case(
        *("everything", 2, 4, 91, 24),
        heads_k=2,
        seqlen_k=113,
        head_dim_v=40,
        bias=(2, 1, 91, 113),
        sinks=True,
        alibi_slopes=_SLOPES,
        softcap=3.0,
        dropout_p=0.2,
        seed=3,
        window=(60, 10),
        key_lengths=(113, 80),
    ),
    _case(
        *("packed-everything", 1, 4, 150, 16),
        heads_k=2,
        sinks=True,
        alibi_slopes=_SLOPES,
        softcap=3.0,
        dropout_p=0.2,
        seed=3,
        causal=True,
        **_SAME_PACK,
    ),
)


def _additive_attention(
    tensors: Tensors,
    backend: str | None,
    *,
    key_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor]:
    device = tensors["q"].device
    lengths = None if key_lengths is None else torch.tensor(key_lengths, device=device)
    return (additive_attention(*tensors.values(), key_lengths=lengths, backend=backend, **options),)


def _additive(name: str, *sizes: int, one_weight: bool = False, **options: Any) -> Case:
    """The attention case of these sizes, with a score_weight."""
    case = _attention_case(name, *sizes, **options)
    num_heads, head_dim = sizes[1], sizes[3]
    shapes = {**case.shapes, "score_weight": (head_dim,) if one_weight else (num_heads, head_dim)}
    return replace(case, op="additive_attention", shapes=shapes, call=_additive_attention)


ADDITIVE_ATTENTION = (
    _additive("one", 1, 1, 1, 1),
    _additive("full", 2, 3, 64, 32),
    _additive("full-odd", 1, 2, 67, 17, one_weight=True),
    _additive("full-long", 1, 1, 500, 64),
    _additive("causal", 2, 2, 65, 64, causal=True),
    _additive("causal-more-keys", 1, 2, 33, 16, seqlen_k=97, causal=True),
    _additive("causal-fewer-keys", 1, 2, 97, 16, seqlen_k=33, causal=True),
    _additive("window", 1, 2, 300, 24, window=(31, 17)),
    _additive("window-self-only", 1, 1, 50, 8, window=(0, 0)),
    _additive("window-more-keys", 1, 2, 129, 16, seqlen_k=400, window=(64, 3)),
    _additive("window-fewer-keys", 1, 2, 400, 16, seqlen_k=129, window=(64, 3)),
    _additive("gqa", 2, 6, 63, 32, heads_k=2, causal=True),
    _additive("mqa-window", 1, 4, 190, 16, heads_k=1, window=(20, 9), one_weight=True),
    _additive("key-lengths", 4, 2, 70, 32, key_lengths=(70, 1, 0, 33)),
    _additive("key-lengths-window", 3, 2, 150, 16, window=(40, 20), key_lengths=(150, 77, 64)),
    _additive("one-query", 2, 4, 1, 64, seqlen_k=333, heads_k=2),
    _additive("one-key", 1, 2, 100, 16, seqlen_k=1),
    _additive("value-wider", 1, 2, 80, 16, head_dim_v=72),
    _additive("value-narrower", 1, 2, 80, 72, head_dim_v=3),
    _additive("window-causal", 2, 2, 37, 8, window=9, causal=True),
    _additive("gqa-lengths", 2, 4, 21, 6, heads_k=2, seqlen_k=35, key_lengths=(35, 17)),
    _additive("head-dim-300", 1, 1, 40, 300, causal=True),
    _additive("head-dim-300-short", 1, 1, 17, 300, causal=True),
    _additive("transposed", 2, 3, 100, 32, transposed=True, window=(30, 30)),
    _additive("unaligned", 1, 2, 77, 20, offset=1, causal=True),
    _additive("saturated", 1, 2, 90, 32, scale=4.0, window=(50, 50)),
    _additive("huge", 1, 2, 90, 32, scale=40.0, causal=True),
    _additive("no-keys", 1, 2, 9, 8, seqlen_k=0),
    _additive("no-queries", 1, 2, 0, 8, seqlen_k=9),
    _additive("no-batch", 0, 2, 9, 8),
)


def _add_layer_norm(
    tensors: Tensors, backend: str | None, *, wide: tuple[str, ...] = (), **options: Any
) -> tuple[Tensor, ...]:
    """wide: what is float32 where the inputs are bfloat16 or float16."""
    arguments: dict[str, Any] = {
        name: tensor.float() if name in wide and tensor.dtype.itemsize == 2 else tensor
        for name, tensor in tensors.items()
    }
    return add_layer_norm(**arguments, backend=backend, **options)


def _add_layer_norm_case(
    name: str,
    shape: tuple[int, ...],
    weight: bool = True,
    bias: bool = True,
    *,
    scale: float = 1.0,
    offset: int = 0,
    transposed: bool = False,
    **options: Any,
) -> Case:
    shapes = {"x": shape, "residual": shape}
    shapes |= {"weight": shape[-1:]} if weight else {}
    shapes |= {"bias": shape[-1:]} if bias else {}
    return Case("add_layer_norm", name, shapes, _add_layer_norm, scale, transposed, offset, options)


ADD_LAYER_NORM = (
    _add_layer_norm_case("one", (1, 1)),
    _add_layer_norm_case("row", (77,)),
    _add_layer_norm_case("small", (64, 256)),
    _add_layer_norm_case("odd", (3, 5, 67)),
    _add_layer_norm_case("many-rows", (1031, 33)),
    _add_layer_norm_case("long-rows", (5, 4099)),
    _add_layer_norm_case("parallel", (700, 512)),
    _add_layer_norm_case("no-weight", (9, 48), weight=False),
    _add_layer_norm_case("no-bias", (9, 48), bias=False),
    _add_layer_norm_case("plain", (9, 48), weight=False, bias=False),
    _add_layer_norm_case("rms", (33, 100), bias=False, norm="rms"),
    _add_layer_norm_case("rms-bias", (7, 129), norm="rms"),
    _add_layer_norm_case("eps", (9, 48), scale=1e-3, eps=1e-2),
    _add_layer_norm_case("huge", (9, 48), scale=1e4),
    _add_layer_norm_case("unaligned", (11, 50), offset=1),
    _add_layer_norm_case("no-rows", (0, 16)),
    _add_layer_norm_case("dropout", (6, 64), dropout_p=0.3, seed=7),
    _add_layer_norm_case("dropout-odd", (5, 3, 67), offset=1, dropout_p=0.1, seed=-1),
    _add_layer_norm_case("dropout-parallel", (301, 259), dropout_p=0.5, seed=2**40 + 3),
    _add_layer_norm_case("dropout-rms", (7, 1), bias=False, norm="rms", dropout_p=0.2, seed=0),
    _add_layer_norm_case("wide-residual", (9, 50), wide=("residual",)),
    _add_layer_norm_case("wide-parameters", (9, 50), wide=("weight", "bias")),
    _add_layer_norm_case(
        "wide-dropout", (9, 50), wide=("residual", "bias"), weight=False, dropout_p=0.2, seed=5
    ),
)


def _linear_cross_entropy(
    tensors: Tensors, backend: str | None, *, ignored: str = "some", **options: Any
) -> tuple[Tensor]:
    rows, vocab_size = tensors["hidden"].shape[:-1], tensors["weight"].shape[0]
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(vocab_size, rows, generator=generator)
    ignored_rows = (
        torch.rand(rows, generator=generator) < {"none": 0, "some": 0.2, "all": 1}[ignored]
    )
    targets[ignored_rows] = options.get("ignore_index", -100)
    targets = targets.to(tensors["hidden"].device)
    hidden, weight, bias = tensors["hidden"], tensors["weight"], tensors.get("bias")
    return (linear_cross_entropy(hidden, weight, targets, bias=bias, backend=backend, **options),)


def _cross_entropy_case(
    name: str,
    rows: tuple[int, ...],
    in_features: int,
    vocab_size: int,
    *,
    bias: bool = False,
    scale: float = 0.5,
    offset: int = 0,
    **options: Any,
) -> Case:
    shapes: dict[str, tuple[int, ...]] = {
        "hidden": (*rows, in_features),
        "weight": (vocab_size, in_features),
    }
    shapes |= {"bias": (vocab_size,)} if bias else {}
    call = _linear_cross_entropy
    return Case("linear_cross_entropy", name, shapes, call, scale, offset=offset, options=options)


LINEAR_CROSS_ENTROPY = (
    _cross_entropy_case("one", (1,), 1, 1, ignored="none"),
    _cross_entropy_case("small", (2, 40), 64, 100),
    _cross_entropy_case("odd", (67,), 33, 257, bias=True),
    _cross_entropy_case("sum", (3, 29), 48, 131, reduction="sum", ignored="none"),
    _cross_entropy_case("none", (5, 3, 7), 40, 90, reduction="none"),
    _cross_entropy_case(
        "none-smoothed", (50,), 16, 300, reduction="none", bias=True, label_smoothing=0.2
    ),
    _cross_entropy_case("smoothed", (130,), 24, 77, bias=True, label_smoothing=0.1),
    _cross_entropy_case("ignore-a-class", (90,), 32, 11, ignore_index=3),
    _cross_entropy_case("many-rows", (1500,), 20, 65),
    _cross_entropy_case("many-classes", (70,), 24, 9001, scale=0.3),
    _cross_entropy_case("deep", (60,), 700, 150, scale=0.2, bias=True),
    _cross_entropy_case("huge-logits", (60,), 64, 100, scale=10.0),
    _cross_entropy_case("unaligned", (33,), 21, 50, offset=1, bias=True),
    _cross_entropy_case("all-ignored-sum", (9,), 8, 5, reduction="sum", ignored="all"),
    _cross_entropy_case("no-rows", (0,), 8, 5, reduction="sum"),
    _cross_entropy_case("no-rows-none", (0, 4), 8, 5, reduction="none"),
)

_SCHEDULE = diffusion.NoiseSchedule.linear(1000)
_SHAPE = (3, 5, 7, 9)
_TIMESTEPS = (999, 0, 417)


def _timesteps(values: int | tuple[int, ...], device: torch.device) -> int | Tensor:
    return values if isinstance(values, int) else torch.tensor(values, device=device)


def _diffusion(
    tensors: Tensors,
    backend: str | None,
    *,
    function: str,
    t: int | tuple[int, ...],
    **options: Any,
) -> tuple[Tensor]:
    tensors = dict(tensors)
    first = tensors.pop(next(iter(tensors)))
    timesteps = _timesteps(t, first.device)
    if "prev_timesteps" in options:
        options["prev_timesteps"] = _timesteps(options["prev_timesteps"], first.device)
    if function == "add_noise":
        arguments = (first, timesteps, _SCHEDULE)
    else:
        sample = tensors.pop("sample")
        order = (sample, timesteps) if function == "noise_prediction_loss" else (timesteps, sample)
        arguments = (first, *order, _SCHEDULE)
    call = getattr(diffusion, function)
    return (call(*arguments, backend=backend, **tensors, **options),)


def _diffusion_case(
    name: str,
    function: str,
    shape: tuple[int, ...] = _SHAPE,
    t: int | tuple[int, ...] = _TIMESTEPS,
    *,
    extra: tuple[str, ...] = (),
    **options: Any,
) -> Case:
    names = ("sample",) if function == "add_noise" else ("model_output", "sample")
    shapes = dict.fromkeys((*names, *extra), shape)
    call = partial(_diffusion, function=function, t=t)
    return Case("diffusion", f"{function}-{name}", shapes, call, options=options)


_BIG = (2, 3, 100, 101)
DIFFUSION = (
    _diffusion_case("seed", "add_noise", seed=7),
    _diffusion_case("noise", "add_noise", extra=("noise",)),
    _diffusion_case("parallel", "add_noise", _BIG, 500, seed=-1),
    _diffusion_case("vector", "add_noise", (5,), 3, seed=2**63),
    _diffusion_case("empty", "add_noise", (0, 3), 3, seed=1),
    *(
        _diffusion_case(kind, "noise_prediction_loss", seed=7, prediction_type=kind)
        for kind in ("epsilon", "v_prediction", "sample")
    ),
    _diffusion_case("sum", "noise_prediction_loss", _BIG, 500, seed=3, reduction="sum"),
    _diffusion_case(
        "noise", "noise_prediction_loss", extra=("noise",), prediction_type="v_prediction"
    ),
    *(
        _diffusion_case(kind, "ddpm_step", seed=7, prediction_type=kind)
        for kind in ("epsilon", "v_prediction", "sample")
    ),
    _diffusion_case("clip", "ddpm_step", t=(1, 500, 30), seed=7, clip_range=1.0),
    _diffusion_case("large", "ddpm_step", t=40, seed=7, variance="fixed_large"),
    _diffusion_case("noise", "ddpm_step", extra=("noise",)),
    _diffusion_case("parallel", "ddpm_step", _BIG, 500, seed=3),
    _diffusion_case("stride", "ddpm_step", t=(40, 20, 19), prev_timesteps=(20, -1, 0), seed=1),
    *(
        _diffusion_case(kind, "ddim_step", prediction_type=kind, prev_timesteps=(899, -1, 317))
        for kind in ("epsilon", "v_prediction", "sample")
    ),
    _diffusion_case("eta", "ddim_step", t=500, prev_timesteps=400, eta=0.7, seed=7),
    _diffusion_case("clip", "ddim_step", t=300, prev_timesteps=250, clip_range=1.0),
    _diffusion_case(
        "guidance", "ddim_step", t=500, extra=("unconditional_output",), guidance_scale=7.5
    ),
    _diffusion_case(
        "guidance-clip",
        "ddpm_step",
        t=500,
        extra=("unconditional_output",),
        guidance_scale=3.0,
        clip_range=1.5,
        seed=1,
    ),
)

CASES = (
    *ATTENTION,
    *ATTENTION_EXTRAS,
    *ADDITIVE_ATTENTION,
    *ADD_LAYER_NORM,
    *DIFFUSION,
    *LINEAR_CROSS_ENTROPY,
)
