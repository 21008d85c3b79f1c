"""prove: each step of the proof of a fine-tuned network holds for a sound one and fails for a spoilt one."""

import copy
import json
import xml.etree.ElementTree as ET

import factories
import numpy as np
import pytest
import torch
from torch import nn

import normfix
from normfix.conversion import lowering
from normfix.errors import NormfixError
from normfix.layers import BatchRenorm2d, FrozenNorm2d
from normfix.networks.calling import Caller
from normfix.networks.numerics import BOUNDLESS
from normfix.networks.provenance import provenance_of
from normfix.proof import forms, prove
from normfix.proof.forms import Form
from normfix.proof.steps import residual, same
from normfix.records.measurements import CalibrationSummary, SiteStatistics
from normfix.records.verdicts import Proof, ProofStep
from normfix.reporting.report import text_of
from normfix.storage import reloading
from normfix.storage.programs import NotExportable, WrongProgramError, write_beside
from normfix.storage.saving import save_program, sourced, write_draft

STEPS = [
    *("residual", "tiles", "used"),
    *("reloaded", "frozen", "folded", "stock", "portable", "exported"),
]


def images():
    """Two images of different sizes and brightness: statistics of a population, not of one of them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 1, *size, generator=generator) * f for size, f in (((64, 80), 1), ((96, 64), 2))]


def train(model, steps=3):
    """Fine-tune a network for some steps, as the documentation says; statistics are left as training does."""
    run = normfix.prepare_finetune(model.train(), total_steps=steps)
    optimizer = torch.optim.AdamW(run.groups, lr=0.02)
    run.follow(optimizer)
    for x in torch.rand(steps, 2, 1, 32, 32, generator=torch.Generator().manual_seed(2)):
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return run


@pytest.fixture(scope="module")
def converted():
    """A small U-Net converted to BatchRenorm on two images; tests take copies."""
    return normfix.convert(factories.tiny_unet(), images(), "batchrenorm").model


@pytest.fixture(scope="module")
def trained(converted):
    """The same after training, with the statistics of training."""
    model = copy.deepcopy(converted)
    train(model)
    return model


@pytest.fixture
def tuned(trained):
    """The same, measured anew on whole images."""
    return normfix.calibrate(trained, images()).model.eval()


@pytest.fixture(autouse=True)
def _no_gradients():
    """As prove runs its steps; the network is trained before, in a fixture of the module."""
    with torch.no_grad():
        yield


@pytest.fixture
def bench(tuned, tmp_path):
    """What forms of the tuned network are made of and compared on."""
    return bench_of(tuned, tmp_path, "factories:tiny_unet")


def bench_of(model, folder, source=None, caller=None):
    known = sourced(provenance_of(model), source, {})
    inputs = (images()[0], torch.randn(1, 1, 64, 64) * 0.3)
    return Form(model.eval(), caller or Caller(), known, inputs, folder, trusted=source is not None)


@pytest.fixture
def no_forms(monkeypatch):
    """Leave the forms out, which take processes of their own."""
    monkeypatch.setattr(prove, "_FORMS", ())


def nudged(model, by=1e-6):
    """Return a copy with one weight changed by a relative amount."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0].mul_(1 + by)
    return model


# --- the whole proof ---


