"""Fused convolution over frames: launcher, custom operator, autograd.

The gradient of the input is the same kernel with the taps in reverse order and the weight transposed. That of the
weight is one batched product for each tap, of views that are shifted against each other. With an alpha, ``out =
residual + (1 - alpha) * update``, no pass over memory is added: the factor goes into the small weight, and alpha's own
gradient, ``-sum(grad * update)``, is that of the unweighed update's parameters times those parameters, since the
update is linear in them.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from triton import cdiv

from temporal_layers.kernels.alpha_blend import fused as blends
from temporal_layers.kernels.checks import is_autocast
from temporal_layers.kernels.launch import launch, target_of
from temporal_layers.kernels.layout import to_clips
from temporal_layers.kernels.matmul import Tile
from temporal_layers.kernels.temporal_conv import fused_kernels as kernels
from temporal_layers.kernels.temporal_conv.gradients import weight_gradient
from temporal_layers.kernels.temporal_conv.tiles import takes_descriptors, tile_for
from temporal_layers.kernels.vmap import register_looped_vmap


def on_maps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    num_frames: int,
    causal: bool,
) -> Tensor:
    """The operator as the public function takes it.

    Under autocast the convolution is one in the low dtype, as PyTorch's is. An alpha for each frame takes a second
    kernel: it is no factor of the weight.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if is_autocast(kind) else x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    padding = weight.shape[2] - 1 if causal else weight.shape[2] // 2
    if alpha is not None and alpha.dim() == 2 and alpha.shape[0] > 1:
        update = temporal_conv(x, weight, bias, temb, None, None, num_frames, padding)
        rest = residual.contiguous(memory_format=torch.channels_last)
        return blends.on_maps(rest, update, alpha, num_frames, 1, None, True)
    alpha = None if alpha is None else alpha.reshape(-1).float()
    return temporal_conv(x, weight, bias, temb, residual, alpha, num_frames, padding)


def to_rows(x: Tensor, clips: int) -> Tensor:
    """Maps as dense ``(clips, rows, channels)``: a view if they are channels-last."""
    return x.permute(0, 2, 3, 1).contiguous().view(clips, -1, x.shape[1])


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """``(clips, rows, channels)`` as channels-last maps of the size of ``like``, a view."""
    batch_frames, _, height, width = like.shape
    return rows.view(batch_frames, height, width, rows.shape[2]).permute(0, 3, 1, 2)


