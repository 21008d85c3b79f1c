"""Values of a section change, and every other line of the file stays."""

import time

import pytest
import yaml

from normfix.giving.configs import set_in


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("model:\n  order: gcr # why\n  n: 1\n", "model:\n  order: bcr # why\n  n: 1\n"),
        ("other:\n  order: gcr\nmodel:\n  order: gcr\n", "other:\n  order: gcr\nmodel:\n  order: bcr\n"),
        ("model:\n    n: 1\n", "model:\n    order: bcr\n    n: 1\n"),
    ],
    ids=["with a comment", "in its section alone", "put in"],
)
def test_one_line_of_yaml_changes(tmp_path, text, wanted):
    """The line is changed where it stands, or put in at the head of its section."""
    path = tmp_path / "config.yml"
    path.write_text(text)
    set_in(path, "model", {"order": "bcr"})
    assert path.read_text() == wanted


def test_yaml_of_another_layout_is_laid_out_anew(tmp_path):
    """Where no line can be changed, the values are right all the same."""
    path = tmp_path / "config.yml"
    path.write_text("model: {order: gcr, n: 1}\n")
    set_in(path, "model", {"order": "bcr"})
    assert yaml.safe_load(path.read_text()) == {"model": {"order": "bcr", "n": 1}}


@pytest.mark.parametrize("indent", ["  ", "    ", "\t"])
def test_json_keeps_its_indentation(tmp_path, indent):
    """JSON is indented as it was."""
    path = tmp_path / "config.json"
    path.write_text(f'{{\n{indent}"model": {{\n{indent * 2}"order": "gcr"\n{indent}}}\n}}\n')
    set_in(path, "model", {"order": "bcr"})
    assert path.read_text() == f'{{\n{indent}"model": {{\n{indent * 2}"order": "bcr"\n{indent}}}\n}}\n'


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 20_000 + "model:\n  order: gcr\n",
        "a:\n  order: x " + " " * 20_000 + "y\nmodel:\n  order: gcr\n",
        "a:\n  - " + "order: 1\n  - " * 200 + "b\nmodel:\n  order: gcr\n",
    ],
    ids=["empty lines", "spaces", "many of the name"],
)
def test_a_long_file_takes_a_time_in_proportion(tmp_path, text):
    """No pattern tries each pair of places: minutes for 100 kB, once."""
    path = tmp_path / "config.yml"
    path.write_text(text)
    before = time.process_time()
    set_in(path, "model", {"order": "bcr"})
    assert time.process_time() - before < 10
    assert path.read_text() == text.replace("order: gcr", "order: bcr")
