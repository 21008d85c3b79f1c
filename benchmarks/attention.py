"""Whole images of an autoencoder with attention that nobody converted: memory and time against one untiled pass.

    python benchmarks/attention.py --memory 8
    python benchmarks/attention.py --network diffusers

Predicts in stages within so many GiB, and another image after it, for which nothing is scanned and captured; tries the
untiled pass within as many, makes it without a limit, and says how far apart the two are. MONAI's AutoencoderKL writes
its attention out, so an untiled pass holds all products of two positions: of an image of 256 x 512 pixels 32,768
tokens, 4.3 GB each time. That of diffusers calls torch's kernel, which holds none. Processor time on one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normfix


class Reconstruction(nn.Module):
    """What an autoencoder makes of an image, without noise."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor) -> Tensor:
        """Return (N, C, *space)."""
        autoencoder: Any = self.autoencoder
        given: Tensor = (
            autoencoder.reconstruct(image)
            if hasattr(autoencoder, "reconstruct")
            else autoencoder(image).sample
        )
        return given


def of_diffusers() -> nn.Module:
    """Return a small AutoencoderKL of diffusers; it attends to all positions at half the extent, twice."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        latent_channels=2,
        norm_num_groups=4,
    )


def of_monai() -> nn.Module:
    """Return a small AutoencoderKL of MONAI; it attends to all positions at half the extent, twice."""
    from monai.networks.nets import AutoencoderKL

    return AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=(1, 1),
        channels=(8, 16),
        attention_levels=(False, True),
        latent_channels=2,
        norm_num_groups=4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )


NETWORKS = {"monai": of_monai, "diffusers": of_diffusers}


def spent(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call gives and the processor time that it takes."""
    start = time.process_time()
    result = work()
    return result, round(time.process_time() - start, 1)


def peak() -> int:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def limited(gib: int | None) -> None:
    """Let the process take so many GiB from here on; None for all that there is."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if gib is None else gib << 30, most))


def main() -> None:
    """Read the command line and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--network", choices=NETWORKS, default="monai")
    parser.add_argument("--memory", type=int, default=8, help="GiB that the process may take")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Reconstruction(NETWORKS[given.network]()).eval()
    image = torch.rand(1, 1, given.height, given.width, generator=torch.Generator().manual_seed(1))
    image += torch.linspace(0, 1, given.width)
    row: dict[str, Any] = {
        "network": given.network,
        "size": [given.height, given.width],
        "limit_GiB": given.memory,
    }
    limited(given.memory)
    ours, row["staged_s"] = spent(lambda: normfix.predict(net, image, given.tile, statistics="per-image"))
    row["staged_MiB"] = peak()
    another = image.flip(-1)
    _, row["another_s"] = spent(lambda: normfix.predict(net, another, given.tile, statistics="per-image"))
    print(json.dumps(row), flush=True)
    with torch.no_grad():
        try:
            net(image)
            row["untiled_within"] = "it fits"
        except RuntimeError as error:
            row["untiled_within"] = str(error).splitlines()[0][:160]
        limited(None)
        theirs, row["untiled_s"] = spent(lambda: net(image))
    row["untiled_MiB"] = peak()
    row["apart_sd"] = float((ours.double() - theirs.double()).abs().max() / theirs.double().std())
    print(json.dumps(row))


if __name__ == "__main__":
    main()
