"""What the audit hook of attacks.py must note: one opener for each kind of violation, and one that does none."""

import os
import pickle
import socket
import subprocess
from pathlib import Path


def writes(path):
    """Write beside the file."""
    Path(path).with_name("written").write_text("x")


def writes_by_descriptor(path):
    """Write beside the file without Python's files."""
    os.close(os.open(str(Path(path).with_name("written")), os.O_WRONLY | os.O_CREAT))


def removes(path):
    """Remove the file."""
    Path(path).unlink()


def starts_a_process(path):
    """Start a process."""
    subprocess.run(["true"], check=False)


def calls_the_shell(path):
    """Call the shell."""
    os.system("true")


def connects(path):
    """Open a socket."""
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))


def imports(path):
    """Import what no network needs."""
    import xmlrpc.server  # noqa: F401


def unpickles(path):
    """Look up a function by a pickle."""
    pickle.loads(b"cos\ngetcwd\n.")


def loads_a_library(path):
    """Load a shared library."""
    import ctypes

    ctypes.CDLL(None)


def reads_elsewhere(path):
    """Read a file in the forbidden folder."""
    (Path(path).parent / "forbidden" / "secret").read_text()


def dies(path):
    """Die as a process that is killed dies."""
    os._exit(9)


def takes_memory(path):
    """Take 300 MiB."""
    return len(bytes(300 << 20).replace(b"\0", b"\1"))


def reads(path):
    """Read the file, which is what opening is."""
    return Path(path).read_bytes()
