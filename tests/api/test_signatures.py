"""Public functions can be called without a manual: few parameters, and the same defaults as on the command line."""

import inspect
from typing import get_origin, get_type_hints

import click
import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import Unpack, is_typeddict

import normfix
from normfix.api.conversion import ConvertOptions
from normfix.api.prediction import PredictOptions
from normfix.api.recalibration import CalibrateOptions
from normfix.cli import cli
from normfix.diagnosis.network import DiagnoseOptions, diagnose_network
from normfix.diagnosis.pipeline import PipelineOptions, diagnose_pipeline
from normfix.proof.check import CheckOptions
from normfix.tiling.stages.options import Blocks

MOST = 12

RECORDS = (
    *("CalibrationSummary", "Decision", "Finding", "Plan", "Proof", "ProofStep", "Scaling", "Scan", "Site"),
    *("Source", "Tiling", "Verdict"),
)
"""What is made by us and read by users: its fields are no arguments."""


def _functions(names=normfix.__all__):
    """Return the public functions, classes and methods of public classes, by name."""
    found = {}
    for name in names:
        thing = getattr(normfix, name)
        if callable(thing) and name not in RECORDS:
            found[name] = thing
        if inspect.isclass(thing):
            methods = inspect.getmembers(thing, inspect.isroutine)
            found |= {f"{name}.{key}": method for key, method in methods if not key.startswith("_")}
    return found


def _too_wide(functions):
    return [name for name, function in functions.items() if len(_parameters(function)) > MOST]


def _parameters(function):
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of C
        return {}


def test_no_public_function_takes_more_than_twelve():
    """Whatever a user calls has at most twelve parameters."""
    functions = _functions()
    assert {
        "convert",
        "calibrate",
        "predict",
        "diagnose",
        "Blocks",
        "FineTuning.recalibrate",
    } <= functions.keys()
    assert _too_wide(functions) == []


def test_thirteen_would_be_noticed():
    """The count sees what stands behind a name."""
    source = f"def wide({', '.join('abcdefghijklm')}): pass"
    names = {}
    exec(source, names)
    assert _too_wide({"wide": names["wide"]}) == ["wide"]


SHARED = {
    "scan": (normfix.scan, {}),
    "plan": (normfix.plan, {}),
    "convert": (normfix.convert, {}),
    "calibrate": (normfix.calibrate, {"masks": "mask"}),
    "predict": (normfix.predict, {}),
    "check": (normfix.check, {}),
    "prove": (normfix.prove, {"masks": "mask"}),
    "diagnose": (normfix.diagnose, {"sites": "per_site"}),
    "push": (normfix.push, {}),
}
"""Commands, the functions they call, and the options that have another name there."""

REQUIRED = {("plan", "to"), ("convert", "to")}
"""Options that the command line asks for and Python has a default for."""

OTHERWISE = {("prove", "blocks"), ("calibrate", "allow_flat")}
"""Options that say another thing: the size of blocks; a flag, where Python also knows neither."""


def _defaults(command):
    """Return the pairs of defaults of a command's options, on the command line and in Python."""
    function, names = SHARED[command]
    python = {**_parameters(Blocks), **_parameters(function)}
    for option in cli.commands[command].params:
        name = names.get(option.name, option.name)
        if (
            isinstance(option, click.Option)
            and name in python
            and (command, name) not in REQUIRED | OTHERWISE
        ):
            yield (
                name,
                _plain(option.get_default(click.Context(cli.commands[command]))),
                _plain(python[name].default),
            )


def _plain(default):
    """Return None for what says nothing: an option not given, an empty tuple."""
    unset = default in (None, (), inspect.Parameter.empty) or "UNSET" in repr(default)
    return None if unset else default


@pytest.mark.parametrize("command", sorted(SHARED))
def test_defaults_are_those_of_the_command_line(command):
    """An option that a command shares with its function has one default."""
    pairs = list(_defaults(command))
    assert [name for name, there, here in pairs if there != here] == []


def test_options_that_are_shared_are_compared():
    """The comparison reaches the options of blocks and of prediction, and would see another default."""
    compared = {name: (there, here) for name, there, here in _defaults("predict")}
    assert {"tile", "halo", "engine", "statistics", "budget", "store", "workers"} <= compared.keys()
    assert compared["workers"] == (1, 1) != (1, 2)


RENDERED = {"allow_nonfinite", "as_", "logits"}
"""What becomes of a prediction, which functions that write one take by name."""

OPTIONS = {
    "predict": (PredictOptions, normfix.predict, RENDERED),
    "convert": (ConvertOptions, normfix.convert, set()),
    "calibrate": (CalibrateOptions, normfix.calibrate, set()),
    "check": (CheckOptions, normfix.check, set()),
    "diagnose": (DiagnoseOptions, diagnose_network, set()),
    "diagnose a pipeline": (PipelineOptions, diagnose_pipeline, set()),
}
"""Typed options, the function whose they are, and those of it that are left out."""


def _unlike(options, function, left_out=frozenset()):
    """Return the names of keyword arguments whose types the typed options do not state as the function does."""
    hints, typed = get_type_hints(function), get_type_hints(options)
    keywords = {name for name, p in _parameters(function).items() if p.kind is p.KEYWORD_ONLY} - left_out
    return sorted(name for name in keywords | typed.keys() if hints.get(name) != typed.get(name))


@pytest.mark.parametrize("name", OPTIONS)
def test_typed_options_are_those_of_the_function(name):
    """Whoever hands options on hands on those that there are, with their types."""
    assert _unlike(*OPTIONS[name]) == []


def test_options_of_another_function_would_be_noticed():
    """Control: what one of two functions has and the other has not is named."""
    assert _unlike(CheckOptions, normfix.predict) != []
    assert "threshold" in _unlike(CheckOptions, normfix.predict)


def test_no_public_function_takes_whatever_it_is_given():
    """Each `**options` is typed: an editor knows the names, and a type checker refuses others."""
    open_ = [
        name
        for name, function in _functions().items()
        for parameter, hint in _hints(function).items()
        if _parameters(function)[parameter].kind is inspect.Parameter.VAR_KEYWORD
        and not (get_origin(hint) is Unpack and is_typeddict(hint.__args__[0]))
    ]
    assert open_ == ["diagnose"]  # whose two overloads type it


def _hints(function):
    """Return the hints of parameters, of what has any."""
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):
        return {}
    return {name: hint for name, hint in hints.items() if name in _parameters(function)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda net, x, n: normfix.convert(net, x, tile=n).proof,
        lambda net, x, n: normfix.check(normfix.convert(net, x).model, x, tile=n),
        lambda net, x, n: normfix.check(lambda image: image * 2, x.numpy(), tile=n),
        lambda net, x, n: normfix.predict(net, x, tile=n, statistics="per-image"),
        lambda net, x, n: normfix.diagnose(net, x, tile=n, halo=n),
        lambda net, x, n: normfix.choose(net, x, window=n),
    ],
    ids=["convert", "check", "pipeline", "predict", "diagnose", "choose"],
)
def test_sizes_may_be_whole_numbers_of_numpy_and_are_nothing_else(call):
    """What was computed with arrays is a size too; a fraction or a truth value is refused with a code."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 3, padding=1)
    ).eval()
    image = torch.rand(1, 1, 64, 96)
    assert call(net, image, np.int64(16)) is not None
    for size in (1.5, True, "a"):
        with pytest.raises(normfix.NormfixError, match=r"NF402|NF602"):
            call(net, image, size)
