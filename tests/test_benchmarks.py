"""The benchmark suite at its tiniest sizes, end to end: every file, the report, and bad input."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from leedl_fast.benchmarks import results as r
from leedl_fast.benchmarks import run
from leedl_fast.benchmarks.suite import Expected, Settings
from leedl_fast.testing.bench import (
    Ceilings,
    Timing,
    interleave,
    machine_name,
    make_plan,
    peak_memory,
)

PNG = b"\x89PNG\r\n\x1a\n"


def run_tiny(folder: Path, *ops: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own, after the statements `first`: pytest must not run inside pytest."""
    code = first + (
        "import sys; from pathlib import Path; from leedl_fast.benchmarks.run import bench;"
        "bench(False, Path(sys.argv[1]), sys.argv[2:] or None, tiny=True)"
    )
    command = [sys.executable, "-c", code, str(folder), *ops]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder.parent)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("bench") / "report"
    finished = run_tiny(folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder, json.loads((folder / "results.json").read_text()), finished.stdout


def test_every_case_is_in_the_results(report: tuple) -> None:
    _, results, _ = report
    measured = [(case["op"], case["name"], case["sizes"]) for case in results["cases"]]
    assert len(set(measured)) == len(measured)
    assert {op for op, _, _ in measured} == set(run.OPS)
    for op in run.OPS:
        cases = __import__(f"leedl_fast.benchmarks.bench_{op}", fromlist=["cases"]).cases
        expected = [(op, case.name, case.sizes) for case in cases(Settings("tiny"))]
        assert [each for each in measured if each[0] == op] == expected


def test_numbers_are_finite_and_the_compiled_backend_ran(report: tuple) -> None:
    _, results, _ = report
    assert results["failures"] == []
    assert results["machine"]["instruction_set"] in ("avx512", "avx2", "baseline")
    for case in results["cases"]:
        assert r.ours(case)["backend"] == "cpu"
        assert r.ours(case)["accurate"]
        for row in r.ran(case):
            numbers = [row[key] for key in ("median_ms", "lower_quartile_ms", "upper_quartile_ms")]
            numbers += [error["error"] for error in row["errors"]]
            assert all(number is not None and math.isfinite(number) for number in numbers)
            assert 0 < row["lower_quartile_ms"] <= row["median_ms"] <= row["upper_quartile_ms"]
            assert row["samples"] >= 3
            assert (row["max_error"] is None) == (row["errors"] == [])


def test_every_bar_has_a_peer_that_ran(report: tuple) -> None:
    _, results, _ = report
    assert {bar["op"] for bar in r.bars(results)} == set(run.OPS)
    assert all(math.isfinite(bar["measured"]) for bar in r.bars(results))


def test_loss_curves_agree(report: tuple) -> None:
    _, results, _ = report
    (curve,) = results["curves"]
    assert set(curve["losses"]) == {"leedl_fast", "eager"}
    assert all(len(losses) == len(curve["steps"]) for losses in curve["losses"].values())
    assert curve["max_difference"] <= curve["allowed"]


def test_plots_and_page_hold_every_case(report: tuple) -> None:
    folder, results, _ = report
    for name in ("time_vs_seqlen", "peak_memory", "speed_up", "loss_curves"):
        image = (folder / f"{name}.png").read_bytes()
        assert image.startswith(PNG)
        assert len(image) > 5000
    page = (folder / "index.html").read_text()
    for case in results["cases"]:
        assert f"{case['name']}, {case['sizes']}, {case['dtype']}" in page
    assert page.count("data:image/svg+xml;base64,") == 2 * 4  # each plot, light and dark
    assert not re.search(r'(?:src|href|url)\s*[=(]\s*"?(?:https?:)?//', page)
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.html",
        "loss_curves.png",
        "peak_memory.png",
        "results.json",
        "speed_up.png",
        "time_vs_seqlen.png",
    ]


def test_terminal_shows_every_case_in_80_columns(report: tuple) -> None:
    _, results, output = report
    for case in results["cases"]:
        assert f"{case['name']}, {case['sizes']}, {case['dtype']}" in output
    tables = output[output.index("ceilings:") : output.index("report:")]
    assert max(map(len, tables.splitlines())) <= 80


