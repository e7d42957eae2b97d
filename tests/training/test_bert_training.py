import random

import pytest
import torch

from leedl_fast.models.bert import IGNORED
from leedl_fast.training.engine import make_task, train
from leedl_fast.training.registry import configure
from leedl_fast.training.tasks.bert import sentence_begins

TINY = {"num_layers": 2, "num_heads": 2, "embed_dim": 64, "max_length": 27, "batch_size": 32}


@pytest.fixture
def text(tmp_path):
    """Sentences that run through the letters from anywhere on: a, b, c, ..., z, a, b, ..."""
    draw = random.Random(0)
    rows = []
    for _ in range(400):
        begin = draw.randrange(26)
        row = [chr(ord("a") + (begin + place) % 26) for place in range(30)]
        rows.append(row[0].upper() + "".join(row[1:]))
    path = tmp_path / "text.txt"
    path.write_text(". ".join(rows))
    return str(path)


def test_it_learns_blanks_and_order(text, tmp_path):
    run = configure("bert", data=text, steps=150, mask_share=0.3, warmup_steps=10, **TINY)
    result = train(run, output=tmp_path / "run", quiet=True)
    assert result.metrics["masked_accuracy"] > 0.7  # what stands before a whole sentence is open
    assert result.metrics["order_accuracy"] > 0.9
    prompt = "Mnopqrst[MASK]vwxyzabcde[MASK]ghij"
    options = result.task.SampleOptions(prompt=prompt, candidates=2)
    with torch.no_grad():
        result.task.eval()
        lines = list(result.task.sample(options, None))
    assert lines[0] == "Mnopqrstuvwxyzabcdefghij\n"
    assert lines[1].startswith("blank 1: 'u' ")
    assert lines[2].startswith("blank 2: 'f' ")
    with torch.no_grad():
        filled, reference, *blanks = result.task.sample(result.task.SampleOptions(), None)
    held_out = reference.removeprefix("  (reference: ").removesuffix(")\n")
    assert held_out in result.task.data.text[-len(result.task.data.text) // 10 :]
    assert held_out[0].isupper()
    assert len(filled) == len(held_out) + 1 == 25
    # The blanks are the second character and every eighth one after it.
    kept = [i for i in range(24) if i % 8 != 1]
    assert [filled[i] for i in kept] == [held_out[i] for i in kept]
    assert len(blanks) == 3


def test_a_batch_is_a_function_of_its_number(text):
    task, again = (make_task(configure("bert", data=text, **TINY)) for _ in range(2))
    for one, other in zip(task.batch(7), again.batch(7), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(task.batch(7)[0], task.batch(8)[0])


def test_half_of_the_pairs_are_swapped(text):
    """The classes: the half that begins a sentence comes first, or second."""
    task = make_task(configure("bert", data=text, **TINY | {"batch_size": 400, "max_length": 43}))
    inputs, targets, swapped, segments = task.batch(0)
    tokens = torch.where(targets != IGNORED, targets, inputs)
    first_special = len(task.vocabulary)
    assert inputs.shape == segments.shape == (400, 43)
    special = torch.tensor([first_special, first_special + 1, first_special + 1])
    assert (tokens[:, [0, 21, 42]] == special).all()
    assert (segments == (torch.arange(43) > 21)).all()
    for row, is_swapped in zip(tokens.tolist(), swapped.tolist(), strict=True):
        halves = [task.vocabulary.decode(row[begin : begin + 20]) for begin in (1, 22)]
        passage = "".join(halves[::-1] if is_swapped else halves)
        assert passage in task.data.text
        assert passage[0].isupper()
    assert swapped.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_half_of_the_second_halves_are_of_other_passages(text):
    options = TINY | {"batch_size": 400, "max_length": 43, "sentence_task": "next"}
    task = make_task(configure("bert", data=text, **options))
    inputs, targets, other, _ = task.batch(0)
    tokens = torch.where(targets != IGNORED, targets, inputs)
    for row, is_other in zip(tokens.tolist(), other.tolist(), strict=True):
        first, second = (task.vocabulary.decode(row[begin : begin + 20]) for begin in (1, 22))
        assert first[0].isupper()
        assert first in task.data.text
        assert second in task.data.text
        follows = first + second in task.data.text
        # Another passage may be the same one, or begin at the same letter: one in 26.
        assert follows or is_other
    assert other.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_it_learns_which_half_is_next(text):
    run = configure(
        "bert", "next sentence", data=text, steps=300, mask_share=0.3, warmup_steps=20, **TINY
    )
    result = train(run, quiet=True)
    assert result.metrics["next_accuracy"] > 0.8
    assert result.metrics["masked_accuracy"] > 0.5
    with pytest.raises(ValueError, match="sentence_task must be one of order, next, got 'last'"):
        configure("bert", sentence_task="last")


def test_sentences_begin_after_others_and_after_empty_lines():
    text = "One 1.5. Two?  (Three:) a\n b\n\n   four 。五。六"
    wanted = ["One", "Two", "(Thr", "a", "four", "五", "六"]
    begins = sentence_begins(text)
    assert [text[i : i + len(word)] for i, word in zip(begins, wanted, strict=True)] == wanted


def test_bad_prompts(text):
    task = make_task(configure("bert", data=text, **TINY)).eval()
    for prompt, message in (
        ("abc", r"prompt must have at least one \[MASK\], got 'abc'"),
        ("&[MASK]", "text must be made of the vocabulary's characters, got"),
        ("[MASK]", "prompt must have 2 to 24 characters, got 1"),
        ("[MASK]" * 25, "prompt must have 2 to 24 characters, got 25"),
    ):
        with pytest.raises(ValueError, match=message):
            list(task.sample(task.SampleOptions(prompt=prompt), None))
    with pytest.raises(
        ValueError, match=r"begins and 10000 characters .*, got 48 and 0; a smaller"
    ):
        make_task(configure("bert", data=text, **TINY | {"max_length": 10_003}))
    with pytest.raises(ValueError, match="max_length must be at least 5, got 4"):
        make_task(configure("bert", data=text, **TINY | {"max_length": 4}))
