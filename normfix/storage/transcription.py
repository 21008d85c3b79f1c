"""Transcribe a TorchScript program into one of torch.export's, by torch's own road, and prove it by running both.

The road (`TS2EPConverter`) takes a graph without control flow. What scripting leaves of that is mostly checks of sizes
and choices by the number of axes, which is known: so ranks are carried through the graph, conditions and loops become
constants, and what only raised or warned falls away. What is left of control flow, and operations that no program from
a file may call, are refused by name, before anything of the archive is run.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from normfix.networks.graph.isolation import silence
from normfix.storage.opening.operations import is_listed

__all__ = ["Refusal", "Transcript", "transcribed"]

Graph = Any
"""torch._C.Graph, and its nodes and values, which torch has no types of."""

_ROUNDS = 4
"""One choice decides the next; interpolation is the deepest, of three."""
_MOST_TURNS = 1024
_SAMPLES = {1: (256, 1024), 2: (128, 256, 512), 3: (32, 64, 96)}
"""Extents that are tried per number of axes: a network may need more than its stride, for a norm of its deepest map."""
_BATCH = 2
_DOUBLE, _SINGLE = 1e-9, 1e-5
"""In sd of the output: what two orders of sums differ by in float64, and where it does not run in that, in its own."""
_CONVOLUTION = re.compile(r"aten::(_convolution|convolution|conv[123]d)")
_KEEPS_RANK = re.compile(
    r"aten::(instance_norm|group_norm|layer_norm|batch_norm|(leaky_|hard|log_)?(relu|sigmoid|tanh|swish)6?_?|prelu|elu_?"
    r"|celu|selu|gelu|silu_?|mish|(feature_|alpha_)?dropout_?|pad|upsample_\w+|(max|avg)_pool[123]d|add_?|sub_?|mul_?|div_?"
    r"|contiguous|clone|detach|to|conv(_transpose)?[123]d|_convolution|softmax|clamp|pow|sqrt|exp)"
)


def _named(namespace: str, names: str) -> frozenset[str]:
    return frozenset(f"{namespace}::{name}" for name in names.split())


_NUMBERS = _named(
    "aten",
    """__and__ __contains__ __derive_index __getitem__ __is__ __isnot__ __not__ __or__ __range_length _set_item add and
    append as_tensor Bool ceil clear copy count device dim div endswith eq extend Float FloatImplicit floor floordiv
    format ge get gt index insert Int IntImplicit is_complex is_cuda is_floating_point items join keys le len list lower
    lt max min mul ne neg not numel pop pow remainder replace reverse round ScalarImplicit size sorted split startswith
    str strip sub sum tensor truediv upper values warn""",
)
"""What a TorchScript program computes with numbers, lists and texts."""
_STRUCTURE = _named(
    "prim",
    """Constant data device DictConstruct dtype GetAttr If is_cuda isinstance layout
    ListConstruct ListUnpack Loop max min NumToTensor RaiseException requires_grad SetAttr shape tolist TupleConstruct
    TupleIndex TupleSlice TupleUnpack unchecked_cast unchecked_unwrap_optional Uninitialized""",
)
_SORTED = frozenset({"Tensor", *(f"List[{kind}]" for kind in ("int", "float", "bool", "str"))})
"""Kinds of what is sorted whose order torch knows: objects have a method for it."""
_CHECKS = _NUMBERS | _named(
    "prim", "Constant If ListConstruct Loop max min RaiseException TupleConstruct Uninitialized"
)
"""What a part of a graph is made of that gives nothing but a message."""


class Refusal(ValueError):  # noqa: N818 - what it is, not what went wrong
    """A TorchScript program that is not transcribed, why, and the code of the error that this is."""

    def __init__(self, reason: str, code: str = "NF123") -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class Transcript:
    """A program, how far it is from the script in sd of the output, and the dtype in which that was compared."""

    program: ExportedProgram
    max_sd: float
    dtype: torch.dtype


def transcribed(load: Callable[[], Any], begin: Callable[[], None] = lambda: None) -> Transcript:
    """Return the program of a TorchScript archive.

    Args:
        load: opens it anew, on the CPU; it is called up to four times.
        begin: called before anything of it is run, once it was read and its control flow is gone.

    Raises:
        Refusal: naming what the road does not take, the operations that no file may call, or how far the program is
            from the script.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.InstanceNorm2d(2))
        >>> transcript = transcribed(lambda: torch.jit.script(net))
        >>> transcript.max_sd < 1e-12, transcript.dtype
        (True, torch.float64)
    """
    with warnings.catch_warnings(), silence(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = _checked(load)
        channels, ndim, dtype = _taken(script)
        # before it is run: a loop may have no end
        straight = _straightened(script, channels, ndim)
        begin()
        image = _sample(script, channels, ndim, dtype)
        program = _exported(straight, image)
        return Transcript(program, *_distance(program, load, image))


def _checked(load: Callable[[], Any]) -> Any:
    """Return a script in eval mode that calls what files may call and nothing else; nothing of it has run yet."""
    script = _evaluated(load())
    for parameter in getattr(script, "parameters", tuple)():
        parameter.requires_grad_(False)
    graph = script.forward.inlined_graph
    called = {_called(node) for node in _nodes(graph)}
    strange = sorted(
        kind
        for kind in called - _STRUCTURE - _NUMBERS
        if not (kind.startswith("aten::") and is_listed(kind[len("aten::") :]))
    )
    if strange:
        raise Refusal(f"it calls {', '.join(strange)[:200]}, which no program from a file may call", "NF121")
    endless = next((node for node in _nodes(graph) if _turns(node) > _MOST_TURNS), None)
    if endless is not None:
        raise Refusal(f"it has a loop that may have no end (prim::Loop at {_place(endless)})")
    if len(list(graph.inputs())) != 2:
        raise Refusal(
            f"its forward takes {len(list(graph.inputs())) - 1} inputs, and one image is taken here"
        )
    return script


def _evaluated(script: Any) -> Any:
    """Put a script into eval mode, in place; a frozen one has none."""
    if getattr(script, "training", False):
        script.eval()
    return script


def _turns(node: Any) -> int:
    """Return how often a loop turns at most, where that is a constant; of a `while` it is the largest integer."""
    if node.kind() != "prim::Loop":
        return 0
    turns = _number_of(next(node.inputs()))
    return turns if isinstance(turns, int) else 0


def _called(node: Any) -> str:
    """Return what a node calls; sorting objects calls a method of theirs, which the graph does not show."""
    kind: str = node.kind()
    sorts = kind in ("aten::sort", "aten::sorted")
    given = next(node.inputs()).type().annotation_str if sorts else "Tensor"
    return kind if given in _SORTED else f"{kind} of {given}"


def _nodes(block: Graph) -> Iterator[Any]:
    """Yield the nodes of a graph or block, those within them too."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _taken(script: Any) -> tuple[int, int, torch.dtype]:
    """Return channels, axes of space and dtype of the image, by the first convolution."""
    graph = _frozen(script).graph
    attributes = script.state_dict()
    for node in _nodes(graph):
        if not _CONVOLUTION.fullmatch(node.kind()):
            continue
        given = list(node.inputs())
        weight = _tensor_of(given[1], attributes)
        groups, turned = (
            _number_of(given[8 if len(given) > 7 else 6]),
            len(given) > 7 and _number_of(given[6]),
        )
        if weight is None or groups is None or turned:
            break
        return weight.shape[1] * groups, weight.dim() - 2, weight.dtype
    raise Refusal("it begins with no convolution of weights of its own, so what it takes is not known")


