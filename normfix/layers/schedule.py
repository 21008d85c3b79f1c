"""RenormSchedule: plain batch norm first, then bounds that open step by step.

Ioffe's ImageNet runs held batch norm for 5k steps, opened d_max until 25k and r_max until 40k. A run of 10k
steps would never get there, so the ramps here are shares of the run. Layers that have seen a batch are warm:
they start at the end, for resetting the ramp of a trained network makes its predictions swing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn, optim
from torch.utils.hooks import RemovableHandle

from normfix.layers.batchrenorm import BatchRenorm

__all__ = ["RenormSchedule", "after_steps"]


class RenormSchedule:
    """Write r_max and d_max of every BatchRenorm layer by optimizer step.

    Call `step` after each `optimizer.step()`, or `follow(optimizer)` once, which also counts right under
    gradient accumulation and with steps a GradScaler skips. Each layer ends at the bounds it was made with.

    Args:
        model: the network; its layers are found once.
        total_steps: optimizer steps of the whole run.
        warm: True starts every layer at the end of its ramp, False at its beginning; None starts those
            layers at the end that have seen a batch, as pretrained and converted ones have.
        batch_norm_until: share of the run that is plain batch norm.
        d_until: share of the run at which d_max reaches its end.
        r_until: share of the run at which r_max reaches its end.

    Raises:
        ValueError: the model has no BatchRenorm layer, or the shares are not in order.

    Example:
        >>> from torch import nn
        >>> from normfix.layers import BatchRenorm2d, RenormSchedule
        >>> layer = BatchRenorm2d(8)
        >>> schedule = RenormSchedule(nn.Sequential(layer), total_steps=100)
        >>> layer.r_max.item()
        1.0
        >>> for _ in range(30):
        ...     schedule.step()
        >>> layer.r_max.item()
        3.0
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        warm: bool | None = None,
        batch_norm_until: float = 0.04,
        d_until: float = 0.2,
        r_until: float = 0.3,
    ) -> None:
        modules = model.named_modules()
        self._layers = {name: module for name, module in modules if isinstance(module, BatchRenorm)}
        if not self._layers:
            raise ValueError("the model has no BatchRenorm layer, so there is nothing to schedule")
        ends = (d_until, r_until)
        if total_steps < 1 or not 0 <= batch_norm_until <= min(ends) <= max(ends) <= 1:
            raise ValueError(
                f"need total_steps >= 1 and 0 <= batch_norm_until <= d_until, r_until <= 1, "
                f"got {total_steps}, {batch_norm_until}, {d_until}, {r_until}"
            )
        self.steps = 0
        self.total_steps = total_steps
        self.batch_norm_until = batch_norm_until
        self.d_until = d_until
        self.r_until = r_until
        is_warm = _has_seen_a_batch if warm is None else lambda _: warm
        self.warm = tuple(name for name, layer in self._layers.items() if is_warm(layer))
        self._write()

    def step(self) -> None:
        """Count one optimizer step and write the bounds that hold from here on."""
        self.steps += 1
        self._write()

    def follow(self, optimizer: optim.Optimizer) -> RemovableHandle:
        """Step after every step of the optimizer; remove the returned handle to stop.

        Raises:
            ValueError: it is a wrapper that would never tell.
        """
        return after_steps(optimizer, self.step)

    def bounds(self, layer: BatchRenorm) -> tuple[float, float]:
        """Return (r_max, d_max) of a ramping layer at the present step."""
        r = 1 + (layer.r_limit - 1) * self._share(self.r_until)
        return r, layer.d_limit * self._share(self.d_until)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, in plain numbers and strings."""
        return {
            "steps": self.steps,
            "total_steps": self.total_steps,
            "batch_norm_until": self.batch_norm_until,
            "d_until": self.d_until,
            "r_until": self.r_until,
            "warm": list(self.warm),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was written, and write the bounds.

        Raises:
            ValueError: the state names a layer this model does not have.
        """
        missing = set(state["warm"]) - set(self._layers)
        if missing:
            raise ValueError(f"the schedule was saved for another model: it has no layer {sorted(missing)}")
        self.steps, self.total_steps = state["steps"], state["total_steps"]
        self.batch_norm_until = state["batch_norm_until"]
        self.d_until, self.r_until = state["d_until"], state["r_until"]
        self.warm = tuple(state["warm"])
        self._write()

    def _write(self) -> None:
        for name, layer in self._layers.items():
            layer.set_bounds_(*((layer.r_limit, layer.d_limit) if name in self.warm else self.bounds(layer)))

    def _share(self, until: float) -> float:
        begin, end = self.batch_norm_until * self.total_steps, until * self.total_steps
        if self.steps >= end:
            return 1.0
        return max(0.0, (self.steps - begin) / (end - begin))


def _has_seen_a_batch(layer: BatchRenorm) -> bool:
    return layer.num_batches_tracked is not None and bool(layer.num_batches_tracked > 0)


def after_steps(optimizer: optim.Optimizer, call: Callable[[], None]) -> RemovableHandle:
    """Call after every step of an optimizer that was not skipped; remove the returned handle to stop.

    Raises:
        ValueError: it was not built by torch's own __init__, which makes `step` run hooks: it would never call.
    """
    if not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"{type(optimizer).__name__} is a wrapper whose steps run no hooks, so they would not be counted: "
            "follow the optimizer inside it"
        )
    return optimizer.register_step_post_hook(lambda *_: None if _skipped(optimizer) else call())


def _skipped(optimizer: optim.Optimizer) -> bool:
    """Tell whether a GradScaler found infinities and left the skipping to the optimizer, as to a fused one."""
    return bool(getattr(optimizer, "found_inf", None))
