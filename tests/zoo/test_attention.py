"""Real networks that attend to all positions: in stages they give what they give for the whole image."""

import inspect
import linecache
import textwrap

import pytest
import torch
from torch import nn

import normfix

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


class PositionAttention(nn.Module):
    """The position attention of DANet (Fu et al., arXiv 1809.02983), as its authors write it."""

    def __init__(self, channels):
        super().__init__()
        self.query, self.key = (nn.Conv2d(channels, channels // 4, 1) for _ in range(2))
        self.value, self.gamma = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.ones(1))

    def forward(self, x):
        n, c, h, w = x.size()
        query = self.query(x).view(n, -1, w * h).permute(0, 2, 1)
        weights = torch.softmax(torch.bmm(query, self.key(x).view(n, -1, w * h)), dim=-1)
        out = torch.bmm(self.value(x).view(n, -1, w * h), weights.permute(0, 2, 1))
        return self.gamma * out.view(n, c, h, w) + x


class ChannelAttention(nn.Module):
    """The channel attention of DANet: products of channels over all positions."""

    def forward(self, x):
        n, c, h, w = x.size()
        flat = x.view(n, c, -1)
        energy = torch.bmm(flat, flat.permute(0, 2, 1)) / (h * w)
        weights = torch.softmax(energy.max(-1, keepdim=True)[0].expand_as(energy) - energy, dim=-1)
        return x + torch.bmm(weights, flat).view(n, c, h, w)


class Both(nn.Module):
    """The sum of two branches, as DANet has it."""

    def __init__(self, channels):
        super().__init__()
        self.position, self.channel = PositionAttention(channels), ChannelAttention()

    def forward(self, x):
        return self.position(x) + self.channel(x)


class NonLocal(nn.Module):
    """The non-local block, embedded Gaussian (Wang et al., arXiv 1711.07971), with subsampled keys."""

    def __init__(self, channels):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.out, self.pool = nn.Conv2d(channels // 2, channels, 1), nn.MaxPool2d(2)

    def forward(self, x):
        n = x.size(0)
        theta = self.theta(x).flatten(2).permute(0, 2, 1)
        phi, g = self.pool(self.phi(x)).flatten(2), self.pool(self.g(x)).flatten(2).permute(0, 2, 1)
        y = torch.matmul(torch.softmax(torch.matmul(theta, phi), dim=-1), g).permute(0, 2, 1).contiguous()
        return x + self.out(y.view(n, -1, *x.size()[2:]))


class Encoded(nn.Module):
    """A transformer's layer over the tokens of patches, between a patch embedding and its inverse."""

    def __init__(self):
        super().__init__()
        self.patches, self.back = nn.Conv2d(1, 8, 4, 4), nn.ConvTranspose2d(8, 1, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

    def forward(self, x):
        y = self.patches(x)
        return self.back(self.layer(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape))


def _between_convolutions(attention):
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, 2, 1), nn.InstanceNorm2d(8), nn.ReLU(), attention),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(8, 1, 3, padding=1)),
    )


def danet():
    return _between_convolutions(PositionAttention(8)), 1, None


def danet_dual():
    return _between_convolutions(Both(8)), 1, None


def non_local():
    return _between_convolutions(NonLocal(8)), 1, None


def transformer():
    return Encoded(), 1, None


def segformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=3,
    )
    return transformers.SegformerForSemanticSegmentation(config), 3, lambda m, x: m(x).logits


def autoencoder_kl():
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
    )
    return net, 3, lambda m, x: m.decode(m.encode(x).latent_dist.mode()).sample


def unet2d():
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return net, 1, lambda m, x: m(x, timestep=7).sample


def monai_autoencoder():
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=(1, 1),
        channels=(8, 16),
        attention_levels=(False, True),
        latent_channels=2,
        norm_num_groups=4,
    )
    return net, 1, lambda m, x: m.reconstruct(x)


def attention_unet():
    nets = pytest.importorskip("monai.networks.nets")
    return nets.AttentionUnet(2, 1, 1, (8, 16), (2,)), 1, None


def _of_timm(name):
    """Return an attention block of timm between convolutions with norms."""

    def build():
        layers = pytest.importorskip("timm.layers")
        return _between_convolutions(layers.create_attn(name, 8)), 1, None

    build.__name__ = name
    return build


