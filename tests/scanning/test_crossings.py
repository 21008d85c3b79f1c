"""Networks that branch by size, place or value: no prediction of one is wrong without a word."""

import logging

import pytest
import torch
import torch.nn.functional as F
from branching import BY_PLACE, BY_SIZE, BY_STATISTIC, BY_VALUE, LOCAL, Branching, tiles_of
from optional import needs_newer_torch

import normfix

QUICK = {
    "area",
    "odd height",
    "one width",
    "table",
    "centre",
    "where the corner",
    "windows",
    "padded if odd",
}
"""One case of each mechanism; the others are left to the zoo."""


def cases(*groups):
    named = {f"{number}: {name}": case for number, group in enumerate(groups) for name, case in group.items()}
    return [
        pytest.param(case, id=name, marks=() if name.partition(": ")[2] in QUICK else pytest.mark.zoo)
        for name, case in named.items()
    ]


def converted(case):
    """Convert, or return None where nothing was proved."""
    try:
        done = normfix.convert(case.network(), case.image())
    except normfix.NormfixError:
        return None
    return done if done.proof.passed else None


def difference(a, b):
    return float((a - b).abs().max() / b.std())


def predicted(caplog, model, image, tile, **options):
    """Predict; return the result, None where that was refused, and whether something was said of it."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="normfix"):
        try:
            result = normfix.predict(model, image, tile=tile, **options)
        except normfix.NormfixError as error:
            if error.code not in {"NF260", "NF264", "NF402", "NF409"}:
                raise
            return None, True
    said = any(code in message for message in caplog.messages for code in ("NF261", "NF262"))
    return result, said


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(BY_SIZE, BY_PLACE, BY_VALUE))
def test_no_branch_is_predicted_wrongly_without_a_word(case, caplog):
    """Refused, said, or right: by a reference of its own, the network's output of the whole image."""
    done = converted(case)
    for image in case.images() if done else ():
        tile = [-(-32 // stride) * stride for stride in done.scan.stride]
        result, said = predicted(caplog, done.model, image, tile)
        if result is None or said:
            continue
        with torch.no_grad():
            assert difference(result, done.model(image)) < 1e-3


@pytest.mark.parametrize("factor", [1, 2])
def test_a_branch_that_only_narrow_windows_take_is_tried(factor):
    """One that doubles them is refused by name; one that changes nothing is predicted."""
    image = torch.rand(1, 1, 96, 144, generator=torch.Generator().manual_seed(0))
    done = normfix.convert(Branching(lambda x: x * factor if x.shape[3] < 35 else x).eval(), image)
    assert done.proof.passed
    if factor == 1:
        assert difference(normfix.predict(done.model, image, tile=32), done.model(image).detach()) < 1e-3
        return
    with pytest.raises(normfix.NormfixError, match="W >= 35") as caught:
        normfix.predict(done.model, image, tile=32)
    assert caught.value.code == "NF260"


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(BY_SIZE, BY_PLACE))
def test_check_does_not_pass_where_another_network_runs(case):
    """Where tiles, stitched by an arithmetic of the test's own, are wrong, check fails, is inconclusive or says it."""
    done = converted(case)
    for image in case.images() if done else ():
        with torch.no_grad():
            wrong = (
                difference(tiles_of(done.model, image, done.scan.stride, done.scan.halo), done.model(image))
                > 1e-3
            )
        tile = [-(-32 // stride) * stride for stride in done.scan.stride]
        verdict = normfix.check(done.model, image, tile=tile)
        assert not (wrong and verdict.passed and not verdict.findings)


@pytest.mark.parametrize(
    ("name", "used"),
    [
        pytest.param("either", "measured", marks=needs_newer_torch("leaves the proof of it inconclusive")),
        pytest.param("nested", "graph", marks=pytest.mark.slow),
    ],
)
def test_more_reach_at_other_sizes_is_said_as_a_size(name, used):
    """Strips on the other side of a branch may reach beyond the bound: no rule is blamed, and sizes are stated."""
    done = converted(BY_SIZE[name])
    assert done is not None
    assert "NF244" in {finding.code for finding in done.scan.findings}
    assert done.scan.sizes.conditions
    # strips are as short as confirming the bound allows, and may stay on one side
    assert done.scan.reach.used == used


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(LOCAL))
def test_what_only_repeats_with_the_size_is_predicted(case, caplog):
    """Control: padding to multiples, windows and borders are neither refused nor remarked upon, and right."""
    done = converted(case)
    assert done is not None
    assert done.scan.sizes.conditions == ()
    assert "NF244" not in {finding.code for finding in done.scan.findings}
    for image in case.images():
        result, said = predicted(caplog, done.model, image, [-(-32 // s) * s for s in done.scan.stride])
        assert not said
        with torch.no_grad():
            assert difference(result, done.model(image)) < 1e-4


@pytest.mark.parametrize("case", cases(BY_VALUE))
def test_a_value_of_one_place_is_a_live_site(case):
    """A branch on a pixel, and a map computed from one, is named and refused."""
    scan = normfix.scan(case.network(), case.image())
    refused = [site for site in scan.live if site.refusal]
    assert refused
    assert not scan.tile_invariant


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(BY_STATISTIC))
@pytest.mark.parametrize("way", ["calibrated", "in stages", "per image"])
def test_geometry_follows_the_statistics(case, way, caplog):
    """Measured anew on another image, or for each image, statistics that open a branch bring its reach with them."""
    done = converted(case)
    assert done is not None
    for image in case.images():
        model, options = done.model, {}
        if way == "per image":
            options["statistics"] = "per-image"
        else:
            model = normfix.calibrate(model, image, **({"tile": 64} if way == "in stages" else {})).model
        result, _ = predicted(caplog, model, image, 32, engine="tiles", **options)
        if result is None:
            continue
        with torch.no_grad():
            whole = (case.network() if way == "per image" else model)(image)
        assert difference(result, whole) < 1e-3


def bordered(x, width):
    """A mean of neighbours of a map with a border, which is the same whatever its width, but for none."""
    y = F.avg_pool2d(F.pad(x, (width,) * 4, mode="replicate"), 3, 1, 1)
    return y[..., width : y.shape[2] - width, width : y.shape[3] - width]


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (lambda x: x * (1 + x.shape[3] // 64), ("W//64 + 1 == 2",)),
        (lambda x: x * min(x.shape[3].bit_length(), 6), ("W >= 36",)),
        (lambda x: x * torch.ones(x.shape[2:]).tril(), None),
        (lambda x: bordered(x, x.shape[3] // 64), ("W//64 == 1",)),
        pytest.param(lambda x: bordered(x, 3 + x.shape[3] % 2), (), marks=pytest.mark.slow),
        (lambda x: x + x.triu(), None),
        pytest.param(lambda x: x + x.clone().tril_(2), None, marks=pytest.mark.slow),
        (lambda x: x * torch.ones(x.shape[3]).sum() / torch.ones(x.shape[3]).sum(), ()),
        pytest.param(
            lambda x: x.permute(0, 2, 3, 1).tril(-1).permute(0, 3, 1, 2), (), marks=pytest.mark.slow
        ),
    ],
    ids=[
        "number",
        "no graph",
        "diagonal",
        "border",
        "any border",
        "side of it",
        "side in place",
        "cancelled",
        "over channels",
    ],
)
def test_windows_by_which_a_network_differs_are_conditions(way, expected):
    """A size in its arithmetic, sizes that no graph tells, a map that strips do not show; control: what cancels.

    What lies on one side of a diagonal moves with no window at all, so there is no geometry.
    """
    scan = normfix.scan(Branching(way).eval(), torch.rand(1, 1, 64, 96))
    if expected is None:
        assert scan.halo is None
        assert [finding.code for finding in scan.findings if finding.code == "NF213"]
        return
    assert tuple(c.text for c in scan.sizes.conditions) == expected


@pytest.mark.parametrize("bound", [60.0, torch.inf])
def test_a_bound_on_one_side_of_a_branch_is_found_in_another_magnitude(bound):
    """What the calibration image does not reach a larger one may; control: a bound that nothing reaches."""
    image = torch.randn(1, 1, 48, 96, generator=torch.Generator().manual_seed(0))
    done = normfix.convert(Branching(lambda x: x.clamp(max=bound) if x.shape[3] > 100 else x).eval(), image)
    bright = torch.randn(1, 1, 48, 160, generator=torch.Generator().manual_seed(1)) * 100
    if bound == torch.inf:
        assert difference(normfix.predict(done.model, bright, tile=32), done.model(bright).detach()) < 1e-3
        return
    with pytest.raises(normfix.NormfixError, match=r"NF260 .*W <= 100"):
        normfix.predict(done.model, bright, tile=32)


@pytest.mark.parametrize("asked", ["is_compiling", "a number"])
@pytest.mark.parametrize(("shape", "strip"), [((72, 64), (72, 64)), ((512, 1024), (16, 1024))])
def test_a_branch_that_hides_from_the_graph_shows_at_the_size_of_the_example(asked, shape, strip):
    """The same calls with another number: neither the census nor a graph sees it, and no strip that is tried."""

    def way(x):
        width = x.shape[3]
        seen = isinstance(width, int) if asked == "a number" else not torch.compiler.is_compiling()
        return x * (2.0 if seen and width == shape[1] else 1.0)

    network = Branching(way).eval()
    there = normfix.scan(network, torch.randn(1, 1, *shape))
    assert [c.text for c in there.sizes.conditions] == [f"H != {strip[0]} and W != {strip[1]}"]
    assert [f.code for f in there.findings] == ["NF244"]
    beside = normfix.scan(network, torch.randn(1, 1, shape[0], shape[1] + 16))
    assert beside.sizes.conditions == ()
    assert beside.findings == ()
