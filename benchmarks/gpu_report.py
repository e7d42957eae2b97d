"""What benchmarks/gpu.sh came to: `python benchmarks/gpu_report.py PARTS FOLDER` makes one JSON and
one log in FOLDER of what the steps left in PARTS so far. Imports nothing of the package, which may
not have been built.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

STEPS = ("build", "build-without-cpu", "doctor", "sanitizer", "tests", "measure", "suite")
MUST_PASS = ("build", "tests", "sanitizer")
OUT_OF_TIME = (124, 137)  # of timeout: by a signal, or by the one that cannot be caught
TAIL = 2000  # characters of a failed step's output


def report(parts: Path, folder: Path) -> dict[str, Any]:
    """Writes FOLDER/gpu.json and FOLDER/gpu.log; returns what the JSON holds."""
    content: dict[str, Any] = {"steps": _steps(parts), "tests": _tests(parts)}
    for name, file in (("measured", "measured.json"), ("suite", "suite/results.json")):
        if (parts / file).exists():
            content[name] = json.loads((parts / file).read_text())
    _write(json.dumps(content, indent=1) + "\n", folder / "gpu.json")
    logs = [(name, parts / f"{name}.log") for name in STEPS]
    logs += [(f"tests, {file.stem}", file) for file in sorted(parts.glob("shard-*.txt"))]
    said = [f"== {name}\n{_read(log)}\n" for name, log in logs if log.exists()]
    _write("".join(said), folder / "gpu.log")
    return content


def failed_steps(content: dict[str, Any]) -> list[str]:
    """Of those that must pass; one that this machine cannot run has a reason instead."""
    steps = content["steps"]
    return [
        name
        for name in MUST_PASS
        if name in steps and steps[name]["state"] not in ("passed", "cannot run here")
    ]


def _steps(parts: Path) -> dict[str, dict[str, Any]]:
    """By name, in the order of gpu.sh; a step that has not ended has no exit code."""
    file = parts / "steps.txt"
    ended = {}
    for line in _read(file).splitlines() if file.exists() else ():
        name, code, seconds = line.split()
        ended[name] = {"exit_code": int(code), "seconds": int(seconds)}
    steps = {}
    for name in STEPS:
        log = parts / f"{name}.log"
        if name not in ended:
            if name != "build-without-cpu":
                steps[name] = {"state": "did not end" if log.exists() else "did not begin"}
            continue
        said = _read(log) if log.exists() else ""
        steps[name] = {"state": _state(name, ended[name]["exit_code"], said), **ended[name]}
        if steps[name]["state"] != "passed":
            steps[name]["said_last"] = said[-TAIL:]
    return steps


def _state(name: str, code: int, said: str) -> str:
    if code == 0:
        return "passed"
    # Some machines have no compute-sanitizer, and some virtual ones keep it from the GPU.
    if name == "sanitizer" and (code == 127 or "Device not supported" in said):
        return "cannot run here"
    return "out of time" if code in OUT_OF_TIME else "failed"


def _tests(parts: Path) -> dict[str, Any]:
    """How many tests ended how, and what those that did not pass said.

    A test that began and has no end took its process along.
    """
    outcomes: dict[str, dict[str, Any]] = {}
    for file in sorted(parts.glob("outcomes-*.jsonl")):
        for line in _read(file).splitlines():
            try:
                outcome = json.loads(line)
            except json.JSONDecodeError:  # cut off while it was written
                continue
            outcomes[outcome.pop("test")] = outcome
    counts = Counter(outcome["outcome"] for outcome in outcomes.values())
    others = {
        test: outcome.get("said", "")
        for test, outcome in outcomes.items()
        if outcome["outcome"] != "passed"
    }
    slowest = sorted(outcomes, key=lambda test: -outcomes[test].get("seconds", 0))[:10]
    return {
        "counts": dict(counts),
        "not_passed": others,
        "slowest_s": {test: outcomes[test].get("seconds", 0) for test in slowest},
    }


def _write(text: str, path: Path) -> None:
    """Under a temporary name first: killed at any time, `path` is the old report or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _read(path: Path) -> str:
    return path.read_text(errors="replace")


def main(parts: Path, folder: Path) -> int:
    content = report(parts, folder)
    failed = failed_steps(content)
    states = [f"{name}: {step['state']}" for name, step in content["steps"].items()]
    print("; ".join(states), content["tests"]["counts"] or "")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
