"""normfix diagnose and the reports of check on the command line."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import tifffile

from normfix.records.diagnoses import DiagnosisRecord
from normfix.records.verdicts import Verdict

ARCH = "factories:tiny_unet"


@pytest.fixture
def image(tmp_path):
    """A 16-bit TIFF, brighter to the right, as people scale it."""
    pixels = np.random.default_rng(0).integers(0, 4000, (96, 80)) * np.linspace(0.1, 1, 80)
    tifffile.imwrite(tmp_path / "image.tif", pixels.astype(np.uint16))
    tifffile.imwrite(tmp_path / "labels.tif", (pixels > 1000).astype(np.uint8))
    return tmp_path / "image.tif"


@pytest.mark.slow
def test_json_is_the_record_and_the_cost_is_said_first(run, image):
    """stdout carries the record alone; stderr says what it will cost; a cause exits 1."""
    words = ("--scale", "zscore", "--tile", 32, "--halo-curve", "--format", "json")
    code, out, err = run("diagnose", ARCH, image, *words)
    record = DiagnosisRecord.from_json(json.loads(out))
    assert record.halo_curve.points[-1].max_sd < 1e-9 < record.halo_curve.points[0].max_sd
    assert dict(record.settings)["fix"].endswith("--scale zscore --to frozen -o fixed")
    assert code == 1
    assert [c.cause for c in record.culprits] == ["instance"]
    assert err.lstrip().startswith(f"{record.cost.windows} windows in {record.cost.experiments} experiments")


@pytest.mark.slow
def test_a_pipelines_own_faults_are_options(run, image):
    """Halo, scaling per tile and the last window are named with the network's own cause."""
    words = ("--halo", 1, "--last", "pushed back", "--scale-tiles", "zscore", "--context", "mirrored border")
    code, out, _ = run("diagnose", ARCH, image, "--scale", "none", "--tile", 30, *words, "--format", "json")
    causes = {c.cause for c in DiagnosisRecord.from_json(json.loads(out)).culprits}
    assert code == 1
    assert {"instance", "halo", "phase", "tile scaling", "border padding"} <= causes


@pytest.mark.slow
def test_reports_of_every_kind(run, image, tmp_path):
    """--report may be repeated; each ending gives its kind."""
    paths = [tmp_path / f"seams.{ending}" for ending in ("html", "json", "md", "xml")]
    flags = [word for path in paths for word in ("--report", path)]
    labels = ("--labels", image.with_name("labels.tif"), "--metric", "numpy:corrcoef_of_nothing")
    code, _, err = run("diagnose", ARCH, image, "--scale", "zscore", "--tile", 32, *flags, *labels)
    assert (code, "--metric" in err) == (2, True)
    assert not any(path.exists() for path in paths)
    run("diagnose", ARCH, image, "--scale", "zscore", "--tile", 32, *flags, *labels[:2])
    page, data, summary, cases = (path.read_text(encoding="utf-8") for path in paths)
    assert "original, untiled" in page
    assert json.loads(data)["status"] == "failed"
    assert summary.startswith("## normfix: failed")
    assert ET.fromstring(cases).find(".//failure") is not None
    for text in (page, data, summary, cases):
        assert all(word in text for word in ("NF557", "taken for regression"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [(("--tile", 32), 1), (("--tile", 128), 1), (("--tile", 32, "--threshold", 100), 1)],
    ids=["fails", "inconclusive", "no threshold excuses a leak"],
)
def test_check_is_a_gate_with_reports(run, image, tmp_path, words, code):
    """What is no pass exits 1, writes what CI reads, and prints the rule."""
    summary, cases, data = (tmp_path / f"check.{ending}" for ending in ("md", "xml", "json"))
    flags = ("--report", summary, "--report", cases, "--report", data)
    found, out, _ = run("check", ARCH, image, "--scale", "zscore", *words, *flags, "-v")
    assert found == code
    assert "4 n, at most 1e-3" in out
    verdict = Verdict.from_json(json.loads(data.read_text()))
    assert not verdict.passed
    assert summary.read_text().startswith(f"## normfix: {verdict.status}")
    tag = "failure" if verdict.status == "failed" else "error"
    assert ET.fromstring(cases.read_text()).find(f".//{tag}") is not None


@pytest.mark.parametrize("command", ["check", "diagnose"])
def test_a_report_that_cannot_be_is_refused_first(run, image, tmp_path, command):
    """An unknown ending or a file in place of the folder exits 2 before the network is opened."""
    for name, code in (("report.pdf", "NF610"), ("image.tif/report.md", "NF114")):
        found, out, err = run(command, "no.module:factory", image, "--report", tmp_path / name)
        assert (found, out) == (2, "")
        assert code in err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here in which nobody may make a file")
@pytest.mark.parametrize("command", ["check", "convert", "diagnose"])
@pytest.mark.parametrize("folder", ["/proc", "/proc/nowhere/deeper"])
def test_a_report_in_a_place_that_nobody_writes_to_is_refused_first(run, image, tmp_path, command, folder):
    """It was said when all was computed; control: a folder that is made then, and nothing left of trying."""
    words = (command, "no.module:factory", image, *(("-o", tmp_path / "out") if command == "convert" else ()))
    found, out, err = run(*words, "--report", f"{folder}/report.json")
    assert (found, out) == (2, "")
    assert "NF114" in err
    before = sorted(tmp_path.iterdir())
    assert "NF114" not in run(*words, "--report", tmp_path / "new" / "report.json").err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_several_images_have_one_code(run, image, tmp_path):
    """The worst image decides; labels belong to one, and each has a report of its own."""
    words = ("diagnose", ARCH, image, image, "--scale", "zscore", "--tile", 32)
    code, out, _ = run(*words, "-v", "--report", tmp_path / "r.md")
    assert code == 1
    assert out.count("tile against tile, beyond the halo") == 2
    told = [(tmp_path / name).read_text() for name in ("r-image.md", "r-image-2.md")]
    ready = f"normfix convert {ARCH} {image} --scale zscore --to frozen -o fixed"
    assert all(ready in text for text in (*told, out))
    assert run(*words, "--labels", image)[0] == 2
