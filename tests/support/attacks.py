"""Open files in a child process under an audit hook, and say what opening them did besides reading them.

`audited([Job(...), ...])` opens each file in turn in one fresh Python and returns an Outcome for each: what was
said, what was done that opening a file must not do, processor seconds, growth of memory. A violation is a file
opened for writing or changed outside the child's own temporary folder, a file read below a `forbidden` folder, a
process started, a socket, a shared library, an import from outside a list, a class that a pickle looks up that no
tensor needs. A child that dies or hangs costs its job only: the rest goes on in another.

To add cases: write the files in the test, name an opener of OPENERS (or "module:function", called with the path and
the arguments), and hand the jobs over together, since the child's imports take most of the time.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OPENERS", "Job", "Outcome", "audited"]

SECONDS = 10
"""Processor seconds that opening a small file may take; the child is killed after six times as many of the clock."""

OPENERS = {
    "load": "attacks:open_load",
    "open_model": "normfix.storage.opening:open_model",
    "read_program": "normfix.storage.opening:read_program",
}


@dataclass(frozen=True)
class Job:
    """A file or folder to open, how, and with which arguments."""

    name: str
    path: Path
    opener: str = "load"
    arguments: dict[str, Any] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    """Roots of packages that opening it may import."""


@dataclass(frozen=True)
class Outcome:
    """What opening a file came to."""

    name: str
    said: str
    """The type of what was opened, or NFxxx, or the exception's type and text, or how the child died."""
    violations: tuple[str, ...]
    seconds: float
    mebibytes: int

    @property
    def refused(self) -> bool:
        """Whether it was refused with a code that means the file."""
        return self.said.startswith("NF") and not self.said.startswith("NF9")


def audited(
    jobs: list[Job], *, warm: tuple[str, ...] = (), forbidden: tuple[Path, ...] = ()
) -> dict[str, Outcome]:
    """Open each job's file in a child under the hook; return outcomes by the jobs' names.

    Args:
        jobs: opened in order, in one child as long as it lives.
        warm: modules that the child imports before the hook counts.
        forbidden: folders in which opening a file must not even read.
    """
    outcomes: dict[str, Outcome] = {}
    left = list(jobs)
    while left:
        done, died = _one_child(left, warm, forbidden)
        outcomes |= {outcome.name: outcome for outcome in done}
        left = left[len(done) :]
        if left:
            outcomes[left[0].name] = Outcome(left[0].name, died, (), float("inf"), 0)
            left = left[1:]
    return outcomes


def open_load(path: str, **arguments: Any) -> Any:
    """Open as `normfix.load` does."""
    import normfix

    return normfix.load(path, **arguments)


def _one_child(
    jobs: list[Job], warm: tuple[str, ...], forbidden: tuple[Path, ...]
) -> tuple[list[Outcome], str]:
    """Run a child until it ends; return what it finished, and how it died if it did."""
    asked = {
        "warm": [*warm],
        "forbidden": [str(path.resolve()) for path in forbidden],
        "jobs": [
            {
                "name": job.name,
                "path": str(job.path),
                "opener": OPENERS.get(job.opener, job.opener),
                "arguments": job.arguments,
                "imports": list(job.imports),
            }
            for job in jobs
        ],
    }
    with tempfile.TemporaryDirectory(prefix="attacks-") as scratch:
        environment = os.environ | {
            "TMPDIR": scratch,
            "TORCHINDUCTOR_CACHE_DIR": scratch,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        child = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(asked))
        child.stdin.close()
        done = []
        while True:
            timer = threading.Timer(6 * SECONDS * (1 if done else 3), child.kill)
            timer.start()
            line = child.stdout.readline()
            timer.cancel()
            if not line:
                break
            if line.startswith("OUTCOME "):
                record = json.loads(line.removeprefix("OUTCOME "))
                done.append(Outcome(**record | {"violations": tuple(record["violations"])}))
        child.wait()
        child.stdout.close()
    return done, f"DIED {child.returncode}"


