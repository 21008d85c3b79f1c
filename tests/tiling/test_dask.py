"""A dask cluster of several processes computes the same bits, also when its workers die."""

import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from attentive import Attends
from distributed import KilledWorker, LocalCluster
from streamed_networks import Squeezed, Tangled
from torch.nn.functional import scaled_dot_product_attention

import normfix
from normfix import Blocks
from normfix.errors import NormfixError
from normfix.tiling.stages.blocks import Work
from normfix.tiling.stages.dask import Dask, _Workers

pytestmark = pytest.mark.slow


def _image(seed, height=48, width=44):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 1, height, width, generator=generator) ** 3 * seed


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes, each watched by a nanny that starts it again."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as found:
        yield found


@pytest.fixture(scope="module")
def model():
    """A converted network that is captured once."""
    torch.manual_seed(0)
    return normfix.convert(Tangled(), _image(1)).model


def _calibrated(model, images, **options):
    normfix.calibrate_(model, images, blocks=Blocks(tile=16, **options))
    return {name: value.clone() for name, value in model.named_buffers()}


def _same(one, other):
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_cluster_gives_the_bits_of_this_process(cluster, model, tmp_path):
    """Statistics of two images, one of them a file, and a prediction have the same bits; the store is empty then."""
    np.save(tmp_path / "b.npy", _image(3, 32, 40)[0, 0].numpy())
    (tmp_path / "store").mkdir()
    there = {"store": tmp_path / "store", "engine": "dask", "scheduler": cluster.scheduler_address}
    with (
        normfix.open_image(_image(2)[0, 0].numpy(), model) as a,
        normfix.open_image(tmp_path / "b.npy", model) as b,
    ):
        expected = _calibrated(model, [a, b])
        _same(_calibrated(model, [a, b], **there), expected)
        prediction = normfix.predict(model, b, tile=16, engine="stages")
        assert torch.equal(normfix.predict(model, b, blocks=Blocks(tile=16, **there)), prediction)
        normfix.write_prediction(model, b, tmp_path / "out.npy", blocks=Blocks(tile=16, **there))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), prediction[0].numpy())
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.zoo
def test_statistics_that_are_no_norms_travel(cluster, tmp_path):
    """Means and maxima are measured on workers by the same laws, to the same bits."""
    torch.manual_seed(0)
    squeezed = normfix.convert(Squeezed(), _image(1)).model
    images = [_image(2), _image(3, 32, 40)]
    expected = _calibrated(squeezed, images)
    there = {"store": tmp_path, "engine": "dask", "scheduler": cluster.scheduler_address}
    _same(_calibrated(squeezed, images, **there), expected)


@pytest.mark.zoo
@pytest.mark.parametrize("causal", [False, True])
def test_attention_travels(cluster, tmp_path, causal):
    """Keys and values that are stored, and a mask made pair by pair, are read by workers, to the same bits."""
    net = Attends(partial(scaled_dot_product_attention, is_causal=causal)).eval()
    own = {"statistics": "per-image", "engine": "stages"}
    there = {"store": tmp_path, "engine": "dask", "scheduler": cluster.scheduler_address}
    expected = normfix.predict(net, _image(2), tile=16, **own)
    assert torch.equal(normfix.predict(net, _image(2), blocks=Blocks(tile=16, **there), **own), expected)
    assert not list(tmp_path.iterdir())


class Killer:
    """Kills a worker by SIGKILL after so many blocks."""

    timed = False

    def __init__(self, cluster, after):
        self.cluster, self.left = cluster, after
        self.victim = None

    def begin(self, outlook):
        self.blocks = outlook.blocks

    def block(self, step):
        self.left -= 1
        if not self.left:
            self.victim = next(iter(self.cluster.workers.values())).pid
            os.kill(self.victim, signal.SIGKILL)


