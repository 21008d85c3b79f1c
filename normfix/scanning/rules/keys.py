"""Attention whose keys and values can be held: then each query's result is its own, wherever a tile is cut.

That takes keys over all positions, the same for every query of an image; it takes no mask, which would be another one
for a tile. Whether the queries know where in the image they are is for the measurement of the geometry to see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normfix.networks.functions import ATTENTION, tokens_of
from normfix.records.sites import StatisticSpec
from normfix.scanning.census import Call
from normfix.scanning.growth import Growth
from normfix.scanning.products import Factor

__all__ = ["UNASKED", "factors_of", "keys_refusal", "specify_keys"]

UNASKED = (
    "every pixel looks at every other. Its keys and values can be held as constants, which are as large as the images: "
    "convert --keys all, or --keys N of them"
)
_RESTRICTING = ("attn_mask", "key_padding_mask", "is_causal", "bias_k", "bias_v", "add_zero_attn")


def factors_of(position: int, calls: Sequence[Call], products: Mapping[int, Factor]) -> tuple[Factor, ...]:
    """Return the operands of a call whose place constants can take: () where it is no attention that is known.

    Args:
        position: of the call.
        calls: of the forward pass.
        products: the keys and values of attention that is written out, by the products that take them.
    """
    call = calls[position]
    if call.function not in ATTENTION:
        return (products[position],) if position in products else ()
    tokens = tokens_of(call.function, len(call.inputs[0]))
    return tuple(Factor(number, tokens) for number in (1, 2))


def keys_refusal(position: int, calls: Sequence[Call], growth: Growth, products: Mapping[int, Factor]) -> str:
    """Say why the keys and values of a call that attends to all positions cannot become constants, or return ''.

    Arguments as for factors_of, and the growth of the calls.
    """
    call, factors = calls[position], factors_of(position, calls, products)
    if not factors:
        return (
            "it compares all positions, but not as a softmax between two products with keys and values that can be "
            "told. Write it as torch.nn.functional.scaled_dot_product_attention, whose keys can be held"
        )
    if given := [name for name in _RESTRICTING if call.arguments.get(name) not in (None, False)]:
        return f"its {given[0]} is made for the whole image, so that keys held of it would not fit a tile"
    if not growth.two_sizes:
        return "the network ran at one size only, so that its keys may be tied to that size"
    if call.function in ATTENTION and (len(call.reads) != 3 or not growth.space_of(position, 0)):
        return "its queries, keys and values are not all positions of the image"
    if any(growth.space_of(position, factor.number) != {factor.tokens} for factor in factors):
        return "it attends along one axis of the image, with other keys for every line"
    batches = [growth.batch_of(position, factor.number) for factor in factors]
    if any(batch is not None and len(batch) != 1 for batch in batches) or len(set(batches)) > 1:
        return "images of a batch are not stacked in one dimension of its keys"
    return ""


def specify_keys(
    position: int, calls: Sequence[Call], growth: Growth, products: Mapping[int, Factor], kept: int
) -> StatisticSpec:
    """Describe the constants that replace a call's keys and values, or either.

    Arguments as for keys_refusal, and how many keys are kept of all images together; 0 for all.
    """
    call, factors = calls[position], factors_of(position, calls, products)
    first = factors[0]
    shape = call.inputs[first.number]
    batch = growth.batch_of(position, first.number)
    # a network that takes one image alone is given no more
    alone = {1 if call.function == "multi_head_attention_forward" else 0}
    (stacked,) = alone if batch is None else batch
    return StatisticSpec(
        law="keys",
        shape=shape,
        outputs=len(factors),
        operand=call.operand + first.number,
        rank=len(shape),
        dims=(first.tokens,),
        batch=(stacked, shape[stacked], stacked),
        kept=kept,
    )