def _frozen(script: Any) -> Any:
    """Return a script with one graph, whose weights have their names still."""
    module = torch._C._freeze_module(script._c, [], True, True)
    return torch.jit._recursive.wrap_cpp_module(module)  # type: ignore[no-untyped-call]


def _tensor_of(value: Any, attributes: dict[str, Tensor]) -> Tensor | None:
    node, path = value.node(), []
    if node.kind() == "prim::Constant":
        return value.toIValue()  # type: ignore[no-any-return]
    while node.kind() == "prim::GetAttr":
        path.append(node.s("name"))
        node = next(node.inputs()).node()
    return attributes.get(".".join(reversed(path)))


def _number_of(value: Any) -> Any:
    return value.toIValue() if value.node().kind() == "prim::Constant" else None


def _sample(script: Any, channels: int, ndim: int, dtype: torch.dtype) -> Tensor:
    """Return the smallest image on which the script runs."""
    reason = ""
    for extent in _SAMPLES[ndim]:
        image = _noise((_BATCH, channels, *(extent,) * ndim), dtype, 0)
        try:
            script.forward(image.clone())
        except (RuntimeError, torch.jit.Error) as error:
            reason = (str(error).strip().splitlines() or [""])[-1][:160]
            continue
        return image
    raise Refusal(
        f"it does not run on {_BATCH} images of {channels} channels and {_SAMPLES[ndim]} pixels: {reason}"
    )


