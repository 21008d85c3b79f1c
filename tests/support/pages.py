"""Pages of this repository, and the code that they show."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def shown(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return the fenced code blocks of some languages in their order: language and text."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of one language."""
    return [text for _, text in shown(page, language)]
