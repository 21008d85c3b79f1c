"""Draw docs/choice.png: where constants differ most on labelled nuclei, live tiles, whole images' and the recommended.

    pip install ".[demo]" matplotlib && pip install --no-deps stardist
    python scripts/draw_choice.py

stardist's labelled columns that the demo network never saw, enlarged 3.5 times; each half of them is predicted with
constants of the other, and Dice is the mean over both halves.
"""

import io
import sys
from pathlib import Path

import matplotlib

import normfix
from normfix.demo.network import WINDOW, nuclei_unet
from normfix.reporting.places import places

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
    record = found.record
    scores = {c.name: c.mean for c in (*record.candidates, *record.references)}
    live = next(c.name for c in record.references if "tiles" in c.name)
    best = record.candidates[0].name
    named = {drawing.name: drawing for drawing in places(found.places)[0].drawings}
    figure, panels = plt.subplots(1, 5, figsize=(11, 2.7), layout="constrained")
    for panel, name in zip(panels, ("image", "labels", live, "whole", best), strict=True):
        panel.imshow(plt.imread(io.BytesIO(named[name].png)), interpolation="nearest")
        panel.set_title(f"{name}\nDice {scores[name]:.3f}" if name in scores else name, fontsize=9)
        panel.axis("off")
    figure.savefig(OUT, dpi=100)
