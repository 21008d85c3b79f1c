"""A run that was stopped goes on from what is whole, and only from what is whole and its own."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from optional import zarr
from streamed_networks import Tangled
from torch.testing import assert_close

import normfix
from normfix import Blocks
from normfix.errors import NormfixError
from normfix.layers.moments import Moments, measure
from normfix.tiling.stages.blocks import Work
from normfix.tiling.stages.journal import Written

HERE = Path(__file__).parents[1] / "support"


def _image(seed=1):
    return torch.rand(1, 1, 48, 44, generator=torch.Generator().manual_seed(seed)) ** 3 * seed


class Bench:
    """A converted network that is captured once, and its statistics before each run."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = normfix.convert(Tangled(), _image()).model
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.calibrate()
        normfix.predict(self.model, _image(), tile=16, engine="stages")

    def calibrate(self, store=None, image=None, tile=16, **options):
        """Return the statistics, freshly measured."""
        self.model.load_state_dict(self.before)
        given = _image(2) if image is None else image
        normfix.calibrate_(self.model, given, blocks=Blocks(tile=tile, store=store, **options))
        return {name: value.clone() for name, value in self.model.named_buffers()}


@pytest.fixture(scope="module")
def bench():
    """Shared, because capturing takes seconds."""
    return Bench()


@pytest.fixture
def stop(bench, monkeypatch):
    """Let the nth block from now on raise an error."""
    compute = Work.__call__

    def arm(n, error=KeyboardInterrupt):
        bench.calibrate()  # captured anew, where a test changed the network: proving a schedule computes blocks, too
        left = [n]

        def call(self, number):
            left[0] -= 1
            if not left[0]:
                raise error
            return compute(self, number)

        monkeypatch.setattr(Work, "__call__", call)

    yield arm
    monkeypatch.undo()


@pytest.fixture
def stopped(bench, stop, tmp_path, monkeypatch):
    """Return the folder of a run that was stopped in the middle of a stage."""
    stop(25)
    with pytest.raises(KeyboardInterrupt):
        bench.calibrate(tmp_path)
    monkeypatch.undo()
    return tmp_path / "normfix-run"


def _same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.zoo
def test_killed_at_random_points_it_ends_with_the_same_bytes(tmp_path):
    """Killed four times by SIGKILL, a command ends with the bytes of an undisturbed one and no block is done thrice."""
    command = [sys.executable, "stopped_runs.py", str(tmp_path), "0", "4"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["killed"] == [True] * 4
    assert found["same"]
    assert found["left"] == []
    assert (
        found["blocks"] <= found["computed"] <= found["blocks"] + 4
    )  # at most the block in flight, each time


def test_ctrl_c_leaves_a_run_that_goes_on(bench, stop, stopped, monkeypatch):
    """After Ctrl-C the folder says what is whole, and the same call computes the rest alone."""
    lines = (stopped / "0" / "journal.jsonl").read_text().splitlines()
    assert sum('"block":' in line for line in lines) == 24
    computed = []
    compute = Work.__call__
    monkeypatch.setattr(Work, "__call__", lambda self, n: (computed.append(n), compute(self, n))[1])
    found = bench.calibrate(stopped.parent)
    monkeypatch.undo()
    _same(found, bench.calibrate())
    assert len(computed) == _blocks(bench) - 24
    assert not list(stopped.parent.iterdir())


def _blocks(bench):
    """Return how many blocks an undisturbed run has."""
    steps = []

    class Watch:
        timed = False

        def begin(self, outlook):
            steps.append(outlook.blocks)

        def block(self, step):
            pass

    bench.calibrate(watch=Watch())
    return steps[0]


def test_the_error_says_how_to_go_on(bench, stop, tmp_path):
    """Whatever stopped it, the error names the folder and says that the same command continues."""
    stop(25, RuntimeError("power"))
    with pytest.raises(RuntimeError, match="power") as caught:
        bench.calibrate(tmp_path)
    assert re.search(r"24 blocks are kept in .*normfix-run.*same command goes on", caught.value.__notes__[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tile": 12}, r"other blocks \(16x16, now 12x12\)"),
        ({"image": _image(5)}, "other images"),
        ({"weights": 1.5}, "other weights"),
        ({"threads": 2}, r"other threads \(1, now 2\)"),
    ],
)
def test_a_run_of_something_else_is_refused_by_name(bench, stopped, change, named):
    """Other blocks, images, weights or threads are named, and the unfinished run stays as it is."""
    weights, threads = change.pop("weights", 1.0), change.pop("threads", 1)
    content = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    with torch.no_grad():
        bench.model.head.weight.mul_(weights)
    before = bench.before
    bench.before = {**before, "head.weight": bench.model.head.weight.detach().clone()}
    torch.set_num_threads(threads)
    try:
        with pytest.raises(NormfixError, match=rf"NF328.*{named}.*normfix-run"):
            bench.calibrate(stopped.parent, **change)
    finally:
        torch.set_num_threads(1)
        bench.before = before
        bench.model.load_state_dict(before)
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == content


def _edit(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def _chunk(stopped):
    """Return a chunk of the map that the unfinished stage reads."""
    return sorted(p for p in stopped.glob("0/values/*/c/**/*") if p.is_file())[0]


def _described(stopped):
    """Return the description of the map that the unfinished stage reads."""
    return _chunk(stopped).parents[4] / "zarr.json"


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda run: _edit(run / "0/manifest.json", b'"threads": "1"', b'"threads": "2"'), "NF329"),
        (lambda run: (run / "0/manifest.json").write_text("{"), "NF329"),
        (lambda run: _edit(run / "0/journal.jsonl", b'"data":"', b'"data":"A'), "NF329"),
        (lambda run: _edit(run / "0/journal.jsonl", b'"block":1,', b'"block":2,'), "NF329"),
        (lambda run: _chunk(run).unlink(), "NF330"),
        (lambda run: _chunk(run).write_bytes(_chunk(run).read_bytes()[:-7]), "NF330"),
        (lambda run: _flip(_chunk(run)), "NF330"),
        (lambda run: _described(run).write_text("[" * 100_000), "NF330"),
    ],
)
def test_damage_is_found(bench, stopped, damage, code):
    """A changed manifest or journal, and a chunk that is gone, torn or altered by one bit, are errors, not numbers."""
    damage(stopped)
    with pytest.raises(NormfixError, match=code):
        bench.calibrate(stopped.parent)


