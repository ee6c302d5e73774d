"""Tensors that real models have at the places where temporal layers go.

A name reads ``<model>-<level>-t<frames>``. Heads are those of the model's spatial attention at that level, where it has
any; at the others and in the cascaded models of the paper, of 64 channels each.
"""

from dataclasses import dataclass, replace

OPERATORS = (
    "temporal_attention", "group_norm", "alpha_blend", "alpha_residual", "temporal_conv", "temporal_conv_residual",
    "linear_norm", "linear_residual", "geglu", "geglu_norm",
)  # fmt: skip
# Products and what stands around them: on a CPU parts in a row, as in a model, and left out there.
FUSIONS = ("temporal_conv_residual", "linear_norm", "linear_residual", "geglu_norm")
LAYERS = ("res_block", "transformer")
IN_TRANSFORMERS = ("temporal_attention", "linear_norm", "linear_residual", "geglu", "geglu_norm", "transformer")
OPS = OPERATORS + LAYERS


@dataclass(frozen=True)
class Case:
    """One activation tensor ``(batch*frames, channels, height, width)``.

    Attributes:
        name: Model, level and frames.
        batch: Clips; 2 under classifier-free guidance.
        frames: Frames of a clip.
        channels: Channels.
        height: Height.
        width: Width.
        heads: Heads of the attention; 0 where none belongs.
        temb_channels: Width of the timestep embedding, 0 in an autoencoder.
        compiled: Whether torch.compile takes part, which costs tens of seconds for each operator.
        backward: Whether the backward pass is timed too.
    """

    name: str
    batch: int
    frames: int
    channels: int
    height: int
    width: int
    heads: int = 0
    temb_channels: int = 1280
    compiled: bool = False
    backward: bool = True

    @property
    def positions(self) -> int:
        """Pixels of a frame."""
        return self.height * self.width

    def sample(self) -> "Case":
        """A case with a sixteenth of the pixels, which a CPU computes in float64 in reasonable time."""
        return replace(self, height=max(self.height // 4, 1), width=max(self.width // 4, 1))

    @property
    def elements(self) -> int:
        """Elements of the activation."""
        return self.batch * self.frames * self.positions * self.channels

    def suits(self, op: str) -> bool:
        """Whether the operator exists at this place: nothing of a transformer without heads."""
        return self.heads > 0 or op not in IN_TRANSFORMERS


def unet(name: str, frames: int, size: tuple[int, int], channels: int, heads: int, **options) -> Case:
    """A level of a UNet under classifier-free guidance."""
    settings = {"batch": 2, "heads": heads, **options}
    return Case(f"{name}-t{frames}", frames=frames, height=size[0], width=size[1], channels=channels, **settings)


def vae(name: str, frames: int, size: tuple[int, int], channels: int, **options) -> Case:
    """A level of the decoder of an autoencoder: one clip, no timestep, no temporal attention."""
    settings = {"batch": 1, "temb_channels": 0, **options}
    return Case(f"{name}-t{frames}", frames=frames, height=size[0], width=size[1], channels=channels, **settings)


# In the order of their weight in a report: a run that reaches its time limit has measured the first ones.
GPU_CASES = (
    unet("sd15-64x64x320", 16, (64, 64), 320, 8, compiled=True),
    unet("sdxl-64x64x640", 16, (64, 64), 640, 10),
    vae("vae-256x256x256", 8, (256, 256), 256),
    unet("sd15-32x32x640", 16, (32, 32), 640, 8),
    unet("sd15-16x16x1280", 16, (16, 16), 1280, 8),
    unet("sd21-96x96x320", 16, (96, 96), 320, 5),
    unet("driving-128x256x320", 8, (128, 256), 320, 5),
    unet("upscaler-160x256x256", 8, (160, 256), 256, 4),
    vae("vae-512x512x128", 8, (512, 512), 128),
    unet("sd15-64x64x320", 8, (64, 64), 320, 8),
    unet("sd15-64x64x320", 32, (64, 64), 320, 8),
    unet("sdxl-32x32x1280", 16, (32, 32), 1280, 20),
    unet("sd21-48x48x640", 16, (48, 48), 640, 10),
    vae("vae-64x64x512", 8, (64, 64), 512),
)

# The same levels for images a half to a quarter as large on a side, which one core computes in time.
CPU_CASES = (
    unet("sd15-256px-32x32x320", 16, (32, 32), 320, 8, batch=1, backward=False),
    vae("vae-128px-128x128x128", 8, (128, 128), 128, backward=False),
    unet("sd15-256px-16x16x640", 8, (16, 16), 640, 8, batch=1),
)

SMOKE_CASES = (unet("smoke-8x8x64", 8, (8, 8), 64, 2, batch=1),)
