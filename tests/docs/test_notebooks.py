"""The notebooks run, and the committed files are what such a run left."""

import ast
import copy
import json
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    """Return a notebook as the JSON it is."""
    return json.loads(path.read_text(encoding="utf-8"))


def sources(notebook: dict, kind: str) -> list[str]:
    """Return the text of the cells of one kind."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def execute(notebook: dict, name: str) -> None:
    """Run the code cells one after the other in one namespace, and draw every figure as a notebook would."""
    namespace = {"__name__": "__main__"}
    with matplotlib.rc_context():
        try:
            for number, source in enumerate(sources(notebook, "code"), start=1):
                exec(compile(source, f"{name}, cell {number}", "exec"), namespace)
            for number in plt.get_fignums():
                plt.figure(number).canvas.draw()
        finally:
            plt.close("all")


def faults(notebook: dict) -> list[str]:
    """Name what a file has that no clean run from top to bottom leaves."""
    found = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        if cell["execution_count"] != number:
            found.append(f"cell {number} was not run, or not in this order")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"cell {number} failed")
            if output.get("name") == "stderr":
                found.append(f"cell {number} warned")
            if re.search(r"/(home|root|tmp|Users|work)/", json.dumps(output.get("text", ""))):
                found.append(f"cell {number} shows a path of the machine it ran on")
    return found


def figures(notebook: dict) -> int:
    """Count the pictures among the outputs."""
    outputs = (out for cell in notebook["cells"] for out in cell.get("outputs", ()))
    return sum("image/png" in out.get("data", {}) for out in outputs)


def test_all_are_here():
    """There are the four notebooks that the table of the folder names."""
    named = re.findall(r"^\| \[(.*?\.ipynb)\]", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [path.name for path in NOTEBOOKS] == named
    assert len(named) == 4


@pytest.mark.zoo  # what they show, pages of docs/ show as well
@each
def test_runs(path, tmp_path, monkeypatch):
    """Every cell runs without a warning, so every assertion in it holds, and every figure can be drawn."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    execute(read(path), path.name)
    assert not list(tmp_path.iterdir()), "a notebook leaves nothing beside itself"


@each
def test_was_run_before_it_was_committed(path):
    """The file is small and holds the outputs of one clean run from top to bottom."""
    assert faults(read(path)) == []
    assert path.stat().st_size < LARGEST


@each
def test_shows_and_asserts(path):
    """A notebook has figures, and claims that its own cells assert."""
    notebook = read(path)
    asserted = [
        node
        for source in sources(notebook, "code")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert)
    ]
    assert figures(notebook) >= 1
    assert len(asserted) >= 8


@each
def test_links_lead_somewhere(path):
    """Links to other files lead to files."""
    links = [
        link
        for text in sources(read(path), "markdown")
        for link in re.findall(r"\]\(([^):#]+)[^):]*\)", text)
    ]
    assert links
    assert all((FOLDER / link).is_file() for link in links)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"execution_count": None}, "was not run"),
        ({"execution_count": 7}, "was not run"),
        ({"outputs": [{"output_type": "error", "ename": "AssertionError"}]}, "failed"),
        ({"outputs": [{"output_type": "stream", "name": "stderr", "text": ["careful"]}]}, "warned"),
        ({"outputs": [{"output_type": "stream", "name": "stdout", "text": ["/home/me"]}]}, "path"),
    ],
)
def test_a_file_that_was_not_run_cleanly_is_noticed(change, fault):
    """A cell that was not run, failed, warned or shows a path is named."""
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    first |= change
    assert [text for text in faults(notebook) if text.startswith("cell 1 ") and fault in text]


def test_a_claim_that_does_not_hold_is_noticed():
    """An assertion in the last cell stops the run."""
    cells = [{"cell_type": "code", "source": [text]} for text in ("x = 1\n", "assert x == 2\n")]
    with pytest.raises(AssertionError):
        execute({"cells": cells}, "made up")
