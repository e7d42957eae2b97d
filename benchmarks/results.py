"""The results of a session as plain data, and the questions that every report asks of them."""

import importlib.metadata
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from leedl_fast.benchmarks.suite import OURS, Recorder
from leedl_fast.files import write_file
from leedl_fast.testing.bench import Ceilings, machine

SCHEMA = 1

Results = dict[str, Any]


def collect(recorder: Recorder) -> Results:
    """Everything that the reports need, ready for JSON."""
    settings, ceilings = recorder.settings, recorder.measure_ceilings()
    for case in recorder.cases:
        for row in ran(case):
            row["percent"] = percent_of_ceiling(row, case["dtype"], ceilings)
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": importlib.metadata.version("leedl_fast"),
        "tier": settings.tier,
        "backend": settings.backend,
        "machine": machine(settings.device)
        | {"instruction_set": _instruction_set(settings.backend)},
        "ceilings": {
            "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
            "read_gb_per_s": ceilings.read_bytes_per_s / 1e9,
            "matmul_gflop_per_s": {
                dtype: rate / 1e9 for dtype, rate in ceilings.matmul_flop_per_s.items()
            },
        },
        "cases": recorder.cases,
        "curves": recorder.curves,
        "failures": recorder.failures,
    }


def percent_of_ceiling(row: dict[str, Any], dtype: str, ceilings: Ceilings) -> float | None:
    """Of the copy or read bandwidth where bytes limit, of the matrix rate where arithmetic does.

    Two-byte numbers can be multiplied as float32: there the faster of both rates limits.
    """
    if "gb_per_s" in row:
        return 100 * row["gb_per_s"] * 1e9 / ceilings.copy_bytes_per_s
    if "read_gb_per_s" in row:
        return 100 * row["read_gb_per_s"] * 1e9 / ceilings.read_bytes_per_s
    rates = ceilings.matmul_flop_per_s
    peak = rates.get(dtype)
    if dtype in ("bfloat16", "float16"):
        peak = max(rates.get(dtype, 0.0), rates.get("float32", 0.0))
    return 100 * row["gflop_per_s"] * 1e9 / peak if peak and "gflop_per_s" in row else None


def _instruction_set(backend: str) -> str | None:
    """What the compiled CPU module was built for."""
    if backend != "cpu":
        return None
    from leedl_fast.backends import cpu_modules

    return cpu_modules.isa()


def save(results: Results, path: Path) -> None:
    write_file((json.dumps(results, indent=1, allow_nan=False) + "\n").encode(), path)


def ours(case: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in case["implementations"] if row["name"] == OURS)


def ran(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The implementations that could be measured."""
    return [row for row in case["implementations"] if row["reason"] is None]


def peers(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The other implementations that ran."""
    return [row for row in case["implementations"] if row["name"] != OURS and row["reason"] is None]


def strongest_peer(case: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest other implementation that is not wrong."""
    right = [row for row in peers(case) if row["accurate"] is not False]
    return min(right, key=lambda row: row["median_ms"], default=None)


def bars(results: Results) -> list[dict[str, Any]]:
    """Every speed-up that the project asks for, with what was measured."""
    return [
        bar | {"op": case["op"], "case": f"{case['name']}, {case['sizes']}", "met": met(bar)}
        for case in results["cases"]
        for bar in case["bars"]
    ]


def met(bar: dict[str, Any]) -> bool:
    return bar["measured"] is not None and bar["measured"] >= bar["at_least"]
