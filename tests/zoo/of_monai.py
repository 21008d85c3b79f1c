"""MONAI: the segmentation networks of medical imaging in 2D and 3D, with each of their norms, and others."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .entry import Entry

__all__ = ["ENTRIES"]


def _net(kind: str, arguments: dict[str, Any]) -> nn.Module:
    import monai.networks.nets as nets

    return getattr(nets, kind)(**arguments)


def _entry(
    kind: str,
    variant: str,
    shape: tuple[int, ...],
    *,
    dense: bool = True,
    output: Any = None,
    call: Any = None,
    **arguments: Any,
) -> Entry:
    return Entry(
        name=f"monai {kind} {variant}".strip(),
        library="monai",
        build=partial(_net, kind, arguments),
        shape=shape,
        output=output,
        call=call,
        dense=dense,
    )


FLAT, SOLID = (1, 1, 64, 64), (1, 1, 32, 32, 32)
_SHAPES = {2: FLAT, 3: SOLID}
_NORMS: dict[str, Any] = {
    "instance": "instance",
    "instance affine": ("instance", {"affine": True}),
    "group": ("group", {"num_groups": 2}),
    "batch": "batch",
    "local response": ("localresponse", {"size": 3}),
}

_BASIC = {"in_channels": 1, "out_channels": 2}
_UNET = _BASIC | {"channels": (4, 8, 16), "strides": (2, 2)}
_CODER = _BASIC | {"channels": (4, 8), "strides": (2, 2)}
_FEATURES = (4, 4, 8, 8, 8, 4)
_DYN = _BASIC | {
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [4, 8, 8],
}
_SEGRES = _BASIC | {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}


def _per_axis(kind: str, variant: str, *, axes: tuple[int, ...] = (2, 3), **arguments: Any) -> list[Entry]:
    shape = arguments.pop("shape", None)
    return [
        _entry(kind, f"{variant} {ndim}D".strip(), shape or _SHAPES[ndim], spatial_dims=ndim, **arguments)
        for ndim in axes
    ]


def _timed(model: nn.Module, image: Tensor) -> Any:
    import torch

    return model(image, torch.full((len(image),), 10, device=image.device))


def _controlled(model: nn.Module, image: Tensor) -> Any:
    import torch

    down, _ = model(image, torch.full((len(image),), 10, device=image.device), image)
    return down[0]


def _with_labels(model: nn.Module, image: Tensor) -> Any:
    labels = (image[:, :1] > image[:, :1].new_tensor(0.5)).to(image.dtype)
    return model(image, labels)[0]


def _reconstructed(model: nn.Module, image: Tensor) -> Any:
    return model.decode(model.encode(image)[0])


_CELL = {"num_blocks": 2, "num_depths": 2, "channel_mul": 0.125, "use_downsample": True}


def _dints(spatial_dims: int) -> nn.Module:
    import numpy as np
    from monai.networks.nets import DiNTS, TopologyInstance

    space = TopologyInstance(
        arch_code=[np.ones((2, 4), dtype=int), np.ones((2, 4), dtype=int)], spatial_dims=spatial_dims, **_CELL
    )
    return DiNTS(space, 1, 2, spatial_dims=spatial_dims, use_downsample=True)


ENTRIES = (
    *(e for label, norm in _NORMS.items() for e in _per_axis("UNet", label, norm=norm, **_UNET)),
    *_per_axis("UNet", "residual units", num_res_units=2, **_UNET),
    *(
        e
        for label, axes in (("instance affine", (2, 3)), ("group", (2,)), ("batch", (2,)))
        for e in _per_axis("BasicUNet", label, axes=axes, norm=_NORMS[label], features=_FEATURES, **_BASIC)
    ),
    *_per_axis("BasicUNet", "pixelshuffle", axes=(2,), features=_FEATURES, upsample="pixelshuffle", **_BASIC),
    *_per_axis("BasicUNet", "nontrainable", axes=(2,), features=_FEATURES, upsample="nontrainable", **_BASIC),
    *_per_axis("BasicUNetPlusPlus", "", axes=(2,), features=_FEATURES, output=0, **_BASIC),
    *(
        e
        for label in ("instance affine", "group", "batch")
        for e in _per_axis("SegResNet", label, norm=_NORMS[label], **_SEGRES)
    ),
    *_per_axis("SegResNet", "deconv", upsample_mode="deconv", **_SEGRES),
    *_per_axis("SegResNet", "pixelshuffle", upsample_mode="pixelshuffle", **_SEGRES),
    *(
        e
        for norm in ("batch", "instance")
        for e in _per_axis("SegResNetDS", norm, norm=norm, init_filters=8, blocks_down=(1, 1, 1), **_BASIC)
    ),
    *_per_axis(
        "SegResNetDS2",
        "instance",
        norm="instance",
        init_filters=8,
        blocks_down=(1, 1, 1),
        output=0,
        axes=(2,),
        **_BASIC,
    ),
    *(
        e
        for label in ("instance affine", "group", "batch")
        for e in _per_axis("DynUNet", label, norm_name=_NORMS[label], **_DYN)
    ),
    *_per_axis("DynUNet", "residual", res_block=True, **_DYN),
    *_per_axis(
        "VNet", "", shape=None, dropout_prob_up=(0.0, 0.0), dropout_prob_down=0.0, axes=(2,), **_BASIC
    ),
    *_per_axis("AttentionUnet", "", **_UNET),
    *(
        e
        for label in ("instance", "group", "batch")
        for e in _per_axis("AutoEncoder", label, norm=_NORMS[label], **_CODER)
    ),
    *_per_axis("AutoEncoder", "dilated", inter_channels=(4, 4), inter_dilations=(1, 2), **_CODER),
    _entry(
        "VarAutoEncoder",
        "2D",
        FLAT,
        spatial_dims=2,
        in_shape=(1, 64, 64),
        out_channels=1,
        latent_size=4,
        channels=(4, 8),
        strides=(2, 2),
        output=0,
    ),
    *_per_axis(
        "HighResNet",
        "batch",
        layer_params=(
            {"name": "conv_0", "n_features": 4, "kernel_size": 3},
            {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
            {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
            {"name": "conv_1", "n_features": 8, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1},
        ),
        **_BASIC,
    ),
    *_per_axis(
        "HighResNet",
        "instance",
        norm_type="instance",
        layer_params=(
            {"name": "conv_0", "n_features": 4, "kernel_size": 3},
            {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
            {"name": "conv_1", "n_features": 8, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1},
        ),
        **_BASIC,
    ),
    *_per_axis(
        "MedNeXt",
        "group",
        init_filters=4,
        kernel_size=3,
        blocks_down=(1, 1, 1, 1),
        blocks_bottleneck=1,
        blocks_up=(1, 1, 1, 1),
        **_BASIC,
    ),
    *_per_axis(
        "MedNeXt",
        "global response",
        init_filters=4,
        kernel_size=3,
        blocks_down=(1, 1, 1, 1),
        blocks_bottleneck=1,
        blocks_up=(1, 1, 1, 1),
        global_resp_norm=True,
        **_BASIC,
    ),
    _entry(
        "FlexibleUNet",
        "efficientnet-b0",
        (1, 3, 64, 64),
        in_channels=3,
        out_channels=2,
        backbone="efficientnet-b0",
        decoder_channels=(16, 8, 8, 4, 4),
    ),
    _entry(
        "FlexibleUNet",
        "resnet18",
        (1, 3, 64, 64),
        in_channels=3,
        out_channels=2,
        backbone="resnet18",
        decoder_channels=(16, 8, 8, 4, 4),
    ),
    _entry(
        "FlexibleUNet",
        "instance decoder",
        (1, 3, 64, 64),
        in_channels=3,
        out_channels=2,
        backbone="resnet18",
        norm="instance",
        decoder_channels=(16, 8, 8, 4, 4),
    ),
    *_per_axis("RegUNet", "", in_channels=1, num_channel_initial=4, depth=2, out_channels=2),
    *_per_axis(
        "LocalNet", "", in_channels=1, num_channel_initial=4, extract_levels=(0, 1, 2), out_channels=2
    ),
    _entry(
        "GlobalNet",
        "2D",
        FLAT,
        image_size=[64, 64],
        spatial_dims=2,
        in_channels=1,
        num_channel_initial=4,
        depth=2,
    ),
    _entry(
        "VoxelMorphUNet",
        "2D",
        (1, 2, 64, 64),
        spatial_dims=2,
        in_channels=2,
        unet_out_channels=4,
        channels=(4, 4, 8, 8),
        final_conv_channels=(4, 4),
    ),
    _entry(
        "VoxelMorphUNet",
        "instance 2D",
        (1, 2, 64, 64),
        spatial_dims=2,
        in_channels=2,
        unet_out_channels=4,
        channels=(4, 4, 8, 8),
        final_conv_channels=(4, 4),
        norm="instance",
    ),
    _entry(
        "AHNet",
        "2D",
        FLAT,
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        layers=(1, 1, 1, 1),
        psp_block_num=0,
        upsample_mode="bilinear",
    ),
    _entry(
        "AHNet",
        "transpose 3D",
        (1, 1, 32, 64, 64),
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        layers=(1, 1, 1, 1),
        psp_block_num=0,
    ),
    Entry(name="monai DiNTS 2D", library="monai", build=partial(_dints, 2), shape=FLAT),
    _entry(
        "UNETR",
        "2D",
        (1, 1, 64, 64),
        spatial_dims=2,
        img_size=64,
        feature_size=4,
        hidden_size=24,
        mlp_dim=32,
        num_heads=2,
        **_BASIC,
    ),
    _entry(
        "UNETR",
        "3D",
        SOLID,
        spatial_dims=3,
        img_size=32,
        feature_size=4,
        hidden_size=24,
        mlp_dim=32,
        num_heads=2,
        **_BASIC,
    ),
    _entry(
        "SwinUNETR",
        "2D",
        (1, 1, 64, 64),
        spatial_dims=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        window_size=4,
        **_BASIC,
    ),
    _entry(
        "SwinUNETR",
        "3D",
        (1, 1, 64, 64, 64),
        spatial_dims=3,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        window_size=4,
        **_BASIC,
    ),
    _entry(
        "SwinUNETR",
        "v2 2D",
        (1, 1, 64, 64),
        spatial_dims=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        window_size=4,
        use_v2=True,
        **_BASIC,
    ),
    _entry(
        "HoVerNet",
        "",
        (1, 3, 256, 256),
        mode="fast",
        in_channels=3,
        np_out_channels=2,
        out_classes=2,
        output="nucleus_prediction",
    ),
    _entry("Quicknat", "", FLAT, num_classes=2, num_channels=1, num_filters=4),
    *_per_axis("PatchDiscriminator", "batch", channels=4, in_channels=1, num_layers_d=2, output=-1),
    *_per_axis(
        "PatchDiscriminator",
        "instance",
        channels=4,
        in_channels=1,
        num_layers_d=2,
        norm="INSTANCE",
        output=-1,
    ),
    *_per_axis(
        "VQVAE",
        "",
        in_channels=1,
        out_channels=1,
        channels=(4, 8),
        num_res_channels=(4, 8),
        num_res_layers=1,
        downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=8,
        embedding_dim=4,
        output=0,
    ),
    *_per_axis(
        "AutoencoderKL",
        "",
        in_channels=1,
        out_channels=1,
        channels=(4, 8),
        num_res_blocks=(1, 1),
        attention_levels=(False, False),
        norm_num_groups=2,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        call=_reconstructed,
    ),
    *_per_axis(
        "AutoencoderKL",
        "attention",
        axes=(2,),
        in_channels=1,
        out_channels=1,
        channels=(4, 8),
        num_res_blocks=(1, 1),
        attention_levels=(False, False),
        norm_num_groups=2,
        call=_reconstructed,
    ),
    *_per_axis(
        "DiffusionModelUNet",
        "",
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_blocks=1,
        attention_levels=(False, False),
        norm_num_groups=2,
        call=_timed,
    ),
    *_per_axis(
        "DiffusionModelUNet",
        "attention",
        axes=(2,),
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_blocks=1,
        attention_levels=(False, True),
        num_head_channels=4,
        norm_num_groups=2,
        call=_timed,
    ),
    _entry(
        "ControlNet",
        "2D",
        FLAT,
        spatial_dims=2,
        in_channels=1,
        channels=(8, 8),
        num_res_blocks=1,
        attention_levels=(False, False),
        norm_num_groups=2,
        conditioning_embedding_in_channels=1,
        conditioning_embedding_num_channels=(4,),
        call=_controlled,
    ),
    _entry(
        "SPADENet",
        "2D",
        FLAT,
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        label_nc=1,
        input_shape=[64, 64],
        channels=[8, 8],
        is_vae=False,
        z_dim=4,
        call=_with_labels,
        dense=False,
    ),
    _entry(
        "SegResNetVAE",
        "2D",
        FLAT,
        input_image_size=(64, 64),
        spatial_dims=2,
        vae_nz=8,
        init_filters=8,
        output=0,
        **_BASIC,
    ),
    *_per_axis(
        "DenseNet",
        "classifier",
        in_channels=1,
        out_channels=2,
        init_features=4,
        growth_rate=4,
        block_config=(2, 2),
        dense=False,
    ),
    _entry(
        "SEResNet50",
        "classifier 2D",
        FLAT,
        spatial_dims=2,
        in_channels=1,
        num_classes=2,
        layers=(1, 1, 1, 1),
        inplanes=64,
        dense=False,
    ),
    _entry(
        "EfficientNetBN",
        "classifier 2D",
        (1, 3, 64, 64),
        model_name="efficientnet-b0",
        pretrained=False,
        num_classes=2,
        dense=False,
    ),
    _entry(
        "Classifier",
        "2D",
        FLAT,
        in_shape=(1, 64, 64),
        classes=2,
        channels=(4, 8),
        strides=(2, 2),
        dense=False,
    ),
    _entry(
        "Regressor",
        "2D",
        FLAT,
        in_shape=(1, 64, 64),
        out_shape=(2,),
        channels=(4, 8),
        strides=(2, 2),
        dense=False,
    ),
    _entry("Discriminator", "2D", FLAT, in_shape=(1, 64, 64), channels=(4, 8), strides=(2, 2), dense=False),
    _entry(
        "ViT",
        "classifier 2D",
        FLAT,
        in_channels=1,
        img_size=64,
        patch_size=16,
        hidden_size=24,
        mlp_dim=32,
        num_layers=2,
        num_heads=2,
        spatial_dims=2,
        classification=True,
        output=0,
        dense=False,
    ),
    _entry(
        "ViTAutoEnc",
        "2D",
        FLAT,
        in_channels=1,
        img_size=64,
        patch_size=16,
        hidden_size=24,
        mlp_dim=32,
        num_layers=2,
        num_heads=2,
        spatial_dims=2,
        output=0,
    ),
)
