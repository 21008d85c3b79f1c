"""The house is as docs/architecture.md draws it: contracts that can break, pictures from the code, tests in rooms."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from normfix.errors import CODES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "normfix"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
(FLOORS,) = [c["layers"] for c in SETTINGS["contracts"] if c.get("containers") == ["normfix"]]
(ROOMS,) = [c["name"] for c in SETTINGS["contracts"] if c.get("containers") == ["normfix"]]
RANK = {room.strip(): number for number, floor in enumerate(FLOORS) for room in floor.split("|")}
DATA = {
    # what files may name is data of the loaders, and what stands there is above them
    ("storage", "normfix.demo.network"),
}


def modules(folder: Path = PACKAGE) -> dict[Path, ast.Module]:
    """Return the modules of the package, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")}


def room_of(path: Path, folder: Path = PACKAGE) -> str:
    """Return the room that a module stands in."""
    return path.relative_to(folder).with_suffix("").parts[0]


def rooms_named_above(folder: Path) -> set[tuple[str, str]]:
    """Return (room, text) of each string that names a room above the one it stands in."""
    found = set()
    for path, tree in modules(folder).items():
        room = room_of(path, folder)
        if room not in RANK:
            continue
        docs = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                for name in re.findall(r"\bnormfix(?:\.[a-z_]\w*)+", node.value):
                    if RANK.get(name.split(".")[1], 99) < RANK[room]:
                        found.add((room, name))
    return found


def _has_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    )


def test_no_loose_module():
    """Beside the rooms there are the errors, the entry points and the plugin alone."""
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "__main__", "errors", "pytest_plugin"}


@pytest.mark.slow
def test_no_string_names_a_room_above():
    """What an import may not reach, a string does not either, but for names that files may hold."""
    named = rooms_named_above(PACKAGE)
    assert {
        (room, name) for room, name in named if not any(room == r and name.startswith(n) for r, n in DATA)
    } == set()


def test_a_string_that_names_a_room_above_is_found(tmp_path):
    """Negative control: a planted string is seen."""
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "planted.py").write_text('HOME = "normfix.storage.saving"\n')
    assert rooms_named_above(tmp_path) == {("records", "normfix.storage.saving")}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the package and its settings, to plant violations in."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(PACKAGE, folder / "normfix", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def broken(folder: Path) -> set[str]:
    """Return the names of the contracts that do not hold in a folder."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as c; c()",
        "--no-cache",
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
    )
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return set(re.findall(r"^(.*?) BROKEN$", done.stdout, re.MULTILINE))


def _lowest(contract: dict) -> tuple[str, str]:
    """Return a module on the lowest floor of a contract, and one above it."""
    (container,) = contract["containers"]
    upper, lower = (re.split(r"[|:]", contract["layers"][i])[0].strip() for i in (0, -1))
    return f"{container}.{lower}", f"{container}.{upper}"


def plants() -> dict[str, list[tuple[str, str]]]:
    """Return for each contract the imports (into, of) of which each must break it."""
    found = {}
    for contract in SETTINGS["contracts"]:
        if contract["type"] == "layers":
            lower, upper = _lowest(contract)
            found[contract["name"]] = [(lower, "normfix.cli" if upper.endswith("__main__") else upper)]
        else:
            found[contract["name"]] = [
                (module, contract["forbidden_modules"][0].replace("normfix.__main__", "normfix.records"))
                for module in contract["source_modules"]
            ]
    return found


def file_of(folder: Path, module: str) -> Path:
    """Return a module's file."""
    place = folder.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@pytest.mark.slow
def test_the_contracts_hold(copied):
    """As it is, none is broken."""
    assert broken(copied) == set()


def _planted(folder: Path, pairs: list[tuple[str, str]]) -> set[str]:
    """Return which contracts break with these imports planted."""
    kept = {}
    for into, of in pairs:
        path = file_of(folder, into)
        text = path.read_text(encoding="utf-8")
        kept.setdefault(path, text)
        path.write_text(f"{text}\nimport {of}\n", encoding="utf-8")
    try:
        return broken(folder)
    finally:
        for path, text in kept.items():
            path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_a_planted_import_breaks_each_contract(copied):
    """One import against the order in each room breaks the contract of that room.

    They do not help each other: from a room below no import leads up again, and from a room above none leads back.
    """
    inner = {name: pairs for name, pairs in plants().items() if name != ROOMS}
    assert _planted(copied, [pair for pairs in inner.values() for pair in pairs]) == inner.keys()


@pytest.mark.slow
def test_an_import_of_a_room_above_breaks_the_order_of_the_rooms(copied):
    """The lowest room that imports the uppermost is found, whatever else breaks by it."""
    assert ROOMS in _planted(copied, plants()[ROOMS])


def test_every_room_has_a_place_in_the_contract():
    """No folder of the package stands outside of the order, and every room with several modules has an inner one."""
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms <= RANK.keys()
    ordered = {c["containers"][0] for c in SETTINGS["contracts"] if c["type"] == "layers"}
    assert {f"normfix.{room}" for room in rooms - {"demo", "integrations"}} <= ordered


def test_the_pictures_are_drawn_from_the_code():
    """README and docs show the rooms as they are."""
    script = ROOT / "scripts" / "draw_architecture.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


@pytest.mark.slow
def test_no_test_imports_a_test_and_no_script_does():
    """What several of them need stands in tests/support."""
    files = [
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    imported = {
        (path.name, name)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported(node)
        if name.rpartition(".")[2].startswith("test_")
    }
    assert imported == set()


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_every_test_stands_in_a_room():
    """A folder of tests bears the name of a room, or says what else it is for."""
    others = {"support", "zoo", "docs", "benchmarks", "__pycache__"}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} <= RANK.keys() | others


def test_every_code_occurs_in_a_test():
    """No error can lose its meaning unseen."""
    texts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert {code for code in CODES if code not in texts} == set()
