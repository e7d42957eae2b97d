import errno
import itertools
import json
import os
import pickle
import signal
import threading

import pytest
import torch

from leedl_fast import files, use_backend
from leedl_fast.training.callbacks import Recorder
from leedl_fast.training.checkpoint import KEY, read_checkpoint, write_checkpoint
from leedl_fast.training.engine import checkpoint_run, load_task, resumed_run, train
from leedl_fast.training.registry import configure, task_class
from leedl_fast.training.settings import Settings
from leedl_fast.training.tasks.gpt import GPTSampleOptions

SIZES = {
    "steps": 12,
    "batch_size": 4,
    "context_length": 32,
    "num_layers": 2,
    "num_heads": 4,
    "embed_dim": 32,
    "window": 8,
    "warmup_steps": 4,
    "validate_every": 5,
    "checkpoint_every": 5,
}


def small(**changes):
    return configure("gpt", **SIZES | changes)


SMALL = small()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with dropout: its folder and its result."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(small(dropout=0.1), output=folder, quiet=True)


def test_it_learns():
    result = train(small(steps=50, learning_rate=8e-3), quiet=True)
    assert result.losses[0] > 4
    assert result.metrics["validation_loss"] < 3.2
    assert result.checkpoint is None
    assert len(result.losses) == len(result.step_times) == 50


def test_eager_and_fused_runs_have_one_loss_curve():
    config = small(steps=30, embed_dim=64, learning_rate=4e-3)
    eager = train(config, backend="eager", quiet=True)
    fused = train(config, backend="cpu", quiet=True)
    torch.testing.assert_close(
        torch.tensor(fused.losses), torch.tensor(eager.losses), atol=1e-3, rtol=0
    )
    assert fused.losses[-1] < fused.losses[0] - 1


def test_the_backend_asked_for_runs(monkeypatch):
    import leedl_fast.layers.attention as module
    from leedl_fast.backends import requested

    seen = set()

    def spy(*arguments, **options):
        seen.add(requested(None))
        return attention(*arguments, **options)

    attention = module.attention
    monkeypatch.setattr(module, "attention", spy)
    train(small(steps=1), backend="eager", quiet=True)
    assert seen == {"eager"}
    with use_backend("cpu"):
        train(small(steps=1), quiet=True)
    assert seen == {"eager", "cpu"}


def test_the_log_holds_every_loss(trained):
    folder, result = trained
    rows = (folder / "log" / "from_step_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    table = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:]]
    losses = {int(row["step"]): float(row["loss"]) for row in table if row["loss"]}
    assert losses == pytest.approx(dict(enumerate(result.losses)))
    validation = {
        int(row["step"]) + 1: float(row["validation_loss"])
        for row in table
        if row["validation_loss"]
    }
    expected = {step: row["validation_loss"] for step, row in result.validation.items()}
    assert validation == pytest.approx(expected)
    assert set(validation) == {5, 10, 12}


def interrupt_after(monkeypatch, steps, times=1):
    """Send the process SIGINT at the beginning of the step after `steps`."""
    start = Recorder.on_train_batch_start

    def on_train_batch_start(self, trainer, *arguments):
        start(self, trainer, *arguments)
        if trainer.global_step == steps:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "on_train_batch_start", on_train_batch_start)


def test_ctrl_c_and_resume_give_the_uninterrupted_losses(trained, tmp_path, monkeypatch):
    _, whole = trained
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        first = train(small(dropout=0.1), output=tmp_path, quiet=True)
    assert first.interrupted
    assert len(first.losses) == 7
    assert signal.getsignal(signal.SIGINT) is before

    checkpoint = read_checkpoint(first.checkpoint, "gpt")
    assert checkpoint[KEY]["step"] == 7
    config = resumed_run(checkpoint[KEY], {})
    second = train(config, output=tmp_path, resume=first.checkpoint, quiet=True)
    assert second.first_step == 7
    assert not second.interrupted
    assert first.losses + second.losses == whole.losses
    assert first.validation | second.validation == whole.validation
    assert second.metrics == whole.metrics


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 6, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, output=tmp_path, quiet=True)
    assert read_checkpoint(tmp_path / "last.ckpt", "gpt")[KEY]["step"] == 5


