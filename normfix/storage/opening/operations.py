"""The operations that a program from a file may call: a list, and what is not on it is refused.

Each is a function of tensors and numbers alone. Not on it: what touches files (`from_file`), memory that is not
the tensor's own (`set_`, `resize_`), processes, streams or the console, calls other code (`higher_order`, custom
operators), compiles, makes as much as its values say (`bincount`), loops as often as a number says (polynomials of
an order), or has no place in a network that is applied (gradients, sparse and nested tensors). Loops are not on it,
so a program ends. What takes longer than its tensors are large (decompositions, distances of all pairs, recurrence)
is on it, since `normfix.storage.opening.workload` knows what it costs. On sizes, arithmetic is
allowed and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

__all__ = ["ARITHMETIC", "BLOCKS", "MESSAGES", "WORDS", "is_allowed", "is_equation", "is_listed", "misplaced"]


def _words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


# fmt: off
_POINTWISE = _words(
    """abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2
    arctanh asin
    asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max
    clamp_min clip
    conj conj_physical copysign cos cosh deg2rad div divide elu eq erf erfc erfinv exp exp2 expm1 fix
    float_power floor
    floor_divide fmax fmin fmod frac ge gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh
    heaviside hypot isclose isfinite isinf isnan isneginf isposinf le leaky_relu lerp less less_equal log
    log10 log1p
    log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
    masked_fill maximum
    minimum mish mul multiply nan_to_num ne neg negative not_equal polar positive pow prelu rad2deg real imag
    reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh
    softplus
    softshrink sqrt square sub subtract tan tanh threshold true_divide trunc where xlogy zero fill copy dropout
    feature_dropout alpha_dropout native_dropout bernoulli _prelu_kernel __and__ __or__ __xor__ _conj
    view_as_real
    view_as_complex complex resolve_conj resolve_neg digamma frexp gcd i0 lcm ldexp lgamma nextafter
    feature_alpha_dropout bitwise_left_shift bitwise_right_shift __lshift__ __rshift__"""
)
_SPECIAL = {
    f"special_{name}"
    for name in _words(
        """digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 i0e i1 i1e log1p
        log_ndtr log_softmax logit logsumexp ndtr ndtri psi round sinc softmax xlog1py xlogy"""
    )
}
_RANDOM = _words(
    """cauchy cauchy_ exponential exponential_ geometric geometric_ log_normal log_normal_ multinomial normal normal_
    normal_functional poisson randint randint_like randperm random random_ uniform uniform_"""
)
"""From the generator as it stands; what seeds it is not here."""
_RECURRENT = _words(
    """gru gru_cell lstm lstm_cell mkldnn_rnn_layer rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell"""
)
_PAIRS = _words("""cdist _cdist_forward dist pairwise_distance pdist _pdist_forward _euclidean_dist""")
_MATRICES = _words(
    """chain_matmul cholesky cholesky_inverse cholesky_solve det inverse linalg_cholesky linalg_cholesky_ex linalg_det
    linalg_eigh linalg_eigvalsh linalg_inv linalg_inv_ex linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve
    linalg_matmul linalg_matrix_norm linalg_matrix_power matrix_power
    linalg_multi_dot linalg_pinv linalg_qr linalg_slogdet linalg_solve linalg_solve_ex
    linalg_solve_triangular linalg_svd linalg_svdvals linalg_vecdot logdet nuclear_norm pinverse slogdet svd
    triangular_solve _linalg_check_errors _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd"""
)
_LOSSES = _words(
    """binary_cross_entropy binary_cross_entropy_with_logits cross_entropy_loss huber_loss kl_div l1_loss mse_loss
    nll_loss nll_loss2d nll_loss_forward nll_loss2d_forward nll_loss_nd smooth_l1_loss"""
)
"""Consistency terms and distances that networks compute on their way."""
_COPIES = {
    f"{name}_copy"
    for name in _words(
        """alias as_strided detach diagonal expand narrow permute select slice split split_with_sizes squeeze t
        transpose unbind unfold unsqueeze view view_as_complex view_as_real"""
    )
}
"""What views become where the exporter makes every operation a function."""
_OTHERS = _words(
    """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d
    max_pool1d max_pool2d
    max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d

    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution conv_tbc
    conv_depthwise3d _weight_norm _weight_norm_interface

    batch_norm instance_norm group_norm layer_norm rms_norm native_batch_norm native_group_norm
    native_layer_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training _native_batch_norm_legit_functional
    _batch_norm_impl_index _batch_norm_with_update _batch_norm_no_update _fused_rms_norm

    linear matmul mm bmm mv dot addmm addbmm addmv addr baddbmm bilinear einsum inner outer tensordot vdot
    scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable
    softmax log_softmax _softmax _log_softmax _safe_softmax glu cosine_similarity cross

    all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum diff
    frobenius_norm
    kthvalue linalg_vector_norm linalg_norm linalg_cross logcumsumexp logsumexp max mean median min mode nanmean
    nanmedian nansum norm prod quantile nanquantile sort std std_mean sum sum_to_size topk trace var var_mean

    alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to chunk contiguous
    detach diagonal
    expand expand_as flatten flip fliplr flipud movedim moveaxis mH mT numpy_T narrow permute ravel reshape
    reshape_as rot90
    roll select slice split split_with_sizes squeeze swapaxes swapdims t tensor_split transpose unbind
    unflatten unfold
    unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as _unsafe_view hsplit vsplit dsplit
    diagonal_scatter select_scatter slice_scatter as_strided_scatter

    block_diag cat channel_shuffle clone col2im column_stack concat concatenate constant_pad_nd dstack
    hstack im2col meshgrid
    native_channel_shuffle pad _pad_circular _pad_enum pixel_shuffle pixel_unshuffle reflection_pad1d
    reflection_pad2d
    reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d stack
    tile tril triu
    diag diag_embed vstack

    bucketize embedding gather grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator index
    index_add index_copy
    index_fill index_put index_select masked_scatter masked_select nonzero one_hot scatter scatter_add
    scatter_reduce
    searchsorted take take_along_dim _unsafe_index _unsafe_masked_index

    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d
    upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d __interpolate

    arange empty empty_like empty_strided empty_permuted eye full full_like linspace new_empty
    new_empty_strided new_full new_ones
    new_zeros ones ones_like rand rand_like randn randn_like scalar_tensor tril_indices triu_indices zeros
    zeros_like
    bartlett_window blackman_window hamming_window hann_window kaiser_window logspace

    _fft_c2c _fft_c2r _fft_r2c fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fft_fftfreq fft_rfftfreq fft_hfft fft_hfft2
    fft_hfftn fft_ihfft fft_ihfft2 fft_ihfftn istft stft

    adjoint argwhere cartesian_prod corrcoef cov cumulative_trapezoid diagflat fake_quantize_per_channel_affine
    fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine
    fake_quantize_per_tensor_affine_cachemask fractional_max_pool2d fractional_max_pool3d gradient histc
    index_reduce isin kron
    msort nonzero_static put renorm row_stack trapezoid trapz _unique _unique2
    unique_consecutive unique_dim _unsafe_index_put _unsafe_masked_index_put_accumulate vander

    _to_copy to type_as lift lift_fresh lift_fresh_copy"""
)
_IN_PLACE = _words(
    """squeeze_ unsqueeze_ t_ transpose_ swapaxes_ detach_ index_put_ index_add_ index_copy_ index_fill_
    scatter_ scatter_add_
    scatter_reduce_ masked_scatter_ tril_ triu_ addmm_ baddbmm_ cumsum_ fill_diagonal_ _index_put_impl
    _index_put_impl_ addbmm_ addmv_ addr_ cumprod_ index_reduce_ put_ renorm_ swapdims_"""
) | {f"{name}_" for name in _POINTWISE if not name.startswith("_")}
# what gives a size, a number or nothing
_NUMBERS = _words(
    """sym_size sym_stride sym_numel sym_storage_offset item _local_scalar_dense is_nonzero _assert_scalar
    _assert_async
    _assert_tensor_metadata _functional_assert_scalar sym_constrain_range sym_constrain_range_for_size
    sym_is_contiguous"""
)
_LISTED = frozenset().union(
    *(_POINTWISE, _SPECIAL, _RANDOM, _RECURRENT, _PAIRS, _MATRICES, _LOSSES, _COPIES, _OTHERS, _IN_PLACE, _NUMBERS)
)
ARITHMETIC = _words(
    """_operator.eq _operator.ne _operator.le _operator.ge _operator.lt _operator.gt _operator.neg _operator.pos
    _operator.mul _operator.add _operator.sub _operator.floordiv _operator.mod _operator.pow _operator.truediv
    _operator.and_ _operator.or_ math.trunc torch.sym_not torch.sym_int torch.sym_float torch.sym_ite torch.sym_max
    torch.sym_min torch.sym_sqrt torch._sym_sqrt"""
)
"""On sizes; shifts are not here, since they make numbers of any length."""
_ELSEWHERE = frozenset({"torch.ops.torchvision.deform_conv2d.default"})
# What `with torch.no_grad()` and `with torch.autocast(...)` inside a network become: they run the graph that is
# given to them, once, and such a graph is looked at as the program's own is.
BLOCKS = frozenset({
    "torch.ops.higher_order.wrap_with_set_grad_enabled", "torch.ops.higher_order.wrap_with_autocast",
})
WORDS = _words(
    """none tanh floor trunc constant reflect replicate circular sum prod mean amax amin left right ij xy
    linear lower
    higher midpoint nearest bilinear bicubic trilinear area nearest-exact forward backward ortho fro nuc same valid
    add multiply max min"""
)
"""Texts that an operation may be given: names of modes."""
# fmt: on
MESSAGES = frozenset({"assert_msg", "msg"})
"""Arguments that are texts for people."""
_TARGET = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_EQUATION = re.compile(r"[A-Za-z., >-]{1,200}", re.ASCII)


def is_equation(text: str) -> bool:
    """Tell whether a text is an equation of einsum, of few operands."""
    return bool(_EQUATION.fullmatch(text)) and text.count(",") < 4


def is_listed(name: str) -> bool:
    """Tell whether a program may call an operator of aten of this name, in any of its overloads.

    Example:
        >>> is_listed("conv2d"), is_listed("from_file")
        (True, False)
    """
    return name in _LISTED


@cache
def is_allowed(target: str) -> bool:
    """Tell whether a program may call what this names.

    Example:
        >>> is_allowed("torch.ops.aten.conv2d.default"), is_allowed("torch.ops.aten.from_file.default")
        (True, False)
    """
    if target in ARITHMETIC | _ELSEWHERE | BLOCKS:
        return True
    parts = _TARGET.fullmatch(target)
    if parts is None or parts[1] not in _LISTED:
        return False
    packet = getattr(torch.ops.aten, parts[1], None)
    if packet is None or parts[2] not in packet.overloads() or "out" in parts[2]:
        return False
    # TorchScript's own overloads take what no program holds, such as any number for a dtype
    if not torch._C._dispatch_has_kernel(
        f"aten::{parts[1]}{'' if parts[2] == 'default' else f'.{parts[2]}'}"
    ):
        return False
    # packed sequences: torch does not check their lengths
    if parts[1] in _RECURRENT and parts[2] == "data":
        return False
    results = getattr(packet, parts[2])._schema.returns
    # TorchScript's functions of texts and lists have the same names and give no tensors
    return parts[1] in _NUMBERS or any("Tensor" in str(result.type) for result in results)


_ENUMERATIONS = {"ScalarType": "as_scalar_type", "Layout": "as_layout", "MemoryFormat": "as_memory_format"}
_POSITIONAL, _BY_NAME = 1, 2
"""How torch's schema numbers the kinds of arguments."""


