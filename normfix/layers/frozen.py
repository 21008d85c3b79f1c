"""FrozenNorm: normalisation by constants, whatever mode the network is in.

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias

Nothing depends on the input's extent or on its neighbours, which makes the layer tile-invariant, and
`train()` changes nothing. The output equals that of nn.BatchNorm in eval, on the CPU and in float64 to the last bit, on
a GPU to rounding (normfix.layers.affine).
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfix.layers.base import ChannelNorm

__all__ = ["FrozenNorm", "FrozenNorm1d", "FrozenNorm2d", "FrozenNorm3d"]


class FrozenNorm(ChannelNorm):
    """Normalise by constants; abstract over the rank.

    Args:
        num_features: number of channels c of an input (n, c, *space).
        eps: added to the variance inside the root.
        affine: hold a weight and a bias per channel.
        device: where the tensors are made.
        dtype: of parameters and statistics.
        trainable: let the affine have gradients.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        trainable: bool = True,
    ) -> None:
        super().__init__(num_features, eps, affine, True, device, dtype)
        self.reset_parameters()
        self.requires_grad_(trainable)

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise x by the constants, with the given affine in place of the layer's own.

        Raises:
            ValueError: x has a rank or a number of channels the layer is not for.
        """
        self._check_input(x)
        return self._normalize_by_constants(x, weight, bias)


class FrozenNorm1d(FrozenNorm):
    """Normalise (n, c) or (n, c, l) by constants.

    Example:
        >>> import torch
        >>> from normfix.layers import FrozenNorm1d
        >>> layer = FrozenNorm1d(4)
        >>> layer.set_statistics_(mean=torch.tensor([1.0, 2.0]), var=torch.tensor([4.0, 9.0]))  # two groups
        >>> layer.running_mean
        tensor([1., 1., 2., 2.])
    """

    _ranks = (2, 3)


class FrozenNorm2d(FrozenNorm):
    """Normalise (n, c, h, w) by constants."""

    _ranks = (4,)


class FrozenNorm3d(FrozenNorm):
    """Normalise (n, c, d, h, w) by constants."""

    _ranks = (5,)
