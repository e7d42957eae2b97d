"""`leedl-fast models`: the list, and --run with its results, README table and exit code."""

import json
import os
import re

import pytest
from typer.testing import CliRunner

from leedl_fast.cli import app
from leedl_fast.training import table
from leedl_fast.training.registry import TASKS
from leedl_fast.training.results import BEGIN, END, Results, rows
from leedl_fast.training.table import apart, measure_row
from leedl_fast.training.task import Goal, Task, Variant

GPT_SIZES = {"steps": 2, "context_length": 16, "num_layers": 1, "embed_dim": 16, "num_heads": 2}


class Runner(Task):
    name = "runner"
    title = "Runner"
    shows = "speed"
    data_text = "a track | field"
    variants = (
        Variant(goals=(Goal("speed", 3.0), Goal("speed", 1.0, minus="tired/speed"))),
        Variant("tired", {"steps": 1}),
    )


class Sleeper(Task):
    name = "sleeper"
    title = "Sleeper"
    shows = "rest"
    data_text = "a bed"
    variants = (Variant(goals=(Goal("noise", 0.5, "at most"),)),)


class Pacer(Task):
    name = "pacer"
    title = "Pacer"
    shows = "pace"
    data_text = "a track"
    variants = (
        Variant(),
        Variant("even", {"steps": 2}, (Goal("speed", 1.0, minus="slow/speed"),)),
        Variant("slow", {"steps": 1}),
    )


METRICS = {
    "runner": {"speed": 4.0},
    "runner/tired": {"speed": 2.0},
    "sleeper": {"noise": 0.25},
    "pacer/even": {"speed": 3.0},
    "pacer/slow": {"speed": 2.0},
}


@pytest.fixture
def models(monkeypatch, tmp_path):
    """Two models that train at once; call it to run the command in a folder with a README."""
    metrics = {key: dict(values) for key, values in METRICS.items()}
    trained = []

    def measure(row):
        trained.append(row.key)
        value = metrics[row.key]
        if isinstance(value, BaseException):
            raise value
        return {
            "metrics": value, "steps": 2, "seconds": 61.4, "processor_seconds": 120.0,
            "threads": 2, "torch": "2.13.0",
        }  # fmt: skip

    for name in list(TASKS):
        monkeypatch.delitem(TASKS, name)
    for task in (Runner, Sleeper):
        monkeypatch.setitem(TASKS, task.name, f"{__name__}:{task.__name__}")
    monkeypatch.setattr(table, "_measure_apart", measure)
    (tmp_path / "README.md").write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")

    def run(*names):
        arguments = ["models", *names, "--run", "--results", tmp_path / "results"]
        return invoke(*arguments, "--readme", tmp_path / "README.md")

    run.metrics, run.trained, run.folder = metrics, trained, tmp_path
    return run


def invoke(*arguments):
    environment = {"COLUMNS": "250", "NO_COLOR": "1"}
    return CliRunner(env=environment).invoke(app, list(map(str, arguments)))


def written(folder):
    (path,) = (folder / "results").iterdir()
    assert path.name.startswith("models-")
    return json.loads(path.read_text())["rows"]


def readme_rows(folder):
    text = (folder / "README.md").read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n\n`make models` on ")
    assert text.endswith(f"|\n\n{END}\n\nAfter.\n")
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = ([cell.strip() for cell in line[2:-2].split(" | ")] for line in lines)
    return {name.strip("`"): rest for name, *rest in cells}


