"""What the layers share: one set of constants per channel, held under the names nn.BatchNorm uses.

A layer here is y = (x - mean) / sqrt(var + eps) * weight + bias per channel, where family by family only the
origin of mean and var differs. Parameters and buffers are named as in nn.BatchNorm, so state dicts load
strictly in both directions; yet none derives from torch's `_BatchNorm`, because `swa_utils.update_bn` would
wipe, and `convert_sync_batchnorm` replace, whatever does.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from normfix.layers.affine import normalise

__all__ = ["ChannelNorm"]


class ChannelNorm(nn.Module):
    """Hold affine and running statistics of `num_features` channels; abstract.

    A family defines `normalize` and calls `reset_parameters` when it is built; a final class says which ranks
    it accepts.
    """

    _version = 2  # BatchNorm's: its state dicts hold num_batches_tracked since then
    _ranks: ClassVar[tuple[int, ...]]

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.track_running_stats = track_running_stats
        for name in ("weight", "bias"):
            empty = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, empty)
        for name in ("running_mean", "running_var"):
            values = torch.empty(num_features, device=device, dtype=dtype) if track_running_stats else None
            self.register_buffer(name, values)
        count = torch.empty((), device=device, dtype=torch.long) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, c, *space) with the layer's own affine; the operand is named as torch names it."""
        return self.normalize(input, self.weight, self.bias)

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise x with the given affine in place of the layer's own."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Return to the state of a new layer: identity affine, mean 0, variance 1, no batch seen."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Forget the statistics: mean 0, variance 1, no batch seen."""
        if (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        ):
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    @torch.no_grad()
    def set_statistics_(self, mean: Tensor, var: Tensor) -> None:
        """Write calibrated statistics in place and count them as one batch seen.

        Args:
            mean: shape (c,), or (g,) for g groups of neighbouring channels.
            var: the population variance, in the same shape; eps is added when it is used.

        Raises:
            ValueError: the number of values does not divide the number of channels, or nothing is tracked.
        """
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            raise ValueError(f"{type(self).__name__} has track_running_stats=False: it keeps no statistics.")
        self.running_mean.copy_(self._per_channel(mean))
        self.running_var.copy_(self._per_channel(var))
        self.num_batches_tracked.fill_(1)

    def extra_repr(self) -> str:
        """Show the arguments as nn.BatchNorm does."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"

    def _per_channel(self, values: Tensor) -> Tensor:
        if values.ndim != 1 or values.numel() == 0 or self.num_features % values.numel():
            raise ValueError(
                f"statistics of shape {tuple(values.shape)} do not divide {self.num_features} channels: "
                f"give one value per channel, or one per group."
            )
        return values.repeat_interleave(self.num_features // values.numel())  # (g,) -> (c,)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"expected {expected} input (got {x.ndim}D input)")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} has {self.num_features} channels, but got an input of shape "
                f"{tuple(x.shape)} with {x.shape[1]} channels in dimension 1"
            )

    def _normalize_by_constants(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # on the CPU and in float64 the call nn.BatchNorm makes in eval, one level lower, hence the same bits
        mean, var = self.running_mean, self.running_var
        if mean is not None and not _mixes(x.dtype, mean.dtype):  # x.float() in a half network
            weight, bias, mean, var = (
                None if t is None else t.to(x.dtype) for t in (weight, bias, mean, var)
            )
        return normalise(x, weight, bias, mean, var, self.eps)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        key = prefix + "num_batches_tracked"
        version = local_metadata.get("version")
        if (version is None or version < self._version) and self.num_batches_tracked is not None:
            # a file older than the counter: BatchNorm counts 0 then, or keeps what it has
            count = self.num_batches_tracked
            state_dict.setdefault(key, count if count.device.type != "meta" else torch.tensor(0))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _mixes(operand: torch.dtype, constants: torch.dtype) -> bool:
    """Tell whether batch norm takes these dtypes together: equal ones, or a half operand with float32 constants."""
    return operand == constants or (constants == torch.float32 and operand in (torch.float16, torch.bfloat16))


class BatchMoments(NamedTuple):
    """Mean, biased variance and 1 / sqrt(var + eps) per channel of a batch, and its values per channel."""

    mean: Tensor
    var: Tensor
    invstd: Tensor
    size: int | Tensor
