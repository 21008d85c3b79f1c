"""Time normfix on a GPU as ratios, by CUDA events, A and B interleaved, and print the tables of docs/gpu.md.

Run: python benchmarks/gpu.py [--rounds 15] [--scale 1]. Needs torch and nothing else; about three minutes. Each
number is the median over rounds of time(A) / time(B), where B is named in the heading. Without a GPU it computes on
the CPU, which only tries the program: give --scale 16 or more.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import normfix
from normfix.conversion.lowering import fold, lower
from normfix.layers import BatchRenorm2d, BatchRenorm3d, FrozenNorm2d, FrozenNorm3d
from normfix.networks.devices import described, synchronize
from normfix.networks.numerics import exact_arithmetic

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVAL = [(1, 16, 1024, 1344), (1, 64, 512, 512), (8, 32, 256, 256), (1, 8, 128, 128, 128)]
TRAIN = [(8, 32, 256, 256), (4, 64, 512, 512), (16, 128, 64, 64), (2, 256, 32, 32), (2, 32, 64, 128, 128)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=int, default=1, help="divide extents; above 1 only tries the program")
    parser.add_argument("--only", default="", help="names of tables, by comma")
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"{_machine()}, torch {torch.__version__}; {given.rounds} rounds, medians\n")
    tables: dict[str, Callable[[int, int], None]] = {
        "eval": eval_layers,
        "train": train_layers,
        "networks": networks,
        "steps": steps,
        "compiled": compiled,
        "stages": stages,
        "tiles": tiles,
        "host": host,
        "tf32": tf32,
    }
    for name, table in tables.items():
        if given.only and name not in given.only.split(","):
            continue
        start = time.perf_counter()
        try:
            table(given.rounds, given.scale)
        except Exception:  # noqa: BLE001 - one table that fails does not take the others along
            traceback.print_exc()
        print(f"\n({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)


def eval_layers(rounds: int, scale: int) -> None:
    print("## Normalisation by constants, relative to a copy of its operand\n")
    rows = []
    for shape in _scaled(EVAL, scale):
        for format_ in (torch.contiguous_format, FORMATS[len(shape)]):
            for dtype in (torch.float32, torch.float16):
                x = torch.randn(shape, device=GPU, dtype=dtype).to(memory_format=format_)
                c, three = shape[1], len(shape) == 5
                layers = [
                    (nn.InstanceNorm3d if three else nn.InstanceNorm2d)(c, affine=True),
                    (nn.BatchNorm3d if three else nn.BatchNorm2d)(c),
                    (FrozenNorm3d if three else FrozenNorm2d)(c),
                ]
                layers = [layer.to(GPU, dtype).eval() for layer in layers]
                with torch.no_grad():
                    found = timed([x.clone, *(partial(layer, x) for layer in layers)], rounds)
                rows.append([_shape(shape), _format(format_), _name(dtype), *_over(found), _ms(found[0])])
    _table(["shape", "format", "dtype", "InstanceNorm", "BatchNorm", "FrozenNorm", "copy, ms"], rows)


def train_layers(rounds: int, scale: int) -> None:
    print("## BatchRenorm over nn.BatchNorm, forward and backward (BatchNorm in ms)\n")
    rows = []
    for shape in _scaled(TRAIN, scale):
        row = [_shape(shape)]
        for kind in ("float32", "channels_last", "bfloat16 autocast"):
            dtype = torch.bfloat16 if "16" in kind else torch.float32
            x = torch.randn(shape, device=GPU, dtype=dtype)
            if kind == "channels_last":
                x = x.to(memory_format=FORMATS[len(shape)])
            x.requires_grad_()
            three = len(shape) == 5
            pair = [
                (nn.BatchNorm3d if three else nn.BatchNorm2d)(shape[1]).to(GPU),
                (BatchRenorm3d if three else BatchRenorm2d)(shape[1]).to(GPU),
            ]
            grad = torch.randn_like(x)
            found = timed([partial(_back, layer, x, grad) for layer in pair], rounds)
            row.append(f"{found[1] / found[0]:.2f} ({found[0]:.2f})")
        rows.append(row)
    _table(["shape", "float32", "channels_last", "bfloat16 autocast"], rows)


def _back(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    layer(x).backward(grad)


class UNet(nn.Module):
    """Four levels of two convolutions, norms and ReLUs."""

    def __init__(self, dims: int, norm: Callable[[int], nn.Module], width: int = 16) -> None:
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.pool = (nn.MaxPool3d if dims == 3 else nn.MaxPool2d)(2)
        self.up = nn.Upsample(scale_factor=2)

        def block(a: int, b: int) -> nn.Sequential:
            parts = ([conv(n, b, 3, padding=1), norm(b), nn.ReLU()] for n in (a, b))
            return nn.Sequential(*(layer for part in parts for layer in part))

        widths = [width << i for i in range(4)]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([1, *widths], widths, strict=False))
        self.join = nn.ModuleList(block(a + b, a) for a, b in pairwise(widths))
        self.head = conv(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        x = skips.pop()
        for block in reversed(self.join):
            x = block(torch.cat([skips.pop(), self.up(x)], 1))
        return self.head(x)


def unet(dims: int, kind: str, width: int = 16) -> nn.Module:
    two = {
        "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
        "batch": nn.BatchNorm2d,
        "renorm": BatchRenorm2d,
        "frozen": FrozenNorm2d,
    }
    three = {
        "instance": lambda c: nn.InstanceNorm3d(c, affine=True),
        "batch": nn.BatchNorm3d,
        "renorm": BatchRenorm3d,
        "frozen": FrozenNorm3d,
    }
    torch.manual_seed(0)
    return UNet(dims, (three if dims == 3 else two)[kind], width).to(GPU)


def networks(rounds: int, scale: int) -> None:
    print("## A U-Net of 14 norms, width 16, forward, relative to the original with InstanceNorm\n")
    rows = []
    for dims, size in ((2, (1024, 1344)), (3, (128, 128, 128))):
        size = tuple(n // scale for n in size)
        x = torch.randn(1, 1, *size, device=GPU)
        original, frozen = unet(dims, "instance").eval(), unet(dims, "frozen").eval()
        small = torch.randn(1, 1, *(32,) * dims, device=GPU)
        forms = [original, frozen, lower(frozen).model, fold(frozen, small).model]
        for last in (False, True):
            image = x
            if last:
                image = x.to(memory_format=FORMATS[dims + 2])
                forms = [form.to(memory_format=FORMATS[dims + 2]) for form in forms]
            with torch.no_grad():
                found = timed([partial(form, image) for form in forms], rounds)
            name = "channels_last" if last else "contiguous"
            rows.append([f"{dims}D", name, *_over(found), _ms(found[0])])
    _table(["", "format", "frozen", "lowered to BatchNorm", "folded", "original, ms"], rows)


def steps(rounds: int, scale: int) -> None:
    print("## A whole training step of that U-Net, BatchRenorm over BatchNorm\n")
    rows = []
    for dims, shape in ((2, (8, 1, 256, 256)), (3, (2, 1, 64, 128, 128))):
        shape = (*shape[:2], *(n // scale for n in shape[2:]))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device=GPU)
            found = timed([_step(unet(dims, kind), x, dtype) for kind in ("batch", "renorm")], rounds)
            rows.append([f"{dims}D", _name(dtype), f"{found[1] / found[0]:.2f}", _ms(found[0])])
    _table(["", "dtype", "ratio", "BatchNorm, ms"], rows)


def compiled(rounds: int, scale: int) -> None:
    print("## A compiled training step, BatchRenorm over BatchNorm\n")
    x = torch.randn(8, 1, 256 // scale, 256 // scale, device=GPU)
    pair = [torch.compile(unet(2, kind)) for kind in ("batch", "renorm")]
    found = timed([_step(network, x, torch.float32) for network in pair], rounds)
    print(f"2D float32: {found[1] / found[0]:.2f} (BatchNorm {found[0]:.2f} ms)")


def _step(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = network(x).float().square().mean()
        loss.backward()
        optimizer.step()

    return step


CASES = ((2, 4096, 1024, 256), (3, 192, 96, 48))
"""Axes, extent of the image, of blocks and of small tiles."""


def stages(rounds: int, scale: int) -> None:
    print("## Whole images in stages, relative to the untiled forward pass (peak memory in GiB)\n")
    rows = []
    for dims, n, tile, _ in _cases(scale):
        image = _image(dims, n)
        there = image.cpu()
        model = _converted(dims, image)
        start = time.perf_counter()
        normfix.calibrate(model, image, tile=tile)
        first = time.perf_counter() - start
        calls: list[Callable[[], Any]] = [
            lambda: normfix.calibrate(model, image, tile=tile),  # noqa: B023
            lambda: normfix.calibrate(model, there, tile=tile),  # noqa: B023
            lambda: normfix.predict(model, image, tile, engine="stages"),  # noqa: B023
        ]
        rows.append([f"{dims}D, {n}, {tile}", *_over_untiled(model, image, calls), f"{first:.1f}"])
    heads = ["image, blocks", "untiled, ms", "calibrate", "the same, image on the host", "predict"]
    _table([*heads, "first use, s"], rows)


def tiles(rounds: int, scale: int) -> None:
    print("## Whole images in tiles, relative to the untiled forward pass (peak memory in GiB)\n")
    rows = []
    for dims, n, tile, small in _cases(scale):
        image = _image(dims, n)
        model = _converted(dims, image)
        one = normfix.Blocks(batch=1)
        calls: list[Callable[[], Any]] = [
            lambda: normfix.predict(model, image, tile, engine="tiles"),  # noqa: B023
            lambda: normfix.predict(model, image, small, engine="tiles", blocks=one),  # noqa: B023
            lambda: normfix.predict(model, image, small, engine="tiles"),  # noqa: B023
            lambda: normfix.predict(model, image, tile),  # noqa: B023
        ]
        rows.append([f"{dims}D, {n}, {tile}, {small}", *_over_untiled(model, image, calls)])
    heads = ["image, tiles, small tiles", "untiled, ms", "tiles", "small tiles, one at a time", "batched"]
    _table([*heads, "tiles, engine auto"], rows)


def _cases(scale: int) -> list[tuple[int, ...]]:
    return [(dims, *(n // scale for n in extents)) for dims, *extents in CASES]


def _over_untiled(model: nn.Module, image: Tensor, calls: Sequence[Callable[[], Any]]) -> list[str]:
    """Return an untiled pass in ms and each call relative to it, with the peak of device memory that each adds."""
    with torch.no_grad(), exact_arithmetic():
        whole, peak = _wall_and_peak(lambda: model(image), 5)
    cells = [f"{1000 * whole:.1f} ({peak:.2f})"]
    for call in calls:
        call()
        found, most = _wall_and_peak(call, 5)
        cells.append(f"{found / whole:.2f} ({most:.2f})")
    return cells


def host(rounds: int, scale: int) -> None:
    print("## Maps in the host's memory, over the time in which their bytes cross the bus\n")
    from normfix.tiling.stages import store

    dims, n, tile, _ = _cases(scale)[0]
    image = _image(dims, n)
    model = _converted(dims, image)
    call = partial(normfix.calibrate, model, image, tile=tile)
    call()
    moved: list[int] = []
    room, write, read = store.room, store._OnHost.write, store._OnHost.read

    def counted(self: Any, index: Any, *value: Tensor) -> Any:
        result = (write if value else read)(self, index, *value)
        window = value[0] if value else result
        moved.append(window.numel() * window.element_size())
        return result

    store.room = lambda device: 0  # type: ignore[assignment]
    try:
        found, most = _wall_and_peak(call, 3)
        store._OnHost.write = store._OnHost.read = counted  # type: ignore[assignment, method-assign]
        call()
    finally:
        store.room, store._OnHost.write, store._OnHost.read = room, write, read  # type: ignore[method-assign]
    there = torch.empty(1 << 26 if scale == 1 else 1 << 20)
    if GPU.type == "cuda":
        there = there.pin_memory()
    here = there.to(GPU)
    speed = there.numel() * 4 / max(1e-9, wall(lambda: here.copy_(there, non_blocking=True), 5))
    print(
        f"{sum(moved) / 2**30:.1f} GiB at {speed / 2**30:.1f} GiB/s, {1000 * found:.0f} ms ({most:.2f} GiB): "
        f"{found * speed / max(1, sum(moved)):.2f}"
    )


def _image(dims: int, n: int) -> Tensor:
    return torch.rand(1, 1, *(n,) * dims, device=GPU) * torch.linspace(0.2, 2, n, device=GPU)


def _converted(dims: int, image: Tensor) -> nn.Module:
    part = image[(..., *(slice(0, 64 if dims == 3 else 256),) * dims)]
    return normfix.convert(unet(dims, "instance").eval(), part).model


def _wall_and_peak(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Return the median seconds of a call and the peak of device memory that it adds, in GiB."""
    if GPU.type != "cuda":
        return wall(call, rounds), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = wall(call, rounds)
    return found, (torch.cuda.max_memory_allocated() - before) / 2**30