def _instead(path, make):
    path.unlink()
    make(path)


def test_a_description_of_something_else_is_written_anew(bench, stopped):
    """What is no layout has no values either, so its stage is not continued with other numbers."""
    _described(stopped).write_text("3")
    with pytest.raises(NormfixError, match="NF330"):
        bench.calibrate(stopped.parent)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("find", [_chunk, _described])
def test_a_value_that_is_a_pipe_is_not_waited_for(bench, stopped, find):
    """So is what stands in place of a chunk or its array's description."""
    _instead(find(stopped), os.mkfifo)
    with pytest.raises(NormfixError, match="NF330"):
        bench.calibrate(stopped.parent)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("lock", lambda path: os.mkfifo(path), "NF327"),
        ("0/manifest.json", lambda path: os.mkfifo(path), "NF329"),
        ("0/journal.jsonl", lambda path: path.symlink_to("/dev/zero"), "NF329"),
    ],
)
def test_what_is_no_file_is_not_waited_for(bench, stopped, name, make, code):
    """A pipe where a run had a file is an error at once, and so is a device that never ends."""
    _instead(stopped / name, make)
    with pytest.raises(NormfixError, match=code):
        bench.calibrate(stopped.parent)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("linked", [True, False])
def test_what_is_the_user_s_is_not_deleted_with_a_run(bench, tmp_path, linked):
    """A folder of the run's name, or a link of that name, that leads to other files: nothing is done there."""
    store = tmp_path / "store"
    store.mkdir()
    mine = tmp_path / "scratch" if linked else store / "normfix-run"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if linked:
        (store / "normfix-run").symlink_to(mine)
    with pytest.raises(NormfixError, match=r"NF327.*thesis"):
        bench.calibrate(store)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_a_line_that_a_kill_cut_short_is_dropped(bench, stopped):
    """A torn last line of the journal is a block that was in flight: it is computed again."""
    journal = stopped / "0" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    _same(bench.calibrate(stopped.parent), bench.calibrate())


def test_measures_come_back_to_the_bit(tmp_path):
    """What is written in a journal is read back with the same bits, kinds and order."""
    x = torch.randn(1, 3, 5, 7) * 1e-3 + 1000
    moments = measure(x)
    journal = Written(tmp_path / "j")
    journal.note(2, 5, {"a.b": moments})
    journal.settle(2, "digest")
    journal.close()
    again = Written(tmp_path / "j")
    found = again.blocks(2)[5]["a.b"]
    again.close()
    assert isinstance(found, Moments)
    assert (found.count, again.settled(2), again.settled(1)) == (moments.count, "digest", None)
    assert torch.equal(found.mean, moments.mean)
    assert torch.equal(found.m2, moments.m2)


def _chunks(run):
    """Return the chunks of the unfinished run that hold values, by map, the map with most chunks first."""
    maps = [sorted(p for p in m.glob("c/**/*") if p.is_file()) for m in sorted(run.glob("0/values/*"))]
    return sorted(maps, key=len, reverse=True)


def _swapped(run, other):
    one, two = _chunks(run)[0][:2]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def _copied(run, other):
    chunks = _chunks(run)[0]
    chunks[0].write_bytes(chunks[-1].read_bytes())


