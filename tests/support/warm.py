"""The installed program, run by a process that has imported torch already: what a shell finds, four seconds sooner.

`warm_program()` gives a file that can be called like the installed `normfix`. It hands arguments, environment, working
folder and streams to a server, which forks and runs the installed program's own file with them. Where a test is about
what a process imports or how it starts, it calls the installed program itself.
"""

from __future__ import annotations

import atexit
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
from pathlib import Path

__all__ = ["PROGRAM", "warm_program"]

PROGRAM = Path(sys.executable).with_name("normfix")

CALLER = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    said = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(said).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(said)
    answer = server.recv(8)
    sys.exit(int.from_bytes(answer, "big", signed=True) if answer else 70)
"""


@functools.cache
def warm_program() -> Path:
    """Start the server of this process, once, and return the file to call; the program itself where that cannot be."""
    if not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
        return PROGRAM
    folder = tempfile.TemporaryDirectory(prefix="nf")
    atexit.register(folder.cleanup)
    address = str(Path(folder.name) / "s")
    server = subprocess.Popen(
        [sys.executable, __file__, address, str(PROGRAM)],
        stdin=subprocess.PIPE,  # its end is this process's end
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    atexit.register(_ended, server)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    path = Path(folder.name) / "bin" / "normfix"
    path.parent.mkdir()
    path.write_text(CALLER.format(python=sys.executable, address=address), encoding="utf-8")
    path.chmod(0o755)
    return path


def _ended(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait(60)
    server.stdout.close()


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
    """Read what a caller wants; return it in a child, whose end is told to the caller."""
    size, streams, _, _ = socket.recv_fds(caller, 8, 3)
    with caller.makefile("rb") as file:
        words, folder, environment = json.loads(file.read(int.from_bytes(size, "big")))
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        caller.sendall(code.to_bytes(8, "big", signed=True))
        os._exit(0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return words, streams


def _main(address: str, program: str) -> None:
    import torch  # noqa: F401 - what takes four seconds

    from normfix.networks.quiet_imports import import_compiler

    import_compiler()
    gc.freeze()  # what is never looked at is never copied
    if (wanted := _serve(address)) is None:
        return
    words, streams = wanted
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    looked = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [str(Path(program).parent), *looked]  # as Python does for a file
    sys.argv[:] = [program, *words]
    try:
        runpy.run_path(program, run_name="__main__")
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


if __name__ == "__main__":
    _main(*sys.argv[1:])
