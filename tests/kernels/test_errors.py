"""Every mistake a user can make with the operators, and the text that says what to do about it."""

import pytest
import torch

from temporal_layers.kernels.alpha_blend import alpha_blend, alpha_residual
from temporal_layers.kernels.geglu import geglu
from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.linear import linear
from temporal_layers.kernels.temporal_attention import temporal_attention
from temporal_layers.kernels.temporal_conv import temporal_conv

MAPS, TOKENS, HALF = torch.ones(4, 6, 2, 3), torch.ones(4, 5, 6), torch.tensor(0.5)


def blend(first=MAPS, second=MAPS, alpha=HALF, **kwargs):
    return lambda op: op(first, second, alpha, **{"num_frames": 2, **kwargs})


ALPHA_SHAPE = (
    "{op}: alpha: expected shape () or (1 or 2, 1 or 6), got shape %s; pass one weight, or one for each frame and "
    "channel"
)
BLEND_ERRORS = [
    (
        blend(channel_dim=2),
        "{op}: channel_dim: expected 1 (maps) or -1 (tokens), got 2; pass the dimension of channels",
    ),
    (
        blend(MAPS[0, 0], MAPS[0, 0]),
        "{op}: {first}: expected a map (batch*num_frames, channels, height, width) or tokens (batch*num_frames, "
        "tokens, channels), got shape (2, 3); fold the frames into the batch",
    ),
    (
        blend(MAPS.int(), MAPS.int()),
        "{op}: {first}: expected a floating-point tensor, got (4, 6, 2, 3) int32 on cpu; convert it with .to(dtype)",
    ),
    (
        blend(second=MAPS[:, :3]),
        "{op}: {second}: expected the shape of {first} (4, 6, 2, 3), got shape (4, 3, 2, 3); pass two branches of one "
        "layer",
    ),
    (
        blend(second=MAPS[0]),
        "{op}: {second}: expected the shape of {first} (4, 6, 2, 3), got shape (6, 2, 3); pass two branches of one "
        "layer",
    ),
    (
        blend(second=MAPS.bfloat16()),
        "{op}: {second}: expected float32 like {first}, got (4, 6, 2, 3) bfloat16 on cpu; convert it with "
        ".to({first}.dtype)",
    ),
    (
        blend(second=MAPS.to("meta")),
        "{op}: {second}: expected a tensor on cpu like {first}, got (4, 6, 2, 3) float32 on meta; move it to cpu",
    ),
    (blend(num_frames=0), "{op}: num_frames: expected at least 1, got 0; pass the number of frames of a clip"),
    (
        blend(num_frames=3),
        "{op}: {first}: expected a batch divisible by num_frames=3, got batch 4; pass the number of frames that was "
        "folded into the batch",
    ),
    (
        blend(alpha=torch.tensor(1)),
        "{op}: alpha: expected a floating-point tensor, got () int64 on cpu; convert it with .to(dtype)",
    ),
    (
        blend(alpha=HALF.to("meta")),
        "{op}: alpha: expected a tensor on cpu like {first}, got () float32 on meta; move it to cpu",
    ),
    (blend(alpha=torch.ones(2)), ALPHA_SHAPE % "(2,)"),
    (blend(alpha=torch.ones(4, 1)), ALPHA_SHAPE % "(4, 1)"),
    (blend(TOKENS, TOKENS, alpha=torch.ones(1, 5), channel_dim=-1), ALPHA_SHAPE % "(1, 5)"),
    (
        blend(image_only=torch.ones(4)),
        "{op}: image_only: expected a bool tensor, got (4,) float32 on cpu; compare or convert it to bool",
    ),
    (
        blend(image_only=torch.ones(4, dtype=torch.bool, device="meta")),
        "{op}: image_only: expected a tensor on cpu like {first}, got (4,) bool on meta; move it to cpu",
    ),
    (
        blend(image_only=torch.ones(4, 1, dtype=torch.bool)),
        "{op}: image_only: expected shape (4,) or (2, 2), got shape (4, 1); pass one flag for each frame of each clip",
    ),
]


