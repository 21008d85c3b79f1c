"""What stages refuse, and is caught: whoever can take another way does."""

from __future__ import annotations

from normfix.errors import NormfixError

__all__ = ["NotInStages"]


class NotInStages(NormfixError):  # noqa: N818 - what it is, as its siblings are named
    """A network or an image cannot run in stages (NF320 to NF325), while passes over the whole may."""
