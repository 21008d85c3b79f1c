"""Copies of networks: deep ones, twins that share parameters, and copies as they behave in training."""

from __future__ import annotations

import copy
import copyreg
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normfix.errors import NormfixError
from normfix.networks.behaviour import SAID, behaviour_of
from normfix.networks.calling import failures, home_of, in_eval_mode, once_each, require_network

__all__ = ["as_trained_copy", "copy_of", "cpu_twin_of", "double_of", "equal_values", "original_of", "twin_of"]


_TRIALS = 5


Memo: TypeAlias = dict[int, Any]


_STATE = frozenset({"_parameters", "_buffers", "_modules"})


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, in the same mode module by module: some classes' own copies are in train mode.

    Raises:
        NormfixError: NF118 if it is no network, or one without data or behind a compiler; NF208 if it cannot be
            copied.
    """
    require_network(model)
    return _copied(model, {})


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy to run in eval mode, whose parameters are the model's own: it takes next to no memory.

    Modules, buffers, hooks and modes are its own, so that another thread that runs or trains the model meanwhile
    notices nothing, and nothing that a forward pass keeps is kept in the model. What cannot be copied (locks, open
    files) is the model's own too.

    Raises:
        NormfixError: NF118 if it is no network, NF208 if even so it cannot be copied.
    """
    require_network(model)
    shared: Memo = {id(parameter): parameter for parameter in model.parameters()}
    try:
        twin = _copied(model, shared)
    except NormfixError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        twin = _copied(model, {**shared, **_uncopyable(model, shared)})
    _ORIGINALS[twin] = weakref.ref(model)
    return in_eval_mode(twin)


def cpu_twin_of(model: nn.Module) -> nn.Module:
    """Return a twin on the CPU; of a model on another device that is a copy, parameters too."""
    twin = twin_of(model)
    return twin if home_of(twin)[0].type == "cpu" else copy_of(twin).cpu()


def double_of(model: nn.Module, spare: nn.Module | None = None) -> nn.Module:
    """Return a copy of a model in float64.

    Args:
        model: not modified.
        spare: a float64 network that nobody needs any more; it takes the model's state over if it is the same network
            in everything else, and then it is the copy.
    """
    if spare is None or behaviour_of(spare) != behaviour_of(model):
        return copy_of(model).double()
    theirs = dict((*model.named_parameters(), *model.named_buffers()))
    own = dict((*spare.named_parameters(), *spare.named_buffers()))
    if any(mine.device != theirs[name].device for name, mine in own.items()):
        return copy_of(model).double()
    with torch.no_grad():
        for name, mine in own.items():
            place, value = once_each(mine, theirs[name])
            place.copy_(value)
    for copied, module in zip(spare.modules(), model.modules(), strict=True):
        copied.training = module.training
    return spare


_ORIGINALS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def original_of(model: nn.Module) -> nn.Module:
    """Return the network that a twin was made of, or the network itself if it is no twin."""
    known = _ORIGINALS.get(model)
    original = None if known is None else known()
    return model if original is None else original_of(original)


def _copied(model: nn.Module, shared: Memo) -> nn.Module:
    """Copy a network, again if a container changed meanwhile: another thread may be running it."""
    unlike = ""
    for trial in range(_TRIALS):
        try:
            copied = _deep_copy(model, dict(shared))
        except failures() as error:
            if trial + 1 == _TRIALS or type(error) is not RuntimeError:
                raise _not_copied(model, error) from error
        else:
            unlike = _unlike(model, copied, shared)
            if not unlike:
                return copied
    raise NormfixError(
        "NF208",
        f"a deep copy of the network is not one: {unlike}. normfix works on copies and never changes the one it was "
        "given. Remove __deepcopy__ (or __reduce__, __getstate__) of its classes, or let it copy all that they hold.",
        where=type(model).__name__,
    )


def _unlike(model: nn.Module, copied: nn.Module, shared: Memo) -> str:
    """Return what makes a copy none, as classes that say themselves how they are copied can; '' if nothing does.

    Values are compared where a class that is not torch's says so: elsewhere they were copied by torch.
    """
    theirs = {id(module) for module in model.modules()}
    for path, module in copied.named_modules():
        if id(module) in theirs:
            return f"it shares {path or 'the network itself'} with the original"
    originals, copies = _tensors(model), _tensors(copied)
    if other := sorted(originals.keys() ^ copies.keys()):
        return f"only one of them has {other[0]}"
    told = any(not _is_plain(m) and not type(m).__module__.startswith("torch.") for m in model.modules())
    for name, tensor in originals.items():
        if id(tensor) not in shared and _place(tensor) == _place(copies[name]):
            return f"it shares {name} with the original"
        if told and not equal_values(tensor, copies[name]):
            return f"it holds other values in {name}"
    return ""


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a network that have values, under each of their names."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {
        name: tensor
        for name, tensor in named
        if not isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    }


