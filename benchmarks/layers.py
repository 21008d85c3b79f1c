"""Time the layers as ratios to nn.BatchNorm, A and B interleaved, and print the table of docs/layers.md.

Run: python benchmarks/layers.py [--rounds 15] [--size 128]. Ratios are medians over rounds of time(A) / time(B), where
each round runs B, A, B within a moment of each other, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from normfix.conversion.lowering import fold
from normfix.layers import BatchRenorm2d, FrozenNorm2d

SHAPES = [(8, 32, 128, 128), (4, 64, 96, 96), (16, 128, 32, 32), (2, 256, 16, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--size", type=int, default=128, help="largest extent; smaller ones only try the program"
    )
    given = parser.parse_args()
    rounds, shapes = given.rounds, [(n, c, *(min(e, given.size) for e in space)) for n, c, *space in SHAPES]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{_machine()}; torch {torch.__version__}, 1 thread, float32, {rounds} rounds, median ratios\n")
    print("## Layer, relative to nn.BatchNorm2d\n")
    _table(["shape", "pass", *LAYERS], _layer_rows(shapes, rounds))
    print("\n## U-Net (4 levels, 2 x 1 x 128 x 128)\n")
    _table(["first width", "what", "ratio", "at most"], _network_rows(given.size, rounds))
    print(f"\n## Bytes kept for backward, {shapes[0]}\n")
    _table(["layer", "bytes", "beyond nn.BatchNorm2d"], _memory_rows(shapes[0]))


class Textbook(nn.Module):
    """BatchRenorm as one would write it from the paper."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("var", torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        def shaped(v: Tensor) -> Tensor:
            return v[:, None, None]

        if not self.training:
            return (x - shaped(self.mean)) / shaped(self.var + 1e-5).sqrt() * shaped(self.weight) + shaped(
                self.bias
            )
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        sigma_b, sigma = (var + 1e-5).sqrt(), (self.var + 1e-5).sqrt()
        r = (sigma_b / sigma).detach().clamp(1 / 3, 3)
        d = ((mean - self.mean) / sigma).detach().clamp(-5, 5)
        xhat = (x - shaped(mean)) / shaped(sigma_b) * shaped(r) + shaped(d)
        with torch.no_grad():
            self.mean.lerp_(mean, 0.01)
            self.var.lerp_(var, 0.01)
        return xhat * shaped(self.weight) + shaped(self.bias)


def torchrl_layer(c: int) -> nn.Module:
    from torchrl.modules import BatchRenorm1d

    return BatchRenorm1d(c, warmup_steps=1)


class OverChannels(nn.Module):
    """torchrl's layer takes (n, c) or (n, c, l): give it space as l."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = torchrl_layer(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2)).view_as(x)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "BatchRenorm2d": BatchRenorm2d,
    "FrozenNorm2d": FrozenNorm2d,
    "nn.InstanceNorm2d": lambda c: nn.InstanceNorm2d(c, affine=True),
    "torchrl": OverChannels,
    "textbook": Textbook,
}


def _layer_rows(shapes: list[tuple[int, ...]], rounds: int) -> Iterable[list[str]]:
    for shape in shapes:
        x = torch.randn(shape).requires_grad_()
        grad = torch.randn(shape)
        base = nn.BatchNorm2d(shape[1])
        layers = [make(shape[1]) for make in LAYERS.values()]
        for name, training in (("train fwd+bwd", True), ("eval fwd", False)):
            modules = [base, *layers]
            for module in modules:
                module.train(training)
            run = [_train_pass(m, x, grad) if training else _eval_pass(m, x) for m in modules]
            yield [str(shape), name, *(f"{ratio:.2f}" for ratio in _ratios(run, rounds))]


def _train_pass(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    inputs = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), inputs, grad)


def _eval_pass(module: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> None:
        module(x)

    return run


class UNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(a, b, norm) for a, b in zip((1, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.join = nn.ModuleList(_block(2 * a, a, norm) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(nn.functional.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for level in reversed(range(len(self.join))):
            x = self.join[level](torch.cat((skips[level], self.up[level](x)), 1))
        return self.head(x)


def _block(a: int, b: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    first = (nn.Conv2d(a, b, 3, padding=1), norm(b), nn.ReLU(inplace=True))
    return nn.Sequential(*first, nn.Conv2d(b, b, 3, padding=1), norm(b), nn.ReLU(inplace=True))


def _network_rows(size: int, rounds: int) -> Iterable[list[str]]:
    x = torch.randn(2, 1, size, size)
    plain, renorm = UNet(nn.BatchNorm2d), UNet(BatchRenorm2d)
    ratio = _ratios([_step(plain, x), _step(renorm, x)], rounds)[0]
    yield ["16", "training step, BatchRenorm / BatchNorm", f"{ratio:.2f}", "1.05"]
    for width in (8, 16, 32):
        widths = tuple(width * 2**level for level in range(4))
        original = UNet(lambda c: nn.InstanceNorm2d(c, affine=True), widths).eval()
        frozen, batch = UNet(FrozenNorm2d, widths).eval(), UNet(nn.BatchNorm2d, widths).eval()
        done = fold(frozen, x)
        assert done.record.complete, done.record
        bare = UNet(lambda _: nn.Identity(), widths).eval()  # what no folding can beat
        run = [_eval_pass(m, x) for m in (original, frozen, batch, done.model, bare)]
        names, targets = ("frozen", "BatchNorm", "folded", "without norms"), ("0.85", "", "0.72", "")
        for name, ratio, target in zip(names, _ratios(run, rounds), targets, strict=True):
            yield [str(width), f"inference, {name} / InstanceNorm original", f"{ratio:.2f}", target]


def _step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def _memory_rows(shape: tuple[int, ...]) -> Iterable[list[str]]:
    base = _kept(nn.BatchNorm2d(shape[1]), shape)
    yield ["nn.BatchNorm2d", str(base), "0"]
    for name, make in LAYERS.items():
        kept = _kept(make(shape[1]), shape)
        yield [name, str(kept), str(kept - base)]


def _kept(module: nn.Module, shape: tuple[int, ...]) -> int:
    storages: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    kept = [torch.randn(shape).requires_grad_()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        kept.append(module(kept[0]))
    return sum(storages.values())


def _ratios(run: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median over rounds of each time divided by the first's of the same round."""
    for once in run:
        once()
    samples: list[list[float]] = [[] for _ in run[1:]]
    repeats = max(1, round(0.02 / _seconds(run[0], 3)))
    for _ in range(rounds):
        for ratios, other in zip(samples, run[1:], strict=True):
            first, second, again = (_seconds(f, repeats) for f in (run[0], other, run[0]))
            ratios.append(second / ((first + again) / 2))
    return [statistics.median(ratios) for ratios in samples]


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.thread_time()  # of the one thread that computes: what others run does not count
    for _ in range(repeats):
        run()
    return (time.thread_time() - start) / repeats


def _table(head: list[str], rows: Iterable[list[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
        sys.stdout.flush()


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {len(names)} cores; python {platform.python_version()}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
