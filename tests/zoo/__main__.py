"""Run the zoo and write its page, from the root; resumable.

python -m tests.zoo --results results.jsonl --page docs/zoo.md      every network, scanned, converted and proved: hours
python -m tests.zoo --geometry geometry.jsonl --page docs/zoo.md    geometry alone, put into the page that is there
python -m tests.zoo --wholes wholes.jsonl --page docs/zoo.md        whole images of networks as they are, likewise
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import click

from .catalogue import ENTRIES
from .columns import live_names, local_names, with_geometry
from .examining import examine
from .geometry import examine_geometry
from .running import MEMORY, done_before, missing, run_all
from .table import page
from .whole_table import with_wholes
from .wholes import examine_whole

PAGE = Path("docs/zoo.md")


@click.command()
@click.option("--results", type=click.Path(path_type=Path), help="JSON lines, appended to.")
@click.option(
    "--geometry",
    type=click.Path(path_type=Path),
    help="JSON lines of a run that looks at the geometry alone, of networks that docs/zoo.md calls converted or local.",
)
@click.option(
    "--wholes",
    type=click.Path(path_type=Path),
    help="JSON lines of a run over whole images, of networks that docs/zoo.md calls converted or refused.",
)
@click.option("--only", default="*", help="Shell-style pattern of names.")
@click.option("--jobs", default=1, show_default=True, help="Processes at a time.")
@click.option("--limit", default=180, show_default=True, help="Seconds of processor time per network.")
@click.option("--memory", default=MEMORY, show_default=True, help="GiB per process.")
@click.option("--again", default="", help="Outcomes, with commas: networks that ended so run again.")
@click.option("--page", "target", type=click.Path(path_type=Path), help="Write the table here: docs/zoo.md.")
def main(
    results: Path | None,
    geometry: Path | None,
    wholes: Path | None,
    only: str,
    jobs: int,
    limit: int,
    memory: int,
    again: str,
    target: Path | None,
) -> None:
    given = [path for path in (results, geometry, wholes) if path is not None]
    if len(given) != 1:
        raise click.UsageError("Give one of --results, --geometry and --wholes.")
    (lines,) = given
    rows = done_before(lines)
    absent = sorted({entry.library for entry in ENTRIES if missing(entry)})
    for library in absent:
        click.echo(f"skipped: {library} is not installed", err=True)
    known, there = {entry.name for entry in ENTRIES}, PAGE.read_text(encoding="utf-8")
    if results:
        asked, examination = known, examine
    elif geometry:
        asked, examination = local_names(there), examine_geometry
    else:
        asked, examination = live_names(there), examine_whole
    due = [
        entry
        for entry in ENTRIES
        if entry.name in asked
        and entry.library not in absent
        and fnmatch(entry.name, only)
        and (entry.name not in rows or rows[entry.name]["category"] in again.split(","))
    ]

    def work(part: int) -> None:
        for row in run_all(due[part::jobs], lines, limit, memory=memory, examination=examination):
            cause = str(row.get("cause", ""))[:200]
            click.echo(f"{row['name']}: {row['category']}, {row['seconds']} s. {cause}", err=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(jobs)))
    if target is None:
        return
    rows = {name: row for name, row in done_before(lines).items() if name in known}
    if results:
        text = page(rows.values(), known)
    elif geometry:
        text = with_geometry(target.read_text(encoding="utf-8"), rows)
    else:
        text = with_wholes(target.read_text(encoding="utf-8"), rows.values())
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
