"""On a terminal, bars are drawn below what is shown, and move while one step takes long."""

import os
import re
import sys
import textwrap

import pytest
from commands import on_terminal

from normfix import NormfixError
from normfix.cli.showing import write_report
from normfix.records.diagnoses import Cost

pytest.importorskip("pty")
pytestmark = pytest.mark.slow


def typed(script: str) -> str:
    """Run a script on a terminal of 80 columns and return all that it wrote there."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "COLUMNS": "80", "LINES": "40", "NO_COLOR": "1"}
    return on_terminal(command, environment, "stdout", "stderr").decode()


def screen(text: str) -> list[str]:
    """Return the lines that a terminal shows in the end: of its controls those that bars use."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b"):
            count = int(re.sub(r"\D", "", part) or 1)
            row = max(0, row - count) if part.endswith("A") else row
            lines[row] = "" if part.endswith("K") else lines[row]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


SCRIPT = """
    import time, click
    from normfix.cli.showing import note, steps
    say = {say}
    with steps() as report:
        report("prove", 0, 1)
        time.sleep(0.3)
        say("first\\nsecond\\nthird")
        time.sleep(0.3)
        report("save", 0, 1)
        say("fourth")
        time.sleep(0.3)
"""


def test_nothing_that_was_said_is_drawn_over():
    """All lines stand in their order when the bars are gone, and no bar is left."""
    assert screen(typed(SCRIPT.format(say="note"))) == ["first", "second", "third", "fourth"]


def test_printing_past_the_bars_would_lose_lines():
    """Negative control: the same lines, printed without taking the bars away, do not stand alone in the end."""
    assert screen(typed(SCRIPT.format(say="click.echo"))) != ["first", "second", "third", "fourth"]


def test_a_bar_moves_within_a_step():
    """While one step takes long, what is drawn changes several times."""
    script = """
        import time
        from normfix.cli.showing import steps
        with steps() as report:
            report("prove", 0, 1)
            time.sleep(1.5)
    """
    assert len(set(re.findall(r"[^\x1b\r\n]*prove[^\r\n]*", typed(script)))) > 3


@pytest.mark.parametrize("width", [60, 132])
def test_text_fits_the_terminal(width):
    """Results are wrapped to its columns, indented, and words that are longer stay whole."""
    script = f"""
        import os
        os.environ["COLUMNS"] = "{width}"
        from normfix.cli.columns import columns, fitted
        assert columns() == {width}
        print(fitted("  " + "word " * 60 + "\\n" + "x" * 200))
    """
    lines = typed(script).splitlines()
    assert all(len(line) <= width for line in lines[:-1])
    assert len(lines[-1]) == 200
    assert [line.startswith(" " * 4) for line in lines[:2]] == [False, True]


def test_a_report_that_took_longer_is_the_same_report(tmp_path):
    """A repeated command finds its own report, whatever its clock said; of another image it is refused."""
    path = tmp_path / "cost.json"
    write_report(str(path), Cost(windows=20, experiments=4, wholes=3, seconds=0.25))
    written = path.read_bytes()
    write_report(str(path), Cost(windows=20, experiments=4, wholes=3, seconds=1e-05))
    assert path.read_bytes() == written
    with pytest.raises(NormfixError, match="NF114"):
        write_report(str(path), Cost(windows=21, experiments=4, wholes=3, seconds=0.25))
