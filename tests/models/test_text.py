import pytest
import torch

from leedl_fast.data.text import CharacterVocabulary, load_text, random_crops, split_tokens


def test_the_python_documentation_is_there():
    text = load_text()
    assert len(text) > 100_000
    assert "statement" in text
    assert load_text() == text


def test_a_file_is_read_as_utf8(tmp_path):
    (tmp_path / "a.txt").write_text("深度学习\n", encoding="utf-8")
    assert load_text(tmp_path / "a.txt") == "深度学习\n"


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"data must be a text file, got .*missing\.txt"):
        load_text(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="data must be a text file"):
        load_text(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="data must not be empty"):
        load_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="data must be UTF-8 text"):
        load_text(tmp_path / "latin.txt")


def test_vocabulary():
    vocabulary = CharacterVocabulary.from_text("hello")
    assert vocabulary.characters == "ehlo"
    assert vocabulary.encode("hole").tolist() == [1, 3, 2, 0]
    assert vocabulary.decode([1, 3, 2, 0]) == "hole"
    with pytest.raises(
        ValueError, match=r"must be made of the vocabulary's characters.*\['x', 'y'\]"
    ):
        vocabulary.encode("xylo")
    with pytest.raises(ValueError, match="characters must be distinct"):
        CharacterVocabulary("aba")


def test_split_keeps_the_order_and_every_token():
    tokens = torch.arange(1000)
    split = split_tokens(tokens, context_length=16)
    assert torch.equal(torch.cat((split.train, split.validation)), tokens)
    assert len(split.validation) == 100


def test_the_shortest_text_that_splits():
    split = split_tokens(torch.arange(34), context_length=16)
    assert (len(split.train), len(split.validation)) == (17, 17)
    with pytest.raises(
        ValueError, match=r"data must have at least 2 \* \(context_length \+ 1\) = 34 .*33"
    ):
        split_tokens(torch.arange(33), context_length=16)


def test_crops_are_a_function_of_seed_and_step():
    tokens = torch.arange(500)
    sizes = {"context_length": 20, "batch_size": 3}
    inputs, targets = random_crops(tokens, **sizes, seed=1, step=7)
    assert inputs.shape == targets.shape == (3, 20)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, random_crops(tokens, **sizes, seed=1, step=7)[0])
    assert not torch.equal(inputs, random_crops(tokens, **sizes, seed=1, step=8)[0])
    assert not torch.equal(inputs, random_crops(tokens, **sizes, seed=2, step=7)[0])


def test_crops_reach_both_ends():
    tokens = torch.arange(12)
    starts = {
        random_crops(tokens, context_length=9, batch_size=1, seed=0, step=step)[0][0, 0].item()
        for step in range(50)
    }
    assert starts == {0, 1, 2}
