"""Write docs/json.md: the JSON Schema of what each command prints with --format json."""

import json
from pathlib import Path

from normfix.cli.answers import RECORDS
from normfix.records.schema import schema_of

ROOT = Path(__file__).parents[1]

HEAD = """# JSON of the commands

`--format json` prints one record on stdout, the same that the Python function returns (`.to_json()`). Nothing else is
printed there; notes and progress go to stderr. Plans and saved folders carry a `schema` number; a newer one than this
normfix knows is refused (NF108). The schemas are JSON Schema, written by scripts/write_schemas.py from the records.
"""

sections = [
    f"\n## normfix {command}\n\n```json\n{json.dumps(schema_of(kind), separators=(',', ':'))}\n```\n"
    for command, kind in RECORDS.items()
]
(ROOT / "docs" / "json.md").write_text(HEAD + "".join(sections), encoding="utf-8")
