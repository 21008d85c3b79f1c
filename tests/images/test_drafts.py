"""An output appears whole and over nothing; what killed runs left of theirs goes, and nothing else does."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from normfix.cli.showing import require_reports, write_reports
from normfix.errors import NormfixError
from normfix.images.axes import write_image
from normfix.images.drafts import TakenError, UnwritableError, drafting, naming, reserve, sweep
from normfix.images.files import read_image
from normfix.images.locks import lock
from normfix.records.encoding import Record
from normfix.storage.folder import appearing


def _file(target, text):
    with drafting(target) as draft:
        draft.write_text(text)


def _folder(target, text):
    with appearing(target) as draft:
        (draft / "a").write_text(text)
        (draft / "b").write_text(text)


def _content(path):
    return path.read_text() if path.is_file() else {p.name: p.read_text() for p in path.iterdir()}


def _racing(make, target, text, barrier, told):
    """Be one of the processes that want one name."""
    barrier.wait()
    try:
        make(target, text)
    except TakenError as error:
        told.put((text, str(error.kept)))
    except NormfixError as error:  # it was there before the block began
        told.put((text, error.code))
    else:
        told.put((text, "wrote"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("make", [_file, _folder])
@pytest.mark.parametrize("links", [True, False])
def test_of_runs_that_want_one_name_one_gets_it(tmp_path, monkeypatch, make, links):
    """In six races of three, with hard links and without, one wrote and the others' results are kept whole."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    context = get_context("fork")
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        barrier, told = context.Barrier(3), context.SimpleQueue()
        runs = [
            context.Process(target=_racing, args=(make, folder / "out", str(k), barrier, told))
            for k in range(3)
        ]
        for run in runs:
            run.start()
        found = dict(told.get() for _ in runs)
        for run in runs:
            run.join()
        (winner,) = (text for text, what in found.items() if what == "wrote")
        whole = winner if make is _file else {"a": winner, "b": winner}
        assert _content(folder / "out") == whole
        kept = {text: what for text, what in found.items() if what not in ("wrote", "NF114")}
        for text, path in kept.items():
            assert _content(Path(path)) == (text if make is _file else {"a": text, "b": text})
        assert {p.name for p in folder.iterdir()} == {"out", *(Path(p).name for p in kept.values())}


def _no_links(source, target, **options):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_without_links_and_locks_a_name_is_still_taken_once(tmp_path, monkeypatch):
    """Where a file system has neither, the name is claimed; eight threads that want it do not replace each other."""

    def unlockable(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr("normfix.images.drafts.lock", unlockable)

    def run(text):
        try:
            _file(tmp_path / "out.txt", text)
        except TakenError as error:
            return error.kept.read_text() == text
        return "wrote"

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(run, map(str, range(8))))
    assert (told.count("wrote"), told.count(True)) == (1, 7)


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr", ".nii"])
def test_an_image_that_appears_meanwhile_stays(tmp_path, monkeypatch, suffix):
    """What another run named while this one wrote keeps its bytes; the error says where this one's result is."""
    target, mine, theirs = (
        tmp_path / f"p{suffix}",
        np.ones((1, 8, 8), "float32"),
        np.zeros((1, 8, 8), "float32"),
    )
    from normfix.images import axes

    create = axes.create

    def slow(draft, *args):
        monkeypatch.setattr(axes, "create", create)
        write_image(target, theirs)
        return create(draft, *args)

    monkeypatch.setattr(axes, "create", slow)
    with pytest.raises(TakenError, match=r"NF114 .*in the meantime.*What this run made is .*p-2"):
        write_image(target, mine)
    one, two = (read_image(tmp_path / f"{name}{suffix}", ndim=2, channels=1) for name in ("p", "p-2"))
    assert (float(one.max()), float(two.min())) == (0, 1)


