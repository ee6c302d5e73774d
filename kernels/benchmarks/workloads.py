"""An operator on a case: its inputs, its oracle, what it costs at least, and everything that can compute it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from temporal_layers.kernels.alpha_blend import alpha_blend, alpha_residual
from temporal_layers.kernels.benchmarks import formulas, layers, peers
from temporal_layers.kernels.benchmarks.cases import LAYERS, Case
from temporal_layers.kernels.geglu import geglu
from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.linear import linear
from temporal_layers.kernels.temporal_attention import temporal_attention
from temporal_layers.kernels.temporal_conv import temporal_conv

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Layout:
    """A memory layout: how the activations get there from channels-last frames and back, neither of them timed."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute a workload.

    Attributes:
        name: ``fused`` and ``reference`` are this library.
        build: Makes the function; whatever it raises becomes the row's text.
        layout: Memory layout of the activations it is given; None for the library's own.
        gpu_only: Not tried on a CPU.
        ours: Held to the strict budget by the gate.
    """

    name: str
    build: Callable[[], Function]
    layout: Layout | None = None
    gpu_only: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Cost:
    """Least traffic to memory in bytes, and operations of the matrix products."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Workload:
    """An operator on a case in a dtype.

    Attributes:
        inputs: Tensors, all of them differentiated; the first ``activations`` of them follow a provider's layout.
        activations: Number of those.
        oracle: The formula, for inputs in any dtype and on the library's own layout.
        costs: By mode.
        providers: In the order of the table.
        weights: Weights of a layer by name, which the oracle takes as ``p``; empty for an operator.
        terms: Terms whose sum is the last input's gradient, from the oracle's inputs and the upstream gradient, where
            that sum cancels; None elsewhere.
        terms_rounded: Whether a provider may round a factor of these terms to the dtype of the activation.
        output: Shape of the output; None for that of the first input.
    """

    inputs: tuple[Tensor, ...]
    activations: int
    oracle: Function
    costs: dict[str, Cost]
    providers: tuple[Provider, ...]
    weights: dict[str, Tensor] = field(default_factory=dict)
    terms: Function | None = None
    terms_rounded: bool = False
    output: tuple[int, ...] | None = None

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output, and of its gradient."""
        return tuple(self.inputs[0].shape) if self.output is None else self.output


def frames_layout() -> Layout:
    """Frames in NCHW, which image models hand over unless told otherwise."""
    return Layout(lambda x: x.contiguous(), lambda x: x)


def clips_layout(case: Case, memory_format: torch.memory_format = torch.contiguous_format) -> Layout:
    """Clips ``(batch, channels, frames, height, width)``, contiguous as diffusers has them or channels-last."""
    return Layout(
        lambda x: x.unflatten(0, (-1, case.frames)).transpose(1, 2).contiguous(memory_format=memory_format),
        lambda x: x.transpose(1, 2).flatten(0, 1),
    )


def sequences_layout(case: Case) -> Layout:
    """Sequences ``(batch*positions, frames, channels)``, contiguous."""
    return Layout(
        lambda x: x.unflatten(0, (-1, case.frames)).transpose(1, 2).flatten(0, 1).contiguous(),
        lambda x: x.unflatten(0, (-1, case.positions)).transpose(1, 2).flatten(0, 1),
    )


def ours(function: Function, **options) -> tuple[Provider, Provider]:
    """The two providers of an operator of this library."""
    fused = Provider("fused", lambda: partial(function, **options, impl="fused"), gpu_only=True, ours=True)
    return fused, Provider("reference", lambda: partial(function, **options, impl="reference"), ours=True)


def compiled(function: Function, layout: Layout | None = None) -> Provider:
    """A peer under torch.compile."""
    return Provider("torch.compile", lambda: torch.compile(function, dynamic=False), layout)


def build(op: str, case: Case, dtype: torch.dtype, device: str) -> Workload:
    """Draws the inputs of an operator on a case and lists who can compute it."""
    generator = torch.Generator(device).manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def maps() -> Tensor:
        x = normal(case.batch * case.frames, case.height, case.width, case.channels)
        return x.permute(0, 3, 1, 2)

    return BUILDERS[op](case, dtype, device, normal, maps)


def in_units(case: Case, dtype: torch.dtype, forward: tuple, backward: tuple) -> dict[str, Cost]:
    """Costs from numbers of passes over the activation and from operations for each of its elements."""
    unit = case.elements * dtype.itemsize
    return {
        mode: Cost(passes * unit, operations * case.elements)
        for mode, (passes, operations) in (("forward", forward), ("backward", backward))
    }


def build_attention(case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function) -> Workload:
    sequences, heads = sequences_layout(case), case.heads
    shape = (case.batch * case.frames, case.positions, case.channels)
    backends = [
        Provider(f"sdpa-{name}", partial(peers.sdpa, heads, name), sequences, gpu_only=name in ("efficient", "cudnn"))
        for name in peers.BACKENDS
    ]
    providers = (
        *ours(temporal_attention, num_frames=case.frames, num_heads=heads),
        Provider("sdpa", partial(peers.sdpa, heads), sequences),
        *backends,
        Provider("bmm", partial(peers.bmm, heads), sequences),
        Provider("xformers", partial(peers.xformers_attention, heads), sequences, gpu_only=True),
        compiled(peers.bmm(heads), sequences),
    )
    costs = in_units(case, dtype, (4, 4 * case.frames), (7, 10 * case.frames))
    oracle = partial(formulas.attention, frames=case.frames, heads=heads)
    return Workload(tuple(normal(*shape) for _ in range(3)), 3, oracle, costs, providers)


def build_group_norm(case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function) -> Workload:
    def on_library(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str) -> Tensor:
        return group_norm(x, 32, weight, bias, num_frames=case.frames, activation="silu", impl=impl)

    clips = clips_layout(case)
    providers = (
        *ours(on_library),
        Provider("eager", lambda: peers.group_norm, clips),
        Provider("eager, channels-last", lambda: peers.group_norm, clips_layout(case, torch.channels_last_3d)),
        Provider("var_mean", lambda: partial(peers.group_norm_by_moments, frames=case.frames)),
        compiled(peers.group_norm, clips),
    )
    inputs = (maps(), 1 + 0.1 * normal(case.channels), 0.1 * normal(case.channels))
    oracle = partial(formulas.group_norm, frames=case.frames)
    return Workload(inputs, 1, oracle, in_units(case, dtype, (3, 0), (5, 0)), providers)


def build_blend(
    case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function, *, is_update: bool = False
) -> Workload:
    frames = frames_layout()
    eager = peers.residual if is_update else peers.blend
    providers = (
        *ours(alpha_residual if is_update else alpha_blend),
        Provider("eager", lambda: eager, frames),
        Provider("diffusers", lambda: partial(peers.diffusers_blend, is_update=is_update), frames),
        compiled(eager, frames),
    )
    inputs = (maps(), maps(), torch.tensor(0.7, device=device))

    def terms(first: Tensor, second: Tensor, alpha: Tensor, upstream: Tensor) -> Tensor:
        return upstream * (-second if is_update else first - second)

    passes = (3, 0), ((3, 0) if is_update else (5, 0))
    oracle = formulas.residual if is_update else formulas.blend
    return Workload(inputs, 2, oracle, in_units(case, dtype, *passes), providers, terms=terms)


def build_conv(case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function) -> Workload:
    clips = clips_layout(case)
    providers = (
        *ours(temporal_conv, num_frames=case.frames),
        Provider("conv3d", lambda: peers.conv, clips),
        Provider("conv3d, channels-last", lambda: peers.conv, clips_layout(case, torch.channels_last_3d)),
        compiled(peers.conv, clips),
    )
    width = case.channels
    inputs = (maps(), normal(width, width, 3, 1) * (3 * width) ** -0.5, 0.1 * normal(width))
    costs = in_units(case, dtype, (2, 6 * width), (3, 12 * width))
    return Workload(inputs, 1, partial(formulas.conv, frames=case.frames), costs, providers)


def build_conv_residual(case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function) -> Workload:
    def on_library(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor, impl: str) -> Tensor:
        *temb, alpha = rest
        options = {"residual": residual, "temb": temb[0] if temb else None, "alpha": alpha, "impl": impl}
        return temporal_conv(x, weight, bias, num_frames=case.frames, **options)

    def terms(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        *temb, _, upstream = rest
        return -upstream * formulas.conv_update(x, weight, bias, *temb, frames=case.frames)

    clips, width = clips_layout(case), case.channels
    providers = (
        *ours(on_library),
        Provider("eager", lambda: peers.conv_residual, clips),
        Provider("eager, channels-last", lambda: peers.conv_residual, clips_layout(case, torch.channels_last_3d)),
        compiled(peers.conv_residual, clips),
    )
    temb = [normal(case.batch * case.frames, width)] if case.temb_channels else []
    inputs = (
        maps(), maps(), normal(width, width, 3, 1) * (3 * width) ** -0.5, 0.1 * normal(width), *temb,
        torch.tensor(0.7, device=device),
    )  # fmt: skip
    costs = in_units(case, dtype, (3, 6 * width), (3, 12 * width))
    oracle = partial(formulas.conv_residual, frames=case.frames)
    return Workload(inputs, 2, oracle, costs, providers, terms=terms, terms_rounded=True)


def build_linear_norm(case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function) -> Workload:
    def on_library(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, *, impl: str) -> Tensor:
        return linear(x, weight, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=1e-5, impl=impl)

    width, rows = case.channels, (case.batch * case.frames, case.positions)
    providers = *ours(on_library), Provider("eager", lambda: peers.linear_norm), compiled(peers.linear_norm)
    # Queries, keys and values in one product.
    inputs = normal(*rows, width), normal(3 * width, width) * width**-0.5, 1 + 0.1 * normal(width), 0.1 * normal(width)
    costs = in_units(case, dtype, (4, 6 * width), (5, 12 * width))
    return Workload(inputs, 1, formulas.linear_norm, costs, providers, output=(*rows, 3 * width))


def build_linear_residual(case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function) -> Workload:
    def on_library(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, *, impl: str) -> Tensor:
        return linear(x, weight, bias, residual=residual, alpha=alpha, impl=impl)

    def terms(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, upstream: Tensor) -> Tensor:
        return -upstream * (x @ weight.t() + bias)

    width, rows = case.channels, (case.batch * case.frames, case.positions)
    providers = *ours(on_library), Provider("eager", lambda: peers.linear_residual), compiled(peers.linear_residual)
    inputs = (
        normal(*rows, width), normal(*rows, width), normal(width, width) * width**-0.5, 0.1 * normal(width),
        torch.tensor(0.7, device=device),
    )  # fmt: skip
    costs = in_units(case, dtype, (3, 2 * width), (3, 4 * width))
    return Workload(inputs, 2, formulas.linear_residual, costs, providers, terms=terms, terms_rounded=True)


def build_geglu(
    case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function, *, norm: bool = False
) -> Workload:
    def behind_norm(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor, impl: str) -> Tensor:
        return geglu(x, weight, bias, norm_weight=norm[0], norm_bias=norm[1], norm_eps=1e-5, impl=impl)

    width, rows = case.channels, (case.batch * case.frames, case.positions)
    diffusers = () if norm else (Provider("diffusers", partial(peers.diffusers_geglu, width)),)
    providers = *ours(behind_norm if norm else geglu), Provider("eager", lambda: peers.geglu), *diffusers
    inputs = (normal(*rows, width), normal(8 * width, width) * width**-0.5, 0.1 * normal(8 * width))
    inputs += (1 + 0.1 * normal(width), 0.1 * normal(width)) if norm else ()
    costs = in_units(case, dtype, (5, 16 * width), (6, 32 * width))
    return Workload(inputs, 1, formulas.geglu, costs, (*providers, compiled(peers.geglu)), output=(*rows, 4 * width))


class OnReferences(torch.nn.Module):
    """A layer that runs on the references alone."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        with layers.without_fused():
            return self.layer(*inputs)


