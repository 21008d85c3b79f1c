"""What constants are statistics of: whole images, or windows of one size, pooled by a law."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    kind: Literal["whole", "windows"] = "whole"
    size: tuple[int, ...] = ()
    law: Law = "total"

    @property
    def words(self) -> str:
        """Return it as it is written on the command line."""
        return self.kind if self.kind == "whole" else f"windows:{','.join(map(str, self.size))}:{self.law}"


WHOLE = Statistics()


def parse_statistics(text: str) -> Statistics:
    """Read what is written on the command line: "whole", or "windows:SIZE[:LAW]", by default geometric.

    >>> parse_statistics("windows:160").words
    'windows:160:geometric'

    Raises:
        NormfixError: NF587.
    """
    kind, *rest = text.split(":")
    if text == "whole":
        return WHOLE
    size = rest[0].split(",") if rest else []
    law = rest[1] if rest[1:] else "geometric"
    if kind != "windows" or len(rest) > 2 or not size or not all(n.isdecimal() for n in size):
        raise _unread(text)
    if law not in get_args(Law) or not all(map(int, size)):
        raise _unread(text)
    return Statistics(kind="windows", size=tuple(map(int, size)), law=law)  # type: ignore[arg-type]


def _unread(text: str) -> NormfixError:
    laws = ", ".join(get_args(Law))
    return NormfixError(
        "NF587",
        f"give whole, or windows:SIZE or windows:SIZE:LAW, such as windows:160:geometric. Laws are {laws}.",
        where=f"statistics={text!r}",
    )