@pytest.mark.slow
def test_a_saved_fine_tuned_network_proves_itself(bench, tmp_path, run):
    """From a folder and image files, one command makes every step, and the report lists them all."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    write_draft(folder, bench.model, bench.caller, bench.provenance)
    for number, image in enumerate(images()):
        np.save(tmp_path / f"{number}.npy", image[0, 0].numpy())
    code, out, _ = run(
        "prove", folder, tmp_path / "0.npy", tmp_path / "1.npy",
        *("--arch", "factories:tiny_unet", "--tile", 16, "--format", "json"),
        *("--report", tmp_path / "proof.html", "--report", tmp_path / "proof.json"),
    )  # fmt: skip
    proof = Proof.from_json(json.loads(out))
    assert [step.name for step in proof.steps] == STEPS
    assert {s.name: s.status for s in proof.steps if s.status != "passed"} == {"portable": "inapplicable"}
    assert proof.passed
    assert code == 0
    assert proof.verdict.tile == (16, 16)
    assert all(name in (tmp_path / "proof.html").read_text() for name in STEPS)
    assert json.loads((tmp_path / "proof.json").read_text()) == json.loads(out)


@pytest.mark.slow
@pytest.mark.usefixtures("no_forms")
def test_statistics_of_training_are_no_proof(trained, tmp_path, run):
    """Fine-tuned and not calibrated: the residual fails, exits 1 and names the next step."""
    folder = tmp_path / "trained"
    folder.mkdir()
    bench = bench_of(copy.deepcopy(trained), tmp_path, "factories:tiny_unet")
    write_draft(folder, bench.model, bench.caller, bench.provenance)
    np.save(tmp_path / "0.npy", images()[0][0, 0].numpy())
    words = ("prove", folder, tmp_path / "0.npy", "--arch", "factories:tiny_unet", "-v")
    code, out, _ = run(*words)
    assert code == 1
    assert out.startswith("failed: residual failed (")
    assert "NF249" in out
    assert "normfix calibrate" in out
    assert "  tiles: passed" in out  # constants are constants, whatever their values


# --- residual, tiles, used ---


@pytest.mark.slow
@pytest.mark.usefixtures("no_forms")
def test_the_residual_is_of_the_population_of_all_images(tuned):
    """It passes on both images, whole or by window in stages, and fails on either alone."""
    assert normfix.prove(tuned, images()).passed
    windows = [normfix.open_image(image[0].numpy(), tuned, axes="CYX") for image in images()]
    assert normfix.prove(tuned, windows, blocks=normfix.Blocks(tile=32)).passed
    for image in images():
        assert normfix.prove(tuned, image).step("residual").status == "failed"


@pytest.mark.slow
@pytest.mark.usefixtures("no_forms")
def test_a_mask_of_the_calibration_belongs_to_the_proof(trained):
    """Statistics measured beside a mask pass with it and fail without."""
    (image, *_) = images()
    mask = torch.zeros(image.shape[2:])
    mask[:, :40] = 1
    model = normfix.calibrate(trained, image, mask=mask.numpy()).model
    assert normfix.prove(model, image, mask=mask.numpy()).passed
    assert normfix.prove(model, image).step("residual").status == "failed"


@pytest.mark.usefixtures("no_forms")
def test_carried_statistics_are_measured_too():
    """Running statistics that came from the original's training are not those of the images."""
    net = factories.batched().eval()
    with torch.no_grad():
        net[1].running_mean.fill_(0.5)
    model = normfix.convert(net).model
    assert normfix.prove(model, images()).step("residual").status == "failed"
    assert normfix.prove(normfix.calibrate(model, images()).model, images()).passed


@pytest.mark.parametrize("spoilt", [(0.0, float("nan")), (float("nan"), 0.0), (0.0, 1e-5)])
def test_the_worst_site_decides(spoilt):
    """A residual that is no number counts as boundless, wherever it stands among others."""
    sites = tuple(
        SiteStatistics(site=str(v), elements=1, spread=0, mean_shift=v, variance_ratio=(1, 1)) for v in spoilt
    )
    step = residual(CalibrationSummary(images=(), sites=sites), torch.float32)
    assert step.status == "failed"
    assert step.value in (1e-5, BOUNDLESS)


@pytest.mark.usefixtures("no_forms")
def test_a_norm_left_live_fails(tuned):
    """An instance norm in the place of a converted layer, or beside it, fails several steps and passes none of them."""
    tuned.first[1] = nn.InstanceNorm2d(4)
    proof = normfix.prove(tuned, images())
    assert not proof.passed
    assert [proof.step(name).status for name in ("residual", "tiles", "used")] == ["failed"] * 3


@pytest.mark.usefixtures("no_forms")
def test_a_layer_that_lost_its_statistics_fails(tuned):
    """A converted layer that tracks none any more is live in eval too, and there is nothing to re-measure."""
    tuned.first[1].running_mean = tuned.first[1].running_var = None
    proof = normfix.prove(tuned, images())
    assert [proof.step(name).status for name in ("residual", "tiles", "used")] == ["failed"] * 3
    assert "NF302" in proof.step("residual").note
    assert "batch_norm is live" in proof.step("used").note


@pytest.mark.usefixtures("no_forms")
def test_a_live_norm_added_since_fails(tuned):
    """A new head with an instance norm is not in the plan: its tiles are not claimed to be exact."""
    tuned.head = nn.Sequential(tuned.head, nn.Conv2d(1, 3, 1), nn.InstanceNorm2d(3), nn.Conv2d(3, 1, 1))
    proof = normfix.prove(tuned, images())
    assert [proof.step(name).status for name in ("residual", "tiles", "used")] == [
        "passed",
        "failed",
        "failed",
    ]
    assert "not in the plan" in proof.step("tiles").note


