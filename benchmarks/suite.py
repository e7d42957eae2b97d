"""What every benchmark shares: cases, the correctness gate before timing, and the results.

A benchmark names its implementations and what they should return; `Measure` calls each one once,
compares it with the float64 reference, and only then times all of them, interleaved. A case fails
when leedl_fast is wrong. A peer that cannot run, or is wrong, keeps its row, with the reason.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from leedl_fast.testing.bench import (
    Ceilings,
    Function,
    make_plan,
    measure_ceilings,
    peak_memory,
    synchronized,
)
from leedl_fast.testing.compare import allowed_error, max_error

TIERS = ("tiny", "quick", "full")
OURS = "leedl_fast"
EAGER = "eager"
COMPILED = "torch.compile"
SLOW_S = 0.2  # of a first call: what it costs more than a later one no longer counts
SEED = 0  # of torch's generator before the call that is checked


@dataclass(frozen=True)
class Settings:
    """tier: "tiny" (does it run?), "quick" (five minutes) or "full". backend: ours in this run."""

    tier: str = "quick"
    backend: str = "cpu"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def budget_s(self) -> float:
        """Seconds to time all implementations of a case; half as many where it has no bars."""
        return {"tiny": 0.02, "quick": 3.0, "full": 10.0}[self.tier]


@dataclass(frozen=True)
class Work:
    """The arithmetic or the memory traffic that a case needs, whichever limits it.

    bytes: read and written; read_bytes: of a case that writes next to nothing.
    """

    flops: float | None = None
    bytes: float | None = None
    read_bytes: float | None = None


@dataclass(frozen=True)
class Case:
    """One row group of the report.

    name: what is computed; unique within the op together with sizes and dtype.
    bars: by peer, the least speed-up that the project asks for.
    series, x: the line of the scaling plot that the case is a point of, and its sequence length.
    memory: measure peak memory too.
    """

    op: str
    name: str
    sizes: str
    work: Work
    dtype: torch.dtype = torch.float32
    bars: Mapping[str, float] = field(default_factory=dict)
    series: str | None = None
    x: int | None = None
    memory: bool = False
    note: str | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return f"{self.op}: {self.name}, {self.sizes}, {self.dtype_name}"


@dataclass(frozen=True)
class Expected:
    """One output: its float64 reference, and the error that is allowed.

    index: the part of the output that the reference covers.
    """

    name: str
    reference: Tensor
    limit: float
    index: tuple = (...,)

    @classmethod
    def of(
        cls,
        name: str,
        reference: Tensor,
        plain: Tensor,
        dtype: torch.dtype,
        index: tuple = (...,),
    ) -> "Expected":
        """plain: what plain PyTorch makes of it in `plain_dtype(dtype)`, which sets the limit."""
        reference = reference.detach()
        return cls(name, reference, allowed_error(plain.detach(), reference, dtype), index)

    def error(self, output: Tensor) -> float:
        return max_error(output[self.index], self.reference)


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 has no better reference than itself: there plain PyTorch computes in float32."""
    return torch.float32 if dtype == torch.float64 else dtype


