"""torchvision: segmentation, feature extractors of classifiers, pyramids and heads of detectors, video, flow."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .entry import Entry

__all__ = ["ENTRIES"]

_SHAPE = (1, 3, 128, 128)


def _whole(name: str, **arguments: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **arguments)


def _segmenter(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=2)


def _features(name: str, cut: int | None = None) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None).features[:cut]


def _node(name: str, node: str, **arguments: Any) -> nn.Module:
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    model = torchvision.models.get_model(name, weights=None, **arguments)
    return create_feature_extractor(model.eval(), {node: "out"})


def _pyramid(name: str, norm: str) -> nn.Module:
    import torchvision
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d

    norms = {"frozen": FrozenBatchNorm2d, "group": partial(nn.GroupNorm, 8), "instance": nn.InstanceNorm2d}
    backbone = torchvision.models.get_model(name, weights=None, norm_layer=norms[norm])
    return _resnet_fpn_extractor(backbone, 5, norm_layer=None if norm == "frozen" else norms[norm])


class _Headed(nn.Module):
    """A detector's convolutional head on three scales, its maps brought to the finest."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from torchvision.models.detection.fcos import FCOSHead
        from torchvision.models.detection.retinanet import RetinaNetHead

        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        if kind == "fcos":
            self.head: nn.Module = FCOSHead(32, 1, 2, num_convs=2)
        else:
            self.head = RetinaNetHead(32, 1, 2, norm_layer=partial(nn.GroupNorm, 8))

    def forward(self, image: Tensor) -> Tensor:
        fine = self.stem(image).relu()
        scales = [fine, nn.functional.avg_pool2d(fine, 2)]
        logits = self.head(scales)["cls_logits"]
        n, _, classes = logits.shape  # (n, h w + h w / 4, classes)
        h, w = fine.shape[2:]
        both = logits.split([h * w, logits.shape[1] - h * w], 1)
        maps = [
            y.transpose(1, 2).reshape(n, classes, h // k, w // k) for y, k in zip(both, (1, 2), strict=True)
        ]
        return maps[0] + nn.functional.interpolate(maps[1], scale_factor=2.0)


def _flow(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def _last_flow(model: nn.Module, image: Tensor) -> Any:
    return model(image, image.roll(2, -1), num_flow_updates=2)[-1]


def _encoder(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None).feature_encoder


def _video(name: str) -> nn.Module:
    import torchvision

    model = torchvision.models.get_model(name, weights=None)
    return nn.Sequential(model.stem, model.layer1, model.layer2)


def _s3d() -> nn.Module:
    import torchvision

    return torchvision.models.get_model("s3d", weights=None).features[:6]


class _ChannelsFirst(nn.Module):
    """Swin's features are channels-last."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.features = _features(name, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image).movedim(-1, 1)


def _entry(name: str, build: Any, *, shape: tuple[int, ...] = _SHAPE, **rest: Any) -> Entry:
    return Entry(name=f"torchvision {name}", library="torchvision", build=build, shape=shape, **rest)


_FEATURES = {
    "alexnet": None,
    "vgg11": None,
    "vgg11_bn": None,
    "squeezenet1_0": None,
    "squeezenet1_1": None,
    "densenet121": 6,
    "mobilenet_v2": 8,
    "mobilenet_v3_small": 8,
    "mobilenet_v3_large": 8,
    "efficientnet_b0": 4,
    "efficientnet_v2_s": 4,
    "convnext_tiny": 4,
}
_NODES = {
    "resnet18": "layer2",
    "resnet50": "layer2",
    "resnext50_32x4d": "layer1",
    "wide_resnet50_2": "layer1",
    "regnet_x_400mf": "trunk_output.block2",
    "regnet_y_400mf": "trunk_output.block2",
    "shufflenet_v2_x0_5": "stage3",
    "shufflenet_v2_x1_5": "stage2",
    "mnasnet0_5": "layers.10",
    "googlenet": "inception3b",
    "inception_v3": "Mixed_5c",
}

ENTRIES = (
    *(
        _entry(name, partial(_segmenter, name), output="out")
        for name in (
            "fcn_resnet50",
            "deeplabv3_resnet50",
            "deeplabv3_mobilenet_v3_large",
            "lraspp_mobilenet_v3_large",
        )
    ),
    *(_entry(f"{name} features", partial(_features, name, cut)) for name, cut in _FEATURES.items()),
    *(
        _entry(
            f"{name} {node}",
            partial(
                _node,
                name,
                node,
                **({"init_weights": False} if name in ("googlenet", "inception_v3") else {}),
            ),
            output="out",
        )
        for name, node in _NODES.items()
    ),
    *(
        _entry(f"resnet18 pyramid {norm}", partial(_pyramid, "resnet18", norm), output="0")
        for norm in ("frozen", "group", "instance")
    ),
    *(_entry(f"{kind} head", partial(_Headed, kind)) for kind in ("fcos", "retinanet")),
    *(_entry(f"{name} encoder", partial(_encoder, name)) for name in ("raft_small", "raft_large")),
    _entry("raft_small", partial(_flow, "raft_small"), shape=(1, 3, 128, 128), call=_last_flow),
    *(
        _entry(f"{name} stages", partial(_video, name), shape=(1, 3, 8, 32, 32))
        for name in ("r3d_18", "mc3_18", "r2plus1d_18")
    ),
    _entry("s3d features", _s3d, shape=(1, 3, 16, 64, 64)),
    *(
        _entry(f"{name} features", partial(_ChannelsFirst, name), shape=(1, 3, 112, 112))
        for name in ("swin_t", "swin_v2_t")
    ),
    *(
        _entry(f"{name} classifier", partial(_whole, name), shape=(1, 3, 128, 128), dense=False)
        for name in (
            "resnet18",
            "squeezenet1_1",
            "mobilenet_v3_small",
            "efficientnet_b0",
            "convnext_tiny",
            "regnet_y_400mf",
            "shufflenet_v2_x0_5",
            "mnasnet0_5",
        )
    ),
    _entry("vit_b_32 classifier", partial(_whole, "vit_b_32"), shape=(1, 3, 224, 224), dense=False),
)
