"""Sound: WAV files, and the frames of 25 ms every 10 ms that speech models read."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WINDOW_SECONDS = 0.025
STEP_SECONDS = 0.010


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """Samples in [-1, 1], float32 (num_samples,), channels averaged, and samples per second.

    Reads what the standard library does: PCM of 8, 16, 24 or 32 bits.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data must be a WAV file, got {str(path)!r}, which is no file")
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            num_samples = file.getnframes()
            content = file.readframes(num_samples)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"data must be WAV files of PCM, got {str(path)!r}: {error}") from None
    if not num_samples:
        raise ValueError(f"data must not be empty, got {str(path)!r} of 0 samples")
    if len(content) != num_samples * width * channels:
        raise ValueError(
            f"data must be whole WAV files, got {str(path)!r} with {len(content)} of "
            f"{num_samples * width * channels} bytes of sound"
        )
    if width == 1:  # the only unsigned one
        samples = np.frombuffer(content, np.uint8).astype(np.float32) / 128 - 1
    else:
        # Each sample in the upper bytes of 32 bits, little-endian.
        wide = np.zeros((len(content) // width, 4), np.uint8)
        wide[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return torch.from_numpy(samples.reshape(-1, channels).mean(axis=1)), rate


def mel_filters(num_mels: int, num_bins: int, rate: int) -> Tensor:
    """(num_bins, num_mels) float32 triangles, equally wide on the mel scale from 0 to rate / 2.

    mel = 2595 log10(1 + f / 700); O'Shaughnessy, "Speech Communication".
    """
    highest = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, highest, num_mels + 2) / 2595) - 1)  # Hz
    bins = torch.linspace(0, rate / 2, num_bins)[:, None]
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(samples: Tensor, rate: int, num_mels: int = 40) -> Tensor:
    """Frames of 25 ms every 10 ms: (num_samples,) float32 -> (num_frames, num_mels) float32.

    The natural log of the power in num_mels bands, of frames that lie wholly inside the samples.
    """
    size = round(rate * WINDOW_SECONDS)
    if len(samples) < size:
        raise ValueError(
            f"sound must last at least {WINDOW_SECONDS} s = {size} samples, got {len(samples)}"
        )
    # Frame i begins at the sample nearest to i * 10 ms at any rate: the times of labels hold.
    num_frames = ((len(samples) - size) * 100 + 49) // rate + 1
    begins = (torch.arange(num_frames) * rate + 50) // 100
    frames = samples.unfold(0, size, 1)[begins] * torch.hann_window(size)  # (num_frames, size)
    points = 2 ** math.ceil(math.log2(size))
    power = torch.fft.rfft(frames, n=points).abs().square()
    return (power @ mel_filters(num_mels, power.shape[1], rate)).clamp(min=1e-10).log()
