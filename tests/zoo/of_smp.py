"""segmentation-models-pytorch: decoders times encoders, the norms and attention its decoders can be given."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .entry import Entry

__all__ = ["ENTRIES"]

LIBRARY = "segmentation_models_pytorch"


def _net(decoder: str, encoder: str, arguments: dict[str, Any]) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, decoder)(encoder, encoder_weights=None, in_channels=3, classes=2, **arguments)


def _entry(decoder: str, encoder: str, variant: str = "", size: int = 128, **arguments: Any) -> Entry:
    return Entry(
        name=f"smp {decoder} {encoder} {variant}".strip(),
        library=LIBRARY,
        build=partial(_net, decoder, encoder, arguments),
        shape=(1, 3, size, size),
    )


_THIN = {"encoder_depth": 3, "decoder_channels": (16, 8, 8)}
_INSTANCE = {"type": "instancenorm", "affine": True}  # without affine, its own initialisation fails
_DEPTH = {"encoder_depth": 3}

ENTRIES = (
    *(
        _entry("Unet", encoder, **_THIN)
        for encoder in (
            "resnet18",
            "resnext50_32x4d",
            "dpn68",
            "vgg11",
            "vgg11_bn",
            "se_resnet50",
            "se_resnext50_32x4d",
            "densenet121",
            "efficientnet-b0",
            "mobilenet_v2",
            "timm-efficientnet-b0",
            "timm-tf_efficientnet_lite0",
            "timm-skresnet18",
            "mobileone_s0",
            "mit_b0",
            "tu-resnet50_gn",
            "tu-convnext_atto",
            "tu-convnextv2_atto",
            "tu-mobilenetv4_conv_small",
            "tu-efficientnet_b0_gn",
            "tu-hgnetv2_b0",
            "tu-regnety_002",
            "tu-resnetv2_50d_gn",
            "tu-nf_resnet26",
        )
        if encoder not in ("mit_b0", "tu-convnext_atto", "tu-convnextv2_atto")
    ),
    *(
        _entry("Unet", encoder, size=160, **_THIN)
        for encoder in ("inceptionv4", "inceptionresnetv2", "xception")
    ),
    *(
        _entry("Unet", encoder, encoder_depth=4, decoder_channels=(16, 8, 8, 4))
        for encoder in ("mit_b0", "tu-convnext_atto", "tu-convnextv2_atto")
    ),
    _entry("Unet", "resnet18", "deep", decoder_channels=(16, 16, 8, 8, 4)),
    _entry("Unet", "resnet18", "instance", decoder_use_norm=_INSTANCE, **_THIN),
    _entry("Unet", "resnet18", "no norm", decoder_use_norm=False, **_THIN),
    _entry(
        "Unet",
        "resnet18",
        "scse",
        decoder_attention_type="scse",
        encoder_depth=3,
        decoder_channels=(32, 16, 16),
    ),
    _entry("Unet", "resnet18", "bilinear", decoder_interpolation="bilinear", **_THIN),
    _entry("Unet", "mobilenet_v2", "instance", decoder_use_norm=_INSTANCE, **_THIN),
    *(_entry("UnetPlusPlus", e, **_THIN) for e in ("resnet18", "mobilenet_v2", "tu-resnet50_gn")),
    _entry("UnetPlusPlus", "resnet18", "instance", decoder_use_norm=_INSTANCE, **_THIN),
    _entry(
        "UnetPlusPlus",
        "resnet18",
        "scse",
        decoder_attention_type="scse",
        encoder_depth=3,
        decoder_channels=(32, 16, 16),
    ),
    *(_entry("MAnet", e, decoder_pab_channels=8, **_THIN) for e in ("resnet18", "tu-resnet50_gn")),
    *(
        _entry("Linknet", e, **_DEPTH)
        for e in ("resnet18", "mobilenet_v2", "efficientnet-b0", "tu-resnet50_gn")
    ),
    _entry("Linknet", "resnet18", "instance", decoder_use_norm=_INSTANCE, **_DEPTH),
    *(
        _entry("FPN", e, decoder_pyramid_channels=32, decoder_segmentation_channels=32)
        for e in ("resnet18", "mobilenet_v2", "efficientnet-b0", "vgg11_bn")
    ),
    _entry(
        "FPN",
        "resnet18",
        "cat",
        decoder_pyramid_channels=32,
        decoder_segmentation_channels=32,
        decoder_merge_policy="cat",
    ),
    _entry(
        "FPN",
        "resnet18",
        "bilinear",
        decoder_pyramid_channels=32,
        decoder_segmentation_channels=32,
        decoder_interpolation="bilinear",
    ),
    *(_entry("PSPNet", e, psp_out_channels=32) for e in ("resnet18", "mobilenet_v2")),
    _entry("PSPNet", "resnet18", "instance", psp_out_channels=32, decoder_use_norm=_INSTANCE),
    *(_entry("PAN", e, encoder_depth=5) for e in ("resnet18", "mobilenet_v2")),
    *(_entry("DeepLabV3", e, decoder_channels=32) for e in ("resnet18", "mobilenet_v2")),
    *(
        _entry("DeepLabV3Plus", e, decoder_channels=32)
        for e in ("resnet18", "mobilenet_v2", "tu-resnet50_gn")
    ),
    *(_entry("UPerNet", e, decoder_channels=32) for e in ("resnet18", "mobilenet_v2")),
    *(
        _entry("Segformer", e, decoder_segmentation_channels=32)
        for e in ("resnet18", "mobilenet_v2", "mit_b0")
    ),
    _entry(
        "DPT",
        "tu-vit_tiny_patch16_224",
        size=224,
        decoder_intermediate_channels=(8, 8, 8, 8),
        decoder_fusion_channels=8,
        dynamic_img_size=True,
    ),
)
