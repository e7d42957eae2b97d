"""benchmarks/gpu.py without a GPU: every case at a tiny size, on the CPU backend."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch.nn.attention.flex_attention import create_block_mask

from leedl_fast.benchmarks import gpu, gpu_report
from leedl_fast.ops.attention_problem import Inputs, describe
from leedl_fast.testing import bench
from leedl_fast.testing.bench import Ceilings


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (
        ("DEVICE", torch.device("cpu")),
        ("BACKEND", "cpu"),
        ("BUDGET_S", 1e-3),
        ("HEAD_DIM", 16),
        (
            "measure_ceilings",
            lambda *_, **__: Ceilings(1e9, 1e9, {"float32": 1e9, "bfloat16": 1e9}),
        ),
    ):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a processor")
    with torch._functorch.config.patch(donated_buffer=True):  # which `main` changes
        yield


def test_every_case_is_measured(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases = {
        "full": lambda: gpu._attention(256, 2, False, None),
        "causal": lambda: gpu._attention(256, 2, True, None),
        "window": lambda: gpu._attention(512, 2, False, (100, 0)),
        "rows": lambda: gpu._add_layer_norm(16, 64),
        "long rows": lambda: gpu._add_layer_norm(4, 9000),
        "steps": lambda: gpu._diffusion((2, 3, 8, 8)),
        "wrong": lambda: gpu._attention(-1, 2, False, None),
    }
    monkeypatch.setattr(gpu, "CASES", cases)
    gpu.main(tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert results.keys() == cases.keys()
    assert "negative dimension" in results.pop("wrong")["error"]
    for case in results.values():
        for part in case.values():
            assert part["ms"][gpu.OURS] > 0
            rates = part.get("tflop_per_s") or part["gb_per_s"]
            assert rates[gpu.OURS] > 0
            assert part["percent_of_ceiling"].keys() == rates.keys()
    flash, eager = "SDPA flash", "eager"
    assert all(part["ms"][flash] > 0 for part in results["full"].values())
    for name in ("rows", "long rows", "steps"):
        assert all(part["ms"][eager] > 0 for part in results[name].values())
    assert results["window"]["forward"]["ms"][gpu.WALKING] > 0
    # FlexAttention's backward pass runs on GPUs alone, and says so without losing the others.
    assert "NotImplementedError" in results["window"]["forward"]["ms"]["FlexAttention"]
    assert results["long rows"]["backward"]["moved"] == 7 * 4 * 9000 * 2
    assert "moved" not in results["rows"]["backward"]


@pytest.mark.parametrize(("left", "right"), [(300, 0), (256, 0), (10, 200)])
def test_the_windows_mask_is_flex_attentions_own(on_cpu: None, left: int, right: int) -> None:
    ours = gpu._window_mask(1024, left, right)
    theirs = create_block_mask(ours.mask_mod, None, None, 1024, 1024, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert torch.equal(ours.full_q_num_blocks, theirs.full_q_num_blocks)


def test_the_plain_steps_are_the_librarys(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree where there is no noise."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "_milliseconds", lambda peers: seen.append(peers) or {})
    zeros = torch.zeros(2, 3, 4, 4)
    names = ("add_noise", "ddpm_step", "ddim_step")
    for name in names:
        function = getattr(gpu.diffusion, name)
        monkeypatch.setattr(
            gpu.diffusion,
            name,
            lambda *args, function=function, seed, **rest: function(*args, noise=zeros, **rest),
        )
    gpu._diffusion((2, 3, 4, 4))
    for peers in seen:
        assert torch.allclose(peers["eager"](), peers[gpu.OURS](), rtol=1e-4, atol=1e-5)


def test_tiles_are_changed_only_while_they_are_measured(on_cpu: None) -> None:
    q = torch.empty(1, 1, 8, 64, dtype=torch.bfloat16)
    problem = describe(Inputs(q, q, q), 0.1, 8, 0, "softmax", None, 0.0, False)

    def tiles() -> dict[str, Any]:
        return {name: gpu.attention_blocks.blocks_for(name, problem) for name in ("query", "bias")}

    before = tiles()
    inside = gpu._with_tiles(("forward", "query"), descriptors=True, programs_per_sm=2)(tiles)()
    assert inside["query"] == before["query"]._replace(descriptors=True, programs_per_sm=2)
    assert inside["bias"] == before["bias"]
    assert tiles() == before


def test_another_process_goes_on_where_the_gpu_was_lost(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []

    def case(name: str) -> Any:
        return lambda: ran.append(name) or {}

    def lose() -> dict:
        ran.append("lose")
        monkeypatch.setattr(bench, "synchronized", _fails)
        raise RuntimeError("an illegal memory access was encountered")

    cases = {"first": case("first"), "lose": lose, "last": case("last")}
    monkeypatch.setattr(gpu, "CASES", cases)
    assert gpu.main(tmp_path / "out.json") == gpu.GPU_LOST
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "CASES", cases)
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    assert gpu.main(tmp_path / "out.json") == 0
    assert ran == ["first", "lose", "last"]
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results["cases"]) == list(results["seconds"]) == ran
    assert "illegal memory access" in results["cases"]["lose"]["error"]


def _fails(*_: Any) -> Any:
    raise RuntimeError("the GPU is lost")


def test_the_script_asks_for_a_folder() -> None:
    script = Path(gpu.__file__).with_name("gpu.sh")
    finished = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert finished.returncode == 2
    assert "usage: benchmarks/gpu.sh FOLDER" in finished.stderr


def _parts(folder: Path, steps: dict[str, tuple[int, str]]) -> Path:
    """What gpu.sh leaves of steps that ended with a code and said something."""
    folder.mkdir()
    for name, (code, said) in steps.items():
        (folder / f"{name}.log").write_text(said)
        with open(folder / "steps.txt", "a") as file:
            file.write(f"{name} {code} 3\n")
    return folder


def test_the_report_tells_what_ran_and_what_did_not(tmp_path: Path) -> None:
    steps = {
        "build": (0, ""),
        "sanitizer": (1, "Error: Device not supported"),
        "tests": (124, "the last words"),
    }
    parts = _parts(tmp_path / "parts", steps)
    (parts / "measure.log").write_text("cut off")
    outcomes = [
        {"test": "a", "outcome": "began"},
        {"test": "a", "outcome": "passed", "seconds": 2.5, "said": ""},
        {"test": "b", "outcome": "failed", "seconds": 1.0, "said": "assert 1 == 2"},
        {"test": "c", "outcome": "began"},
    ]
    lines = [json.dumps(outcome) for outcome in outcomes]
    (parts / "outcomes-0.jsonl").write_text("\n".join(lines) + '\n{"test": "cut o')
    (parts / "shard-0.txt").write_text("Segmentation fault")
    assert gpu_report.main(parts, tmp_path) == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: step["state"] for name, step in content["steps"].items()} == {
        "build": "passed",
        "doctor": "did not begin",
        "sanitizer": "cannot run here",
        "tests": "out of time",
        "measure": "did not end",
        "suite": "did not begin",
    }
    assert content["steps"]["tests"]["said_last"] == "the last words"
    assert content["tests"]["counts"] == {"passed": 1, "failed": 1, "began": 1}
    assert content["tests"]["not_passed"] == {"b": "assert 1 == 2", "c": ""}
    assert "Segmentation fault" in (tmp_path / "gpu.log").read_text()
    (parts / "steps.txt").write_text("build 0 3\nsanitizer 127 0\ntests 0 3\n")
    assert gpu_report.main(parts, tmp_path) == 0


SHARDS = 3
STUB = """#!/bin/bash
# Stands for Python: fails where it is told to, and leaves what the real one would leave.
echo "$@" >>"$SAID"
case "$*" in
*gpu_report.py*) exec {python} "$@" ;;
*"pip install"*) exit ${{BUILD:-0}} ;;
*is_available*) exit 0 ;;
*pytest*--outcomes*)
    echo '{{"test": "t'$$'", "outcome": "'${{OUTCOME:-passed}}'"}}' >>"${{@: -1}}"
    exit ${{TESTS:-0}} ;;