def tf32(rounds: int, scale: int) -> None:
    print("## How far a plain forward is from exact float32 with cuDNN's TF32, in sd\n")
    for dims, size in ((2, (512, 512)), (3, (64, 64, 64))):
        x = torch.rand(1, 1, *(n // scale for n in size), device=GPU)
        network = unet(dims, "instance").eval()
        with torch.no_grad():
            plain = network(x)
            with exact_arithmetic():
                exact = network(x)
        print(f"{dims}D: {float((plain - exact).abs().max() / exact.std()):.1e}")


def timed(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the median milliseconds of each call, in turn, each repeated to take about 3 ms."""
    repeats = []
    for call in calls:
        for _ in range(3):
            call()
        once = _events(call, 1)
        repeats.append(max(1, min(20, int(3 / max(once, 1e-3)))))
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call, n in zip(found, calls, repeats, strict=True):
            times.append(_events(call, n) / n)
    return [statistics.median(times) for times in found]


def _events(call: Callable[[], Any], repeats: int) -> float:
    if GPU.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1000 * (time.perf_counter() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def wall(call: Callable[[], Any], rounds: int) -> float:
    """Return the median seconds of a call by the host's clock."""
    found = []
    for _ in range(rounds):
        synchronize(GPU)
        start = time.perf_counter()
        call()
        synchronize(GPU)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _scaled(shapes: Iterable[tuple[int, ...]], scale: int) -> list[tuple[int, ...]]:
    return [(n, c, *(max(8, e // scale) for e in space)) for n, c, *space in shapes]


def _over(found: Sequence[float]) -> list[str]:
    return [f"{time_ / found[0]:.2f}" for time_ in found[1:]]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 1 else f"{milliseconds:.1f}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _format(format_: torch.memory_format) -> str:
    return "contiguous" if format_ == torch.contiguous_format else "channels_last"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(heads) + " |")
    print("|" + " --- |" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def _machine() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    except OSError:
        driver = "?"
    return f"{described(GPU)}, driver {driver}"


if __name__ == "__main__":
    main()