def test_training_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(train(small(steps=1), quiet=True)))
    thread.start()
    thread.join()
    assert len(results[0].losses) == 1


def test_a_resumed_run_may_grow_longer(trained, tmp_path):
    folder, _ = trained
    about = read_checkpoint(folder / "last.ckpt", "gpt")[KEY]
    result = train(
        resumed_run(about, {"steps": 14}),
        output=tmp_path,
        resume=folder / "last.ckpt",
        quiet=True,
    )
    assert (result.first_step, len(result.losses)) == (12, 2)


def test_what_a_resumed_run_must_not_change(trained):
    about = read_checkpoint(trained[0] / "last.ckpt", "gpt")[KEY]
    with pytest.raises(ValueError, match=r"num_layers is 2 in the checkpoint and must not .*got 3"):
        resumed_run(about, {"num_layers": 3})
    with pytest.raises(ValueError, match=r"steps must be more than the 12 .*, got 12"):
        resumed_run(about, {})


def test_a_resumed_run_needs_the_same_text(trained, tmp_path):
    folder, _ = trained
    other = tmp_path / "other.txt"
    other.write_text("All happy families are alike. " * 20)
    about = read_checkpoint(folder / "last.ckpt", "gpt")[KEY]
    config = resumed_run(about, {"steps": 14, "data": str(other)})
    with pytest.raises(ValueError, match="data must be those that the checkpoint was trained on"):
        train(config, resume=folder / "last.ckpt", quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss must be finite, got nan at step \d+"):
        train(small(learning_rate=1e30, warmup_steps=0), output=tmp_path, quiet=True)
    assert not (tmp_path / "last.ckpt").exists()


def test_another_runs_checkpoint_is_not_overwritten(trained):
    with pytest.raises(ValueError, match=r"output must not hold another run's last\.ckpt"):
        train(SMALL, output=trained[0], quiet=True)


def test_an_unwritable_output_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output must be a writable folder, got"):
        train(SMALL, output=tmp_path / "file" / "run", quiet=True)


def test_a_text_shorter_than_the_context(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"data must have at least .* = 66 characters, got 9"):
        train(small(data=str(tmp_path / "short.txt")), quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"seed": -1}, "seed must be finite and not negative, got -1"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_the_learning_rate_rises_and_falls():
    config = Settings(steps=104, warmup_steps=4)
    factors = [config.learning_rate_factor(step) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[54] == pytest.approx(0.55)
    assert factors[104] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"number": 1}, path)

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint({"number": 2}, path)
    assert torch.load(path, weights_only=True) == {"number": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


class Spring:
    """A pickle that would run a command."""

    def __reduce__(self):
        return (os.system, ("true",))


def test_checkpoints_that_are_none(trained, tmp_path):
    whole = (trained[0] / "last.ckpt").read_bytes()
    broken = {
        "truncated": whole[: len(whole) // 2],
        "short": whole[:5000],
        "empty": b"",
        "text": b"not a checkpoint",
        "pickle": pickle.dumps(Spring(), protocol=2),
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"must be a whole file .*{name}' of {len(content)} "):
            read_checkpoint(tmp_path / name, "gpt")
    for content in ({"weights": 1}, [1], {KEY: {"format": 99}}):
        torch.save(content, tmp_path / "foreign")
        with pytest.raises(ValueError, match="checkpoint must be one of format 3 written by leedl"):
            read_checkpoint(tmp_path / "foreign", "gpt")
    torch.save({KEY: {"format": 3, "model": "bert"}}, tmp_path / "bert")
    with pytest.raises(ValueError, match="checkpoint must hold a gpt model, got one of bert"):
        read_checkpoint(tmp_path / "bert", "gpt")
    with pytest.raises(ValueError, match="checkpoint must be a file, got"):
        read_checkpoint(tmp_path / "missing", "gpt")


def test_a_trained_model_speaks_its_vocabulary(trained):
    task = load_task(trained[0] / "last.ckpt", "gpt")
    assert not task.model.training

    def text(prompt="The ", tokens=20, **options):
        return "".join(task.sample(GPTSampleOptions(prompt=prompt, tokens=tokens, **options), None))

    assert len(text()) == 4 + 20
    assert text(None).startswith("\n")
    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert set(text(top_k=1)) == set(text(temperature=0))
    with pytest.raises(ValueError, match="prompt must have at least 1 character"):
        text("")
    with pytest.raises(ValueError, match="must be made of the vocabulary's characters"):
        text("深")


def test_without_a_prompt_any_vocabulary_does(tmp_path):
    (tmp_path / "text.txt").write_text("多读书。" * 100)
    task = train(small(data=str(tmp_path / "text.txt"), steps=1), quiet=True).task.eval()
    with torch.no_grad():
        text = "".join(task.sample(GPTSampleOptions(tokens=6), None))
    assert len(text) == 7
    assert set(text) <= set("多读书。")


def test_the_checkpoint_says_how_it_was_made(trained):
    about = read_checkpoint(trained[0] / "last.ckpt", "gpt")[KEY]
    assert checkpoint_run(about) == small(dropout=0.1)
    assert json.dumps(about["settings"])


def test_an_average_of_the_weights_resumes_exactly(tmp_path):
    whole = train(small(ema_decay=0.9), quiet=True)
    first = train(small(ema_decay=0.9, steps=6), output=tmp_path, quiet=True)
    about = read_checkpoint(first.checkpoint, "gpt")[KEY]
    assert whole.task.inference_model is whole.task.averaged
    averaged = list(whole.task.averaged.parameters())
    assert not torch.equal(averaged[0], next(whole.task.model.parameters()))
    # A shorter run has another learning rate: what it left is compared, not where it leads.
    loaded = load_task(first.checkpoint, "gpt")
    for name, value in first.task.averaged.state_dict().items():
        assert torch.equal(loaded.averaged.state_dict()[name], value), name
    assert about["settings"]["ema_decay"] == 0.9


def test_ctrl_c_at_the_last_step_is_a_finished_run(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 11)
    result = train(SMALL, output=tmp_path, quiet=True)
    assert not result.interrupted
    assert 12 in result.validation


MIXED = ["gpt", "bert", "gan", "autoencoder", "vae", "vqvae"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "bf16-mixed") for name in MIXED),
        ("gpt", "bf16-true"),
        ("vae", "bf16-true"),
        ("gpt", "64-true"),
        ("autoencoder", "64-true"),
        ("vae", "64-true"),
        ("gan", "64-true"),
    ],
)
def test_other_precisions_follow_float32(name, precision):
    """Every variant trains and is evaluated; the losses differ from those of float32 by rounding:
    noise is the same at every precision.
    """
    sizes = {"steps": 3, "batch_size": 4, "embed_dim": 16, "num_heads": 2, "num_layers": 1}
    for variant in task_class(name).variants:
        expected = train(configure(name, variant.name, **sizes), quiet=True)
        result = train(configure(name, variant.name, **sizes, precision=precision), quiet=True)
        tolerance = 1e-3 if precision == "64-true" else 0.1
        assert result.losses == pytest.approx(expected.losses, rel=tolerance), variant.name
        wanted = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
        dtypes = {parameter.dtype for parameter in result.task.model.parameters()}
        assert dtypes == {wanted.get(precision, torch.float32)}
        assert result.metrics.keys() == expected.metrics.keys()


def test_a_gpt_learns_in_mixed_precision():
    result = train(small(steps=80, learning_rate=8e-3, precision="bf16-mixed"), quiet=True)
    assert result.losses[0] > 4
    assert result.metrics["validation_loss"] < 3.2