def test_a_worker_may_die(cluster, model, tmp_path):
    """A worker that is killed in the middle of a run changes no bit: its blocks are computed by others."""
    images = [_image(2), _image(4, 64, 80)]
    expected = _calibrated(model, images)
    killer = Killer(cluster, 30)
    there = {"store": tmp_path, "engine": "dask", "scheduler": cluster.scheduler_address}
    _same(_calibrated(model, images, **there, watch=killer), expected)
    assert killer.victim is not None
    assert killer.blocks > 60
    assert killer.victim not in {worker.pid for worker in cluster.workers.values()}


def test_a_cluster_goes_on_with_what_this_process_began(cluster, model, tmp_path, monkeypatch):
    """A run that was stopped here is continued on a cluster, to the same bits."""
    expected, compute, left = _calibrated(model, _image(2)), Work.__call__, [20]

    def stop(self, number):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return compute(self, number)

    monkeypatch.setattr(Work, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        _calibrated(model, _image(2), store=tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "normfix-run" / "0" / "journal.jsonl").read_text().count('"block":') == 19
    there = {"store": tmp_path, "engine": "dask", "scheduler": cluster.scheduler_address}
    _same(_calibrated(model, _image(2), **there), expected)


class Unsendable:
    """An image that no other process can have."""

    def __init__(self, array):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, index):
        return self._array[index]

    def __reduce__(self):
        raise TypeError("bound to this process")


def test_what_cannot_be_sent_is_refused(cluster, model, tmp_path):
    """An image object that does not travel is an error that says what to give instead."""
    there = {"store": tmp_path, "engine": "dask", "scheduler": cluster.scheduler_address}
    with (
        normfix.open_image(Unsendable(_image(2)[0, 0].numpy()), model) as image,
        pytest.raises(NormfixError, match=r"NF335.*bound to this process"),
    ):
        normfix.calibrate_(model, image, blocks=Blocks(tile=16, **there))


def test_errors_of_workers_keep_their_code(cluster, model, tmp_path):
    """An image that vanishes under the workers is the same error as here."""
    np.save(tmp_path / "b.npy", _image(3)[0, 0].numpy())
    (tmp_path / "store").mkdir()
    there = {"store": tmp_path / "store", "engine": "dask", "scheduler": cluster.scheduler_address}

    class Remover:
        timed = False

        def begin(self, outlook):
            (tmp_path / "b.npy").unlink()

    with (
        normfix.open_image(tmp_path / "b.npy", model) as b,
        pytest.raises(NormfixError, match=r"NF101|NF331"),
    ):
        normfix.calibrate_(model, b, blocks=Blocks(tile=16, watch=Remover(), **there))


def test_a_block_that_ends_every_worker_is_named():
    """Where dask gives up on a block, the error says which, and what to do."""

    class Future:
        key = "normfix-abc-17"

        def result(self):
            raise KilledWorker("normfix-abc-17", None, 3)

    with pytest.raises(NormfixError, match=r"NF336 block 17: .*--tile"):
        _Workers(None)._result(Future())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "dask"}, "NF334.*--scheduler"),
        ({"engine": "dask", "scheduler": "tcp://127.0.0.1:1"}, "NF334.*--store"),
        ({"scheduler": "tcp://127.0.0.1:1"}, "NF334.*--engine dask"),
    ],
)
def test_a_cluster_needs_an_address_and_a_store(model, options, message):
    """What is missing is named before anything is computed."""
    with pytest.raises(NormfixError, match=message):
        normfix.calibrate_(model, _image(2), blocks=Blocks(tile=16, **options))


def test_a_scheduler_that_does_not_answer_is_an_error():
    """No scheduler at the address is an error with the address."""
    with (
        pytest.raises(NormfixError, match=r"NF334 tcp://127\.0\.0\.1:1: "),
        Dask("tcp://127.0.0.1:1", patience=0.3).opened(),
    ):
        pass


def test_without_dask_it_says_what_to_install(monkeypatch):
    """Where dask.distributed is missing the error names the extra."""
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(NormfixError, match=r"NF333.*normfix\[dask\]"), Dask("tcp://127.0.0.1:1").opened():
        pass