_HELD = """
import sys, time
from pathlib import Path
from normfix.images.drafts import drafting
with drafting(Path(sys.argv[1])) as draft:
    draft.mkdir()
    (draft / "half").write_text("half")
    print("there", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def living(tmp_path):
    """A process that is in the middle of writing."""
    command = [sys.executable, "-c", _HELD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def _drafts(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".normfix-draft-")]


def test_the_draft_of_a_killed_run_goes_and_that_of_a_living_one_stays(tmp_path, living):
    """The next run that writes there deletes a draft once its process is killed, not before."""
    _file(tmp_path / "first", "1")
    (draft,) = _drafts(tmp_path)
    assert (draft / "draft" / "out" / "half").exists()
    os.kill(living.pid, signal.SIGKILL)
    living.wait()
    _file(tmp_path / "second", "2")
    assert {p.name for p in tmp_path.iterdir()} == {"first", "second"}


def test_two_runs_write_in_one_folder_at_a_time(tmp_path, living):
    """A run that writes beside another's draft ends as if it were alone."""
    _folder(tmp_path / "mine", "1")
    assert living.poll() is None
    assert len(_drafts(tmp_path)) == 1


def _killed(folder, change):
    """Return a draft that no process holds any more, after a change."""
    holder = folder / ".normfix-draft-0123456789abcdef"
    (holder / "draft").mkdir(parents=True)
    (holder / "draft" / "out").write_text("half")
    record = {"draft": holder.name, "machine": os.uname().nodename, "process": 1}
    change(holder, record)
    return holder


def _other_machine(holder, record):
    (holder / "lock").write_text(json.dumps({**record, "machine": "elsewhere"}))


def _copied(holder, record):
    (holder / "lock").write_text(json.dumps({**record, "draft": ".normfix-draft-ffffffffffffffff"}))


def _foreign(holder, record):
    (holder / "lock").write_text(json.dumps(record))
    (holder / "thesis.txt").write_text("mine")


def _unsigned(holder, record):
    (holder / "lock").write_text("")


def _deep(holder, record):
    (holder / "lock").write_text("[" * 4000)


def _no_text(holder, record):
    (holder / "lock").write_bytes(b"\xff\xfe" + json.dumps(record).encode())


@pytest.mark.skipif(os.name != "posix", reason="uname")
@pytest.mark.parametrize(
    "change", [_other_machine, _copied, _foreign, _unsigned, _deep, _no_text, lambda h, r: None]
)
def test_a_draft_that_is_not_certainly_dead_and_ours_is_left_and_named(tmp_path, caplog, change):
    """Another machine's, a copy, one with other files, without a mark or a lock file: it stays, and a line says so."""
    holder = _killed(tmp_path, change)
    sweep(tmp_path)
    assert (holder / "draft" / "out").read_text() == "half"
    assert f"{holder} is left alone" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="uname")
def test_a_draft_that_is_dead_and_ours_goes(tmp_path, caplog):
    """The control of the test above: with its own mark it is deleted, without a word."""
    _killed(tmp_path, lambda holder, record: (holder / "lock").write_text(json.dumps(record)))
    sweep(tmp_path)
    assert (list(tmp_path.iterdir()), caplog.text) == ([], "")


@pytest.mark.parametrize("when", ["writing", "named"])
def test_a_draft_that_could_not_be_deleted_goes_with_the_next_run(tmp_path, monkeypatch, when):
    """Where too many files were open to list it, or something within may not be deleted, its lock file stays too."""
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        with suppress(ZeroDivisionError), drafting(tmp_path / "first") as draft:
            draft.mkdir()
            if when == "writing":
                raise ZeroDivisionError
    assert len(_drafts(tmp_path)) == 1
    _file(tmp_path / "second", "2")
    assert {p.name for p in tmp_path.iterdir()} == {"second", *(["first"] if when == "named" else [])}


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_a_file_system_need_not_take_room_in_advance(tmp_path, monkeypatch, number):
    """One that knows no such call is written to all the same; one that is full is an error."""

    def refuse(*of):
        raise OSError(number, os.strerror(number))

    (tmp_path / "map").write_bytes(b"1234")
    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(OSError, match="No space") if number == errno.ENOSPC else nullcontext():
        reserve(tmp_path / "map")


