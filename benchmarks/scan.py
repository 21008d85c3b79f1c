"""What a scan costs, in forward passes of the example: work in convolutions and products, float64 twice.

    python benchmarks/scan.py [NAME ...]

`work` counts multiplications (torch's own formulas), so it does not depend on the machine; `time` is wall
time over that of one plain forward pass, which small operations and Python's share make larger.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import normfix
from normfix.demo.network import nuclei_unet
from normfix.networks.calling import Caller
from normfix.networks.examples import default_example
from normfix.networks.intake import Intake


class Work(TorchDispatchMode):
    """Counts multiplications of everything that runs inside it; float64 counts twice."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = next((t for t in args if isinstance(t, Tensor)), None)
        # what torch.export traces is computed by nobody, and its sizes may be symbols
        if func._overloadpacket in flop_registry and not isinstance(first, FakeTensor):
            work = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.total += work * (2 if first.dtype == torch.float64 else 1)
        return result


class ResNetUNet(nn.Module):
    """A U-Net on torchvision's resnet18, as segmentation-models-pytorch builds it: stride 32."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        net = resnet18(weights=None)
        stem = nn.Sequential(net.conv1, net.bn1, net.relu)
        self.levels = nn.ModuleList(
            [stem, nn.Sequential(net.maxpool, net.layer1), net.layer2, net.layer3, net.layer4]
        )
        widths, outs = (512, 256, 128, 64, 64), (256, 128, 64, 32, 16)
        self.decoder = nn.ModuleList(
            self._block((before if i == 0 else outs[i - 1]) + skip, out)
            for i, (before, skip, out) in enumerate(zip(widths, (256, 128, 64, 64, 0), outs, strict=True))
        )
        self.head = nn.Conv2d(16, 1, 3, padding=1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        def layer(n: int) -> list[nn.Module]:
            return [nn.Conv2d(n, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        return nn.Sequential(*layer(inputs), *layer(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return one map at the input's resolution."""
        skips = []
        for level in self.levels:
            x = level(x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips.pop()], 1) if skips else x)
        return self.head(x)


def basic_unet(ndim: int) -> nn.Module:
    """MONAI's BasicUNet with its default InstanceNorms."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(ndim, 1, 2, features=(16, 16, 32, 64, 128, 16))


def vnet() -> nn.Module:
    """MONAI's VNet: BatchNorm, 5x5x5 kernels, stride 16."""
    from monai.networks.nets import VNet

    return VNet(3, 1, 2)


def fcn() -> nn.Module:
    """torchvision's fcn_resnet50: dilated, resized to the input."""
    from torchvision.models.segmentation import fcn_resnet50

    return fcn_resnet50(weights=None, weights_backbone=None, num_classes=2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "demo": (nuclei_unet, None),
    "BasicUNet 2D": (lambda: basic_unet(2), None),
    "BasicUNet 3D": (lambda: basic_unet(3), None),
    "resnet18 U-Net": (ResNetUNet, None),
    "fcn_resnet50": (fcn, "out"),
    "VNet 3D": (vnet, None),
}


def measured(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return (multiplications, seconds, result); counting costs little time."""
    start = time.perf_counter()
    with Work() as work:
        result = action()
    return work.total, time.perf_counter() - start, result


def main(names: list[str]) -> None:
    """Print one line per network."""
    torch.set_num_threads(1)
    print(f"{'network':16} {'forward':>9} {'scan work':>10} {'scan time':>10}  halo")
    for name in names or NETWORKS:
        make, output = NETWORKS[name]
        torch.manual_seed(0)
        model = make().eval()
        example = default_example(model, Intake(model, Caller(output=output)))
        with torch.no_grad():
            work, seconds, _ = measured(lambda m=model, x=example: m(x))
        total, spent, scan = measured(lambda m=model, o=output: normfix.scan(m, output=o))
        print(
            f"{name:16} {seconds:8.2f}s {total / work:9.1f}x {spent / seconds:9.1f}x  {scan.halo}", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
