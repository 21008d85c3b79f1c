"""Attention whose keys and values can be held: then each query's result is its own, wherever a tile is cut.

That takes keys over all positions, the same for every query of an image; it takes no mask, which would be another one
for a tile. Whether the queries know where in the image they are is for the measurement of the geometry to see.
"""

from __future__ import annotations

from collections.abc import Sequence

from normfix.networks.functions import ATTENTION
from normfix.records.sites import StatisticSpec
from normfix.scanning.census import Call, Shaped
from normfix.scanning.growth import FIXED, Growth

__all__ = ["UNASKED", "keys_refusal", "specify_keys"]

UNASKED = (
    "every pixel looks at every other. Its keys and values can be held as constants, which are as large as the images: "
    "convert --keys all, or --keys N of them"
)
_OPERANDS = ("query", "key", "value")
_RESTRICTING = ("attn_mask", "key_padding_mask", "is_causal", "bias_k", "bias_v", "add_zero_attn")


def keys_refusal(position: int, calls: Sequence[Call], growth: Growth) -> str:
    """Say why the keys and values of a call that attends to all positions cannot become constants, or return ''.

    Args:
        position: of the call.
        calls: of the forward pass.
        growth: of the calls.
    """
    call = calls[position]
    if call.function not in ATTENTION:
        return (
            "it compares all positions in its own arithmetic, in which normfix tells no keys. Write it as "
            "torch.nn.functional.scaled_dot_product_attention, whose keys can be held"
        )
    if given := [name for name in _RESTRICTING if call.arguments.get(name) not in (None, False)]:
        return f"its {given[0]} is made for the whole image, so that keys held of it would not fit a tile"
    if not growth.two_sizes:
        return "the network ran at one size only, so that its keys may be tied to that size"
    if len(call.reads) != len(_OPERANDS) or min(growth.input(position, n) for n in range(3)) < FIXED:
        return "its queries, keys and values are not all positions of the image"
    if growth.space(position) != {_tokens_of(call)}:
        return "it attends along one axis of the image, with other keys for every line"
    batch = growth.batch(position)
    if batch is not None and (len(batch[0]) != 1 or batch[0] != batch[1]):
        return "images of a batch are not stacked in one of its dimensions"
    return ""


def specify_keys(position: int, calls: Sequence[Call], growth: Growth, kept: int) -> StatisticSpec:
    """Describe the constants that replace a call's keys and values.

    Args:
        position: of the call.
        calls: of the forward pass.
        growth: of the calls.
        kept: how many keys are kept of all images together; 0 for all.
    """
    call = calls[position]
    key = call.arguments["key"]
    assert isinstance(key, Shaped)
    batch = growth.batch(position)
    # a network that takes one image alone is given no more
    (stacked,) = batch[0] if batch is not None else {_stacked_in(call)}
    return StatisticSpec(
        law="keys",
        shape=key.shape,
        outputs=2,
        operand=1,
        rank=len(key.shape),
        dims=(_tokens_of(call),),
        batch=(stacked, key.shape[stacked], stacked),
        kept=kept,
    )


def _stacked_in(call: Call) -> int:
    return 1 if call.function == "multi_head_attention_forward" else 0


def _tokens_of(call: Call) -> int:
    """Return the dimension of the tokens: the first in nn.MultiheadAttention's function."""
    return 0 if call.function == "multi_head_attention_forward" else len(call.inputs[0]) - 2
