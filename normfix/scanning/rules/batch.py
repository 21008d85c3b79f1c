"""Batch normalisation: y = (x - mean_c) / sqrt(var_c + eps) * w + b, one statistic per channel.

Live when it uses batch statistics: in train mode, or without running statistics. Otherwise the constants
are already there and a replacement carries them over bit for bit.

Population law: mean over all pixels of all images; variance E[var_i] + Var[mean_i], pixel-weighted.
"""

from __future__ import annotations

from torch import nn

from normfix.records.sites import Family, LayerSpec
from normfix.scanning.census import Call
from normfix.scanning.rules.rule import Reading

__all__ = ["BatchRule"]


class BatchRule:
    """Reads F.batch_norm."""

    family = Family.BATCH
    functions = frozenset({"batch_norm", "torch.batch_norm"})
    modules = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

    def read(self, call: Call, space: frozenset[int], owner: nn.Module) -> Reading:
        """Read one F.batch_norm call; see Rule.read."""
        given = call.arguments
        shape = given["input"].shape
        live = bool(given["training"]) or given["running_mean"] is None
        layer = LayerSpec(
            ndim=max(1, len(shape) - 2),
            features=shape[1],
            groups=shape[1],
            eps=float(given["eps"]),
            affine=given["weight"] is not None,
            carries=not live,
        )
        return Reading(live=live, reduces="batch and space, per channel" if live else "nothing", layer=layer)
