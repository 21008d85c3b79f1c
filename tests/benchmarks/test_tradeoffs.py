"""benchmarks/tradeoffs.py: tiles, mismatch and disparity see what they are for and nothing else; pieces resume."""

import json

import pytest
import torch
import tradeoffs
from click.testing import CliRunner
from tradeoff.data import Region
from tradeoff.measuring import disparity, measured
from tradeoff.networks import SETTINGS, build
from tradeoff.table import write_page

SETTING = SETTINGS["unet 2D"]


def region():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 288, 192, generator=generator) * torch.linspace(0, 1, 288)[:, None]
    return Region(x, (x > 0.5).float())


def network(norm):
    torch.manual_seed(0)
    return build("unet 2D", norm).eval()


@pytest.mark.parametrize("norm", ["batch", "batchrenorm", "instance tracked"])
def test_tiles_of_constants_are_the_whole(norm):
    """Windows, halo and phase are right: without a live statistic both tilings are the whole image's prediction."""
    row = measured(lambda _: network(norm), region(), SETTING)
    assert row["max_sd"] < 1e-4
    assert row["tiled"] == pytest.approx(row["untiled"], abs=1e-4)


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_a_live_norm_shows(norm):
    """Negative control: tiles of live statistics differ from each other."""
    assert measured(lambda _: network(norm), region(), SETTING)["max_sd"] > 0.1


def test_disparity_is_of_batch_statistics_only():
    """Batch norm on running statistics it never had shows; a norm that computes the same in both modes does not."""
    assert disparity(network("batch"), region(), SETTING, 2) > 0.01
    assert disparity(network("instance"), region(), SETTING, 2) == 0


def test_only_what_has_no_line_is_run(tmp_path, monkeypatch):
    """A benchmark that was stopped goes on behind the pieces that have a line."""
    results, ran = tmp_path / "results.jsonl", []
    pieces = [f"unet 2D, batch {batch}, seed {seed}" for seed in range(2) for batch in (1, 2, 8)]
    results.write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in pieces[:4]))

    class Recorded(tradeoffs.Piece):
        def run(self):
            ran.append((self.batch, self.seed))
            return {"batch": {"seconds": 1.0, "tiled": 0.5}}

    monkeypatch.setattr(tradeoffs, "domains", lambda ndim: (None, None))
    monkeypatch.setattr(tradeoffs, "Piece", Recorded)
    arguments = ["run", "--results", str(results), "--only", "unet 2D*", "--seeds", "2"]
    for _ in range(2):
        assert CliRunner().invoke(tradeoffs.main, arguments).exit_code == 0
    assert ran == [(2, 1), (8, 1)]
    assert [json.loads(line)["piece"] for line in results.read_text().splitlines()] == pieces


def test_the_page_shows_mean_and_spread_over_seeds(tmp_path):
    """A table's cell is mean ± standard deviation, and the text around the tables stays."""
    lines = [
        {
            "setting": "unet 2D",
            "batch": 2,
            "rows": {"group": {"tiled": tiled, "mismatch": 0.0, "seconds": 5.0}},
        }
        for tiled in (0.8, 0.9, 1.0)
    ]
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- tables: made by benchmarks/tradeoffs.py -->\nold\n<!-- end of tables -->\nafter\n"
    )
    write_page(lines, page)
    text = page.read_text()
    assert "| group | 0.900 ± 0.100 | 0.000 ± 0.000 | 5 |" in text
    assert "(3 seeds)" in text
    assert (text.startswith("before\n"), text.endswith("\nafter\n"), "old" in text) == (True, True, False)
    assert (tmp_path / "page" / "unet-2d.png").stat().st_size > 1000