def test_what_was_not_converted_is_refused():
    """A network without a plan, or with one that converted nothing, has nothing to prove."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    for model in (net, normfix.convert(net, images()).model):
        with pytest.raises(NormfixError, match="NF248"):
            normfix.prove(model, images())


class Counting(nn.Module):
    """Counts its calls in a buffer, in eval too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def test_a_stopped_proof_leaves_the_network_as_it_was(tuned):
    """Stopped between steps, it gives buffers that forward passes change their values back."""

    def stop(stage, done, total):
        raise KeyboardInterrupt

    tuned.head = nn.Sequential(tuned.head, Counting())
    with pytest.raises(KeyboardInterrupt):
        normfix.prove(tuned, images(), progress=stop)
    assert tuned.head[1].calls == 0


# --- forms ---


@pytest.mark.slow
def test_a_folder_of_other_weights_is_seen(bench, monkeypatch):
    """Negative control: what is loaded answers, and it is not the network's answer; nor may the process die."""
    monkeypatch.setattr(reloading, "run_fresh", lambda script, folder: reloading.answer(folder) or "")
    monkeypatch.setattr(
        forms, "write_draft", lambda draft, model, *rest: write_draft(draft, nudged(model, 1), *rest)
    )
    step = forms.reloaded(bench)
    assert step.status == "failed"
    assert step.value > step.bound
    (bench.folder / "saved").rename(bench.folder / "first")
    monkeypatch.setattr(reloading, "run_fresh", lambda *_: "killed")
    dead = forms.reloaded(bench)
    assert (dead.status, dead.note) == ("failed", "killed")


@pytest.mark.slow
@pytest.mark.usefixtures("no_forms")
def test_a_program_of_batchrenorm_is_measured_anew(bench, trained):
    """A .pt2 of BatchRenorm layers opens with norms that can be measured: tuned it passes, trained it fails."""
    for model, status in ((bench.model, "passed"), (trained, "failed")):
        path = bench.folder / f"{status}.pt2"
        save_program(path, model, bench.caller, bench.provenance, write=write_beside)
        proof = normfix.prove(normfix.load(path), images())
        assert [step.status for step in proof.steps] == [status, "passed", "passed"]


