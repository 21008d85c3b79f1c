"""Write the JSON Schemas: docs/json.md, of what each command prints, and those of reports, which are shipped."""

import json
from pathlib import Path

from normfix.cli.answers import RECORDS
from normfix.records.schema import schema_of
from normfix.reporting import schema as reports

ROOT = Path(__file__).parents[1]

HEAD = """# JSON of the commands

`--format json` prints one record on stdout, the same that the Python function returns (`.to_json()`). Nothing else is
printed there; notes and progress go to stderr. `check`, `predict` and `diagnose` of several images print one record
after another. Plans and saved folders carry a `schema` number; a newer one than this normfix knows is refused (NF108).
The schemas are JSON Schema, written by scripts/write_schemas.py from the records.
"""

sections = [
    f"\n## normfix {command}\n\n```json\n{json.dumps(schema_of(kind), separators=(',', ':'))}\n```\n"
    for command, kind in RECORDS.items()
]
(ROOT / "docs" / "json.md").write_text(HEAD + "".join(sections), encoding="utf-8")
for name in reports.SCHEMAS:
    text = json.dumps(reports.schema_of(name), indent=2) + "\n"
    (ROOT / "normfix" / "reporting" / "schemas" / f"{name}.schema.json").write_text(text, encoding="utf-8")
