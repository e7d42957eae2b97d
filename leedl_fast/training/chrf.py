"""chrF: how near translations are to references, in n-grams of characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 6
BETA = 2.0  # recall counts so much more than precision


def chrf(translations: Sequence[str], references: Sequence[str]) -> float:
    """From 0 to 100, over the whole corpus: the F-score of the mean precision and recall of the
    n-grams of 1 to 6 characters, spaces left out.

    Paper: Popović, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    if len(translations) != len(references):
        raise ValueError(
            f"translations must be as many as references, that is {len(references)}, "
            f"got {len(translations)}"
        )
    precisions, recalls = [], []
    for order in range(1, MAX_ORDER + 1):
        common = said = wanted = 0
        for translation, reference in zip(translations, references, strict=True):
            ours, theirs = _ngrams(translation, order), _ngrams(reference, order)
            common += (ours & theirs).total()
            said += ours.total()
            wanted += theirs.total()
        if said and wanted:
            precisions.append(common / said)
            recalls.append(common / wanted)
    if not precisions:
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _ngrams(text: str, order: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + order] for i in range(len(letters) - order + 1))
