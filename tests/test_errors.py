"""Errors carry a code that normfix can explain, and survive the trip between processes."""

import pickle
import re
from pathlib import Path

import click
import pytest

import normfix
from normfix.cli import _complain
from normfix.cli.showing import note, show
from normfix.errors import CODES, NormfixError
from normfix.records.encoding import Record
from normfix.tiling.stages.refusals import NotInStages

_CODE = re.compile(r"\bNF\d{3}\b")


def used_codes(folder: Path) -> set[str]:
    """Return the codes that the source names, errors.py and docstrings' invented ones apart."""
    files = (path for path in folder.rglob("*.py") if path.name != "errors.py")
    return {code for path in files for code in re.findall(r'"(NF\d{3})"', path.read_text(encoding="utf-8"))}


def source() -> Path:
    """Return the folder of the package."""
    return Path(normfix.__file__).parent


def test_every_code_used_is_explained():
    """No module raises or reports a code that `normfix explain` does not know."""
    assert used_codes(source()) <= CODES.keys()


def test_every_code_explained_is_used():
    """No explanation is left over from an error that no longer exists."""
    assert CODES.keys() <= used_codes(source())


def test_the_search_for_codes_finds_an_invented_one(tmp_path):
    """Negative control: a module with an unknown code is noticed."""
    (tmp_path / "module.py").write_text('raise NormfixError("NF999", "invented")')
    assert used_codes(tmp_path) - CODES.keys() == {"NF999"}


def test_codes_named_in_docstrings_exist():
    """Docstrings promise only codes that exist."""
    named = {code for path in source().rglob("*.py") for code in _CODE.findall(path.read_text("utf-8"))}
    assert named <= CODES.keys()


def test_an_unknown_code_cannot_be_raised():
    """An error without an explanation cannot even be constructed."""
    with pytest.raises(KeyError, match="NF999"):
        NormfixError("NF999", "no such thing")


def test_the_text_is_code_place_and_message():
    """What is printed is one paragraph: code, place, message."""
    assert (
        str(NormfixError("NF203", "It is live.", where="encoder.2.bn")) == "NF203 encoder.2.bn: It is live."
    )


def test_the_text_without_a_place_has_no_colon():
    """Without a place there is no empty one."""
    assert str(NormfixError("NF203", "It is live.")) == "NF203 It is live."


def test_an_error_survives_pickling():
    """Code, place and message come out of a worker process as they went in."""
    error = pickle.loads(pickle.dumps(NormfixError("NF203", "It is live.", where="bn")))
    assert (error.code, error.where, error.message) == ("NF203", "bn", "It is live.")


def test_what_is_caught_by_its_class_keeps_it(tmp_path):
    """A worker's error that a caller catches by its class is one of that class here, too."""
    error = pickle.loads(pickle.dumps(NotInStages("NF325", "It differs.", where="block")))
    assert (type(error), error.code) == (NotInStages, "NF325")


def test_a_message_ends_where_a_terminal_does():
    """A megabyte that a file says is cut in the middle, so that what to do next is still there."""
    text = str(NormfixError("NF101", f"the name {'x' * 10**6} is none. Give another.", where="a.json"))
    assert len(text) < 30_000
    assert text.startswith("NF101 a.json: the name xxx")
    assert text.endswith("Give another.")


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_explanation_is_made_of_sentences(code):
    """Every explanation says something and ends in a full stop."""
    assert len(CODES[code]) > 40
    assert CODES[code].endswith(".")


@pytest.mark.parametrize("shows", ["note", "show", "complaint"])
def test_names_in_files_do_not_steer_a_terminal(capsys, shows):
    """Whatever a file calls its sites, what is printed of it is characters and lines."""
    text = "site \x1b]0;title\x07\x9b2J\u202e\ud800\nnext"
    if shows == "note":
        note(text)
    elif shows == "complaint":
        _complain(text)
    else:
        with click.Context(click.Command("test")):
            show(Record(), text, "text")
    streams = capsys.readouterr()
    assert (streams.out + streams.err).splitlines() == [
        r"site \x1b]0;title\x07\x9b2J\u202e\ud800",
        "next",
    ]
