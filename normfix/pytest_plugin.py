"""A fixture for test suites: `tile_invariant(model_or_pipeline, image)` fails unless tiles do not matter.

Loading this plugin does not import torch and changes nothing in a suite that does not use the fixture. The
options --normfix-tile, --normfix-threshold and --normfix-report, and the ini keys normfix_tile and
normfix_threshold, are its defaults; what a test passes itself counts more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import Unpack

if TYPE_CHECKING:
    from normfix.proof.check import CheckOptions
    from normfix.records.verdicts import Verdict
    from normfix.reporting.maps import Maps

__all__ = ["tile_invariant"]

_LONGEST = 150
"""Characters of a page's name: most systems have 255 bytes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options and ini keys."""
    group = parser.getgroup("normfix", "tile-invariance")
    group.addoption("--normfix-tile", type=int, metavar="N", help="tile size of the tile_invariant fixture")
    group.addoption(
        "--normfix-threshold",
        type=float,
        metavar="SD",
        help="largest difference in sd that the tile_invariant fixture passes",
    )
    group.addoption(
        "--normfix-report",
        metavar="DIR",
        help="folder for an HTML report of every check that does not pass",
    )
    parser.addini("normfix_tile", "tile size of the tile_invariant fixture")
    parser.addini("normfix_threshold", "largest difference in sd that the tile_invariant fixture passes")


@pytest.fixture
def tile_invariant(request: pytest.FixtureRequest) -> Callable[..., Verdict]:
    """Return `normfix.assert_tile_invariant` with the run's defaults; takes what that takes."""
    from normfix.errors import NormfixError
    from normfix.proof.check import check
    from normfix.reporting.sentences import explanation

    config = request.config
    usual = _number(config, "tile", int)
    threshold = _number(config, "threshold", float)
    folder = config.getoption("--normfix-report")

    def fixture(
        model: Any, image: Any, tile: int | Sequence[int] | None = usual, **options: Unpack[CheckOptions]
    ) -> Verdict:
        __tracebackhide__ = True
        if threshold is not None:
            options.setdefault("threshold", threshold)
        views: list[Maps] = []
        if folder:
            options.setdefault("viewer", views.append)
        try:
            verdict = check(model, image, tile, **options)
        except NormfixError as error:
            # it says what to do; where normfix found out is of no use to a suite
            raise error.with_traceback(None) from None
        if not verdict.passed:
            said = explanation(verdict)
            try:
                if folder:
                    _write(Path(folder), request.node.nodeid, verdict, *views[:1])
            except OSError as error:  # the test fails for what it asserts, whatever becomes of its page
                said += f"\n--normfix-report {folder}: no page was written: {error.strerror or error}."
            raise AssertionError(said)
        return verdict

    return fixture


def _number(config: pytest.Config, name: str, kind: Callable[[str], Any]) -> Any:
    """Return an option, else the ini key of that name, else None."""
    option = config.getoption(f"--normfix-{name}")
    given = config.getini(f"normfix_{name}")
    if option is not None or not given:
        return option
    try:
        return kind(given)
    except ValueError as error:
        raise pytest.UsageError(f"normfix_{name} = {given}: give a number") from error


def _write(folder: Path, test: str, verdict: Verdict, maps: Maps | None = None) -> None:
    from normfix.reporting.report import text_of

    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", test).strip("-")
    if "[" in test or len(name) > _LONGEST:  # cases may differ in signs alone, and be of any length
        name = f"{name[:_LONGEST]}-{hashlib.sha256(test.encode()).hexdigest()[:8]}"
    (folder / f"{name}.html").write_text(text_of(".html", verdict, maps), encoding="utf-8")
