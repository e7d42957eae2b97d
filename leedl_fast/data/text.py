"""Characters of a text as tokens: the text, its vocabulary, and crops whose place is a formula."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def load_text(path: str | Path | None = None) -> str:
    """The text of the file at `path` (UTF-8), or of the documentation that every CPython carries.

    The latter is `pydoc_data.topics`, what `help("...")` shows: about 465,000 characters of English
    and Python that differ a little from one Python version to the next.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    return read_text(path)


def read_text(path: str | Path, what: str = "a text file") -> str:
    """The text of a file of the user's; errors say that data must be `what`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data must be {what}, got {str(path)!r}, which is no file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some programs begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"data must be UTF-8 text, got {str(path)!r}: {error}") from None
    if not text.strip():
        blank = ", all of them blank" if text else ""
        raise ValueError(
            f"data must not be empty, got {str(path)!r} of {len(text)} characters{blank}"
        )
    return text


def digest(*parts: str | Tensor) -> str:
    """sha256 of texts and tensors: what says later whether data are the same."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part.contiguous().numpy().tobytes()
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


class CharacterVocabulary:
    """One token per distinct character; a token is the character's index in `characters`."""

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError(f"characters must be distinct and at least one, got {characters!r}")
        self.characters = characters
        self._tokens = {character: token for token, character in enumerate(characters)}

    @classmethod
    def from_text(cls, text: str) -> CharacterVocabulary:
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """The tokens of `text`, int64 (len(text),)."""
        unknown = sorted(set(text) - self._tokens.keys())
        if unknown:
            raise ValueError(f"text must be made of the vocabulary's characters, got {unknown}")
        return torch.tensor([self._tokens[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.characters[token] for token in tokens)


@dataclass(frozen=True)
class TokenSplit:
    """The first part of a text to train on, the rest to validate on, as tokens."""

    train: Tensor
    validation: Tensor


def split_tokens(tokens: Tensor, context_length: int, validation_share: float = 0.1) -> TokenSplit:
    """Both parts hold at least context_length + 1 tokens, a crop's inputs and their successors."""
    num_validation = max(int(len(tokens) * validation_share), context_length + 1)
    num_train = len(tokens) - num_validation
    if num_train < context_length + 1:
        raise ValueError(
            f"data must have at least 2 * (context_length + 1) = {2 * (context_length + 1)} "
            f"characters, got {len(tokens)}; a smaller context_length needs fewer"
        )
    return TokenSplit(tokens[:num_train], tokens[num_train:])


def random_crops(
    tokens: Tensor, *, context_length: int, batch_size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (batch_size, context_length): targets are the inputs' next tokens.

    The places are a function of (seed, step) alone: training that resumes at a step needs to
    remember nothing to see the same crops again.
    """
    generator = random.Random(f"{seed}/{step}")
    starts = [generator.randrange(len(tokens) - context_length) for _ in range(batch_size)]
    crops = torch.stack([tokens[start : start + context_length + 1] for start in starts])
    return crops[:, :-1].contiguous(), crops[:, 1:].contiguous()
