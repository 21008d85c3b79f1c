"""Hostile and damaged files: no execution, no crash, no hang, bounded memory; each is refused with a code."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import time
from pathlib import Path

import hostile
import pytest
import torch
from hostile import CORPUS, MARK
from optional import needs_programs

from normfix.errors import NormfixError
from normfix.storage.opening import open_model
from normfix.storage.opening.formats.exported import read_program

ARCH = "factories:tiny_unet"
MEMORY = 512 << 20
"""What opening a hostile file may take beyond what the process has, in bytes."""
SECONDS = 20
LONGER = int(os.environ.get("NORMFIX_FUZZ", "1"))
"""How many times as many mutations; CI runs 1."""


def refused(path: Path) -> str:
    """Return the code with which a file is refused, program or not; only files of weights are given a network."""
    arch = ARCH if path.is_file() else None
    opening = read_program if path.suffix == ".pt2" else lambda p: open_model(str(p), arch=arch)
    try:
        opening(path)
    except NormfixError as error:
        assert "\n" not in str(error)  # noqa: PT017 - whether it is refused is asserted by the caller
        return error.code
    return "opened"


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.filterwarnings("ignore")  # of libraries about what they are shown
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    """Each is refused with a code, quickly, and what it would run has not run."""
    path = CORPUS[name](tmp_path)
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    code = refused(path)
    assert code.startswith("NF")
    assert time.monotonic() - started < SECONDS
    assert not list(tmp_path.rglob(f"{MARK}*"))


PLANTED = {
    "expression": CORPUS["program with an expression that runs"],
    "sample inputs": hostile.sample_inputs,
}


@needs_programs
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.filterwarnings("ignore")
def test_the_program_runs_when_torch_opens_it(tmp_path, name):
    """Negative control: torch.export.load itself runs what is planted, so what normfix does before is what protects."""
    path = PLANTED[name](tmp_path)
    with contextlib.suppress(Exception):  # whether it fails after running is not the point
        torch.export.load(path).module()
    assert (tmp_path / MARK).exists()


def test_sample_inputs_are_never_read(tmp_path):
    """Sample inputs that run code are left out: the program opens and computes, and nothing ran."""
    program = read_program(hostile.sample_inputs(tmp_path))
    assert program.module()(torch.randn(3, 1, 12, 20)).shape == (3, 2, 12, 20)
    assert not (tmp_path / MARK).exists()


def test_a_harmless_program_is_opened(tmp_path):
    """Negative control of the scan: a program with free sizes passes it, and computes on another size."""
    image = torch.randn(3, 1, 12, 20)
    assert read_program(hostile.program(tmp_path)).module()(image).shape == (3, 2, 12, 20)


def test_doubling_tuples_hang_without_the_inspection():
    """Negative control: hashing the same shape, far smaller, already takes time that doubles with depth."""
    import pickle

    def seconds(depth: int) -> float:
        started = time.perf_counter()
        pickle.loads(hostile._doubling(depth))
        return time.perf_counter() - started

    assert seconds(20) > 20 * seconds(8)


def _within_memory(write, folder, answer) -> None:
    """Open a file with a limit on the address space; the answer is its code."""
    path = write(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    answer.put(refused(path))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in CORPUS
        if n.startswith(("pickle of", "pickle that all", "zip", "safetensors", "pickle with"))
        or "bytes" in n
        or n in ("program with a long graph", "program that is a zip bomb")
    ],
)
def test_memory_is_bounded(tmp_path, name):
    """Files that claim gigabytes or terabytes are refused by a process that may take only little more memory."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_within_memory, args=(CORPUS[name], tmp_path, answer))
    process.start()
    process.join(3 * SECONDS)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0
    assert answer.get(timeout=1).startswith("NF")


SEEDS = {
    "state dict": hostile.saved,
    "old format": lambda d: _old(d),
    "safetensors": lambda d: _safetensors(d),
    "module": hostile._module,
    "program": hostile.program,
}


def _old(folder: Path) -> Path:
    torch.save({"a": torch.ones(3)}, folder / "o.pth", _use_new_zipfile_serialization=False)
    return folder / "o.pth"


def _safetensors(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, folder / "w.safetensors")
    return folder / "w.safetensors"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a file with bits flipped, cut, repeated, shifted or with lengths set to extremes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(max(1, len(changed)))
        match rng.randrange(6):
            case 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[place : place + 1] = bytes([changed[place] ^ 1 << rng.randrange(8)])
            case 2:
                del changed[place:]
            case 3:
                del changed[place : place + rng.randrange(1, 64)]
            case 4:
                changed[place:place] = changed[place : place + rng.randrange(1, 64)]
            case _:
                changed[place : place + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
        changed = changed or bytearray(b"\0")
    return bytes(changed)


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_refused_or_opened(tmp_path, name):
    """Of a few hundred mutations of each kind of file, none crashes, hangs or fails other than with a code."""
    path = SEEDS[name](tmp_path)
    data, rng = path.read_bytes(), random.Random(f"{name} {os.environ.get('NORMFIX_FUZZ_SEED', 0)}")
    count = (40 if name == "program" else 200) * LONGER
    codes: dict[str, int] = {}
    slowest = 0.0
    for _ in range(count):
        path.write_bytes(mutated(data, rng))
        started = time.monotonic()
        code = refused(path)
        slowest = max(slowest, time.monotonic() - started)
        codes[code] = codes.get(code, 0) + 1
    assert sum(codes.values()) == count
    assert sum(n for code, n in codes.items() if code.startswith("NF")) > count / 2, codes
    assert slowest < SECONDS


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"_model_class": 3}', '{"architecture": []}', '{"architectures": 3}']
)
def test_a_malformed_config_is_refused(tmp_path, text):
    """A folder whose config.json is broken or of other types is refused with a code."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(NormfixError):
        open_model(str(tmp_path))


@pytest.mark.parametrize("seed", range(3))
def test_mutated_configs_are_refused(tmp_path, seed):
    """Configs of a folder with values replaced by others are refused with a code."""
    rng = random.Random(seed)
    plain = {
        "architecture": "test_resnet",
        "num_features": 1,
        "num_classes": 3,
        "model_args": {"num_classes": 3},
    }
    strange = [None, -1, 2**70, "x" * 1000, [], {}, [[]], "../..", "timm:hf-hub:a/b", True]
    for _ in range(20 * LONGER):
        config = dict(plain)
        config[rng.choice(list(config))] = rng.choice(strange)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(NormfixError):
            open_model(str(tmp_path))
