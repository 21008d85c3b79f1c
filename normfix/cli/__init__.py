"""The command line: one error boundary, stdout for the result, stderr for everything else.

Modules here import torch only inside the functions that need it, so help stays fast.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from normfix import __version__
from normfix.cli.choose import choose_command
from normfix.cli.convert import convert_command
from normfix.cli.demo import demo_command
from normfix.cli.diagnose import diagnose_command
from normfix.cli.explain import explain_command
from normfix.cli.failures import notes_of, text_of_error
from normfix.cli.give_back import give_back_command
from normfix.cli.predict import predict_command
from normfix.cli.prove import prove_command
from normfix.cli.push import push_command
from normfix.cli.scan import plan_command, scan_command
from normfix.cli.settings import SETTINGS, Settings, read_settings
from normfix.cli.use import calibrate_command, check_command
from normfix.cli.verify import verify_command
from normfix.errors import NormfixError, shown

__all__ = ["cli", "main"]


def _settings() -> Settings:
    """Return what the project's pyproject.toml sets."""
    options = {
        name: {p.name for p in command.params if isinstance(p, click.Option) and p.name}
        for name, command in cli.commands.items()
    }
    try:
        start = Path.cwd()
    except OSError as error:  # MKL ends the process there, without a word of ours
        raise NormfixError(
            "NF337",
            f"the folder that this command is run in is not there: {error.strerror}. Change to one that is, and "
            "repeat the command.",
        ) from error
    return read_settings(start, options)


def _show_settings(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    found = _settings()
    click.echo(f"{found.path or 'no pyproject.toml with [tool.normfix]'}")
    for line in found.lines():
        click.echo(f"  {line}")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks of internal errors.")
@click.option(
    "--show-settings",
    is_flag=True,
    is_eager=True,
    callback=_show_settings,
    expose_value=False,
    help="Print the options that pyproject.toml sets, and exit.",
)
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Make pretrained PyTorch networks tile-invariant, and prove it.

    Finds statistics that a network computes from each tile, freezes them at the values of whole images, and
    shows that stitched tiles equal the whole-image prediction.

    Exit codes: 0 fine, 1 findings or an inconclusive proof, 2 usage, unreadable input or internal error.
    """
    settings = context.meta[SETTINGS] = _settings()
    context.default_map = {name: dict(values) for name, values in settings.commands.items()}


def _stated(run: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse empty words before a command runs: as a name, a variable that is not set is the working directory."""

    @wraps(run)
    def checked(*args: Any, **options: Any) -> Any:
        context = click.get_current_context()
        for parameter in context.command.params:
            value = options.get(parameter.name or "")
            if value == "" or (isinstance(value, tuple) and "" in value):
                raise click.BadParameter(
                    "it is empty, as a variable of the shell is that was not set. Say what is meant, or leave it out",
                    context,
                    parameter,
                )
        return run(*args, **options)

    return checked


for command in (
    scan_command,
    plan_command,
    convert_command,
    calibrate_command,
    predict_command,
    check_command,
    prove_command,
    verify_command,
    give_back_command,
    push_command,
    diagnose_command,
    choose_command,
    demo_command,
    explain_command,
):
    assert command.callback is not None
    command.callback = _stated(command.callback)
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its code; the only place where errors become text."""
    debug = "--debug" in sys.argv[1:]
    _take_standard_files()
    try:
        code = cli.main(standalone_mode=False)
    except NormfixError as error:
        _complain(text_of_error(error), debug=debug)
        code = 2
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        said.write(_source_of(error))
        with suppress(OSError):
            click.echo(shown(said.getvalue()), nl=False, err=True)
        code = error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt) as stop:
        _complain(" ".join(["Stopped; no output is half written.", *notes_of(stop)]))
        code = 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except SystemExit as stop:
        if _is_of_click(stop):  # it answers a shell, or nobody reads any more
            raise
        _complain(str(_ended(stop)), debug=debug)
        code = 2
    except BaseException as error:  # noqa: BLE001 - the boundary
        _complain(text_of_error(error), debug=debug)
        code = 2
    sys.exit(code or 0)


def _source_of(error: click.ClickException) -> str:
    """Return a line that names the file that a value is from which nobody typed; "" for one that was typed."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or parameter is None or SETTINGS not in context.meta:
        return ""
    if context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT_MAP:
        return ""
    return f"It is set in {context.meta[SETTINGS].path}: [tool.normfix].\n"


def _is_of_click(stop: SystemExit) -> bool:
    """Tell whether click itself ended the program, not code that a command called."""
    *_, (frame, _) = traceback.walk_tb(stop.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "click"


def _ended(stop: SystemExit) -> NormfixError:
    """Return the error for code of a network or a metric that ends the program: its code would pass for ours."""
    return NormfixError(
        "NF109",
        f"code that normfix called ended the program (SystemExit, {stop.code}), so there is no result. Take sys.exit "
        "out of what the network runs; `normfix --debug COMMAND ...` shows where it is.",
    )


def _take_standard_files() -> None:
    """Put nothing where a standard file is closed: the next file that is opened would be what a library prints into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least number that is free


def _complain(text: str, *, debug: bool = False) -> None:
    with suppress(OSError):  # nobody can be told where stderr is full; the code is the command's all the same
        if debug:
            traceback.print_exc()
        click.echo(shown(text), err=True)
