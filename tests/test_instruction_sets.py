"""Which of the compiled modules are loaded, and when."""

import importlib

import pytest

from leedl_fast.backends import cpu_modules


class Baseline:
    """A processor without vector extensions, as the baseline module sees it."""

    @staticmethod
    def processor_can_run(isa):
        return isa == "baseline"


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_nothing_is_loaded_that_the_processor_cannot_run(isa, monkeypatch):
    """The first thing a module does, binding its functions, is already compiled for its set."""
    load = cpu_modules._load.__wrapped__
    monkeypatch.setattr(cpu_modules, "_load", lambda isa: Baseline)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} is loaded"))
    assert load(isa) == f"this processor has no {isa.upper()}"


def test_without_the_baseline_nothing_is_loaded(monkeypatch):
    load = cpu_modules._load.__wrapped__
    monkeypatch.setattr(cpu_modules, "_load", lambda isa: "no C++ compiler was found")
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} is loaded"))
    assert load("avx512") == "no C++ compiler was found"


def test_the_processor_runs_what_it_says():
    baseline = cpu_modules.modules()["baseline"]
    assert baseline.processor_can_run("baseline")
    assert not baseline.processor_can_run("avx1024")
    for isa in cpu_modules.modules():
        assert baseline.processor_can_run(isa)
