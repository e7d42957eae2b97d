import pytest
import torch

from leedl_fast.models.bert import IGNORED
from leedl_fast.training.engine import make_task, train
from leedl_fast.training.registry import configure

TINY = {"num_layers": 2, "num_heads": 2, "embed_dim": 32, "max_length": 27, "batch_size": 32}


@pytest.fixture
def text(tmp_path):
    """An alphabet, again and again: the next letter and the order of two halves are sure."""
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz0123456789. " * 100)
    return str(path)


def test_it_learns_blanks_and_order(text, tmp_path):
    run = configure("bert", data=text, steps=150, mask_share=0.3, warmup_steps=10, **TINY)
    result = train(run, output=tmp_path / "run", quiet=True)
    assert result.metrics["masked_accuracy"] > 0.95
    assert result.metrics["order_accuracy"] > 0.9
    options = result.task.SampleOptions(prompt="mnop[MASK]rst[MASK]v", candidates=2)
    with torch.no_grad():
        result.task.eval()
        lines = list(result.task.sample(options, None))
    assert lines[0] == "mnopqrstuv\n"
    assert lines[1].startswith("blank 1: 'q' ")
    assert lines[2].startswith("blank 2: 'u' ")


def test_a_batch_is_a_function_of_its_number(text):
    task, again = (make_task(configure("bert", data=text, **TINY)) for _ in range(2))
    for one, other in zip(task.batch(7), again.batch(7), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(task.batch(7)[0], task.batch(8)[0])


def test_half_of_the_pairs_are_swapped(text):
    """What a batch says of itself: halves follow on each other in the class 0, and in no other."""
    task = make_task(configure("bert", data=text, **TINY | {"batch_size": 400, "max_length": 43}))
    inputs, targets, swapped, segments = task.batch(0)
    tokens = torch.where(targets != IGNORED, targets, inputs)
    assert inputs.shape == segments.shape == (400, 43)
    assert (tokens[:, [0, 21, 42]] == torch.tensor([38, 39, 39])).all()
    assert (segments == (torch.arange(43) > 21)).all()
    text = task.data.text * 2
    for row, is_swapped in zip(tokens.tolist(), swapped.tolist(), strict=True):
        halves = [task.vocabulary.decode(row[begin : begin + 20]) for begin in (1, 22)]
        assert ("".join(halves[::-1] if is_swapped else halves)) in text
        assert ("".join(halves if is_swapped else halves[::-1])) not in text
    assert swapped.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_bad_prompts(text):
    task = make_task(configure("bert", data=text, **TINY)).eval()
    for prompt, message in (
        ("abc", r"prompt must have at least one \[MASK\], got 'abc'"),
        ("A[MASK]", "text must be made of the vocabulary's characters, got"),
        ("[MASK]", "prompt must have 2 to 24 characters, got 1"),
        ("[MASK]" * 25, "prompt must have 2 to 24 characters, got 25"),
    ):
        with pytest.raises(ValueError, match=message):
            list(task.sample(task.SampleOptions(prompt=prompt), None))
    with pytest.raises(ValueError, match="max_length must be at least 5, got 4"):
        make_task(configure("bert", data=text, **TINY | {"max_length": 4}))
