"""bioimage.io packages in: built by installed libraries, believed by their own tests, or refused with nothing run."""

import os
import shutil
import socket
import zipfile

import numpy as np
import pytest
import torch
from bioimage_packages import KWARGS, package, rewritten, sha256, zipped
from monai.networks.nets import UNet

import normfix
from normfix import NormfixError
from normfix.cli import cli
from normfix.storage import scripts
from normfix.storage.loading import open_any
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.descriptions import File, Step, TensorOf, described
from normfix.storage.opening.processing import UnknownStepError, processed, scaling_of_steps
from normfix.storage.opening.request import Request

STATE = "weights__pytorch_state_dict"


@pytest.fixture(autouse=True)
def unconnected(monkeypatch):
    """Nothing is fetched: a connection is an error."""

    def refuse(*_, **__):
        raise AssertionError("it went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def code_of(path, **options) -> str:
    """Return the code with which a package is refused."""
    with pytest.raises(NormfixError) as info:
        open_any(path, Request(**options))
    return info.value.code


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize("form", ["folder", "zip", "rdf"])
def test_a_package_is_opened_by_an_installed_class(version, form, tmp_path):
    """Folder, archive and description open as MONAI's class, whose code in the package never runs."""
    folder = package(tmp_path / "model", version)
    forms = {"folder": folder, "rdf": folder / "rdf.yaml"}
    path = zipped(folder, tmp_path / "model.zip") if form == "zip" else forms[form]
    opened = open_any(path, Request())
    assert opened.source.spec == "monai.networks.nets:UNet"
    assert any("within" in note for note in opened.notes)
    weights = torch.load(folder / "weights.pt")
    assert all(torch.equal(weights[name], value) for name, value in opened.model.state_dict().items())


def test_an_archive_of_a_folder_is_a_package(tmp_path):
    """What a file manager packs, a folder and its own notes beside it, opens as the folder does."""
    folder, path = package(tmp_path / "model"), tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"model/{file.name}")
        archive.writestr("__MACOSX/model/._rdf.yaml", b"notes")
    assert open_any(path, Request()).source.spec == "monai.networks.nets:UNet"


def test_preprocessing_is_the_scaling_of_images(tmp_path):
    """Images read for the network are z-scored as the package says, and converting says so in its provenance."""
    model = normfix.load(package(tmp_path / "model"))
    pixels = np.random.default_rng(1).integers(0, 4000, (96, 80)).astype(np.uint16)
    np.save(tmp_path / "image.npy", pixels)
    done = normfix.convert(model, tmp_path / "image.npy")
    assert done.proof.passed
    image = torch.from_numpy((pixels - pixels.mean()) / pixels.std())[None, None].float()
    expected = model.eval()(image).detach()
    found = normfix.predict(done.model, tmp_path / "image.npy", tile=32)
    assert float((torch.as_tensor(found) - expected).abs().max() / expected.std()) < 1e-4


def test_a_test_of_many_pixels_is_no_harm(tmp_path):
    """What the network makes of a large test image is many times its weights, and is no reason to refuse it."""
    folder = package(tmp_path / "model", side=1024)
    assert open_any(folder / "rdf.yaml", Request()).source.kind == "factory"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({f"{STATE}__sha256": "0" * 64}, "NF592"),
        ({f"{STATE}__source": "../weights.pt"}, "NF592"),
        ({f"{STATE}__source": "w" * 4000}, "NF592"),
        ({f"{STATE}__source": "weights\0.pt"}, "NF592"),
        ({f"{STATE}__source": "/etc/passwd"}, "NF592"),
        ({f"{STATE}__source": "https://example.org/weights.pt"}, "NF592"),
        ({f"{STATE}__source": "missing.pt"}, "NF592"),
        ({f"{STATE}__architecture__sha256": "0" * 64}, "NF592"),
        ({"inputs__0__test_tensor__sha256": "0" * 64}, "NF592"),
        ({"inputs__0__test_tensor__source": "weights.pt", "inputs__0__test_tensor__sha256": None}, "NF592"),
        ({"format_version": "0.3.0"}, "NF592"),
        ({"type": "dataset"}, "NF592"),
        ({"weights": {"onnx": {}}}, "NF592"),
        ({"inputs": []}, "NF592"),
        ({"inputs": "none"}, "NF592"),
        ({f"{STATE}__architecture__callable": "Unheard"}, "NF593"),
        ({f"{STATE}__architecture": {"import_from": "os", "callable": "system", "kwargs": {}}}, "NF113"),
        ({f"{STATE}__architecture__kwargs__channels": [4, 1 << 30]}, "NF121"),
        ({f"{STATE}__architecture__kwargs__norm": "batch"}, "NF105"),
        ({f"{STATE}__architecture__kwargs__channels": [8, 8]}, "NF105"),
        ({f"{STATE}__architecture__kwargs__act": "TANH"}, "NF105"),
        ({f"{STATE}__architecture__kwargs__norm": ["instance", {"eps": 1.0}]}, "NF594"),
        ({"outputs__0__postprocessing": []}, "NF594"),
        ({"outputs__0__postprocessing": [{"id": "cellpose_flow_dynamics"}]}, "NF594"),
        ({"inputs__0__preprocessing": [{"id": "clip", "kwargs": {"min": [[0], [0]], "max": [1]}}]}, "NF594"),
        ({"inputs__0__preprocessing": [{"id": "scale_range", "kwargs": {"eps": [1e-6] * 64}}]}, "NF594"),
    ],
)
def test_a_wrong_description_is_refused(change, code, tmp_path):
    """One wrong value each: the code says what kind of fault it is."""
    assert code_of(rewritten(package(tmp_path / "model"), **change)) == code


