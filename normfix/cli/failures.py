"""Errors as text: what was foreseen says itself what to do, the rest says whose fault it was."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from normfix.cli.showing import note
from normfix.errors import NormfixError

__all__ = ["each", "notes_of", "text_of_error"]


def text_of_error(error: BaseException) -> str:
    """Return an error in one paragraph, with what was noted on it, such as how to go on."""
    said = error if isinstance(error, NormfixError) else _unforeseen(error)
    return " ".join([str(said), *notes_of(error)])


def notes_of(error: BaseException) -> list[str]:
    """Return what was noted on an error, or on the one that click made another of, such as how to go on."""
    return [text for one in (error, error.__cause__) for text in getattr(one, "__notes__", ())]


def each(
    paths: Iterable[Path], work: Callable[[int, Path], object], hopeless: tuple[type[Exception], ...] = ()
) -> list[Path]:
    """Do the work for each image, say on stderr for which it failed, and return these.

    Errors of classes that are hopeless are of the network, so no other image fares better: they end it.
    """
    failed = []
    for number, path in enumerate(paths):
        try:
            work(number, path)
        except hopeless:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of one image
            text = text_of_error(error)
            note(text if str(path) in text else f"{path}: {text}")
            failed.append(path)
    return failed


def _unforeseen(error: BaseException) -> NormfixError:
    """Return the error for what the system refused, or normfix did wrong, where nobody expected it."""
    shows = "`normfix --debug COMMAND ...` shows where"
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOMEM):
        return NormfixError(
            "NF337",
            f"the system refused: {' '.join((error.strerror or str(error)).split())[:300]}. No output is half "
            f"written. Make room or give permission there and repeat the command; {shows}.",
            where="" if error.filename is None else str(error.filename),
        )
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if _is_out_of_memory(error):
        return NormfixError(
            "NF250",
            f"memory ran out ({reason.removesuffix(': ')}). No output is half written. Free memory or raise its limit, "
            f"give a smaller --tile, or read images by window (--engine stages with --budget); {shows}.",
        )
    if place := _of_a_network(error):
        return NormfixError(
            "NF118",
            f"code of the network's own failed beside its forward, in {place}: {reason}. normfix copies, moves and "
            "prints networks and reads their state; let these methods do what nn.Module's do. Nothing was written; "
            f"{shows}.",
        )
    return NormfixError("NF901", f"{reason}. Nothing was written; {shows}.")


def _of_a_network(error: BaseException) -> str:
    """Return the method of a user's network that an error came from, through libraries but not through normfix."""
    from torch import nn

    from normfix.networks.reading import is_own

    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        module, code = str(frame.f_globals.get("__name__")), frame.f_code
        if f"{module}.".startswith("normfix."):
            return ""
        if is_own(module):
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            return (
                f"{type(first).__name__}.{code.co_name} ({code.co_filename}:{line})"
                if isinstance(first, nn.Module)
                else ""
            )
    return ""


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    from normfix.networks.calling import is_out_of_memory

    return is_out_of_memory(error)
