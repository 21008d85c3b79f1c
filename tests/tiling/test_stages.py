"""Stages over blocks give what the whole image gives: statistics, predictions, refusals."""

import shutil

import pytest
import torch
from networks import TOLERANCE, Below, CountedLate, MaskedLate, PooledLate, ReadByNumber
from optional import needs_newer_torch
from streamed_networks import (
    Anisotropic3d,
    ChannelsLast,
    Corners,
    Deep,
    DividesBySize,
    OneSize,
    Positions,
    StillLive,
    Tangled,
    TwoLevels,
    Wraps,
)
from torch import nn
from torch.testing import assert_close

import normfix
from normfix.conversion.planning import decide
from normfix.conversion.rewriting import rewrite
from normfix.errors import NormfixError
from normfix.images.sources import TensorImage
from normfix.layers.moments import measure, merge
from normfix.networks.calling import Caller
from normfix.networks.graph.raising import unlifted
from normfix.scanning.sites import survey
from normfix.tiling.stages import maps as maps_of_stages
from normfix.tiling.stages import reach as reaches_of
from normfix.tiling.stages import scheduling
from normfix.tiling.stages.engines import Local
from normfix.tiling.stages.execution import execute
from normfix.tiling.stages.journal import Unwritten
from normfix.tiling.stages.program import captured_program
from normfix.tiling.stages.reuse import reuse_
from normfix.tiling.stages.running import Run, Statistic
from normfix.tiling.stages.schedule import forecast
from normfix.tiling.stages.scheduling import largest_difference, schedule
from normfix.tiling.stages.store import Store


class Case:
    """A network whose norms are frozen layers, captured and cut; its statistics are noise until calibrated."""

    def __init__(self, net, images, stride):
        self.net, self.images, self.stride = net.double().eval(), images, stride
        self.plan = decide(survey(self.net, Caller(), images[0]).sites, model="", to="frozen")
        self.model = rewrite(self.net, self.plan)
        self.paths = [d.target for d in self.plan.converted]
        self.program = captured_program(self.model, Caller(), images[0], self.paths)
        self.measured = schedule(self.program, stride=stride, measured=self.paths, outputs=True)

    def streamed(self, images=None, tile=16, budget=None, folder=None, workers=1):
        """Return {path: (mean, var)} and the outputs, freshly measured."""
        images = self.images if images is None else images
        found, wholes = {}, {}

        def statistic(path):
            layer = self.model.get_submodule(path)

            def settle(parts):
                moments = merge(*(merge(*blocks) for blocks in parts))
                groups = next(d for d in self.plan.converted if d.target == path).site.layer.groups
                mean, var = pooled(moments, groups)
                layer.set_statistics_(mean, var)
                found[path] = (mean, var)

            return Statistic(path, (0, 2, 3, 4), measure, settle)

        def sink(number, node, shape, dtype, blocks):
            if node in self.program.outputs:
                wholes[number] = Whole(torch.full(shape, torch.nan, dtype=dtype))
                return wholes[number]
            return None

        with torch.no_grad():
            for path in self.paths:  # nothing may survive from another run
                layer = self.model.get_submodule(path)
                layer.running_mean.fill_(7)
                layer.running_var.fill_(3)
        self.program.refresh_(self.model)
        self.store = Store(budget, folder)
        execute(
            self.measured,
            [TensorImage(x) for x in images],
            tile=(tile,) * (images[0].dim() - 2),
            store=self.store,
            statistics=[statistic(path) for path in self.paths],
            settled=lambda: self.program.refresh_(self.model),
            sink=sink,
            engine=Local(workers),
        )
        return found, [wholes[n].array for n in sorted(wholes)]


class Whole:
    def __init__(self, array):
        self.array = array

    def write(self, index, value):
        self.array[index] = value


def pooled(moments, groups):
    """Return mean and variance of groups of channels, from scratch."""
    mean = moments.mean.reshape(groups, -1)
    centre = mean.mean(1, keepdim=True)
    var = moments.var.reshape(groups, -1).mean(1) + (mean - centre).square().mean(1)
    return centre[:, 0], var


def _images(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, 1, *size, generator=generator, dtype=torch.float64) ** 3 * 5 for size in sizes]


@pytest.fixture(scope="module")
def unet():
    """A U-Net of ten instance norms and its image."""
    torch.manual_seed(0)
    return Case(TwoLevels(), _images((64, 48)), (4, 4))


