"""normfix choose: the answer first, what to run, reports, and what convert makes of it."""

import json

import numpy as np
import pytest

from normfix.records.candidates import ChoiceRecord

ARCH = "factories:tiny_unet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images whose squares are bright on one side, and their labels."""
    found = tmp_path_factory.mktemp("choose")
    for number in range(2):
        truth = np.zeros((64, 64), np.uint8)
        truth[8:24, 8:24] = truth[40:56, 8 + 16 * number : 40] = 1
        noise = np.random.default_rng(number).random((64, 64))
        np.save(found / f"image-{number}.npy", (truth * np.linspace(0.2, 2, 64) + noise).astype(np.float32))
        np.save(found / f"labels-{number}.npy", truth)
    return found


@pytest.mark.slow
def test_the_answer_comes_with_a_command_that_runs(run, folder, tmp_path):
    """The table and the ready line are printed, the page is written, and the line converts."""
    images = [folder / f"image-{n}.npy" for n in range(2)]
    labels = [word for n in range(2) for word in ("--labels", folder / f"labels-{n}.npy")]
    options = ["--scale", "none", *labels, "--window", "32", "--kind", "logits"]
    done = run(
        "choose",
        ARCH,
        *images,
        *options,
        "--report",
        tmp_path / "choose.html",
        "--report",
        tmp_path / "c.json",
    )
    assert done.code == 0, done.err
    assert done.out.startswith("take ")
    record = ChoiceRecord.loads((tmp_path / "c.json").read_text())
    assert len(record.parts) == 2
    assert "Where they differ most" in (tmp_path / "choose.html").read_text()
    words = record.fix.split()
    assert words[:2] == ["normfix", "convert"]
    assert f"{words[words.index('--statistics') + 1]}" == record.best.statistics.words
    made = run(*words[1:-2], "-o", tmp_path / "fixed", "--allow-flat")
    assert made.code == 0, made.err
    saved = json.loads((tmp_path / "fixed" / "normfix.json").read_text())
    assert saved["provenance"]["statistics"] == record.best.statistics.to_json()


@pytest.mark.slow
def test_convert_takes_the_choice(run, folder, tmp_path):
    """--statistics choose says what it took and why, and the folder holds it."""
    words = ["convert", ARCH, folder / "image-0.npy", "--scale", "none", "--to", "frozen", "--allow-flat"]
    done = run(*words, "--statistics", "choose:16", "-o", tmp_path / "fixed")
    assert done.code == 0, done.err
    assert "take " in done.err
    assert "own windows of 16" in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("choose", ARCH, "image-0.npy"),
        ("choose", ARCH, "image-0.npy", "--window", "32", "--report", "r.xml"),
        ("convert", ARCH, "image-0.npy", "--to", "frozen", "-o", "out", "--statistics", "choose"),
        ("convert", ARCH, "image-0.npy", "--to", "frozen", "-o", "out", "--labels", "labels-0.npy"),
        ("convert", ARCH, "image-0.npy", "--to", "frozen", "-o", "out", "--keys", "9" * 5000),
        ("convert", ARCH, "image-0.npy", "--to", "frozen", "-o", "out", "--channels", "9" * 5000),
    ],
)
def test_wrong_usage_is_said_and_writes_nothing(run, folder, monkeypatch, words):
    """Without anything to judge by, with a report of no kind, or labels for nothing."""
    monkeypatch.chdir(folder)
    done = run(*words)
    assert done.code == 2
    assert "NF9" not in done.err
    assert not (folder / "out").exists()
