"""The library's layers and diffusers' modules with one set of weights, named as diffusers names them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from temporal_layers import (
    AlphaConfig,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)
from temporal_layers.kernels import dispatch

RES_KEYS = {
    "norms.0": "norm1",
    "convs.0": "conv1",
    "temb_proj": "time_emb_proj",
    "norms.1": "norm2",
    "convs.1": "conv2",
}

BLOCK = "transformer_blocks.0."
TRANSFORMER_KEYS = {"in_norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"} | {
    ours: BLOCK + theirs
    for ours, theirs in (
        ("norms.0", "norm1"),
        ("norms.1", "norm2"),
        ("norm_out", "norm3"),
        *((f"attentions.{i}.to_{which}", f"attn{i + 1}.to_{which}") for i in (0, 1) for which in "qkv"),
        *((f"attentions.{i}.to_out", f"attn{i + 1}.to_out.0") for i in (0, 1)),
        ("ff_out.proj_in", "ff.net.0.proj"),
        ("ff_out.proj_out", "ff.net.2"),
    )
}


@contextmanager
def without_fused() -> Iterator[None]:
    """Lets every operator's ``"auto"`` choose its reference inside."""
    with mock.patch.object(dispatch, "has_triton", lambda: False):
        yield


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Weights by name: norms around one, biases around zero, matrices that keep the size of their input."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values = values * values[0].numel() ** -0.5
        else:
            values = 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        weights[name] = values.to(device, torch.float32 if name == "mix_factor" else dtype)
    return weights


def res_block_weights(channels: int, temb_channels: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Weights of SVD's temporal residual block and of its blend."""
    shapes: dict[str, tuple[int, ...]] = {"mix_factor": (1,)}
    for index in (1, 2):
        shapes |= {f"norm{index}.weight": (channels,), f"norm{index}.bias": (channels,)}
        shapes |= {f"conv{index}.weight": (channels, channels, 3, 1, 1), f"conv{index}.bias": (channels,)}
    if temb_channels:
        shapes |= {"time_emb_proj.weight": (channels, temb_channels), "time_emb_proj.bias": (channels,)}
    return draw(shapes, dtype, device)


def transformer_weights(channels: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Weights of ModelScope's temporal transformer."""
    square, wide = (channels, channels), 4 * channels
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("norm", *(f"{BLOCK}norm{index}" for index in (1, 2, 3))):
        shapes |= {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
    for name in ("proj_in", "proj_out", f"{BLOCK}attn1.to_out.0", f"{BLOCK}attn2.to_out.0"):
        shapes |= {f"{name}.weight": square, f"{name}.bias": (channels,)}
    shapes |= {f"{BLOCK}attn{index}.to_{which}.weight": square for index in (1, 2) for which in "qkv"}
    shapes |= {f"{BLOCK}ff.net.0.proj.weight": (2 * wide, channels), f"{BLOCK}ff.net.0.proj.bias": (2 * wide,)}
    shapes |= {f"{BLOCK}ff.net.2.weight": (channels, wide), f"{BLOCK}ff.net.2.bias": (channels,)}
    return draw(shapes, dtype, device)


def load_ours(layer: nn.Module, weights: dict[str, Tensor], keys: dict[str, str]) -> nn.Module:
    """Fills one of our layers from diffusers' names; a weight that finds no place raises."""
    rest, ours = dict(weights), {}
    for name, own in layer.state_dict().items():
        if name == "blend.logit":
            ours[name] = rest.pop("mix_factor").reshape(())
        else:
            prefix, _, kind = name.rpartition(".")
            ours[name] = rest.pop(f"{keys[prefix]}.{kind}").reshape(own.shape)
    assert not rest, f"left over: {sorted(rest)}"
    layer.load_state_dict(ours)
    return layer.eval()


def our_res_block(weights: dict[str, Tensor], frames: int) -> Callable[..., Tensor]:
    """:class:`TemporalResBlock` as a function of maps and the timestep embedding."""
    reference = weights["conv1.weight"]
    projection = weights.get("time_emb_proj.weight")
    layer = TemporalResBlock(
        reference.shape[0], temb_channels=None if projection is None else projection.shape[1],
        dtype=reference.dtype, device=reference.device,
        config=TemporalResBlockConfig(timestep_embedding=projection is not None),
    )  # fmt: skip
    return Bound(load_ours(layer, weights, RES_KEYS), num_frames=frames)


def our_transformer(weights: dict[str, Tensor], frames: int, heads: int) -> Callable[..., Tensor]:
    """:class:`TemporalTransformerBlock` in ModelScope's form as a function of maps."""
    reference = weights["proj_in.weight"]
    config = TemporalTransformerConfig(
        attentions=("self", "self"), projection=True, ff_in=False, in_norm="clip", position="none",
        alpha=AlphaConfig(init=0.0, learned=False),
    )  # fmt: skip
    layer = TemporalTransformerBlock(
        reference.shape[0], num_heads=heads, config=config, dtype=reference.dtype, device=reference.device
    )
    return Bound(load_ours(layer, weights, TRANSFORMER_KEYS), num_frames=frames)


class Weighted(nn.Module):
    """A function of inputs and weights by name as a module, so that the weights get gradients like a layer's."""

    def __init__(self, function: Callable[..., Tensor], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.names = list(weights)
        self.values = nn.ParameterList(value.clone() for value in weights.values())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, dict(zip(self.names, self.values, strict=True)))


class Passthrough(nn.Module):
    """Stands in for the spatial half of diffusers' block, which both sides have in common."""

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        return x


def diffusers_res_block(weights: dict[str, Tensor], batch: int, frames: int) -> Callable[..., Tensor]:
    """The temporal half of diffusers' SpatioTemporalResBlock as a function of maps and the timestep embedding.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers.models.resnet import SpatioTemporalResBlock

    reference = weights["conv1.weight"]
    projection = weights.get("time_emb_proj.weight")
    block = SpatioTemporalResBlock(
        reference.shape[0], temb_channels=None if projection is None else projection.shape[1], eps=1e-5,
        merge_strategy="learned",
    )  # fmt: skip
    block.spatial_res_block = Passthrough()
    block.to(reference)
    theirs = {f"temporal_res_block.{name}": value for name, value in weights.items() if name != "mix_factor"}
    block.load_state_dict(theirs | {"time_mixer.mix_factor": weights["mix_factor"]})
    flags = torch.zeros(batch, frames, device=reference.device)
    return Bound(block.eval(), image_only_indicator=flags)


def diffusers_transformer(weights: dict[str, Tensor], frames: int, heads: int) -> Callable[..., Tensor]:
    """diffusers' TransformerTemporalModel as a function of maps.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    reference = weights["proj_in.weight"]
    channels = reference.shape[0]
    module = TransformerTemporalModel(heads, channels // heads, in_channels=channels).to(reference)
    module.load_state_dict(weights)
    return Bound(module.eval(), num_frames=frames, return_dict=False)


class Bound(nn.Module):
    """A module with its keyword arguments; returns its first result."""

    def __init__(self, module: nn.Module, **options) -> None:
        super().__init__()
        self.module = module
        self.options = options

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.module(*inputs, **self.options)
        return out[0] if isinstance(out, tuple) else out
