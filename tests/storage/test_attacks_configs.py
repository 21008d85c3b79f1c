"""Configs of every format: what they name is not opened, fetched, imported or run, and small ones stay cheap."""

import contextlib
import itertools
import json
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from attacks import Job, audited
from attacks_configs import CORPUS, bundle
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import normfix
from normfix.errors import NormfixError
from normfix.images.deadline import within
from normfix.records.saved import Source
from normfix.storage.opening.allocation import Bounded, Sketched, Stored, require_proportion
from normfix.storage.opening.arguments import blanked, require_inert, require_small
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.factories import confined, rebuild
from normfix.storage.opening.gate import is_allowed
from normfix.storage.opening.guard import watched

if sys.platform == "linux":
    import resource

SECONDS, MEBIBYTES = 10, 1024
"""Of the processor and of memory, for what is no larger than a few kilobytes."""
FAMILIES = {
    "bundle": ("monai.networks.nets", "torchvision", "transformers"),
    "diffusers": ("diffusers", "monai.networks.nets"),
    "nnunet": ("dynamic_network_architectures.architectures.unet", "monai.networks.nets"),
    "saved": ("torchvision", "timm", "segmentation_models_pytorch"),
    "smp": ("segmentation_models_pytorch",),
    "timm": ("timm",),
    "transformers": ("transformers", "timm", "monai.networks.nets"),
}
"""What the names of the corpus begin with, and what is imported before: the library, and what imports of torch most."""

FETCHING = {
    "segmentation_models_pytorch:Unet": {"encoder_name": "resnet18"},
    "monai.networks.nets:EfficientNetBN": {"model_name": "efficientnet-b0"},
    "monai.networks.nets:ResNetFeatures": {"model_name": "resnet18"},
    "monai.networks.nets:MILModel": {"num_classes": 2},
    "monai.networks.nets:FlexibleUNet": {"in_channels": 3, "out_channels": 1, "backbone": "efficientnet-b0"}
    | {"pretrained": True},
    "torchvision.models.segmentation:lraspp_mobilenet_v3_large": {},
    "torchvision.models.segmentation:fcn_resnet50": {"weights": "DEFAULT"},
    "timm.models.resnet:resnet10t": {"pretrained": True},
}
"""Factories that would fetch weights by default, or with these arguments."""


def reached(outcome) -> list[str]:
    """Return what an outcome did, but for the late imports of installed modules from their compiled files."""
    return [text for text in outcome.violations if not text.startswith("marshal.loads")]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_configs_are_refused_reach_nothing_and_stay_cheap(family, tmp_path):
    """Each is refused with a code within seconds and a gibibyte; nothing was run, written, fetched or imported."""
    for library in FAMILIES[family]:
        pytest.importorskip(library.partition(".")[0])
    jobs = [
        Job(name, write(tmp_path / name.replace(" ", "_")))
        for name, write in CORPUS.items()
        if name.split()[0] == family
    ]
    outcomes = audited(jobs, warm=FAMILIES[family]).values()
    assert len(outcomes) == len(jobs) > 0
    assert [outcome for outcome in outcomes if not outcome.refused or reached(outcome)] == []
    assert [o for o in outcomes if o.seconds >= SECONDS or o.mebibytes >= MEBIBYTES] == []


def test_every_config_has_a_family():
    """None of the corpus is left out."""
    assert {name.split()[0] for name in CORPUS} == FAMILIES.keys()


@pytest.mark.slow
def test_networks_that_would_fetch_by_default_are_built_without(tmp_path):
    """Defaults and arguments that fetch weights are switched off, and the network is built."""
    libraries = sorted({spec.partition(":")[0].partition(".")[0] for spec in FETCHING})
    for library in libraries:
        pytest.importorskip(library)
    jobs = []
    for spec, args in FETCHING.items():
        path = tmp_path / f"{spec.partition(':')[2]}.json"
        path.write_text(json.dumps([spec, args]))
        jobs.append(Job(spec, path, opener="attacks_configs:rebuilt"))
    outcomes = audited(jobs, warm=(*libraries, "monai.networks.nets"))
    assert outcomes.keys() == FETCHING.keys()
    assert [o for o in outcomes.values() if o.said.startswith(("NF", "DIED")) or reached(o)] == []