def _noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _straightened(script: Any, channels: int, ndim: int) -> Any:
    """Return the script with one graph, in which whatever the number of axes decides is decided."""
    module = _frozen(script)
    graph = module.graph
    extents = [None, channels, *(None,) * ndim]
    list(graph.inputs())[1].setType(torch._C.TensorType.get().with_sizes(extents))
    passes: Any = torch._C
    for _ in range(_ROUNDS):
        passes._jit_pass_inline(graph)
        passes._jit_pass_remove_mutation(graph)
        passes._jit_pass_propagate_shapes_on_graph(graph)
        _carry_ranks_(graph)
        _name_extents_(graph, graph)
        passes._jit_pass_peephole(graph, False)
        passes._jit_pass_peephole_list_idioms(graph, True)
        passes._jit_pass_constant_propagation(graph)
        passes._jit_pass_constant_loop_unrolling(graph)
        _drop_checks_(graph)
        passes._jit_pass_dce(graph)
    left = sorted(
        {f"{n.kind()} at {_place(n)}" for n in _nodes(graph) if n.kind() in ("prim::If", "prim::Loop")}
    )
    if left:
        raise Refusal(f"what it computes depends on control flow ({'; '.join(left)[:300]})")
    return module


def _place(node: Any) -> str:
    """Return the line of source that a node is of, as the archive has it."""
    line = re.search(r'File "(?:[^"]*/)?([^"/]*/?[^"/]*)", line (\d+)', node.sourceRange())
    return f"{line[1]}:{line[2]}" if line else "an unknown line"


def _rank(value: Any) -> int | None:
    kind = value.type()
    return kind.dim() if isinstance(kind, torch._C.TensorType) else None


def _carry_ranks_(block: Graph) -> None:
    """Give results of operations that keep the number of axes that number, where torch's own pass does not."""
    for node in _nodes(block):
        if node.outputsSize() != 1 or not _KEEPS_RANK.fullmatch(node.kind()):
            continue
        rank = _rank(next(node.inputs()))
        if (
            rank is not None
            and isinstance(node.output().type(), torch._C.TensorType)
            and _rank(node.output()) is None
        ):
            node.output().setType(torch._C.TensorType.get().with_sizes([None] * rank))


def _name_extents_(graph: Graph, block: Graph) -> None:
    """Replace the list of a tensor's sizes by that of its single sizes, and the number of its axes by that number."""
    for node in list(_nodes(block)):
        rank = _rank(next(node.inputs())) if node.kind() in ("aten::size", "aten::dim") else None
        if rank is None or node.inputsSize() != 1:
            continue
        graph.setInsertPoint(node)
        if node.kind() == "aten::dim":
            node.output().replaceAllUsesWith(graph.insertConstant(rank))
            continue
        sizes = []
        for axis in range(rank):
            size = graph.create("aten::size", [next(node.inputs()), graph.insertConstant(axis)], 1)
            size.insertBefore(node)
            size.output().setType(torch._C.IntType.get())
            sizes.append(size.output())
        listed = graph.create("prim::ListConstruct", sizes, 1)
        listed.insertBefore(node)
        listed.output().setType(torch._C.ListType(torch._C.IntType.get()))
        node.output().replaceAllUsesWith(listed.output())
    # torch's passes end the process where the point lies on a node that is gone
    graph.setInsertPoint(graph.return_node())