def misplaced(target: str, inputs: Sequence[Mapping[str, Any]]) -> str:
    """Return which argument torch would take for a dtype, a layout or a memory format although it is none; "" for none.

    It does not look at the numbers that stand for them, and a wrong one ends the process.

    Args:
        target: an allowed operation.
        inputs: its arguments as a program's JSON has them.
    """
    parts = _TARGET.fullmatch(target)
    if parts is None:
        return ""
    given = {argument["name"]: argument for argument in inputs}
    if len(given) != len(inputs):
        return "one that is given twice"
    ended = False
    for argument in getattr(getattr(torch.ops.aten, parts[1]), parts[2])._schema.arguments:
        named = given.get(argument.name)
        kind = next((k for k in _ENUMERATIONS if k in str(argument.real_type)), None)
        if named is not None and kind is not None and not {*named["arg"]} <= {_ENUMERATIONS[kind], "as_none"}:
            return str(argument.name)
        placed = named is not None and _is_placed(named.get("kind"), argument)
        # what follows a gap would move into it
        if placed and ended:
            return str(argument.name)
        ended = ended or not placed
    return ""


def _is_placed(kind: object, argument: Any) -> bool:
    """Tell whether an argument is given by its place; of old programs, those without a default are."""
    if kind in (_POSITIONAL, _BY_NAME):
        return kind == _POSITIONAL
    return not argument.has_default_value() and not argument.kwarg_only
