"""Why a network is not given back."""

from __future__ import annotations

from normfix.errors import NormfixError

__all__ = ["WAYS_ON", "NotAlone", "NotGiven", "Unequal", "Unfit", "without_switch"]

WAYS_ON = (
    "Use the folder through normfix.load, or write a program with normfix convert -o FILE.pt2, which runs without "
    "normfix."
)
_BUILT_IN = {
    "diffusers": "diffusers builds GroupNorm into its networks",
    "normfix.storage.opening.formats.diffusers_folder": "diffusers builds GroupNorm into its networks",
    "micro_sam": "micro-sam's decoder, torch-em's UNETR, builds InstanceNorm in",
    "torch_em.model.unetr": "torch-em's UNETR builds InstanceNorm into its decoder",
}
"""Libraries whose networks have no argument for the norm, by module, and what they say of it."""


class NotGiven(NormfixError):  # noqa: N818 - what happened, as its siblings are named
    """No BatchNorm could hold what this network computes, whatever its library offers (NF550)."""


class Unfit(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """The library's network has other norms or weights than the converted one (NF551)."""


class Unequal(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """The library's network holds the constants and gives another output (NF552)."""


class NotAlone(NormfixError):  # noqa: N818 - what happened
    """What was written does not give the same in its own tool alone (NF554)."""


def without_switch(spec: str) -> Unfit | None:
    """Return the refusal of a factory whose library is known to have no argument for the norm.

    >>> print(without_switch("diffusers:AutoencoderKL").message)  # doctest: +ELLIPSIS
    diffusers builds GroupNorm into its networks, and has no argument for another norm. ...
    >>> without_switch("monai.networks.nets:UNet")
    """
    module = spec.partition(":")[0]
    for home, words in _BUILT_IN.items():
        if module == home or module.startswith(f"{home}."):
            message = f"{words}, and has no argument for another norm. {WAYS_ON}"
            return Unfit("NF551", message, where=spec)
    return None
