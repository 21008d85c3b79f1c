"""normfix demo, run whole, and its page opened by a real parser."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import normfix
from normfix.demo import run_demo
from normfix.demo.data import nuclei_image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run the demo once, on a part of its image."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normfix.demo.data.nuclei_image", lambda: nuclei_image()[:384, 704:1088])
        return run_demo(str(folder)), folder


def test_proves_both(demo):
    """Original tiles fail, both conversions pass, and the text says so."""
    result, _ = demo
    assert result.passed
    assert re.search(r"original, tiles of 128: failed", result.text)
    assert re.search(r"frozen, tiles of 128: passed", result.text)
    assert re.search(r"batchrenorm, tiles of 128: passed", result.text)
    assert re.search(r"constants: take \S+ \(agreement with own windows of 160 0\.\d+\)", result.text)


def test_folder(demo):
    """The folder holds the page, three pictures and two networks that load."""
    _, folder = demo
    assert {p.name for p in folder.iterdir()} == {
        "index.html", "overview.png", "closeups.png", "difference.png", "frozen", "batchrenorm",
    }  # fmt: skip
    for name in ("frozen", "batchrenorm"):
        model = normfix.load(folder / name)
        assert torch.isfinite(model(torch.zeros(1, 1, 64, 64))).all()


def test_page_is_self_contained(demo):
    """The page embeds its pictures, fetches nothing, and every picture has a text."""
    _, folder = demo
    text = (folder / "index.html").read_text(encoding="utf-8")
    images, links = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found = dict(attributes)
            if tag == "img":
                images.append(found)
            links.extend(value for key, value in found.items() if key in ("src", "href"))

    Reader().feed(text)
    assert len(images) == 3 + 2 * 4
    assert all(image["alt"] for image in images)
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert base64.b64decode(links[0].partition(",")[2])[:4] == b"\x89PNG"


def test_whole_run_is_refused_into_existing_folder(demo):
    """A folder that exists is refused before anything is computed."""
    _, folder = demo
    with pytest.raises(normfix.NormfixError, match="NF114"):
        run_demo(str(folder))


def test_missing_image_package_is_said(monkeypatch, tmp_path):
    """Without mahotas the demo says what to install and leaves nothing."""

    def missing() -> np.ndarray:
        raise ImportError('pip install "normfix[demo]"')

    monkeypatch.setattr("normfix.demo.data.nuclei_image", missing)
    with pytest.raises(normfix.NormfixError, match=r"NF117.*normfix\[demo\]"):
        run_demo(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
