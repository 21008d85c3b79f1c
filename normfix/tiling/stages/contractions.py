"""Products of two maps summed over all positions of an image: linear attention, channel attention, bilinear pools.

    c = sum_p a_p b_p^T        (a b^T) c = a (b^T c)

The second is for products of all pairs of positions that nothing but numbers changes, such as non-local blocks without
a softmax (Wang et al., arXiv 1711.07971, "dot product").

A block's share is the sum over its own positions, in float64; how many there were is counted, as of bins.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from normfix.images.sources import Span
from normfix.tiling.stages.bins import Partial
from normfix.tiling.stages.maps import ProgramMaps, maps_of
from normfix.tiling.stages.products import Labelled, Product, keeps, order_of, product_of
from normfix.tiling.stages.program import Program, Shapes
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.spaces import Space, called, extent, prune_, shape_of, space_of

__all__ = ["CONTRACT", "Contraction", "with_contractions"]

_aten = torch.ops.aten


@torch.library.custom_op("normfix::contract", mutates_args=())
def contract(maps: Tensor, batch: int, rows: int) -> Tensor:
    """Sum the products of two maps that lie one after the other in their channels.

    Args:
        maps: (N, batch * (rows + columns), *space): `batch` times `rows` channels, then `batch` times `columns`.
        batch: how many products there are of an image.
        rows: channels of the first map in one of them.

    Returns:
        (N, batch, rows, columns).
    """
    return _products(maps, batch, rows).to(maps.dtype)


@contract.register_fake
def _(maps: Tensor, batch: int, rows: int) -> Tensor:
    return maps.new_empty((maps.shape[0], batch, rows, maps.shape[1] // batch - rows))


CONTRACT = torch.ops.normfix.contract.default


def _products(maps: Tensor, batch: int, rows: int) -> Tensor:
    left, right = maps.double().flatten(2).tensor_split([batch * rows], 1)  # (N, C, *space) -> (N, C, P)
    n, _, positions = left.shape
    products: Tensor = left.reshape(n, batch, rows, positions) @ right.reshape(n, batch, -1, positions).mT
    return products


@dataclass(frozen=True, slots=True)
class Contraction:
    """What blocks of two maps give of the sum of their products; `counts` is one bin per axis of space."""

    batch: int
    rows: int
    counts: tuple[int, ...]

    def partial(self, block: Tensor, spans: Sequence[Span], extents: Sequence[int]) -> Partial:
        """Return what a block (N, C, *space) gives, which lies at `spans` of a map of these extents."""
        return {
            "value": _products(block, self.batch, self.rows),
            "seen": math.prod(stop - start for start, stop in spans),
            "dtype": str(block.dtype).removeprefix("torch."),
        }

    def join_(self, parts: list[Partial], part: Partial) -> None:
        """Add what a block gives to the sum so far: as large as products of channels are, a thousand are too many."""
        if not parts:
            parts.append(part)
            return
        (one,) = parts
        value = one["value"] + part["value"].to(one["value"].device)
        parts[:] = [{**one, "value": value, "seen": one["seen"] + part["seen"]}]

    def merged(self, parts: Sequence[Partial], extents: Sequence[int], where: str) -> Tensor:
        """Return the sum over the whole map, (N, batch, rows, columns).

        Raises:
            NotInStages: NF325 if the blocks do not cover it once.
        """
        if sum(part["seen"] for part in parts) != math.prod(extents):
            raise NotInStages("NF325", "blocks do not cover each of its positions once.", where=where)
        whole: list[Partial] = []
        for part in parts:
            self.join_(whole, part)
        (one,) = whole
        total: Tensor = one["value"].to(getattr(torch, one["dtype"]))
        return total


def with_contractions(program: Program, example: Sequence[int]) -> Program:
    """Return a program whose products over all positions are put together from blocks.

    Args:
        program: its graph is changed in place where there are any.
        example: a size (N, C, *space) that it takes.

    Returns:
        The program; itself where there are none.
    """
    graph = program.body.graph
    is_changed = sum(_reassociate_(node) for node in list(graph.nodes)) > 0
    products = [(node, product_of(node)) for node in graph.nodes if node.op == "call_function"]
    written = [(node, product) for node, product in products if product is not None]
    program = replace(program, known={}) if is_changed else program
    maps = maps_of(program, example) if written else None
    found = [] if maps is None else list(_over_space(written, maps, program.shapes(example)))
    for one in found:
        _contracted_(one)
    return program.recompiled() if found or is_changed else program


_PRODUCTS = (_aten.matmul.default, _aten.bmm.default, _aten.einsum.default)
_SCALED = (_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar)


def _reassociate_(node: Node) -> bool:
    """Sum over positions first where a product of all pairs of them, scaled perhaps, is multiplied by a third value."""
    outer = product_of(node) if node.target in _PRODUCTS else None
    if outer is None:
        return False
    for of_pairs, other in ((outer.left, outer.right), (outer.right, outer.left)):
        chain, pairs = _scaled(of_pairs)
        inner = product_of(pairs.node) if pairs.node.target in _PRODUCTS else None
        if inner is None or outer.left.node is outer.right.node or _growing(pairs.node) != 2:
            continue
        if any(_growing(side.node) != 1 for side in (inner.left, inner.right)):
            continue
        names = dict(zip(inner.result, pairs.labels, strict=True))
        near, far = (
            Labelled(side.node, tuple(names.get(label, "inner") for label in side.labels))
            for side in (inner.left, inner.right)
        )
        (summed,) = {*of_pairs.labels} - {*outer.result}
        if summed in far.labels:
            near, far = far, near
        if summed in far.labels or isinstance(near.extent(summed), int):
            continue
        kept = [label for label in dict.fromkeys((*near.labels, *other.labels)) if label != summed]
        with node.graph.inserting_before(node):
            given = _einsum(near, other, kept)
            for scaling in reversed(chain):  # what is small is scaled, not the pairs
                given = called(node.graph, scaling.target, given, scaling.args[1])
            given = _einsum(far, Labelled(given, tuple(kept)), outer.result)
        node.replace_all_uses_with(given)
        prune_(node)
        return True
    return False


def _growing(value: Node) -> int:
    """Return how many dimensions follow the image's extents, beside the number of images in front."""
    return sum(not isinstance(n, int) for n in shape_of(value)[1:])


