"""diffusers: autoencoders in 2D and 3D and denoising U-Nets, in tiny configurations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Entry

__all__ = ["ENTRIES"]


def _net(kind: str, arguments: dict[str, Any]) -> nn.Module:
    import diffusers

    return getattr(diffusers, kind)(**arguments)


def _sample(model: nn.Module, image: Tensor) -> Any:
    return model(image).sample


def _timed(model: nn.Module, image: Tensor) -> Any:
    return model(image, 10).sample


def _prompted(model: nn.Module, image: Tensor) -> Any:
    return model(image, 10, _prompt(image)).sample


def _controlled(model: nn.Module, image: Tensor) -> Any:
    hint = nn.functional.interpolate(image[:, :3], scale_factor=8.0)
    return model(image, 10, _prompt(image), hint).down_block_res_samples[2]


def _frames(model: nn.Module, image: Tensor) -> Any:
    return model(image, num_frames=len(image)).sample


def _last(model: nn.Module, image: Tensor) -> Any:
    return model(image)[-1]


def _prompt(image: Tensor) -> Tensor:
    words = torch.linspace(-1, 1, 4 * 8, device=image.device, dtype=image.dtype)
    return words.reshape(1, 4, 8).expand(len(image), 4, 8)


def _entry(
    kind: str,
    variant: str = "",
    *,
    call: Any = _sample,
    shape: tuple[int, ...] = (1, 3, 64, 64),
    **arguments: Any,
) -> Entry:
    return Entry(
        name=f"diffusers {kind} {variant}".strip(),
        library="diffusers",
        build=partial(_net, kind, arguments),
        shape=shape,
        call=call,
    )


_TWO: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
_CODER = _TWO | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_PLAIN = _TWO | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
_CROSS = _TWO | {"cross_attention_dim": 8, "attention_head_dim": 4}
_VIDEO: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
_LATENT = (1, 4, 32, 32)

ENTRIES = (
    _entry("AutoencoderKL", mid_block_add_attention=False, **_CODER),
    _entry("AutoencoderKL", "attention", **_CODER),
    _entry("VQModel", mid_block_add_attention=False, num_vq_embeddings=8, **_CODER),
    _entry(
        "VQModel",
        "spatial",
        mid_block_add_attention=False,
        num_vq_embeddings=8,
        norm_type="spatial",
        **(_CODER | {"block_out_channels": (32, 32), "norm_num_groups": 32}),
    ),
    _entry(
        "AutoencoderTiny",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    _entry(
        "AsymmetricAutoencoderKL",
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_out_channels=(8, 16),
        up_block_out_channels=(8, 16),
        norm_num_groups=4,
    ),
    _entry(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ),
    _entry("AutoencoderKLFlux2", mid_block_add_attention=False, **_CODER),
    _entry(
        "AutoencoderKLTemporalDecoder",
        call=_frames,
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
    ),
    _entry("UNet2DModel", call=_timed, add_attention=False, **_PLAIN),
    _entry(
        "UNet2DModel",
        "scale shift",
        call=_timed,
        add_attention=False,
        resnet_time_scale_shift="scale_shift",
        **_PLAIN,
    ),
    _entry(
        "UNet2DModel",
        "resnet sampling",
        call=_timed,
        add_attention=False,
        downsample_type="resnet",
        upsample_type="resnet",
        **(
            _TWO
            | {
                "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
                "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
            }
        ),
    ),
    _entry(
        "UNet2DModel",
        "skip",
        call=_timed,
        add_attention=False,
        **(
            _TWO
            | {
                "down_block_types": ("SkipDownBlock2D",) * 2,
                "up_block_types": ("SkipUpBlock2D",) * 2,
                "block_out_channels": (32, 32),
            }
        ),
    ),
    _entry(
        "UNet2DModel",
        "attention",
        call=_timed,
        attention_head_dim=4,
        **(
            _TWO
            | {
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            }
        ),
    ),
    _entry(
        "UNet2DConditionModel",
        call=_prompted,
        shape=_LATENT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **_CROSS,
    ),
    _entry(
        "UNet2DConditionModel",
        "cross attention only",
        call=_prompted,
        shape=_LATENT,
        only_cross_attention=True,
        mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **_CROSS,
    ),
    _entry(
        "UNet2DConditionModel",
        "convolutions",
        call=_prompted,
        shape=_LATENT,
        mid_block_type=None,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **_CROSS,
    ),
    _entry(
        "ControlNetModel",
        call=_controlled,
        shape=_LATENT,
        down_block_types=("DownBlock2D",) * 2,
        conditioning_embedding_out_channels=(4, 4, 8, 8),
        **_CROSS,
    ),
    _entry("T2IAdapter", call=_last, shape=(1, 3, 256, 256), channels=[8, 8, 8, 8], num_res_blocks=1),
    _entry(
        "T2IAdapter",
        "light",
        call=_last,
        shape=(1, 3, 256, 256),
        channels=[8, 8, 8],
        num_res_blocks=1,
        adapter_type="light_adapter",
    ),
    _entry(
        "UNet1DModel",
        call=_timed,
        shape=(1, 2, 256),
        in_channels=2,
        extra_in_channels=64,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    ),
    _entry(
        "UNet3DConditionModel",
        call=_prompted,
        shape=(1, 4, 4, 16, 16),
        down_block_types=("DownBlock3D",) * 2,
        up_block_types=("UpBlock3D",) * 2,
        **_CROSS,
    ),
    _entry("AutoencoderKLCogVideoX", shape=(1, 3, 9, 32, 32), latent_channels=4, **_VIDEO),
    _entry(
        "AutoencoderKLHunyuanVideo",
        shape=(1, 3, 9, 32, 32),
        latent_channels=4,
        mid_block_add_attention=False,
        **_VIDEO,
    ),
    _entry(
        "AutoencoderKLWan",
        shape=(1, 3, 9, 32, 32),
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
    ),
    _entry(
        "AutoencoderKLLTXVideo",
        shape=(1, 3, 9, 64, 64),
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    ),
)
