"""prepare_finetune and its adapters, each training a real small network through the real framework."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normfix
from normfix.layers import BatchRenorm2d

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)) ** 2
ERRORS = pytest.mark.filterwarnings("ignore")  # of the frameworks' own


@pytest.fixture(scope="module")
def converted():
    """A network converted to BatchRenorm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 1, 1)
    )
    return normfix.convert(net, IMAGES, "batchrenorm").model


@pytest.fixture
def model(converted):
    """A copy of it, in train mode."""
    return copy.deepcopy(converted).train()


def patches(count=8):
    """Batches of two patches and what the network should learn of them: their negative."""
    generator = torch.Generator().manual_seed(2)
    return [(x, 1 - x) for x in torch.rand(count, 2, 1, 16, 16, generator=generator)]


def _trained(model, run, optimizer, batches, accumulate=1):
    for number, (x, y) in enumerate(batches, 1):
        ((model(x) - y).square().mean() / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_a_plain_loop_learns_and_keeps_its_promises(model):
    """Three lines in a loop: the loss falls, the schedule is warm, and the last steps change no statistic."""
    run = normfix.prepare_finetune(model, total_steps=20, hold=0.5)
    optimizer = torch.optim.AdamW(run.groups, lr=0.03)
    run.follow(optimizer)
    batches = patches(10)

    def loss():
        with torch.no_grad():
            return sum((copy.deepcopy(model).eval()(x) - y).square().mean() for x, y in batches)

    before, layer = loss(), model[1]
    assert layer.r_max == 3  # a calibrated network starts at the end of the ramp
    _trained(model, run, optimizer, batches)
    mean = layer.running_mean.clone()
    model.train()  # as loops do every epoch
    assert layer.held
    _trained(model, run, optimizer, batches)
    assert torch.equal(layer.running_mean, mean)
    assert run.steps == 20
    assert loss() < 0.5 * before


def test_without_holding_statistics_move_to_the_end(model):
    """Negative control: with hold=0 the layer trains on batches until the last step."""
    run = normfix.prepare_finetune(model, total_steps=4, hold=0)
    optimizer = torch.optim.AdamW(run.groups, lr=0.01)
    run.follow(optimizer)
    _trained(model, run, optimizer, patches(4))
    mean = model[1].running_mean.clone()
    model(patches(1)[0][0])
    assert not torch.equal(model[1].running_mean, mean)


def test_vectors_have_no_weight_decay(model):
    """Biases and affine vectors stand in a group of their own; together the groups are all parameters, once."""
    groups = normfix.prepare_finetune(model, total_steps=10).groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert [p.dim() for p in groups[0]["params"]] == [4, 4]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))


def test_only_the_named_parameters_train(model):
    """Patterns choose; one that names nothing is refused."""
    groups = normfix.prepare_finetune(model, total_steps=10, trainable=("1.*",)).groups
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.weight", "1.bias"]
    assert len(groups) == 1
    with pytest.raises(normfix.NormfixError, match="NF247"):
        normfix.prepare_finetune(model, total_steps=10, trainable=("head.*",))


@pytest.mark.parametrize(("steps", "momentum"), [(10, 0.1), (500, 0.02), (100_000, 0.01)])
def test_momentum_follows_the_length_of_the_run(model, steps, momentum):
    """Running statistics are renewed ten times in a run, within bounds."""
    normfix.prepare_finetune(model, total_steps=steps)
    assert model[1].momentum == pytest.approx(momentum)


def test_accumulation_counts_optimizer_steps(model):
    """Eight batches accumulated by four are two steps."""
    run = normfix.prepare_finetune(model, total_steps=2)
    optimizer = torch.optim.SGD(run.groups, lr=0.01)
    run.follow(optimizer)
    _trained(model, run, optimizer, patches(8), accumulate=4)
    assert run.steps == 2


