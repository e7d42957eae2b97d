"""The sequence tagger and the text classifier from data to samples, small."""

import csv
import random

import pytest
import torch

from leedl_fast.training.checkpoint import KEY, read_checkpoint
from leedl_fast.training.compare import compare_backends
from leedl_fast.training.engine import load_task, make_task, resumed_run, train
from leedl_fast.training.naive_bayes import naive_bayes_accuracy
from leedl_fast.training.pictures import write_maps
from leedl_fast.training.registry import configure
from leedl_fast.training.tasks.tagger import binary_digits

TINY = {"num_heads": 2, "embed_dim": 32, "max_length": 16, "batch_size": 16}
LETTERS = "abcdefghijklmnop"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Stems are verbs after "to" and nouns after "the"; what ends in "ly" is an adverb, and half of
    those are seen once.
    """
    draw = random.Random(0)
    stems = ["run", "walk", "play", "drink", "sleep", "talk"]
    lines = []
    for _ in range(600):
        words = []
        for _ in range(draw.randint(1, 4)):
            marker, mark = draw.choice((("to", "v"), ("the", "n")))
            words += [f"{marker}/m", f"{draw.choice(stems)}/{mark}"]
            if draw.random() < 0.5:
                words.append("".join(draw.choices(LETTERS, k=4)) + "ly/d")
        lines.append(" ".join(words))
    path = tmp_path_factory.mktemp("tagged") / "sentences.txt"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """What is "ax" is good and what is "xa" is bad, among letters that say nothing."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for _ in range(500):
            label, word = draw.choice((("good", "ax"), ("bad", "xa")))
            noise = draw.choices(LETTERS[1:], k=draw.randint(2, 12))
            noise.insert(draw.randint(0, len(noise)), word)
            writer.writerow(("".join(noise), label))
    return str(path)


def said(task, **options):
    with torch.no_grad():
        return "".join(task.eval().sample(task.SampleOptions(**options), None))


def test_a_tagger_learns_from_the_neighbours_and_reads_unseen_words(sentences, tmp_path):
    run = configure("tagger", data=sentences, steps=120, warmup_steps=10, **TINY)
    result = train(run, output=tmp_path / "run", quiet=True)
    metrics = result.metrics
    assert metrics["accuracy"] > 0.98
    assert metrics["unseen_accuracy"] > 0.98
    assert metrics["gain"] == metrics["accuracy"] - metrics["baseline_accuracy"] > 0.1
    task = load_task(result.checkpoint, "tagger")
    prompt = "the run oddly to run the talk"
    assert said(task, prompt=prompt) == "the/m run/n oddly/d to/m run/v the/m talk/n\n"
    assert said(task).count("(reference: ") == 8

    alone = configure("tagger", "without attention", data=sentences, steps=120, **TINY)
    assert train(alone, quiet=True).metrics["accuracy"] < metrics["accuracy"] - 0.1


def test_the_baseline_is_each_words_most_frequent_tag(tmp_path):
    path = tmp_path / "tagged.txt"
    train_part = ["a/x b/y b/z b/z c/x"] * 27
    path.write_text("\n".join([*train_part, "a/x b/z d/x", "a/y b/y d/z", "d/z"]))
    task = make_task(configure("tagger", data=str(path), **TINY)).eval()
    with torch.no_grad():
        metrics = task.evaluate()
    # Right are a/x, b/z and d/x: x and z are as frequent, and x was seen first.
    assert metrics["baseline_accuracy"] == pytest.approx(3 / 7)


def test_sentences_longer_than_max_length_are_cut_and_lose_no_word(sentences):
    task = make_task(configure("tagger", data=sentences, **TINY | {"max_length": 5}))
    assert max(len(targets) for _, targets in task.train_rows) == 5
    num_words = sum(len(words) for words, _ in task.data.train)
    assert sum(len(targets) for _, targets in task.train_rows) == num_words


@pytest.mark.parametrize(
    "variant", ["additive", "relu", "sigmoid", "window", "given positions", "one-hot"]
)
def test_variants_of_the_tagger_train(sentences, variant):
    changes = {"data": sentences, "steps": 40, "warmup_steps": 5, **TINY}
    run = (
        configure("tagger", input="one-hot", **changes)
        if variant == "one-hot"
        else configure("tagger", variant, **changes)
    )
    result = train(run, quiet=True)
    assert sum(result.losses[-5:]) < 0.5 * sum(result.losses[:5])


def test_positions_given_in_a_file(sentences, tmp_path):
    path = tmp_path / "positions.csv"
    table = torch.randn(16, 32).mul(100).round().div(100)
    path.write_text("\n".join(",".join(map(str, row)) for row in table.tolist()))
    options = {"data": sentences, "steps": 2, "position_table": str(path), **TINY}
    run = configure("tagger", "given positions", **options)
    result = train(run, output=tmp_path / "run", quiet=True)
    path.unlink()  # the checkpoint holds it
    task = load_task(result.checkpoint, "tagger")
    torch.testing.assert_close(task.model.encoder.positions.table, table)
    assert said(task, prompt="to run") == said(result.task, prompt="to run")
    path.write_text("1,2\n")
    with pytest.raises(ValueError, match=r"must have shape .* = \(16, 32\), got \(1, 2\)"):
        make_task(run)
    with pytest.raises(ValueError, match='with positions "given", and only then'):
        make_task(configure("tagger", **options))