def _scaled(value: Labelled) -> tuple[list[Node], Labelled]:
    """Return what a value is made of by scaling it and putting its dimensions in another order, and the scalings."""
    chain: list[Node] = []
    node, labels = value
    while True:
        order = order_of(node)
        source: Any = node.args[0] if node.args else None
        if order is not None:
            labels = tuple(labels[order.index(d)] for d in range(len(order)))
        elif node.target in _SCALED and _is_number(node.args[1]):
            chain.append(node)
        elif not keeps(node):
            return chain, Labelled(node, labels)
        node = source


def _einsum(left: Labelled, right: Labelled, result: Sequence[str]) -> Node:
    letters = dict(zip(dict.fromkeys((*left.labels, *right.labels)), string.ascii_letters, strict=False))
    a, b, c = ("".join(letters[label] for label in labels) for labels in (left.labels, right.labels, result))
    return called(left.node.graph, _aten.einsum.default, f"{a},{b}->{c}", [left.node, right.node])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, Node) and not isinstance(value.meta.get("val"), Tensor)
    )


class _Summed(NamedTuple):
    """A product, the name of the dimension that it is summed along, and the positions that this is of."""

    node: Node
    product: Product
    name: str
    spaces: tuple[Space, Space]


def _over_space(
    written: Sequence[tuple[Node, Product]], maps: ProgramMaps, shapes: Shapes
) -> Iterator[_Summed]:
    for node, product in written:
        sides = product.left, product.right
        if node not in maps.moving or any(maps.scales.get(node, ())):
            continue
        (name,) = {*product.left.labels} & {*product.right.labels} - {*product.result}
        if not all(_is_of_tokens(side, name, maps) for side in sides) or not _is_of_images(product):
            continue
        a, b = (space_of(side.node, side.labels.index(name), maps, shapes) for side in sides)
        if a is not None and b is not None and _extents(a, shapes) == _extents(b, shapes):
            yield _Summed(node, product, name, (a, b))


def _is_of_tokens(side: Labelled, name: str, maps: ProgramMaps) -> bool:
    """Tell whether a value's tokens alone follow the image's extents, beside the number of images in front."""
    others = (n for d, n in enumerate(shape_of(side.node)) if d and side.labels[d] != name)
    return side.node in maps.moving and side.labels[0] != name and all(isinstance(n, int) for n in others)


def _is_of_images(product: Product) -> bool:
    """Tell whether both values have the images in front, or neither has."""
    return _images(product) is not None or all(
        isinstance(shape_of(side.node)[0], int) for side in (product.left, product.right)
    )


def _images(product: Product) -> str | None:
    """Return the name of the dimension in front, where both values have it and the result too."""
    name = product.left.labels[0]
    return name if name == product.right.labels[0] and name in product.result else None


def _extents(space: Space, shapes: Shapes) -> list[int]:
    return [shapes[space.map][d] for d in space.dims]


def _contracted_(one: _Summed) -> None:
    """Put a sum of products of maps in place of a product over tokens."""
    node, graph, (left, right, result, scale) = one.node, one.node.graph, one.product
    images = _images(one.product)
    batch = [label for label in left.labels if label in right.labels and label not in (images, one.name)]
    rows = [label for label in left.labels if label not in right.labels]
    columns = [label for label in right.labels if label not in left.labels]
    sides = zip((left, right), (rows, columns), one.spaces, strict=True)
    with graph.inserting_before(node):
        laid = [_laid(side, images, [*batch, *own, one.name], space) for side, own, space in sides]
        front = [] if images is None else [extent(left.node, 0)]
        sizes = {
            label: n
            for side in (left, right)
            for label, n in zip(side.labels, shape_of(side.node), strict=True)
        }
        counts = [math.prod(sizes[label] for label in labels) for labels in (batch, rows)]
        given = called(graph, CONTRACT, called(graph, _aten.cat.default, laid, 1), *counts)
        inner = [*batch, *rows, *columns]
        given = called(graph, _aten.reshape.default, given, [*front, *(sizes[label] for label in inner)])
        order = inner if images is None else [images, *inner]
        given = called(graph, _aten.permute.default, given, [order.index(label) for label in result])
        if scale != 1:
            given = called(graph, _aten.mul.Scalar, given, scale)
    node.replace_all_uses_with(given)
    prune_(node)


def _laid(side: Labelled, images: str | None, names: Sequence[str], space: Space) -> Node:
    """Return a value as a map (N, C, *space), channels in the order of the names, the last of tokens."""
    order = [*([] if images is None else [images]), *names]
    graph = side.node.graph
    laid = called(graph, _aten.permute.default, side.node, [side.labels.index(label) for label in order])
    front = 1 if images is None else extent(side.node, 0)
    return called(
        graph, _aten.reshape.default, laid, [front, -1, *(extent(space.map, d) for d in space.dims)]
    )