def test_mixed_precision_trains(model):
    """Under autocast in bfloat16 statistics stay float32 and finite."""
    run = normfix.prepare_finetune(model, total_steps=3)
    optimizer = torch.optim.SGD(run.groups, lr=0.01)
    run.follow(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        _trained(model, run, optimizer, patches(3))
    assert model[1].running_mean.dtype == torch.float32
    assert model[1].running_mean.isfinite().all()


def test_a_run_resumed_in_the_ramp_is_the_run_that_was_not_interrupted():
    """Stopped at step 4 of 10, with everything in new objects, the other steps give the same bits."""

    def begin():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), BatchRenorm2d(4), nn.Conv2d(4, 1, 1), nn.ZeroPad2d(1))
        run = normfix.prepare_finetune(model, total_steps=10, hold=0.2)
        optimizer = torch.optim.AdamW(run.groups, lr=0.01)
        run.follow(optimizer)
        return model, run, optimizer

    whole, parts = begin(), begin()
    batches = patches(10)
    _trained(*whole, batches)
    _trained(*parts, batches[:4])
    assert parts[0][1].r_max > 1 or parts[0][1].d_max > 0
    saved = copy.deepcopy([part.state_dict() for part in parts])
    parts = begin()
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    _trained(*parts, batches[4:])
    for name, value in whole[0].state_dict().items():
        assert torch.equal(parts[0].state_dict()[name], value), name
    assert parts[0][1].held


@pytest.mark.parametrize("other", [{"total_steps": 20}, {"total_steps": 10, "hold": 0.5}])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_is_not_resumed_as_one_of_another_length(other, frozen):
    """Its state would silently bring the length that it was prepared with; one of the same length goes on."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Identity() if frozen else BatchRenorm2d(4))
    run = normfix.prepare_finetune(model, total_steps=10)
    run.step()
    fresh = normfix.prepare_finetune(copy.deepcopy(model), **other)
    with pytest.raises(ValueError, match="held from step 9, and this one is held from step"):
        fresh.load_state_dict(run.state_dict())
    assert fresh.steps == 0
    same = normfix.prepare_finetune(copy.deepcopy(model), total_steps=10)
    same.load_state_dict(run.state_dict())
    assert same.steps == 1


def test_statistics_are_measured_anew_after_averaging(model):
    """The averaged weights' own statistics: calibrate_ on the averaged network leaves no residual."""
    run = normfix.prepare_finetune(model, total_steps=8)
    optimizer = torch.optim.AdamW(run.groups, lr=0.05)
    run.follow(optimizer)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for part in (patches(8)[:4], patches(8)[4:]):
        _trained(model, run, optimizer, part)
        averaged.update_parameters(model)
    summary = normfix.calibrate_(averaged.module, IMAGES)
    assert max(site.mean_shift for site in summary.sites) < 1e-5


def lightning_task(net, run):
    """A LightningModule that trains a network and keeps the means it is validated with, and those it should have."""
    pl = pytest.importorskip("pytorch_lightning")

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.run, self.seen, self.measured = net, run, [], []

        def training_step(self, batch, _):
            return (self.net(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch, _):
            self.seen.append(self.net[1].running_mean.clone())
            self.measured.append(normfix.calibrate(self.net, IMAGES).model[1].running_mean)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.run.groups, lr=0.01)

    return Task()


