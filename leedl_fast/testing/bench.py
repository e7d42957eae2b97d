"""Fair measurements on a noisy machine: interleaved timing, peak memory, the machine's ceilings.

How many times faster one function is than another:

    timings = interleave({"mine": lambda: mine(x), "theirs": lambda: theirs(x)}, budget_s=2.0)
    print(timings["theirs"].median / timings["mine"].median)
"""

import ctypes
import functools
import gc
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Function = Callable[[], Any]

MIN_SAMPLE_S = 1e-3  # a sample of a faster function is the mean of several calls
MAX_SAMPLES_PER_CYCLE = 8  # of a function that is much faster than the slowest of its company


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """The statistics of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper, len(samples))


@dataclass(frozen=True)
class Plan:
    """Which function each sample calls: cycles of A B C B B, so that a slow phase hits all of them.

    cycle: names in the order of one cycle; a fast function stands there several times.
    calls: by name, calls per sample.
    cycles: how many times the cycle is gone through.
    """

    cycle: tuple[str, ...]
    calls: Mapping[str, int]
    cycles: int

    def __len__(self) -> int:
        return len(self.cycle) * self.cycles

    def __iter__(self) -> Iterator[str]:
        for _ in range(self.cycles):
            yield from self.cycle

    def timings(self, durations: Sequence[float]) -> dict[str, Timing]:
        """The timing of each function from the durations of the samples, in the plan's order."""
        samples: dict[str, list[float]] = {name: [] for name in self.cycle}
        for name, duration in zip(self, durations, strict=True):
            samples[name].append(duration / self.calls[name])
        return {name: Timing.of(values) for name, values in samples.items()}


def make_plan(
    functions: Mapping[str, Function],
    budget_s: float,
    *,
    known_s: Mapping[str, float] | None = None,
    min_cycles: int = 3,
    max_cycles: int = 100,
) -> Plan:
    """Warm every function up and plan samples that take about `budget_s` seconds together.

    At least `min_cycles` cycles are planned, however long they take. known_s: by name, the seconds
    of a call of a function that is warm already, and slow enough to be spared another one.
    """
    known_s = known_s or {}
    seconds = {
        name: known_s[name] if name in known_s else _estimate(function)
        for name, function in functions.items()
    }
    calls = {name: max(1, math.ceil(MIN_SAMPLE_S / s)) for name, s in seconds.items()}
    sample_s = {name: calls[name] * s for name, s in seconds.items()}
    slowest = max(sample_s.values())
    times = {
        name: max(1, min(MAX_SAMPLES_PER_CYCLE, int(slowest / (4 * s))))
        for name, s in sample_s.items()
    }
    cycle = tuple(
        name for turn in range(max(times.values())) for name in times if turn < times[name]
    )
    cycle_s = sum(sample_s[name] for name in cycle)
    cycles = max(min_cycles, min(max_cycles, int(budget_s / cycle_s)))
    return Plan(cycle, calls, cycles)


def _estimate(function: Function, enough_s: float = 0.02, most_calls: int = 50) -> float:
    """Seconds of the fastest of a few calls; they also warm the function up."""
    fastest, start = math.inf, time.perf_counter()
    for _ in range(most_calls):
        before = time.perf_counter()
        function()
        now = time.perf_counter()
        fastest = min(fastest, now - before)
        if now - start > enough_s:
            break
    return max(fastest, 1e-9)


def interleave(functions: Mapping[str, Function], budget_s: float = 2.0) -> dict[str, Timing]:
    """The timing of each function, from interleaved samples that take about `budget_s` in all.

    On a GPU a function must end with a synchronisation, see `synchronized`.
    """
    plan = make_plan(functions, budget_s)
    durations = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in plan:
            function, calls = functions[name], range(plan.calls[name])
            before = time.perf_counter()
            for _ in calls:
                function()
            durations.append(time.perf_counter() - before)
    finally:
        if collecting:
            gc.enable()
    return plan.timings(durations)


def synchronized(function: Function, device: torch.device) -> Function:
    """`function`, returning only when the device has finished the work."""
    if device.type == "cpu":
        return function

    def run() -> Any:
        result = function()
        torch.accelerator.synchronize(device)
        return result

    return run


def is_lost(device: torch.device) -> bool:
    """After an illegal access, whatever else the process asks of a GPU fails."""
    try:
        synchronized(lambda: None, device)()
    except RuntimeError:
        return True
    return False


def peak_memory(function: Function, device: torch.device | None = None) -> int | None:
    """Bytes that one call of `function` needs at most, beyond what is in use when it starts.

    On the CPU: the high-water mark of the process's resident memory, which counts the buffers of
    compiled kernels too, to about a megabyte. None where the system has no resettable mark (all but
    Linux).
    """
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _resident("VmRSS")
        function()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _return_freed_memory() -> None:
    """Freed heap memory counts as resident and would hide what the function allocates."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best, measured.

    copy_bytes_per_s: bytes read plus bytes written by a large `copy_`.
    read_bytes_per_s: of a large tensor that is only read, by the faster of two ways to reduce it
        (one sequence of addresses, or two side by side, which keep more of the memory busy).
    matmul_flop_per_s: by dtype name, of a large square `torch.mm`.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flop_per_s: dict[str, float]

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of each rate; both must know the same dtypes."""
        rates = {
            dtype: max(rate, other.matmul_flop_per_s[dtype])
            for dtype, rate in self.matmul_flop_per_s.items()
        }
        return Ceilings(
            max(self.copy_bytes_per_s, other.copy_bytes_per_s),
            max(self.read_bytes_per_s, other.read_bytes_per_s),
            rates,
        )


def measure_ceilings(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    copy_bytes: int = 256 << 20,
    matmul_size: int = 2048,
    budget_s: float = 0.5,
) -> Ceilings:
    """The best rates that are seen within about `budget_s` seconds each."""
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_s = _best(synchronized(lambda: target.copy_(source), device), budget_s)
    halves = source.view(2, -1)
    reads: tuple[Function, ...] = (lambda: source.amax(), lambda: torch.dot(*halves))
    read_s = min(_best(synchronized(read, device), budget_s / len(reads)) for read in reads)
    rates = {}
    for dtype in dtypes:
        a = torch.randn(matmul_size, matmul_size, device=device).to(dtype)
        b, c = a.t().contiguous(), torch.empty_like(a)
        product = functools.partial(torch.mm, a, b, out=c)
        seconds = _best(synchronized(product, device), budget_s)
        rates[str(dtype).removeprefix("torch.")] = 2 * matmul_size**3 / seconds
    return Ceilings(2 * source.nbytes / copy_s, source.nbytes / read_s, rates)


def _best(function: Function, budget_s: float) -> float:
    function()
    fastest, end = math.inf, time.perf_counter() + budget_s
    while time.perf_counter() < end:
        fastest = min(fastest, _estimate(function, enough_s=0.0))
    return fastest


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know to judge the numbers: the processor, its cores, and the versions."""
    return {
        "processor": _processor(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _total_memory(),
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
    }


def machine_name(facts: Mapping[str, Any]) -> str:
    """A file name for the kind of machine that has these facts: "amd-epyc-2-cores-avx512".

    The instruction set stands there because processors of several kinds call themselves alike.
    """
    isa = facts["torch_instruction_set"] if facts["device"] == "cpu" else ""
    text = f"{facts['processor']} {facts['cores']} cores {isa}".lower()
    return re.sub("[^a-z0-9]+", "-", text).strip("-")


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None
