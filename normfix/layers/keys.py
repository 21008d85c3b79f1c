"""Keys and values of an attention, held as constants.

With k images of n_1 .. n_k keys each, every image counts alike, whatever its size:

    softmax over all keys of (q k^T s + b) v        b = -log n_i for a key of image i, up to a number common to all

which for one image is what its own attention gives. `FrozenKeys` stands for an attention that is one call,
`FrozenOperand` for the keys of one product, or the values of another, where it is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenKeys", "FrozenOperand", "HeldTokens"]


class HeldTokens(nn.Module):
    """Tensors of tokens as buffers, in the layout of one image, and a bias for each token; abstract.

    Args:
        rank: number of dimensions of the tensors.
        tokens: the dimension of their tokens.
        batch: the dimension along which images are stacked, and its extent for one image.
        device: where the buffers are made.
        dtype: of the buffers.
    """

    names: tuple[str, ...]
    bias: Tensor
    observer: Callable[..., None] | None

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
        self.observer = None  # given the tensors that each call brings, while calibrating
        self.biased = False
        for name in (*self.names, "bias"):
            self.register_buffer(name, torch.zeros(0, device=device, dtype=dtype))
        # without a hook below it, torch's fused encoder layer computes attention that no call of Python makes
        self.register_forward_pre_hook(_nothing)

    def values_held(self) -> tuple[Tensor, ...]:
        """Return the tensors, without the bias."""
        return tuple(getattr(self, name) for name in self.names)

    def hold_(self, tensors: Sequence[Tensor], bias: Tensor) -> None:
        """Hold tensors of one image's layout, and a bias (tokens,), in place."""
        for name, given in zip((*self.names, "bias"), (*tensors, bias), strict=True):
            current = getattr(self, name)
            setattr(self, name, given.detach().to(current).contiguous())
        self.biased = bool(self.bias.any())

    def extra_repr(self) -> str:
        """Show how many tokens are held."""
        return f"{self.bias.numel()} tokens"

    def _repeated(self, value: Tensor, like: Tensor) -> Tensor:
        """Return a tensor in the dtype of an operand and for as many images as it has."""
        stacked, unit = self.batch
        if like.dim() != self.rank or like.shape[stacked] % unit:
            raise ValueError(
                f"expected an operand of {self.rank} dimensions, got a shape of {tuple(like.shape)}"
            )
        if not value.numel():
            raise ValueError("no keys are held; it was not calibrated")
        repeats = [1] * self.rank
        repeats[stacked] = like.shape[stacked] // unit
        return value.to(like.dtype).repeat(repeats)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take tokens of any number: it is that of the images, which no plan knows."""
        names = [f"{prefix}{name}" for name in (*self.names, "bias")]
        given = [state_dict[name] for name in names if isinstance(state_dict.get(name), Tensor)]
        if len(given) == len(names) and self._fits(*given):
            self.hold_(given[:-1], given[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _fits(self, *given: Tensor) -> bool:
        *tensors, bias = given
        if not bias.numel():
            return not any(tensor.numel() for tensor in tensors)
        return bias.dim() == 1 and all(
            t.dim() == self.rank and t.shape[self.tokens] == bias.numel() for t in tensors
        )


class FrozenKeys(HeldTokens):
    """Hold the keys and values of one call of torch's attention as buffers, with a bias for each key."""

    names = ("keys", "values")
    keys: Tensor
    values: Tensor

    def forward(self, function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Return what an attention gives for its queries with the keys and values that are held.

        Args:
            function: torch's scaled_dot_product_attention, or multi_head_attention_forward.
            given: its arguments by name.

        Raises:
            ValueError: the operands are not of the planned kind.
        """
        query = given["query"]
        held = {"key": self._repeated(self.keys, query), "value": self._repeated(self.values, query)}
        if self.biased:
            held["attn_mask"] = self.bias.to(query.dtype).expand(query.shape[self.tokens], -1)
        return function(**{**given, **held})


class FrozenOperand(HeldTokens):
    """Hold one operand of a product as a buffer: the keys, or the values, of an attention that is written out."""

    names = ("operand",)
    operand: Tensor

    def forward(self, operand: Tensor) -> Tensor:
        """Return what takes an operand's place.

        Raises:
            ValueError: the operand is not of the planned kind.
        """
        return self._repeated(self.operand, operand)


def _nothing(module: nn.Module, args: Any) -> None:
    """Do nothing, and be there."""