@pytest.fixture(scope="module")
def tangled():
    torch.manual_seed(0)
    return Case(Tangled(), _images((48, 64)), (2, 2))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("tile", [5, 13, 32, 1000])
def test_predictions_equal_the_original_for_any_block(unet, tile):
    """With one image the stages measure and predict what the original network predicts, to 1e-11."""
    _, (output,) = unet.streamed(tile=tile)
    assert_close(output, unet.net(unet.images[0]), **TOLERANCE[torch.float64])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("tile", [5, 16, 1000])
def test_statistics_equal_an_untiled_pass(tangled, tile):
    """Every mean and variance is that of an untiled float64 pass to 1e-9 relative, whatever the blocks."""
    expected = {}
    for name in ("first", "second", "third", "fourth"):
        layer = tangled.net.get_submodule(name)

        def note(module, args, name=name):
            expected[name] = measure(args[0])

        layer.register_forward_pre_hook(note)
    tangled.net(tangled.images[0])
    for name in expected:
        tangled.net.get_submodule(name)._forward_pre_hooks.clear()
    found, _ = tangled.streamed(tile=tile)
    for name, moments in expected.items():
        groups = 2 if name == "second" else 4
        mean, var = pooled(moments, groups)
        assert_close(found[name][0], mean, rtol=1e-9, atol=1e-12)
        assert_close(found[name][1], var, rtol=1e-9, atol=0)


@torch.no_grad()
def test_in_place_operations_do_not_write_into_the_store(tangled):
    """A skip that later stages read again is as it was, though the network works in place on it."""
    _, (output,) = tangled.streamed(tile=16)
    assert_close(output, tangled.net(tangled.images[0]), **TOLERANCE[torch.float64])


@pytest.mark.slow
@torch.no_grad()
def test_three_dimensions_with_anisotropic_strides():
    """In 3D with strides (1, 2, 3) stages give the original's prediction."""
    torch.manual_seed(0)
    case = Case(Anisotropic3d(), _images((7, 24, 30)), (1, 2, 3))
    _, (output,) = case.streamed(tile=6)
    assert_close(output, case.net(case.images[0]), **TOLERANCE[torch.float64])


@pytest.mark.slow
@torch.no_grad()
def test_maps_with_channels_last():
    """Maps laid out (N, H, W, C) between stages are cut along the right dimensions."""
    torch.manual_seed(0)
    case = Case(ChannelsLast(), _images((30, 41)), (1, 1))
    _, (output,) = case.streamed(tile=11)
    assert_close(output, case.net(case.images[0]), **TOLERANCE[torch.float64])


@pytest.mark.slow
@torch.no_grad()
def test_several_outputs_at_several_depths():
    """A network with outputs of two resolutions has both written, each from its own stage."""
    torch.manual_seed(0)
    net = Deep().double().eval()
    image = _images((24, 40))[0]
    model = normfix.convert(net, image, output="coarse").model
    program = captured_program(model, lambda model, x: model(x), image, ["one", "two"])
    planned, wholes = schedule(program, stride=(2, 2)), {}

    def sink(number, node, shape, dtype, blocks):
        if node not in program.outputs:
            return None
        return wholes.setdefault(node, Whole(torch.full(shape, torch.nan, dtype=dtype)))

    execute(planned, [TensorImage(image)], tile=(10, 10), store=Store(), sink=sink)
    expected = list(net(image).values())
    for node, whole in zip(program.outputs, expected, strict=True):
        assert_close(wholes[node].array, whole, **TOLERANCE[torch.float64])