def test_numbers_of_a_step_are_not_tables_that_grow_with_each_other():
    """A list where a number belongs would multiply the extents of an image; none is computed."""
    file = File(name="x.npy", sha256=None)
    for name, kwargs in (
        ("scale_range", {"min_percentile": [1, 2, 3]}),
        ("zero_mean_unit_variance", {"eps": [[1], [2]]}),
        ("clip", {"min": [[0], [1]], "max": 1}),
    ):
        steps = (Step(name=name, kwargs=kwargs, axes=None),)
        with pytest.raises(UnknownStepError):
            processed(np.zeros((1, 1, 4, 4)), TensorOf(name="x", axes="bcyx", steps=steps, test=file))


def test_a_test_tensor_of_more_than_is_computed_is_not_read(tmp_path):
    """The values that its header claims, times the steps, are bounded before any is read."""
    folder = package(tmp_path / "model")
    rewritten(folder, inputs__0__test_tensor__sha256=None)
    assert open_any(folder, Request()).source.kind == "factory"
    path = folder / "test_input.npy"
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1, 1, 1 << 14, (1 << 13) + 2)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + (1 << 14) * ((1 << 13) + 2))
    assert code_of(folder) == "NF121"


def test_weights_of_another_network_are_found_by_the_tests(tmp_path):
    """Weights that fit by name and shape, with their checksum made right, do not give the test output."""
    folder, other = package(tmp_path / "model"), package(tmp_path / "other", seed=1)
    shutil.copy(other / "weights.pt", folder / "weights.pt")
    rewritten(folder, **{f"{STATE}__sha256": sha256(folder / "weights.pt")})
    assert code_of(folder) == "NF594"


def test_constant_tests_show_nothing(tmp_path):
    """A test output without spread proves no substitution."""
    folder = package(tmp_path / "model")
    np.save(folder / "test_output.npy", np.full((1, 2, 64, 64), 0.5, np.float32))
    rewritten(folder, outputs__0__test_tensor={"source": "test_output.npy"})
    assert code_of(folder) == "NF594"


def test_weights_that_are_a_program_are_refused(tmp_path):
    """Weights whose pickle imports what is no tensor are NF102, and it does not run."""
    folder = package(tmp_path / "model")

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"weight": Harm()}, folder / "weights.pt")
    rewritten(folder, **{f"{STATE}__sha256": sha256(folder / "weights.pt")})
    assert code_of(folder) == "NF102"
    assert not (tmp_path / "harmed").exists()


