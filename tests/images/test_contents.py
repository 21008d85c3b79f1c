"""An image is known by its contents: touched it is the same, changed it is another, whatever its times say."""

import gzip
import os
import pickle
import shutil
from functools import partial

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from optional import zarr
from streamed_networks import Tangled

import normfix
from normfix.errors import NormfixError
from normfix.images.collections import ImageFiles
from normfix.images.files import open_windows
from normfix.images.formats import npy
from normfix.images.formats.npy import open_npy
from normfix.images.windows import ScaledImage
from normfix.records.saved import Scaling
from normfix.tiling.stages.blocks import Work

RNG = np.random.default_rng(0)
ARRAY = RNG.random((48, 44), np.float32)
OTHER = ARRAY[::-1].copy()
"""The same values in other places: size, histogram, mean and deviation are those of ARRAY."""

SUFFIXES = [".npy", ".tif", ".tiled.tif", ".zarr", ".shards.zarr", ".png"]


def _write(path, array):
    """Write an image, of the same number of bytes for the same values in other places."""
    kind = "".join(path.suffixes)
    match kind:
        case ".npy":
            np.save(path, array)
        case ".tif":
            tifffile.imwrite(path, array)
        case ".tiled.tif":
            tifffile.imwrite(path, array, tile=(16, 16))
        case ".zarr" | ".shards.zarr":
            shards = (32, 32) if kind == ".shards.zarr" else None
            options = {
                "chunks": (16, 16),
                "shards": shards,
                "compressors": None,
                "config": {"write_empty_chunks": True},
            }
            zarr.create_array(store=str(path), data=array, **options)
        case ".png":
            import imageio.v3 as iio

            iio.imwrite(path, (array * 255).astype(np.uint8), compress_level=0)
        case ".nii":
            nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)
        case ".nii.gz":
            nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path.with_name("plain.nii"))
            data = path.with_name("plain.nii").read_bytes()
            path.write_bytes(gzip.compress(data, 0, mtime=0))
            path.with_name("plain.nii").unlink()


def _files(path):
    return [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]


def _replace(path, array):
    """Write other values in place and give every file the size and times it had."""
    before = {p: p.stat() for p in _files(path)}
    _write(path.with_name(f"new{path.name[path.name.index('.') :]}"), array)
    new = path.with_name(f"new{path.name[path.name.index('.') :]}")
    for old, made in zip(_files(path), _files(new), strict=True):
        with old.open("r+b") as file:
            file.write(made.read_bytes())
        os.utime(old, ns=(before[old].st_atime_ns, before[old].st_mtime_ns))
        assert old.stat().st_size == before[old].st_size
    shutil.rmtree(new) if new.is_dir() else new.unlink()


def _touch(path):
    for file in _files(path):
        os.utime(file)


class Bench:
    """A converted network that is captured once, and its statistics before each run."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = normfix.convert(Tangled(), torch.rand(1, 1, 48, 44)).model
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.measured(normfix.open_image(ARRAY, self.model))

    def measured(self, image, store=None, **options):
        """Calibrate in stages; return the statistics."""
        self.model.load_state_dict(self.before)
        normfix.calibrate_(self.model, image, blocks=normfix.Blocks(tile=16, store=store), **options)
        return {name: value.clone() for name, value in self.model.named_buffers()}


@pytest.fixture(scope="module")
def model():
    """Shared, because capturing takes seconds."""
    return Bench()


def _run(model, path, tmp_path, *, store=True, scaling="zscore", mask=None):
    """Calibrate in stages on a file; return the statistics."""
    kept = {"store": tmp_path / "store"} if store else {}
    with normfix.open_image(path, model.model, scaling=Scaling(kind=scaling)) as image:
        return model.measured(image, mask=mask, **kept)


def _stop(monkeypatch, block, then=None):
    """At the nth block from now on do something, or stop there."""
    compute, seen = Work.__call__, []

    def call(self, number):
        seen.append(number)
        if len(seen) == block:
            if then is None:
                raise KeyboardInterrupt
            then()
        return compute(self, number)

    monkeypatch.setattr(Work, "__call__", call)


def _stopped(model, path, tmp_path, monkeypatch, **options):
    (tmp_path / "store").mkdir(exist_ok=True)
    _stop(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        _run(model, path, tmp_path, **options)
    monkeypatch.undo()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_image_of_the_same_size_time_and_histogram_is_refused(model, tmp_path, monkeypatch, suffix):
    """A run that was stopped does not go on with other values under the old name, size and time of change."""
    path = tmp_path / f"a{suffix}"
    _write(path, ARRAY)
    scaling = "unit" if suffix == ".png" else "zscore"
    _stopped(model, path, tmp_path, monkeypatch, scaling=scaling)
    before = {p: p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file()}
    _replace(path, OTHER)
    with pytest.raises(NormfixError, match=r"NF328.*other images"):
        _run(model, path, tmp_path, scaling=scaling)
    assert {p: p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_touched_or_moved_image_is_the_same(model, tmp_path, monkeypatch, suffix):
    """A run that was stopped goes on with the same values, whatever their file's time or name, to the same bits."""
    path = tmp_path / f"a{suffix}"
    _write(path, ARRAY)
    scaling = "unit" if suffix == ".png" else "zscore"
    _stopped(model, path, tmp_path, monkeypatch, scaling=scaling)
    _touch(path)
    moved = path.rename(tmp_path / f"b{suffix}")
    found = _run(model, moved, tmp_path, scaling=scaling)
    expected = _run(model, moved, tmp_path, store=False, scaling=scaling)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_another_mask_is_another_run(model, tmp_path, monkeypatch, suffix):
    """A mask is an input as well: with as many ignored pixels elsewhere the run is refused, touched it goes on."""
    image, mask = tmp_path / "a.npy", tmp_path / f"m{suffix}"
    ignored = np.zeros(ARRAY.shape, np.uint8)
    ignored[:16] = 1
    _write(image, ARRAY)
    _write(mask, ignored)
    _stopped(model, image, tmp_path, monkeypatch, mask=mask)
    _replace(mask, ignored[::-1].copy())
    with pytest.raises(NormfixError, match=r"NF328.*other images"):
        _run(model, image, tmp_path, mask=mask)
    _replace(mask, ignored)
    _touch(mask)
    _run(model, image, tmp_path, mask=mask)


