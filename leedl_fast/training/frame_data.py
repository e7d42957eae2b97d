"""What the models of frames share: statistics, passages of long recordings, padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

EVALUATION_BATCH_SIZE = 32


def frame_statistics(frames: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean and deviation of each feature, (num_features,), over all frames."""
    rows = torch.cat(list(frames))
    return {
        "mean": rows.mean(dim=0),
        "deviation": rows.std(dim=0, correction=0).clamp(min=1e-5),  # a feature may be constant
    }


def passage_begins(num_frames: int, length: int, step: int) -> list[int]:
    """Where passages of `length` frames begin, a `step` apart; the last one ends with the frames.
    One passage from 0 where there are not more than `length`.
    """
    last = max(0, num_frames - length)
    return [*range(0, last, step), last]


def padded(frames: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(batch, longest, num_features), and lengths int64 (batch,)."""
    lengths = torch.tensor([len(rows) for rows in frames])
    return pad_sequence(list(frames), batch_first=True), lengths
