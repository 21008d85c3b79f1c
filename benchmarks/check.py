"""Time of `normfix check` against the forward passes it needs: one untiled and one tiled, at 1024², tile 256.

    python benchmarks/check.py [--size 1024] [--tile 256]

Prints one line for the demo network, which fails, and one for its conversion, which passes. One thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import normfix
from normfix.demo.network import nuclei_unet
from normfix.tiling.geometry import geometry_of
from normfix.tiling.stitching import tiled


def seconds(run: Callable[[], object]) -> float:
    """Return the best of two runs."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Time both networks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = torch.rand(1, 1, given.size, given.size)
    network = nuclei_unet()
    done = normfix.convert(network, image[..., : given.size // 2, : given.size // 2])
    geometry = geometry_of(done.scan)
    assert geometry is not None

    for name, model in (("original", network), ("converted", done.model.eval())):

        def passes(model: torch.nn.Module = model) -> None:
            with torch.no_grad():
                model(image)
                tiled(model, image, given.tile, geometry)

        needed = seconds(passes)
        taken = seconds(lambda model=model: normfix.check(model, image, given.tile))
        print(f"{name}: passes {needed:.1f} s, check {taken:.1f} s, {taken / needed:.2f}x")


if __name__ == "__main__":
    main()
