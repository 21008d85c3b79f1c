"""bioimage.io packages come back as packages that their tools run by themselves, in blocks that equal the whole."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from bioimage_packages import package, rewritten, seashell, sha256, volume, zipped

import normfix
from normfix import NormfixError
from normfix.records.saved import Scaling

pytest.importorskip("monai")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own

CORE = """
import json, os, sys
sys.modules["normfix"] = None
folder, image, blocks = sys.argv[1:]
os.chdir(folder)
import numpy as np
from bioimageio.core import create_prediction_pipeline, test_model
from bioimageio.core.digest_spec import create_sample_for_model
from bioimageio.spec import ValidationContext, load_model_description
with ValidationContext(perform_io_checks=False):
    model = load_model_description(os.path.abspath("rdf.yaml"))
    tested = test_model(model)
    (image_of,) = model.inputs
    def sample():
        return create_sample_for_model(model, inputs={image_of.id: np.load(image)[None, None]})
    shape = {image_of.id: dict(zip([axis.id for axis in image_of.axes], [1, 1, *json.loads(blocks)]))}
    with create_prediction_pipeline(model, devices=["cpu"]) as pipeline:
        whole = pipeline.predict_sample_without_blocking(sample())
        parts = pipeline.predict_sample_with_fixed_blocking(sample(), shape)
whole, parts = (next(iter(s.members.values())).data.to_numpy() for s in (whole, parts))
print(json.dumps([tested.status, float(abs(whole - parts).max() / whole.std())]))
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return a package, the conversion of its network, and the numbers that its image was scaled by."""
    folder = package(tmp_path_factory.mktemp("packages") / "model")
    model = normfix.load(folder)
    pixels = np.random.default_rng(1).random((64, 64), dtype=np.float32) * 50 + 100
    np.save(folder.parent / "image.npy", pixels)
    numbers = float(pixels.mean()), float(pixels.std())
    images = normfix.read_images(
        str(folder.parent / "image.npy"), model, scaling=f"{numbers[0]},{numbers[1]}"
    )
    return folder, normfix.convert(model, images), numbers


def description_of(folder):
    """Return the plain values of a description."""
    return yaml.safe_load((folder / "rdf.yaml").read_text())


@pytest.mark.slow
def test_a_package_declares_what_its_blocks_need(converted, tmp_path):
    """Halo, smallest size, scaling, parent and a changelog line; weights and tests by their new sha256."""
    folder, done, numbers = converted
    original = shutil.copytree(folder, tmp_path / "original")
    rewritten(original, id="small-shark", version="1.0.0")
    archive = zipped(original, tmp_path / "model.zip")
    record = normfix.give_back(done, tmp_path / "back", original=archive)
    content = description_of(tmp_path / "back")
    (halo, _), (stride, _) = record.verdict.halo_rounded[0], done.scan.stride
    given, wanted = content["inputs"][0], content["outputs"][0]
    assert [axis["halo"] for axis in wanted["axes"][2:]] == [halo, halo] == [4, 4]
    assert given["axes"][2]["size"] == {"min": 32, "step": stride}
    assert given["preprocessing"] == [
        {"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": numbers[0], "std": numbers[1]}}
    ]
    assert content["parent"] == {"id": "small-shark", "version": "1.0.0"}
    assert "id" not in content
    assert "## Changes" in (tmp_path / "back" / "README.md").read_text()
    entry = content["weights"]["pytorch_state_dict"]
    assert entry["architecture"]["import_from"] == "monai.networks.nets"
    assert entry["architecture"]["kwargs"]["norm"] == "batch"
    for named in (entry, given["test_tensor"], wanted["test_tensor"]):
        assert named["sha256"] == sha256(tmp_path / "back" / named["source"])
    assert not (tmp_path / "back" / "arch.py").exists()
    assert any(change.name == "outputs.0.axes.2.halo" for change in record.changes)


@pytest.mark.slow
def test_0_4_says_the_same_in_its_own_words(converted, tmp_path):
    """A package of 0.4 stays one, and normfix opens it by its own tests: no statistic is live."""
    _, done, numbers = converted
    normfix.give_back(done, tmp_path / "back", original=package(tmp_path / "model", "0.4"))
    content = description_of(tmp_path / "back")
    assert content["outputs"][0]["halo"] == [0, 0, 4, 4]
    assert content["inputs"][0]["preprocessing"][0]["kwargs"]["mean"] == [numbers[0]]
    assert content["weights"]["pytorch_state_dict"]["architecture"] == "monai.networks.nets.UNet"
    assert not normfix.scan(normfix.load(tmp_path / "back"), torch.rand(1, 1, 64, 64)).live


def test_nothing_outside_of_a_package_is_read_or_written(converted, tmp_path):
    """Documentation at another place, links and malformed parts: the rest is given back without them."""
    _, done, _ = converted
    outside = tmp_path / "mine.md"
    outside.write_text("mine")
    original = package(tmp_path / "model")
    (original / "notes.md").symlink_to(outside)
    rewritten(original, documentation=str(outside), weights__onnx="none", config=None, sample_outputs=[{}])
    record = normfix.give_back(done, tmp_path / "back", original=original)
    assert outside.read_text() == "mine"
    assert description_of(tmp_path / "back")["documentation"] == "documentation.md"
    assert not (tmp_path / "back" / "notes.md").exists()
    assert {"notes.md", "weights.onnx"} <= {c.name for c in record.changes if c.kind == "left out"}


def test_documentation_is_written_into_no_other_file(converted, tmp_path):
    """Weights that are called like it, and folders that have its name, stay what they are."""
    _, done, _ = converted
    original = package(tmp_path / "model")
    (original / "weights.pt").rename(original / "documentation.md")
    (original / "documentation-2.md").mkdir()
    rewritten(
        original, documentation="documentation.md", weights__pytorch_state_dict__source="documentation.md"
    )
    normfix.give_back(done, tmp_path / "back", original=original)
    content = description_of(tmp_path / "back")
    entry = content["weights"]["pytorch_state_dict"]
    assert content["documentation"] == "documentation-3.md"
    assert entry["sha256"] == sha256(tmp_path / "back" / entry["source"])


@pytest.mark.parametrize("least", [2**40, 32.5, "wide"])
def test_a_smallest_size_that_no_image_has_is_refused(least, converted, tmp_path):
    """It is what the test image is extended to, so it is neither a fraction nor larger than images are."""
    _, done, _ = converted
    original = rewritten(package(tmp_path / "model"), inputs__0__axes__2__size={"min": least, "step": 2})
    with pytest.raises(NormfixError) as info:
        normfix.give_back(done, tmp_path / "back", original=original)
    assert info.value.code == "NF592"


def test_a_test_image_that_is_too_small_is_extended(converted, tmp_path):
    """A smallest size above the test image's: the image is mirrored to it, and the tests hold there."""
    _, done, _ = converted
    original = package(tmp_path / "model")
    for axis in (2, 3):
        rewritten(original, **{f"inputs__0__axes__{axis}__size": {"min": 66, "step": 2}})
    normfix.give_back(done, tmp_path / "back", original=original)
    assert np.load(tmp_path / "back" / "test_input.npy").shape == (1, 1, 66, 66)
    assert normfix.load(tmp_path / "back") is not None


