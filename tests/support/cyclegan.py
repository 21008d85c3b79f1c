"""A generator as pytorch-CycleGAN-and-pix2pix builds it: what norm it has decides whether convolutions have biases."""

import functools

from torch import nn


def get_norm_layer(norm_type="instance"):
    """Return a layer with its settings bound."""
    if norm_type == "batch":
        return functools.partial(nn.BatchNorm2d, affine=True, track_running_stats=True)
    return functools.partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)


class ResnetGenerator(nn.Module):
    """Two convolutions down, residual blocks, two up."""

    def __init__(self, input_nc, output_nc, ngf, norm_layer, n_blocks):
        super().__init__()
        bias = norm_layer.func == nn.InstanceNorm2d
        model = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(input_nc, ngf, 7, bias=bias),
            norm_layer(ngf),
            nn.ReLU(True),
        ]
        down = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": bias}
        model += [nn.Conv2d(ngf, 2 * ngf, **down), norm_layer(2 * ngf), nn.ReLU(True)]
        model += [ResnetBlock(2 * ngf, norm_layer, bias) for _ in range(n_blocks)]
        model += [nn.ConvTranspose2d(2 * ngf, ngf, output_padding=1, **down), norm_layer(ngf), nn.ReLU(True)]
        model += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, output_nc, 7), nn.Tanh()]
        self.model = nn.Sequential(*model)

    def forward(self, image):
        return self.model(image)


class ResnetBlock(nn.Module):
    """Adds two convolutions with norms to what it gets."""

    def __init__(self, dim, norm_layer, bias):
        super().__init__()
        block = [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3, bias=bias), norm_layer(dim), nn.ReLU(True)]
        block += [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3, bias=bias), norm_layer(dim)]
        self.conv_block = nn.Sequential(*block)

    def forward(self, x):
        return x + self.conv_block(x)


def define_G(input_nc, output_nc, ngf, netG="resnet_1blocks", norm="batch", use_dropout=False):  # noqa: N802, N803
    """Build a generator by its name."""
    return ResnetGenerator(input_nc, output_nc, ngf, get_norm_layer(norm), int(netG[7]))
