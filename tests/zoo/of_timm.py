"""timm: backbones cut after a stage, so that their feature maps are dense, and whole classifiers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from .entry import Entry

__all__ = ["ENTRIES"]


def _features(model: str, stage: int, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(model, features_only=True, out_indices=(stage,), **options)


def _whole(model: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(model, **options)


def _moved(model: nn.Module, image: Tensor) -> Any:
    return model(image)[0].movedim(-1, 1)


def _dense(model: str, stage: int = 2, size: int = 128, **options: Any) -> Entry:
    return Entry(
        name=f"timm {model}",
        library="timm",
        build=partial(_features, model, stage, **options),
        shape=(1, 3, size, size),
        output=0,
    )


def _classifier(model: str, size: int = 64, **options: Any) -> Entry:
    return Entry(
        name=f"timm {model} classifier",
        library="timm",
        build=partial(_whole, model, num_classes=5, **options),
        shape=(1, 3, size, size),
        dense=False,
    )


_CONVOLUTIONAL = """
    resnet10t resnet18 resnet26d resnet33ts resnet50 resnet50s resnet51q resnetaa50 resnetblur18 resnetrs50
    resnet50_gn resnetv2_18d resnetv2_50t resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn resnetv2_50x1_bit
    resnext26ts seresnet18 seresnext26d_32x4d seresnextaa101d_32x8d legacy_seresnet18 legacy_seresnext26_32x4d
    legacy_senet154 skresnet18 skresnext50_32x4d ecaresnet26t ecaresnext26t_32x4d eca_resnet33ts eca_resnext26ts
    gcresnet33ts gcresnext26ts gcresnext50ts bat_resnext26ts wide_resnet50_2 resnest14d resnest26d
    regnetx_002 regnety_002 regnetz_b16 regnetz_b16_evos regnetz_005 regnetv_040 gernet_s repvgg_a0 mobileone_s0
    repghostnet_050 repvit_m0_9 fastvit_t8 mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050
    mobilenetv3_large_075 mobilenetv4_conv_small_050 mobilenetv4_conv_blur_medium efficientnet_b0 efficientnet_lite0
    efficientnet_es efficientnet_b0_gn efficientnet_b0_g8_gn efficientnet_b0_g16_evos efficientnet_b3_gn
    efficientnetv2_s efficientnet_cc_b0_4e efficientnet_blur_b0 tf_efficientnet_lite0 tf_mobilenetv3_small_minimal_100
    tf_efficientnetv2_b0 mixnet_s mnasnet_small semnasnet_075 fbnetc_100 fbnetv3_b spnasnet_100 lcnet_035 tinynet_e
    hardcorenas_a ghostnet_050 ghostnetv2_100 ghostnetv3_050 rexnet_100 rexnetr_130 nf_resnet26 nf_seresnet26
    nf_ecaresnet26 nf_regnet_b0 nfnet_l0 eca_nfnet_l0 dm_nfnet_f0 densenet121 densenetblur121d dla34 dla46_c
    dla60_res2net res2net50_14w_8s res2next50 vgg11 vgg11_bn vovnet39a ese_vovnet19b_dw ese_vovnet39b_evos
    eca_vovnet39b cspresnet50 cspresnext50 cspdarknet53 cs3darknet_s cs3darknet_focus_s cs3sedarknet_l cs3se_edgenet_x
    darknet17 darknetaa53 cspnext_tiny hrnet_w18_small hrnet_w18_ssld inception_v3 inception_v4 inception_resnet_v2
    inception_next_atto xception41 xception41p legacy_xception selecsls42 dpn48b dpn68 convnext_atto convnext_atto_ols
    convnext_atto_rms convnextv2_atto edgenext_xx_small focalnet_tiny_srf poolformer_s12 poolformerv2_s12
    convformer_s18 hgnet_tiny hgnetv2_b0 rdnet_tiny starnet_s050 shvit_s1 tresnet_m fasternet_t0
    lcnetv2_small convmixer_768_32 csatv2 nasnetalarge pnasnet5large test_byobnet test_convnext
    test_convnext2 test_convnext3 test_efficientnet test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos
    test_nfnet test_resnet
"""

_ATTENDING = """
    botnet26t_256 sebotnet33ts_256 halonet26t lambda_resnet26t
    efficientvit_b0 caformer_s18 mobilenetv4_hybrid_medium mobilevit_xxs
    mobilevitv2_050 davit_tiny nextvit_small pvt_v2_b0 repvit_m1 swiftformer_xs
"""

_SIZED = {  # (stage, size)
    "coat_lite_tiny": (1, 224),
    "efficientformer_l1": (3, 224),
    "efficientformerv2_s0": (3, 224),
    "efficientvim_m1": (1, 128),
    "efficientvit_m0": (1, 224),
    "gcvit_xxtiny": (1, 224),
    "haloregnetz_b": (3, 224),
    "hiera_tiny_224": (1, 224),
    "swinv2_cr_tiny_224": (1, 224),
    "test_coatnet": (3, 160),
    "test_maxvit": (3, 160),
    "visformer_tiny": (1, 224),
    "vit_tiny_patch16_224": (1, 224),
}

_CHANNELS_LAST = {"mambaout_femto": 128, "swin_tiny_patch4_window7_224": 224, "test_mambaout": 128}

_CLASSIFIERS = """
    resnet18 resnet50_gn mobilenetv3_small_050 efficientnet_b0 convnextv2_atto convnext_atto densenet121 nf_resnet26
    ghostnet_050 test_vit test_resnet
"""

ENTRIES = (
    *(
        _dense(model)
        for model in _CONVOLUTIONAL.split()
        if model not in ("inception_v3", "inception_v4", "inception_resnet_v2")
    ),
    *(_dense(model, size=160) for model in ("inception_v3", "inception_v4", "inception_resnet_v2")),
    *(_dense(model, stage=3, size=256 if "_256" in model else 128) for model in _ATTENDING.split()),
    *(_dense(model, stage=stage, size=size) for model, (stage, size) in _SIZED.items()),
    *(
        replace(_dense(model, stage=1, size=size), call=_moved, output=None)
        for model, size in _CHANNELS_LAST.items()
    ),
    *(_classifier(model, size=160 if "vit" in model else 64) for model in _CLASSIFIERS.split()),
)
