"""A fixture for test suites: `tile_invariant(model, image)` fails unless tiles equal the whole image.

Loading this plugin does not import torch and changes nothing in a suite that does not use the fixture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from normfix.records import Verdict

__all__ = ["tile_invariant"]


@pytest.fixture
def tile_invariant() -> Callable[..., Verdict]:
    """Return `normfix.assert_tile_invariant`."""
    from normfix.pipeline import assert_tile_invariant

    return assert_tile_invariant
