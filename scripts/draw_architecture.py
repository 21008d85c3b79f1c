"""Draw the rooms of the package into README.md and docs/architecture.md, from the import contract and the code."""

import ast
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "architecture.md")
BEGIN, END = "<!-- rooms: scripts/draw_architecture.py -->\n", "<!-- end of rooms -->"


def floors() -> list[list[str]]:
    """Return the rooms, the uppermost first; those of one floor do not know of each other."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(
        c for c in settings["tool"]["importlinter"]["contracts"] if c["containers"] == ["normfix"]
    )
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


def idea(room: str) -> str:
    """Return the first sentence of a room's docstring, without its full stop."""
    folder = ROOT / "normfix" / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".")


def verbs() -> dict[str, list[str]]:
    """Return the functions that normfix shows, by room."""
    tree = ast.parse((ROOT / "normfix" / "__init__.py").read_text(encoding="utf-8"))
    (homes,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES"
    ]
    found: dict[str, list[str]] = {}
    for module, names in homes.items():
        found.setdefault(module.split(".")[1], []).extend(n for n in names if n[0].islower())
    return found


def picture() -> str:
    """Return the rooms as text, a line each: its name, its idea, and what of it is public."""
    lines, public = [], verbs()
    for floor in floors():
        for room in floor:
            if room == "__main__":
                continue
            shown = f"  [{', '.join(sorted(public[room]))}]" if public.get(room) else ""
            lines.append(f"{room:<14} {idea(room)}{shown}")
    return "```text\n" + "\n".join(lines) + "\n```\n"


def drawn(page: str) -> str:
    """Return a page's text with the picture of today between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError("the page has no marks for the picture")
    return before + BEGIN + "\n" + picture() + "\n" + END + after


def main() -> int:
    """Write the pages; with --check tell whether they are as they would be written."""
    stale = [
        page for page in PAGES if drawn(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")
    ]
    if "--check" in sys.argv:
        return len(stale)
    for page in stale:
        page.write_text(drawn(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
