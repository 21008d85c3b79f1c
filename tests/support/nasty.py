"""A zoo of small nasty networks, one per trap: each class says what it breaks.

FROZEN are converted and proved. REFUSED keep a live site that no constant can replace, with a word of the
reason. ALONE have nothing to convert: what looks like a statistic of the image is none.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


def conv(inputs, outputs, kernel=3, **arguments):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **arguments)


class Nasty(nn.Module):
    """A stem to `width` channels, what a subclass does there in `body`, and a head."""

    def __init__(self, width=4, **children):
        super().__init__()
        self.stem, self.head = conv(1, width), conv(width, 1)
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.head(self.body(F.leaky_relu(self.stem(x) + 0.3)))


class HandNorm(Nasty):
    """Breaks scans by type: an instance norm written out, unbiased."""

    def body(self, x):
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5)


class HandNormTorch(Nasty):
    """Breaks counting by name: torch.mean and x.mean in one forward, and a mean that is no site between them."""

    def body(self, x):
        mean = torch.mean(x, dim=(2, 3), keepdim=True)
        scale = self.stem.weight.mean() + 1 + x.mean(1, keepdim=True) * 0
        return (x - mean) * scale / x.sub(mean).pow(2).mean((-2, -1), keepdim=True).add(1e-5).sqrt()


class VarMeanInPlace(Nasty):
    """Breaks dataflow by objects: one call with two results, and writes through a view."""

    def body(self, x):
        x = x.clone()
        var, mean = torch.var_mean(x, (2, 3), keepdim=True, correction=0)
        view = x.view(x.shape)
        view -= mean
        x.div_((var + 1e-5).sqrt())
        return x


class StdMean(Nasty):
    """Breaks single results: standard deviation and mean from one call, then x.std() over everything."""

    def body(self, x):
        std, mean = torch.std_mean(x, (2, 3), keepdim=True)
        x = (x - mean) / (std + 1e-5)
        return x + torch.tanh(x * 2).std()


class FilterResponse(Nasty):
    """Breaks the belief that norms subtract: FRN divides by the root mean square over space."""

    def body(self, x):
        nu2 = x.pow(2).mean(dim=[2, 3], keepdim=True)
        return torch.max(x * torch.rsqrt(nu2 + 1e-6), x * 0.1)


class EvoNormS(Nasty):
    """Breaks channel statistics: a standard deviation over a group of channels and space, expanded back."""

    def body(self, x):
        n, c, h, w = x.shape
        std = (
            x.reshape(n, 2, c // 2, h, w)
            .float()
            .var(dim=(2, 3, 4), unbiased=False, keepdim=True)
            .add(1e-5)
            .sqrt()
        )
        std = std.expand(n, 2, c // 2, h, w).reshape(n, c, h, w)
        return x * torch.sigmoid(x * 1.7) / std


class ResponseNorm(Nasty):
    """Breaks sums: GRN takes an L2 norm that grows with the image, and divides by its mean over channels."""

    def body(self, x):
        g = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + x * (g / (g.mean(dim=1, keepdim=True) + 1e-6))


class LinalgResponse(Nasty):
    """Breaks names: the same norm as torch.linalg.vector_norm with ord."""

    def body(self, x):
        g = torch.linalg.vector_norm(x, ord=2, dim=(2, 3), keepdim=True)
        return x * (g / (g.mean(dim=1, keepdim=True) + 1e-6))


class SqueezeExcite(Nasty):
    """Breaks scans that look for norms: a pool gates the map."""

    def __init__(self):
        super().__init__(pool=nn.AdaptiveAvgPool2d(1), fc=nn.Conv2d(4, 4, 1))

    def body(self, x):
        return x * self.fc(self.pool(x)).sigmoid() * 3


class SqueezeLinear(Nasty):
    """Breaks shapes: the pooled vector is flattened, runs through Linear and is expanded to the map."""

    def __init__(self):
        super().__init__(pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(4, 4))

    def body(self, x):
        n, c, *_ = x.shape
        y = self.fc(self.pool(x).view(n, c)).sigmoid().view(n, c, 1, 1)
        return x * y.expand_as(x)


class EfficientChannel(Nasty):
    """Breaks convolutions as a sign of space: ECA convolves over channels."""

    def __init__(self):
        super().__init__(over=nn.Conv1d(1, 1, 3, padding=1))

    def body(self, x):
        y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        return x * self.over(y).transpose(-1, -2).unsqueeze(-1).sigmoid()


class ConvolutionalBlock(Nasty):
    """Breaks one owner, one statistic: CBAM pools mean and maximum; its spatial attention is local."""

    def __init__(self):
        super().__init__(fc=nn.Conv2d(4, 4, 1), local=conv(2, 1, 7))

    def body(self, x):
        x = x * (self.fc(F.adaptive_avg_pool2d(x, 1)) + self.fc(F.adaptive_max_pool2d(x, 1))).sigmoid()
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * self.local(both).sigmoid()


class WholeKernel(Nasty):
    """Breaks kernels: an average pool whose window is whatever extent it is given."""

    def body(self, x):
        return x * F.avg_pool2d(x, x.shape[2:]).sigmoid() + F.max_pool2d(x, kernel_size=x.shape[2:])


class GlobalContext(Nasty):
    """Breaks shapes that shrink: a softmax over space, then a matrix product that contracts it."""

    def __init__(self):
        super().__init__(mask=nn.Conv2d(4, 1, 1), fc=nn.Conv2d(4, 4, 1))

    def body(self, x):
        n, c, h, w = x.shape
        weights = self.mask(x).view(n, 1, h * w).softmax(-1).unsqueeze(-1)
        context = torch.matmul(x.view(n, 1, c, h * w), weights).view(n, c, 1, 1)
        return x + self.fc(context)


class WeightedSum(Nasty):
    """Breaks cuts: an attention pool whose weighted sum, not its softmax, is what can be frozen."""

    def __init__(self):
        super().__init__(mask=nn.Conv2d(4, 1, 1))

    def body(self, x):
        weights = self.mask(x).flatten(2).softmax(2)
        return x + (x.flatten(2) * weights).sum(2)[..., None, None]


class ChannelAttention(Nasty):
    """Breaks the belief that no attention can be frozen: this one compares channels, over all of space."""

    def body(self, x):
        n, c, h, w = x.shape
        q = F.normalize(x.flatten(2), dim=-1)
        attention = (q @ q.transpose(1, 2) * 3).softmax(-1)
        return (attention @ x.flatten(2)).view(n, c, h, w)


class Einsum(Nasty):
    """Breaks operators: a Gram matrix by einsum."""

    def body(self, x):
        gram = torch.einsum("nchw,ndhw->ncd", x, x).softmax(-1)
        return torch.einsum("ncd,ndhw->nchw", gram, x)


class TwoSteps(Nasty):
    """Breaks single calls: rows first, columns then; only the last value is free of the image."""

    def body(self, x):
        return x - x.mean(3).mean(2)[..., None, None]


class TwoStepsMax(Nasty):
    """Breaks results: x.max(dim) returns values and places."""

    def body(self, x):
        return x / (1 + x.max(3).values.max(2)[0].abs()[..., None, None])


class SumOverExtent(Nasty):
    """Breaks values that grow with the image: a sum, divided by the number of pixels in the next line."""

    def body(self, x):
        return x - x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])


class SumOverNumel(Nasty):
    """Breaks scalars: the sum of everything over numel(), times a reciprocal."""

    def body(self, x):
        x = x - x.sum() / x.numel()
        return x / (x.square().sum() * (1 / x.numel())).sqrt()


class BareSum(Nasty):
    """Breaks laws: a sum that nothing divides is the image's own."""

    def body(self, x):
        return x + x.sum((2, 3), keepdim=True).abs().log()


