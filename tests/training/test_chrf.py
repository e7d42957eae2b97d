import pytest

from leedl_fast.training.chrf import chrf


def test_the_same_is_100_and_nothing_in_common_0():
    assert chrf(["a cat", "猫"], ["a cat", "猫"]) == pytest.approx(100)
    assert chrf(["abc"], ["xyz"]) == 0
    assert chrf([""], ["xyz"]) == 0


def test_it_is_the_formula():
    """Spaces do not count: "abcd" and "abd". Of 1-grams 3 of 4 and 3 of 3 are common, of 2-grams 1
    of 3 and 1 of 2, of 3-grams none of 2 and 1; there are no 4-grams of the reference.
    """
    precision, recall = (3 / 4 + 1 / 3 + 0) / 3, (3 / 3 + 1 / 2 + 0) / 3
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert chrf(["ab cd"], ["abd"]) == pytest.approx(expected)


def test_counts_are_of_the_whole_corpus():
    """One-character texts: 1 of 2 translations is right, whichever."""
    assert chrf(["a", "b"], ["a", "c"]) == pytest.approx(50)


def test_bad_input():
    with pytest.raises(ValueError, match="as many as references, that is 2, got 1"):
        chrf(["a"], ["a", "b"])
