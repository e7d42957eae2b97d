"""Text from a trained GPT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from leedl_fast.data.text import CharacterVocabulary
from leedl_fast.models.checkpoint import KEY, read_checkpoint
from leedl_fast.models.gpt import GPT
from leedl_fast.models.train_config import TrainConfig, gpt_config


def load_gpt(path: str | Path) -> tuple[GPT, CharacterVocabulary]:
    """The model of a checkpoint, ready to sample from, and the vocabulary of its tokens."""
    checkpoint = read_checkpoint(path, "gpt")
    about = checkpoint[KEY]
    vocabulary = CharacterVocabulary(about["vocabulary"])
    model = GPT(gpt_config(TrainConfig(**about["config"]), len(vocabulary)))
    prefix = "model."  # where the training task keeps it
    state = {name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items()}
    model.load_state_dict(state)
    return model.eval(), vocabulary


def stream_text(
    model: GPT,
    vocabulary: CharacterVocabulary,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The characters that follow `prompt`, one by one; options as in GPT.generate."""
    if not prompt:
        raise ValueError("prompt must have at least 1 character, got ''")
    if num_tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {num_tokens}")
    tokens = model.generate(
        vocabulary.encode(prompt)[None],
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
    )
    for token in tokens:
        yield vocabulary.decode(token.tolist())