class MinMax(Nasty):
    """Breaks means: scales by the smallest and largest value, in three spellings, one of them by name."""

    def body(self, x):
        x = (x - x.min()) / (x.max() - x.min())
        low, high = torch.aminmax(x * x)
        ends = torch.aminmax(x.flatten(2), dim=2)
        x = x / (1 + ends.max - ends.min)[..., None, None]
        return (x - low) / (high - low) + x.amax((2, 3), keepdim=True)


class Median(Nasty):
    """Breaks laws: a median and a quantile, which several images do not have in common."""

    def body(self, x):
        return x - x.median() + x.flatten(2).quantile(0.9, dim=2)[..., None, None]


class LogSumExp(Nasty):
    """Breaks linear laws: a soft maximum over space."""

    def body(self, x):
        return x - torch.logsumexp(x, (2, 3), keepdim=True)


class Branch(Nasty):
    """Breaks dataflow: a number computed from the image leaves tensors and decides."""

    def body(self, x):
        return F.instance_norm(x) * 2 if x.mean().item() > 0 else x


class Twice(Nasty):
    """Breaks one module, one statistic: the same block runs on two maps."""

    def __init__(self):
        super().__init__(block=SqueezeBlock(), middle=conv(4, 4))

    def body(self, x):
        return self.block(self.middle(self.block(x)) * 2)


