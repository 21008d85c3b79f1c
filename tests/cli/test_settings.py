"""pyproject.toml gives options their defaults, and decides nothing that runs or writes."""

import sys
from pathlib import Path

import click
import numpy as np
import pytest

from normfix.cli import cli, main
from normfix.cli.settings import NEVER, read_settings
from normfix.errors import NormfixError

OPTIONS = {"check": {"tile", "scale", "format_", "arch", "trust_pickle"}, "scan": {"format_"}}
REAL = {
    name: {option.name for option in cli.commands[name].params} for name in ("convert", "demo", "give-back")
}


def written(folder, text):
    """Write a pyproject.toml."""
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_common_and_own_options_are_merged(tmp_path):
    """A command takes the options it has from the table, and those of its own table before them."""
    written(tmp_path, '[tool.normfix]\nformat = "json"\ntile = 512\n[tool.normfix.check]\ntile = 64\n')
    found = read_settings(tmp_path, OPTIONS)
    assert found.commands == {"check": {"format_": "json", "tile": 64}, "scan": {"format_": "json"}}


def test_the_nearest_file_above_counts(tmp_path):
    """A folder below the project's uses the project's settings."""
    written(tmp_path, "[tool.normfix]\ntile = 512\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert read_settings(tmp_path / "a" / "b", OPTIONS).path == tmp_path / "pyproject.toml"


@pytest.mark.parametrize("text", ["", "[project]\nname = 'x'\n", "tool = 3\n"])
def test_a_project_without_the_table_sets_nothing(tmp_path, text):
    """Other projects' files are no business of ours."""
    assert read_settings(written(tmp_path, text), OPTIONS).commands == {}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[tool.normfix", "NF130"),
        ("[tool]\nnormfix = 3\n", "NF131"),
        ("[tool.normfix]\ntiel = 3\n", "NF131"),
        ("[tool.normfix.chek]\ntile = 3\n", "NF131"),
        ("[tool.normfix.scan]\ntile = 3\n", "NF131"),
        ("[tool.normfix]\ntrust-pickle = true\n", "NF131"),
        ("[tool.normfix.check]\narch = 'os:system'\n", "NF131"),
        ("[tool.normfix]\nreport = '/tmp/x.json'\n", "NF131"),
        ("[tool.normfix.convert]\ngive-back = '/tmp/x'\n", "NF131"),
        ("[tool.normfix.demo]\nimage = '/tmp/x.png'\n", "NF131"),
        ("[tool.normfix.give-back]\nswitches = ['checkpoint_path=/tmp/x']\n", "NF131"),
    ],
)
def test_what_no_file_may_set_is_refused(tmp_path, text, code):
    """Broken files, unknown names, and options that run code or write are refused with the file's name."""
    with pytest.raises(NormfixError, match=code) as caught:
        read_settings(written(tmp_path, text), OPTIONS | REAL)
    assert "pyproject.toml" in str(caught.value)


@pytest.mark.parametrize("text", ["{} = 1", "a = {{ {} = 1 }}"], ids=["key", "inline"])
def test_names_of_countless_parts_do_not_take_the_machine(tmp_path, monkeypatch, text):
    """What took two gigabytes for 40 kB ends early."""
    monkeypatch.setattr("normfix.cli.settings._SECONDS", 0.1)
    with pytest.raises(NormfixError, match="NF121"):
        read_settings(written(tmp_path, text.format(".".join("a" * 20000))), OPTIONS)


def test_true_is_no_number_of_sd(tmp_path, monkeypatch, capsys):
    """A threshold of 1 sd would pass nearly everything."""
    monkeypatch.chdir(written(tmp_path, "[tool.normfix.check]\nthreshold = true\n"))
    with pytest.raises(click.UsageError, match="finite number of sd"):
        cli.main(["check", "net", "image.npy"], standalone_mode=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('tile = "abc"', ()),
        ('scale = "abc"', ()),
        ('axes = "YY"', ()),
        ("dtype = 3", ()),
        ("", ("--tile", "abc")),
    ],
)
def test_a_wrong_value_names_the_file_that_it_is_from(tmp_path, monkeypatch, capsys, text, words):
    """The file and its table, where nobody typed the value; control: none of it where it was typed."""
    monkeypatch.chdir(written(tmp_path, f"[tool.normfix]\n{text}\n"))
    monkeypatch.setattr(sys, "argv", ["normfix", "predict", "net.pt2", "image.npy", "-o", "p.npy", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert (f"{tmp_path / 'pyproject.toml'}: [tool.normfix]" in said) == bool(text)


def test_no_file_says_where_output_goes():
    """Each option that takes a name and speaks of writing is on the list, whatever command has it."""
    names = {
        option.name
        for command in cli.commands.values()
        for option in command.params
        if isinstance(option, click.Option) and not option.is_flag and "write" in str(option.help).lower()
    }
    assert {"out", "report", "reports", "give_back", "image"} <= names <= set(NEVER)


def test_every_option_that_runs_code_is_on_the_list():
    """The names that no file sets are options of real commands, so none is misspelt."""
    names = {p.name for command in cli.commands.values() for p in command.params}
    assert set(NEVER) <= names


def test_a_setting_is_the_default_of_the_command(tmp_path, monkeypatch, capsys):
    """`normfix explain` prints JSON where the project says so, and text where the caller says so."""
    monkeypatch.chdir(written(tmp_path, '[tool.normfix]\nformat = "json"\n'))
    cli.main(["explain", "NF203"], standalone_mode=False)
    assert capsys.readouterr().out.startswith("{")
    cli.main(["explain", "NF203", "--format", "text"], standalone_mode=False)
    assert capsys.readouterr().out.startswith("NF203")


def test_a_folder_that_is_gone_is_an_error(monkeypatch, capsys):
    """Where the working directory was removed, a command says so."""

    def gone():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "cwd", gone)
    monkeypatch.setattr(sys, "argv", ["normfix", "explain", "NF101"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err[:5]) == (2, "NF337")


def test_show_settings_prints_them(tmp_path, monkeypatch, capsys):
    """--show-settings names the file and each command's option."""
    monkeypatch.chdir(written(tmp_path, "[tool.normfix]\ntile = 512\n"))
    cli.main(["--show-settings"], standalone_mode=False)
    out = capsys.readouterr().out
    assert str(tmp_path / "pyproject.toml") in out
    assert "check --tile 512" in out
    assert "explain" not in out


@pytest.mark.slow
def test_a_halo_curve_lets_be_what_the_project_states_of_every_check(run, tmp_path, monkeypatch):
    """It has no use for a threshold, which is refused only where it is said beside it."""
    np.save(written(tmp_path, "[tool.normfix.check]\nthreshold = 1\n") / "image.npy", np.eye(40, dtype="f4"))
    monkeypatch.chdir(tmp_path)
    command = ("check", "factories:tiny_unet", "image.npy", "--scale", "none", "--tile", 16, "--halo-curve")
    code, out, _ = run(*command)
    assert code in (0, 1)
    assert "sd" in out
    code, _, err = run(*command, "--threshold", 1)
    assert (code, "has no --threshold" in err) == (2, True)
