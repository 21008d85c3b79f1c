"""Tables between two marks of a page whose other text is written by hand, and one figure per network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

__all__ = ["write_page"]

BEGIN, END = "<!-- tables: made by benchmarks/tradeoffs.py -->", "<!-- end of tables -->"
COLUMNS = {
    "untiled": "Dice, whole image",
    "tiled": "Dice, tiled",
    "mismatch": "tile mismatch",
    "max_sd": "largest difference of tiles, sd",
    "disparity": "train/eval disparity",
    "alone": "target, left alone",
    "recalibrated": "target, recalibrated",
    "fine-tuned": "target, fine-tuned",
    "both": "target, recalibrated, then fine-tuned",
    "seconds": "training, s",
}
Rows = dict[str, dict[str, list[float]]]
"""By variant and column, one value per seed."""


def write_page(lines: Sequence[dict[str, Any]], target: Path) -> None:
    """Write the tables into the page, and a figure per network beside it."""
    groups = defaultdict[tuple[str, int], list[dict[str, Any]]](list)
    for line in lines:
        groups[line["setting"], line["batch"]].append(line)
    text, figures = list[str](), defaultdict[str, dict[int, Rows]](dict)
    for (setting, batch), found in groups.items():
        rows = _gathered(found)
        figures[setting][batch] = rows
        text += [f"### {setting}, batch size {batch} ({len(found)} seeds)", "", *_table(rows), ""]
    folder = target.parent / target.stem
    folder.mkdir(exist_ok=True)
    for setting, batches in figures.items():
        name = f"{setting.replace(' ', '-').lower()}.png"
        _draw(setting, batches, folder / name)
        place = next(i for i, line in enumerate(text) if line.startswith(f"### {setting},"))
        text[place:place] = [f"![{setting}: seams, accuracy, transfer]({target.stem}/{name})", ""]
    answer = f"{target.stem}/accuracy-and-seams.png"
    _draw_answer(figures, target.parent / answer)
    text[:0] = [f"![Dice in tiles against tile mismatch, every norm and conversion a point]({answer})", ""]
    before, _, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    target.write_text(f"{before}{BEGIN}\n\n" + "\n".join(text) + f"\n{END}{after}", encoding="utf-8")


def _gathered(lines: Sequence[dict[str, Any]]) -> Rows:
    rows = defaultdict[str, dict[str, list[float]]](lambda: defaultdict(list))
    for line in lines:
        for variant, row in line["rows"].items():
            for column in COLUMNS:
                if row.get(column) is not None:
                    rows[variant][column].append(row[column])
    return rows


def _table(rows: Rows) -> list[str]:
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]
    heads = " | ".join(COLUMNS[c] for c in columns)
    lines = [f"| trained with | {heads} |", "| --- |" + " --- |" * len(columns)]
    most = max(len(row["tiled"]) for row in rows.values())
    for variant, row in rows.items():
        fewer = "" if len(row["tiled"]) == most else f" ({len(row['tiled'])} of {most} seeds)"
        lines.append(f"| {variant}{fewer} | " + " | ".join(_shown(c, row.get(c)) for c in columns) + " |")
    return lines


def _shown(column: str, values: list[float] | None) -> str:
    if not values:
        return ""
    spread = stdev(values) if len(values) > 1 else 0.0
    if column == "seconds":
        return f"{fmean(values):.0f}"
    if column == "max_sd":
        return f"{fmean(values):.2g}"
    return f"{fmean(values):.3f} ± {spread:.3f}"


def _draw(setting: str, batches: dict[int, Rows], path: Path) -> None:
    """Draw variants downwards; in each panel one mark per batch size or state, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    variants = list(next(iter(batches.values())))
    figure, (seams, accuracy, transfer) = plt.subplots(
        1, 3, figsize=(12, max(3.0, 0.42 * len(variants) + 1.2)), sharey=True, layout="constrained"
    )
    middle = 2 if 2 in batches else next(iter(batches))
    colors = dict(zip(sorted(batches), ("#9ecae1", "#3182bd", "#08306b"), strict=False))
    for number, (batch, rows) in enumerate(sorted(batches.items())):
        shift = (number - (len(batches) - 1) / 2) * 0.22
        for panel, column in ((seams, "mismatch"), (accuracy, "tiled")):
            _marks(panel, rows, variants, column, shift, "o", colors[batch], f"batch {batch}")
    states = {
        "alone": ("o", "#bdbdbd"),
        "recalibrated": ("D", "#e6550d"),
        "fine-tuned": ("s", "#31a354"),
        "both": ("^", "#756bb1"),
    }
    for column, (marker, color) in states.items():
        label = COLUMNS[column].removeprefix("target, ")
        _marks(transfer, batches[middle], variants, column, 0, marker, color, label)
    seams.set(title="tile mismatch (1 - Dice of two tilings)", yticks=range(len(variants)))
    seams.set_yticklabels(variants)
    seams.invert_yaxis()
    accuracy.set(title="Dice on unseen source, tiled")
    transfer.set(title=f"Dice on the target, tiled (batch {middle})")
    for panel in (seams, accuracy, transfer):
        panel.grid(axis="y", color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        panel.locator_params(axis="x", nbins=6)
    below = -0.45 / figure.get_figheight()
    for panel in (accuracy, transfer):  # below the axes, where no mark can be
        panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, below))
    figure.suptitle(setting)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_answer(figures: dict[str, dict[int, Rows]], path: Path) -> None:
    """Draw accuracy against tile mismatch: every norm and every conversion one point, with the spread over seeds.

    Those without any mismatch stand side by side in a band left of 0, the most accurate nearest to it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 4.2 * rows + 0.8), layout="constrained", squeeze=False
    )
    for unused in panels.flat[len(figures) :]:
        unused.set_axis_off()
    for panel, (setting, batches) in zip(panels.flat, figures.items(), strict=False):
        panel.locator_params(axis="x", nbins=6)
        batch = 2 if 2 in batches else next(iter(batches))
        _draw_points(panel, batches[batch])
        panel.set_title(f"{setting}, batch {batch}")
        panel.set(xlabel="tile mismatch (1 - Dice of two tilings)", ylabel="Dice in tiles")
        panel.spines[["top", "right"]].set_visible(False)
    variants = [_said(v) for batches in figures.values() for rows in batches.values() for v in rows]
    colours = [
        Line2D([], [], color=c, marker="o", ls="", label=f"trained with {n}") for n, c in _COLOURS.items()
    ]
    shown = [how for how in _MARKERS if any(how == other for _, other in variants)]
    marks = [Line2D([], [], color="0.3", marker=_MARKERS[how], ls="", label=how) for how in shown]
    figure.legend(handles=[*colours, *marks], loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


_COLOURS = {"instance": "C0", "instance tracked": "C9", "group": "C2", "batch": "C1", "batchrenorm": "C3"}
_MARKERS = {
    "as trained": "o",
    "frozen": "s",
    "windows": "^",
    "images": "v",
    "distilled": "D",
    "blend": "P",
    "frozen, per image": "X",
    "keys": "s",
    "256 keys": "d",
    "batchrenorm, fine-tuned": "*",
    "prepared": "<",
    "prepared, recalibrated": ">",
}


def _said(variant: str) -> tuple[str, str]:
    """Return what a variant was trained with, and what was made of it."""
    norm, _, how = variant.replace(" → ", ", ", 1).partition(", ")
    return norm, how or "as trained"


def _draw_points(panel: Any, rows: Rows) -> None:
    seamless = [v for v, row in rows.items() if not any(row["mismatch"])]
    seamless.sort(key=lambda variant: -fmean(rows[variant]["tiled"]))
    most = max(fmean(row["mismatch"]) + _deviation(row["mismatch"]) for row in rows.values())
    for variant, row in rows.items():
        norm, how = _said(variant)
        x, dx = fmean(row["mismatch"]), _deviation(row["mismatch"])
        if variant in seamless:
            x = -most * (seamless.index(variant) + 1) / 22
        panel.errorbar(
            x,
            fmean(row["tiled"]),
            _deviation(row["tiled"]),
            dx,
            _MARKERS[how],
            color=_COLOURS[norm],
            markersize=6,
            elinewidth=0.8,
        )
    if seamless:
        panel.axvspan(-most * (len(seamless) + 1) / 22, 0, color="0.94", zorder=0)
        panel.set_xticks([tick for tick in panel.get_xticks() if 0 <= tick <= 1.1 * most])
        middle = -most * (len(seamless) + 1) / 44
        panel.annotate(
            "no seam at all", (middle, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8
        )


def _deviation(values: list[float]) -> float:
    return stdev(values) if values[1:] else 0.0


def _marks(
    panel: Any,
    rows: Rows,
    variants: Sequence[str],
    column: str,
    shift: float,
    marker: str,
    color: str,
    label: str,
) -> None:
    found = [(i, rows[v][column]) for i, v in enumerate(variants) if rows[v].get(column)]
    panel.errorbar(
        [fmean(values) for _, values in found],
        [i + shift for i, _ in found],
        xerr=[stdev(values) if len(values) > 1 else 0.0 for _, values in found],
        fmt=marker,
        color=color,
        markersize=5,
        linewidth=1,
        label=label,
    )
