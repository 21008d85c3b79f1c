"""The pages of tasks and of JSON schemas are true, also where they need a library that CI lacks."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from nnunet import nnunet_folder

import normfix
from normfix.cli import cli
from normfix.cli.answers import RECORDS
from normfix.records.schema import schema_of
from normfix.records.sites import Scan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    """Return a page's text."""
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # of nnU-Net's own
def test_the_nnunet_block_runs(tmp_path, monkeypatch):
    """The block for nnU-Net runs on a model folder as nnU-Net writes it."""
    (tmp_path / "nnunet_model").mkdir()
    nnunet_folder(tmp_path / "nnunet_model")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```py\n(.*?)^```$", page("tasks.md"), re.MULTILINE | re.DOTALL)
    names = {"normfix": normfix, "image": torch.randn(1, 1, 64, 64)}
    exec(compile(block, "tasks.md", "exec"), names)
    assert names["done"].proof.passed


def test_the_settings_shown_are_accepted(tmp_path, monkeypatch, capsys):
    """The table on the page is read, and each of its settings counts."""
    (block,) = re.findall(r"^```toml\n(.*?)^```$", page("tasks.md"), re.MULTILINE | re.DOTALL)
    assert tomllib.loads(block)
    (tmp_path / "pyproject.toml").write_text(block)
    monkeypatch.chdir(tmp_path)
    cli.main(["--show-settings"], standalone_mode=False)
    out = capsys.readouterr().out
    assert all(
        text in out for text in ("convert --to frozen", "check --tile 512", "predict --scale percentile")
    )


def test_every_command_has_a_schema():
    """Each command that has --format json is on the page."""
    with_json = {n for n, c in cli.commands.items() if any(p.name == "format_" for p in c.params)}
    assert with_json == set(RECORDS) == set(cli.commands)


@pytest.mark.parametrize("command", RECORDS)
def test_the_schema_is_that_of_the_record(command):
    """The schema on the page is the one the annotations give: rewrite it with scripts/write_schemas.py."""
    found = dict(
        re.findall(
            r"^## normfix ([\w-]+)\n.*?^```json\n(.*?)^```$", page("json.md"), re.MULTILINE | re.DOTALL
        )
    )
    assert json.loads(found[command]) == schema_of(RECORDS[command])


def test_a_record_has_what_its_schema_requires():
    """A real scan's JSON has exactly the properties of its schema, at the top and in its first site."""
    found = normfix.scan(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.InstanceNorm2d(2)))
    defs, data = schema_of(Scan)["$defs"], found.to_json()
    assert set(data) == set(defs["Scan"]["properties"]) == set(defs["Scan"]["required"])
    assert set(data["sites"][0]) == set(defs["Site"]["properties"])
