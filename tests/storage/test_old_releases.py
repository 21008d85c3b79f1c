"""What an old torch or Python lacks is refused with a code, and the rest works without it."""

import sys
import zipfile

import numpy as np
import pytest
import tifffile
import torch
from factories import tiny_unet
from optional import needs_programs

import normfix
from normfix import NormfixError
from normfix.images.files import open_windows
from normfix.storage import programs
from normfix.storage.opening import open_model
from normfix.storage.opening.formats import exported
from normfix.storage.opening.formats.exported import read_program
from normfix.storage.programs import NotExportable


@pytest.fixture
def before(monkeypatch):
    """A torch that knows only the layout with pickles."""
    for module in (programs, exported):
        monkeypatch.setattr(module, "writes_archives", lambda: False)


def test_a_torch_without_archives_reads_no_program(before, tmp_path):
    """It is not taken for a damaged file: the refusal says which torch is needed."""
    with pytest.raises(NormfixError, match=r"NF420 .*torch 2\.8"):
        read_program(tmp_path / "new.pt2")


def test_a_torch_without_archives_writes_no_program(before, tmp_path):
    """A network is not exported there, so that a file is refused and a folder is saved without one."""
    done = normfix.convert(tiny_unet(), torch.rand(1, 1, 32, 32))
    with pytest.raises(NotExportable, match="NF420"):
        normfix.save(done, tmp_path / "fixed.pt2")
    normfix.save(done, tmp_path / "fixed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed"]
    assert not (tmp_path / "fixed" / "program.pt2").exists()


@needs_programs
def test_a_program_of_a_torch_without_archives_is_named(tmp_path):
    """The layout before torch 2.8 is refused for what it is, also where it is to be recognised by its content."""
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("version", "serialized_exported_program.json", "serialized_state_dict.pt"):
            archive.writestr(name, b"")
    with pytest.raises(NormfixError, match=r"NF420 .*before 2\.8"):
        read_program(path)
    with pytest.raises(NormfixError, match="NF420"):
        open_model(str(path))


@pytest.fixture
def without_zarr(monkeypatch):
    """A Python for which there is no zarr."""
    monkeypatch.setitem(sys.modules, "zarr", None)


def test_without_zarr_its_images_are_refused(without_zarr, tmp_path):
    """Neither read nor written; the refusal names the extra and the Python that it needs."""
    network = torch.nn.Conv2d(1, 1, 3, padding=1).eval()
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text("{}", encoding="utf-8")
    with pytest.raises(NormfixError) as reading:
        normfix.open_image(tmp_path / "a.zarr", network)
    with pytest.raises(NormfixError) as writing:
        normfix.write_prediction(network, torch.rand(1, 1, 32, 32), tmp_path / "b.zarr", tile=16)
    for caught in (reading, writing):
        assert caught.value.code == "NF143"
        assert "Python 3.11" in caught.value.message


def test_without_zarr_windows_of_a_tiff_are_right(without_zarr, tmp_path):
    """It is read whole, and the windows are those of the pixels."""
    pixels = np.random.default_rng(0).random((40, 50), dtype=np.float32)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    with open_windows(tmp_path / "a.tif", ndim=2, channels=1) as image:
        window = image.read([(3, 17), (20, 50)])
    assert np.array_equal(np.asarray(window).reshape(14, 30), pixels[3:17, 20:50])
