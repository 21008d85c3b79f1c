"""Where tensors live: which accelerator is there, how much room it has, and the one place that moves values.

A copy between pageable memory and a device waits for the device, and for everything that was asked of it before. So
values go through pinned memory, which torch keeps for the next one, and nobody waits: what the device computes it
computes in the order in which it was asked.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfix.errors import NormfixError

__all__ = [
    "AUTO",
    "CPU",
    "Landing",
    "accelerator",
    "bytes_of",
    "chosen",
    "described",
    "moved",
    "place_",
    "room",
    "synchronize",
]

AUTO = "auto"
"""Name of whatever accelerator is there, else the CPU."""

CPU = torch.device("cpu")

_IN_FLIGHT = 2
"""Values on their way to the host before one is waited for; each is held on the device until it is here."""


def accelerator() -> torch.device:
    """Return the accelerator that networks run on here: a CUDA (or ROCm) device, else the CPU.

    Apple's MPS is not among them: it has no float64, which every proof is made in.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


def chosen(name: str | torch.device | None) -> torch.device | None:
    """Return the device of a name, "auto" included; None for None.

    Raises:
        NormfixError: NF116 for a name that torch does not know, or a device that cannot compute what is needed.
    """
    if name is None:
        return None
    if name == AUTO:
        return accelerator()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise NormfixError("NF116", f"cannot compute there: {reason}.", where=f"--device {name}") from error
    if device.type == "cpu" and device.index:
        raise NormfixError("NF116", "there is one CPU: --device cpu.", where=f"--device {name}")
    if device.type == "mps":
        raise NormfixError(
            "NF116",
            "it has no float64, in which statistics are measured and proofs are made. Compute on the CPU: "
            "--device cpu (device='cpu' in Python); what is converted there runs on mps.",
            where=f"--device {name}",
        )
    return device


def place_(network: nn.Module, name: str | torch.device | None, dtype: torch.dtype | None = None) -> None:
    """Move a network to the device of a name, and to a dtype, in place; None leaves it where, or as, it is.

    Raises:
        NormfixError: NF116 for a name that torch does not know, or a device that is not there, has no room for the
            network or cannot compute what is needed.
    """
    device = chosen(name)
    if device is None and dtype is None:
        return
    try:
        network.to(device=device, dtype=dtype)
    except Exception as error:  # torch looks for the module of a device that it was built without
        reason = " ".join(str(error).split())[:160]
        raise NormfixError("NF116", f"cannot compute there: {reason}.", where=f"--device {name}") from error


def described(device: torch.device) -> str:
    """Return a device with the name of its card."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a value on a device: itself if it is there, else a copy that nobody waits for."""
    if value.device == device:
        return value
    if device.type == "cuda" and value.device.type == "cpu" and value.numel():
        staged = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return staged.copy_(value).to(device, non_blocking=True)
    return value.to(device)


def bytes_of(value: Tensor) -> memoryview:
    """Return a tensor's values as bytes in the host's memory, row by row."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def room(device: torch.device) -> int | None:
    """Return how many bytes a device has free, what torch holds in reserve included; None if it cannot be told."""
    if device.type != "cuda":
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + reserve)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Landing:
    """An array in the host's memory that a device writes windows of, several of them on their way at a time."""

    def __init__(self, array: Tensor) -> None:
        self._array = array
        self._coming: deque[tuple[tuple[slice, ...], Tensor, Tensor, Any]] = deque()
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def write(self, index: Sequence[slice], value: Tensor) -> None:
        """Let a window come, beside what the device computes next; what is written from the host is there at once."""
        with self._lock:
            if value.device.type != "cuda":
                self._array[tuple(index)] = value
                return
            if self._stream is None:
                self._stream = torch.cuda.Stream(value.device)  # type: ignore[no-untyped-call]
            # in one piece first: a window that is copied over the bus row by row is waited for
            value = value.contiguous()
            staged = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(value.device))
            with torch.cuda.stream(self._stream):
                staged.copy_(value, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
            # the value is held until it is here, for its memory is of the other stream
            self._coming.append((tuple(index), value, staged, event))
            while len(self._coming) > _IN_FLIGHT:
                self._land()

    def read(self, index: Sequence[slice]) -> Tensor:
        """Return a window, after all that was written has come."""
        with self._lock:
            while self._coming:
                self._land()
        return self._array[tuple(index)]

    def _land(self) -> None:
        index, _, staged, event = self._coming.popleft()
        event.synchronize()
        self._array[index] = staged