def test_a_wrong_op_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.bench(True, tmp_path / "report", ["conv"])
    assert stopped.value.code == 2
    known = ", ".join(run.OPS)
    assert capsys.readouterr() == ("", f"error: op must be one of {known}, got 'conv'\n")
    assert not (tmp_path / "report").exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").write_text("a file")
    with pytest.raises(SystemExit) as stopped:
        run.bench(True, tmp_path / "report")
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: output must be a folder that can be written to, got ")
    assert err.count("\n") == 1


def test_a_failing_case_is_in_the_report_and_gives_code_1(tmp_path: Path) -> None:
    """The gate: kernels that are off by a little do not pass."""
    spoil = (
        "from leedl_fast.backends import cpu\n"
        "kernels = cpu.TABLE['attention'].kernels\n"
        "right = kernels['attention_forward']\n"
        "def wrong(problem, out, *rest):\n"
        "    right(problem, out, *rest)\n"
        "    out.add_(1e-4)\n"
        "kernels['attention_forward'] = wrong\n"
    )
    finished = run_tiny(tmp_path / "report", "attention", first=spoil)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "leedl_fast is outside the allowed error" in finished.stdout
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(results["failures"]) == len(results["cases"]) >= 5
    assert not any(r.ours(case)["accurate"] for case in results["cases"])
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count('class="failure"') == len(results["failures"])


def test_arithmetic_in_two_bytes_is_held_against_the_faster_rate() -> None:
    """A processor without instructions for bfloat16 multiplies it as float32."""
    row = {"gflop_per_s": 60.0}
    slow = Ceilings(1e10, 1e10, {"float32": 120e9, "bfloat16": 0.3e9})
    assert r.percent_of_ceiling(row, "bfloat16", slow) == pytest.approx(50)
    fast = Ceilings(1e10, 1e10, {"float32": 120e9, "bfloat16": 240e9})
    assert r.percent_of_ceiling(row, "bfloat16", fast) == pytest.approx(25)
    assert r.percent_of_ceiling(row, "float64", fast) is None


def test_machines_of_one_name_and_two_instruction_sets_have_two_files() -> None:
    facts = {"processor": "AMD EPYC", "cores": 2, "device": "cpu"}
    names = {machine_name(facts | {"torch_instruction_set": isa}) for isa in ("AVX2", "AVX512")}
    assert names == {"amd-epyc-2-cores-avx2", "amd-epyc-2-cores-avx512"}


def test_a_plan_interleaves_and_times_each_function() -> None:
    calls: list[str] = []
    plan = make_plan(
        {"slow": lambda: calls.append("slow"), "fast": lambda: calls.append("fast")},
        budget_s=0.01,
        known_s={"slow": 0.1, "fast": 0.01},
        max_cycles=4,
    )
    assert calls == []  # both are known: none is called to estimate it
    assert plan.cycle == ("slow", "fast", "fast")
    assert plan.cycles == 3
    assert list(plan) == ["slow", "fast", "fast"] * 3
    timings = plan.timings([3.0, 1.0, 2.0] * 3)
    assert timings == {"slow": Timing(3.0, 3.0, 3.0, 3), "fast": Timing(1.5, 1.0, 2.0, 6)}


def test_interleave_returns_seconds_per_call() -> None:
    timings = interleave({"one": lambda: sum(range(1000)), "ten": lambda: sum(range(10000))}, 0.05)
    assert 0 < timings["one"].median < timings["ten"].median


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the high-water mark")
@pytest.mark.parametrize("megabytes", [16, 64])
def test_peak_memory_sees_what_a_call_needs(megabytes: int) -> None:
    measured = peak_memory(lambda: bytearray(megabytes * 2**20))
    assert measured is not None
    assert abs(measured / 2**20 - megabytes) < 2


def test_an_expectation_covers_its_part_of_the_output() -> None:
    exact, plain = torch.tensor([1.5], dtype=torch.float64), torch.tensor([1.5 + 2**-20])
    expected = Expected.of("out", exact, plain, torch.float32, (slice(1, 2),))
    assert expected.limit == 2 * 2**-20 + 1.5 * 2**-23
    assert expected.error(torch.tensor([9.0, 1.5 + 2**-19])) == 2**-19
    assert expected.error(torch.tensor([9.0, math.nan])) == math.inf
