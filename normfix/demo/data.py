"""The demo's image: real fluorescence nuclei from a package, which the demo network never saw in training."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["nuclei_image"]


def nuclei_image() -> NDArray[np.uint8]:
    """Load mahotas' picture of fluorescent nuclei, (1024, 1344), uint8.

    Raises:
        ImportError: mahotas is not installed.

    Example:
        >>> nuclei_image().shape
        (1024, 1344)
    """
    try:
        import mahotas.demos
    except ImportError as error:
        raise ImportError(
            'The demo image comes with mahotas, which is not installed: pip install "normfix[demo]"'
        ) from error
    grey_as_rgb = mahotas.demos.load("nuclear")
    return np.array(grey_as_rgb[..., 0], dtype=np.uint8)
