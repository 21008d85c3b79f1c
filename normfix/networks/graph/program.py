"""An exported program as an ordinary module: copied, moved, scanned, converted and exported like any network.

Its submodules hold the program's tensors under their own names, and its forward interprets the program's
graph on them. What the graph calls as a module may be replaced there, which is how a program is rewritten.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.node import map_aggregate
from typing_extensions import Self

from normfix.errors import NormfixError
from normfix.networks.graph.soundness import SoundInterpreter

__all__ = ["GUARDS", "ProgramNetwork", "Submodule", "require_free", "unguarded"]


GUARDS = "_guards_fn"
"""How torch names the module that checks a program's conditions on sizes."""


class ProgramNetwork(nn.Module):
    """The function of an exported program, in eval mode as it was exported.

    Args:
        body: holds the program's tensors and its graph; taken over, not copied.
        shape: of the image, None for each dimension that is free.
    """

    def __init__(self, body: GraphModule, shape: Sequence[int | None]) -> None:
        super().__init__()
        for name, child in body.named_children():
            self.add_module(name, child)
        for name, parameter in body.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in body.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in body._non_persistent_buffers_set)
        for node in body.graph.nodes:
            if node.op == "get_attr" and not hasattr(self, node.target.partition(".")[0]):
                setattr(self, node.target, getattr(body, node.target))
        self.shape = tuple(shape)
        self.unproved = ""
        """Why what was read was not compared with the file by running both."""
        self._graph: Graph = copy.deepcopy(body.graph)
        self.eval()

    @property
    def fixed(self) -> tuple[int, ...]:
        """Return the dimensions of the image that hold another extent than any: space, or a batch above 1."""
        return tuple(d for d, n in enumerate(self.shape) if d != 1 and n is not None and (d > 1 or n > 1))

    def forward(self, image: Tensor, *others: Any) -> Any:
        """Run the program.

        Raises:
            NormfixError: NF220 for an image of another size than the program was fixed to.
        """
        expected = "x".join("*" if n is None else str(n) for n in self.shape)
        if any(n is not None and n != m for n, m in zip(self.shape, image.shape, strict=False)):
            given = "x".join(map(str, image.shape))
            raise NormfixError(
                "NF220",
                f"the program takes images of shape {expected}, not {given}. {self.remedy()}",
                where="program",
            )
        interpreter = SoundInterpreter(self, graph=self._graph)
        interpreter.extra_traceback = False
        return interpreter.run(image, *others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors, and what the graph makes with them: it names the device that it was exported on."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        state = next(itertools.chain(self.parameters(), self.buffers()), None)
        if state is not None and state.device.type != "meta":
            for graph in (
                self._graph,
                *(g for m in self.modules() if isinstance(m, Submodule) for g in m.graphs),
            ):
                _place_(graph, state.device)
        return self

    def remedy(self) -> str:
        """Return the line that exports the network with free sizes."""
        space = {2: 64, 3: 64}.get(len(self.shape) - 2, 256)
        shape = ", ".join(map(str, (2, self.shape[1], *(n or space for n in self.shape[2:]))))
        free = ", ".join(f"{d}: torch.export.Dim.AUTO" for d in range(len(self.shape)) if d != 1)
        return (
            "Export it again, where the network's source is: torch.export.save(torch.export.export(model.eval(), "
            f"(torch.randn({shape}),), dynamic_shapes=({{{free}}},), strict=False), 'free.pt2')"
        )


def _place_(graph: Graph, device: torch.device) -> None:
    """Let a graph make its tensors on a device."""

    def placed(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, placed), map_aggregate(node.kwargs, placed)


class Submodule(nn.Module):
    """What ran inside one module of the program, so that its statistics have the names they have in the network.

    Args:
        home: whose children and tensors it takes over.
    """

    def __init__(self, home: nn.Module | None = None) -> None:
        super().__init__()
        for held in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            getattr(self, held).update(getattr(home, held, {}))
        self.graphs: list[Graph] = []

    def forward(self, call: int, *inputs: Any) -> Any:
        """Run the nodes of one of the module's calls."""
        interpreter = SoundInterpreter(self, graph=self.graphs[call])
        interpreter.extra_traceback = False
        return interpreter.run(*inputs)


@contextmanager
def unguarded(model: nn.Module) -> Iterator[None]:
    """Leave the conditions on sizes out of programs within the block: where a network is traced, sizes are tensors."""
    programs = {m: m._graph for m in model.modules() if isinstance(m, ProgramNetwork)}
    try:
        for program, graph in programs.items():
            program._graph = copy.deepcopy(graph)
            for node in list(program._graph.nodes):
                if node.op == "call_module" and node.target == GUARDS:
                    program._graph.erase_node(node)
        yield
    finally:
        for program, graph in programs.items():
            program._graph = graph


def require_free(model: nn.Module) -> None:
    """Refuse a program whose sizes are fixed, where tiles or other images are to be computed.

    Raises:
        NormfixError: NF220 with the line that exports it again.
    """
    if isinstance(model, ProgramNetwork) and model.fixed:
        shape = "x".join("*" if n is None else str(n) for n in model.shape)
        raise NormfixError(
            "NF220",
            f"the program was exported for images of shape {shape} only, so no other image and no tile can be "
            f"computed with it. {model.remedy()}",
            where="program",
        )
