"""Networks that look as if they knew the whole image and do not (LOCAL), and their twins that do (GLOBAL).

Each holds one operation between two convolutions; a twin differs from its local network as little as possible.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn


class Between(nn.Module):
    """Convolution, a function of the map (N, 4, H, W), convolution."""

    def __init__(self, function, **children):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.head(self.function(self, self.stem(x)))


class Flat(nn.Module):
    """A small network that averaging over symmetries runs several times."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, (5, 3), padding=(2, 1))

    def forward(self, x):
        return self.two(F.relu(self.one(x)))


class Averaged(nn.Module):
    """The mean of a network over symmetries; `undo` turns its output back."""

    def __init__(self, pairs):
        super().__init__()
        self.net, self.pairs = Flat(), pairs

    def forward(self, x):
        return torch.stack([undo(self.net(do(x))) for do, undo in self.pairs]).mean(0)


def same(x):
    return x


def across(x):
    return x.flip(-1)


def down(x):
    return torch.flip(x, (2,))


def both(x):
    return x.flip((2, 3))


def swapped(x):
    return x.transpose(2, 3)


def turned(k):
    return lambda x: torch.rot90(x, k, (2, 3))


FLIPS = [(same, same), (across, across), (down, down), (both, both)]
TURNS = [(turned(k), turned(-k)) for k in range(4)]
MIRRORED_TURNS = TURNS + [
    (lambda x, k=k: torch.rot90(x.flip(-1), k, (2, 3)), lambda y, k=k: torch.rot90(y, -k, (2, 3)).flip(-1))
    for k in range(4)
]