class Sliced(Nasty):
    """Breaks one module, one place: a sequence runs whole, and slices of it, which are modules made anew."""

    def __init__(self):
        super().__init__(row=nn.Sequential(conv(4, 4), nn.InstanceNorm2d(4), nn.GELU(), nn.InstanceNorm2d(4)))

    def body(self, x):
        return self.row[1:](self.row[0](x) * 2) + self.row(x) + self.row[-1:](x)


class SqueezeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Nested(Nasty):
    """Breaks counting across owners: parent and children call the same functions, the parent around them."""

    def __init__(self):
        super().__init__(first=SqueezeBlock(), norm=nn.InstanceNorm2d(4), second=SqueezeBlock())

    def body(self, x):
        x = x - x.mean((2, 3), keepdim=True)
        x = self.second(self.norm(self.first(x)) * x.mean(1, keepdim=True))
        return x / x.mean((2, 3), keepdim=True).abs().add(1)


class Adaptive(Nasty):
    """Breaks affine maps: AdaIN takes scale and shift from a style vector pooled from the image itself."""

    def __init__(self):
        super().__init__(style=nn.Linear(4, 8))

    def body(self, x):
        scale, shift = self.style(x.mean((2, 3))).chunk(2, 1)
        return F.instance_norm(x) * (1 + scale[..., None, None]) + shift[..., None, None]


class SpatiallyAdaptive(Nasty):
    """Breaks affine maps otherwise: SPADE normalises without parameters, and scale and shift are maps."""

    def __init__(self):
        super().__init__(norm=nn.InstanceNorm2d(4), scale=conv(4, 4), shift=conv(4, 4))

    def body(self, x):
        return self.norm(x) * (1 + self.scale(x)) + self.shift(x)


class SimpleChannel(Nasty):
    """Breaks one look: NAFNet mixes a LayerNorm over channels, no site, with a pooled gate, a site."""

    def __init__(self):
        super().__init__(fc=nn.Conv2d(4, 4, 1), pool=nn.AdaptiveAvgPool2d(1))

    def body(self, x):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-6).sqrt()
        return x * self.fc(self.pool(x))


class Parametrized(Nasty):
    """Breaks types: parametrizations give modules classes of their own."""

    def __init__(self):
        super().__init__(norm=HiddenNorm(4))
        parametrize.register_parametrization(self.norm, "gain", Softplus())

    def body(self, x):
        return self.norm(x)


class Softplus(nn.Module):
    def forward(self, x):
        return F.softplus(x) + x.mean()


class HiddenNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return F.instance_norm(x, weight=self.gain) + x.mean((2, 3), keepdim=True)


class Dead(Nasty):
    """Breaks blame: a statistic of a statistic; the first reaches the output through the second only."""

    def body(self, x):
        mean = x.mean((2, 3), keepdim=True)
        return x / (x - mean).abs().mean((2, 3), keepdim=True)


class KeywordOnly(Nasty):
    """Breaks positions: operand and dimensions by keyword, negative, as a list."""

    def body(self, x):
        return x - torch.mean(input=x, dim=[-1, -2], keepdim=True, dtype=x.dtype)


class Fused(nn.GroupNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


class Subclassed(Nasty):
    """Breaks types: a norm and an activation in one subclass."""

    def __init__(self):
        super().__init__(norm=Fused(2, 4))

    def body(self, x):
        return self.norm(x)


FROZEN = (
    HandNorm,
    HandNormTorch,
    VarMeanInPlace,
    StdMean,
    FilterResponse,
    EvoNormS,
    ResponseNorm,
    LinalgResponse,
    SqueezeExcite,
    SqueezeLinear,
    EfficientChannel,
    ConvolutionalBlock,
    WholeKernel,
    GlobalContext,
    WeightedSum,
    ChannelAttention,
    Einsum,
    TwoSteps,
    TwoStepsMax,
    SumOverExtent,
    SumOverNumel,
    BareSum,
    MinMax,
    Median,
    LogSumExp,
    Branch,
    Twice,
    Nested,
    Adaptive,
    SpatiallyAdaptive,
    SimpleChannel,
    Parametrized,
    Dead,
    KeywordOnly,
    Subclassed,
    Sliced,
)


class Stubborn(Nasty):
    """An instance norm, which can be converted, before a body that cannot."""

    def __init__(self):
        super().__init__(norm=nn.InstanceNorm2d(4))

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x))))