@dataclass(frozen=True)
class Implementation:
    """One contender.

    function: one call; returns its outputs in the order of the case's expectations.
    compiled: the first call compiles; its time is reported apart.
    expected: what it should return where that differs from the other implementations, because it
        draws noise of its own from the generator that torch.manual_seed(SEED) starts.
    random: it draws noise that no reference knows; only shapes are checked, and that all is finite.
    """

    function: Function
    compiled: bool = False
    expected: Sequence[Expected] | None = None
    random: bool = False


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Recorder:
    """The results of a session, and a pytest plugin that collects them.

    on_status is told what is being done; on_tick is called between samples, for a clock on the
    screen that must not run while a sample is taken. prints: show the tables when pytest ends.
    """

    settings: Settings
    prints: bool = False
    cases: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    on_status: Callable[[str], None] = lambda text: None
    on_tick: Callable[[], None] = lambda: None
    ceilings: Ceilings | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note_failure(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note_failure(report)

    def _note_failure(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.failures.append({"benchmark": report.nodeid.split("::")[-1], "message": message})

    def measure_ceilings(self) -> Ceilings:
        """The best of this call and the earlier ones: a ceiling is what no noise has lowered."""
        self.on_status("measuring the machine's ceilings")
        tiny = self.settings.tier == "tiny"
        measured = measure_ceilings(
            self.settings.device,
            (torch.float32, torch.float64, torch.bfloat16),
            copy_bytes=(1 << 20) if tiny else (256 << 20),
            matmul_size=64 if tiny else 2048,
            budget_s=0.01 if tiny else 1.0,
        )
        self.ceilings = measured.best(self.ceilings) if self.ceilings else measured
        return self.ceilings


class Measure:
    """The `measure` fixture: gate, time and record one case with one pytest-benchmark benchmark."""

    def __init__(self, benchmark: Any, recorder: Recorder) -> None:
        self.benchmark, self.recorder = benchmark, recorder
        self.settings = recorder.settings

    def __call__(
        self,
        case: Case,
        implementations: Mapping[str, Implementation],
        expected: Sequence[Expected],
    ) -> None:
        if self.recorder.ceilings is None:
            self.recorder.measure_ceilings()
        torch.compiler.reset()  # past its limit of recompilations torch.compile runs eagerly
        rows: dict[str, dict[str, Any]] = {}
        functions: dict[str, Function] = {}
        for name, implementation in implementations.items():
            doing = "compiling and checking" if implementation.compiled else "checking"
            self.recorder.on_status(f"{case.title}: {doing} {name}")
            rows[name] = self._first_call(name, implementation, expected)
            if rows[name]["reason"] is None:
                functions[name] = synchronized(implementation.function, self.settings.device)
        if case.memory:
            for name, function in functions.items():
                self.recorder.on_status(f"{case.title}: peak memory of {name}")
                rows[name]["peak_memory_bytes"] = peak_memory(function, self.settings.device)
        self._time(case, functions, rows)
        self.benchmark.extra_info["implementations"] = list(rows.values())
        self.recorder.cases.append(self._record(case, rows))
        if not rows[OURS]["accurate"]:
            raise AssertionError(
                f"{case.title}: leedl_fast is outside the allowed error: {rows[OURS]['errors']}"
            )

    def _first_call(
        self, name: str, implementation: Implementation, expected: Sequence[Expected]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": name,
            "backend": self.settings.backend if name == OURS else None,
            "reason": None,
            "compile_s": None,
            "first_call_s": None,
            "max_error": None,
            "errors": [],
            "accurate": None,
        }
        torch.manual_seed(SEED)
        start = time.perf_counter()
        try:
            outputs = _flatten(implementation.function())
        except Exception as error:
            if name == OURS:
                raise
            row["reason"] = _one_line(error)
            return row
        seconds = time.perf_counter() - start
        row["compile_s" if implementation.compiled else "first_call_s"] = seconds
        own = expected if implementation.expected is None else implementation.expected
        if implementation.random:
            row["accurate"] = all(
                output.shape == each.reference.shape and bool(output.isfinite().all())
                for output, each in zip(outputs, own, strict=True)
            )
            return row
        errors = [each.error(output) for output, each in zip(outputs, own, strict=True)]
        limits = [each.limit for each in own]
        row["accurate"] = all(e <= limit for e, limit in zip(errors, limits, strict=True))
        row["errors"] = [
            {"output": each.name, "error": _json_number(error), "limit": limit}
            for each, error, limit in zip(own, errors, limits, strict=True)
        ]
        row["max_error"] = _json_number(max(errors))
        return row

    def _time(
        self,
        case: Case,
        functions: Mapping[str, Function],
        rows: Mapping[str, dict[str, Any]],
    ) -> None:
        self.recorder.on_status(f"{case.title}: warming up")
        slow = {
            name: row["first_call_s"]
            for name, row in rows.items()
            if (row["first_call_s"] or 0.0) > SLOW_S
        }
        budget_s = self.settings.budget_s / (1 if case.bars else 2)
        plan = make_plan(functions, budget_s, known_s=slow)
        self.recorder.on_status(f"{case.title}: timing {len(plan)} samples")
        names = iter(plan)

        def take_turn() -> tuple[tuple, dict]:
            self.recorder.on_tick()
            name = next(names)
            return (functions[name], range(plan.calls[name])), {}

        self.benchmark.pedantic(_call, setup=take_turn, rounds=len(plan))
        timings = plan.timings(self.benchmark.stats.stats.data)
        for name, timing in timings.items():
            rows[name].update(
                median_ms=1e3 * timing.median,
                lower_quartile_ms=1e3 * timing.lower_quartile,
                upper_quartile_ms=1e3 * timing.upper_quartile,
                samples=timing.samples,
                calls_per_sample=plan.calls[name],
                speed_up=timing.median / timings[OURS].median,
                **_rates(case.work, timing.median),
            )

    def _record(self, case: Case, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "op": case.op,
            "name": case.name,
            "sizes": case.sizes,
            "dtype": case.dtype_name,
            "series": case.series,
            "x": case.x,
            "note": case.note,
            "work": asdict(case.work),
            "implementations": list(rows.values()),
            "bars": [
                {
                    "against": peer,
                    "at_least": target,
                    "measured": rows[peer].get("speed_up"),
                }
                for peer, target in case.bars.items()
            ],
        }


def _call(function: Function, times: range) -> None:
    for _ in times:
        function()


def _rates(work: Work, seconds: float) -> dict[str, float]:
    rates = {}
    if work.bytes is not None:
        rates["gb_per_s"] = work.bytes / seconds / 1e9
    if work.read_bytes is not None:
        rates["read_gb_per_s"] = work.read_bytes / seconds / 1e9
    if work.flops is not None:
        rates["gflop_per_s"] = work.flops / seconds / 1e9
    return rates


def _flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in _flatten(output)]


def _json_number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _one_line(error: Exception) -> str:
    """The first line that says something; the messages of torch.compile run over pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
