import csv
import random

import pytest
import torch

from leedl_fast.layers.attention_maps import record_attention
from leedl_fast.models.transformer import END, PAD
from leedl_fast.training.engine import make_task, train
from leedl_fast.training.registry import configure

DIGITS = "零一二三四五六七八九"
TINY = {
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "embed_dim": 64,
    "dropout": 0.0,
    "max_length": 16,
    "batch_size": 32,
    "vocabulary_size": 40,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Numbers with the digits of English and of Chinese texts."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    numbers = random.Random(0).sample(range(10_000), 1000)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("source", "target"))
        for number in numbers:
            writer.writerow((f"no. {number}", "第" + "".join(DIGITS[int(c)] for c in str(number))))
    return str(path)


def translate(task, prompt, **options):
    with torch.no_grad():
        task.eval()
        return "".join(task.sample(task.SampleOptions(prompt=prompt, **options), None))


def test_it_learns_to_translate(pairs, tmp_path):
    run = configure("transformer", data=pairs, steps=250, learning_rate=3e-3, **TINY)
    result = train(run, output=tmp_path / "run", quiet=True)
    metrics = result.metrics
    assert metrics["chrf"] > 80 > 3 * metrics["shuffled_chrf"]
    assert metrics["loss_ratio"] > 2
    assert metrics["chrf_ratio"] == metrics["chrf"] / metrics["shuffled_chrf"]
    assert translate(result.task, "no. 4071") == "no. 4071\n  -> 第四零七一\n"
    shown = "".join(result.task.sample(result.task.SampleOptions(), None))
    assert shown.count("  -> 第") == shown.count("  (reference: 第") == 8


@pytest.mark.parametrize("variant", ["copying", "non-autoregressive"])
def test_variants_train(pairs, variant):
    run = configure("transformer", variant, data=pairs, steps=12, warmup_steps=1, **TINY)
    result = train(run, quiet=True)
    assert result.losses[-1] < result.losses[0]
    assert translate(result.task, "no. 1").startswith("no. 1\n  -> ")
    outputs = result.task.outputs(result.task.batch(0))
    assert outputs.shape[2] == len(result.task.vocabulary)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("variant", ["", "copying", "non-autoregressive"])
def test_bfloat16_follows_float32(pairs, variant, precision):
    changes = {"data": pairs, "steps": 3, **TINY, "embed_dim": 16}
    expected = train(configure("transformer", variant, **changes), quiet=True)
    result = train(configure("transformer", variant, **changes, precision=precision), quiet=True)
    assert result.losses == pytest.approx(expected.losses, rel=0.02)
    assert result.metrics.keys() == expected.metrics.keys()


def test_attention_maps_are_of_the_whole_translation(pairs):
    task = make_task(configure("transformer", data=pairs, **TINY))
    passes = []
    task.inference_model.register_forward_hook(lambda *arguments: passes.append(arguments))
    without = translate(task, "no. 1")
    assert passes == []  # without maps nothing but the search runs
    with record_attention(task.inference_model) as maps:
        assert translate(task, "no. 1", attention_maps="maps.png") == without
    assert len(passes) == 1
    said = maps["decoder.layers.0.multihead_attn"].shape[2]
    assert said > 1
    assert maps["decoder.layers.0.self_attn"].shape[2:] == (said, said)


def test_an_epoch_has_every_pair_once_sorted_by_length(pairs):
    task = make_task(configure("transformer", data=pairs, **TINY | {"batch_size": 25}))
    num_batches = len(task.train_tokens) // 25
    rows, padding = [], 0
    for index in range(num_batches):
        source, source_lengths, target, target_lengths = task.batch(index)
        padding += (source == PAD).sum().item()
        assert (target.gather(1, target_lengths[:, None] - 1) == END).all()
        rows += [
            (tuple(s[:m]), tuple(t[:n]))
            for s, m, t, n in zip(
                source.tolist(), source_lengths, target.tolist(), target_lengths, strict=True
            )
        ]
    assert len(rows) == 900
    wanted = {(tuple(s.tolist()), tuple(t.tolist())) for s, t in task.train_tokens}
    assert len(wanted & set(rows[: 32 * 25])) == 32 * 25
    assert padding < 0.1 * sum(len(source) for source, _ in rows)
    again = make_task(configure("transformer", data=pairs, **TINY | {"batch_size": 25}))
    assert all(torch.equal(a, b) for a, b in zip(task.batch(3), again.batch(3), strict=True))


def test_bad_input(pairs):
    task = make_task(configure("transformer", data=pairs, **TINY))
    with pytest.raises(ValueError, match="prompt must have 1 to 16 tokens, got 40"):
        translate(task, "é" * 40)
    with pytest.raises(ValueError, match="prompt must have characters that training saw, got 'é'"):
        translate(task, "é")
    assert translate(task, "é 1").startswith("é 1\n  -> ")
    with pytest.raises(ValueError, match="data must have pairs of at most max_length = 2 tokens"):
        make_task(configure("transformer", data=pairs, **TINY | {"max_length": 2}))
    with pytest.raises(ValueError, match="size must be at least"):
        make_task(configure("transformer", data=pairs, **TINY | {"vocabulary_size": 5}))