def test_arrays_in_python_are_known_by_their_values(model, tmp_path, monkeypatch):
    """Of an array without a file the values count: a permuted one is refused, a copy goes on."""

    def run(array):
        model.measured(normfix.open_image(array, model.model), store=tmp_path / "store")

    (tmp_path / "store").mkdir()
    _stop(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        run(ARRAY)
    monkeypatch.undo()
    with pytest.raises(NormfixError, match=r"NF328.*other images"):
        run(OTHER)
    run(ARRAY.copy())


@pytest.mark.parametrize("scaling", ["none", "zscore"])
@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr", ".nii.gz"])
def test_a_change_while_reading_is_found_with_its_time_put_back(
    model, tmp_path, monkeypatch, suffix, scaling
):
    """Values that change while blocks are computed are found, though size and time of change are as they were."""
    path = tmp_path / f"a{suffix}"
    _write(path, ARRAY)
    _stop(monkeypatch, 6, lambda: _replace(path, OTHER))
    with pytest.raises(NormfixError, match="NF331"):
        _run(model, path, tmp_path, store=False, scaling=scaling)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr", ".nii.gz"])
def test_a_touch_while_reading_is_no_change(model, tmp_path, monkeypatch, suffix):
    """A file that was read whole and is touched or rewritten with the same values meanwhile is read on."""
    path = tmp_path / f"a{suffix}"
    _write(path, ARRAY)
    expected = _run(model, path, tmp_path, store=False)
    _stop(monkeypatch, 6, lambda: _touch(path))
    found = _run(model, path, tmp_path, store=False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_what_was_not_read_whole_and_is_written_to_is_refused(model, tmp_path, monkeypatch, suffix):
    """Without a first walk nothing tells what the rest of a file was, so a later time of change is an error."""
    path = tmp_path / f"a{suffix}"
    _write(path, ARRAY)
    _stop(monkeypatch, 6, lambda: _touch(path))
    with pytest.raises(NormfixError, match="NF331"):
        _run(model, path, tmp_path, store=False, scaling="none")


def test_a_link_to_a_file_is_no_change(model, tmp_path, monkeypatch):
    """What changes a file's own time alone, as a backup by hard links does, is no change, also without a first walk."""
    path = tmp_path / "a.npy"
    _write(path, ARRAY)
    _stop(monkeypatch, 6, lambda: os.link(path, tmp_path / "backup.npy"))
    _run(model, path, tmp_path, store=False, scaling="none")


def test_a_window_that_is_read_twice_is_the_same_twice(tmp_path, monkeypatch):
    """Whatever times say: other values in a window that was read before are an error."""
    _write(tmp_path / "a.npy", ARRAY)
    with open_windows(tmp_path / "a.npy", ndim=2, channels=1) as image:
        monkeypatch.setattr(type(image.contents.origin), "now", lambda self: self.seen)
        image.read([(0, 8), (0, 8)])
        _replace(tmp_path / "a.npy", OTHER)
        with pytest.raises(NormfixError, match="NF331"):
            image.read([(0, 8), (0, 8)])


def test_a_missing_chunk_is_no_zeros(model, tmp_path, monkeypatch):
    """A chunk that vanishes while a Zarr is read is a change, not its fill value."""
    path = tmp_path / "a.zarr"
    _write(path, ARRAY)
    _stop(monkeypatch, 2, (path / "c" / "2" / "2").unlink)
    with pytest.raises(NormfixError, match="NF331"):
        _run(model, path, tmp_path, store=False, scaling="none")


def test_passes_over_a_file_see_the_same_values(tmp_path):
    """Files that are read anew in each pass must hold the same values again; touched they do."""
    path = tmp_path / "a.npy"
    _write(path, ARRAY)
    _write(tmp_path / "b.npy", OTHER)
    files = ImageFiles([path, tmp_path / "b.npy"], partial(open_windows, ndim=2, channels=1), Scaling())
    first, _ = files
    _touch(path)
    second, _ = files
    assert torch.equal(first, second)
    _replace(path, OTHER)
    with pytest.raises(NormfixError, match="NF331"):
        list(files)


def test_a_walk_for_the_scale_is_the_walk_for_the_contents(tmp_path, monkeypatch):
    """Where the scale was measured, knowing the contents costs no second walk; else it costs one."""
    _write(tmp_path / "a.npy", ARRAY)
    reads = []
    with open_windows(tmp_path / "a.npy", ndim=2, channels=1) as image:
        raw = type(image).raw
        monkeypatch.setattr(
            type(image), "raw", lambda self, spans: (reads.append(spans), raw(self, spans))[1]
        )
        first = image.fingerprint()
        assert len(reads) == 1
        assert image.fingerprint() == first
        list(image.pieces())
    assert len(reads) == 2


@pytest.mark.parametrize("suffix", [".npy", ".nii"])
def test_what_was_read_stays_what_it_was(tmp_path, suffix):
    """A mapped file would be read where its values are used, after it was looked at for changes."""
    path = tmp_path / f"image{suffix}"
    if suffix == ".npy":
        np.save(path, ARRAY)
    else:
        nibabel.save(nibabel.Nifti1Image(ARRAY.T, np.eye(4)), path)
    with open_windows(path, ndim=2, channels=1) as window:
        values = window.read([(0, 48), (0, 44)])
        with path.open("r+b") as file:
            file.seek(-ARRAY.nbytes, os.SEEK_END)
            file.write(bytes(ARRAY.nbytes))
        np.testing.assert_array_equal(values[0], ARRAY)


@pytest.mark.parametrize("order", ["C", "F"])
def test_windows_of_a_npy_are_those_of_its_array(tmp_path, order):
    """Whatever is cut, along whichever axis runs fastest."""
    array = np.asarray(RNG.integers(0, 99, (3, 7, 5, 6)), ">i2", order=order)
    np.save(tmp_path / "image.npy", array)
    values = open_npy(tmp_path / "image.npy").array
    assert (values.shape, values.dtype) == (array.shape, array.dtype)
    whole = slice(None)
    for index in (
        (whole,) * 4,
        (1, whole, whole, whole),
        (slice(1, 3), slice(2, 6), slice(0, 5), slice(0, 6)),
        (whole, slice(2, 3), slice(1, 5), slice(3, 5)),
        (2, slice(0, 7), 4, slice(5, 9)),
        (whole, slice(3, 3), whole, whole),
    ):
        np.testing.assert_array_equal(values[index], array[index])


@pytest.mark.parametrize(("gap", "room"), [(0, 1), (6, 40), (4096, 1 << 20)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_runs_of_a_npy_that_are_read_together_are_the_same_values(tmp_path, monkeypatch, gap, room, order):
    """Whether each run is read alone, some over a gap, or all at once."""
    monkeypatch.setattr(npy, "_GAP", gap)
    monkeypatch.setattr(npy, "_ROOM", room)
    array = np.asarray(RNG.integers(0, 99, (3, 7, 5, 6)), ">i2", order=order)
    np.save(tmp_path / "image.npy", array)
    values = open_npy(tmp_path / "image.npy").array
    for index in (
        (slice(0, 3), slice(0, 7), slice(0, 5), slice(2, 3)),
        (slice(0, 1), slice(2, 7), slice(1, 4), slice(1, 6)),
        (2, slice(1, 6), 4, slice(0, 5)),
    ):
        np.testing.assert_array_equal(values[index], array[index])


def test_one_channel_of_an_interleaved_npy_is_not_read_value_by_value(tmp_path, monkeypatch):
    """A seek for each pixel takes 25 seconds for 1500 x 1500 pixels."""
    np.save(tmp_path / "rgb.npy", np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    values = open_npy(tmp_path / "rgb.npy").array
    reads = []
    fill = npy._fill
    monkeypatch.setattr(npy, "_fill", lambda file, values: (reads.append(1), fill(file, values)))
    assert values[:, :, 1:2].shape == (64, 64, 1)
    assert len(reads) == 1


@pytest.mark.parametrize("version", [2, 3])
def test_a_long_header_of_a_npy_is_refused_unread(tmp_path, version):
    """numpy reads 4 GB of a sparse file before it says that a header is too long."""
    path = tmp_path / "image.npy"
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + (0xFFFFFFF0).to_bytes(4, "little"))
    with pytest.raises(NormfixError, match=r"NF101.*its header has 4,294,967,280 bytes"):
        open_windows(path, ndim=2, channels=1)


def test_values_behind_the_array_of_a_npy_are_said(tmp_path):
    """numpy.save puts several arrays into one file, of which the first is read."""
    with (tmp_path / "two.npy").open("wb") as file:
        np.save(file, ARRAY)
        np.save(file, ARRAY)
    with open_windows(tmp_path / "two.npy", ndim=2, channels=1) as window:
        assert window.notes == (f"{ARRAY.nbytes + 128:,} bytes behind its array are not read.",)


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(tmp_path):
    """Values of a mapped file that are no longer there end the process (SIGBUS)."""
    path = tmp_path / "image.npy"
    np.save(path, np.zeros((64, 4096), np.float32))
    with open_windows(path, ndim=2, channels=1) as window:
        os.truncate(path, 200)
        with pytest.raises(NormfixError, match=r"NF101.*ends before its values do"):
            window.raw([(0, 64), (0, 4096)])
        with pytest.raises(NormfixError, match="NF331"):
            window.read([(0, 64), (0, 4096)])


def _mapped(path):
    """Return a file's values in a map to which was written already, so that writing more changes no times."""
    _write(path, ARRAY)
    if path.suffix == ".npy":
        values = np.load(path, mmap_mode="r+")
    elif path.suffix == ".tif":
        values = tifffile.memmap(path, mode="r+")
    else:
        offset = path.stat().st_size - ARRAY.nbytes
        values = np.memmap(path, ARRAY.dtype, "r+", offset=offset, shape=ARRAY.shape)
    values[...] = values.copy()
    return values


def _times(path):
    return path.stat().st_mtime_ns, path.stat().st_ctime_ns


@pytest.mark.parametrize("suffix", [".npy", ".nii", ".tif"])
@pytest.mark.parametrize("how", ["calibrate", "stages"])
def test_a_file_that_is_written_through_a_map_meanwhile_is_refused(model, tmp_path, monkeypatch, suffix, how):
    """Its times stay as they were, and blocks would be of two images; what is mapped and not written is read on."""
    path = tmp_path / f"a{suffix}"
    values = _mapped(path)
    read, seen, at = ScaledImage.read, [], [10_000]

    def reading(self, window):
        seen.append(window)
        if len(seen) == at[0]:
            before = _times(path)
            # at the other end of the image than what is read last
            values[:2, :2] += 1
            assert _times(path) == before
        return read(self, window)

    monkeypatch.setattr(ScaledImage, "read", reading)

    def work():
        with normfix.open_image(path, model.model, scaling="none") as image:
            if how == "calibrate":
                return model.measured(image)
            return normfix.predict(model.model, image, 16, engine="stages")

    for _ in range(2):  # the first time the network is looked at as well
        seen.clear()
        work()
    at[0] = len(seen)
    seen.clear()
    with pytest.raises(NormfixError, match=r"NF331.*changed while it was read"):
        work()
    assert len(seen) >= at[0]


@pytest.mark.parametrize(("shape", "axes"), [((1, 12, 10), None), ((12, 10, 1), None), ((1, 12, 10), "CYX")])
def test_a_channel_that_is_alone_may_have_a_name_or_none(tmp_path, shape, axes):
    """Opened again, here or in another process, an image has the axes that it had."""
    path = tmp_path / "a.npy"
    np.save(path, ARRAY[:12, :10].reshape(shape))
    window = open_windows(path, ndim=2, channels=1, axes=axes)
    window.read([(0, 5), (2, 9)])
    again = pickle.loads(pickle.dumps(window))
    assert again.layout == window.layout
    for one in (window, again, pickle.loads(pickle.dumps(again))):
        one.read([(5, 12), (0, 10)])
        one.confirm()
    _replace(path, OTHER[:12, :10].reshape(shape))
    with pytest.raises(NormfixError, match="NF331"):
        window.confirm()
