"""A Lightning callback that does what a FineTuning asks of a training loop."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch.utils.hooks import RemovableHandle

from normfix.api.finetuning import FineTuning
from normfix.images.given import GivenImages

__all__ = ["FineTuningCallback"]


class FineTuningCallback(pl.Callback):
    """Follow the optimizers, recalibrate before each validation, and keep the run in checkpoints.

    Gradient accumulation, mixed precision and resuming need nothing else.

    Args:
        run: of normfix.prepare_finetune, on the network inside the LightningModule.
        images: whole images, (N, C, *space) each, to measure the statistics on before each validation; None
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
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the steps of the first optimizer, which is the one that trains the network."""
        self._handles = [self.run.follow(trainer.optimizers[0])]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop counting."""
        self._release()

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the statistics anew before the first batch, except for the check before training.

        Not earlier, for at the start of the epoch callbacks that average weights put those in place.
        """
        first = batch_idx == 0 and dataloader_idx == 0
        if first and self.images is not None and not trainer.sanity_checking:
            self.run.recalibrate(self.images, allow_flat=self.allow_flat)

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state for Lightning's checkpoint."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the run of a checkpoint."""
        self.run.load_state_dict(state_dict)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