def _of_another_map(run, other):
    maps = [chunks for chunks in _chunks(run) if chunks]
    one, two = next(
        (a[0], b[0])
        for a in maps
        for b in maps
        if a is not b
        and a[0].stat().st_size == b[0].stat().st_size
        and a[0].read_bytes() != b[0].read_bytes()
    )
    for path in (one, two):
        path.rename(path.with_suffix(".away"))
    one.with_suffix(".away").rename(two)
    two.with_suffix(".away").rename(one)


def _of_another_run(run, other):
    for chunk in (chunk for chunks in _chunks(run) for chunk in chunks):
        chunk.write_bytes((other / chunk.relative_to(run)).read_bytes())


def _maps_renamed(run, other):
    one, two = (chunks[0].parents[4] for chunks in _chunks(run)[:2])
    one.rename(one.with_name("away"))
    two.rename(one)
    one.with_name("away").rename(two)


@pytest.fixture
def others(bench, stop, tmp_path, monkeypatch):
    """Return the folder of a run on another image that was stopped at the same block."""
    (tmp_path / "others").mkdir()
    stop(25)
    with pytest.raises(KeyboardInterrupt):
        bench.calibrate(tmp_path / "others", _image(3))
    monkeypatch.undo()
    return tmp_path / "others" / "normfix-run"


@pytest.mark.parametrize("change", [_swapped, _copied, _of_another_map, _of_another_run, _maps_renamed])
def test_a_whole_chunk_in_another_s_place_is_found(bench, stopped, others, change):
    """Swapped, copied, of another map or of another run, a chunk with a right checksum is an error, not a number."""
    change(stopped, others)
    with pytest.raises(NormfixError, match="NF330"):
        bench.calibrate(stopped.parent)


def _line_moved(lines):
    lines[3], lines[4] = lines[4], lines[3]


def _line_repeated(lines):
    lines.insert(4, lines[3])


def _line_gone(lines):
    del lines[3]


@pytest.mark.parametrize("change", [_line_moved, _line_repeated, _line_gone])
def test_a_line_of_the_journal_out_of_place_is_found(bench, stopped, change):
    """A line that is whole but not at its place makes the journal another's: NF329."""
    journal = stopped / "0" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    change(lines)
    journal.write_bytes(b"".join(lines))
    with pytest.raises(NormfixError, match="NF329"):
        bench.calibrate(stopped.parent)


def test_the_journal_of_another_run_is_found(bench, stopped, others):
    """A whole journal of a run on another image, with as many blocks, is NF329."""
    (stopped / "0" / "journal.jsonl").write_bytes((others / "0" / "journal.jsonl").read_bytes())
    with pytest.raises(NormfixError, match="NF329"):
        bench.calibrate(stopped.parent)


@pytest.mark.parametrize("lines", [0, 1, 24])
def test_an_older_journal_costs_time_and_no_bits(bench, stopped, lines):
    """A journal that was put back to an earlier state has its later blocks computed again."""
    journal = stopped / "0" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:lines]))
    _same(bench.calibrate(stopped.parent), bench.calibrate())


def test_a_chunk_swapped_in_what_is_predicted_is_found(bench, stop, tmp_path, monkeypatch):
    """The finished prediction in the store is checked too when it is copied into its file."""
    from normfix.tiling.stages.placing import Destination

    def stopping(self, kept):
        raise KeyboardInterrupt

    monkeypatch.setattr(Destination, "copy", stopping)
    with pytest.raises(KeyboardInterrupt):
        normfix.write_prediction(
            bench.model, _image(), tmp_path / "p.npy", 16, engine="stages", blocks=Blocks(store=tmp_path)
        )
    monkeypatch.undo()
    _swapped(tmp_path / "normfix-run", None)
    with pytest.raises(NormfixError, match="NF330"):
        normfix.write_prediction(
            bench.model, _image(), tmp_path / "p.npy", 16, engine="stages", blocks=Blocks(store=tmp_path)
        )
    assert [p.name for p in tmp_path.iterdir()] == ["normfix-run"]


def test_a_deep_manifest_is_an_error(bench, stopped):
    """JSON that is nested without end is NF329, no crash."""
    (stopped / "0" / "manifest.json").write_text('{"parts":' + "[" * 100_000)
    with pytest.raises(NormfixError, match="NF329"):
        bench.calibrate(stopped.parent)


