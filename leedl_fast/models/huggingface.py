"""Models of Hugging Face's transformers, copied; the package itself is not needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leedl_fast.models.bert import BERT, BERTConfig, MaskedLanguageModel
from leedl_fast.models.gpt import GPT, GPTConfig

State = Mapping[str, Tensor]

# Their names of activations, by ours; "gelu_fast" differs from "gelu_new" by rounding alone.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def from_huggingface(model: nn.Module) -> GPT | BERT | MaskedLanguageModel:
    """A copy of a GPT2LMHeadModel, BertModel or BertForMaskedLM, with its own parameters.

    It computes the same, in `model`'s dtype, on its device and in its mode; nothing is loaded from
    anywhere. A BertForMaskedLM has no pooler: the copy's is a new one.

    Raises:
        TypeError: the model is of another class.
        ValueError: its config has an option that the copy's class has not.
    """
    name = type(model).__name__
    if name not in _COPIES:
        raise TypeError(f"model must be one of {', '.join(sorted(_COPIES))}, got {name}")
    copy, state = _COPIES[name](model.config, model.state_dict())
    parameter = next(model.parameters())
    copy.to(device=parameter.device, dtype=parameter.dtype)
    # The pooler is all that may be missing.
    poolers = {key: value for key, value in copy.state_dict().items() if "pooler" in key}
    copy.load_state_dict(poolers | dict(state))
    copy.train(model.training)
    return copy


def _require(config: Any, **options: Any) -> None:
    for name, wanted in options.items():
        value = getattr(config, name, wanted)
        if value != wanted:
            raise ValueError(f"{name} must be {wanted!r}, got {value!r}")


def _activation(name: Any) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _gpt(config: Any, state: State) -> tuple[Any, State]:
    _require(
        config,
        add_cross_attention=False,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )
    copy = GPT(
        GPTConfig(
            vocab_size=config.vocab_size,
            context_length=config.n_positions,
            num_layers=config.n_layer,
            num_heads=config.n_head,
            embed_dim=config.n_embd,
            hidden_dim=config.n_inner,
            activation=_activation(config.activation_function),
            eps=config.layer_norm_epsilon,
            dropout=config.resid_pdrop,
            attention_dropout=config.attn_pdrop,
        )
    )
    copy.dropout.p = config.embd_pdrop
    new = {
        "token_embedding.weight": state["transformer.wte.weight"],
        "head.weight": state["transformer.wte.weight"],
        "position_embedding.weight": state["transformer.wpe.weight"],
    }
    _copy_affine(new, "transformer.norm", state, "transformer.ln_f")
    for i in range(config.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"transformer.h.{i}"
        _copy_affine(new, f"{ours}.norm1", state, f"{theirs}.ln_1")
        _copy_affine(new, f"{ours}.norm2", state, f"{theirs}.ln_2")
        # Their linear layers are "Conv1D": the weight is (in_features, out_features).
        new[f"{ours}.self_attn.in_proj_weight"] = state[f"{theirs}.attn.c_attn.weight"].mT
        new[f"{ours}.self_attn.in_proj_bias"] = state[f"{theirs}.attn.c_attn.bias"]
        for linear, conv in (
            ("self_attn.out_proj", "attn.c_proj"),
            ("linear1", "mlp.c_fc"),
            ("linear2", "mlp.c_proj"),
        ):
            new[f"{ours}.{linear}.weight"] = state[f"{theirs}.{conv}.weight"].mT
            new[f"{ours}.{linear}.bias"] = state[f"{theirs}.{conv}.bias"]
    return copy, new


def _bert(config: Any, state: State) -> tuple[Any, State]:
    new: dict[str, Tensor] = {}
    _copy_bert(new, "", config, state, "")
    return BERT(_bert_config(config)), new


def _masked_language_model(config: Any, state: State) -> tuple[Any, State]:
    _require(config, tie_word_embeddings=True)
    new: dict[str, Tensor] = {}
    _copy_bert(new, "bert.", config, state, "bert.")
    theirs = "cls.predictions"
    _copy_affine(new, "masked_head.transform", state, f"{theirs}.transform.dense")
    _copy_affine(new, "masked_head.norm", state, f"{theirs}.transform.LayerNorm")
    new["masked_head.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    new["masked_head.decoder.bias"] = state[f"{theirs}.bias"]
    return MaskedLanguageModel(_bert_config(config)), new


def _bert_config(config: Any) -> BERTConfig:
    _require(
        config, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute"
    )
    return BERTConfig(
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        num_segments=config.type_vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        activation=_activation(config.hidden_act),
        eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
    )


def _copy_bert(new: dict[str, Tensor], ours: str, config: Any, state: State, theirs: str) -> None:
    for embedding, name in (("token", "word"), ("position", "position"), ("segment", "token_type")):
        weight = state[f"{theirs}embeddings.{name}_embeddings.weight"]
        new[f"{ours}embeddings.{embedding}_embedding.weight"] = weight
    _copy_affine(new, f"{ours}embeddings.norm", state, f"{theirs}embeddings.LayerNorm")
    if f"{theirs}pooler.dense.weight" in state:
        _copy_affine(new, f"{ours}pooler", state, f"{theirs}pooler.dense")
    for i in range(config.num_hidden_layers):
        layer, source = f"{ours}encoder.layers.{i}", f"{theirs}encoder.layer.{i}"
        for kind in ("weight", "bias"):
            new[f"{layer}.self_attn.in_proj_{kind}"] = torch.cat(
                [state[f"{source}.attention.self.{part}.{kind}"] for part in _PARTS]
            )
        _copy_affine(new, f"{layer}.self_attn.out_proj", state, f"{source}.attention.output.dense")
        _copy_affine(new, f"{layer}.norm1", state, f"{source}.attention.output.LayerNorm")
        _copy_affine(new, f"{layer}.linear1", state, f"{source}.intermediate.dense")
        _copy_affine(new, f"{layer}.linear2", state, f"{source}.output.dense")
        _copy_affine(new, f"{layer}.norm2", state, f"{source}.output.LayerNorm")


_PARTS = ("query", "key", "value")


def _copy_affine(new: dict[str, Tensor], ours: str, state: State, theirs: str) -> None:
    for kind in ("weight", "bias"):
        new[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]


_COPIES = {
    "GPT2LMHeadModel": _gpt,
    "BertModel": _bert,
    "BertForMaskedLM": _masked_language_model,
}
