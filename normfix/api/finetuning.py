"""prepare_finetune: what a converted network needs of a training loop, in one object that follows the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from torch import Tensor, nn, optim
from torch.utils.hooks import RemovableHandle

from normfix.api.recalibration import calibrate_
from normfix.errors import NormfixError
from normfix.images.given import GivenImages
from normfix.layers import BatchRenorm, RenormSchedule
from normfix.layers.schedule import after_steps
from normfix.records.measurements import CalibrationSummary
from normfix.records.tables import counted

__all__ = ["FineTuning", "prepare_finetune"]

_RENEWALS = 10
_SLOWEST, _FASTEST = 0.01, 0.1


class FineTuning:
    """The norms' part of a training run: their schedule, their last steps, and their statistics.

    Attributes:
        model: the network that is trained.
        schedule: of its BatchRenorm layers, or None if it has none.
        steps: optimizer steps so far.
        hold_at: the step from which BatchRenorm layers normalise by their running statistics, unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        schedule: RenormSchedule | None,
        *,
        hold_at: int,
    ) -> None:
        self.model, self.schedule, self.hold_at = model, schedule, hold_at
        self._groups = groups
        self.steps = 0
        self._following: RemovableHandle | None = None
        self._layers = [module for module in model.modules() if isinstance(module, BatchRenorm)]
        self._hold()

    def __repr__(self) -> str:
        steps, layers = counted(self.steps, "step"), counted(len(self._layers), "BatchRenorm layer")
        return f"<FineTuning: {type(self.model).__name__}, {layers}; {steps} so far, held from step {self.hold_at}>"

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer: weights, and vectors without weight decay.

        They are new ones each time, for an optimizer writes its options into them.
        """
        return [{**group, "params": list(group["params"])} for group in self._groups]

    def follow(self, optimizer: optim.Optimizer) -> RemovableHandle:
        """Step after every step of the optimizer, and of no other; remove the returned handle to stop.

        Raises:
            ValueError: it is a wrapper that would never tell.
        """
        handle = after_steps(optimizer, self.step)
        if self._following is not None:
            self._following.remove()
        self._following = handle
        return handle

    def step(self) -> None:
        """Count one optimizer step."""
        self.steps += 1
        if self.schedule is not None:
            self.schedule.step()
        self._hold()

    def recalibrate(
        self,
        images: GivenImages,
        *,
        forward_fn: Callable[[nn.Module, Tensor], Any] | None = None,
        allow_flat: bool | None = None,
    ) -> CalibrationSummary:
        """Measure the statistics anew on whole images under the weights of now; `normfix.calibrate_` has more."""
        return calibrate_(self.model, images, forward_fn=forward_fn, allow_flat=allow_flat)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, in plain numbers and strings."""
        schedule = None if self.schedule is None else self.schedule.state_dict()
        return {"steps": self.steps, "hold_at": self.hold_at, "schedule": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was written.

        Raises:
            ValueError: the state was saved for another network, or in a run of another length.
        """
        if (state["schedule"] is None) is not (self.schedule is None):
            raise ValueError(
                "the state was saved for another network: only one of them has BatchRenorm layers"
            )
        own = self.state_dict()
        lengths = [(s["hold_at"], (s["schedule"] or {}).get("total_steps")) for s in (state, own)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"the state is of a run held from step {state['hold_at']}, and this one is held from step "
                f"{self.hold_at}: prepare it with the total_steps and hold that the other had"
            )
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]
        self._hold()

    def _hold(self) -> None:
        for layer in self._layers:
            layer.hold_(self.steps >= self.hold_at)


def prepare_finetune(
    model: nn.Module,
    total_steps: int,
    *,
    trainable: Sequence[str] = ("*",),
    weight_decay: float = 0.01,
    momentum: float | None = None,
    hold: float = 0.1,
    warm: bool | None = None,
) -> FineTuning:
    """Set a converted network up for training on new data, and return what its loop has to call.

    Changed in place: which parameters require gradients, and the momentum of its BatchRenorm layers.

    Args:
        model: with BatchRenorm or frozen layers; synchronise it before, if several processes train it.
        total_steps: optimizer steps of the whole run.
        trainable: shell-style patterns of the parameters that train.
        weight_decay: of weights; biases, affine vectors and other vectors have none.
        momentum: of running statistics; by default so that they are renewed ten times in the run, but within
            0.01 and 0.1.
        hold: share of the run, at its end, in which BatchRenorm layers normalise by their running statistics:
            training then sees exactly what inference computes.
        warm: as for RenormSchedule: by default layers that have seen a batch start at the end of the ramp.

    Raises:
        NormfixError: NF247 if a pattern matches no parameter.
        ValueError: total_steps is below 1, hold or momentum is no share, or weight_decay is negative or not finite.
        TypeError: total_steps or hold is no number.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.InstanceNorm2d(4), torch.nn.Conv2d(4, 1, 1))
        >>> model = normfix.convert(net, torch.rand(1, 1, 64, 64), "batchrenorm").model.train()
        >>> run = normfix.prepare_finetune(model, total_steps=100)
        >>> optimizer = torch.optim.AdamW(run.groups, lr=1e-3)
        >>> handle = run.follow(optimizer)
        >>> model(torch.rand(2, 1, 32, 32)).square().mean().backward()
        >>> optimizer.step()
        >>> run.steps, model[1].r_max.item(), [len(group["params"]) for group in run.groups]
        (1, 3.0, [2, 2])
    """
    given: dict[str, Any] = {"total_steps": total_steps, "hold": hold}
    for name, value in given.items():
        if not isinstance(value, Real):  # such as an example input, which other verbs take there
            raise TypeError(f"{name} is a number, got {type(value).__name__}")
    if total_steps < 1 or not 0 <= hold <= 1:
        raise ValueError(f"need total_steps >= 1 and 0 <= hold <= 1, got {total_steps} and {hold}")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum is the share of a new batch in the running statistics, 0 to 1, got {momentum}"
        )
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is a finite number, 0 or more, got {weight_decay}")
    everything = model.named_parameters(remove_duplicate=False)
    named = [(n, p) for n, p in everything if p.is_floating_point() or p.is_complex()]
    for pattern in trainable:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise NormfixError(
                "NF247",
                "it matches no parameter; `model.named_parameters()` lists their names.",
                where=pattern,
            )
    chosen = {id(p) for name, p in named if any(fnmatchcase(name, pattern) for pattern in trainable)}
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in chosen)
    layers = [module for module in model.modules() if isinstance(module, BatchRenorm)]
    if momentum is None:
        momentum = min(_FASTEST, max(_SLOWEST, _RENEWALS / total_steps))
    for layer in layers:
        layer.momentum = momentum
    schedule = RenormSchedule(model, total_steps, warm=warm) if layers else None
    hold_at = total_steps - round(hold * total_steps) if hold else total_steps + 1
    return FineTuning(model, _groups(model, weight_decay), schedule, hold_at=hold_at)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    mixing = (nn.Linear, nn.modules.conv._ConvNd)  # their weights are weights, however few channels they have
    sure = {id(module.weight) for module in model.modules() if isinstance(module, mixing)}
    weights, vectors = list[nn.Parameter](), list[nn.Parameter]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            (weights if id(parameter) in sure or not _is_vector(parameter) else vectors).append(parameter)
    groups = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_vector(parameter: Tensor) -> bool:
    """Tell whether it has one axis but for extents of 1: a bias, an affine, a scale."""
    return parameter.numel() == max(parameter.shape, default=1)
