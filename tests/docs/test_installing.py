"""Which releases are claimed is which are tested; installing moves nobody's torch."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from pages import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FLOOR = (ROOT / ".ci" / "floor").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
OTHERS = ("nnunetv2", "careamics", "tiatoolbox", "monai")


def _script():
    spec = importlib.util.spec_from_file_location("floor", ROOT / "scripts" / "floor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def _workflow():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"][
        "tests"
    ]


def test_each_lower_bound_is_what_ci_installs():
    """The floor is every requirement's lower bound, no less and no more."""
    required = SCRIPT.requirements(PYPROJECT)
    constraints = SCRIPT.floor(PYPROJECT)
    assert [c.replace("==", ">=", 1) for c in constraints] == required
    assert {"torch==2.6", "numpy==1.26"} <= set(constraints)
    assert 'python scripts/floor.py > "$constraints"' in FLOOR
    assert 'pip install -q -e ".[test]" -c "$constraints"' in FLOOR


@pytest.mark.parametrize(
    "requirement", ["torch", "torch<3", "torch>=2.6,<2.9", "torch==2.6", "torch>=2.6,!=2.9.*"]
)
def test_what_is_no_lower_bound_is_not_taken_for_one(requirement):
    """A requirement without a lower bound, or with more, fails rather than being left untested."""
    text = f'[project]\nname = "normfix"\ndependencies = ["{requirement}"]\noptional-dependencies = {{}}\n'
    with pytest.raises(ValueError, match="no lower bound"):
        SCRIPT.floor(text)


def test_the_oldest_python_is_the_same_everywhere():
    """pyproject.toml, the linter, the guide and the workflow name one oldest Python."""
    (oldest,) = re.findall(r'requires-python = ">=(3\.\d+)"', PYPROJECT)
    assert f'target-version = "py{oldest.replace(".", "")}"' in PYPROJECT
    (floor,) = [i for i in _workflow()["strategy"]["matrix"]["include"] if i["releases"] == "floor"]
    assert floor["python"] == oldest
    assert f"Python {oldest}" in GUIDE


def test_the_floor_runs_the_fast_tests():
    """What is installed from the constraints runs what starts nothing."""
    assert re.search(r'pytest .*-m "not slow and not zoo and not cuda"$', FLOOR, re.MULTILINE)


def test_the_workflow_runs_what_ci_runs():
    """Three systems, the floor and the newest; its commands are the README's and .ci/floor."""
    job = _workflow()
    matrix = job["strategy"]["matrix"]
    assert matrix["system"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert matrix["releases"] == ["floor", "newest"]
    assert job["runs-on"] == "${{ matrix.system }}"
    commands = {step["if"]: step["run"] for step in job["steps"] if "run" in step}
    readme = re.findall(
        r"^pip install .*pytest$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert commands == {
        "matrix.releases == 'floor'": "bash .ci/floor",
        "matrix.releases == 'newest'": readme[0],
    }


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    """A pip that resolves from metadata alone; earlier ones download every wheel to look inside."""
    home = tmp_path_factory.mktemp("pip")
    command = [sys.executable, "-m", "pip"]
    got = subprocess.run(
        [*command, "install", "-q", "--target", str(home), "pip>=25"], capture_output=True, text=True
    )
    if got.returncode:
        pytest.skip(f"no package index is reachable: {got.stderr[-200:]}")

    def resolve(*words):
        """Return what would be installed into an empty environment: version by name; None if nothing fits."""
        report = home / "report.json"
        report.unlink(missing_ok=True)
        done = subprocess.run(
            [*command, "install", "--dry-run", "--ignore-installed", "-q", "--report", str(report), *words],
            env={**os.environ, "PYTHONPATH": str(home)},
            capture_output=True,
            text=True,
        )
        if not report.exists():
            assert "ResolutionImpossible" in done.stderr or "conflict" in done.stderr, done.stderr
            return None
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
        return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in found}

    return resolve


def _core():
    """Return normfix's own requirements, without extras."""
    block = re.search(r"^dependencies = \[$(.*?)^\]$", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r'^  "(.*?)"', block, re.MULTILINE)


@pytest.mark.zoo
@pytest.mark.parametrize("other", OTHERS)
def test_installing_beside_another_tool_moves_nothing_of_it(pip, tmp_path, other):
    """In an environment with the newest of the tool alone, the core needs no other torch, numpy or anything."""
    theirs = pip(other)
    kept = tmp_path / "kept.txt"
    kept.write_text("".join(f"{name}=={version}\n" for name, version in theirs.items()), encoding="utf-8")
    ours = pip(*_core(), "-c", str(kept))
    assert ours is not None
    assert {name: ours[name] for name in ("torch", "numpy")} == {n: theirs[n] for n in ("torch", "numpy")}


@pytest.mark.slow
def test_a_torch_that_is_too_old_is_seen(pip, tmp_path):
    """The check above fails where the environment holds a torch below the floor."""
    (tmp_path / "kept.txt").write_text("torch==2.5.1\n", encoding="utf-8")
    assert pip(*_core(), "-c", str(tmp_path / "kept.txt")) is None
