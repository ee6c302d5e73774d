"""The blend of the spatial and the temporal branch, with its learned weight alpha."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from temporal_layers.autocast import autocast_to
from temporal_layers.config import AlphaConfig
from temporal_layers.kernels.alpha_blend import alpha_blend, alpha_residual

__all__ = ["AlphaBlend"]


class AlphaBlend(nn.Module):
    """``alpha * spatial + (1 - alpha) * temporal`` with alpha in [0, 1] (Video LDM, section 3.1, equation 2).

    Alpha always weighs the spatial branch: 1 gives the image model. A learned alpha is the sigmoid of ``logit``, which
    stays in fp32 (or wider) when the model is cast, because in bf16 an alpha of 0.999 is 1 and a learning rate of 1e-4
    changes nothing. A fixed one has no state.

    Attributes:
        scale: strength of the temporal branch, set at run time and saved nowhere: the result is
            ``spatial + scale * (blend - spatial)``.

    Args:
        config: start value, learned or fixed, and shape.
        channels: channels of the layer; required with ``shape="channel"``.

    Raises:
        ValueError: if ``shape="channel"`` and ``channels`` is missing.
    """

    scale: float = 1.0

    def __init__(
        self,
        config: AlphaConfig | None = None,
        *,
        channels: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        config = config or AlphaConfig()
        self.config = config
        if config.shape == "channel" and channels is None:
            raise ValueError("AlphaBlend: channels: expected the layer's channels with shape='channel', got None")
        shape = {"scalar": (), "frame": (config.num_frames, 1), "channel": (1, channels)}[config.shape]
        self.shape = shape
        self.logit = None
        if config.learned:
            logit = math.log(config.init / (1.0 - config.init))
            # One axis even for a scalar: FSDP2 shards no parameter without one.
            self.logit = nn.Parameter(torch.full(shape or (1,), logit, device=device, dtype=torch.float32))

    @property
    def alpha(self) -> Float[Tensor, "..."]:
        """The weight of the spatial branch: ``()``, ``(frames, 1)`` or ``(1, channels)``, fp32 or wider.

        A fixed alpha is on the CPU, a learned one on the device of the layer.
        """
        return self._alpha(torch.device("cpu"), torch.float32)

    def _alpha(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # A fixed alpha is made on the spot: it has no state that could be cast, moved to meta or lost.
        if self.logit is None:
            wide = torch.promote_types(dtype, torch.float32)
            return torch.full(self.shape, self.config.init, device=device, dtype=wide)
        return self.logit.sigmoid().reshape(self.shape)

    def _weight(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight of the spatial branch after scaling, which is a blend with another alpha: no pass over memory."""
        alpha = self._alpha(device, dtype)
        return alpha if self.scale == 1 else 1 - self.scale * (1 - alpha)

    def forward(
        self,
        spatial: Float[Tensor, "n ..."],
        temporal: Float[Tensor, "n ..."] | Callable[[Tensor], Tensor],
        *,
        num_frames: int,
        channel_dim: int = 1,
        image_only: Bool[Tensor, "batch frames"] | None = None,
        is_update: bool = False,
    ) -> Float[Tensor, "n ..."]:
        """Blend two branches of equal shape.

        Args:
            spatial: ``(batch * num_frames, ...)``, maps with ``channel_dim=1`` or tokens with ``channel_dim=-1``.
            temporal: same shape and dtype (under autocast any dtype); or a function of alpha that returns the blend, as
                in :meth:`ended_by`.
            num_frames: frames of a clip.
            channel_dim: axis of the channels.
            image_only: ``(batch, num_frames)``, true for frames that keep the spatial branch exactly.
            is_update: ``temporal`` is the update of a residual branch, as in :meth:`residual`.

        Returns:
            The blend, in the dtype of ``spatial``.

        Raises:
            ValueError: if ``num_frames`` differs from the clip length of an alpha per frame.
        """
        if self.config.num_frames is not None and num_frames != self.config.num_frames:
            raise ValueError(
                f"AlphaBlend: num_frames: expected {self.config.num_frames} (alpha is per frame), got {num_frames}; "
                "use shape='scalar' for clips of any length"
            )
        if callable(temporal):
            return temporal(self._weight(spatial.device, spatial.dtype))
        blend = alpha_residual if is_update else alpha_blend
        return blend(
            spatial,
            autocast_to(temporal, spatial.dtype),
            self._weight(spatial.device, spatial.dtype),
            num_frames=num_frames,
            channel_dim=channel_dim,
            image_only=image_only,
        )

    def residual(
        self,
        hidden_states: Float[Tensor, "n ..."],
        update: Float[Tensor, "n ..."],
        *,
        num_frames: int,
        channel_dim: int = 1,
        image_only: Bool[Tensor, "batch frames"] | None = None,
    ) -> Float[Tensor, "n ..."]:
        """Blend ``hidden_states`` with ``hidden_states + update``, as ``hidden_states + (1 - alpha) * update``.

        The same value as :meth:`forward` with one pass over memory less, and exactly ``hidden_states`` where
        ``update`` is zero. Arguments as there.
        """
        # Through __call__, so that hooks run: offloading brings the logit to the device in one.
        return self(
            hidden_states,
            update,
            num_frames=num_frames,
            channel_dim=channel_dim,
            image_only=image_only,
            is_update=True,
        )

    def ended_by(
        self, hidden_states: Float[Tensor, "n ..."], last: Callable[[Tensor], Tensor], *, num_frames: int
    ) -> Float[Tensor, "n ..."]:
        """Blend as :meth:`residual` in the last operator of the branch, which takes alpha and returns the result.

        One pass over memory less once more, for an operator that adds ``hidden_states`` to its result itself.
        """
        return self(hidden_states, last, num_frames=num_frames)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AlphaBlend":
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(device=moved.device)
            return moved

        return super()._apply(keep_wide, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        logit = state_dict.get(f"{prefix}logit")
        if logit is not None and logit.ndim == 0 and self.shape == ():
            state_dict[f"{prefix}logit"] = logit.reshape(1)  # a plain number, as other libraries store it
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        kind = "learned" if self.config.learned else "fixed"
        scale = "" if self.scale == 1 else f", scale={self.scale}"
        return f"{kind}, shape={self.config.shape}, init={self.config.init}{scale}"