def test_every_row_is_trained_and_written(models):
    result = models()
    assert result.exit_code == 0, result.stderr
    # What runner is compared with goes first, so that its outcome is known at once.
    assert models.trained == ["runner/tired", "runner", "sleeper"]
    assert result.stdout.splitlines() == [
        "1 of 3: leedl-fast train runner --variant tired",
        "speed 2",
        "2 of 3: leedl-fast train runner",
        "4; 2",
        "3 of 3: leedl-fast train sleeper",
        "0.25",
    ]
    rows = written(models.folder)
    assert rows["runner"]["metrics"] == {"speed": 4.0}
    assert rows["runner"]["seconds"] == 61.4
    assert rows["runner"]["goals"] == [
        {"goal": "speed at least 3", "value": 4.0, "reached": True},
        {"goal": "speed - tired/speed at least 1", "value": 2.0, "reached": True},
    ]
    table_rows = readme_rows(models.folder)
    date = rows["runner"]["date"]
    goals = "speed at least 3; speed - tired/speed at least 1"
    times = ["61", "120", "2", "2.13.0", date]
    assert table_rows == {
        "runner": ["a track \\| field", goals, "4; 2", *times],
        "runner --variant tired": ["a track \\| field", "", "speed 2", *times],
        "sleeper": ["a bed", "noise at most 0.5", "0.25", *times],
    }


def test_a_missed_goal_is_exit_code_1_and_named(models):
    models.metrics["runner/tired"]["speed"] = 3.5
    result = models()
    assert result.exit_code == 1
    assert result.stderr == "missed:\nrunner: speed - tired/speed at least 1, got 0.5\n"
    assert readme_rows(models.folder)["runner"][2] == "4; 0.5, missed"
    goals = written(models.folder)["runner"]["goals"]
    assert [goal["reached"] for goal in goals] == [True, False]


def test_a_row_that_fails_is_named_and_the_others_are_trained(models):
    models.metrics["runner/tired"] = ValueError("no\nwater")
    result = models()
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == [
        "runner/tired: ValueError: no water",
        "runner: speed - tired/speed at least 1, got no tired/speed",
    ]
    rows = readme_rows(models.folder)
    assert rows["runner"][2] == "4; speed unknown without tired/speed, missed"
    assert rows["runner --variant tired"][2:5] == ["failed: ValueError: no water", "", ""]
    assert rows["sleeper"][2] == "0.25"


def test_ctrl_c_keeps_the_rows_before_it(models):
    models.metrics["sleeper"] = KeyboardInterrupt()
    assert models().exit_code == 130
    assert written(models.folder).keys() == {"runner", "runner/tired"}
    assert (
        readme_rows(models.folder)["sleeper"]
        == ["a bed", "noise at most 0.5", "not run"] + [""] * 5
    )


def test_only_the_named_models_change(models):
    assert models().exit_code == 0
    models.metrics["runner"]["speed"] = 5.0
    models.metrics["sleeper"]["noise"] = 0.125
    models.trained.clear()
    assert models("sleeper").exit_code == 0
    assert models.trained == ["sleeper"]
    rows = written(models.folder)
    assert rows["runner"]["metrics"] == {"speed": 4.0}
    assert rows["sleeper"]["metrics"] == {"noise": 0.125}
    assert readme_rows(models.folder)["runner"][2] == "4; 2"


def test_one_row_brings_what_it_is_compared_with_where_that_is_not_measured(models, monkeypatch):
    monkeypatch.setitem(TASKS, "pacer", f"{__name__}:Pacer")
    result = models("pacer/even")
    assert result.exit_code == 0, result.stderr
    assert models.trained == ["pacer/slow", "pacer/even"]
    assert result.stdout.splitlines() == [
        "1 of 2: leedl-fast train pacer --variant slow, which others are compared with",
        "speed 2",
        "2 of 2: leedl-fast train pacer --variant even",
        "1",
    ]
    assert written(models.folder).keys() == {"pacer/slow", "pacer/even"}
    models.trained.clear()
    assert models("pacer/even").exit_code == 0
    assert models.trained == ["pacer/even"]  # the other one is known by now
    # One that failed is not known: it is trained again.
    models.metrics["pacer/slow"] = ValueError("no water")
    assert models("pacer/slow").exit_code == 1
    models.metrics["pacer/slow"] = {"speed": 2.5}
    models.trained.clear()
    assert models("pacer/even", "sleeper", "pacer/even").exit_code == 1
    assert models.trained == ["pacer/slow", "pacer/even", "sleeper"]


