import pytest

from leedl_fast.data.pieces import PieceVocabulary, text_pieces, word_pieces
from leedl_fast.data.split import LengthBatches


def test_the_pieces_of_words():
    assert word_pieces("一九九八年") == ["一九九八年", "0\t一", "1\t九", "-1\t年", "-2\t八"]
    assert word_pieces("新年") == ["新年", "0\t新", "1\t年", "-1\t年", "-2\t新"]
    assert word_pieces("的") == ["的", "0\t的", "-1\t的"]


def test_the_pieces_of_texts():
    assert text_pieces("很不好") == [["很", "很不"], ["不", "不好"], ["好"]]
    assert text_pieces("") == []


def test_unknown_pieces_are_nothing():
    tokens = [["b", "a"], ["a"], ["c", "a"]]
    assert PieceVocabulary.from_tokens(tokens).pieces == ["a", "b", "c"]
    vocabulary = PieceVocabulary.from_tokens(iter([*tokens, ["c"]]), min_count=2)
    assert vocabulary.pieces == ["a", "c"]
    assert len(vocabulary) == 3
    rows = vocabulary.encode([["b", "a", "c"], ["c"]], 3)
    assert rows.tolist() == [[0, 1, 2], [2, 0, 0]]
    assert vocabulary.encode([], 3).shape == (0, 3)
    with pytest.raises(ValueError, match="pieces must be distinct, got 1 twice"):
        PieceVocabulary(["a", "b", "a"])


def test_batches_of_one_length_go_through_all_examples():
    lengths = [(7 * i) % 160 for i in range(160)]
    batches = LengthBatches(lengths, 5, seed=3)
    chosen = [batches[index] for index in range(96)]
    for epoch in (chosen[:32], chosen[32:64], chosen[64:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(160))
    for batch in chosen:
        assert max(lengths[i] for i in batch) - min(lengths[i] for i in batch) == 4
    assert chosen[:32] != sorted(chosen[:32], key=lambda batch: lengths[batch[0]])
    assert LengthBatches(lengths, 5, seed=3)[70] == chosen[70]
    assert LengthBatches(lengths, 5, seed=4)[70] != chosen[70]