@pytest.mark.parametrize(
    "name", [".normfix-draft-mine", ".out-abcd1234", "normfix-draft-0123456789abcdef", ".keep"]
)
def test_names_like_a_draft_s_are_the_user_s(tmp_path, name):
    """A folder or file with another name is never touched."""
    (tmp_path / name).mkdir()
    (tmp_path / f"{name}.txt").write_text("mine")
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {name, f"{name}.txt"}


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_link_with_a_draft_s_name_leads_nowhere(tmp_path):
    """What a symbolic link points to is not deleted through it."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "lock").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".normfix-draft-0123456789abcdef").symlink_to(tmp_path / "photos")
    sweep(tmp_path / "out")
    assert (tmp_path / "photos" / "lock").exists()


def test_what_existed_is_not_blamed_on_another_run(tmp_path):
    """A file that was there before the work began is said to exist; one that came meanwhile is another run's."""
    for name, why in (("before", "it exists and is not what"), ("meanwhile", "in the meantime")):
        target = tmp_path / name
        if name == "before":
            target.write_text("mine")
        with pytest.raises(TakenError, match=why):
            _file_beside(target)


def _file_beside(target):
    """Write a file whose name something else has by then."""
    with drafting(target) as draft:
        draft.write_text("ours")
        target.write_text("mine")


def test_what_was_made_before_is_known_again(tmp_path):
    """Made again with the same bytes a target stays as it is; other bytes are an error, and both are kept."""
    for text, again in (("one", False), ("one", True)):
        with naming(tmp_path / "out") as place:
            _folder(place.path, text)
        assert place.again is again
    with pytest.raises(TakenError, match="not what this command makes"), naming(tmp_path / "out") as place:
        _folder(place.path, "two")
    assert (_content(tmp_path / "out")["a"], _content(tmp_path / "out-2")["a"]) == ("one", "two")


@pytest.mark.parametrize("change", ["more", "less", "other"])
def test_a_folder_that_was_changed_is_not_known_again(tmp_path, change):
    """One file more, one less, or one byte changed in place is another output."""
    _folder(tmp_path / "out", "one")
    file = tmp_path / "out" / ("c" if change == "more" else "a")
    file.unlink(missing_ok=True) if change == "less" else file.write_text("onf")
    with pytest.raises(TakenError), naming(tmp_path / "out") as place:
        _folder(place.path, "one")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, number):
    """Read-only, forbidden, full: NF114 with the system's reason and what to do; nothing is left."""

    def refuse(self, *args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UnwritableError, match=rf"NF114 .*{os.strerror(number)}.*(Make room|Name a place)"):
        _file(tmp_path / "out", "1")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_lock_is_left_as_it_was(tmp_path, monkeypatch):
    """Closing a file tries to write once more what could not be written; the draft goes all the same."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.StringIO):
        def flush(self):
            raise full

        def close(self):
            raise full

    monkeypatch.setattr("normfix.images.drafts.lock", lambda file: True)
    opened = Path.open

    def open_(self, mode="r", **options):
        opened(self, mode, **options).close()
        return Full()

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(UnwritableError, match="Make room"):
        _file(tmp_path / "out", "1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "file/out"])
def test_a_name_that_cannot_be_is_an_error(tmp_path, name):
    """A name that is too long, or leads through a file, is NF114."""
    (tmp_path / "file").write_text("")
    with pytest.raises(NormfixError, match="NF114"):
        _file(tmp_path / name, "1")


class Said(Record):
    """A record without fields."""


def test_a_report_replaces_nothing(tmp_path, capsys):
    """Written again with the same content a report stays; with other content it goes beside, and the error says so."""
    path = str(tmp_path / "r.json")
    require_reports([path])
    write_reports([path], Said())
    require_reports([path])
    write_reports([path], Said())
    assert "is this report already" in capsys.readouterr().err
    (tmp_path / "r.json").write_text("my notes")
    with pytest.raises(TakenError, match=r"r-2\.json"):
        write_reports([path], Said())
    assert (tmp_path / "r.json").read_text() == "my notes"
    assert (tmp_path / "r-2.json").read_text() == Said().dumps()


def test_a_lock_is_held_once(tmp_path):
    """A second holder of one lock file is told so; the file closed, it is free."""
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("r+") as two:
        assert lock(one)
        assert not lock(two)
        one.close()
        assert lock(two)