def test_rows_of_models_that_are_gone_are_dropped(models, monkeypatch):
    assert models().exit_code == 0
    monkeypatch.delitem(TASKS, "sleeper")
    assert models("runner").exit_code == 0
    assert written(models.folder).keys() == {"runner", "runner/tired"}


@pytest.mark.parametrize("text", ["# A page", f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{END}"])
def test_a_readme_without_markers_is_refused_before_any_training(models, text):
    (models.folder / "README.md").write_text(text)
    result = models()
    assert result.exit_code == 2
    assert "error: readme must have a line <!-- models --> and after it a line" in result.stderr
    assert models.trained == []
    assert (models.folder / "README.md").read_text() == text


def test_results_that_cannot_be_read_are_refused(models):
    assert models().exit_code == 0
    (path,) = (models.folder / "results").iterdir()
    for content, message in (
        ("{", "results must be a JSON file, got"),
        ('{"schema": 99}', "results must be a file of schema 1, got 99 in"),
        ("[]", "results must be a file of schema 1, got None in"),
    ):
        path.write_text(content)
        result = models()
        assert result.exit_code == 2
        assert message in result.stderr
        assert path.read_text() == content


def test_the_list_shows_what_was_reached_and_where(models):
    assert models("runner").exit_code == 0
    machine = Results.of_this_machine(models.folder / "results").machine
    result = invoke("models", "--results", models.folder / "results")
    assert result.exit_code == 0, result.stderr
    lines = [re.split(r"  +", line.rstrip()) for line in result.stdout.splitlines()]
    date = written(models.folder)["runner"]["date"]
    when = f"{date}, 61 s, {machine['processor']}, {machine['cores']} cores"
    header = ["model", "must reach", "reached", "when, where"]
    assert lines == [
        ["Runner: speed"],
        ["on a track | field"],
        header,
        ["runner", "speed at least 3", "4", when],
        ["", "speed - tired/speed at least 1", "2"],
        ["runner/tired", "speed 2", when],
        [""],
        ["Sleeper: rest"],
        ["on a bed"],
        header,
        ["sleeper", "noise at most 0.5", "not run"],
        [""],
    ]


def test_the_list_cuts_nothing_in_a_narrow_terminal():
    """Of all models: no key is broken in two, and every word is there."""
    narrow, wide = (
        CliRunner(env={"COLUMNS": columns, "NO_COLOR": "1"}).invoke(app, ["models"]).stdout
        for columns in ("80", "250")
    )
    assert max(map(len, narrow.splitlines())) <= 80
    for row in rows():
        assert any(line.startswith(f"{row.key}  ") for line in narrow.splitlines())
    # A metric's name may be longer than its column is wide.
    assert sorted("".join(narrow.split())) == sorted("".join(wide.split()))


def test_bad_arguments(models):
    for arguments, message in (
        (["models", "walker", "--run"], "model must be one of runner, sleeper, got 'walker'"),
        (
            ["models", "runner/fast", "--run"],
            "variant of runner must be one of tired, got 'fast'",
        ),
        (["models", "runner/tired"], "model must be one of runner, sleeper, got 'runner/tired'"),
        (["models", "--readme", "README.md"], "--readme is for --run, got it without"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_row_is_measured_in_a_process_of_its_own():
    record = apart(measure_row, "gpt", "", GPT_SIZES)
    assert record["metrics"].keys() == {"bits_per_character", "validation_loss"}
    assert record["steps"] == 2
    assert 0 < record["seconds"] < 100
    assert record["processor_seconds"] > 0
    assert json.dumps(record)
    with pytest.raises(ValueError, match="invalid literal for int"):
        apart(int, "two")
    with pytest.raises(RuntimeError, match="its process was killed or crashed"):
        apart(os._exit, 1)