@pytest.mark.slow
@ERRORS
def test_lightning_trains_resumes_and_recalibrates(model, tmp_path):
    """A LightningModule: steps counted under accumulation, statistics measured before validation, state kept."""
    pl = pytest.importorskip("pytorch_lightning")
    from normfix.integrations.lightning import FineTuningCallback

    def fit(net, epochs, checkpoint=None):
        run = normfix.prepare_finetune(net, total_steps=8)
        task = lightning_task(net, run)
        trainer = pl.Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=2,
            accelerator="cpu",
            callbacks=[FineTuningCallback(run, IMAGES)],
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = torch.utils.data.DataLoader(patches(8), batch_size=None)
        trainer.fit(task, data, data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return run, task

    again = copy.deepcopy(model)
    run, task = fit(model, 1)
    assert run.steps == 4
    torch.testing.assert_close(task.seen[-1], task.measured[-1], rtol=1e-5, atol=1e-6)
    resumed, _ = fit(again, 2, tmp_path / "last.ckpt")
    assert resumed.steps == 8
    assert again[1].held


@pytest.mark.slow
@ERRORS
def test_lightning_validates_averaged_weights_with_their_own_statistics(model, tmp_path):
    """Where a callback swaps an average in for validation, the average is what is measured."""
    pl = pytest.importorskip("pytorch_lightning", minversion="2.6")
    from normfix.integrations.lightning import FineTuningCallback

    run = normfix.prepare_finetune(model, total_steps=4)
    task = lightning_task(model, run)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[FineTuningCallback(run, IMAGES), pl.callbacks.EMAWeightAveraging(decay=0.5)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(patches(4), batch_size=None)
    trainer.fit(task, data, data)
    torch.testing.assert_close(task.seen[-1], task.measured[-1], rtol=1e-5, atol=1e-6)


@ERRORS
def test_ignite_trains_and_recalibrates(model):
    """An Ignite trainer with an evaluator: steps counted once per optimizer step, statistics measured anew."""
    engine = pytest.importorskip("ignite.engine")
    from normfix.integrations.ignite import FineTuningHandler

    run = normfix.prepare_finetune(model, total_steps=8)
    optimizer = torch.optim.AdamW(run.groups, lr=0.01)
    handler = FineTuningHandler(run, IMAGES)
    trainer = engine.create_supervised_trainer(model, optimizer, nn.functional.mse_loss)
    evaluator = engine.create_supervised_evaluator(model)
    handler.attach(trainer, optimizer, evaluator)
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda _: evaluator.run(patches(1)))
    trainer.run(patches(4), max_epochs=1)
    assert run.steps == 4
    mean = model[1].running_mean.clone()
    torch.testing.assert_close(
        normfix.calibrate(model, IMAGES).model[1].running_mean, mean, rtol=1e-5, atol=1e-6
    )
    trainer.run(patches(4), max_epochs=2)  # goes on: attached once, counted once
    assert run.steps == 8
    fresh = FineTuningHandler(normfix.prepare_finetune(copy.deepcopy(model), total_steps=8))
    fresh.load_state_dict(handler.state_dict())
    assert fresh.run.steps == 8


@ERRORS
def test_ignite_leaves_errors_to_those_who_asked_for_them(model):
    """A handler of errors that is added later hears of one, and may end the run; without any it is raised."""
    engine = pytest.importorskip("ignite.engine")
    from normfix.integrations.ignite import FineTuningHandler

    def failing():
        trainer = engine.Engine(lambda *_: 1 / 0)
        run = normfix.prepare_finetune(model, total_steps=8)
        FineTuningHandler(run).attach(trainer, torch.optim.SGD(run.groups, lr=1e-3))
        return trainer

    heard = []
    with pytest.raises(ZeroDivisionError):
        failing().run(patches(1))
    trainer = failing()
    trainer.add_event_handler(engine.Events.EXCEPTION_RAISED, heard.append)
    trainer.run(patches(1))
    assert [type(error) for error in heard] == [ZeroDivisionError]


@pytest.mark.slow
@ERRORS
@pytest.mark.parametrize("library", ["accelerate", "transformers", "timm"])
def test_the_blocks_of_other_frameworks_run(model, library, tmp_path, monkeypatch):
    """What the page shows trains through the real framework: 8 batches are 4 steps, and no statistic is stale."""
    pytest.importorskip(library)
    pytest.importorskip("accelerate")  # transformers' Trainer needs it as well
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    found = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (block,) = (b for b in found if f"from {library}" in b)
    before = copy.deepcopy(model.state_dict())
    names = {
        "normfix": normfix,
        "torch": torch,
        "nn": nn,
        "model": model,
        "images": IMAGES,
        "batches": patches(8),
    }
    exec(compile(block, library, "exec"), names)
    run = names["run"]
    assert run.steps == 4
    assert run.schedule.steps == 4
    assert model[1].held
    assert not torch.equal(model[0].weight, before["0.weight"])
    measured = normfix.calibrate(model, IMAGES).model[1].running_mean
    torch.testing.assert_close(model[1].running_mean, measured, rtol=1e-5, atol=1e-6)


def test_a_step_that_timm_skips_does_not_count(model):
    """A gradient that overflows makes no step, in timm's scaler and here."""
    optim, utils = pytest.importorskip("timm.optim"), pytest.importorskip("timm.utils")
    run = normfix.prepare_finetune(model, total_steps=4)
    optimizer = optim.create_optimizer_v2(run.groups, opt="adamw", lr=1e-3)
    run.follow(optimizer)
    scaler = utils.NativeScaler(device="cpu")
    ((x, y),) = patches(1)
    for factor in (1.0, float("inf"), 1.0):
        scaler((model(x) - y).square().mean() * factor, optimizer)
        optimizer.zero_grad()
    assert run.steps == 2


def test_a_wrapper_that_would_not_tell_is_refused(model):
    """Lookahead steps without running hooks: following it would count nothing, following what it wraps counts."""
    optim = pytest.importorskip("timm.optim")
    run = normfix.prepare_finetune(model, total_steps=4)
    inner = torch.optim.AdamW(run.groups, lr=1e-3)
    outer = optim.Lookahead(inner)
    for follow in (run.follow, run.schedule.follow):
        with pytest.raises(ValueError, match="follow the optimizer inside"):
            follow(outer)
    run.follow(inner)
    outer.step()
    assert run.steps == 1


def test_following_twice_counts_once(model):
    """A loop that follows the optimizer and a callback that does so too count each step once."""
    run = normfix.prepare_finetune(model, total_steps=4)
    optimizer = torch.optim.SGD(run.groups, lr=1e-3)
    first = run.follow(optimizer)
    run.follow(optimizer)
    _trained(model, run, optimizer, patches(2))
    assert run.steps == 2
    first.remove()
    _trained(model, run, optimizer, patches(1))
    assert run.steps == 3


def test_a_step_that_a_fused_optimizer_skips_does_not_count(model):
    """A GradScaler leaves the skipping to a fused optimizer, whose step is called all the same."""
    run = normfix.prepare_finetune(model, total_steps=4)
    optimizer = torch.optim.SGD(run.groups, lr=1e-3, fused=True)
    run.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    ((x, y),) = patches(1)
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale((model(x) - y).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert run.steps == 2


def test_a_second_optimizer_takes_its_own_options(model):
    """An optimizer writes its learning rate into the groups it is given; the next one does not inherit it."""
    run = normfix.prepare_finetune(model, total_steps=4)
    torch.optim.AdamW(run.groups, lr=1.0)
    again = torch.optim.AdamW(run.groups, lr=1e-3)
    assert [group["lr"] for group in again.param_groups] == [1e-3, 1e-3]


def test_a_second_run_trains_what_the_first_held(model):
    """Held at the end of a run and recalibrated, layers track batches again in the next, without a call of train()."""
    run = normfix.prepare_finetune(model, total_steps=1, hold=1.0)
    run.recalibrate(IMAGES)
    assert model[1].held
    run = normfix.prepare_finetune(model, total_steps=4, hold=0.0)
    mean = model[1].running_mean.clone()
    _trained(model, run, torch.optim.SGD(run.groups, lr=1e-3), patches(1))
    assert not torch.equal(model[1].running_mean, mean)


def test_momentum_may_be_nothing(model):
    """A momentum of 0 is a choice: statistics stay those of the calibration."""
    run = normfix.prepare_finetune(model, total_steps=4, momentum=0.0)
    mean = model[1].running_mean.clone()
    _trained(model, run, torch.optim.SGD(run.groups, lr=1e-3), patches(2))
    assert torch.equal(model[1].running_mean, mean)


def test_a_shared_parameter_trains_under_each_of_its_names():
    """A pattern may name a parameter by the second place it stands in."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3), BatchRenorm2d(1), nn.Conv2d(1, 1, 3))
    net[2].weight = net[0].weight
    run = normfix.prepare_finetune(net, total_steps=4, trainable=("2.*",))
    assert [p is net[0].weight for group in run.groups for p in group["params"]] == [True, False]
    assert not net[0].bias.requires_grad


def test_parameters_that_cannot_train_are_left_alone():
    """Integers that stand among the parameters stay as they are."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3), BatchRenorm2d(1))
    net.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    run = normfix.prepare_finetune(net, total_steps=4)
    assert not net.table.requires_grad
    assert all(p is not net.table for group in run.groups for p in group["params"])


@pytest.mark.parametrize("steps", [torch.rand(1, 1, 8, 8), None, "100"])
def test_steps_that_are_no_number_are_named(model, steps):
    """An example input, which the other verbs take there, is told from a number of steps; numpy's numbers are ones."""
    with pytest.raises(TypeError, match="total_steps is a number"):
        normfix.prepare_finetune(model, steps)
    assert normfix.prepare_finetune(model, total_steps=np.int64(4)).groups


@pytest.mark.parametrize(
    "wrong",
    [
        {"momentum": 1.5},
        {"momentum": -0.1},
        {"momentum": float("nan")},
        {"weight_decay": -0.01},
        {"weight_decay": float("nan")},
        {"weight_decay": float("inf")},
        {"hold": float("nan")},
    ],
)
def test_numbers_that_would_spoil_the_run_are_refused(model, wrong):
    """Nothing of the network is changed by then: its layers keep their momentum, its parameters whether they train."""
    before = [(p.requires_grad, p.clone()) for p in model.parameters()]
    momenta = [getattr(module, "momentum", None) for module in model.modules()]
    with pytest.raises(ValueError, match=next(iter(wrong))):
        normfix.prepare_finetune(model, 10, trainable=("*bias",), **wrong)
    after = list(model.parameters())
    assert all(
        p.requires_grad is grad and torch.equal(p, value)
        for p, (grad, value) in zip(after, before, strict=True)
    )
    assert [getattr(module, "momentum", None) for module in model.modules()] == momenta