class StripPool(Stubborn):
    """Breaks totals: rows are pooled, columns are not, and the result meets the map."""

    def body(self, x):
        return x * x.mean(3, keepdim=True).sigmoid()


class RunningSum(Stubborn):
    """Breaks shapes: a cumulative sum keeps the extent and still sees everything before."""

    def body(self, x):
        return x + x.cumsum(3) * 0.01


class PyramidPool(Stubborn):
    """Breaks pools: six by six bins keep a layout of the image."""

    def body(self, x):
        bins = F.adaptive_avg_pool2d(x, 6)
        return x + F.interpolate(bins, size=x.shape[2:], mode="bilinear")


class SpatialSoftmax(Stubborn):
    """Breaks shapes: a softmax over space meets the map again."""

    def body(self, x):
        return x * (x.flatten(2).softmax(-1).view(x.shape) * x[0, 0].numel())


class SelfAttention(Stubborn):
    """Breaks constants: every pixel looks at every other."""

    def body(self, x):
        tokens = F.max_pool2d(x, 4).flatten(2).transpose(1, 2)
        seen = F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2)
        n, c, h, w = x.shape
        return x + F.interpolate(seen.reshape(n, c, h // 4, w // 4), scale_factor=4)


class Fourier(Stubborn):
    """Breaks locality: the image's spectrum is filtered."""

    def body(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[2:])


class Sorted(Stubborn):
    """Breaks locality: values are ordered along the rows."""

    def body(self, x):
        return x + torch.sort(x, dim=3).values


class PlaceOfMaximum(Stubborn):
    """Breaks constants: the place of the largest value is used, and places differ on every tile."""

    def body(self, x):
        _, place = x.flatten(2).max(2)
        return x + place[..., None, None].to(x.dtype) * 0.01


class ExtentPower(Stubborn):
    """Breaks quotients: the sum is combined with the extent by other arithmetic than a division."""

    def body(self, x):
        return x + x.sum((2, 3), keepdim=True).abs().sub(x.shape[2]).tanh()


class HiddenExtent(Nasty):
    """Breaks the census: the sum is divided by the extent, which hides in a tensor."""

    def body(self, x):
        return x - x.sum((2, 3), keepdim=True) / torch.full((), x.shape[2] * x.shape[3], dtype=x.dtype)


class InnerCheckpoint(Stubborn):
    """Breaks interception under a compiler: the owner recomputes a part of its own forward."""

    def body(self, x):
        return checkpoint(self.gate, x, use_reentrant=False)

    def gate(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


REFUSED = {
    StripPool: "varies along an axis",
    RunningSum: "mixes the whole extent",
    PyramidPool: "layout",
    SpatialSoftmax: "mixes the whole extent",
    SelfAttention: "looks at every other",
    Fourier: "mixes the whole extent",
    Sorted: "mixes the whole extent",
    PlaceOfMaximum: "places",
    ExtentPower: "combines it with the extent",
    InnerCheckpoint: "checkpoint",
}


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        flat = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        weight = flat.reshape_as(self.weight) - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class WeightNorms(Nasty):
    """Breaks provenance: batch norm, mean and variance of weights, not of the image."""

    def __init__(self):
        super().__init__(inner=StandardisedConv(4, 4, 3, padding=1))

    def body(self, x):
        return self.inner(x)


class OverChannels(Nasty):
    """Breaks shapes: means, norms and LayerNorms of one pixel."""

    def __init__(self):
        super().__init__(norm=nn.LayerNorm(4), rms=nn.RMSNorm(4), response=nn.LocalResponseNorm(2))

    def body(self, x):
        x = self.rms(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.response(F.normalize(x, dim=1) - x.mean(1, keepdim=True)) * x.softmax(1)


ALONE = (WeightNorms, OverChannels)
