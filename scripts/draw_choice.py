"""Draw docs/choice.png, labelled nuclei with live tiles, constants of whole images, and the recommended ones.

    pip install ".[demo]" matplotlib && pip install --no-deps stardist
    python scripts/draw_choice.py

stardist's labelled columns that the demo network never saw, enlarged 3.5 times; each half of them is predicted with
constants of the other, one is shown, and Dice is the mean over both.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

import normfix
from normfix.demo.network import WINDOW, nuclei_unet

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "choice.png"
ROWS = 1280

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "benchmarks"))
    matplotlib.use("Agg")
    from choosing import labelled, zoomed
    from matplotlib import pyplot as plt

    image, truth = (t[:, :, :ROWS].contiguous() for t in zoomed(*labelled(), 3.5))
    found = normfix.choose(nuclei_unet(), image, labels=truth[0, 0].numpy(), window=WINDOW)
    print(found)
    record, shown = found.record, found.places
    scores = {c.name: c.mean for c in (*record.candidates, *record.references)}
    live = next(c.name for c in record.references if "tiles" in c.name)
    predictions = dict(shown.predictions)
    panels = {"image": shown.image[0]}
    for name in (live, "whole", record.recommended):
        panels[f"{name}\nDice {scores[name]:.3f}"] = predictions[name][0]
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3), layout="constrained")
    for panel, (name, values) in zip(axes, panels.items(), strict=True):
        low, high = np.percentile(values, (1, 99)) if name == "image" else (0, 1)
        panel.imshow(values, cmap="gray" if name == "image" else "viridis", vmin=low, vmax=high)
        panel.contour(shown.labels, [0.5], colors="tab:orange", linewidths=0.8)
        panel.set_title(name, fontsize=9)
        panel.axis("off")
    figure.savefig(OUT, dpi=100, bbox_inches="tight")
