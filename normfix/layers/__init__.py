"""Normalisation layers without live statistics, and the laws their constants are measured by."""

from normfix.layers.base import ChannelNorm
from normfix.layers.batchrenorm import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normfix.layers.constant import FrozenStatistic
from normfix.layers.frozen import FrozenNorm, FrozenNorm1d, FrozenNorm2d, FrozenNorm3d
from normfix.layers.keys import FrozenKeys, FrozenOperand, HeldTokens
from normfix.layers.schedule import RenormSchedule
from normfix.layers.synchronised import (
    SyncBatchRenorm,
    SyncBatchRenorm1d,
    SyncBatchRenorm2d,
    SyncBatchRenorm3d,
    synchronise,
)

__all__ = [
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ChannelNorm",
    "FrozenKeys",
    "FrozenNorm",
    "FrozenNorm1d",
    "FrozenNorm2d",
    "FrozenNorm3d",
    "FrozenOperand",
    "FrozenStatistic",
    "HeldTokens",
    "RenormSchedule",
    "SyncBatchRenorm",
    "SyncBatchRenorm1d",
    "SyncBatchRenorm2d",
    "SyncBatchRenorm3d",
    "synchronise",
]
