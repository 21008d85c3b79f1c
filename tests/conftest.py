"""One thread, fixed seeds: numbers in tests repeat. What a release is too old for is skipped and says so."""

import pytest
import torch
from optional import skipping

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