def layer_providers(make: Function, diffusers: Function, eager: Function, p: dict[str, Tensor]) -> tuple[Provider, ...]:
    """The providers of a layer, which takes frames as the spatial layer before it leaves them.

    ``eager`` is for a GPU machine without diffusers; on a CPU it would only take time.
    """
    frames = frames_layout()
    return (
        Provider("fused", make, gpu_only=True, ours=True),
        Provider("reference", lambda: OnReferences(make()), ours=True),
        Provider("reference, NCHW", lambda: OnReferences(make()), frames, ours=True),
        Provider("diffusers", diffusers, frames),
        Provider("diffusers, channels-last", diffusers),
        Provider("eager", lambda: layers.Weighted(eager, p), frames, gpu_only=True),
        Provider("torch.compile", lambda: torch.compile(layers.Weighted(eager, p), dynamic=False), frames),
    )


def build_res_block(case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function) -> Workload:
    p = layers.res_block_weights(case.channels, case.temb_channels, dtype, device)
    inputs = (maps(),)
    if case.temb_channels:
        inputs += (normal(case.batch * case.frames, case.temb_channels),)

    providers = layer_providers(
        lambda: layers.our_res_block(p, case.frames),
        lambda: layers.diffusers_res_block(p, case.batch, case.frames),
        lambda x, *rest: peers.res_block(x, rest[0] if case.temb_channels else None, rest[-1], frames=case.frames),
        p,
    )

    def oracle(x: Tensor, temb: Tensor | None = None, *, p: dict[str, Tensor]) -> Tensor:
        return formulas.res_block(x, temb, p, frames=case.frames)

    costs = in_units(case, dtype, (10, 12 * case.channels), (20, 24 * case.channels))
    return Workload(inputs, 1, oracle, costs, providers, p)