@pytest.mark.slow
@torch.no_grad()
def test_several_images_share_every_barrier(unet):
    """Images of different sizes give the population's statistics: those of the sequential passes."""
    images = _images((64, 48), (32, 40), (28, 24), seed=4)
    reference = normfix.convert(unet.net, images).model
    found, _ = unet.streamed(images, tile=24)
    for path in unet.paths:
        layer = reference.get_submodule(path)
        assert_close(found[path][0], layer.running_mean, rtol=1e-9, atol=1e-11)
        assert_close(found[path][1], layer.running_var, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_bits_do_not_depend_on_workers_or_budget(unet, tmp_path):
    """Workers and the memory budget change no bit of statistics or prediction."""
    statistics, (output,) = unet.streamed(tile=16)
    held = unet.store.budget.most
    for workers, budget in ((3, None), (1, 0), (2, held // 3)):
        again, (other,) = unet.streamed(tile=16, workers=workers, budget=budget, folder=tmp_path)
        assert torch.equal(other, output)
        assert all(
            torch.equal(a, b) for p in unet.paths for a, b in zip(again[p], statistics[p], strict=True)
        )
        assert unet.store.budget.most <= (held if budget is None else budget)
        assert unet.store.budget.most_on_disk == held
        assert not list(tmp_path.iterdir())  # what no later stage needs is deleted


@pytest.mark.slow
def test_values_are_freed_when_no_later_stage_needs_them(unet):
    """The most that is held at once is far less than all values, and nothing is held at the end."""
    unet.streamed(tile=32)
    sizes = [unet.measured.program.shapes((1, 1, 64, 48))[n] for s in unet.measured.stages for n in s.stores]
    assert unet.store.budget.most < 0.6 * sum(8 * torch.Size(size).numel() for size in sizes)
    assert unet.store.budget.used == 0


@pytest.mark.slow
def test_memory_and_disk_are_forecast(unet, tmp_path):
    """What a run will hold at most, in memory and on disk, is known to the byte before it starts."""
    images = _images((64, 48), (32, 40))
    for budget in (None, 0, 30_000):
        unet.streamed(images, tile=32, budget=budget, folder=tmp_path)
        expected = forecast(unet.measured, [tuple(x.shape) for x in images], unet.store.fresh_budget())
        assert expected.most == unet.store.budget.most
        assert expected.most_on_disk == unet.store.budget.most_on_disk


def test_a_folder_without_room_is_refused_before_anything_is_computed(unet, tmp_path, monkeypatch):
    """A disk that is too small for the run is an error at the start, with the bytes it needs."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(NormfixError, match=r"NF326.*1,000 free"):
        unet.streamed(tile=32, budget=0, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_beyond_the_budget_a_folder_is_needed(unet):
    """A budget that is too small without a folder is refused, and says what to do."""
    with pytest.raises(NormfixError, match=r"NF326.*--store"):
        unet.streamed(tile=32, budget=1000)


@needs_newer_torch("graphs hold more nodes between two norms")
def test_the_map_before_a_norm_is_stored_and_read_again_for_the_skip(unet):
    """Each stage leaves one map; skips cost no further one, and halos are those of one convolution."""
    assert all(len(stage.stores) <= 1 for stage in unet.measured.stages)
    for stage, reach in zip(unet.measured.stages, unet.measured.reaches, strict=True):
        assert all(
            side in (0, grid) for halo, grid in zip(reach.halo, reach.grid, strict=True) for side in halo
        ), stage


class Striped(nn.Module):
    """Takes multiples of 48 rows alone, which no power of two is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        torch._check(x.shape[2] % 48 == 0)
        y = self.conv(x)
        return self.conv(y.unflatten(2, (y.shape[2] // 48, 48)).flatten(2, 3))


class Asks(nn.Module):
    """Adds what is made of one of its extents: another at one size, which noise of other sizes does not show."""

    def __init__(self, made, dim):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
        self.made, self.dim = made, dim

    def forward(self, x):
        y = self.first(x)
        return self.last(y + self.made(y.shape[self.dim]))


MADE = {
    "an answer": lambda n: n == 17,
    "a tensor": lambda n: (torch.scalar_tensor(n) == 17).float(),
    "a count": lambda n: (torch.ones(n).sum() == 17).float(),
    "a place": lambda n: (torch.arange(n)[-1] == 16).float(),
}
"""What is added where a block reads 17 rows, 16 and one of halo; no stage is proved on as many."""


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_values_are_made_of_no_blocks_size(made):
    """Where it is asked for is said, before any image is read; control: a block has all channels."""
    image = torch.rand(1, 1, 96, 64)
    for dim in (2, 3):
        with pytest.raises(NormfixError, match=r"NF324.*with the size of the image"):
            schedule(captured_program(Asks(made, dim).eval(), Caller(), image, []), stride=(2, 2))
    assert schedule(captured_program(Asks(made, 1).eval(), Caller(), image, []), stride=(2, 2)).stages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "code"),
    [
        (DividesBySize, "NF324"),
        (Positions, "NF324"),
        (Corners, "NF324"),
        (Wraps, "NF324"),
        (StillLive, "NF323"),
        (OneSize, "NF320"),
        (Striped, "NF321"),
    ],
)
def test_what_blocks_would_get_wrong_is_refused(net, code):
    """A network whose parts differ from its whole is refused with a code, before any image is read."""
    torch.manual_seed(0)
    with pytest.raises(NormfixError, match=code):
        schedule(captured_program(net().eval(), Caller(), torch.rand(1, 1, 96, 64), []), stride=(2, 2))


class Gated(nn.Module):
    """Takes another value where its own is large, which noise never is."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.other = nn.Conv2d(1, 1, 3, padding=1), other

    def forward(self, x):
        x = self.conv(x)
        return torch.where(x > 1000, self.other(x), x)


@pytest.mark.parametrize(
    "net",
    [
        Gated(lambda x: x.flip(-1)),
        Gated(lambda x: x.roll(7, -1)),
        Gated(lambda x: x.cummax(-2).values),
        Gated(lambda x: x + torch.relu(x.sort(-1).values - 1000)),
        CountedLate(700),
    ],
    ids=["the opposite pixel", "around the border", "a running maximum", "sorted rows", "a count"],
)
def test_no_gate_hides_what_a_block_reads_far_away(net):
    """What a comparison swallows counts where the graph does not bound a stage, whatever the values."""
    program = captured_program(net.eval(), Caller(), torch.rand(1, 1, 32, 32), [])
    with pytest.raises(NormfixError, match="NF324"):
        schedule(program, stride=(1, 1))


def _turned_and_cut(x):
    """As axial shifts do it: what comes around the border is what was padded, and is cut away."""
    return nn.functional.pad(x, (3, 3)).roll(2, -1)[..., 3:-3]


@pytest.mark.parametrize("other", [lambda x: nn.functional.max_pool2d(x, 5, 1, 2), _turned_and_cut])
def test_what_a_block_reads_nearby_runs_behind_a_gate(other):
    """Control."""
    program = captured_program(Gated(other).eval(), Caller(), torch.rand(1, 1, 32, 32), [])
    planned = schedule(program, stride=(1, 1))
    assert largest_difference(planned, (1, 1, 48, 96), made=lambda noise: 1e4 * noise) == 0


def _of(*space):
    return TensorImage(torch.randn(1, 1, *space, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("net", "largest"),
    [
        (MaskedLate(700), 1 << 18),
        (MaskedLate(700), 1),
        (ReadByNumber(lambda n: n.clamp(max=700)), 1 << 18),
        (Below(700), 1),
        (PooledLate(700), 1 << 18),
    ],
    ids=["a mask", "a mask on strips", "rows that are read", "below the diagonal", "maxima"],
)
def test_places_that_count_far_from_the_corner_alone_are_found(monkeypatch, net, largest):
    """No short strip shows them, so what is made of places is proved at the image's size, or on strips as long."""
    monkeypatch.setattr(scheduling, "LARGEST", largest)
    program = captured_program(net.eval(), Caller(), torch.rand(1, 1, 32, 32), [])
    planned = schedule(program, stride=(1, 1))
    scheduling.require_images(planned, (1, 1), [_of(700, 20)])
    with pytest.raises(NormfixError, match=r"NF325 size \(705, \d+\)"):
        scheduling.require_images(planned, (1, 1), [_of(705, 20)])


def test_places_that_count_relative_to_a_block_are_exact():
    """Control: each row reads its neighbour by number."""
    net = ReadByNumber(lambda n: (n + 1).clamp(max=n.shape[0] - 1))
    program = captured_program(net.eval(), Caller(), torch.rand(1, 1, 32, 32), [])
    scheduling.require_images(schedule(program, stride=(1, 1)), (1, 1), [_of(705, 20)])


def test_blocks_that_are_too_large_to_be_compared_are_refused(monkeypatch):
    """Where maps start together every many pixels only, memory would not do."""
    monkeypatch.setattr(reaches_of, "_MOST", 1 << 11)
    program = captured_program(nn.Conv2d(1, 1, 3, 2).eval(), Caller(), torch.rand(1, 1, 32, 32), [])
    with pytest.raises(
        NormfixError, match="NF324 stage 0: its maps start at whole positions every 2x2 pixels"
    ):
        schedule(program, stride=(2, 2))


class PaddedAgain(nn.Module):
    """As MedNeXt does it: a transposed convolution ends a position short, a norm later a row in front makes up for it.

    `gated` takes a statistic of the short map by hand and applies it pixel by pixel, which reads nothing around.
    """

    def __init__(self, kernel=3, *, gated=False):
        super().__init__()
        self.first, self.gated = nn.Conv2d(1, 2, 3, padding=1), gated
        self.down = nn.Conv2d(2, 2, 3, 2, 1)
        self.up = nn.ConvTranspose2d(2, 2, kernel, 2, padding=kernel // 2)
        self.norm, self.last = nn.GroupNorm(2, 2), nn.Conv2d(2, 1, 1)

    def forward(self, x):
        y = self.first(x)
        z = self.norm(self.up(self.down(y)))
        if self.gated:
            z = torch.nn.functional.gelu(z)
            z = z * (z**2).mean((2, 3), keepdim=True).sqrt()
        return self.last(y + nn.functional.pad(z, (1, 0, 1, 0)))


@pytest.mark.zoo
@pytest.mark.parametrize("form", [{}, {"kernel": 5}, {"gated": True}], ids=["three", "five", "gated"])
@torch.no_grad()
def test_maps_that_are_a_position_short_between_stages(monkeypatch, form):
    """Blocks are given of them what a window of the image would have made, not a position more."""
    torch.manual_seed(0)
    (image,) = _images((48, 80))
    net = PaddedAgain(**form).double().eval()
    in_stages = {"tile": 16, "statistics": "per-image", "engine": "stages"}
    with monkeypatch.context() as planted:  # as long as the scale says
        planted.setattr(maps_of_stages, "_lost", lambda dims, *_: (0,) * len(dims))
        with pytest.raises(NormfixError, match="NF324 stage 1: it runs on no small block"):
            normfix.predict(net, image, **in_stages)
    assert (normfix.predict(net, image, **in_stages) - net(image)).abs().max() < 1e-12


class MakesItsKernel(nn.Module):
    """As UNet1DModel of diffusers does it: the kernel that halves a map is made of the map's dtype at each pass."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.GroupNorm(2, 2),
            nn.Conv2d(2, 1, 1),
        )
        self.register_buffer("taps", torch.tensor([0.25, 0.75, 0.75, 0.25]).outer(torch.ones(4) / 4))

    def forward(self, x):
        x = self.norm(self.first(x))
        kernel, each = x.new_zeros((2, 2, 4, 4)), torch.arange(2)
        kernel[each, each] = self.taps.to(x)
        return self.last(torch.nn.functional.conv2d(x, kernel, stride=2, padding=1))


@torch.no_grad()
def test_a_kernel_that_is_made_at_each_pass_is_no_map():
    torch.manual_seed(0)
    net, (image,) = MakesItsKernel().double().eval(), _images((32, 48))
    given = normfix.predict(net, image, tile=16, statistics="per-image", engine="stages")
    assert (given - net(image)).abs().max() < 1e-12


class Stamped(nn.Module):
    """Marks the corner of a map that is made as large as its own, as masks of shifted windows are, before a norm."""

    def __init__(self, make, counted):
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.GroupNorm(2, 2),
            nn.Conv2d(2, 1, 3, padding=1),
        )
        self.make, self.counted = make, counted

    def forward(self, x):
        x = self.first(x)
        made = self.make(x)
        if self.counted:
            return self.last(self.norm(x + 1e-3 * made.sum() * x.relu()))
        made[..., -8:-4, -8:-4] = 1
        return self.last(self.norm(x + made * 0))


@pytest.mark.zoo
@torch.no_grad()
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    "make", [lambda x: x.new_ones(x.shape[2:]), lambda x: x.new_full(x.shape[2:], 0.5), torch.ones_like]
)
def test_a_map_that_takes_its_dtype_alone_from_another_is_made_of_no_value(make, counted):
    """Its corner is no statistic of the image; the sum over it is one, and is put together from blocks."""
    torch.manual_seed(0)
    net, (image,) = Stamped(make, counted).double().eval(), _images((48, 64))
    given = normfix.predict(net, image, tile=16, statistics="per-image", engine="stages")
    assert (given - net(image)).abs().max() < 1e-12


@pytest.mark.slow
def test_a_halo_one_pixel_short_is_found(tangled):
    """The proof of a schedule fails if one stage's halo is one grid cell short on one side."""
    from dataclasses import replace

    assert largest_difference(tangled.measured, (1, 1, 64, 32)) < 1e-12
    for number, reach in enumerate(tangled.measured.reaches):
        if not any(reach.halo[0]):
            continue
        short = replace(reach, halo=((0, reach.halo[0][1]), reach.halo[1]))
        reaches = (*tangled.measured.reaches[:number], short, *tangled.measured.reaches[number + 1 :])
        assert largest_difference(replace(tangled.measured, reaches=reaches), (1, 1, 64, 32)) > 1e-6


def test_a_network_without_norms_is_cut_at_its_convolutions():
    """Stages need no statistic: a plain stack of convolutions runs in stages of one convolution each."""
    net = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(4))).double()
    program = captured_program(net, Caller(), torch.rand(1, 1, 32, 32).double(), [])
    planned = schedule(program, stride=(1, 1))
    assert len(planned.stages) == 4
    assert all(reach.halo == ((1, 1), (1, 1)) for reach in planned.reaches)


@pytest.mark.slow
@torch.no_grad()
def test_ragged_sizes_are_proved_where_the_network_is_exact_at_them():
    """A network may take sizes that its stride does not divide; the proof says if blocks do too."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, 2, padding=1), nn.LeakyReLU(), nn.Conv2d(2, 1, 3, padding=1)
    ).double()
    image = _images((37, 51))[0]
    program = captured_program(net, Caller(), image[:, :, :36, :50], [])
    planned, wholes = schedule(program, stride=(2, 2), rests=[(1, 1)]), []

    def sink(number, node, shape, dtype, blocks):
        wholes.append(Whole(torch.full(shape, torch.nan, dtype=dtype)))
        return wholes[-1]

    execute(planned, [TensorImage(image)], tile=(10, 14), store=Store(), sink=sink)
    assert_close(wholes[-1].array, net(image), **TOLERANCE[torch.float64])


class WritesOver(nn.Module):
    """Only the activation after the norm may write over its operand."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x):
        read_twice = self.conv(x)
        passed_on = torch.nn.functional.dropout(x, 0.5, training=False)
        return read_twice + read_twice.relu() + passed_on.relu() + x.relu() + self.norm(x).relu()


def test_an_activation_writes_only_over_what_nothing_else_reads():
    """The image, what dropout hands through in eval and a value with a second reader stay as they are."""
    net, x = WritesOver().eval(), torch.randn(1, 2, 8, 8)
    before, expected = x.clone(), net(x)
    body = unlifted(torch.export.export(net, (x,)))
    reuse_(body.graph)
    body.recompile()
    assert [n.target for n in body.graph.nodes].count(torch.ops.aten.relu_.default) == 1
    with torch.no_grad():
        assert torch.equal(body(x), expected)
    assert torch.equal(x, before)


def test_a_program_that_writes_into_its_operands_is_refused(monkeypatch):
    """If neither names nor decomposing made an operator functional, it would write into the store."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(1, 1, 3, padding=1))
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", lambda program, table: program)
    monkeypatch.setattr("normfix.tiling.stages.program.make_functional_", lambda graph: False)
    with pytest.raises(NormfixError, match=r"NF322 aten\.relu_\.default: it writes into its operand"):
        captured_program(net.eval(), Caller(), torch.rand(1, 1, 32, 32), [])


class _Unread(TensorImage):
    """An image of any size, of which nothing may be read."""

    def __init__(self, *shape):
        super().__init__(torch.zeros((), dtype=torch.float64).expand(shape))

    def read(self, window):
        raise AssertionError(f"{window} was read")


@pytest.mark.parametrize(("size", "tile"), [((2**31, 64), 512), ((2**15, 2**15), 16)])
def test_images_of_more_blocks_than_are_kept_account_of_are_refused_before_one_is_made(
    unet, monkeypatch, size, tile
):
    """A file that states a size that nobody stored is an error at once, with what to do about it."""
    monkeypatch.setattr(Run, "blocks", lambda *_: pytest.fail("blocks were made"))
    with pytest.raises(NormfixError, match=r"NF338.*--tile") as caught:
        execute(unet.measured, [_Unread(1, 1, *size)], tile=(tile, tile), store=Store(None, None))
    assert "x".join(map(str, size)) in str(caught.value)


def test_blocks_are_counted_without_making_them(unet):
    """Of several images, ragged ones too, as many as are made, and no more than a rim beside."""
    images = [TensorImage(x) for x in _images((64, 48), (32, 40), (68, 52))]
    run = Run(
        unet.measured,
        images,
        (16, 16),
        Store(None, None),
        {},
        lambda: None,
        lambda *_: None,
        frozenset(),
        Unwritten(),
    )
    for stage in unet.measured.stages:
        assert len(run.blocks(stage)) == run.count(stage)
