"""While a network that a file names is built, nothing is opened, fetched or run: the last line, behind the lists.

Python tells its audit hooks of every file, socket and process before it opens it, and a hook can refuse. A hook
cannot be taken out again, so one is installed when it is first needed, and looks at a context variable: only the
thread that builds is watched, and only while it builds. Other threads, which a constructor might start, are not.

Building needs nothing but the installed packages, which Python imports as it goes.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from normfix.errors import PACKAGE, NormfixError

__all__ = ["watched"]

_REFUSED = frozenset(
    {
        *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"),
        *("urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect", "webbrowser.open"),
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"),
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
        *("os.chmod", "os.chown", "os.utime", "os.chdir", "os.kill", "pty.spawn"),
        *("shutil.copyfile", "shutil.copytree", "shutil.move", "shutil.rmtree", "shutil.unpack_archive"),
        *("tempfile.mkstemp", "tempfile.mkdtemp", "sqlite3.connect", "pickle.find_class"),
    }
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HARMLESS = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/share/zoneinfo/", "/etc/localtime")
_OTHERS = frozenset({"logging", "logging.handlers", "linecache"})
"""Modules that open files of the user's or of the interpreter's choice, whoever calls them."""
_IMPORTING = ("importlib._bootstrap_external", "_frozen_importlib_external")
_COMPILED = "__pycache__"


class _Watch:
    """What was refused while one network was built, as a library may try something else and go on."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.refused: list[str] = []

    def error(self) -> NormfixError:
        return NormfixError(
            "NF113",
            f"while the network was built, a library wanted {self.refused[0]}. A file does not decide what is opened "
            "or fetched here, so it was stopped. If you trust it, build the network yourself: --arch "
            "pkg.module:factory --arch-args JSON.",
            where=self.where,
        )


_now: ContextVar[_Watch | None] = ContextVar("normfix_guard", default=None)
_installing = Lock()
_installed: list[bool] = []


@contextmanager
def watched(where: str) -> Iterator[None]:
    """Refuse files, addresses and processes to this thread within the block.

    Args:
        where: named in the error.

    Raises:
        NormfixError: NF113, also where a library caught it within the block.
    """
    _install()
    watch = _Watch(where)
    token = _now.set(watch)
    try:
        yield
    finally:
        _now.reset(token)
        if watch.refused:
            raise watch.error()


def _install() -> None:
    with _installing:
        if not _installed:
            sys.addaudithook(_heard)
            _installed.append(True)


def _heard(event: str, args: tuple[Any, ...]) -> None:
    """Hear of everything that Python does; most of it ends at the first line."""
    if event != "open" and event not in _REFUSED:
        return
    watch = _now.get()
    if watch is None:
        return
    # What is asked here must not be heard again.
    token = _now.set(None)
    try:
        problem = _problem(event, args)
    finally:
        _now.reset(token)
    if problem:
        watch.refused.append(problem)
        raise watch.error()


def _problem(event: str, args: tuple[Any, ...]) -> str:
    """Say what is wanted that building needs not, or nothing."""
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int) or path is None:
            return ""
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - no file is looked at
        writes = bool((flags or 0) & _WRITING) or any(c in str(mode or "") for c in "wax+")
        if not writes and (name.startswith(_HARMLESS) or _is_installed(name) or _is_loaded(name)):
            return ""
        wanted = f"to {'write' if writes else 'read'} {name[:120]!r}"
    else:
        wanted = f"{event} {', '.join(str(a)[:80] for a in args[:2])}"
    return "" if _of_others(args) else wanted


def _is_installed(name: str) -> bool:
    """Tell whether it lies below the installed packages, or is an archive of packages itself."""
    return os.path.realpath(name).startswith(_places()) or name in sys.path


@cache
def _places() -> tuple[str, ...]:
    """Return the folders of the interpreter and of installed packages, wherever the path names them."""
    named = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    searched = {place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")}
    places = {*named, *searched, str(PACKAGE)}
    return tuple(sorted(os.path.realpath(place) + os.sep for place in places if place is not None))


def _is_loaded(name: str) -> bool:
    """Tell whether it is the source of a module that runs already, which warnings quote, or lies in its package."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == name:
            return True
        folders = module.__dict__.get("__path__") if isinstance(module, ModuleType) else None
        if isinstance(folders, list) and any(name.startswith(str(place) + os.sep) for place in folders):
            return True
    return False


def _is_import(name: str) -> bool:
    """Tell whether the interpreter's own reading of a module is of the user's choice, as what lies here may not be."""
    try:
        here = str(Path.cwd()) + os.sep
    except OSError:
        # The folder is gone, so nothing lies in it.
        return True
    return _COMPILED in name or not str(Path(name).absolute()).startswith(here)


def _of_others(args: tuple[Any, ...]) -> bool:
    """Tell whether logging or the interpreter does it, as it would elsewhere."""
    # Below this function lie _problem and _heard.
    step: Any = sys._getframe(3)
    if step.f_globals.get("__name__") in _IMPORTING and _is_import(str(args[0])):
        return True
    while step is not None:
        if step.f_globals.get("__name__") in _OTHERS:
            return True
        step = step.f_back
    return False
