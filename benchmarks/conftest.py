"""Options and the `measure` fixture of the benchmark suite: `pytest benchmarks/ --tier quick`."""

import re
from pathlib import Path
from typing import Any

import pytest

from leedl_fast.benchmarks.report import print_report
from leedl_fast.benchmarks.results import collect
from leedl_fast.benchmarks.suite import TIERS, Measure, Recorder, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("leedl_fast")
    group.addoption("--tier", choices=TIERS, default="quick", help="how much to measure")
    group.addoption("--backend", default="cpu", help="the backend measured as leedl_fast")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark's own table mixes the implementations of a case; ours replaces it.
    config.option.benchmark_quiet = True
    if not _recorders(config):
        settings = Settings(config.getoption("--tier"), config.getoption("--backend"))
        config.pluginmanager.register(Recorder(settings, prints=True))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Makes `pytest benchmarks/` find the suite, whose files are not called test_*.py."""
    known = parent.config.getini("python_files")
    named = parent.session.isinitpath(file_path)  # pytest collects what the command line names
    if file_path.match("bench_*.py") and not named and "bench_*.py" not in known:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        (recorder,) = _recorders(metafunc.config)
        cases = metafunc.module.cases(recorder.settings)
        metafunc.parametrize("case", cases, ids=_identifier)


def pytest_terminal_summary(config: pytest.Config) -> None:
    (recorder,) = _recorders(config)
    if recorder.prints and recorder.cases:
        print_report(collect(recorder))


@pytest.fixture
def recorder(request: pytest.FixtureRequest) -> Recorder:
    (recorder,) = _recorders(request.config)
    return recorder


@pytest.fixture
def measure(benchmark: Any, recorder: Recorder) -> Measure:
    return Measure(benchmark, recorder)


def _recorders(config: pytest.Config) -> list[Recorder]:
    return [plugin for plugin in config.pluginmanager.get_plugins() if isinstance(plugin, Recorder)]


def _identifier(case: Any) -> str:
    return re.sub("[^a-z0-9]+", "-", f"{case.name} {case.sizes} {case.dtype}".lower())
