"""transformers: its segmenters, depth estimators, super-resolution and backbones, in tiny configurations."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .entry import Entry

__all__ = ["ENTRIES"]


def _net(stem: str, head: str, arguments: dict[str, Any]) -> nn.Module:
    import transformers

    return getattr(transformers, head)(getattr(transformers, f"{stem}Config")(**arguments))


def _on_backbone(
    stem: str, head: str, backbone: str, backbone_arguments: dict[str, Any], arguments: dict[str, Any]
) -> nn.Module:
    import transformers

    inner = getattr(transformers, f"{backbone}Config")(**backbone_arguments)
    return _net(stem, head, arguments | {"backbone_config": inner})


def _first_map(model: nn.Module, image: Tensor) -> Any:
    return model(image).feature_maps[0]


def _last_map(model: nn.Module, image: Tensor) -> Any:
    return model(image).feature_maps[-1]


def _first_state(model: nn.Module, image: Tensor) -> Any:
    return model(image, output_hidden_states=True).hidden_states[1]


def _scores(model: nn.Module, image: Tensor) -> Any:
    return model(image).scores


def _depth(model: nn.Module, image: Tensor) -> Any:
    return model(image).predicted_depth[:, None]


def _masks(model: nn.Module, image: Tensor) -> Any:
    return model(image).masks_queries_logits


def _entry(
    stem: str,
    head: str,
    variant: str = "",
    *,
    shape: tuple[int, ...] = (1, 3, 64, 64),
    output: str | None = None,
    call: Any = None,
    dense: bool = True,
    **arguments: Any,
) -> Entry:
    return Entry(
        name=f"transformers {stem}{head} {variant}".strip(),
        library="transformers",
        build=partial(_net, stem, stem + head, arguments),
        shape=shape,
        output=output,
        call=call,
        dense=dense,
    )


_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
_SWIN: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "image_size": 64,
}
_STAGED: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_LAST = {"output": "last_hidden_state"}
_CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_STAGES4 = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 8,
}

ENTRIES = (
    _entry("Segformer", "ForSemanticSegmentation", output="logits", **_SEGFORMER),
    _entry("Segformer", "Model", **_LAST, **_SEGFORMER),
    *(
        Entry(
            name=f"transformers UperNet on {backbone}",
            library="transformers",
            build=partial(
                _on_backbone,
                "UperNet",
                "UperNetForSemanticSegmentation",
                backbone,
                inner | _STAGES4,
                {
                    "hidden_size": 8,
                    "auxiliary_channels": 8,
                    "auxiliary_in_channels": 32 if backbone == "Swin" else 16,
                    "num_labels": 2,
                },
            ),
            shape=(1, 3, 128, 128),
            output="logits",
        )
        for backbone, inner in (
            ("ConvNext", _CONVNEXT),
            ("ConvNextV2", _CONVNEXT),
            (
                "Swin",
                {
                    "embed_dim": 8,
                    "depths": [1, 1, 1, 1],
                    "num_heads": [1, 1, 2, 2],
                    "window_size": 4,
                    "image_size": 128,
                },
            ),
            (
                "ResNet",
                {
                    "embedding_size": 8,
                    "hidden_sizes": [8, 8, 16, 16],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                },
            ),
        )
    ),
    _entry(
        "DPT",
        "ForDepthEstimation",
        call=_depth,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        **_VIT,
    ),
    _entry(
        "DPT",
        "ForSemanticSegmentation",
        output="logits",
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        num_labels=2,
        **_VIT,
    ),
    _entry(
        "GLPN",
        "ForDepthEstimation",
        call=_depth,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
    ),
    _entry(
        "MobileViT",
        "ForSemanticSegmentation",
        output="logits",
        shape=(1, 3, 128, 128),
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 16],
        num_attention_heads=2,
        aspp_out_channels=8,
        num_labels=2,
    ),
    _entry(
        "MobileViTV2",
        "ForSemanticSegmentation",
        output="logits",
        shape=(1, 3, 128, 128),
        width_multiplier=0.5,
        aspp_out_channels=8,
        num_labels=2,
    ),
    _entry(
        "MobileNetV2",
        "ForSemanticSegmentation",
        output="logits",
        shape=(1, 3, 128, 128),
        depth_multiplier=0.35,
        num_labels=2,
    ),
    _entry("MobileNetV1", "Model", **_LAST, shape=(1, 3, 128, 128), depth_multiplier=0.25),
    _entry("MobileNetV2", "Model", **_LAST, shape=(1, 3, 128, 128), depth_multiplier=0.35),
    _entry("ResNet", "Model", **_LAST, embedding_size=8, layer_type="basic", **_STAGED),
    _entry("ResNet", "Backbone", call=_last_map, embedding_size=8, layer_type="bottleneck", **_STAGED),
    _entry("RegNet", "Model", **_LAST, embedding_size=8, groups_width=4, layer_type="x", **_STAGED),
    _entry("RegNet", "Model", "y", **_LAST, embedding_size=8, groups_width=4, layer_type="y", **_STAGED),
    _entry(
        "Bit",
        "Model",
        **_LAST,
        embedding_size=8,
        num_groups=4,
        layer_type="preactivation",
        hidden_sizes=[8, 16],
        depths=[1, 1],
    ),
    _entry(
        "Bit",
        "Model",
        "bottleneck",
        **_LAST,
        embedding_size=8,
        num_groups=4,
        layer_type="bottleneck",
        hidden_sizes=[8, 16],
        depths=[1, 1],
    ),
    _entry("ConvNext", "Model", **_LAST, **_CONVNEXT),
    _entry("ConvNextV2", "Model", **_LAST, **_CONVNEXT),
    _entry("ConvNextV2", "Backbone", call=_first_map, **_CONVNEXT),
    _entry("DINOv3ConvNext", "Model", output=None, call=_first_state, **_CONVNEXT),
    _entry(
        "PoolFormer",
        "Model",
        **_LAST,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
    ),
    _entry("Swin", "Backbone", call=_last_map, **_SWIN),
    _entry("Swinv2", "Backbone", call=_last_map, **_SWIN),
    _entry(
        "Swin2SR",
        "ForImageSuperResolution",
        output="reconstruction",
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        image_size=64,
        num_channels=3,
    ),
    _entry(
        "EfficientNet",
        "Model",
        **_LAST,
        shape=(1, 3, 128, 128),
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
    ),
    _entry(
        "SwiftFormer",
        "Model",
        **_LAST,
        shape=(1, 3, 128, 128),
        depths=[1, 1, 1, 1],
        embed_dims=[8, 8, 16, 16],
    ),
    _entry("TextNet", "Model", **_LAST, shape=(1, 3, 128, 128)),
    _entry("HGNetV2", "Backbone", call=_first_map, shape=(1, 3, 128, 128)),
    _entry(
        "PvtV2",
        "Backbone",
        call=_last_map,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        image_size=64,
    ),
    _entry(
        "Beit",
        "ForSemanticSegmentation",
        output="logits",
        num_labels=2,
        out_indices=[1, 2, 3, 4],
        use_relative_position_bias=False,
        **_VIT,
    ),
    _entry(
        "Hiera",
        "Backbone",
        call=_last_map,
        embed_dim=8,
        image_size=[64, 64],
        depths=[1, 1],
        num_heads=[1, 2],
        num_query_pool=1,
        query_stride=[2, 2],
        masked_unit_size=[4, 4],
    ),
    _entry(
        "VitDet",
        "Backbone",
        call=_last_map,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        window_size=2,
        window_block_indices=[0],
    ),
    _entry("SuperPoint", "ForKeypointDetection", dense=False, call=_scores),
    Entry(
        name="transformers MaskFormer on Swin",
        library="transformers",
        build=partial(
            _on_backbone,
            "MaskFormer",
            "MaskFormerForInstanceSegmentation",
            "Swin",
            {
                "embed_dim": 8,
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 1, 2, 2],
                "window_size": 4,
                "image_size": 64,
            }
            | _STAGES4,
            {"fpn_feature_size": 32, "mask_feature_size": 32},
        ),
        shape=(1, 3, 64, 64),
        call=_masks,
    ),
    Entry(
        name="transformers Mask2Former on Swin",
        library="transformers",
        build=partial(
            _on_backbone,
            "Mask2Former",
            "Mask2FormerForUniversalSegmentation",
            "Swin",
            {
                "embed_dim": 8,
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 1, 2, 2],
                "window_size": 4,
                "image_size": 64,
            }
            | _STAGES4,
            {
                "feature_size": 32,
                "mask_feature_size": 32,
                "hidden_dim": 32,
                "encoder_feedforward_dim": 32,
                "dim_feedforward": 32,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "num_attention_heads": 4,
                "num_queries": 4,
            },
        ),
        shape=(1, 3, 64, 64),
        call=_masks,
    ),
    Entry(
        name="transformers VitMatte on VitDet",
        library="transformers",
        build=partial(
            _on_backbone,
            "VitMatte",
            "VitMatteForImageMatting",
            "VitDet",
            {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "pretrain_image_size": 64,
                "num_channels": 4,
                "window_size": 2,
                "out_features": ["stage2"],
            },
            {"hidden_size": 16, "convstream_hidden_sizes": [8, 8, 8], "fusion_hidden_sizes": [16, 8, 8, 8]},
        ),
        shape=(1, 4, 64, 64),
        output="alphas",
    ),
    Entry(
        name="transformers DepthAnything on Dinov2",
        library="transformers",
        build=partial(
            _on_backbone,
            "DepthAnything",
            "DepthAnythingForDepthEstimation",
            "Dinov2",
            {
                "hidden_size": 16,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
                "out_indices": [1, 2, 3, 4],
                "reshape_hidden_states": False,
            },
            {
                "neck_hidden_sizes": [8, 8, 8, 8],
                "fusion_hidden_size": 8,
                "head_hidden_size": 8,
                "reassemble_hidden_size": 16,
                "depth_estimation_type": "metric",
            },
        ),
        shape=(1, 3, 56, 56),
        call=_depth,
    ),
    *(
        _entry(stem, "ForImageClassification", output="logits", dense=False, **arguments)
        for stem, arguments in (
            ("ViT", _VIT),
            ("Swin", _SWIN),
            ("ConvNextV2", _CONVNEXT),
            ("ResNet", {"embedding_size": 8, **_STAGED}),
            ("RegNet", {"embedding_size": 8, "groups_width": 4, **_STAGED}),
            ("Beit", _VIT),
            ("Dinov2", _VIT),
            ("Segformer", _SEGFORMER),
            ("MobileNetV1", {"depth_multiplier": 0.25}),
            ("PoolFormer", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
        )
    ),
)
