"""One thread, fixed seeds: numbers in tests repeat. What a release is too old for is skipped and says so."""

import os
import sys

os.environ.setdefault(
    "TORCHINDUCTOR_COMPILE_THREADS", "1"
)  # else each compiling test starts a pool of processes

import pytest
import torch
from commands import Run
from kept_operators import keep_operators
from optional import skipping
from warm import begin_warming, warm_python

from normfix.storage import fresh

INTERPRETER = fresh.interpreter
torch.set_num_threads(1)
keep_operators()


def pytest_ignore_collect(collection_path, config):
    """Import for `-m cuda` what has such tests alone: a GPU machine has few of the libraries that the others need."""
    if config.getoption("markexpr") == "cuda" and collection_path.suffix == ".py":
        return "pytest.mark.cuda" not in collection_path.read_text(encoding="utf-8") or None
    return None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _warm():
    """Let fresh processes begin with torch imported."""
    begin_warming()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "interpreter", lambda: str(warm_python()))
        yield


@pytest.fixture(autouse=True)
def _cold(request, monkeypatch) -> None:
    """Let fresh processes of tests marked `cold` begin as they do outside of tests."""
    if request.node.get_closest_marker("cold"):
        monkeypatch.setattr(fresh, "interpreter", INTERPRETER)


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line in this process; gives (code, out, err)."""
    from normfix.cli import main

    def call(*words) -> Run:
        monkeypatch.setattr(sys, "argv", ["normfix", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return Run(caught.value.code, *capsys.readouterr())

    return call


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Run a test."""
    with skipping():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    """Make what a test needs."""
    with skipping():
        return (yield)