def _drop_checks_(block: Graph) -> None:
    """Take out conditions and loops that give nothing but a message."""
    for node in reversed(list(block.nodes())):
        unused = not any(output.uses() for output in node.outputs())
        inner = [n.kind() for part in node.blocks() for n in _nodes(part)]
        if node.kind() in ("prim::If", "prim::Loop") and unused and set(inner) <= _CHECKS:
            node.destroy()
            continue
        for part in node.blocks():
            _drop_checks_(part)


def _exported(script: Any, image: Tensor) -> ExportedProgram:
    """Return the program, by torch's road, with batch and sizes free where it allows that."""
    from torch._export.converter import TS2EPConverter

    try:
        return TS2EPConverter(script, (image,), None).convert()
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise Refusal(f"torch's converter of TorchScript ends at: {reason}") from error


def _distance(program: ExportedProgram, load: Callable[[], Any], image: Tensor) -> tuple[float, torch.dtype]:
    """Return how far the program is from the script, on the image and on another batch and size, and in which dtype.

    Raises:
        Refusal: beyond rounding.
    """
    for dtype, bound in ((torch.float64, _DOUBLE), (image.dtype, _SINGLE)):
        body, script = _in_dtype(program.module(), dtype), _script_in(load, dtype)
        try:
            script.forward(image.to(dtype))
        except (RuntimeError, torch.jit.Error):
            # what casts to a dtype of its own does not meet weights of another
            continue
        other = _noise((1, image.shape[1], *(n + n // 2 for n in image.shape[2:])), dtype, 1)
        worst = max(_apart(body, script, image.to(dtype)), _apart_elsewhere(body, script, other))
        if worst > bound:
            raise Refusal(
                f"the program that torch makes of it differs from it by {worst:.1g} sd in {dtype}", "NF224"
            )
        return worst, dtype
    raise Refusal("it does not run twice")


def _apart(body: Any, script: Any, image: Tensor) -> float:
    """Return the largest difference in sd; infinite where there are other outputs."""
    theirs = _tensors(script.forward(image.clone()))
    mine = _tensors(body(image.clone()))
    if len(mine) != len(theirs) or any(a.shape != b.shape for a, b in zip(mine, theirs, strict=True)):
        return math.inf
    worst = 0.0
    for a, b in zip(mine, theirs, strict=True):
        sd = float(b.double().std(correction=0)) or 1.0
        worst = max(worst, float((a.double() - b.double()).abs().max().nan_to_num(math.inf)) / sd)
    return worst


def _apart_elsewhere(body: Any, script: Any, image: Tensor) -> float:
    """Return the same on an image of another batch and size; 0 where the script or the program is not for it."""
    try:
        return _apart(body, script, image)
    except (RuntimeError, AssertionError, torch.jit.Error):
        return 0.0


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _in_dtype(body: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a program's module with its real numbers in a dtype, and without its checks of dtypes."""
    body = copy.deepcopy(body)
    for node in list(body.graph.nodes):
        if node.op == "get_attr" and isinstance(value := _attribute(body, node.target), Tensor):
            if value.is_floating_point():
                value.data = value.data.to(dtype)
        elif "_assert_tensor_metadata" in str(node.target):
            body.graph.erase_node(node)
    body.recompile()
    return body


def _attribute(body: Any, path: str) -> Any:
    for name in path.split("."):
        body = getattr(body, name, None)
    return body


def _script_in(load: Callable[[], Any], dtype: torch.dtype) -> Any:
    """Return the script as it was read with its real numbers in a dtype, those too that freezing put into its graph."""
    script = _evaluated(load().to(dtype))
    for node in _nodes(script.forward.graph):
        if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t":
            value = node.t("value")
            if value.is_floating_point():
                node.t_("value", value.to(dtype))
    return script