@pytest.mark.parametrize(("call", "text"), BLEND_ERRORS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize(
    ("op", "first", "second"), [(alpha_blend, "spatial", "temporal"), (alpha_residual, "hidden", "update")]
)
def test_blend(call, text, op, first, second):
    with pytest.raises(ValueError) as error:
        call(op)
    assert str(error.value) == text.format(op=op.__name__, first=first, second=second)


WEIGHT = torch.ones(6)
KERNEL = torch.ones(5, 6, 3, 1)


def norm(x=MAPS, num_groups=2, *args, **kwargs):
    return lambda: group_norm(x, num_groups, *args, **kwargs)


def conv(x=MAPS, weight=KERNEL, *args, num_frames=2, **kwargs):
    return lambda: temporal_conv(x, weight, *args, num_frames=num_frames, **kwargs)


def gated(x=TOKENS, weight=None, *args, **kwargs):
    return lambda: geglu(x, torch.ones(8, 6) if weight is None else weight, *args, **kwargs)


def product(x=TOKENS, weight=None, *args, **kwargs):
    return lambda: linear(x, torch.ones(8, 6) if weight is None else weight, *args, **kwargs)


def attend(query=TOKENS, key=None, value=None, num_frames=2, num_heads=3, **kwargs):
    key = query if key is None else key
    value = key if value is None else value
    return lambda: temporal_attention(query, key, value, num_frames=num_frames, num_heads=num_heads, **kwargs)


NORM_ERRORS = [
    (
        norm(TOKENS),
        "x: expected a map (batch*num_frames, channels, height, width), got shape (4, 5, 6); fold the frames into the "
        "batch first",
    ),
    (
        norm(MAPS.long()),
        "x: expected a floating-point tensor, got (4, 6, 2, 3) int64 on cpu; convert it with .to(dtype)",
    ),
    (norm(num_frames=-1), "num_frames: expected at least 1, got -1; pass the number of frames of a clip"),
    (
        norm(num_frames=3),
        "x: expected a batch divisible by num_frames=3, got batch 4; pass the number of frames that was folded into "
        "the batch",
    ),
    (norm(MAPS, 4), "num_groups: expected a divisor of the 6 channels, got 4; choose one that divides them"),
    (norm(MAPS, 0), "num_groups: expected a divisor of the 6 channels, got 0; choose one that divides them"),
    (
        norm(MAPS, 2, WEIGHT[:5]),
        "weight: expected one value for each channel (6,), got shape (5,); size it by x's channels",
    ),
    (
        norm(MAPS, 2, WEIGHT, WEIGHT.double()),
        "bias: expected float32 like x, got (6,) float64 on cpu; convert it with .to(x.dtype)",
    ),
    (
        norm(MAPS, 2, WEIGHT.to("meta")),
        "weight: expected a tensor on cpu like x, got (6,) float32 on meta; move it to cpu",
    ),
    (
        norm(activation="gelu"),
        "activation: expected 'silu' or None, got 'gelu'; apply another activation to the result",
    ),
    (
        norm(memory_format=torch.channels_last_3d),
        "memory_format: expected torch.preserve_format, torch.channels_last or torch.contiguous_format, got "
        "torch.channels_last_3d; pass a memory format of maps",
    ),
]
KERNEL_SHAPE = (
    "weight: expected (out_channels, 6, kernel, 1) or (out_channels, 6, kernel, kernel_height, kernel_width), got "
    "shape %s; pass the weight of a Conv3d and match x's channels"
)
EMBEDDING_SHAPE = (
    "temb: expected shape (4 or 2, 5), got shape %s; pass an embedding for each frame or clip, projected to the "
    "weight's rows"
)
CONV_ERRORS = [
    (
        conv(TOKENS),
        "x: expected a map (batch*num_frames, channels, height, width), got shape (4, 5, 6); fold the frames into the "
        "batch first",
    ),
    (
        conv(num_frames=3),
        "x: expected a batch divisible by num_frames=3, got batch 4; pass the number of frames that was folded into "
        "the batch",
    ),
    (conv(MAPS, KERNEL[..., 0]), KERNEL_SHAPE % "(5, 6, 3)"),
    (conv(MAPS, KERNEL[:, :4]), KERNEL_SHAPE % "(5, 4, 3, 1)"),
    (conv(MAPS, KERNEL[:, :4, :, :, None]), KERNEL_SHAPE % "(5, 4, 3, 1, 1)"),
    (conv(MAPS, KERNEL.expand(5, 6, 3, 3)), KERNEL_SHAPE % "(5, 6, 3, 3)"),
    (conv(MAPS, KERNEL[:, :, :2]), "weight: expected an odd kernel, got kernel 2; choose 1, 3, 5, ..."),
    (
        conv(MAPS, torch.ones(5, 6, 3, 2, 3)),
        "weight: expected an odd kernel height, got kernel height 2; choose 1, 3, 5, ...",
    ),
    (
        conv(MAPS, torch.ones(5, 6, 3, 3, 4)),
        "weight: expected an odd kernel width, got kernel width 4; choose 1, 3, 5, ...",
    ),
    (
        conv(MAPS, torch.ones(5, 6, 3, 3, 1), impl="fused"),
        "impl: expected a (kernel, 1, 1) weight for 'fused', got one of (3, 3, 1); pass impl='auto' or "
        "impl='reference'",
    ),
    (
        conv(MAPS, KERNEL.bfloat16()),
        "weight: expected float32 like x, got (5, 6, 3, 1) bfloat16 on cpu; convert it with .to(x.dtype)",
    ),
    (
        conv(MAPS, KERNEL, WEIGHT),
        "bias: expected one value for each output channel (5,), got shape (6,); size it by the weight's rows",
    ),
    (
        conv(MAPS, KERNEL, WEIGHT[:5].half()),
        "bias: expected float32 like x, got (5,) float16 on cpu; convert it with .to(x.dtype)",
    ),
    (conv(temb=torch.ones(4, 6)), EMBEDDING_SHAPE % "(4, 6)"),
    (conv(temb=torch.ones(3, 5)), EMBEDDING_SHAPE % "(3, 5)"),
    (conv(temb=torch.ones(5)), EMBEDDING_SHAPE % "(5,)"),
    (
        conv(temb=torch.ones(2, 5).half()),
        "temb: expected float32 like x, got (2, 5) float16 on cpu; convert it with .to(x.dtype)",
    ),
    (
        conv(residual=MAPS),
        "residual: expected the shape of the result (4, 5, 2, 3), got shape (4, 6, 2, 3); pass the input of the "
        "residual branch",
    ),
    (
        conv(residual=MAPS[:, :5].to("meta")),
        "residual: expected a tensor on cpu like x, got (4, 5, 2, 3) float32 on meta; move it to cpu",
    ),
    (conv(alpha=HALF), "alpha: expected a residual beside it, got none; pass the residual that it weighs"),
    (
        conv(residual=MAPS[:, :5], alpha=torch.ones(1, 6)),
        "alpha: expected shape () or (1 or 2, 1 or 5), got shape (1, 6); pass one weight, or one for each frame and "
        "channel",
    ),
]
PROJECTION_SHAPE = (
    "weight: expected (2*inner, 6), got shape %s; stack the rows of the value on those of the gate, and match x's "
    "channels"
)
GATE_ERRORS = [
    (gated(WEIGHT), "x: expected (..., channels), got shape (6,); give it a dimension of rows"),
    (
        gated(TOKENS.int()),
        "x: expected a floating-point tensor, got (4, 5, 6) int32 on cpu; convert it with .to(dtype)",
    ),
    (gated(TOKENS, torch.ones(8, 5)), PROJECTION_SHAPE % "(8, 5)"),
    (gated(TOKENS, torch.ones(7, 6)), PROJECTION_SHAPE % "(7, 6)"),
    (gated(TOKENS, torch.ones(6)), PROJECTION_SHAPE % "(6,)"),
    (
        gated(TOKENS, torch.ones(8, 6).double()),
        "weight: expected float32 like x, got (8, 6) float64 on cpu; convert it with .to(x.dtype)",
    ),
    (
        gated(TOKENS, None, torch.ones(4)),
        "bias: expected one value for each row of weight (8,), got shape (4,); size it by the weight",
    ),
    (
        gated(TOKENS, None, torch.ones(8).to("meta")),
        "bias: expected a tensor on cpu like x, got (8,) float32 on meta; move it to cpu",
    ),
]
NORM_PARAMETER_ERRORS = [
    (
        {"norm_weight": WEIGHT},
        "norm_weight: expected norm_eps beside it, got none; pass the epsilon of the layer norm",
    ),
    (
        {"norm_bias": WEIGHT[:5], "norm_eps": 1e-5},
        "norm_bias: expected one value for each channel (6,), got shape (5,); size it by x's channels",
    ),
    (
        {"norm_weight": WEIGHT.double(), "norm_eps": 1e-5},
        "norm_weight: expected float32 like x, got (6,) float64 on cpu; convert it with .to(x.dtype)",
    ),
]
GATE_ERRORS += [(gated(**parameters), text) for parameters, text in NORM_PARAMETER_ERRORS]
SUM = torch.ones(4, 5, 8)
PRODUCT_ERRORS = [
    (product(WEIGHT), "x: expected (..., channels), got shape (6,); give it a dimension of rows"),
    (
        product(TOKENS.int()),
        "x: expected a floating-point tensor, got (4, 5, 6) int32 on cpu; convert it with .to(dtype)",
    ),
    (
        product(TOKENS, torch.ones(8, 5)),
        "weight: expected (out_channels, 6), got shape (8, 5); match x's channels",
    ),
    (product(TOKENS, WEIGHT), "weight: expected (out_channels, 6), got shape (6,); match x's channels"),
    (
        product(TOKENS, torch.ones(8, 6).double()),
        "weight: expected float32 like x, got (8, 6) float64 on cpu; convert it with .to(x.dtype)",
    ),
    (
        product(TOKENS, None, WEIGHT),
        "bias: expected one value for each row of weight (8,), got shape (6,); size it by the weight",
    ),
    (
        product(TOKENS, None, torch.ones(8).to("meta")),
        "bias: expected a tensor on cpu like x, got (8,) float32 on meta; move it to cpu",
    ),
    *((product(**parameters), text) for parameters, text in NORM_PARAMETER_ERRORS),
    (
        product(residual=TOKENS),
        "residual: expected the shape of the result (4, 5, 8), got shape (4, 5, 6); pass the input of the residual "
        "branch",
    ),
    (
        product(residual=SUM.double()),
        "residual: expected float32 like x, got (4, 5, 8) float64 on cpu; convert it with .to(x.dtype)",
    ),
    (product(alpha=HALF), "alpha: expected a residual beside it, got none; pass the residual that it weighs"),
    (
        product(residual=SUM, alpha=torch.ones(2), num_frames=2),
        "alpha: expected shape () or (1 or 2, 1 or 8), got shape (2,); pass one weight, or one for each frame and "
        "channel",
    ),
    (
        product(residual=SUM, alpha=HALF, num_frames=3),
        "x: expected a batch divisible by num_frames=3, got batch 4; pass the number of frames that was folded into "
        "the batch",
    ),
]
ATTENTION_ERRORS = [
    (
        attend(MAPS),
        "query: expected (batch*num_frames, positions, num_heads*head_dim), got shape (4, 6, 2, 3); flatten height and "
        "width into positions",
    ),
    (
        attend(TOKENS.int()),
        "query: expected a floating-point tensor, got (4, 5, 6) int32 on cpu; convert it with .to(dtype)",
    ),
    (
        attend(num_frames=3),
        "query: expected a batch divisible by num_frames=3, got batch 4; pass the number of frames that was folded "
        "into the batch",
    ),
    (attend(num_frames=0), "num_frames: expected at least 1, got 0; pass the number of frames of a clip"),
    (attend(num_heads=4), "num_heads: expected a divisor of the 6 channels, got 4; choose one that divides them"),
    (attend(num_heads=0), "num_heads: expected a divisor of the 6 channels, got 0; choose one that divides them"),
    (attend(num_key_frames=0), "num_key_frames: expected at least 1, got 0; pass the number of frames of the keys"),
    (
        attend(num_key_frames=3),
        "key: expected (batch*num_key_frames, positions, channels) = (6, 5, 6), got shape (4, 5, 6); match the query's "
        "clips, positions and channels",
    ),
    (
        attend(value=TOKENS[:, :4]),
        "value: expected (batch*num_key_frames, positions, channels) = (4, 5, 6), got shape (4, 4, 6); match the "
        "query's clips, positions and channels",
    ),
    (
        attend(key=TOKENS.double()),
        "key: expected float32 like query, got (4, 5, 6) float64 on cpu; convert it with .to(query.dtype)",
    ),
    (
        attend(value=TOKENS.to("meta")),
        "value: expected a tensor on cpu like query, got (4, 5, 6) float32 on meta; move it to cpu",
    ),
    (
        attend(bias=torch.ones(2, 2)),
        "bias: expected (num_heads, num_frames, num_key_frames) = (3, 2, 2), got shape (2, 2); pass one bias for each "
        "head and pair of frames",
    ),
    (
        attend(bias=torch.ones(3, 2, 2, dtype=torch.bool)),
        "bias: expected a floating-point tensor, got (3, 2, 2) bool on cpu; convert it with .to(dtype)",
    ),
    (
        attend(frame_mask=torch.ones(2, 2)),
        "frame_mask: expected a bool tensor, got (2, 2) float32 on cpu; compare or convert it to bool",
    ),
    (
        attend(frame_mask=torch.ones(4, dtype=torch.bool)),
        "frame_mask: expected (batch, num_key_frames) = (2, 2), got shape (4,); pass one flag for each key frame of "
        "each clip",
    ),
    (
        attend(frame_mask=torch.ones(2, 2, dtype=torch.bool, device="meta")),
        "frame_mask: expected a tensor on cpu like query, got (2, 2) bool on meta; move it to cpu",
    ),
    (attend(window=-1), "window: expected at least 0 or None, got -1; pass the reach in frames"),
]
ERRORS = [
    (call, f"{op}: {text}")
    for op, cases in (
        ("group_norm", NORM_ERRORS),
        ("geglu", GATE_ERRORS),
        ("linear", PRODUCT_ERRORS),
        ("temporal_conv", CONV_ERRORS),
        ("temporal_attention", ATTENTION_ERRORS),
    )
    for call, text in cases
]


@pytest.mark.parametrize(("call", "text"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_operators(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == text


def test_dtypes_may_differ_under_autocast_only():
    x = MAPS.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert temporal_conv(x, KERNEL, num_frames=2).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="temporal_conv: weight: expected bfloat16 like x"):
        temporal_conv(x, KERNEL, num_frames=2)
    with pytest.raises(ValueError, match="temporal_conv: weight: expected bfloat16 like x"):
        temporal_conv(x.to("meta"), KERNEL.to("meta"), num_frames=2)