# -- the gate


@pytest.mark.parametrize(
    "spec",
    [
        "monai.networks.nets:BasicUNet",
        "monai.networks.nets:UNet",
        "monai.networks.nets:resnet18",
        "torchvision.models:resnet18",
        "torchvision.models:ResNet",
        "timm:test_resnet",
        "timm.models.resnet:resnet10t",
        "normfix.demo.network:nuclei_unet",
    ],
)
def test_a_network_that_its_library_defines_may_be_named(spec):
    """Negative control: classes, and functions that the library registers, pass."""
    pytest.importorskip(spec.partition(":")[0].partition(".")[0])
    assert is_allowed(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "monai.networks.utils:save_state",
        "monai.networks.nets.hovernet:download_url",
        "monai.losses:DiceLoss",
        "torchvision.models:get_model",
        "torchvision.models.resnet:nn.Linear",
        "torchvision.ops:misc.torch.load",
        "timm.models:load_checkpoint",
        "timm.models.resnet:checkpoint_seq",
        "timm:no_such_network",
        "normfix.demo.show:show",
        "normfix.layers:FrozenNorm2d",
    ],
)
def test_what_is_no_network_of_its_library_may_not_be_named(spec):
    """Functions, losses, and what a module imported do not pass."""
    pytest.importorskip(spec.partition(":")[0].partition(".")[0])
    assert not is_allowed(spec)


def test_a_class_whose_name_leads_elsewhere_may_not_be_named(monkeypatch):
    """A class that says it is of an allowed module, but is not what that module holds, does not pass."""
    module = pytest.importorskip("timm.models.resnet")
    stray = type("Stray", (nn.Module,), {"__module__": "timm.models.resnet"})
    monkeypatch.setattr(module, "other_name", stray, raising=False)
    assert not is_allowed("timm.models.resnet:other_name")


# -- arguments


@pytest.mark.parametrize(
    "args",
    [
        {"drop_path_rate": 0.1},
        {"drop_path": 0},
        {"use_checkpoint": True},
        {"block_config": [6, 12]},
        {"patch_size": 4},
        {"act": ["LEAKYRELU", {"negative_slope": 0.1}]},
        {"checkpoint_path": ""},
        {"id2label": {"0": "wall/ceiling"}},
        {"pattern": "b c h w -> b (h w) c"},
    ],
)
def test_ordinary_arguments_are_inert(args):
    """Negative control: rates, switches, sizes, options and labels pass."""
    require_inert(args, "config.json")


@pytest.mark.parametrize(
    "args",
    [
        {"encoder": "hf-hub:a/b"},
        {"encoder": "LOCAL-DIR:here"},
        {"x": [{"y": ["file:evil"]}]},
        {"x": "../evil"},
        {"x": "sub/evil"},
        {"x": "C:\\evil"},
        {"x": "~root"},
        {"x": "evil.pth"},
        {"x": {"https://evil": 1}},
        {"model_path": "evil"},
        {"cache_dir": "evil"},
        {"checkpoint_path": 3},
        {"custom_generate": "evil"},
    ],
)
def test_what_names_a_place_is_refused_at_any_depth(args):
    """Addresses and paths by their form, and texts under telling names, are NF113."""
    with pytest.raises(NormfixError, match="NF113"):
        require_inert(args, "config.json")


@pytest.mark.parametrize("text", ["a" * 300_000, "a.b" * 100_000, "1:" * 150_000, ":" * 300_000])
def test_a_long_text_is_read_once(text):
    """Looking for an address takes time in proportion to the text: a letter repeated took minutes."""
    began = time.process_time()
    with contextlib.suppress(NormfixError):
        require_inert({"activation": text}, "config.json")
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", ["aé::", "x y-2.z:b", "s3://b", " ~/x", "C:\\x", "a/b", "1a:2"])
def test_an_address_is_known_from_its_colon(text):
    """Read backwards from there, a scheme is what it was forwards."""
    with pytest.raises(NormfixError, match="NF113"):
        require_inert({"activation": text}, "config.json")