@pytest.mark.slow
def test_what_a_fresh_process_cannot_do_is_open(tuned, tmp_path):
    """A local forward_fn, or a network no process can build or export, is inconclusive, which is no pass."""
    step = forms.reloaded(bench_of(tuned, tmp_path, caller=Caller(lambda model, image: model(image))))
    assert (step.status, "forward_fn" in step.note) == ("inconclusive", True)

    class Unexportable(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.data_ptr() else x

    model = normfix.convert(Unexportable(*factories.batched())).model
    bench = bench_of(model, tmp_path)
    step = forms.reloaded(bench)
    assert (step.status, "source=" in step.note) == ("inconclusive", True)
    assert forms.exported(bench).status == "inapplicable"


def test_the_frozen_form_has_the_same_bits(bench, monkeypatch):
    """Every BatchRenorm became FrozenNorm; one weight changed by a millionth fails."""
    assert forms.frozen(bench).status == "passed"
    form = lowering.freeze(bench.model).model
    assert not any(isinstance(m, BatchRenorm2d) for m in form.modules())
    assert sum(isinstance(m, FrozenNorm2d) for m in form.modules()) == 2
    freeze = lowering.freeze
    monkeypatch.setattr(forms, "freeze", lambda model: freeze(nudged(model)))
    assert forms.frozen(bench).status == "failed"


def test_a_norm_that_trains_in_eval_is_seen(bench):
    """A layer that does not obey eval is not its frozen form."""
    layer = bench.model.first[1]
    layer.hold_(False)
    layer.train = lambda mode=True: layer
    layer.training = True
    assert forms.frozen(bench).status == "failed"


def test_intercepted_norms_have_a_frozen_form(tmp_path):
    """A functional norm of groups, served inside its owner's forward, freezes to the same bits."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.head(nn.functional.group_norm(self.conv(x), 2))

    bench = bench_of(normfix.convert(Functional(), images(), "batchrenorm").model, tmp_path)
    assert forms.frozen(bench).status == "passed"
    assert forms.folded(bench).status == "inapplicable"
    assert "owner" in forms.folded(bench).note


@pytest.mark.parametrize(("by", "where"), [(1e-5, "in float64"), (0.5, "")])
def test_a_wrong_fold_is_seen(bench, monkeypatch, by, where):
    """Off by a hundred-thousandth it hides in float32's rounding and fails in float64; off by half it fails at once."""
    assert forms.folded(bench).status == "passed"
    fold = lowering.fold_backward_

    def wrong(conv, norm):
        fold(conv, norm)
        with torch.no_grad():
            conv.weight.view(-1)[0].mul_(1 + by)

    monkeypatch.setattr(lowering, "fold_backward_", wrong)
    step = forms.folded(bench)
    assert step.status == "failed"
    assert where in step.note
    assert (step.bound < 1e-9) is bool(where)


def test_stock_batch_norm_has_the_same_bits(bench, monkeypatch):
    """So does stock batch norm; a changed weight fails."""
    assert forms.stock(bench).status == "passed"
    lower = lowering.lower
    monkeypatch.setattr(forms, "lower", lambda model: lower(nudged(model)))
    assert forms.stock(bench).status == "failed"


@pytest.mark.slow
def test_the_original_class_where_it_has_a_place_for_the_statistics(bench, tmp_path, monkeypatch):
    """A batch norm's class takes them and a changed weight fails; an instance norm's does not apply."""
    assert forms.portable(bench).status == "inapplicable"
    assert "NF411" in forms.portable(bench).note
    model = normfix.calibrate(normfix.convert(factories.batched()).model, images()).model
    batched = bench_of(model, tmp_path, "factories:batched")
    assert forms.portable(batched).status == "passed"
    monkeypatch.setattr(forms, "returned", lambda model, base: nudged(forms.lower(model).model, 1))
    assert forms.portable(batched).status == "failed"
    assert forms.frozen(batched).status == "inapplicable"  # it was converted to frozen layers


def test_an_exported_program_of_other_weights_is_seen(bench, monkeypatch):
    """Negative control: the file is compared with the network on the images, to the bit."""

    def careless(path, model, *rest):
        free = ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
        example = (torch.rand(1, 1, 64, 64),)
        torch.export.save(
            torch.export.export(nudged(model), example, dynamic_shapes=free, strict=False), path
        )

    monkeypatch.setattr(forms, "save_program", careless)
    step = forms.exported(bench)
    assert step.status == "failed"
    assert 0 < step.value < 1e-4


@pytest.mark.parametrize(
    ("kind", "code", "status"),
    [(WrongProgramError, "NF226", "failed"), (NotExportable, "NF225", "inapplicable")],
)
def test_what_the_writer_of_programs_says_counts(bench, monkeypatch, kind, code, status):
    """Another output in the process without normfix is a failure; what cannot be captured has no such form."""

    def refuse(*_):
        raise kind(code, "no.")

    monkeypatch.setattr(forms, "save_program", refuse)
    assert forms.exported(bench).status == status


# --- what counts as a proof ---


def step(status, name="a"):
    return ProofStep(name=name, claim="c <b>", status=status, value=None, bound=None, note="n|")


def test_nothing_compared_is_no_pass():
    """No pair, a constant output and labels are inconclusive; another shape and NaN fail."""
    some, constant = torch.arange(4.0), torch.ones(4)
    assert same("a", "c", [], 0).status == "inconclusive"
    assert same("a", "c", [(constant, constant)], 0).status == "inconclusive"
    assert same("a", "c", [(some.long(), some.long())], 0).status == "inconclusive"
    assert same("a", "c", [(some[:2], some)], 0).status == "failed"
    assert same("a", "c", [(some * torch.nan, some)], 1).status == "failed"
    assert same("a", "c", [(some, some), (some + 1, some)], 0).status == "failed"
    assert same("a", "c", [(some, some)], 0).status == "passed"


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (("passed", "inapplicable"), "passed"),
        (("inapplicable", "inapplicable"), "inconclusive"),
        ((), "inconclusive"),
        (("passed", "inconclusive"), "inconclusive"),
        (("passed", "refused"), "failed"),
        (("inconclusive", "failed"), "failed"),
    ],
)
def test_a_proof_is_what_its_steps_are(statuses, status):
    """Inapplicable is no pass by itself, and whatever is open stays open; reports say the same."""
    proof = Proof(steps=tuple(map(step, statuses)), shifts=(), verdict=None)
    assert (proof.status, proof.passed) == (status, status == "passed")
    assert f"## normfix: {status}" in text_of(".md", proof)
    assert f"<title>normfix prove: {status}</title>" in text_of(".html", proof)


def test_reports_hold_every_step():
    """JUnit has a case for each, skipped where it does not apply; notes are escaped."""
    proof = Proof(steps=(step("passed"), step("inapplicable"), step("inconclusive")), shifts=(), verdict=None)
    suite = ET.fromstring(text_of(".xml", proof)).find("testsuite")
    assert [suite.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["3", "0", "1", "1"]
    assert [[child.tag for child in case] for case in suite] == [[], ["skipped"], ["error"]]
    assert "c &lt;b&gt;" in text_of(".html", proof)
    assert r"c \<b\>: n\|" in text_of(".md", proof)
