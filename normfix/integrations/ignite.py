"""An Ignite handler, which is MONAI's too, that does what a FineTuning asks of a training loop."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events
from torch import optim
from torch.utils.hooks import RemovableHandle

from normfix.api.finetuning import FineTuning
from normfix.images.given import GivenImages

__all__ = ["FineTuningHandler"]


class FineTuningHandler:
    """Follow the optimizer while a trainer runs, and recalibrate whenever an evaluator starts.

    It has `state_dict` and `load_state_dict`, so it can be among the objects of a Checkpoint.

    Args:
        run: of normfix.prepare_finetune.
        images: whole images, (N, C, *space) each, to measure the statistics on before each evaluation; None
            leaves them as training tracked them.
        allow_flat: as for normfix.calibrate.
    """

    def __init__(
        self,
        run: FineTuning,
        images: GivenImages | None = None,
        *,
        allow_flat: bool | None = None,
    ) -> None:
        self.run, self.images, self.allow_flat = run, images, allow_flat
        self._handle: RemovableHandle | None = None

    def attach(self, trainer: Engine, optimizer: optim.Optimizer, evaluator: Engine | None = None) -> None:
        """Add the handler to a trainer, and to the evaluator that validates its network."""
        trainer.add_event_handler(Events.STARTED, self._follow, optimizer)
        trainer.add_event_handler(Events.COMPLETED, self._release)
        if evaluator is not None and self.images is not None:
            evaluator.add_event_handler(Events.STARTED, self._recalibrate)

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the run of a checkpoint."""
        self.run.load_state_dict(state_dict)

    def _follow(self, engine: Engine, optimizer: optim.Optimizer) -> None:
        self._handle = self.run.follow(optimizer)

    def _release(self, engine: Engine) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _recalibrate(self, engine: Engine) -> None:
        assert self.images is not None
        self.run.recalibrate(self.images, allow_flat=self.allow_flat)