def test_a_shorter_halo_is_declared_with_its_error(converted, tmp_path):
    """The halo that was asked for stands in the description, its measured error in the documentation and the README."""
    folder, done, _ = converted
    image = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    point, exact = normfix.halo_curve(done.model, image, tile=16, halo=1).points
    assert point.max_sd > 1e-3 > exact.max_sd
    normfix.give_back(done, tmp_path / "back", original=folder, shorter=point)
    content = description_of(tmp_path / "back")
    assert [axis["halo"] for axis in content["outputs"][0]["axes"][2:]] == [2, 2]
    for name in ("README.md", "README-normfix.md"):
        assert f"{point.max_sd:.1g} standard deviations" in (tmp_path / "back" / name).read_text()


def test_code_of_the_package_is_kept_where_it_knows_a_norm(tmp_path):
    """A network of the package's own code, which was allowed: the file stays, and its argument is switched."""
    original = package(tmp_path / "model", own=True)
    digest = sha256(original / "arch.py")
    model = normfix.load(original, allow_code=[digest])
    done = normfix.convert(model, torch.rand(1, 1, 48, 48, generator=torch.Generator().manual_seed(0)))
    normfix.give_back(done, tmp_path / "back", original=original, allow_code=[digest])
    architecture = description_of(tmp_path / "back")["weights"]["pytorch_state_dict"]["architecture"]
    assert architecture["kwargs"] == {"width": 4, "norm": "BatchNorm2d"}
    assert architecture["sha256"] == digest


def test_a_scaling_without_a_step_is_refused(converted, tmp_path):
    """Constants that belong to images scaled by their integers' range have no step that says so in a description."""
    folder, done, _ = converted
    with pytest.raises(NormfixError) as info:
        normfix.give_back(done, tmp_path / "back", original=folder, scaling=Scaling(kind="unit"))
    assert info.value.code == "NF597"
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
def test_forms_for_other_runtimes_are_written_anew(converted, tmp_path):
    """TorchScript of the fixed network takes the old one's place; what PyTorch does not write is left out."""
    _, done, _ = converted
    original = package(tmp_path / "model")
    (original / "old.pt").write_bytes(b"the original network")
    entry = {"source": "old.pt", "sha256": sha256(original / "old.pt")}
    rewritten(original, weights__torchscript=entry, weights__keras_hdf5=dict(entry))
    record = normfix.give_back(done, tmp_path / "back", original=original)
    weights = description_of(tmp_path / "back")["weights"]
    assert set(weights) == {"pytorch_state_dict", "torchscript"}
    assert any(change.name == "weights.keras_hdf5" for change in record.changes)
    image = torch.rand(1, 1, 48, 64, generator=torch.Generator().manual_seed(0))
    network = torch.jit.load(tmp_path / "back" / weights["torchscript"]["source"])
    torch.testing.assert_close(network(image), done.model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_bioimageio_core_gives_the_whole_in_blocks(tmp_path):
    """kind-seashell, small: blocks of its halo differ; given back, core's test passes and blocks equal the whole."""
    pytest.importorskip("bioimageio.core", reason="bioimageio.core is not installed")
    pytest.importorskip("torch_em", reason="torch-em is not installed")
    original = seashell(tmp_path / "model", [[1, 2, 2]])
    image = volume((24, 96, 96), 1)
    np.save(tmp_path / "image.npy", image)
    model = normfix.load(original)
    images = normfix.read_images(
        str(tmp_path / "image.npy"), model, axes="ZYX", scaling=f"{image.mean()},{image.std()}"
    )
    normfix.give_back(normfix.convert(model, images), tmp_path / "back", original=original)

    def core(folder, blocks):
        words = [sys.executable, "-c", CORE, str(folder), str(tmp_path / "image.npy"), json.dumps(blocks)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    status, before = core(original, [20, 80, 80])
    assert status == "passed"
    assert before > 0.1
    status, after = core(tmp_path / "back", [20, 64, 64])
    assert status == "passed"
    assert after < 1e-4
