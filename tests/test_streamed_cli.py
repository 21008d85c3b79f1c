"""calibrate --tile and predict --engine stages: files larger than memory on the command line."""

import numpy as np
import pytest
import tifffile
import torch
import zarr
from click.testing import CliRunner

import normfix
from normfix.cli import cli
from normfix.demo.network import nuclei_unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a converted network and an image as TIFF and as Zarr."""
    path = tmp_path_factory.mktemp("cli")
    image = torch.rand(1, 1, 96, 128, generator=torch.Generator().manual_seed(0)) ** 2
    normfix.save(
        normfix.convert(nuclei_unet(), image), path / "fixed", source="normfix.demo.network:nuclei_unet"
    )
    tifffile.imwrite(path / "image.tif", image[0, 0].numpy(), tile=(32, 32))
    zarr.create_array(store=str(path / "image.zarr"), data=image[0, 0].numpy(), chunks=(32, 32))
    return path


def _run(*arguments):
    result = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def test_predict_in_stages_writes_what_tiles_write(folder):
    """A Zarr image predicted in stages within a small budget is the TIFF predicted in tiles."""
    _run("predict", folder / "fixed", folder / "image.tif", "-o", folder / "tiles.npy", "--tile", 32)
    _run(
        *("predict", folder / "fixed", folder / "image.zarr", "-o", folder / "stages.npy", "--tile", 32),
        *("--engine", "stages", "--budget", 0, "--store", folder, "--workers", 2),
    )
    tiles, stages = np.load(folder / "tiles.npy"), np.load(folder / "stages.npy")
    np.testing.assert_allclose(stages, tiles, atol=1e-5 * tiles.std())


def test_calibrate_by_window_writes_the_same_statistics(folder):
    """With and without --tile the saved statistics agree to float32's rounding."""
    for name, extra in (("whole", ()), ("blocks", ("--tile", 40))):
        _run("calibrate", folder / "fixed", folder / "image.tif", "-o", folder / name, *extra)
    whole, blocks = (normfix.load(folder / name).state_dict() for name in ("whole", "blocks"))
    assert whole.keys() == blocks.keys()
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value, rtol=1e-5, atol=1e-6)
