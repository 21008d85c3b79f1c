"""The main job on networks people use: MONAI, timm and the demo network, on real nuclei."""

import pytest
import torch
from torch import nn

import normfix
from normfix.demo.data import nuclei_image
from normfix.demo.network import nuclei_unet
from normfix.demo.show import SCALING
from normfix.images.axes import to_tensor
from normfix.images.scaling import scaled


@pytest.fixture(scope="module")
def nuclei():
    """Return 256x384 real nuclei, (1, 1, H, W), bright cells at one end."""
    return to_tensor(scaled(nuclei_image()[:256, 704:1088][None], SCALING))


def monai_unet():
    """MONAI's BasicUNet: 18 InstanceNorms."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 32, 8))


def monai_segresnet():
    """MONAI's SegResNet: GroupNorms in pre-activation order."""
    from monai.networks.nets import SegResNet

    return SegResNet(
        2, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1, 1), blocks_up=(1, 1)
    )


def timm_group_norm():
    """timm's ResNet with its own GroupNorm subclass, as a feature extractor of stride 8."""
    import timm

    return timm.create_model("resnet50_gn", features_only=True, out_indices=(1,), in_chans=1)


def timm_batch_norm_act():
    """timm's EfficientNet stem and first blocks: BatchNormAct2d, a subclass with a fused activation."""
    import timm

    return timm.create_model("mobilenetv4_conv_small", features_only=True, out_indices=(1,), in_chans=1)


def timm_resnet18():
    """timm's ResNet with plain BatchNorm."""
    import timm

    return timm.create_model("resnet18", features_only=True, out_indices=(1,), in_chans=1)


NETWORKS = {
    "demo": (nuclei_unet, None, 14),
    "monai BasicUNet": (monai_unet, None, 18),
    "monai SegResNet": (monai_segresnet, None, None),
    "timm resnet50_gn": (timm_group_norm, 0, 11),
    "timm mobilenetv4": (timm_batch_norm_act, 0, None),
    "timm resnet18": (timm_resnet18, 0, 5),
}
DEAR = ("demo", "monai BasicUNet", "timm mobilenetv4")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["frozen", pytest.param("batchrenorm", marks=pytest.mark.zoo)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.zoo if n in DEAR else ()) for n in NETWORKS]
)
def test_converts_and_proves(name, to, nuclei, tmp_path):
    """The network is converted, equals the original on the image to 1e-4 sd, and its tiles equal the whole."""
    factory, output, sites = NETWORKS[name]
    torch.manual_seed(0)
    model = factory().eval()
    done = normfix.convert(model, nuclei, to, output=output)
    assert done.proof.passed, done.proof.steps
    assert sites is None or len(done.plan.converted) == sites
    identity = done.proof.step("identity").value
    assert identity is not None
    assert identity <= 1e-4
    normfix.save(done, tmp_path / "out")
    again = normfix.load(tmp_path / "out", model=factory())
    with torch.no_grad():
        mine, theirs = done.model.eval()(nuclei), again(nuclei)
    for a, b in zip(mine if output == 0 else [mine], theirs if output == 0 else [theirs], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_monai_3d():
    """A 3D U-Net with InstanceNorm is converted and proved on strips, its windows being larger than the volume."""
    from monai.networks.nets import UNet

    model = UNet(3, 1, 1, channels=(4, 8), strides=(2,))
    done = normfix.convert(model, torch.rand(1, 1, 16, 24, 24))
    assert done.proof.passed, done.proof.steps
    assert done.scan.stride == (2, 2, 2)


@pytest.mark.zoo
def test_monai_3d_deep():
    """MONAI's BasicUNet in 3D has the halo that was measured for it by other means, and is proved."""
    from monai.networks.nets import BasicUNet

    model = BasicUNet(3, 1, 1, features=(4, 4, 4, 4, 4, 4))
    done = normfix.convert(model, torch.rand(1, 1, 32, 48, 48))
    assert done.proof.passed, done.proof.steps
    assert done.scan.halo == ((94, 94),) * 3


@pytest.mark.slow
def test_original_seams_on_real_image(nuclei):
    """The negative control: the demo network's own tiles are more than 0.1 sd from its whole-image output."""
    verdict = normfix.check(nuclei_unet(), nuclei, tile=64)
    assert verdict.status == "failed"
    assert verdict.max_sd > 0.1


@pytest.mark.zoo
def test_conditional_shift_is_only_said_for_one_image(nuclei):
    """With a second image, the report shows that neither prediction is the original's any more."""
    done = normfix.convert(nuclei_unet(), [nuclei, nuclei.flip(-1)[..., :256] * 0.5])
    assert done.proof.passed
    assert all(shift.max_sd > 1e-3 for shift in done.proof.shifts)


@pytest.mark.zoo
def test_result_is_the_users_class(nuclei):
    """The converted network is still a NucleiUNet, trainable, with InstanceNorm gone from its path."""
    model = normfix.convert(nuclei_unet(), nuclei, "batchrenorm").model
    assert type(model).__name__ == "NucleiUNet"
    assert not any(isinstance(m, nn.InstanceNorm2d) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
