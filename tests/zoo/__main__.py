"""Run the zoo and write its page: `python -m tests.zoo --results results.jsonl`, from the root; resumable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import click

from .catalogue import ENTRIES
from .running import done_before, missing, run_all
from .table import page


@click.command()
@click.option("--results", type=click.Path(path_type=Path), required=True, help="JSON lines, appended to.")
@click.option("--only", default="*", help="Shell-style pattern of names.")
@click.option("--jobs", default=1, show_default=True, help="Processes at a time.")
@click.option("--limit", default=180, show_default=True, help="Seconds of processor time per network.")
@click.option("--again", default="", help="Outcomes, with commas: networks that ended so run again.")
@click.option("--page", "target", type=click.Path(path_type=Path), help="Write the table here: docs/zoo.md.")
def main(results: Path, only: str, jobs: int, limit: int, again: str, target: Path | None) -> None:
    rows = done_before(results)
    absent = sorted({entry.library for entry in ENTRIES if missing(entry)})
    for library in absent:
        click.echo(f"skipped: {library} is not installed", err=True)
    due = [
        entry
        for entry in ENTRIES
        if entry.library not in absent
        and fnmatch(entry.name, only)
        and (entry.name not in rows or rows[entry.name]["category"] in again.split(","))
    ]

    def work(part: int) -> None:
        for row in run_all(due[part::jobs], results, limit):
            cause = str(row.get("cause", ""))[:200]
            click.echo(f"{row['name']}: {row['category']}, {row['seconds']} s. {cause}", err=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(jobs)))
    if target is not None:
        known = {entry.name for entry in ENTRIES}
        rows = done_before(results)
        target.write_text(page([row for name, row in rows.items() if name in known], known), encoding="utf-8")


if __name__ == "__main__":
    main()
