"""The pytest plugin: it passes local networks, fails what is live or compares nothing, and is silent elsewhere."""

import pytest
import torch
from torch import nn

from normfix import pytest_plugin
from normfix.networks.quiet_imports import import_compiler
from normfix.proof.check import check

pytest_plugins = ("pytester",)

USES = """
    import torch
    from torch import nn

    def test_tiles(tile_invariant):
        torch.manual_seed(0)
        norm = nn.{norm}(4)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm).eval()
        print("tile", tile_invariant(net, torch.rand(1, 1, 96, 96){options}).tile)
"""


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    """Import torch's compiler first: pytester forgets modules that its runs import, and torch registers these once."""
    import_compiler()


@pytest.fixture
def local():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))


def test_passes_local_network(tile_invariant, local):
    """A network without live statistics passes."""
    assert tile_invariant(local, torch.rand(1, 1, 96, 96), tile=32).passed


def test_fails_live_network(tile_invariant, local):
    """A live InstanceNorm fails with its site named."""
    local[1] = nn.InstanceNorm2d(4)
    with pytest.raises(AssertionError, match=r"failed.*1 InstanceNorm; first 1/0/instance_norm/0"):
        tile_invariant(local, torch.rand(1, 1, 96, 96), tile=32)


def test_fails_inconclusive_check(tile_invariant, local):
    """Windows that cover the image prove nothing, which is not a pass."""
    with pytest.raises(AssertionError, match=r"inconclusive: NF407 tile: every window .* covers"):
        tile_invariant(local, torch.rand(1, 1, 96, 96), tile=128)


def test_takes_a_pipeline(tile_invariant, local):
    """A function predict(image) is compared on crops."""
    local.eval()
    with torch.no_grad():
        assert tile_invariant(local.forward, torch.rand(1, 1, 96, 96), tile=32, margin=8).passed


def write(pytester, norm="BatchNorm2d", options="", ini=""):
    pytester.makepyfile(USES.format(norm=norm, options=options))
    pytester.makeini("[pytest]\n" + ini)


@pytest.mark.parametrize(
    ("flags", "ini", "options", "tile"),
    [
        (["--normfix-tile", "24"], "", "", 24),
        ([], "normfix_tile = 40", "", 40),
        (["--normfix-tile", "24"], "normfix_tile = 40", "", 24),
        (["--normfix-tile", "24"], "", ", tile=48", 48),
    ],
    ids=["option", "ini", "option before ini", "test before option"],
)
def test_defaults_come_from_options_and_ini(pytester, flags, ini, options, tile):
    """The command line counts more than the ini file, and the test itself more than both."""
    write(pytester, options=options, ini=ini)
    result = pytester.runpytest_inprocess("-s", "-p", "no:randomly", *flags)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*tile ({tile}, {tile})*"])


def test_no_threshold_passes_a_live_norm_by_accident(pytester):
    """A live norm fails in a suite of its own; no option excuses it below what it does."""
    write(pytester, norm="InstanceNorm2d", ini="normfix_threshold = 0.01\nnormfix_tile = 32")
    pytester.runpytest_inprocess("-p", "no:randomly").assert_outcomes(failed=1)


@pytest.mark.slow
def test_a_failure_leaves_a_report(pytester):
    """--normfix-report DIR holds a page named after the test; a pass leaves none."""
    folder = pytester.path / "not" / "there"
    write(pytester, norm="InstanceNorm2d", options=", tile=32")
    pytester.runpytest_inprocess("-p", "no:randomly", f"--normfix-report={folder}").assert_outcomes(failed=1)
    (page,) = folder.glob("*test_tiles*.html")
    assert "Failed: tiles are up to" in page.read_text(encoding="utf-8")
    page.unlink()
    write(pytester, options=", tile=32")
    pytester.runpytest_inprocess("-p", "no:randomly", f"--normfix-report={folder}").assert_outcomes(passed=1)
    assert list(folder.iterdir()) == []


def test_a_failure_is_said_in_ten_lines_cause_first(pytester):
    """What is wrong and what to do, then which network, image and tile; torch's own log is not part of it."""
    write(pytester, norm="InstanceNorm2d", options=", tile=32")
    lines = pytester.runpytest_inprocess("-p", "no:randomly").outlines
    said = [line.removeprefix("E").strip() for line in lines if line.startswith("E")]
    assert len(said) <= 10
    assert "1 statistic is computed from the tile (1 InstanceNorm" in said[0]
    assert "normfix convert" in said[0]
    assert "Sequential on an image of 1x1x96x96, tiles of 32x32" in said[1]
    assert not any("torch.__trace" in line for line in lines)


def test_an_image_without_a_scaling_is_said_in_ten_lines(pytester):
    """What normfix refuses shows the test's own line and what to do, none of normfix's."""
    pytester.makepyfile("""
        import numpy as np
        from torch import nn

        def test_tiles(tile_invariant):
            tile_invariant(nn.Conv2d(1, 1, 3), np.zeros((1, 1, 64, 64), np.uint16), tile=32)
    """)
    lines = pytester.runpytest_inprocess("-p", "no:randomly").outlines
    shown = lines[lines.index(next(line for line in lines if "= FAILURES =" in line)) + 2 :]
    shown = shown[: next(n for n, line in enumerate(shown) if "short test summary" in line)]
    assert len([line for line in shown if line]) <= 10
    assert any("NF107" in line and "scaling" in line for line in shown)


def test_a_threshold_that_is_no_number_is_a_usage_error(pytester):
    """A typing mistake in the ini file stops the test instead of passing it."""
    write(pytester, ini="normfix_threshold = lax")
    pytester.runpytest_inprocess("-p", "no:randomly").assert_outcomes(errors=1)


@pytest.mark.slow
def test_a_suite_that_does_not_use_it_is_unchanged(pytester):
    """Installed but unused: the same tests, the same output, and neither torch nor reports are imported."""
    pytester.makepyfile("""
        import sys

        def test_alone():
            assert "torch" not in sys.modules
            assert "normfix.reporting" not in sys.modules
            assert "normfix.api" not in sys.modules
    """)
    plain = pytester.runpytest_subprocess("-q", "-p", "no:randomly", "-p", "no:normfix", "--durations=0")
    used = pytester.runpytest_subprocess("-q", "-p", "no:randomly", "--durations=0")
    used.assert_outcomes(passed=1)

    def told(result):
        return [line for line in result.outlines if line and "s call" not in line and " in " not in line]

    assert [line for line in told(used) if "setup" not in line and "teardown" not in line] == [
        line for line in told(plain) if "setup" not in line and "teardown" not in line
    ]
    assert used.errlines == plain.errlines


def test_a_page_that_cannot_be_written_does_not_hide_why_the_test_fails(pytester):
    """A file has the name of the folder."""
    write(pytester, "InstanceNorm2d", ", tile=32")
    (pytester.path / "taken").write_text("")
    result = pytester.runpytest_inprocess("-p", "no:randomly", "--normfix-report", "taken")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*AssertionError: failed: 1 statistic*", "*--normfix-report taken: no page*"]
    )


def test_cases_have_pages_of_their_own(tmp_path):
    """Names of cases may differ in signs alone, and be longer than a file's name."""
    verdict = check(nn.Conv2d(1, 1, 3, padding=1), torch.rand(1, 1, 8, 8), tile=32)
    for test in ("t.py::t[a/b]", "t.py::t[a-b]", f"t.py::t[{'x' * 300}]", "t.py::t"):
        pytest_plugin._write(tmp_path, test, verdict)
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "t-py-t.html").exists()