def test_a_finished_store_left_by_a_kill_goes(bench, tmp_path):
    """What a process that was killed while it cleared its store left hidden there is deleted by the next run."""
    left = tmp_path / ".normfix-run-done-4711"
    (left / "0" / "values").mkdir(parents=True)
    (left / "lock").write_text("")
    mine = tmp_path / ".normfix-run-done-4712"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    bench.calibrate(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [mine.name]
    assert (mine / "thesis.txt").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_store_that_cannot_be_written_is_an_error(bench, tmp_path, monkeypatch, number):
    """A read-only or forbidden store is NF327 with the reason and what to give instead."""
    make = Path.mkdir

    def refuse(self, *args, **options):
        if tmp_path in self.parents:
            raise OSError(number, "refused")
        make(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(NormfixError, match=r"NF327.*refused.*--store"):
        bench.calibrate(tmp_path)


def test_a_store_that_cannot_be_cleared_is_no_failure(bench, tmp_path, monkeypatch, caplog):
    """The result is there, so a store that cannot be deleted is a line and not an error."""
    replace = Path.replace

    def refuse(self, target):
        if self.name == "normfix-run":
            raise OSError(errno.EROFS, "Read-only file system")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    found = bench.calibrate(tmp_path)
    monkeypatch.undo()
    assert "could not be deleted: Read-only" in caplog.text
    _same(found, bench.calibrate())


_HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_share_a_store(bench, tmp_path):
    """While one process works in a store another is refused; when it is gone, however it went, the store is free."""
    (tmp_path / "normfix-run").mkdir()
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "normfix-run" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(NormfixError, match="NF332"):
            bench.calibrate(tmp_path)
        other.kill()
    _same(bench.calibrate(tmp_path), bench.calibrate())


def test_a_full_disk_stops_a_run_that_goes_on(bench, tmp_path, monkeypatch):
    """Where the store's disk is full the error says so, and with room the same call goes on to the same bits."""
    put, left = zarr.storage._local._put, [20]

    def full(path, value, *args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(path, value, *args, **options)

    monkeypatch.setattr(zarr.storage._local, "_put", full)
    with pytest.raises(NormfixError, match=r"NF327.*the disk is full") as caught:
        bench.calibrate(tmp_path)
    assert "The same command goes on" in caught.value.__notes__[0]
    monkeypatch.undo()
    _same(bench.calibrate(tmp_path), bench.calibrate())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_a_full_disk_leaves_no_output(bench, tmp_path, monkeypatch, suffix):
    """Room for the output is taken before it is mapped: a disk without it is an error, and nothing is left."""

    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(NormfixError, match=r"NF114.*No space left"):
        normfix.write_prediction(bench.model, _image(), tmp_path / f"out{suffix}", 16, engine="stages")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["gone", "replaced", "cut short"])
@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_an_input_that_changes_is_an_error(bench, stop, tmp_path, monkeypatch, what, suffix):
    """An image that vanishes, is replaced or cut short while it is read stops the run; no output has its name."""
    path, array = tmp_path / f"image{suffix}", _image(3)[0, 0].numpy()
    if suffix == ".npy":
        np.save(path, array)
    else:
        zarr.create_array(store=str(path), data=array, chunks=(16, 16))
    target = path if suffix == ".npy" else path / "zarr.json"
    compute, seen = Work.__call__, []

    def change(self, number):
        seen.append(number)
        if len(seen) == 3:
            data = target.read_bytes()
            target.unlink()
            if what != "gone":
                target.write_bytes(data + b" " if what == "replaced" else data[:-30])
        return compute(self, number)

    with normfix.open_image(path, bench.model) as image:
        monkeypatch.setattr(Work, "__call__", change)
        with pytest.raises(NormfixError, match=r"NF331.*image"):
            normfix.write_prediction(bench.model, image, tmp_path / "out.npy", 16, engine="stages")
    assert not (tmp_path / "out.npy").exists()


def test_a_corrupt_chunk_of_the_input_is_an_error(bench, tmp_path):
    """A chunk of a Zarr image that cannot be decoded is named with its window; no output has its name."""
    array = _image(3)[0, 0].numpy()
    zarr.create_array(store=str(tmp_path / "image.zarr"), data=array, chunks=(16, 16))
    chunk = tmp_path / "image.zarr" / "c" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    with (
        normfix.open_image(tmp_path / "image.zarr", bench.model) as image,
        pytest.raises(NormfixError, match=r"NF101 .*image\.zarr.*window \["),
    ):
        normfix.write_prediction(bench.model, image, tmp_path / "out.npy", 16, engine="stages")
    assert [p.name for p in tmp_path.iterdir()] == ["image.zarr"]


def test_a_prediction_with_a_store_is_that_without(bench, tmp_path):
    """Through the store, a prediction has the bits that it has without one."""
    plain = normfix.predict(bench.model, _image(4), tile=16, engine="stages")
    assert torch.equal(
        normfix.predict(bench.model, _image(4), tile=16, engine="stages", blocks=Blocks(store=tmp_path)),
        plain,
    )
    assert_close(
        plain, normfix.predict(bench.model, _image(4), tile=16, engine="tiles"), atol=1e-5, rtol=1e-4
    )
