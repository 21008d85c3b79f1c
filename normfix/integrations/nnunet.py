"""nnU-Net's predictor with exact tiles for its sliding window; files, folds and mirroring stay nnU-Net's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn
from typing_extensions import Unpack

from normfix.api.conversion import ConvertOptions, convert
from normfix.api.prediction import PredictOptions, predict
from normfix.conversion.results import Conversion
from normfix.errors import NormfixError

__all__ = ["ExactPredictor"]


class ExactPredictor(nnUNetPredictor):  # type: ignore[misc]
    """Predict as nnUNetPredictor does, by networks without live statistics, and without seams.

    `initialize_from_trained_model_folder` reads the model as ever. Then `convert` makes constants of every fold's
    statistics, or `use` takes networks that were converted before. Images are not extended to the patch size.
    With mirroring the network is run on each mirrored image as a whole, and the results are averaged.

    Args:
        tile: pixels per axis of a tile, as for normfix.predict.
        options: of normfix.predict.
        **kwargs: as for nnUNetPredictor; `tile_step_size` and `use_gaussian` mean nothing here.
    """

    network: Any

    def __init__(
        self, tile: int | Sequence[int] | None = None, options: PredictOptions | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.tile, self.options = tile, options or {}
        self.networks: list[nn.Module] = []

    def convert(self, cases: Sequence[Sequence[str]], **options: Unpack[ConvertOptions]) -> list[Conversion]:
        """Convert the network of each fold on images that nnU-Net reads and preprocesses, and use them.

        Args:
            cases: for each image the files of its channels, as for predict_from_files.
            **options: of normfix.convert.

        Returns:
            One conversion per fold; their `.proof.passed` tell whether they may be relied on.
        """
        images = [self._prepared(files) for files in cases]
        planes = [plane for image in images for plane in self._planes(image)]
        done = []
        for parameters in self.list_of_parameters:
            self.network.load_state_dict(parameters)
            done.append(convert(self.network.to(self.device), planes, **options))
        self.use([one.model for one in done])
        return done

    def use(self, networks: nn.Module | Sequence[nn.Module]) -> None:
        """Predict by networks that were converted before, one for each fold."""
        self.networks = [networks] if isinstance(networks, nn.Module) else list(networks)

    @torch.inference_mode()
    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Return the logits (classes, *space) of an image (channels, *space), averaged over folds, in float32.

        Raises:
            NormfixError: NF586 before any network was converted, and codes of normfix.predict.
        """
        if not self.networks:
            raise NormfixError(
                "NF586",
                "no converted network was given, and nnU-Net's own has live statistics. Call convert(cases) or "
                "use(networks) first.",
                where=type(self).__name__,
            )
        logits = [self._logits(network, data) for network in self.networks]
        return torch.stack(logits).mean(0).cpu()

    def _prepared(self, files: Sequence[str]) -> Tensor:
        """Return an image (channels, *space) as nnU-Net reads and preprocesses it."""
        configuration = self.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=self.verbose_preprocessing)
        data, *_ = preprocessor.run_case([*files], None, self.plans_manager, configuration, self.dataset_json)
        return torch.from_numpy(data)

    def _planes(self, data: Tensor) -> list[Tensor]:
        """Return what the network takes at a time: a volume, or each plane of one for a network of planes."""
        flat = len(self.configuration_manager.patch_size) == data.dim() - 2
        return [plane[None] for plane in data.unbind(1)] if flat else [data[None]]

    def _logits(self, network: nn.Module, data: Tensor) -> Tensor:
        """Let nnU-Net mirror and average, around exact tiles of one network."""
        own, self.network = self.network, partial(predict, network, tile=self.tile, **self.options)
        try:
            logits = [self._internal_maybe_mirror_and_predict(plane)[0] for plane in self._planes(data)]
        finally:
            self.network = own
        return logits[0] if logits[0].dim() == data.dim() else torch.stack(logits, 1)
