"""Tokens of several pieces: a word and its characters, a character and the pair it begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NOTHING = 0  # the piece that fills up a token's row, and every piece that is not known


def word_pieces(word: str) -> list[str]:
    """The word, then its first two characters and its last two, each with its place.

    A word that training never saw is known by these, as in Bojanowski et al., "Enriching Word
    Vectors with Subword Information". Words hold no tabs, so that the pieces cannot be words.
    """
    begin = [f"{place}\t{character}" for place, character in enumerate(word[:2])]
    end = [f"-{place}\t{character}" for place, character in enumerate(word[:-3:-1], start=1)]
    return [word, *begin, *end]


def text_pieces(text: str) -> list[list[str]]:
    """For each character: itself, and the pair that it makes with the next one."""
    return [
        [text[i], text[i : i + 2]] if i + 1 < len(text) else [text[i]] for i in range(len(text))
    ]


class PieceVocabulary:
    """Piece i of `pieces` is number i + 1; NOTHING is none of them."""

    def __init__(self, pieces: Sequence[str]) -> None:
        if len(set(pieces)) != len(pieces):
            raise ValueError(f"pieces must be distinct, got {len(pieces) - len(set(pieces))} twice")
        self.pieces = list(pieces)
        self._numbers = {piece: number for number, piece in enumerate(pieces, start=1)}

    @classmethod
    def from_tokens(cls, tokens: Iterable[Sequence[str]], *, min_count: int = 1) -> PieceVocabulary:
        """The pieces that are seen at least min_count times, sorted."""
        counts = Counter(piece for pieces in tokens for piece in pieces)
        return cls(sorted(piece for piece, count in counts.items() if count >= min_count))

    def __len__(self) -> int:
        """How many numbers there are, NOTHING included."""
        return 1 + len(self.pieces)

    def encode(self, tokens: Sequence[Sequence[str]], num_pieces: int) -> Tensor:
        """The pieces of each token, filled up with NOTHING: int64 (len(tokens), num_pieces)."""
        rows = []
        for pieces in tokens:
            numbers = [self._numbers.get(piece, NOTHING) for piece in pieces]
            rows.append(numbers + [NOTHING] * (num_pieces - len(numbers)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, num_pieces)
