"""What constants are statistics of: whole images, windows of one size, or what fits the original's windows best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from normfix.errors import NormfixError
from normfix.records.encoding import Record

__all__ = ["WHOLE", "Law", "Statistics", "parse_statistics"]

Law = Literal["total", "arithmetic", "geometric", "median"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics(Record):
    """What a norm's constants are measured on.

    kind "whole" is all pixels of all images: the network then equals the original on one image (T1). "windows" are
    parts of `size` pixels (one number for all axes, or one per axis), each with statistics of its own, which `law`
    makes one: "total" is that of their union (the law of total variance), the others take the mean of means with the
    mean of variances ("arithmetic") or the geometric mean of variance + eps ("geometric"), or both medians ("median").
    "images" are whole images, each with statistics of its own, pooled so. "blend" takes `weight` of whole images' and
    the rest of what the original has stored. "distilled" is fitted, so that the network agrees with the original in
    windows of `size`. "per-image" is "whole", and every image is normalised by its own when it is predicted. Of
    windows and distilled constants an empty `size` is that which the network's file states.
    """

    kind: Literal["whole", "windows", "images", "per-image", "blend", "distilled"] = "whole"
    size: tuple[int, ...] = ()
    law: Law = "total"
    weight: float = 0.0

    @property
    def words(self) -> str:
        """Return it as it is written on the command line."""
        size = ",".join(map(str, self.size))
        match self.kind:
            case "windows":
                return f"windows:{size}:{self.law}" if size else "windows"
            case "images":
                return f"images:{self.law}"
            case "blend":
                return f"blend:{self.weight:g}"
            case "distilled":
                return f"distilled:{size}" if size else "distilled"
            case _:
                return self.kind

    @property
    def pools(self) -> bool:
        """Tell whether parts have statistics of their own, of which a law makes one."""
        return self.kind in ("windows", "images") and self.law != "total"

    @property
    def start(self) -> Statistics:
        """Return what is measured: of constants that are fitted those that they begin with."""
        return replace(self, kind="windows", law="geometric") if self.kind == "distilled" else self

    @property
    def needs_size(self) -> bool:
        """Tell whether it is of windows whose size is not stated."""
        return self.kind in ("windows", "distilled") and not self.size

    @property
    def needs_original(self) -> bool:
        """Tell whether they cannot be measured anew in the converted network alone."""
        return self.kind in ("blend", "distilled")


WHOLE = Statistics()
_DIGITS = 19
"""Of a number of pixels; Python reads no number of thousands."""


def parse_statistics(text: str) -> Statistics:
    """Read what is written on the command line, such as "whole", or "windows:SIZE[:LAW]", by default geometric.

    >>> parse_statistics("windows:160").words, parse_statistics("images").words
    ('windows:160:geometric', 'images:geometric')

    Raises:
        NormfixError: NF587.
    """
    kind, *rest = text.split(":")
    match kind, rest:
        case (("whole" | "per-image"), []):
            return Statistics(kind=kind)
        case "windows", []:
            return Statistics(kind="windows", law="geometric")
        case "windows", [size, *law] if len(law) < 2:
            return Statistics(kind="windows", size=_size(size, text), law=_law(law, text))
        case "images", law if len(law) < 2:
            return Statistics(kind="images", law=_law(law, text))
        case "distilled", []:
            return Statistics(kind="distilled")
        case "distilled", [size]:
            return Statistics(kind="distilled", size=_size(size, text))
        case "blend", [weight]:
            return Statistics(kind="blend", weight=_weight(weight, text))
        case _:
            raise _unread(text)


def _size(text: str, whole: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(n.isdecimal() and len(n) < _DIGITS and int(n) for n in numbers):
        raise _unread(whole)
    return tuple(map(int, numbers))


def _law(text: list[str], whole: str) -> Law:
    law = text[0] if text else "geometric"
    if law not in get_args(Law):
        raise _unread(whole)
    return law  # type: ignore[return-value]


def _weight(text: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise _unread(whole) from None
    if not 0 <= weight <= 1:
        raise _unread(whole)
    return weight


def _unread(text: str) -> NormfixError:
    laws = ", ".join(get_args(Law))
    return NormfixError(
        "NF587",
        "give whole, windows[:SIZE[:LAW]], images[:LAW], per-image, blend:WEIGHT (0 to 1) or distilled[:SIZE], such as "
        f"windows:160:geometric. Laws are {laws}.",
        where=f"statistics={text!r}",
    )
