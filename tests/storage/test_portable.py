"""A network of BatchNorms goes back into its own ecosystem, which loads it with its own from_pretrained."""

import pytest
import torch
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.storage.opening import open_model

IMAGE = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(4))
OTHER = torch.randn(1, 1, 96, 64, generator=torch.Generator().manual_seed(5))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own


def used(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics that are not those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def returned(folder):
    """Convert what a folder holds and save it portably; return the conversion."""
    opened = open_model(str(folder))
    done = normfix.convert(opened.model)
    normfix.save(done, folder.parent / "back", opened.source, portable=True, partial=True)
    return done


def assert_same(actual, expected, image=OTHER):
    """Two networks give the same, on an image that nothing was measured on."""
    with torch.no_grad():
        a, e = actual.eval()(image), expected(image)
    a, e = (x if isinstance(x, torch.Tensor) else next(iter(x.values())) for x in (a, e))
    torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.slow
def test_smp_loads_what_was_given_back(tmp_path):
    """segmentation_models_pytorch.from_pretrained gives the converted network's output."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    small = smp.Unet(
        "resnet18", encoder_weights=None, in_channels=1, encoder_depth=3, decoder_channels=(16, 8, 8)
    )
    used(small).save_pretrained(tmp_path / "smp")
    done = returned(tmp_path / "smp")
    assert done.plan.converted
    assert_same(smp.from_pretrained(tmp_path / "back"), done.model)


@pytest.mark.slow
def test_timm_loads_what_was_given_back(tmp_path):
    """timm.create_model('local-dir:...') gives the converted network's output."""
    timm = pytest.importorskip(
        "timm", minversion="1.0.20"
    )  # earlier ones take safetensors in a folder for a pickle
    from timm.models import save_for_hf

    model = used(timm.create_model("test_resnet", in_chans=1, num_classes=3))
    args = {"in_chans": 1, "num_classes": 3}
    save_for_hf(model, str(tmp_path / "timm"), model_args=args, safe_serialization=True)
    opened = open_model(str(tmp_path / "timm"))
    done = normfix.convert(opened.model)
    normfix.save(done, tmp_path / "back", opened.source, portable=True, partial=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
    assert_same(again, done.model)


@pytest.mark.slow
def test_transformers_loads_what_was_given_back(tmp_path):
    """transformers' from_pretrained gives the converted network's output."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"
    )
    used(transformers.ResNetModel(config)).save_pretrained(tmp_path / "hf")
    opened = open_model(str(tmp_path / "hf"))
    done = normfix.convert(opened.model, output="last_hidden_state")
    normfix.save(done, tmp_path / "back", opened.source, portable=True, partial=True)
    again, info = transformers.ResNetModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert_same(again, done.model)


@pytest.mark.slow
def test_diffusers_loads_what_was_given_back(tmp_path):
    """A component of a pipeline with BatchNorms goes back into its folder: its own from_pretrained gives the same."""
    diffusers = pytest.importorskip("diffusers")
    shape = {
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1),
        "block_types": ("ResBlock", "ResBlock"),
        "qkv_multiscales": ((), ()),
    }
    settings = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shape.items()
    } | {"decoder_norm_types": "batch_norm", "decoder_act_fns": "silu"}
    model = used(diffusers.AutoencoderDC(in_channels=1, latent_channels=2, attention_head_dim=4, **settings))
    model.save_pretrained(tmp_path / "vae")
    opened = open_model(str(tmp_path / "vae"))
    done = normfix.convert(opened.model, IMAGE, output="sample")
    normfix.save(done, tmp_path / "back", opened.source, portable=True, partial=True)
    again, info = diffusers.AutoencoderDC.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert done.plan.converted
    assert_same(again, done.model)


@pytest.mark.slow
def test_a_group_norm_network_of_diffusers_is_refused(tmp_path):
    """diffusers' class has no place for the statistics of GroupNorms: NF411, and nothing is written."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=2
    )
    model.save_pretrained(tmp_path / "vae")
    opened = open_model(str(tmp_path / "vae"))
    done = normfix.convert(opened.model, IMAGE, output="sample")
    with pytest.raises(NormfixError, match="NF411"):
        normfix.save(done, tmp_path / "back", opened.source, portable=True, partial=True)
    assert not (tmp_path / "back").exists()


def test_a_network_without_its_original_names_is_refused():
    """A state that lacks a name of the original class is NF412."""
    from normfix.storage.portable import returned

    with pytest.raises(NormfixError, match="NF412"):
        returned(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1))