*benchmarks.gpu*)
    [ -e "${{@: -1}}" ] || {{ echo '{{"lost": 1}}' >"${{@: -1}}"; exit 75; }}
    echo '{{"lost": 0}}' >"${{@: -1}}" ;;
esac
"""


def _run_script(folder: Path, **environment: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, gpu.json, what Python was asked for) of gpu.sh with a stub for Python."""
    stub = folder / "python"
    stub.write_text(STUB.format(python=sys.executable))
    (folder / "compute-sanitizer").write_text('#!/bin/bash\nexec "${@:7}"\n')
    (folder / "nproc").write_text(f"#!/bin/bash\necho {SHARDS}\n")
    for name in ("python", "compute-sanitizer", "nproc"):
        (folder / name).chmod(0o755)
    said = folder / "said"
    finished = subprocess.run(
        ["bash", str(Path(gpu.__file__).with_name("gpu.sh")), str(folder / "out")],
        env=os.environ
        | {"PYTHON": str(stub), "PATH": f"{folder}:{os.environ['PATH']}", "SAID": str(said)}
        | environment,
        capture_output=True,
        text=True,
    )
    content = json.loads((folder / "out" / "gpu.json").read_text())
    return finished.returncode, content, said.read_text()


def test_the_script_runs_every_step(tmp_path: Path) -> None:
    code, content, said = _run_script(tmp_path)
    assert code == 0
    states = {name: step["state"] for name, step in content["steps"].items()}
    assert states == dict.fromkeys(
        ("build", "doctor", "sanitizer", "tests", "measure", "suite"), "passed"
    )
    assert content["tests"]["counts"]["passed"] == SHARDS
    assert said.count("benchmarks.gpu") == 2  # again after the GPU was lost
    assert content["measured"] == {"lost": 0}
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["gpu.json", "gpu.log"]


def test_what_fails_loses_no_other_results(tmp_path: Path) -> None:
    code, content, _ = _run_script(tmp_path, BUILD="1", TESTS="1", OUTCOME="failed")
    assert code == 1
    states = {name: step["state"] for name, step in content["steps"].items()}
    assert states.pop("build") == states.pop("build-without-cpu") == "failed"
    assert states.pop("tests") == "failed"
    assert states == dict.fromkeys(("doctor", "sanitizer", "measure", "suite"), "passed")
    assert content["tests"]["counts"]["failed"] == SHARDS


def test_tests_go_on_in_another_process_where_one_died(tmp_path: Path) -> None:
    _, content, _ = _run_script(tmp_path, TESTS="139", OUTCOME="began")
    assert content["tests"]["counts"]["began"] == 5 * SHARDS
    assert content["steps"]["tests"]["state"] == "failed"
    assert content["steps"]["measure"]["state"] == "passed"