def test_binary_digits():
    assert binary_digits(4, 3).tolist() == [[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [1, 1, -1]]
    assert binary_digits(200, 128).unique(dim=0).shape == (200, 128)


def test_a_classifier_learns_what_pleases(reviews, tmp_path):
    run = configure("sentiment", data=reviews, steps=80, warmup_steps=10, **TINY)
    result = train(run, output=tmp_path / "run", quiet=True)
    metrics = result.metrics
    assert metrics["accuracy"] > 0.95
    assert metrics["gain"] == metrics["accuracy"] - metrics["bayes_accuracy"]
    task = load_task(result.checkpoint, "sentiment")
    assert said(task, prompt="bcdaxef").startswith("bcdaxef\n  -> good ")
    assert said(task, prompt="bcdxaef").startswith("bcdxaef\n  -> bad ")
    assert said(task).count("(reference: ") == 8


@pytest.mark.parametrize("variant", ["additive", "mean pooling"])
def test_variants_of_the_classifier_train(reviews, variant):
    changes = {"data": reviews, "steps": 60, "warmup_steps": 5, **TINY}
    result = train(configure("sentiment", variant, **changes), quiet=True)
    assert result.metrics["accuracy"] > 0.8


def test_naive_bayes_is_scikit_learns():
    from sklearn.naive_bayes import MultinomialNB

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    draws = torch.rand(200, 12, generator=generator)
    has = draws < 0.2 + 0.3 * (torch.arange(12) % 3 == labels[:, None])
    examples = [(row.nonzero()[:, 0], int(label)) for row, label in zip(has, labels, strict=True)]
    ours = naive_bayes_accuracy(examples[:150], examples[150:], num_features=12, num_classes=3)
    theirs = MultinomialNB().fit(has[:150], labels[:150]).score(has[150:], labels[150:])
    assert 0.5 < ours == pytest.approx(theirs)


@pytest.fixture(params=["tagger", "sentiment"])
def small(request, sentences, reviews):
    """The name of a task, and a small run's options."""
    data = sentences if request.param == "tagger" else reviews
    return request.param, {"data": data, "steps": 6, "warmup_steps": 2, **TINY}


def test_a_batch_is_a_function_of_its_number(small):
    name, changes = small
    task, again = (make_task(configure(name, **changes)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(task.batch(7), again.batch(7), strict=True))
    tokens, _, lengths = task.batch(7)
    places = torch.arange(tokens.shape[1])
    assert (tokens[places >= lengths[:, None]] == 0).all()
    assert (tokens[places < lengths[:, None]] > 0).any(dim=1).float().mean() > 0.9


def test_backends_agree(small):
    name, changes = small
    assert compare_backends(configure(name, **changes), "cpu").agrees


def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(small, tmp_path):
    name, changes = small
    whole = train(configure(name, **changes), quiet=True)
    half = train(configure(name, **changes | {"steps": 3}), output=tmp_path, quiet=True)
    about = read_checkpoint(half.checkpoint, name)[KEY]
    rest = train(resumed_run(about, {"steps": 6}), resume=half.checkpoint, quiet=True)
    # The learning rate falls over another number of steps: the first loss after it is the same.
    assert half.losses + rest.losses[:1] == whole.losses[:4]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_bfloat16_follows_float32(small, score, precision):
    name, changes = small
    changes = {**changes, "steps": 3, "score": score}
    expected = train(configure(name, **changes), quiet=True)
    result = train(configure(name, **changes, precision=precision), quiet=True)
    assert result.losses == pytest.approx(expected.losses, rel=0.02)


def test_attention_maps_are_a_picture(small, tmp_path):
    from leedl_fast.layers.attention_maps import record_attention

    name, changes = small
    task = make_task(configure(name, **changes))
    with record_attention(task.inference_model) as maps:
        said(task, prompt="the run")
    names = {
        "tagger": ["encoder.layers.layers.0.self_attn", "encoder.layers.layers.1.self_attn"],
        "sentiment": ["encoder.layers.layers.0.self_attn", "pooling.attention"],
    }
    assert list(maps) == names[name]
    write_maps(maps, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 1000


def test_a_checkpoint_of_another_model(small, tmp_path):
    name, changes = small
    checkpoint = train(configure(name, **changes), output=tmp_path, quiet=True).checkpoint
    other = "sentiment" if name == "tagger" else "tagger"
    with pytest.raises(ValueError, match=f"must hold a {other} model, got one of {name}"):
        load_task(checkpoint, other)


def test_bad_input(small, tmp_path):
    name, changes = small
    empty, single = tmp_path / "empty", tmp_path / "single"
    empty.touch()
    single.write_text("only/n\n" if name == "tagger" else "text,label\nonly,good\n")
    few = "at least 2 sentences, got 1" if name == "tagger" else "at least 2 rows, got 1"
    for options, message in (
        ({"data": str(empty)}, "data must not be empty"),
        ({"data": str(single)}, few),
        ({"positions": "left"}, "positions must be one of"),
        ({"widow": 3}, rf"{name} has the options .*, got \['widow'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task(configure(name, **changes | options))
    task = make_task(configure(name, **changes))
    with pytest.raises(ValueError, match="prompt must have "):
        said(task, prompt="")
    with pytest.raises(ValueError, match=r"prompt must have .*characters that training saw"):
        said(task, prompt="深" if name == "tagger" else "深深")
    assert said(task, prompt="深 to" if name == "tagger" else "深ax")


def test_a_prompt_of_too_many_words(sentences):
    task = make_task(configure("tagger", data=sentences, **TINY))
    with pytest.raises(ValueError, match="prompt must have 1 to 16 words, got 17"):
        said(task, prompt="to " * 17)
