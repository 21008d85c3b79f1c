"""Images with what constants are statistics of, in the place of images alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from normfix.images.given import GivenImages
from normfix.records.statistics import Law, Statistics, parse_statistics

__all__ = ["Measured", "Windows"]


@dataclass(frozen=True, slots=True)
class Measured:
    """Images on which `convert` measures constants as is written after --statistics on the command line.

    Attributes:
        images: as for normfix.convert.
        how: "whole", "windows:160:median", "images:geometric", "per-image", "blend:0.5", "distilled:160" and the like;
            docs/choosing.md says what each is and what is proved of it.
        keys: hold keys and values of attention over all positions as constants: "all" those of the images, or how many
            of all images together, drawn at random for each by its share; each image counts alike. Default: such
            attention stays live, since its constants are as large as the images, in memory and in the file.

    Raises:
        NormfixError: NF587 for words that say nothing of the kind.

    Example:
        >>> import normfix, torch
        >>> normfix.Measured(torch.rand(1, 1, 128, 128), "windows:64").statistics.words
        'windows:64:geometric'
    """

    images: GivenImages
    how: str = "whole"
    keys: int | Literal["all"] | None = None

    def __post_init__(self) -> None:
        self.statistics  # noqa: B018 - raises what is wrong with it

    @property
    def statistics(self) -> Statistics:
        """Return what constants are statistics of."""
        return parse_statistics(self.how)


@dataclass(frozen=True, slots=True)
class Windows:
    """Images in whose windows of one size `convert` measures constants, in the place of the images themselves.

    Give the size that the network was trained on: statistics of a whole image are those of an input that it never saw.
    The proof says the same of windows as of whole images but for one thing: constants of the whole image alone make
    the network equal the original on it.

    Attributes:
        images: as for normfix.convert.
        size: pixels, one number for all axes or one per axis, multiples of the stride.
        law: "geometric" (mean of means, geometric mean of variances), "arithmetic", "median", or "total" (all pixels
            of all windows).

    Raises:
        NormfixError: NF587 for a size or a law that is none.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> done = normfix.convert(net, normfix.Windows(torch.rand(1, 1, 128, 128), 64))
        >>> done.proof.passed, len(done.calibration.summary.images)
        (True, 4)
    """

    images: GivenImages
    size: int | Sequence[int]
    law: Law = "geometric"

    def __post_init__(self) -> None:
        self.statistics  # noqa: B018 - raises what is wrong with it

    @property
    def statistics(self) -> Statistics:
        """Return what constants are measured on."""
        size = [self.size] if isinstance(self.size, int) else self.size
        return parse_statistics(f"windows:{','.join(map(str, size))}:{self.law}")
