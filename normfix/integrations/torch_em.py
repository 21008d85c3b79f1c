"""torch-em's predict_with_halo, exactly: the same arguments, with the halo measured and the image scaled as a whole.

Nothing of torch-em is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from normfix.api.prediction import predict
from normfix.errors import NormfixError
from normfix.networks.calling import home_of
from normfix.networks.copying import copy_of
from normfix.networks.provenance import provenance_of
from normfix.scanning.known import ForwardFn

__all__ = ["predict_with_halo", "standardize"]

Array = NDArray[Any]


def standardize(raw: Array) -> Array:
    """Return an image less its mean, over its standard deviation, in float32: torch-em's default."""
    raw = np.asarray(raw, dtype=np.float32)
    return (raw - raw.mean()) / (raw.std() + np.float32(1e-7))  # type: ignore[no-any-return]


def predict_with_halo(
    input_: Any,
    model: nn.Module,
    gpu_ids: Sequence[str | int],
    block_shape: Sequence[int],
    halo: Sequence[int] | Literal["auto"] = "auto",
    output: Any = None,
    preprocess: Callable[[Array], Array] | None = standardize,
    postprocess: Callable[[Array], Array] | None = None,
    with_channels: bool = False,
    *,
    mask: Any = None,
    prediction_function: ForwardFn | None = None,
) -> Any:
    """Predict block by block what the network gives for the whole image; a drop-in for torch-em's function.

    Args:
        input_: array (*space), or (C, *space) with channels: NumPy, HDF5, Zarr and the like.
        model: converted by normfix, or without live statistics; not modified.
        gpu_ids: devices, of which the first computes.
        block_shape: pixels per axis, multiples of the network's stride.
        halo: pixels of context per axis on every side; "auto" is what the network needs, and less is refused.
        output: written to, if given: an array (C', *space) or (*space), or pairs of an array and its channels.
        preprocess: run once on the whole image, where torch-em runs it on every block; None where the network brings
            its scaling (see normfix.read_images) or needs none.
        postprocess: run once on the whole prediction (C', *space).
        with_channels: whether the first axis is that of channels.
        mask: (*space); the prediction is 0 where it is 0.
        prediction_function: `f(model, image)` for another calling convention.

    Returns:
        `output`, or a new array (C', *space) of the network's dtype.

    Raises:
        NormfixError: NF107 for a preprocessing beside a scaling that the network brings, and codes of normfix.predict:
            NF402 for blocks off the stride grid, NF409 for a network that was not converted, NF410 for a small halo.
    """
    image: Any = input_
    if preprocess is not None:
        _require_unscaled(model)
        pixels = torch.from_numpy(np.asarray(preprocess(np.asarray(input_[...]))))
        image = pixels[None] if with_channels else pixels[None, None]
    prediction = predict(
        _on(model, torch.device(gpu_ids[0])),
        image,
        tuple(block_shape),
        halo=halo,
        forward_fn=prediction_function,
    )
    result = prediction[0].cpu().numpy()
    result = result if postprocess is None else postprocess(result)
    if mask is not None:
        result = result * (np.asarray(mask[...]) != 0)
    return result if output is None else _written(result, output)


def _require_unscaled(model: nn.Module) -> None:
    """Refuse to scale an image for a network that brings the scaling which its statistics belong to.

    Raises:
        NormfixError: NF107.
    """
    known = provenance_of(model)
    if known is None or known.scaling.kind in ("none", "preprocess"):  # a function must be given anyway
        return
    raise NormfixError(
        "NF107",
        f"the network was converted with images scaled by {known.scaling.kind}, and images are scaled so for it. Give "
        "preprocess=None, and the image as it is.",
        where="preprocess",
    )


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a network on a device: itself, or a copy."""
    return model if home_of(model)[0] == device else copy_of(model).to(device)


def _written(result: Array, output: Any) -> Any:
    """Write a prediction into one array, or each pair's channels into its array."""
    pairs = output if isinstance(output, list) else [(output, slice(None))]
    for array, channels in pairs:
        part = result[channels]
        array[...] = part[0] if len(array.shape) == part.ndim - 1 and len(part) == 1 else part
    return output
