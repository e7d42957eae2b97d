"""`leedl-fast bench`: run the suite with pytest, show what it is doing, and write the report."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from leedl_fast.benchmarks import results as r
from leedl_fast.benchmarks.report import format_ms, print_report, verdict, write_report
from leedl_fast.benchmarks.suite import Recorder, Settings
from leedl_fast.testing.bench import machine_name

FOLDER = Path(__file__).parent
OPS = tuple(sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")))
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def bench(
    quick: bool,
    output: Path,
    ops: Sequence[str] | None = None,
    *,
    save_results: bool = False,
    tiny: bool = False,
    backend: str = "cpu",
    device: str = "cpu",
) -> Path:
    """Measure, print the tables and write the report into the folder `output`.

    Args:
        quick: about five minutes on two cores, instead of every size.
        output: the folder, made if need be; results.json, the plots and index.html go there.
        ops: the benchmarks to run, of OPS; all by default.
        save_results: also write benchmarks/results/<machine>.json beside this file.
        tiny: the smallest sizes, to see that everything runs; the times mean nothing.
        backend: the backend that is measured as leedl_fast.
        device: where everything runs.

    Returns:
        The path of the page.

    Raises:
        SystemExit: 2, after one line that says why, when nothing could be measured; 1 when a case
            failed (the report says which); 130 after Ctrl-C (the report holds what was finished).
    """
    ops = _check_ops(ops)
    _check_backend(backend, device)
    _check_folder(output)
    tier = "tiny" if tiny else "quick" if quick else "full"
    recorder = Recorder(Settings(tier, backend, torch.device(device)))
    console = Console()
    with _Screen(console, recorder) as screen:
        status = pytest.main(_pytest_arguments(ops), plugins=[recorder, screen])
    if status not in (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
        pytest.ExitCode.INTERRUPTED,
    ):
        _stop(f"pytest could not run the benchmarks: {pytest.ExitCode(status).name}")
    results = r.collect(recorder)
    print_report(results, console)
    page = write_report(results, output)
    if save_results:
        folder = FOLDER / "results"
        folder.mkdir(exist_ok=True)
        r.save(results, folder / f"{machine_name(results['machine'])}.json")
    console.print(f"\nreport: {page.resolve()}", soft_wrap=True)
    if screen.interrupted:
        console.print(f"interrupted: {len(recorder.cases)} of {screen.total} benchmarks are in it")
        raise SystemExit(EXIT_INTERRUPTED)
    if recorder.failures:
        raise SystemExit(1)
    return page


def _pytest_arguments(ops: Sequence[str]) -> list[str]:
    return [
        *(str(FOLDER / f"bench_{op}.py") for op in ops),
        f"-c{FOLDER / 'pytest_settings.toml'}",
        f"--rootdir={FOLDER}",
        "-pno:terminal",
        "-pno:cacheprovider",
        "--benchmark-disable-gc",
    ]


def _check_ops(ops: Sequence[str] | None) -> Sequence[str]:
    for op in ops or ():
        if op not in OPS:
            _stop(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return ops or OPS


def _check_backend(backend: str, device: str) -> None:
    """Without the compiled kernels there is nothing to compare: say so before anything runs."""
    from leedl_fast import attention

    q = torch.zeros(1, 1, 1, 1, device=device)
    try:
        attention(q, q, q, backend=backend)
    except (NotImplementedError, ValueError) as error:
        _stop(str(error))


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _stop(
            f"output must be a folder that can be written to, got {str(folder)!r}: {error.strerror}"
        )


def _stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR)


class _Screen:
    """A pytest plugin: a progress bar, and a line for every finished benchmark.

    It redraws only between samples: a thread that redraws would take time from what is measured.
    """

    def __init__(self, console: Console, recorder: Recorder) -> None:
        self.console, self.recorder = console, recorder
        self.total, self.interrupted = 0, False
        self._shown = 0
        self._progress = Progress(
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)
        recorder.on_status = self._show
        recorder.on_tick = self._progress.refresh

    def __enter__(self) -> "_Screen":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        self._progress.refresh()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)
        self._progress.update(self._task, total=self.total)

    def pytest_keyboard_interrupt(self) -> None:
        self.interrupted = True

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._progress.advance(self._task)
        for case in self.recorder.cases[self._shown :]:
            title = f"{case['op']}: {case['name']}, {case['sizes']}, {case['dtype']}"
            time = format_ms(r.ours(case)["median_ms"])
            self.console.print(Text(f"{title}: {time} ms, {verdict(case)}"), soft_wrap=True)
        self._shown = len(self.recorder.cases)
        self._progress.refresh()
