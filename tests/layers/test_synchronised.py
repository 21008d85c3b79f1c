"""SyncBatchRenorm: two processes with unequal batches are one process with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import normfix
from normfix.layers import BatchRenorm2d, synchronise

SHARES = [(3, 5), (8, 0), (1, 7)]
FEW = [0, 1, 2]
"""Values per channel over all ranks."""
STEPS = 3
EXACT = {"rtol": 1e-10, "atol": 1e-10}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run both ranks once for all shares, plain and synchronised, and load what they measured."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(str(folder), port), nprocs=2)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def _rank(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    measured = {}
    for index, share in enumerate(SHARES):
        for kind, make in (("sync", synchronise), ("plain", lambda model: model)):
            if kind == "plain" and 0 in share:
                continue
            model = DistributedDataParallel(make(_model()))
            batches = [_batch(step).split(share)[rank] for step in range(STEPS)]
            for name, value in _train(model, model.module, batches, world=2).items():
                measured[f"{index}.{kind}.{name}"] = value.contiguous()
    for kind, make in (("sync", synchronise), ("plain", lambda model: model)):
        network = make(_converted())
        batches = [_batch(step)[:, :1].split(SHARES[0])[rank] for step in range(STEPS)]
        for name, value in _fine_tuned(network, DistributedDataParallel, batches, world=2).items():
            measured[f"tuned.{kind}.{name}"] = value.contiguous()
    for values in FEW:
        layer = synchronise(nn.Sequential(BatchRenorm2d(3, momentum=None))).train()
        own = torch.randn(values if rank else 0, 3, 1, 1, requires_grad=True)
        layer(own).sum().backward()
        assert own.grad.isfinite().all()
        measured |= {f"few{values}.{name}": value for name, value in layer[0].state_dict().items()}
    save_file(measured, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def _model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        BatchRenorm2d(4, momentum=0.2),
        nn.ReLU(),
        BatchRenorm2d(4, r_max=1.2, d_max=0.1),
    ).double()
    for layer in (model[1], model[3]):
        layer.set_statistics_(torch.randn(4), torch.rand(4) + 0.5)
        nn.init.normal_(layer.weight)
    return model


def _converted():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1)
    ).double()
    images = torch.rand(2, 1, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    return normfix.convert(net, images, "batchrenorm").model.train()


def _fine_tuned(network, wrap, batches, world):
    """Follow the page on fine-tuning for a run whose last step is held; return the state and the steps counted."""
    run = normfix.prepare_finetune(network, total_steps=len(batches), hold=1 / len(batches))
    wrapped = wrap(network)
    optimizer = torch.optim.SGD(run.groups, lr=0.05)
    run.follow(optimizer)
    for x in batches:
        optimizer.zero_grad()
        ((wrapped(x) - x).pow(2).sum() * world / 8).backward()
        optimizer.step()
    return {**network.state_dict(), "steps": torch.tensor([run.steps, run.schedule.steps])}


def _batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, dtype=torch.double, generator=generator) * (step + 1)


def _train(run, model, batches, world):
    """Train with a loss that is the mean over all ranks' samples: DDP divides gradients by the world size."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    measured = {}
    for step, x in enumerate(batches):
        x = x.clone().requires_grad_()
        y = run(x)
        optimizer.zero_grad()
        (y.pow(3).sum() * world / 8).backward()
        measured |= {f"y{step}": y.detach(), f"x{step}": x.grad / world}
        measured |= {f"{name}.grad{step}": p.grad.clone() for name, p in model.named_parameters()}
        measured |= {f"{name}{step}": value.clone() for name, value in model.named_buffers()}
        optimizer.step()
    return measured


@pytest.mark.parametrize("index", range(len(SHARES)), ids=[f"{a}+{b}" for a, b in SHARES])
def test_two_ranks_are_one_process(results, index):
    """Outputs, all gradients and buffers equal those of one process to 1e-10 in float64."""
    torch.set_num_threads(1)
    whole = _model()
    expected = _train(whole, whole, [_batch(step) for step in range(STEPS)], world=1)
    for name, value in expected.items():
        ranks = [r[f"{index}.sync.{name}"] for r in results]
        if name[:-1] in ("x", "y"):
            assert_close(torch.cat(ranks), value, **EXACT)
        else:
            for got in ranks:
                assert_close(got, value, **EXACT)


def test_without_synchronisation_they_differ(results):
    """The comparison can fail: plain layers under DDP give other outputs."""
    whole = _model()
    expected = _train(whole, whole, [_batch(0)], world=1)["y0"]
    assert (torch.cat([r["0.plain.y0"] for r in results]) - expected).abs().max() > 0.1


@pytest.fixture(scope="module")
def expected():
    """What one process on the joined batches ends with."""
    torch.set_num_threads(1)
    batches = [_batch(step)[:, :1] for step in range(STEPS)]
    return _fine_tuned(_converted(), lambda network: network, batches, world=1)


def test_fine_tuning_on_two_ranks_is_fine_tuning_on_one(results, expected):
    """prepare_finetune under DDP: both ranks end with the weights and statistics of one process on the joined batch."""
    assert expected["steps"].tolist() == [STEPS, STEPS]
    start = _converted().state_dict()
    assert (expected["1.running_mean"] - start["1.running_mean"]).abs().max() > 1e-3
    for name, value in expected.items():
        for rank in results:
            assert_close(rank[f"tuned.sync.{name}"], value, **EXACT)


def test_fine_tuning_without_synchronisation_differs(results, expected):
    """The comparison can fail: under DDP alone statistics are those of one rank's share."""
    for rank in results:
        assert (rank["tuned.plain.1.running_mean"] - expected["1.running_mean"]).abs().max() > 1e-3


@pytest.mark.parametrize("values", FEW)
def test_a_batch_without_a_variance_leaves_the_statistics(results, values):
    """No value at all, or one, has no unbiased variance: the running ones stay finite and as they were."""
    for rank in results:
        mean, var = rank[f"few{values}.running_mean"], rank[f"few{values}.running_var"]
        assert mean.isfinite().all()
        assert var.isfinite().all()
        assert (torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))) is (values < 2)
        assert rank[f"few{values}.num_batches_tracked"] == 1


def test_without_a_process_group_it_is_batchrenorm():
    """In a single process a synchronised model trains as the plain one does."""
    plain, synced = _model(), synchronise(_model())
    batches = [_batch(step) for step in range(STEPS)]
    assert_close(_train(synced, synced, batches, 1), _train(plain, plain, batches, 1), rtol=0, atol=0)