def test_a_test_tensor_that_is_a_pickle_is_refused(tmp_path):
    """An array of objects is a pickle: it is not read."""
    folder = package(tmp_path / "model")
    np.save(folder / "test_input.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    rewritten(folder, inputs__0__test_tensor={"source": "test_input.npy"})
    assert code_of(folder) == "NF592"


def test_a_link_out_of_the_package_is_refused(tmp_path):
    """A file of the folder that links to one outside is not read."""
    folder = package(tmp_path / "model")
    (folder / "weights.pt").rename(tmp_path / "weights.pt")
    (folder / "weights.pt").symlink_to(tmp_path / "weights.pt")
    assert code_of(folder) == "NF592"


@pytest.mark.parametrize(
    "name", ["../out.py", "/out.py", "a/../../out.py", "RDF.YAML", "rdf.yaml", "a\\out.py", "C:out.py"]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_leads_out_or_has_a_name_twice_is_refused(name, tmp_path):
    """Members outside of the folder, or two of one name, are NF121, and nothing is unpacked there."""
    path = zipped(package(tmp_path / "model"), tmp_path / "model.zip", {name: b"harm"})
    assert code_of(path) == "NF121"
    assert not (tmp_path / "out.py").exists()


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path):
    """A member that unpacks to many times the archive is NF121."""
    path = zipped(package(tmp_path / "model"), tmp_path / "model.zip", {"zeros.bin": bytes(1 << 24)})
    assert code_of(path) == "NF121"


@pytest.mark.parametrize("cut", [0.5, 0.98])
def test_an_archive_that_was_cut_short_is_refused(cut, tmp_path):
    """What is left of a download that broke off is NF101."""
    path = zipped(package(tmp_path / "model"), tmp_path / "model.zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    assert code_of(path) == "NF101"


def test_a_description_that_grows_by_aliases_is_refused(tmp_path):
    """YAML aliases, of which a few lines hold a billion values, are NF101 before they are followed."""
    folder = package(tmp_path / "model")
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
    (folder / "rdf.yaml").write_text(bomb)
    assert code_of(folder) == "NF101"


class Told(list):
    """Hears what is said before an error."""

    def __call__(self, text):
        self.append(text)


@pytest.mark.slow
def test_code_is_shown_and_runs_only_by_its_checksum(tmp_path):
    """A network of its own code is NF593, which shows file and sha256; with that sha256 it is opened and tested."""
    folder = package(tmp_path / "model", own=True)
    told = Told()
    assert code_of(folder, tell=told) == "NF593"
    digest = sha256(folder / "arch.py")
    assert digest in told[0]
    assert "class Own(nn.Sequential):" in told[0]
    assert code_of(folder, allow_code=("0" * 64,)) == "NF593"
    opened = open_any(zipped(folder, tmp_path / "model.zip"), Request(allow_code=(digest,)))
    assert normfix.scan(opened.model).live


def test_code_that_was_changed_does_not_run(tmp_path):
    """An allowed checksum is of the very file: with another line it is refused."""
    folder = package(tmp_path / "model", own=True)
    digest = sha256(folder / "arch.py")
    with (folder / "arch.py").open("a") as file:
        file.write(f"open({str(tmp_path / 'harmed')!r}, 'w')\n")
    rewritten(folder, **{f"{STATE}__architecture__sha256": None})
    assert code_of(folder, allow_code=(digest,)) == "NF593"
    assert not (tmp_path / "harmed").exists()


def test_the_steps_are_those_of_the_specification():
    """Each step by numbers computed another way."""
    x = np.arange(24, dtype=np.float64).reshape(1, 2, 3, 4) ** 2

    def after(name, axes=None, **kwargs):
        file = File(name="x.npy", sha256=None)
        tensor = TensorOf(
            name="x", axes="bcyx", steps=(Step(name=name, kwargs=kwargs, axes=axes),), test=file
        )
        return processed(x, tensor), scaling_of_steps(tensor, 2)

    whole, scaling = after("zero_mean_unit_variance", "cyx")
    np.testing.assert_allclose(whole, (x - x.mean()) / (x.std() + 1e-6))
    assert scaling.kind == "zscore"
    each, scaling = after("zero_mean_unit_variance", "yx")
    np.testing.assert_allclose(each[0, 1], (x[0, 1] - x[0, 1].mean()) / (x[0, 1].std() + 1e-6))
    assert scaling is None
    ranged, scaling = after("scale_range", min_percentile=10, max_percentile=90)
    np.testing.assert_allclose(
        ranged, (x - np.percentile(x, 10)) / np.ptp(np.percentile(x, [10, 90])), rtol=1e-6
    )
    assert (scaling.kind, scaling.values) == ("percentile", (10, 90))
    linear, scaling = after("scale_linear", gain=2.0, offset=3.0)
    np.testing.assert_allclose(linear, 2 * x + 3)
    np.testing.assert_allclose((x - scaling.values[0]) / scaling.values[1], 2 * x + 3)


@pytest.mark.slow
def test_the_command_line_takes_a_package(tmp_path, monkeypatch, capsys):
    """scan, convert and check of an archive exit with 0; the converted folder opens where the package is gone."""
    monkeypatch.chdir(tmp_path)
    zipped(package(tmp_path / "model"), tmp_path / "model.zip")
    np.save("image.npy", np.random.default_rng(1).random((96, 96), dtype=np.float32))
    assert not cli.main(["scan", "model.zip"], standalone_mode=False)
    assert (
        cli.main(
            ["convert", "model.zip", "image.npy", "--to", "frozen", "-o", "fixed"], standalone_mode=False
        )
        == 0
    )
    assert "scaling of images" in capsys.readouterr().err
    shutil.rmtree("model")
    (tmp_path / "model.zip").unlink()
    assert cli.main(["check", "fixed", "image.npy", "--tile", "32"], standalone_mode=False) == 0


def test_torch_em_is_recognised_where_it_is_installed(tmp_path):
    """A package that calls unet.py:UNet2d opens as torch-em's own class."""
    model = pytest.importorskip("torch_em.model", reason="torch-em is not installed")
    folder = package(tmp_path / "model")
    kwargs = {
        "in_channels": 1,
        "out_channels": 2,
        "depth": 2,
        "initial_features": 4,
        "final_activation": "Sigmoid",
    }
    torch.manual_seed(0)
    network = model.UNet2d(**kwargs).eval()
    torch.save(network.state_dict(), folder / "weights.pt")
    image = np.load(folder / "test_input.npy")
    with torch.no_grad():
        output = network(torch.from_numpy((image - image.mean()) / (image.std() + 1e-6)))
    np.save(folder / "test_output.npy", output.numpy())
    rewritten(
        folder,
        **{
            f"{STATE}__sha256": sha256(folder / "weights.pt"),
            f"{STATE}__architecture__callable": "UNet2d",
            f"{STATE}__architecture__kwargs": kwargs,
            "outputs__0__test_tensor": {"source": "test_output.npy"},
            "outputs__0__postprocessing": [],
        },
    )
    assert open_any(folder, Request()).source.spec == "torch_em.model:UNet2d"


def scripted(folder):
    """Write a package whose weights are TorchScript alone."""
    package(folder)
    network = UNet(**KWARGS).eval()
    network.load_state_dict(torch.load(folder / "weights.pt"))
    torch.jit.trace(network, torch.rand(1, 1, 64, 64)).save(str(folder / "model.ts"))
    stated = {"torchscript": {"source": "model.ts", "sha256": sha256(folder / "model.ts")}}
    return rewritten(folder, weights=stated), network


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_package_of_torchscript_alone_is_opened_as_a_program(tmp_path):
    """Its program gives the package's test outputs, computes what the network does, and has the package's scaling."""
    folder, network = scripted(tmp_path / "model")
    opened = open_any(zipped(folder, tmp_path / "model.zip"), Request())
    assert opened.source.spec == "torch.jit:ScriptModule"
    assert any("scaling of images" in note for note in opened.notes)
    image = torch.rand(2, 1, 96, 32)
    with torch.no_grad():
        torch.testing.assert_close(opened.model(image), network(image))


def test_a_script_of_another_checksum_is_not_read(tmp_path, monkeypatch):
    """TorchScript of a package with another sha256 than stated is NF592 before any process is started."""
    monkeypatch.setattr(scripts, "run_fresh", lambda *words, **options: pytest.fail("it was read"))
    folder = package(tmp_path / "model")
    (folder / "model.ts").write_bytes(b"PK")
    assert (
        code_of(rewritten(folder, weights={"torchscript": {"source": "model.ts", "sha256": "0" * 64}}))
        == "NF592"
    )


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_descriptions_are_read_as_bioimageio_spec_reads_them(version, tmp_path):
    """Weights, architecture, axes, steps and tests are those of the library that defines the format."""
    spec = pytest.importorskip("bioimageio.spec", reason="bioimageio.spec is not installed")
    folder = package(tmp_path / "model", version)
    content = read_mapping(folder / "rdf.yaml")
    with spec.ValidationContext(perform_io_checks=False, root=folder):
        theirs = spec.build_description(dict(content))
    mine, entry = described(content, "rdf.yaml"), theirs.weights.pytorch_state_dict
    assert (mine.weights.name, mine.weights.sha256) == (str(entry.source), str(entry.sha256))
    architecture = entry.architecture
    kwargs = entry.kwargs if version == "0.4" else architecture.kwargs
    callable_ = architecture.callable_name if version == "0.4" else architecture.callable
    file = architecture.source_file if version == "0.4" else architecture.source
    digest = entry.architecture_sha256 if version == "0.4" else architecture.sha256
    assert (mine.architecture.name, mine.architecture.kwargs) == (str(callable_), kwargs)
    assert (mine.architecture.file.name, mine.architecture.file.sha256) == (str(file), str(digest))
    ours = (*mine.inputs, *mine.outputs)
    tests = (*getattr(theirs, "test_inputs", ()), *getattr(theirs, "test_outputs", ()))
    for number, (own, other) in enumerate(zip(ours, (*theirs.inputs, *theirs.outputs), strict=True)):
        letters = {"batch": "b", "channel": "c"}
        axes = (
            other.axes if version == "0.4" else "".join(letters.get(str(a.id), str(a.id)) for a in other.axes)
        )
        test = tests[number] if version == "0.4" else other.test_tensor.source
        steps = other.preprocessing if number == 0 else other.postprocessing
        # the library adds steps that say the data type
        named = [s for s in steps if getattr(s, "id", getattr(s, "name", "")) != "ensure_dtype"]
        assert (own.axes, own.test.name) == (axes, str(test))
        assert [s.name for s in own.steps] == [str(getattr(s, "id", getattr(s, "name", ""))) for s in named]
        for step, known in zip(own.steps, named, strict=True):
            stated = known.model_dump().get("kwargs", {})
            assert all(list(stated[name]) == list(value) for name, value in step.kwargs.items())