def build_transformer(case: Case, dtype: torch.dtype, device: str, normal: Function, maps: Function) -> Workload:
    p = layers.transformer_weights(case.channels, dtype, device)
    providers = layer_providers(
        lambda: layers.our_transformer(p, case.frames, case.heads),
        lambda: layers.diffusers_transformer(p, case.frames, case.heads),
        lambda x, p: peers.transformer(x, p, frames=case.frames, heads=case.heads),
        p,
    )
    per_element = 44 * case.channels + 8 * case.frames
    costs = in_units(case, dtype, (41, per_element), (82, 2 * per_element))
    oracle = partial(formulas.transformer, frames=case.frames, heads=case.heads)
    return Workload((maps(),), 1, oracle, costs, providers, p)


BUILDERS = {
    "temporal_attention": build_attention,
    "group_norm": build_group_norm,
    "alpha_blend": build_blend,
    "alpha_residual": partial(build_blend, is_update=True),
    "temporal_conv": build_conv,
    "temporal_conv_residual": build_conv_residual,
    "linear_norm": build_linear_norm,
    "linear_residual": build_linear_residual,
    "geglu": build_geglu,
    "geglu_norm": partial(build_geglu, norm=True),
    "res_block": build_res_block,
    "transformer": build_transformer,
}
assert set(LAYERS) <= set(BUILDERS)
