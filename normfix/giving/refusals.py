"""Why a network is not given back."""

from __future__ import annotations

from normfix.errors import NormfixError

__all__ = ["NotAlone", "NotGiven", "Unequal", "Unfit"]


class NotGiven(NormfixError):  # noqa: N818 - what happened, as its siblings are named
    """No BatchNorm could hold what this network computes, whatever its library offers (NF550)."""


class Unfit(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """The library's network has other norms or weights than the converted one (NF551)."""


class Unequal(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """The library's network holds the constants and gives another output (NF552)."""


class NotAlone(NormfixError):  # noqa: N818 - what happened
    """What was written does not give the same in its own tool alone (NF554)."""
