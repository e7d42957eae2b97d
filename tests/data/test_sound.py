"""WAV files, log-mel frames, and the loaders of what people say."""

import math
import wave

import numpy as np
import pytest
import torch

from leedl_fast.data.audio import log_mel, read_wav
from leedl_fast.data.speech import load_recordings, load_spoken
from leedl_fast.data.vowels import read_ts


def write_wav(path, samples, rate=16_000, width=2):
    """samples in [-1, 1), (num_samples,) or (num_samples, channels)."""
    samples = np.asarray(samples, np.float64)
    values = np.round(samples * 2 ** (8 * width - 1)).astype(np.int64)
    values += 128 if width == 1 else 0
    content = values.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path


def tone(frequency, seconds=0.5, rate=16_000):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width(tmp_path, width):
    exact = np.array([0.0, 0.5, -0.5, -1.0, 0.25, 127 / 128])
    samples, rate = read_wav(write_wav(tmp_path / "a.wav", exact, rate=8_000, width=width))
    assert rate == 8_000
    assert samples.dtype == torch.float32
    assert samples.tolist() == exact.tolist()


def test_channels_are_averaged(tmp_path):
    stereo = np.array([[0.5, 0.25], [-1.0, 0.5], [0.0, 0.0]])
    samples, _ = read_wav(write_wav(tmp_path / "a.wav", stereo))
    assert samples.tolist() == [0.375, -0.25, 0.0]