def scse():
    modules = pytest.importorskip("segmentation_models_pytorch.base.modules")
    return _between_convolutions(modules.SCSEModule(8, 2)), 1, None


GATES = ("se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam", "nl")
"""Blocks that weigh channels or positions by the whole image, by timm's names."""


@pytest.mark.parametrize(
    "build",
    [
        danet,
        danet_dual,
        scse,
        *map(_of_timm, GATES),
        non_local,
        transformer,
        segformer,
        autoencoder_kl,
        unet2d,
        monai_autoencoder,
        attention_unet,
    ],
    ids=lambda build: build.__name__,
)
def test_an_unconverted_network_gives_its_whole_image_output(build):
    """To 1e-9 standard deviations in float64, where its tiles would not."""
    torch.manual_seed(0)
    net, channels, call = build()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5).add_(0.05)
    net = net.double().eval()
    image = torch.rand(1, channels, 64, 96, dtype=torch.float64) + torch.linspace(
        0, 1, 96, dtype=torch.float64
    )
    given = normfix.predict(net, image, tile=32, statistics="per-image", forward_fn=call)
    with torch.no_grad():
        expected = call(net, image) if call else net(image)
    assert float((given - expected).abs().max() / expected.std()) < 1e-9


class Decodes(nn.Module):
    """The decoder of an autoencoder."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent):
        return self.autoencoder.decode(latent)


@pytest.fixture
def maisi(monkeypatch):
    """MONAI's MAISI with norms that keep the dtype of what they normalise: its own compute in float32 always."""
    networks = pytest.importorskip("monai.apps.generation.maisi.networks.autoencoderkl_maisi")
    source = textwrap.dedent(inspect.getsource(networks.MaisiGroupNorm3D.forward))
    assert ".to(dtype=torch.float32)" in source
    source, names = source.replace(".to(dtype=torch.float32)", ""), dict(vars(networks))
    monkeypatch.setitem(linecache.cache, "maisi.py", (len(source), None, source.splitlines(True), "maisi.py"))
    exec(compile(source, "maisi.py", "exec"), names)
    monkeypatch.setattr(networks.MaisiGroupNorm3D, "forward", names["forward"])
    return networks


@pytest.mark.parametrize("splits", [1, 2])
def test_the_decoder_of_maisi_gives_its_whole_volume_output(maisi, splits):
    """Norms group by group, attention between all voxels, convolutions in parts: a volume of no whole blocks."""
    torch.manual_seed(0)
    autoencoder = maisi.AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        num_channels=[8, 16],
        num_res_blocks=[1, 1],
        norm_num_groups=4,
        norm_eps=1e-6,
        attention_levels=[False, False],
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=True,
        norm_float16=False,
        num_splits=splits,
        dim_split=1,
        print_info=False,
        save_mem=False,
    )
    net, latent = Decodes(autoencoder).double().eval(), torch.randn(1, 2, 13, 18, 15, dtype=torch.float64)
    given = normfix.predict(net, latent, tile=8, statistics="per-image")
    with torch.no_grad():
        expected = net(latent)
    assert float((given - expected).abs().max() / expected.std()) < 1e-9


class Windowed(nn.Module):
    """Two levels of torchvision's Swin with windows of four, and a norm of the image after them."""

    def __init__(self, swin):
        super().__init__()
        self.windows, self.first, self.last = (
            swin.features,
            nn.Conv2d(24, 8, 3, padding=1),
            nn.Conv2d(8, 2, 1),
        )
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        y = self.norm(self.first(self.windows(x).permute(0, 3, 1, 2)))
        return self.last(y.relu())


def test_shifted_windows_that_fill_their_masks_run_in_blocks(caplog):
    """Their graph is one of multiples; the masks are filled slice by slice, relative to the image's end."""
    swin = pytest.importorskip("torchvision.models.swin_transformer").SwinTransformer
    torch.manual_seed(0)
    net = Windowed(swin([2, 2], 12, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0)).double().eval()
    image = torch.rand(1, 3, 96, 128, dtype=torch.float64)
    given = normfix.predict(net, image, tile=32, statistics="per-image")
    with torch.no_grad():
        expected = net(image)
    assert float((given - expected).abs().max() / expected.std()) < 1e-9
    assert "passes over whole images" not in caplog.text
