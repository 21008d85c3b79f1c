"""What not every supported release has: tests that need it are skipped, with the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from normfix.errors import NormfixError
from normfix.networks.releases import writes_archives

NO_ZARR = "zarr 3 is not installed; it needs Python 3.11"
NO_PROGRAMS = "NF420: programs (.pt2) need torch 2.8"
HAS_ZARR = importlib.util.find_spec("zarr") is not None

needs_zarr = pytest.mark.skipif(not HAS_ZARR, reason=NO_ZARR)
needs_programs = pytest.mark.skipif(not writes_archives(), reason=NO_PROGRAMS)


def needs_newer_torch(reason: str) -> pytest.MarkDecorator:
    """Skip a test on torch before 2.8, where what it shows is otherwise."""
    return pytest.mark.skipif(not writes_archives(), reason=f"before torch 2.8 {reason}")


class _Missing:
    """A library that is not there: whoever uses it is skipped."""

    def __getattr__(self, name: str) -> object:
        pytest.skip(NO_ZARR)


if HAS_ZARR:
    import zarr
else:
    zarr = _Missing()


@contextmanager
def skipping() -> Iterator[None]:
    """Skip what normfix refuses because a release is too old; where it is not, the refusal is a failure."""
    try:
        yield
    except NormfixError as error:
        if error.code == "NF420" and not writes_archives():
            pytest.skip(NO_PROGRAMS)
        if error.code in ("NF143", "NF326") and "normfix[stream]" in error.message and not HAS_ZARR:
            pytest.skip(NO_ZARR)
        raise
