"""A second device without hardware: tensors that say they live on `npy:0` and are computed on the CPU.

An operation that is given tensors of both devices raises, as on an accelerator, but for copies and for scalars. Needs
torch's registration of backends in Python.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_rng_state(self, device=None):
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device=None):
        pass


_setup_privateuseone_for_python_backend("npy", backend_module=_Module())
DEVICE = torch.device("npy:0")


class Away(torch.Tensor):
    """A tensor of the stand-in, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Lets factories make tensors on the stand-in."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_MOVES = (
    "aten::_to_copy",
    "aten::copy_",
    "aten::to",
    "aten::lift_fresh",
    "aten::_copy_from",
    "aten::index_put_",
)


def _run(func, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    away = any(isinstance(t, Away) for t in leaves)
    here = any(isinstance(t, torch.Tensor) and not isinstance(t, Away) and t.dim() > 0 for t in leaves)
    name, device = func._schema.name, kwargs.get("device")
    if away and here and name not in (*_MOVES, "aten::index", "aten::_unsafe_index"):
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} mixes npy:0 and cpu")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name == "aten::_local_scalar_dense":
        return out
    goes = torch.device(device).type == "npy" if device is not None else away
    if name == "aten::copy_":
        goes = isinstance(args[0], Away)
    if func._schema.is_mutable and any(
        r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns
    ):
        written = kwargs.get("out", args[0] if args else None)
        return written if isinstance(out, torch.Tensor) else out
    return tree_map(
        lambda t: Away(t) if isinstance(t, torch.Tensor) and goes and not isinstance(t, Away) else t, out
    )


def _inner(value):
    return value.inner if isinstance(value, Away) else value


def moved_(network):
    """Put a network's tensors on the stand-in."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(
                    Away(parameter.detach().clone()), requires_grad=False
                )
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = Away(buffer.detach().clone())
    return network
