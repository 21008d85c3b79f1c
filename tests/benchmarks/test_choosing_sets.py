"""benchmarks/choosing_sets.py: strips share no pixel with their labels' neighbours, and the table says what was run."""

import json

import choosing_sets
import torch
from click.testing import CliRunner


def test_strips_are_parts_of_one_region():
    """Together they are the region, and labels are cut as images are."""
    x = torch.arange(8 * 6.0).reshape(1, 1, 8, 6)
    case = choosing_sets._strips(x, x, 4, lambda seed: None, (2, 2))
    assert torch.equal(torch.cat(case.images, 2), x)
    assert all(
        (image[0, 0].numpy() == own).all() for image, own in zip(case.images, case.labels, strict=True)
    )


def test_slices_of_the_brain_are_apart():
    """No slice that is tested is within 20 of one that is trained on."""
    train, test = (range(*choosing_sets._SLICES[name].indices(189)) for name in ("train", "test"))
    assert min(abs(a - b) for a in train for b in test) > 20


def test_the_table_has_means_and_spread(tmp_path):
    """Of several seeds the spread is that of their means, of one network that of the parts."""
    rows = [
        {"set": "nuclei 2D, instance", "seed": 0, "scores": {"whole": [0.8, 0.9]}},
        {"set": "nuclei 2D, instance", "seed": 1, "scores": {"whole": [0.9, 1.0]}},
        {"set": "nuclei 2D, demo network, zoom 1", "seed": 0, "scores": {"whole": [0.5, 0.7]}},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = CliRunner().invoke(choosing_sets.main, ["table", "--results", str(tmp_path / "r.jsonl")])
    assert "| whole | 0.600 ± 0.141 | 0.900 ± 0.071 |" in done.output