def test_broken_files(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(440))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1001])
    with pytest.raises(ValueError, match=r"whole WAV files, got .*a.wav.* with 14999 of 16000"):
        read_wav(path)
    for content in (b"", b"RIFF", b"no sound at all", whole[:20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"data must be WAV files of PCM, got .*a\.wav"):
            read_wav(path)
    floats = bytearray(whole)
    floats[20] = 3  # the format of floating point
    path.write_bytes(floats)
    with pytest.raises(ValueError, match=r"WAV files of PCM, got .*a.wav.*unknown format: 3"):
        read_wav(path)
    with pytest.raises(ValueError, match=r"must not be empty, got .* of 0 samples"):
        read_wav(write_wav(path, []))
    with pytest.raises(ValueError, match="which is no file"):
        read_wav(tmp_path / "none.wav")


def plain_log_mel(samples, rate, num_mels):
    """The definition, one frame and one band at a time, in float64."""
    size = round(0.025 * rate)
    points = 2 ** math.ceil(math.log2(size))
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = [700 * (10 ** (top * i / (num_mels + 1) / 2595) - 1) for i in range(num_mels + 2)]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    frequencies = np.arange(points // 2 + 1) * rate / points
    rows = []
    while (begin := math.floor(len(rows) * rate / 100 + 0.5)) + size <= len(samples):
        power = np.abs(np.fft.rfft(samples[begin : begin + size] * hann, points)) ** 2
        row = []
        for left, middle, right in zip(corners, corners[1:], corners[2:], strict=False):
            rising = (frequencies - left) / (middle - left)
            falling = (right - frequencies) / (right - middle)
            band = np.clip(np.minimum(rising, falling), 0, None) @ power
            row.append(math.log(max(band, 1e-10)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("extra", [0, 1, 12_345])
def test_log_mel_frames_are_the_formula(rate, extra):
    generator = np.random.default_rng(0)
    samples = 0.1 * generator.standard_normal(round(rate * 0.025) + extra)
    expected = torch.from_numpy(plain_log_mel(samples, rate, 20))
    got = log_mel(torch.from_numpy(samples).float(), rate, 20)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-4)


def test_frames_are_25_ms_every_10_ms():
    assert log_mel(torch.zeros(16_000), 16_000).shape == (98, 40)
    assert log_mel(torch.zeros(400), 16_000).shape == (1, 40)
    with pytest.raises(ValueError, match=r"at least 0.025 s = 400 samples, got 399"):
        log_mel(torch.zeros(399), 16_000)


@pytest.mark.parametrize("frequency", [300, 1000, 4000])
def test_a_tone_peaks_in_its_band(frequency):
    frames = log_mel(torch.from_numpy(tone(frequency)).float(), 16_000)
    top, mel = (2595 * math.log10(1 + f / 700) for f in (8_000, frequency))
    nearest = round(mel / top * 41) - 1  # band i has its middle at (i + 1) / 41 of the scale
    assert ((frames.argmax(dim=1) - nearest).abs() <= 1).all()


def test_recordings_and_their_labels(tmp_path):
    write_wav(tmp_path / "a.wav", tone(440, seconds=1.0))
    (tmp_path / "a.rttm").write_text(
        "SPKR-INFO a 1 <NA>\n"
        "SPEAKER a 1 0.20 0.30 <NA> <NA> ada <NA> <NA>\n"
        "SPEAKER a 1 0.40 9.00 <NA> <NA> ben <NA> <NA>\n"
    )
    (tmp_path / "notes.txt").write_text("not sound")
    data = load_recordings(tmp_path)
    assert data.rate == 16_000
    assert data.label_names == ["ada", "ada+ben", "ben", "nobody"]
    middles = torch.arange(98) * 0.010 + 0.0125
    ada = (middles > 0.195) & (middles < 0.495)
    ben = middles > 0.395
    expected = [
        {(True, True): 1, (True, False): 0, (False, True): 2, (False, False): 3}[pair]
        for pair in zip(ada.tolist(), ben.tolist(), strict=True)
    ]
    assert data.labels[0].tolist() == expected
    assert len(data.frames[0]) == 98


def test_bad_recordings(tmp_path):
    with pytest.raises(ValueError, match="data must be a folder with WAV files, got none"):
        load_recordings(tmp_path)
    with pytest.raises(ValueError, match=r"data must be a folder, got .* which is none"):
        load_recordings(tmp_path / "none")
    write_wav(tmp_path / "a.wav", tone(440))
    with pytest.raises(ValueError, match=r"an RTTM file beside each, got .*a\.rttm"):
        load_recordings(tmp_path)
    rttm = tmp_path / "a.rttm"
    rttm.write_text("SPEAKER a 1 soon 0.1 <NA> <NA> ada\n")
    with pytest.raises(ValueError, match=r"must be RTTM lines .* got 'SPEAKER a 1 soon"):
        load_recordings(tmp_path)
    rttm.write_text("SPEAKER a 1 0.0 9.0 <NA> <NA> ada\n")
    with pytest.raises(ValueError, match=r"at least 2 different labels, got \['ada'\]"):
        load_recordings(tmp_path)
    write_wav(tmp_path / "b.wav", tone(440, rate=8_000), rate=8_000)
    (tmp_path / "b.rttm").write_text("SPEAKER b 1 0.0 0.1 <NA> <NA> ben\n")
    with pytest.raises(ValueError, match=r"16000 samples per second, got 8000 in .*b\.wav"):
        load_recordings(tmp_path)
    write_wav(tmp_path / "b.wav", tone(440, seconds=0.02))
    with pytest.raises(ValueError, match=r"400 samples, got 320 in .*b\.wav"):
        load_recordings(tmp_path)


def test_spoken_words_in_folders(tmp_path):
    for name, count in (("ada", 4), ("ben", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            write_wav(tmp_path / name / f"{number}.WAV", tone(300 + 50 * number))
    data = load_spoken(tmp_path)
    assert data.label_names == ["ada", "ben"]
    assert data.labels.tolist() == [0, 0, 0, 1, 0, 1]
    assert data.num_train == 4
    assert data.rate == 16_000
    (tmp_path / "ben" / "1.WAV").unlink()
    with pytest.raises(ValueError, match="at least 2 WAV files in every subfolder, got 1 in 'ben'"):
        load_spoken(tmp_path)
    (tmp_path / "ben" / "0.WAV").unlink()
    with pytest.raises(ValueError, match=r"at least 2 subfolders of WAV files, got \['ada'\]"):
        load_spoken(tmp_path)


def test_time_series_files(tmp_path):
    path = tmp_path / "a.ts"
    path.write_text("# about\n@dimensions 2\n@data\n1.5,2,3:4,5,6:one\n-1:2e-1:two\n")
    frames, labels = read_ts(path)
    assert labels == ["one", "two"]
    assert frames[0].tolist() == [[1.5, 4.0], [2.0, 5.0], [3.0, 6.0]]
    torch.testing.assert_close(frames[1], torch.tensor([[-1.0, 0.2]]))
    path.write_text("1,2:one\n")
    with pytest.raises(ValueError, match="data must have a line @data, got none"):
        read_ts(path)
