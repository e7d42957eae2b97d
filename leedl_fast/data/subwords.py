"""Pieces of words as tokens: byte-pair encoding, on characters."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

UNKNOWN = "\ufffd"  # what an unknown character is decoded to

# Merges stay inside these: a run of Latin letters or of Chinese characters, a digit, another
# character, the first and the last two with a space before them.
_WORDS = re.compile(r" ?[^\W\d_\u3400-\u9fff]+|[\u3400-\u9fff]+| ?\d| ?[^\w\s]| ?_|\s|.", re.DOTALL)


class SubwordVocabulary:
    """Tokens 0 to num_special - 1 are the caller's own, the next one is any unknown character, then
    come single characters and what `merges` make of two tokens.

    characters: all different. merges: pairs of pieces, the most frequent one first; each piece is a
    character or the result of an earlier merge.
    """

    def __init__(
        self, characters: str, merges: Sequence[tuple[str, str]], *, num_special: int
    ) -> None:
        if len(set(characters)) != len(characters):
            raise ValueError(f"characters must be distinct, got {characters!r}")
        self.characters = characters
        self.merges = [(left, right) for left, right in merges]
        self.num_special = num_special
        self.unknown = num_special
        self._pieces = [UNKNOWN, *characters]
        self._pieces += dict.fromkeys(left + right for left, right in self.merges)
        self._tokens = {piece: num_special + place for place, piece in enumerate(self._pieces)}
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}
        self._encoded: dict[str, list[int]] = {}

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], *, size: int, num_special: int, min_count: int = 2
    ) -> SubwordVocabulary:
        """At most `size` tokens: the characters seen min_count times, then the most frequent pairs
        of neighbours, merged one after another (Sennrich et al., "Neural Machine Translation of
        Rare Words with Subword Units", algorithm 1).
        """
        words = Counter(word for text in texts for word in _WORDS.findall(text))
        letters: Counter[str] = Counter()
        for word, count in words.items():
            for letter in word:
                letters[letter] += count
        characters = "".join(sorted(c for c, count in letters.items() if count >= min_count))
        num_merges = size - num_special - 1 - len(characters)
        if num_merges < 0:
            raise ValueError(
                f"size must be at least {size - num_merges}, for {len(characters)} characters, "
                f"got {size}"
            )
        return cls(characters, _merges(words, num_merges), num_special=num_special)

    def __len__(self) -> int:
        return self.num_special + len(self._pieces)

    def encode(self, text: str) -> list[int]:
        return [token for word in _WORDS.findall(text) for token in self._encode_word(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; special tokens are nothing in it."""
        first = self.num_special
        return "".join(self._pieces[token - first] for token in tokens if token >= first)

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._encoded:
            pieces = list(word)
            while len(pieces) > 1:
                pairs = list(itertools.pairwise(pieces))
                pair = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
                if pair not in self._ranks:
                    break
                pieces = _merged(pieces, pair)
            self._encoded[word] = [self._tokens.get(piece, self.unknown) for piece in pieces]
        return self._encoded[word]


def _merged(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """`pieces` with every occurrence of `pair` made one, from the left."""
    merged: list[str] = []
    place = 0
    while place < len(pieces):
        if tuple(pieces[place : place + 2]) == pair:
            merged.append(pair[0] + pair[1])
            place += 2
        else:
            merged.append(pieces[place])
            place += 1
    return merged


def _merges(words: Counter[str], num_merges: int) -> list[tuple[str, str]]:
    """The merges; of pairs that are as frequent the first one in the order of text."""
    pieces = {word: list(word) for word in words}
    counts: Counter[tuple[str, str]] = Counter()
    homes: dict[tuple[str, str], set[str]] = defaultdict(set)  # the words that have, or had, a pair

    def count(word: str, factor: int) -> set[tuple[str, str]]:
        pairs = list(itertools.pairwise(pieces[word]))
        for pair in pairs:
            counts[pair] += factor * words[word]
            homes[pair].add(word)
        return set(pairs)

    for word in words:
        count(word, 1)
    # Counts only ever change together with a new entry: one that is not the count is out of date.
    heap = [(-number, pair) for pair, number in counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges and heap:
        number, best = heapq.heappop(heap)
        if -number != counts[best]:
            continue
        if -number < 2:
            break
        merges.append(best)
        changed = set()
        for word in sorted(homes.pop(best)):
            changed |= count(word, -1)
            pieces[word] = _merged(pieces[word], best)
            changed |= count(word, 1)
        for pair in changed - {best}:
            heapq.heappush(heap, (-counts[pair], pair))
    return merges