def pooled(pool, divisor):
    """Pool to a share of the extents, and back."""

    def function(net, x):
        size = tuple(n // divisor for n in x.shape[2:])
        y = pool(x, size)
        return F.interpolate(y[0] if isinstance(y, tuple) else y, size=x.shape[2:])

    return function


def fixed_pool(pool):
    def function(net, x):
        return F.interpolate(pool(x, (4, 4)), size=x.shape[2:])

    return function


def half_fixed(net, x):
    """Along rows in proportion, along columns to four cells."""
    return F.interpolate(F.adaptive_max_pool2d(x, (4, x.shape[3] // 2)), size=x.shape[2:])


def blocks_of(x, size):
    n, c, h, w = x.shape
    tokens = x.view(n, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1)
    return tokens.reshape(-1, size * size, c)  # (n*h/s*w/s, s*s, c)


def from_blocks(tokens, x, size):
    n, c, h, w = x.shape
    return tokens.view(n, h // size, w // size, size, size, c).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def block_attention(net, x, size=8):
    tokens = blocks_of(x, size)
    return from_blocks(F.scaled_dot_product_attention(tokens, tokens, tokens), x, size)


def block_products(net, x, size=8):
    tokens = blocks_of(x, size)
    return from_blocks((tokens @ tokens.mT).softmax(-1) @ tokens, x, size)


def block_mlp(net, x, size=8):
    """Every pixel of a block is mixed with every other by a linear layer."""
    return from_blocks(net.mix(blocks_of(x, size).mT).mT, x, size)


def shifted_attention(net, x, size=8):
    """Blocks shifted by half a block, by padding."""
    y = F.pad(x, (size // 2, size // 2, size // 2, size // 2), mode="reflect")
    return block_attention(net, y, size)[..., size // 2 : -size // 2, size // 2 : -size // 2]


def all_tokens(net, x):
    tokens = F.max_pool2d(x, 4).flatten(2).mT
    y = F.scaled_dot_product_attention(tokens, tokens, tokens).mT
    return x + F.interpolate(y.reshape(*x.shape[:2], x.shape[2] // 4, x.shape[3] // 4), scale_factor=4)


def grid_attention(net, x, parts=8):
    """MaxViT's other half: one pixel of each of 8x8 parts of the image, whose distance grows with it."""
    n, c, h, w = x.shape
    tokens = (
        x.view(n, c, parts, h // parts, parts, w // parts).permute(0, 3, 5, 2, 4, 1).reshape(-1, parts**2, c)
    )
    y = F.scaled_dot_product_attention(tokens, tokens, tokens)
    return y.view(n, h // parts, w // parts, parts, parts, c).permute(0, 5, 3, 1, 4, 2).reshape(x.shape)


def signs(net, x):
    return x + net.side(torch.sign(net.side(x)))


def thresholded(net, x):
    return x + net.side(F.threshold(net.side(x), 0.1, 0.0))


def cleaned(net, x):
    return x + net.side(torch.nan_to_num(net.side(x)))


def capped(net, x):
    return torch.fmin(torch.fmax(net.side(x), torch.tensor(-0.5)), x)


def fake_quantised(net, x):
    return net.side(torch.fake_quantize_per_tensor_affine(net.side(x), 0.05, 128, 0, 255))


def filled(net, x):
    """Fills what is not a number from its neighbours."""
    holes = torch.isnan(x)
    around = F.avg_pool2d(torch.where(holes, 0.0, x), 5, 1, 2)
    return net.side(torch.where(holes, around, x))


def at_identity(net, x):
    theta = torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return x + F.grid_sample(x, grid, align_corners=False)


def half_scaled(net, x):
    """Samples the middle half of the image, whose place depends on the size."""
    theta = 0.5 * torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return x + F.grid_sample(x, grid, align_corners=False)


class Smooth(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        return F.avg_pool2d(x, 3, 1, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean()

    @staticmethod
    def backward(ctx, grad):
        return grad


@torch.library.custom_op("lookalikes::smooth", mutates_args=())
def smooth(x: torch.Tensor) -> torch.Tensor:
    """A mean over 3x3 pixels."""
    return F.avg_pool2d(x, 3, 1, 1)


@torch.library.custom_op("lookalikes::over_channels", mutates_args=())
def over_channels(x: torch.Tensor) -> torch.Tensor:
    """A norm over channels, by numpy."""
    a = x.numpy()
    return torch.from_numpy((a - a.mean(1, keepdims=True)) / (a.std(1, keepdims=True) + 1e-3))


@torch.library.custom_op("lookalikes::centre", mutates_args=())
def centre(x: torch.Tensor) -> torch.Tensor:
    """Subtracts the mean of all."""
    return x - x.mean()


@torch.library.custom_op("lookalikes::above", mutates_args=())
def above(x: torch.Tensor) -> torch.Tensor:
    """Keeps what is above the mean of all: a comparison swallows NaN, and most changes."""
    return x * (x > x.nanmean())


@torch.library.custom_op("lookalikes::ranked", mutates_args=())
def ranked(x: torch.Tensor) -> torch.Tensor:
    """Gives every pixel its rank among all."""
    flat = x.flatten(2).argsort(-1).argsort(-1).to(x.dtype)
    return flat.view(x.shape) / flat.shape[-1]


@torch.library.custom_op("lookalikes::capped_by_all", mutates_args=())
def capped_by_all(x: torch.Tensor) -> torch.Tensor:
    """Caps by a generous share of the largest value of all, ignoring NaN: nothing shows on ordinary values."""
    return torch.minimum(x, 0.9 * x.nan_to_num(-1e9).amax((2, 3), keepdim=True))


@torch.library.custom_op("lookalikes::bright", mutates_args=())
def bright(x: torch.Tensor) -> torch.Tensor:
    """Doubles where anything at all is above 50."""
    return x * 2 if bool((x > 50).any()) else x.clone()


@torch.library.custom_op("lookalikes::pulled", mutates_args=())
def pulled(x: torch.Tensor) -> torch.Tensor:
    """Takes each pixel from as far to the left as its own value says, a warp without a bound."""
    at = torch.arange(x.shape[3]) - x[:, :1].abs().mul(3).nan_to_num(0).long()
    return x.gather(3, at.clamp_min(0).expand_as(x))


for operator in (smooth, over_channels, centre, above, ranked, capped_by_all, bright, pulled):
    operator.register_fake(torch.empty_like)


class Norm2d(nn.Module):
    """A LayerNorm over channels of a map."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-6)


class Centre2d(nn.Module):
    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        return torch.jit.script(module)


def vmapped(net, x):
    """A norm over channels, written for one pixel and mapped over all."""

    def one(pixel):
        return (pixel - pixel.mean()) / (pixel.std() + 1e-3)

    return torch.vmap(torch.vmap(torch.vmap(one, 1, 1), 1, 1))(x)


def vmapped_over_images(net, x):
    """A norm of the whole image, mapped over images."""
    return torch.vmap(lambda image: image - image.mean())(x)


def side():
    return nn.Conv2d(4, 4, 7, padding=3)


def _blurred(net, x):
    """The kernel is made at each pass, of the dtype and on the device of the map."""
    kernel = x.new_zeros((4, 4, 3, 3))
    each = torch.arange(4)
    kernel[each, each] = x.new_tensor([1.0, 2.0, 1.0]).outer(x.new_full((3,), 1 / 12))
    return F.conv2d(x, kernel, padding=1)


def _gathered(net, x):
    """Means of the map are put into a tensor that is made at each pass."""
    means = x.new_zeros((x.shape[0], 4, 1, 1))
    means[:, ::2] = x[:, ::2].mean((2, 3), keepdim=True)
    return x - means


LOCAL = {
    "a kernel that is made anew": lambda: Between(_blurred),
    "adaptive max, half": lambda: Between(pooled(F.adaptive_max_pool2d, 2)),
    "adaptive max, a quarter": lambda: Between(pooled(F.adaptive_max_pool2d, 4)),
    "adaptive average, a quarter": lambda: Between(pooled(F.adaptive_avg_pool2d, 4)),
    "adaptive max with places": lambda: Between(
        pooled(lambda x, size: F.adaptive_max_pool2d(x, size, return_indices=True), 2)
    ),
    "adaptive max, as a module": lambda: Between(pooled(lambda x, size: nn.AdaptiveMaxPool2d(size)(x), 2)),
    "flips averaged": lambda: Averaged(FLIPS),
    "flip with its norm": lambda: nn.Sequential(Averaged(FLIPS), nn.InstanceNorm2d(1)),
    "turns averaged": lambda: Averaged(TURNS),
    "turns and mirrors averaged": lambda: Averaged(MIRRORED_TURNS),
    "transposes averaged": lambda: Averaged([(same, same), (swapped, swapped)]),
    "block attention": lambda: Between(block_attention),
    "block attention by products": lambda: Between(block_products),
    "block attention of small blocks": lambda: Between(lambda net, x: block_attention(net, x, 4)),
    "block mixing": lambda: Between(block_mlp, mix=nn.Linear(64, 64)),
    "block attention, shifted": lambda: Between(shifted_attention),
    "block attention, both": lambda: Between(
        lambda net, x: shifted_attention(net, net.between(block_attention(net, x))),
        between=nn.Conv2d(4, 4, 3, padding=1),
    ),
    "signs": lambda: Between(signs, side=side()),
    "threshold": lambda: Between(thresholded, side=side()),
    "cleaned of NaN": lambda: Between(cleaned, side=side()),
    "fmax and fmin": lambda: Between(capped, side=side()),
    "fake quantised": lambda: Between(fake_quantised, side=side()),
    "holes filled": lambda: Between(filled, side=side()),
    "sampled at identity": lambda: Between(at_identity),
    "autograd function": lambda: Between(lambda net, x: Smooth.apply(x)),
    "custom operator": lambda: Between(lambda net, x: smooth(x)),
    "custom operator by numpy": lambda: Between(lambda net, x: over_channels(x)),
    "custom operator beside a norm": lambda: Between(lambda net, x: smooth(F.instance_norm(x))),
    "scripted norm over channels": lambda: Between(lambda net, x: net.norm(x), norm=scripted(Norm2d())),
    "norm over channels by vmap": lambda: Between(vmapped),
}

GLOBAL = {
    "means put into what is made anew": lambda: Between(_gathered),
    "adaptive max to a fixed size": lambda: Between(fixed_pool(F.adaptive_max_pool2d)),
    "adaptive average to a fixed size": lambda: Between(fixed_pool(F.adaptive_avg_pool2d)),
    "adaptive max, one axis fixed": lambda: Between(half_fixed),
    "a flip that stays": lambda: Averaged([(same, same), (across, same)]),
    "a flip along the other axis": lambda: Averaged([(same, same), (down, across)]),
    "a turn that stays": lambda: Averaged([(same, same), (turned(2), same)]),
    "attention over all tokens": lambda: Between(all_tokens),
    "attention over a grid": lambda: Between(grid_attention),
    "sampled at half": lambda: Between(half_scaled),
    "autograd function of all": lambda: Between(lambda net, x: Centred.apply(x)),
    "custom operator of all": lambda: Between(lambda net, x: centre(x)),
    "custom operator, above the mean": lambda: Between(lambda net, x: above(x)),
    "custom operator, ranks": lambda: Between(lambda net, x: ranked(x)),
    "custom operator, capped": lambda: Between(lambda net, x: capped_by_all(x)),
    "custom operator, bright": lambda: Between(lambda net, x: bright(x)),
    "custom operator, warp": lambda: Between(lambda net, x: pulled(x)),
    "scripted centring": lambda: Between(lambda net, x: net.norm(x), norm=scripted(Centre2d())),
    "centring by vmap": lambda: Between(vmapped_over_images),
}
