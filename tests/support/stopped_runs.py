"""Kill runs at random moments and go on: python stopped_runs.py FOLDER SEED POINTS; prints JSON.

The network is captured once. Every attempt is a process of its own, forked from there, and dies by SIGKILL at a random
moment of a random block, the last one excepted.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from streamed_networks import Tangled

import normfix
from normfix import Blocks
from normfix.tiling.stages.blocks import Work
from normfix.tiling.stages.resuming import resumable

torch.set_num_threads(1)


def image(seed):
    return torch.rand(1, 1, 48, 44, generator=torch.Generator().manual_seed(seed)) ** 3 * seed


def work(model, folder, store):
    """Calibrate and predict into a file as one command; return the digest of all that came out."""
    with resumable(store):
        normfix.calibrate_(model, [image(2), image(3)], tile=16, blocks=Blocks(store=store))
        normfix.write_prediction(
            model, image(4), folder / "out.npy", 16, engine="stages", blocks=Blocks(store=store)
        )
    found = hashlib.sha256((folder / "out.npy").read_bytes())
    for name, value in model.named_buffers():
        found.update(name.encode() + value.numpy().tobytes())
    (folder / "out.npy").unlink()
    return found.hexdigest()


def counted(folder):
    """Write a byte for every block that is computed."""
    compute = Work.__call__

    def call(self, number):
        with (folder / "computed").open("ab", buffering=0) as file:
            file.write(b".")
        return compute(self, number)

    Work.__call__ = call


def whole(store):
    """Return how many blocks the journals hold."""
    return sum(f.read_bytes().count(b'"block":') for f in store.glob("normfix-run/*/journal.jsonl"))


def begun(model, folder, store):
    """Return the id of a process that runs it and writes the digest when it is done."""
    child = os.fork()
    if not child:
        (folder / "digest").write_text(work(model, folder, store))
        os._exit(0)
    return child


def killed(child, store, until, delay):
    """Kill a process some time after so many blocks are whole; tell whether it died of it."""
    while whole(store) < until:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def main(folder, seed, points):
    torch.manual_seed(0)
    model = normfix.convert(Tangled(), image(1)).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    work(model, folder, None)  # captures the network and proves its stages, in blocks too
    model.load_state_dict(before)
    counted(folder)
    expected = work(model, folder, None)
    total = (folder / "computed").stat().st_size
    (folder / "computed").unlink()
    model.load_state_dict(before)
    rng, store = random.Random(seed), folder / "store"
    store.mkdir()
    moments = sorted(rng.sample(range(1, total - 4), points))
    deaths = [killed(begun(model, folder, store), store, until, rng.random() * 0.02) for until in moments]
    os.waitpid(begun(model, folder, store), 0)
    found = {
        "killed": deaths,
        "same": (folder / "digest").read_text() == expected,
        "blocks": total,
        "computed": (folder / "computed").stat().st_size,
        "left": sorted(path.name for path in store.iterdir()),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
