"""Print the lower bounds of pyproject.toml as pip's constraints: the oldest releases that are claimed, hence tested."""

import itertools
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_BOUND = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>[\w.]+)(?P<marker> *;.*)?")


def requirements(text: str) -> list[str]:
    """Return what a pyproject.toml requires, with all its extras; its own extras are none."""
    project = tomllib.loads(text)["project"]
    every = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    return sorted({requirement for requirement in every if not requirement.startswith(f"{project['name']}[")})


def floor(text: str) -> list[str]:
    """Return a constraint for each requirement of a pyproject.toml: its lower bound, exactly.

    Raises:
        ValueError: a requirement has no lower bound, or more than that.
    """
    constraints = []
    for requirement in requirements(text):
        bound = _BOUND.fullmatch(requirement)
        if bound is None:
            raise ValueError(f"{requirement!r} is no lower bound that could be tested")
        constraints.append(f"{bound['name']}=={bound['version']}{bound['marker'] or ''}")
    return constraints


if __name__ == "__main__":
    print("\n".join(floor(PYPROJECT.read_text(encoding="utf-8"))))
