"""FrozenKeys: the keys and values of an attention, held as constants.

With k images of n_1 .. n_k keys each, every image counts alike, whatever its size:

    softmax over all keys of (q k^T s + b) v        b = -log n_i for a key of image i, up to a number common to all

which for one image is what its own attention gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenKeys"]


class FrozenKeys(nn.Module):
    """Hold the keys and values of one call of an attention as buffers, with a bias for each key.

    Args:
        rank: number of dimensions of queries, keys and values.
        tokens: the dimension of their tokens.
        batch: the dimension along which images are stacked, and its extent for one image.
        device: where the buffers are made.
        dtype: of the buffers.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    observer: Callable[[Mapping[str, Any]], None] | None

    def __init__(
        self,
        *,
        rank: int,
        tokens: int,
        batch: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.tokens, self.batch = rank, tokens, batch
        self.observer = None  # given the arguments of each call while calibrating
        self.biased = False
        for name in ("keys", "values", "bias"):
            self.register_buffer(name, torch.zeros(0, device=device, dtype=dtype))
        # without a hook below it, torch's fused encoder layer computes attention that no call of Python makes
        self.register_forward_pre_hook(_nothing)

    def forward(self, function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Return what an attention gives for its queries with the keys and values that are held.

        Args:
            function: torch's scaled_dot_product_attention, or multi_head_attention_forward.
            given: its arguments by name.

        Raises:
            ValueError: the operands are not of the planned kind.
        """
        query, (stacked, unit) = given["query"], self.batch
        if query.dim() != self.rank or query.shape[stacked] % unit:
            raise ValueError(f"expected queries of {self.rank} dimensions, got {tuple(query.shape)}")
        if not self.keys.numel():
            raise ValueError("no keys are held; it was not calibrated")
        repeats = [1] * self.rank
        repeats[stacked] = query.shape[stacked] // unit
        held = {"key": self.keys.to(query.dtype).repeat(repeats), "value": self.values.to(query.dtype).repeat(repeats)}
        if self.biased:
            held["attn_mask"] = self.bias.to(query.dtype).expand(query.shape[self.tokens], -1)
        return function(**{**given, **held})

    def hold_(self, keys: Tensor, values: Tensor, bias: Tensor) -> None:
        """Hold keys and values of one image's layout, and a bias (tokens,), in place."""
        for name, given in (("keys", keys), ("values", values), ("bias", bias)):
            current = getattr(self, name)
            setattr(self, name, given.detach().to(current).contiguous())
        self.biased = bool(self.bias.any())

    def extra_repr(self) -> str:
        """Show how many keys are held."""
        return f"{self.bias.numel()} keys"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take keys of any number: it is that of the images, which no plan knows."""
        given = [state_dict.get(f"{prefix}{name}") for name in ("keys", "values", "bias")]
        if all(isinstance(value, Tensor) for value in given) and self._fits(*given):
            self.hold_(*given)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]

    def _fits(self, keys: Tensor, values: Tensor, bias: Tensor) -> bool:
        count: Sequence[int] = bias.shape
        if not bias.numel():
            return not keys.numel() and not values.numel()
        shapes = (keys.shape, values.shape)
        return all(len(s) == self.rank and s[self.tokens] == count[0] for s in shapes) and len(count) == 1


def _nothing(module: nn.Module, args: Any) -> None:
    """Do nothing, and be there."""