@pytest.mark.parametrize("text", ["a ratio of 3:4", "1:2", ": x", "label: name", "a:", "_1:x"])
def test_a_colon_alone_is_no_address(text):
    """Negative control: no letter before the colon, or nothing behind it."""
    require_inert({"activation": text}, "config.json")


def test_the_caller_may_write_what_a_file_may_not():
    """A name of another place that the caller writes himself reaches the library."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    assert smp is not None
    with pytest.raises(NormfixError, match=r"NF111.*FileNotFoundError|NF111.*not found"):
        normfix.load(
            "segmentation_models_pytorch:Unet",
            args={"encoder_name": "tu-local-dir:/nowhere", "encoder_weights": None},
        )


@pytest.mark.parametrize(
    "args",
    [
        {"a": 10**6},
        {"a": [{"b": -(10**9)}]},
        {"a": 1e9},
        {"a": "x" * 10**5},
        {"a": [0] * 10**4},
        {"a": 10**5000},
    ],
)
def test_numbers_are_in_proportion_to_the_weights(args):
    """What no network of a thousand elements has is NF121."""
    with pytest.raises(NormfixError, match="NF121"):
        require_small(args, "config.json", tensors=10, elements=1000)


def test_numbers_of_large_weights_may_be_large():
    """Negative control: the same width is right beside as many elements."""
    require_small({"vocabulary": 10**6}, "config.json", tensors=10, elements=10**8)


def test_only_defaults_that_fetch_are_switched_off():
    """True, and texts under names of weights, become none; other defaults and values stay."""

    def factory(
        name="a", pretrained=True, encoder_weights="imagenet", class_weights=(1, 2), weights=None, size=3
    ):
        raise AssertionError

    given = {"name": "b", "weights": "DEFAULT"}
    expected = {"name": "b", "weights": None, "pretrained": False, "encoder_weights": None}
    assert blanked(factory, given, defaults=True) == expected


# -- the guard


def attempts(tmp_path: Path) -> dict:
    """Return what a constructor might do, by name."""
    (tmp_path / "secret").write_text("secret")
    return {
        "read": lambda: (tmp_path / "secret").read_text(),
        "write": lambda: (tmp_path / "ran").write_text("ran"),
        "delete": lambda: (tmp_path / "secret").unlink(),
        "connect": lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
        "resolve": lambda: socket.getaddrinfo("localhost", 80),
        "load": lambda: torch.load(tmp_path / "secret"),
        "process": lambda: __import__("subprocess").run([sys.executable, "-c", ""]),
    }


@pytest.mark.parametrize("name", ["read", "write", "delete", "connect", "resolve", "load", "process"])
def test_a_constructor_reaches_nothing(tmp_path, name):
    """Files, addresses and processes are refused while a network is built, and NF113 even if it was caught."""
    attempt = attempts(tmp_path)[name]

    def make() -> nn.Module:
        with contextlib.suppress(Exception):  # as libraries do
            attempt()
        return nn.Conv2d(1, 1, 1)

    with pytest.raises(NormfixError, match="NF113"):
        confined(make, Stored(tensors=2, elements=2), "config.json")
    assert ((tmp_path / "secret").exists(), (tmp_path / "ran").exists()) == (True, False)


def test_the_guard_ends_with_its_block_and_leaves_other_threads_alone(tmp_path):
    """Negative control: after the block, and in another thread within it, files are opened as ever."""
    from concurrent.futures import ThreadPoolExecutor

    (tmp_path / "a").write_text("a")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with watched("config.json"):
            assert pool.submit((tmp_path / "a").read_text).result() == "a"
    assert (tmp_path / "a").read_text() == "a"


def test_logging_and_imports_go_on_within_the_guard(tmp_path):
    """A log file of the user's, warnings and installed modules are no attempts of the file's."""
    import logging
    import warnings

    handler = logging.FileHandler(tmp_path / "log", delay=True)
    logger = logging.Logger("own")
    logger.addHandler(handler)
    sys.modules.pop("colorsys", None)
    with warnings.catch_warnings(record=True), watched("config.json"):
        warnings.simplefilter("always")
        logger.warning("built")
        warnings.warn("built", stacklevel=1)
        __import__("colorsys")
    handler.close()
    assert "built" in (tmp_path / "log").read_text()


# -- time and memory


def _endless() -> None:
    while True:
        try:
            while True:
                pass
        except Exception:  # noqa: BLE001 - as libraries do
            pass


def test_a_loop_that_makes_nothing_is_stopped():
    """A loop in plain Python, with its exceptions caught, is NF121 after its time."""
    started = time.thread_time()
    with pytest.raises(NormfixError, match="NF121"):
        within(0.2, _endless, "config.json")
    assert time.thread_time() - started < 2


def test_what_is_in_time_is_not_disturbed():
    """Negative control: results and exceptions of what is in time come through, and nothing is raised later."""
    for _ in range(50):
        assert within(0.001, lambda: 3, "config.json") == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"], "config.json")
    time.sleep(0.2)


LONG_CALLS = {
    "pairs": lambda: list(itertools.product(range(6_000), repeat=2)),
    "repeated": lambda: [0] * 4_000_000_000,
    "array": lambda: np.ones((40_000, 40_000)),
}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system refuses no memory")


def _confined(call):
    """Build a layer beside one long call, as a constructor makes a table of its own."""
    return confined(lambda: (call(), nn.Conv2d(1, 1, 1))[1], Stored(tensors=2, elements=2), "config.json")


@pytest.mark.slow
@on_linux
# what is collected while memory is refused may fail to finalise
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", LONG_CALLS)
@pytest.mark.parametrize("waiting", [False, True])
def test_one_long_call_is_refused_its_memory(name, waiting):
    """What no other thread can interrupt ends within a gibibyte, and a thread that waits changes nothing."""
    over = threading.Event()
    if waiting:
        threading.Thread(target=over.wait, daemon=True).start()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        with pytest.raises(NormfixError, match="NF121"):
            _confined(LONG_CALLS[name])
    finally:
        over.set()
    assert not _get_current_dispatch_mode_stack()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@on_linux
def test_a_thread_that_computes_keeps_its_memory():
    """Control: while another thread works, it is refused nothing, and nor is the one that builds."""
    over = threading.Event()

    def work():
        while not over.is_set():
            sum(range(1000))

    threading.Thread(target=work, daemon=True).start()
    limits = []
    try:
        _confined(lambda: limits.append(resource.getrlimit(resource.RLIMIT_DATA)))
    finally:
        over.set()
    assert limits
    assert set(limits) == {resource.getrlimit(resource.RLIMIT_DATA)}


def test_a_sketch_takes_no_memory_and_has_the_shapes():
    """A large layer is made without memory; small tensors keep their values."""
    with Sketched(1 << 30, "config.json"):
        layer = nn.Linear(8192, 8192)
        depths = [float(x) for x in torch.linspace(0, 1, 5)]
    assert (layer.weight.is_meta, layer.weight.shape, depths) == (True, (8192, 8192), [0, 0.25, 0.5, 0.75, 1])


def test_a_network_is_compared_with_its_weights():
    """A network of many more elements or tensors than its weights is NF121, and one in proportion is built."""
    layers = lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(400)))  # noqa: E731
    require_proportion(nn.Linear(8, 8), Stored(tensors=2, elements=72), "config.json")
    with pytest.raises(NormfixError, match="NF121"):
        confined(layers, Stored(tensors=2, elements=72), "config.json")
    assert len(confined(layers, Stored(tensors=800, elements=400 * 64 * 65), "config.json")) == 400


@pytest.mark.zoo
def test_layers_beyond_the_weights_are_not_made_to_be_counted():
    """Many small layers take time and room themselves: far fewer are made than a network of more weights may have."""
    made = []

    def layers(number=20_000):
        made.clear()
        for _ in range(number):
            made.append(nn.Conv2d(1, 1, 1, device="meta"))
        return nn.Sequential(*made)

    with pytest.raises(NormfixError, match="NF121"):
        confined(layers, Stored(tensors=10, elements=1 << 20), "config.json")
    assert len(made) <= 10_050
    assert (
        len(confined(lambda: layers(2_000), Stored(tensors=4_000, elements=1 << 20), "config.json")) == 2_000
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(0, 1, 1e-11),
        lambda: torch.ones(4).repeat(10**6, 10**5),
        lambda: torch.ones(10**5, 1) * torch.ones(1, 10**6),
        lambda: torch.ones(10**5, 1) @ torch.ones(1, 10**6),
        lambda: torch.ones(3).new_zeros(10**10),
        lambda: nn.functional.one_hot(torch.tensor([0, 1]), 10**11),
        lambda: list(torch.zeros(10**6)),
    ],
)
def test_what_is_made_of_other_tensors_counts_too(make):
    """Operations on small tensors that give huge ones are NF121 before they run."""
    with Bounded(1000, "config.json"), pytest.raises(NormfixError, match="NF121"):
        make()


def test_stored_elements_count_once():
    """A view that repeats one element by its strides does not count as the elements it claims."""
    repeated = torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))
    assert Stored.of([repeated, torch.zeros(3)]) == Stored(tensors=2, elements=4)


# -- files


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"network_def": {"_target_": "BasicUNet", "_target_": "UNet"}}',
        '{"a": ' + "[" * 1000 + "]" * 1000 + "}",
        "[" + "[]," * 10**6 + "1]",
    ],
)
def test_json_that_programs_read_differently_or_not_at_all_is_refused(tmp_path, text):
    """Names that stand twice, and values too deep or too many, are NF101."""
    folder = bundle(tmp_path / "b", {})
    (folder / "configs" / "inference.json").write_text(text)
    with pytest.raises(NormfixError, match="NF101"):
        normfix.load(folder)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("a.yaml", "0x" + "f" * 5000),
        ("a.yaml", "1" + ":59" * 400),
        ("a.yaml", "1" + ":59" * 400 + ".5"),
        ("a.yaml", "{? " + "0x" + "f" * 300 + " : 1}"),
        ("a.json", "9" * 309),
    ],
)
def test_numbers_that_are_no_floats_are_refused(tmp_path, name, number):
    """Windows of so many digits could not be written into a message; the largest float is read."""
    path, mark = tmp_path / name, '"roi_size"' if name == "a.json" else "roi_size"
    for found, code in ((number, "NF101"), ("9" * 308, None)):
        path.write_text(f"{{{mark}: {found}}}")
        with pytest.raises(NormfixError, match=code) if code else contextlib.nullcontext():
            assert float(read_mapping(path)["roi_size"]) == 1e308


def test_hyperparameters_that_name_a_place_are_refused(tmp_path):
    """Arguments that a Lightning checkpoint gives are a file's: NF113, unless the caller repeats them."""
    path = tmp_path / "l.ckpt"
    content = {"pytorch-lightning_version": "2.5", "hyper_parameters": {"weights_path": "/etc/passwd"}}
    torch.save(content | {"state_dict": {"bias": torch.zeros(1)}}, path)
    arch = "factories:Reading"
    with pytest.raises(NormfixError, match="NF113"):
        normfix.load(path, arch=arch)
    loaded = normfix.load(path, arch=arch, args={"weights_path": "/etc/passwd"})
    assert loaded.weights_path == "/etc/passwd"


def test_a_source_of_a_saved_folder_is_bounded_by_its_weights():
    """The same factory with the same arguments is built beside its weights and refused beside tiny ones."""
    source = Source(kind="factory", spec="normfix.demo.network:NucleiUNet", args="{}")
    assert isinstance(rebuild(source), nn.Module)
    source = Source(kind="factory", spec="timm:resnet18")
    with pytest.raises(NormfixError, match="NF121"):
        rebuild(source, stored=Stored(tensors=1, elements=10))