# What follows runs in the child.


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PACKAGES = _words(
    "torch torchgen sympy mpmath numpy normfix safetensors jinja2 markupsafe click rich attacks typing_extensions "
    "timm torchvision transformers diffusers monai segmentation_models_pytorch huggingface_hub PIL yaml "
    "dynamic_network_architectures pytorch3dunet filelock fsspec networkx triton "
    # what transformers and diffusers import late, when a class of theirs is first asked for
    "tokenizers accelerate packaging tqdm regex requests psutil"
)
"""Roots of packages that normfix itself or a network's library may import while a file is opened."""
_STANDARD = _words(
    "_compat_pickle ast bisect bz2 cmath code codeop collections colorsys copy csv dataclasses decimal difflib "
    "enum fractions functools gzip hashlib importlib inspect io itertools json linecache logging lzma math "
    "mimetypes numbers opcode operator optparse pickle pickletools pkgutil platform plistlib pprint pyexpat queue "
    "quopri random re secrets shlex sqlite3 statistics string struct sysconfig tarfile tempfile textwrap timeit "
    "token tokenize traceback types typing unittest urllib uuid weakref xml zipfile zlib zoneinfo encodings "
    "multiprocessing concurrent contextvars contextlib graphlib heapq hmac getpass glob fnmatch email html http "
    "ctypes array stringprep unicodedata argparse asyncio cProfile pstats profile doctest pdb bdb cmd "
    "configparser shutil warnings datetime calendar locale gettext netrc ipaddress socket ssl select selectors "
    "signal subprocess threading time tomllib resource"
)
"""Of the standard library, what torch and others import late, and not what only an attack wants (xmlrpc, smtplib)."""
_STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "os.startfile",
    "subprocess.Popen",
    "pty.spawn",
    "socket.",
    "urllib.Request",
    "http.client.connect",
    "ftplib.",
    "smtplib.",
    "ctypes.dlopen",
    "webbrowser.open",
    "code.__new__",
)
_DRIVERS = ("libnvidia-ml", "libcuda", "libamd_smi", "librocm")
_CHANGES = {
    "os.remove": 1,
    "os.rename": 2,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.chmod": 1,
    "os.chown": 1,
    "os.truncate": 1,
    "os.utime": 1,
    "os.setxattr": 1,
    "shutil.copyfile": 2,
    "shutil.copytree": 2,
    "shutil.move": 2,
    "shutil.rmtree": 1,
    "shutil.make_archive": 1,
    "shutil.unpack_archive": 2,
}
"""Events that change files, and how many of their arguments are paths."""
_TENSORS = ("torch", "collections", "_codecs", "numpy", "builtins.set", "builtins.bytearray", "copyreg")


class _Watch:
    """The audit hook: while armed, it notes what opening a file must not do."""

    def __init__(self, allowed: str, forbidden: list[str]) -> None:
        self.allowed = allowed
        self.forbidden = forbidden
        self.armed = False
        self.noted: list[str] = []
        self._inside = threading.local()

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed or getattr(self._inside, "hook", False):
            return
        self._inside.hook = True
        try:
            self._judge(event, args)
        finally:
            self._inside.hook = False

    def _judge(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            self._opened(args)
        elif event in _CHANGES:
            for path in args[: _CHANGES[event]]:
                self._changed(event, path)
        elif event == "pickle.find_class":
            name = f"{args[0]}.{args[1]}"
            if not name.startswith(_TENSORS):
                self.noted.append(f"a pickle looks up {name}")
        elif event == "ctypes.dlopen" and str(args[0]).startswith(_DRIVERS):
            return  # torch asks whether there is an accelerator
        elif event.startswith(_STARTS):
            self.noted.append(f"{event}{tuple(map(str, args))}"[:200])

    def _opened(self, args: tuple[Any, ...]) -> None:
        path, mode, flags = args
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor, which was opened before
        writing = (isinstance(mode, str) and set(mode) & set("wax+")) or (
            mode is None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        )
        if writing:
            self._changed("open for writing", path)
        place = os.path.realpath(os.fsdecode(path))
        if any(place == folder or place.startswith(folder + os.sep) for folder in self.forbidden):
            self.noted.append(f"reads {place}")

    def _changed(self, event: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        place = os.path.realpath(os.fsdecode(path))
        if place != os.devnull and not place.startswith(self.allowed + os.sep):
            self.noted.append(f"{event} {place}")


def _peak() -> int:
    """Return the largest resident size since the last reset, in MiB; 0 where it cannot be read."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.split("VmHWM:")[1].split()[0]) >> 10


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _carry_out(job: dict[str, Any], watch: _Watch) -> dict[str, Any]:
    import time

    from normfix.errors import NormfixError

    module, _, function = job["opener"].partition(":")
    opener = getattr(importlib.import_module(module), function)
    _reset_peak()
    modules, memory, started = set(sys.modules), _peak(), time.process_time()
    watch.noted = []
    watch.armed = True
    try:
        said = type(opener(job["path"], **job["arguments"])).__name__
    except NormfixError as error:
        said = str(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the outcome
        said = f"{type(error).__name__}: {error}"[:2000]
    finally:
        watch.armed = False
    roots = {name.partition(".")[0] for name in set(sys.modules) - modules}
    known = _PACKAGES | _STANDARD | set(job["imports"])
    strange = sorted(root for root in roots if root not in known and not root.startswith("_"))
    noted = [*watch.noted, *(f"imports {root}" for root in strange)]
    return {
        "name": job["name"],
        "said": said,
        "violations": noted[:20],
        "seconds": round(time.process_time() - started, 2),
        "mebibytes": _peak() - memory,
    }


def _child() -> None:
    import logging
    import warnings

    asked = json.loads(sys.stdin.read())
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    import torch

    import normfix  # noqa: F401 - before the hook, so that it is no finding

    torch.set_num_threads(1)
    for name in asked["warm"]:
        importlib.import_module(name)
    watch = _Watch(os.path.realpath(tempfile.gettempdir()), asked["forbidden"])
    sys.addaudithook(watch)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for job in asked["jobs"]:
        record = _carry_out(job, watch)
        channel.write(f"OUTCOME {json.dumps(record)}\n")
        channel.flush()


if __name__ == "__main__":
    _child()
