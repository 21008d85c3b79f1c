"""A MONAI inferer whose windows are exact tiles, for evaluators, bundles and loops of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import Inferer
from torch import Tensor, nn
from typing_extensions import Unpack

from normfix.api.prediction import PredictOptions, predict
from normfix.errors import NormfixError

__all__ = ["ExactInferer"]


class ExactInferer(Inferer):
    """Predict in tiles what the network gives for the whole image: read with halo and in phase, cropped, never blended.

    It stands where MONAI's SlidingWindowInferer stood. The network is one that normfix converted, or one without live
    statistics; it may be inside (Distributed)DataParallel. Images of a batch are predicted one by one.

    Args:
        tile: pixels per axis, as for normfix.predict; not MONAI's `roi_size`, which has the context in it.
        device: where predictions are kept; default: that of the inputs.
        **options: as for normfix.predict.

    Example:
        >>> import monai, torch
        >>> net = monai.networks.nets.BasicUNet(2, 1, 1, features=(4, 4, 4, 4, 4, 4), norm="batch").eval()
        >>> ExactInferer(tile=32)(torch.rand(2, 1, 64, 64), net).shape
        torch.Size([2, 1, 64, 64])
    """

    def __init__(
        self,
        tile: int | Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Unpack[PredictOptions],
    ) -> None:
        super().__init__()
        self.tile, self.device, self.options = tile, device, options

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Predict a batch.

        Args:
            inputs: (N, C, *space); a MetaTensor's metadata is the prediction's too.
            network: as for the class, a module; a function around one cannot be looked into.
            *args: handed to the network with each tile, so no maps of the image.
            **kwargs: likewise, but `device`, which counts before that of the inferer.

        Returns:
            (N, C', *out) in the network's dtype.

        Raises:
            NormfixError: NF585 for a tensor among the arguments, and codes of normfix.predict: NF409 for a network that
                was not converted, NF118 for what is no module.
        """
        device = kwargs.pop("device", None) or self.device or inputs.device
        options = self.options
        if args or kwargs:
            options = {"forward_fn": _handing_on(args, kwargs), **options}
        wrapped = isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel)
        model: Any = network.module if wrapped else network
        images = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        predictions = [predict(model, image[None], self.tile, **options).to(device) for image in images]
        prediction = torch.cat(predictions)
        if isinstance(inputs, MetaTensor):
            described: Any = MetaTensor(prediction)
            prediction = described.copy_meta_from(inputs, copy_attr=False)
        return prediction


def _handing_on(args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[[nn.Module, Tensor], Any]:
    """Return the call of a network with more arguments.

    Raises:
        NormfixError: NF585.
    """
    named = {**{f"argument {number}": value for number, value in enumerate(args, 1)}, **kwargs}
    for name, value in named.items():
        if isinstance(value, Tensor):
            raise NormfixError(
                "NF585",
                f"a tensor {tuple(value.shape)} would be handed whole to every tile. Put what belongs to pixels into "
                "the image's channels, and what does not into forward_fn=.",
                where=name,
            )
    return lambda network, image: network(image, *args, **kwargs)