def empty_rows(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Rows for a result with the clips and rows of ``x``."""
    return torch.empty(x.shape[0], x.shape[1], channels, dtype=dtype, device=x.device)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    num_frames: int,
    padding: int,
) -> Tensor:
    """Launches the convolution.

    Args:
        x: ``(batch*num_frames, in, height, width)``.
        weight: ``(out, in, kernel, 1)`` in the dtype of ``x``.
        bias: ``(out,)`` or None.
        temb: ``(batch*num_frames, out)``, ``(batch, out)`` or None.
        residual: ``(batch*num_frames, out, height, width)`` or None.
        alpha: fp32 ``(1,)`` or ``(out,)``, or None.
        num_frames: Frames of a clip.
        padding: Frames of zeros in front of a clip; behind it are ``kernel - 1 - padding``.

    Returns:
        Channels-last ``(batch*num_frames, out, height, width)`` in the dtype of the residual, or of ``x``.
    """
    clips, channels = x.shape[0] // num_frames, weight.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    if x.numel() == 0:
        return from_rows(x.new_empty(clips, num_frames * x.shape[2:].numel(), channels, dtype=dtype), x)
    rows = to_rows(x, clips)
    out = empty_rows(rows, channels, dtype)
    taps = weight.squeeze(-1).permute(2, 0, 1).contiguous()
    bias, temb, alpha = (None if value is None else value.contiguous() for value in (bias, temb, alpha))
    residual = None if residual is None else to_rows(residual, clips)
    launch_on_rows(rows, taps, bias, temb, residual, alpha, out, num_frames, padding)
    return from_rows(out, x)


def launch_on_rows(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    out: Tensor,
    num_frames: int,
    padding: int,
) -> None:
    """Launches the form of the kernel that suits the GPU, on dense ``(clips, rows, channels)``."""
    clips, rows, depth = x.shape
    kernel_size, columns, _ = taps.shape
    pixels, target = rows // num_frames, target_of(x)
    tile = tile_for(target, clips, rows, columns, depth, x.dtype)
    temb_rows = rows if temb is None or temb.shape[0] == clips else pixels
    options = {
        "IN": depth, "OUT": columns, "TAPS": kernel_size, "PADDING": padding,
        "SHARED_TEMB": temb_rows == rows or temb_rows % tile.rows == 0,
        "ALPHA_PER_CHANNEL": alpha is not None and alpha.shape[0] > 1,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    operands = x, taps, residual, out
    descriptors = takes_descriptors(target, x.dtype, depth, columns) and all(map(fits_descriptor, operands))
    if descriptors:
        x, taps, residual, out = described(tile, *operands)
    row_tiles = cdiv(rows, tile.rows)
    launch(
        kernels.temporal_conv_descriptor_kernel if descriptors else kernels.temporal_conv_kernel,
        (clips * row_tiles * cdiv(columns, tile.columns),),
        x, taps, bias, temb, residual, alpha, out, rows, row_tiles, pixels, temb_rows, **options,
    )  # fmt: skip


def fits_descriptor(operand: Tensor | None) -> bool:
    """Whether an operand may be described: 16 bits, from a multiple of 16 bytes on."""
    return operand is None or (operand.dtype.itemsize == 2 and operand.data_ptr() % 16 == 0)


def described(tile: Tile, x: Tensor, taps: Tensor, residual: Tensor | None, out: Tensor) -> tuple:
    """Tensor descriptors of the operands, which also tell the hardware where they end."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    result = [1, tile.rows, tile.columns]
    return (
        TensorDescriptor.from_tensor(x, [1, tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(taps, [1, tile.columns, tile.depth]),
        None if residual is None else TensorDescriptor.from_tensor(residual, result),
        TensorDescriptor.from_tensor(out, result),
    )


temporal_conv = torch.library.custom_op("temporal_layers::temporal_conv", forward, mutates_args=())


@temporal_conv.register_fake
def _(x, weight, bias, temb, residual, alpha, num_frames, padding):
    batch_frames, _, height, width = x.shape
    dtype = x.dtype if residual is None else residual.dtype
    return x.new_empty(batch_frames, height, width, weight.shape[0], dtype=dtype).permute(0, 3, 1, 2)


def keep_for_backward(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Saves the input and the parameters; neither the update nor the residual is read again."""
    x, weight, bias, temb, _, alpha, ctx.num_frames, ctx.padding = inputs
    ctx.save_for_backward(x, weight, bias, temb, alpha)


def differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's tensors."""
    x, weight, bias, temb, alpha = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_temb, needs_residual, needs_alpha = ctx.needs_input_grad[:6]
    to_residual, to_x, to_weight, to_bias, to_temb, to_alpha = grad if needs_residual else None, *(None,) * 5
    grad = grad.to(x.dtype)
    if needs_x:
        flipped = weighed(weight, alpha).flip(2).transpose(0, 1)
        rest = weight.shape[2] - 1 - ctx.padding
        to_x = temporal_conv(grad, flipped, None, None, None, None, ctx.num_frames, rest)
    # First as if alpha were 0, in fp32: the products with the parameters are what alpha weighs.
    if needs_weight or needs_alpha:
        clips = (to_clips(maps, ctx.num_frames) for maps in (x, grad))
        to_weight = weight_gradient(*clips, weight.shape[2], ctx.padding)
    if temb is not None and (needs_temb or needs_alpha):
        to_temb = grad.sum((2, 3), dtype=torch.float32).unflatten(0, (temb.shape[0], -1)).sum(1)
    if bias is not None and (needs_bias or needs_alpha):
        to_bias = grad.sum((0, 2, 3), dtype=torch.float32) if to_temb is None else to_temb.sum(0)
    if needs_alpha:
        of_channels = (to_weight * weight).sum((1, 2, 3))
        of_channels = of_channels if bias is None else of_channels + to_bias * bias
        of_channels = of_channels if temb is None else of_channels + (to_temb * temb).sum(0)
        to_alpha = -of_channels.sum_to_size(alpha.shape)
    to_weight = weighed(to_weight, alpha).to(weight.dtype) if needs_weight else None
    to_bias = weighed(to_bias, alpha).to(bias.dtype) if needs_bias else None
    to_temb = weighed(to_temb, alpha).to(temb.dtype) if needs_temb else None
    return to_x, to_weight, to_bias, to_temb, to_residual, to_alpha, None, None


def weighed(parameter: Tensor, alpha: Tensor | None) -> Tensor:
    """A weight ``(out, in, kernel, 1)``, or a tensor whose last dimension is ``out``, times ``1 - alpha``."""
    if alpha is None:
        return parameter
    scale = 1 - alpha
    return (parameter * (scale.view(-1, 1, 1, 1) if parameter.dim() == 4 else scale)).to(parameter.dtype)


temporal_conv.register_autograd(differentiate, setup_context=keep_for_backward)
register_looped_vmap(temporal_conv)
