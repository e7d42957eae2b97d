import pytest

from leedl_fast.data.subwords import SubwordVocabulary

TEXTS = ["the cat sat", "the mat, the hat", "猫坐在垫子上", "猫和帽子 42", "{host}:{port}"] * 2


def vocabulary(size=60):
    return SubwordVocabulary.from_texts(TEXTS, size=size, num_special=3)


@pytest.mark.parametrize("size", [40, 60, 500])
def test_texts_come_back(size):
    subwords = vocabulary(size)
    for text in TEXTS:
        assert subwords.decode(subwords.encode(text)) == text
        assert all(3 < token < len(subwords) <= size for token in subwords.encode(text))


def test_the_most_frequent_pairs_are_merged_first():
    """In " the" and "the": 6 times "th", then with "e" and so on; ties by the order of text."""
    subwords = SubwordVocabulary.from_texts(["ab ab ab abc", "bc"], size=8, num_special=1)
    assert subwords.characters == " abc"
    assert subwords.merges == [("a", "b"), (" ", "ab")]
    assert subwords.encode("ab ab") == [6, 7]


def test_merges_stay_inside_words():
    pieces = [left + right for left, right in vocabulary(500).merges]
    assert " the" in pieces
    assert not [piece for piece in pieces if " " in piece[1:] or "," in piece]
    assert not [piece for piece in pieces if "子" in piece and piece.isascii()]


def test_more_tokens_make_shorter_texts():
    fewest = 4 + len(vocabulary().characters)
    text = "the cat and the hat"
    lengths = [len(vocabulary(fewest + merges).encode(text)) for merges in (0, 3, 500)]
    assert len(text) == lengths[0] > lengths[1] > lengths[2]


def test_an_unknown_character_is_one_token():
    subwords = vocabulary()
    assert subwords.encode("é") == [3]
    assert subwords.decode([0, 1, *subwords.encode("the é"), 2]) == "the \ufffd"


def test_it_is_made_anew_from_its_parts():
    one = vocabulary()
    other = SubwordVocabulary(one.characters, one.merges, num_special=3)
    text = "the hat 猫"
    assert other.encode(text) == one.encode(text)
    assert len(other) == len(one)


def test_bad_input():
    with pytest.raises(ValueError, match=r"size must be at least \d+, for \d+ characters, got 9"):
        vocabulary(9)
    with pytest.raises(ValueError, match="characters must be distinct, got 'aa'"):
        SubwordVocabulary("aa", [], num_special=0)
