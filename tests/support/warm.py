"""The installed program and Python, run by a process that has imported torch already: the same, four seconds sooner.

`warm_program()` gives a file that can be called like the installed `normfix`, `warm_python()` one like `python` with a
command or a file. They hand arguments, environment, working folder and streams to a server, which forks and runs what
is wanted with them. Where a test is about what a process imports or how it starts, it calls the real ones.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

__all__ = ["PROGRAM", "begin_warming", "warm_program", "warm_python"]

PROGRAM = Path(sys.executable).with_name("normfix")

CALLER = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    said = json.dumps([[*{first!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(said).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(said)
    answer = server.recv(8)
code = int.from_bytes(answer, "big", signed=True) if answer else 70
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def warm_program() -> Path:
    """Return the file to call; the program itself where there is no server."""
    folder = _served()
    return folder / "bin" / "normfix" if folder else PROGRAM


def warm_python() -> Path:
    """Return the file to call; Python itself where there is no server."""
    folder = _served()
    return folder / "python" if folder else Path(sys.executable)


@functools.cache
def begin_warming() -> tuple[Path, subprocess.Popen] | None:
    """Start the server of this process, once, without waiting for it; None where that cannot be.

    Before any test: what one changes for itself is not what the server begins with.
    """
    if not hasattr(os, "pidfd_open") or not hasattr(socket, "send_fds"):
        return None
    holder = tempfile.TemporaryDirectory(prefix="nf")
    atexit.register(holder.cleanup)
    folder = Path(holder.name)
    address, python = str(folder / "s"), folder / "python"
    (folder / "bin").mkdir()
    for path, first in ((folder / "bin" / "normfix", [str(PROGRAM)]), (python, [])):
        text = CALLER.format(python=sys.executable, address=address, first=first)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, address, str(python)],
        stdin=subprocess.PIPE,  # its end is this process's end
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    atexit.register(_ended, server)
    return folder, server


@functools.cache
def _served() -> Path | None:
    if (begun := begin_warming()) is None:
        return None
    folder, server = begun
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return folder


def _ended(server: subprocess.Popen) -> None:
    server.kill()
    server.communicate()


def _serve(address: str) -> tuple[list[str], list[int]] | None:
    """Wait for callers; return in a process of its own what one wants run, or None when nobody needs this any more."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.write(1, b"ready\n")
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            caller, _ = listener.accept()
            with caller:
                if os.fork():
                    continue
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                if (wanted := _taken(caller)) is not None:
                    return wanted
    return None


def _taken(caller: socket.socket) -> tuple[list[str], list[int]]:
    """Read what a caller wants; return it in a child, whose end is told to the caller, and which ends with it."""
    size, streams, _, _ = socket.recv_fds(caller, 8, 3)
    with caller.makefile("rb") as file:
        words, folder, environment = json.loads(file.read(int.from_bytes(size, "big")))
    if child := os.fork():
        if caller in select.select([os.pidfd_open(child), caller], [], [])[0]:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            caller.sendall(code.to_bytes(8, "big", signed=True))
        os._exit(0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return words, streams


def _main(address: str, python: str) -> None:
    import torch  # noqa: F401 - what takes four seconds

    from normfix.networks.quiet_imports import import_compiler
    from normfix.storage import fresh

    import_compiler()
    fresh.interpreter = lambda: python
    gc.freeze()  # what is never looked at is never copied
    if (wanted := _serve(address)) is None:
        return
    words, streams = wanted
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    try:
        _run(*words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:  # noqa: BLE001 - as Python ends
        traceback.print_exc()
        code = 1
    # taking torch apart takes a second, and nothing is left to it
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(what: str, *words: str) -> None:
    """Run a file, or after "-c" a command, as Python does."""
    script = words[0] if what == "-c" else None
    sys.argv[:] = [what, *words[script is not None :]]
    looked = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = ["" if script is not None else str(Path(what).parent), *looked]
    if what != str(PROGRAM):  # it begins without normfix
        for name in [name for name in sys.modules if name.partition(".")[0] == "normfix"]:
            del sys.modules[name]
    if script is None:
        runpy.run_path(what, run_name="__main__")
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(script, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    _main(*sys.argv[1:])