def _place(tensor: Tensor) -> int:
    """Return what is equal for tensors that lie in the same memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse, or of a class that holds others
        return id(tensor)


def equal_values(tensor: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same values, not a number included."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    if tensor.layout is not torch.strided or tensor is other or torch.equal(tensor, other):
        return True
    return bool(((tensor == other) | ((tensor != tensor) & (other != other))).all())


def _deep_copy(model: nn.Module, memo: Memo) -> nn.Module:
    modules = dict(model.named_modules())
    modes = {path: module.training for path, module in modules.items()}
    alive = _replace_uninitialised(model, memo), _detach(model, memo)  # no other object may take their ids
    copied = _modules_copied(model, memo)
    for path, module in copied.named_modules():
        module.training = modes.get(path, module.training)
        # a GraphModule's own copy leaves behind what was attached to it
        said = vars(modules[path]) if path in modules else {}
        vars(module).update({name: said[name] for name in SAID if name in said})
    del alive
    return copied


def _not_copied(model: nn.Module, error: Exception) -> NormfixError:
    return NormfixError(
        "NF208",
        f"the network cannot be deep-copied ({error}), and normfix never changes the one it was given. "
        "Detach what holds graphs, locks or open files.",
        where=type(model).__name__,
    )


def _uncopyable(model: nn.Module, shared: Memo) -> Memo:
    """Return the attributes of modules that cannot be copied, as a memo that shares them."""
    found: Memo = {}
    for module in model.modules():
        for name, value in tuple(vars(module).items()):
            if name in _STATE or isinstance(value, nn.Module | Tensor):
                continue
            try:
                copy.deepcopy(value, dict(shared))
            except TypeError:
                found[id(value)] = value
            except RuntimeError:  # it changed meanwhile, so it is no lock or file
                continue
    return found


def _replace_uninitialised(model: nn.Module, memo: Memo) -> list[Tensor]:
    """Let a deepcopy make new uninitialised tensors for those that torch cannot copy yet."""
    blank: list[Tensor] = [
        cast(Tensor, tensor)
        for tensor in (*model.parameters(), *model.buffers())
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    ]
    for tensor in blank:
        kind: Any = type(tensor)
        memo[id(tensor)] = kind(requires_grad=tensor.requires_grad, device=tensor.device, dtype=tensor.dtype)
    return blank


def _modules_copied(model: nn.Module, memo: Memo) -> nn.Module:
    """Deep-copy a model as copy.deepcopy does, in a third of the time.

    A module that Python copies by its attributes is made empty and given copies of them; what is no container, and the
    empty tables of hooks of which each module has ten, takes no call.
    """
    plain = [module for module in model.modules() if id(module) not in memo and _is_plain(module)]
    for module in plain:
        kind = type(module)
        memo[id(module)] = kind.__new__(kind)
    for module in plain:
        # before Python 3.11 and torch 2.14 there is none
        given: Callable[[], dict[str, Any]] | None = getattr(module, "__getstate__", None)
        held = vars(module) if given is None else given()
        state = {name: _attribute_copied(value, memo) for name, value in tuple(held.items())}
        memo[id(module)].__setstate__(state)
    return copy.deepcopy(model, memo)


def _attribute_copied(value: Any, memo: Memo) -> Any:
    if type(value) in _ATOMS:
        return value
    if type(value) is OrderedDict and not value:
        return memo.setdefault(id(value), OrderedDict())
    return copy.deepcopy(value, memo)


_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module is copied by its attributes: neither it nor its class says how else."""
    kind = type(module)
    own = [vars(base) for base in kind.__mro__ if base not in (object, nn.Module)]
    said = any(not _SAYING.isdisjoint(names) or names.get("__slots__") for names in own)
    special = said or kind in copyreg.dispatch_table or kind.__setstate__ not in _SETTERS
    return not special and getattr(module, "__deepcopy__", None) is None


_SAYING = frozenset(
    f"__{name}__"
    for name in ("new", "reduce_ex", "reduce", "getstate", "getnewargs_ex", "getnewargs", "deepcopy")
)
"""By which a class says how it is copied."""

_SETTERS = frozenset({nn.Module.__setstate__, nn.modules.conv._ConvNd.__setstate__})


def _detach(model: nn.Module, memo: Memo) -> list[Tensor]:
    """Let a deepcopy take tensors that a forward pass in training left on a module, without their graph."""
    left = [
        value
        for module in model.modules()
        for value in tuple(vars(module).values())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    memo.update((id(value), value.detach().clone()) for value in left)
    return left


def as_trained_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy whose batch and instance norms use the statistics of their input also in eval mode.

    This is the function of a network that people run in train mode (pix2pix practice), without the side
    effects of that mode.
    """
    copied = copy_of(model)
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return copied
