"""JPEG: what Pillow makes of it where it is whole, and an error where it is not, also where libjpeg gives a picture."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from normfix.errors import NormfixError
from normfix.images.files import read_image
from normfix.images.formats import open_file

RNG = np.random.default_rng(0)
Y, X = np.mgrid[:120, :176]
GREY = (128 + 80 * np.sin(X / 9) * np.cos(Y / 7) + RNG.normal(0, 6, X.shape)).clip(0, 255).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], -1)

FORMS = {
    "grey": (GREY, {}),
    "RGB": (RGB, {}),
    "progressive": (RGB, {"progressive": True}),
    "restarts": (RGB, {"restart_marker_rows": 1}),
    "its own tables": (GREY, {"optimize": True, "quality": 97}),
    "all samples": (RGB, {"subsampling": 0, "quality": 100}),
    "flat": (np.full((300, 400, 3), 200, np.uint8), {}),
    "a pixel": (np.zeros((1, 1), np.uint8), {}),
}


def encoded(array, **options) -> bytes:
    """Return a JPEG of an array."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", **options)
    return file.getvalue()


def opened(path, data: bytes):
    """Open bytes as a JPEG."""
    path.write_bytes(data)
    return open_file(path)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_whole_is_read_as_pillow_does(tmp_path, name):
    """Every kind of JPEG that is read has Pillow's values, and grey has no channels."""
    array, options = FORMS[name]
    data = encoded(array, **options)
    found = opened(tmp_path / "a.jpg", data)
    np.testing.assert_array_equal(found.array, np.asarray(Image.open(io.BytesIO(data))))
    assert found.axes == ("YX" if array.ndim == 2 else "YXC")


def test_colours_are_channels(tmp_path):
    """An RGB picture is (C, Y, X) for a network of three channels."""
    (tmp_path / "a.jpeg").write_bytes(encoded(RGB))
    assert read_image(tmp_path / "a.jpeg", ndim=2, channels=3).shape == (3, 120, 176)


def cut(data: bytes) -> bytes:
    """Leave out the end."""
    return data[: len(data) // 2]


def cut_and_closed(data: bytes) -> bytes:
    """Leave out the end, and say that this is all: libjpeg completes it silently."""
    return data[: len(data) // 2] + b"\xff\xd9"


def cut_within(data: bytes) -> bytes:
    """Leave out a part in the middle."""
    middle = len(data) // 2
    return data[:middle] + data[middle + 400 :]


def blanked(data: bytes) -> bytes:
    """Lose a sector of a disk."""
    middle = len(data) // 2
    return data[:middle] + bytes(512) + data[middle + 512 :]


@pytest.mark.parametrize("damage", [cut, cut_and_closed, cut_within, blanked])
@pytest.mark.parametrize("name", ["grey", "RGB", "progressive", "its own tables", "all samples"])
def test_what_is_damaged_is_refused(tmp_path, name, damage):
    """A picture of which a part is missing is NF101, also where Pillow gives one."""
    data = encoded(FORMS[name][0], **FORMS[name][1])
    with pytest.raises(NormfixError, match="NF101"):
        opened(tmp_path / "a.jpg", damage(data))


def test_pillow_gives_a_picture_for_damage(tmp_path):
    """Negative control: without the look at its ends a picture that was cut would be read."""
    picture = np.asarray(Image.open(io.BytesIO(cut_and_closed(encoded(GREY)))))
    assert picture.shape == GREY.shape
    assert np.ptp(picture[-8:]) == 0


def _frame(data: bytes) -> int:
    return data.index(b"\xff\xc0")


def _resized(height: int, width: int) -> bytes:
    data = encoded(GREY)
    place = _frame(data) + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def _twice(data: bytes) -> bytes:
    place = _frame(data)
    length = int.from_bytes(data[place + 2 : place + 4], "big") + 2
    return data[: place + length] + data[place:]


def _many_scans(count: int) -> bytes:
    data = encoded(RGB, progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


HARM = {
    "another format": (b"\x89PNG\r\n\x1a\n" + bytes(99), "NF101"),
    "nothing": (b"", "NF101"),
    "only its first bytes": (b"\xff\xd8\xff", "NF101"),
    "no picture": (b"\xff\xd8\xff\xd9", "NF101"),
    "two headers": (_twice(encoded(GREY)), "NF101"),
    "no rows": (_resized(0, 176), "NF101"),
    "more rows than it has": (_resized(4000, 176), "NF101"),
    "pixels without end": (_resized(60000, 60000), "NF121"),
    "passes without end": (_many_scans(100), "NF121"),
    "arithmetic coding": (encoded(GREY).replace(b"\xff\xc0", b"\xff\xc9", 1), "NF101"),
    "segments within each other": (b"\xff\xd8" + b"\xff\xe0\x00\x01" * 99, "NF101"),
}


@pytest.mark.parametrize("name", HARM)
def test_what_was_built_to_harm_is_refused(tmp_path, name):
    """Headers that promise what the file does not hold are refused with a code, before it is unpacked."""
    data, code = HARM[name]
    with pytest.raises(NormfixError, match=code):
        opened(tmp_path / "a.jpg", data)


def test_four_colours_are_refused(tmp_path):
    """CMYK is no channels that anybody trained with."""
    file = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(file, "JPEG")
    with pytest.raises(NormfixError, match=r"NF101.*4 colours"):
        opened(tmp_path / "a.jpg", file.getvalue())


def test_a_picture_that_viewers_turn_is_said(tmp_path):
    """What EXIF says of the orientation is told, and the picture is read as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    found = opened(tmp_path / "a.jpg", encoded(GREY, exif=exif.tobytes()))
    assert found.array.shape == GREY.shape
    assert "turned" in found.notes[0]
    assert not opened(tmp_path / "b.jpg", encoded(GREY)).notes


def test_what_stands_behind_the_picture_is_nothing(tmp_path):
    """A further picture and a camera's notes behind the first are not read, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = opened(tmp_path / "a.jpg", encoded(GREY) + encoded(RGB) + bytes(100))
    assert found.array.shape == GREY.shape
