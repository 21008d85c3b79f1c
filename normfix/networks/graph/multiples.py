"""Capture a network for extents that are multiples of a number, where no graph holds for all extents.

Padding to whole windows or strides makes a formula of every size after it, with remainders of remainders, which
torch.export cannot reason about. Of multiples of what is padded to, sizes are products. So what is captured is the
network of a folded image, whose extents are (multiples, number) per axis, with the multiples free: every formula is
short from the start. The program is unfolded afterwards, and takes an image again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from normfix.networks.calling import failures, resized
from normfix.networks.graph.capture import AsFunction, Run, traced
from normfix.networks.graph.replaying import replay
from normfix.networks.graph.sizes import LARGEST_MULTIPLE, LongFormulaError, shortening
from normfix.networks.numerics import exact_arithmetic

__all__ = ["OfMultiples", "capture_multiples", "multiples_near", "on_multiples", "unfolded"]

_FLATTENED = (torch.ops.aten.reshape.default, torch.ops.aten.view.default)

_LARGER = 4
"""How many times the example's pixels are run at once."""


@dataclass(frozen=True, slots=True)
class OfMultiples:
    """A program of folded images (N, C, multiples, number, ...), for `unfolded`."""

    program: ExportedProgram
    multiple: int


def capture_multiples(model: nn.Module, run: Run, example: Tensor, multiple: int) -> OfMultiples | None:
    """Capture a network of images whose extents are multiples of a number of pixels, two of it and more.

    Args:
        model: in eval mode; a deep copy is captured.
        run: calls it on one image.
        example: (N, C, *space), of any extents; what is captured is of this image, repeated or cut.
        multiple: pixels that are tried first. Where formulas of sizes are too long still, it is multiplied by what
            makes them short.

    Returns:
        A program that was compared with the network: for an image, for longer ones along each axis, and for two at
        once. None where there is none, or two multiples make an image much larger than the example.
    """
    while multiple <= LARGEST_MULTIPLE:
        network = _Folded(model, run, multiple).eval()
        image = on_multiples(example[:1].detach(), multiple)
        if image.numel() > _LARGER * example[:1].numel():
            return None
        pair = _fold(torch.cat([image, image.flip(-1)]), multiple)
        try:
            with exact_arithmetic():
                program = traced(network, pair, (0, *range(2, pair.dim(), 2)))
                return OfMultiples(program, multiple) if _is(program, network, image, multiple) else None
        except LongFormulaError as fault:
            more = shortening(fault.formula)
            if more is None or more == 1:
                return None
            multiple *= more
        except failures():  # it takes no multiples of this, or has a graph of one size alone
            return None
    return None


def on_multiples(image: Tensor, multiple: int) -> Tensor:
    """Return an image of multiples of a number, at least two along each axis: repeated or cut."""
    space = multiples_near(image.shape[2:], multiple)
    return image if space == tuple(image.shape[2:]) else resized(image, space)


def multiples_near(extents: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Return multiples of a number, at least two of it, that are no more than extents else; any are multiples of 1."""
    return tuple(extents) if multiple == 1 else tuple(max(2, n // multiple) * multiple for n in extents)


def unfolded(body: GraphModule, multiple: int) -> GraphModule:
    """Let a body of folded images take images, in place, and return it.

    Args:
        body: of a program that `capture_multiples` found.
        multiple: of that program.
    """
    graph = body.graph
    folded = next(n for n in graph.nodes if n.op == "placeholder")
    flat = [n for n in folded.users if n.target in _FLATTENED]
    with graph.inserting_before(folded):
        image = graph.placeholder("image_of_multiples")
    image.meta = dict(flat[0].meta)
    for node in flat:
        node.replace_all_uses_with(image)
        graph.erase_node(node)
    for node in list(folded.users):
        if node.target is torch.ops.aten.sym_size.int:
            _measure_image_(node, image, multiple)
        elif node.op == "call_module":  # of conditions on sizes
            name = str(node.target)
            body.add_submodule(name, _OfFolded(body.get_submodule(name), multiple))
            node.replace_input_with(folded, image)
        else:  # states what it was traced with
            graph.erase_node(node)
    graph.erase_node(folded)
    body.recompile()
    return body


class _Folded(AsFunction):
    """The network as a function of a folded image."""

    def __init__(self, network: nn.Module, run: Run, multiple: int) -> None:
        super().__init__(network, run)
        self._multiple = multiple

    def forward(self, image: Tensor) -> Any:
        """Return what counts, of (N, C, multiples, number, ...)."""
        n, c, *space = image.shape
        return super().forward(image.reshape(n, c, *(k * self._multiple for k in space[::2])))


class _OfFolded(nn.Module):
    """What holds for folded images, of images."""

    def __init__(self, folded: nn.Module, multiple: int) -> None:
        super().__init__()
        self.folded, self._multiple = folded, multiple

    def forward(self, image: Tensor) -> Any:
        """Return what is returned for the folded image."""
        return self.folded(_fold(image, self._multiple))


def _fold(image: Tensor, multiple: int) -> Tensor:
    """Return (N, C, n / multiple, multiple, ...) of (N, C, n, ...), a view.

    Raises:
        RuntimeError: if an extent is none of these multiples.
    """
    n, c, *space = image.shape
    return image.reshape(n, c, *(part for extent in space for part in (extent // multiple, multiple)))


def _measure_image_(size: Node, image: Node, multiple: int) -> None:
    """Let a node that reads the multiples along a dimension of a folded image compute them from the image's extent."""
    graph, dim = size.graph, size.args[1]
    assert isinstance(dim, int)
    if dim < 2:  # images and channels are not folded
        size.replace_input_with(size.all_input_nodes[0], image)
        return
    with graph.inserting_before(size):
        extent = graph.call_function(torch.ops.aten.sym_size.int, (image, (dim + 2) // 2))
        extent.meta = {"val": size.meta["val"] * multiple}
        found = graph.call_function(operator.floordiv, (extent, multiple))
        found.meta = dict(size.meta)
    for user in list(size.users):
        if user.target is operator.mul and multiple in user.args:
            user.replace_all_uses_with(extent)
            graph.erase_node(user)
    size.replace_all_uses_with(found)
    graph.erase_node(size)


def _is(program: ExportedProgram, network: _Folded, image: Tensor, multiple: int) -> bool:
    """Tell whether a program is the network: of an image, of one that is longer along each axis, and of two at once."""
    space = image.shape[2:]
    longer = [
        resized(image, [n + multiple * (axis == other) for other, n in enumerate(space)])
        for axis in range(len(space))
    ]
    batch = torch.cat([longer[-1], longer[-1].flip(-1)])
    return all(replay(program, network, _fold(x, multiple)) for x in (image, *longer, batch))
