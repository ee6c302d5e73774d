"""What all injected modules of one model share at run time, in one plain object."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temporal_layers import FrameCache
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.sites import InjectionSite
from temporal_layers.frames import check_divisible, fold_frames

__all__ = ["FrameCheckpoint", "Stream", "TemporalState", "unwrap_checkpointing", "wrap_checkpointing"]


Call = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Stream(NamedTuple):
    """What the calls of a stream see of the frames before, and whether they add theirs."""

    cache: FrameCache
    update: bool


class TemporalState:
    """The adapter's configuration and the clip length of the call under way.

    A plain object, not a module: every injected module holds the same one, ``deepcopy`` and pickle keep that identity
    within a model, and torch.compile accepts a symbolic clip length on it. One model serves one thread at a time.

    Attributes:
        config: what was injected.
        sites: where.
        name: of the adapter whose layers are in the model.
        metadata: notes that are saved with it.
        adapters: all adapters of the model by name, in the order they came: those put aside
            (:class:`~temporal_layers.adapters.named.Aside`), and ``None`` for the one in the model.
        enabled: whether the temporal layers run at all; read when a call of the model begins.
        default_num_frames: clip length of 4-D input; ``None`` makes 4-D input plain images.
        chunking: how an autoencoder cuts clips to decode them (:class:`~temporal_layers.adapters.chunks.Chunking`);
            ``None`` to decode them whole.
        memory_budget: bytes that a module may work on at a time, at inference; ``None`` for no limit.
        stream: the stream of frames that calls belong to, or ``None`` for whole clips.
        image_only: ``(batch, num_frames)`` bool, true for frames that bypass the temporal layers, or ``None``.
        frame_context: ``(batch * num_frames, planes, height, width)`` of the frames that are given, or ``None``.
        text: ``(batch, tokens, channels)`` for the temporal layers alone, or ``None`` for that of the image model.
        frozen: ``requires_grad`` of the image model's parameters before ``freeze()``, by name; ``None`` if not frozen.
        in_root_state_dict: whether the state dict being collected is that of the whole model.
    """

    def __init__(self, config: TemporalConfig, sites: tuple[InjectionSite, ...]) -> None:
        self.config = config
        self.sites = sites
        self.name = "default"
        self.metadata: dict[str, str] = {}
        self.adapters: dict[str, Any] = {"default": None}
        self.enabled = True
        self.default_num_frames: int | None = None
        self.chunking: Any = None
        self.memory_budget: int | None = None
        self.stream: Stream | None = None
        self._clip: Tensor | None = None
        self.image_only: Tensor | None = None
        self.frame_context: Tensor | None = None
        self.text: Tensor | None = None
        self.frozen: dict[str, bool] | None = None
        self.in_root_state_dict = False

    def begin(
        self,
        who: str,
        sample: Tensor,
        image_only: Tensor | None = None,
        frame_context: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Any:
        """Note the clip length of a call on ``sample``, 5-D clips or 4-D images, and return it (``None``: images).

        Raises:
            ValueError: if ``sample`` has neither 4 nor 5 axes, its batch is no multiple of the default clip length,
                ``image_only``, ``frame_context`` or ``text`` comes with images or has a wrong shape, or
                ``frame_context`` comes where the adapter takes none.
        """
        if sample.ndim == 5:
            batch, num_frames = sample.shape[0], sample.shape[2]
        elif sample.ndim == 4:
            num_frames = self.default_num_frames
            if num_frames is not None:
                check_divisible(who, sample.shape[0], num_frames)
            batch = sample.shape[0] if num_frames is None else sample.shape[0] // num_frames
        else:
            raise ValueError(
                f"{who}: expected clips (batch, channels, frames, height, width) or images "
                f"(batch, channels, height, width), got shape {tuple(sample.shape)}"
            )
        if image_only is not None:
            if not torch.is_tensor(image_only):
                raise ValueError(
                    f"{who}: image_only: expected a tensor of shape ({batch}, {num_frames}), one flag for each frame "
                    f"of each clip, got a {type(image_only).__name__}; make one with torch.tensor(...)"
                )
            if num_frames is None:
                raise ValueError(
                    f"{who}: image_only: expected None for images, which bypass the temporal layers anyway, got shape "
                    f"{tuple(image_only.shape)}; pass clips as 5-D input"
                )
            if tuple(image_only.shape) != (batch, num_frames):
                raise ValueError(
                    f"{who}: image_only: expected shape ({batch}, {num_frames}), one flag for each frame of each clip, "
                    f"got {tuple(image_only.shape)}; build it from the shape of the clips"
                )
        folded = None
        if frame_context is not None:
            planes = None if self.config.context is None else self.config.context.channels
            check_context(who, sample, frame_context, planes, num_frames)
            folded = frame_context if frame_context.ndim == 4 else fold_frames(frame_context)
            folded = folded.to(sample.dtype)
        self._clip = sample.new_empty((num_frames, 0)) if self.enabled and num_frames is not None else None
        self.image_only, self.frame_context = image_only, folded
        self.text = None if text is None else text_of_clips(who, text, batch, num_frames)
        return num_frames

    @property
    def num_frames(self) -> Any:
        """Clip length the temporal layers work with; ``None`` where they do not run."""
        # Kept as the size of an empty tensor: where torch.compile compiles single blocks, it takes an int on an object
        # that a module holds for a constant, and would compile once for every length; a size may be symbolic.
        return None if self._clip is None else self._clip.shape[0]

    @property
    def active(self) -> bool:
        """Whether the temporal layers run in the current call."""
        return self._clip is not None

    @property
    def cache(self) -> FrameCache | None:
        """Earlier frames for the temporal layers; ``None`` for whole clips."""
        return None if self.stream is None else self.stream.cache

    def block(self) -> AbstractContextManager[None]:
        """Run the body, a call of the model that began, as the next block of the stream under way, if there is one.

        Raises:
            ValueError: if blocks would be cut into chunks.
        """
        if self.stream is None or not self.active:
            return nullcontext()
        if self.chunking is not None:
            raise ValueError(
                "TemporalAdapter.streaming: expected whole blocks, got enable_temporal_chunking(), which would cut "
                "them; call disable_temporal_chunking() and pass shorter blocks"
            )
        return self.stream.cache.block(update=self.stream.update)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are made between calls; what tracing left behind there could not be pickled.
        return {**self.__dict__, "stream": None, "_clip": None, "image_only": None, "frame_context": None, "text": None}

    @contextmanager
    def during(self, num_frames: Any, image_only: Tensor | None) -> Iterator[None]:
        """Run the body with another clip length."""
        clip = None if num_frames is None else torch.empty((num_frames, 0))
        with self._with((clip, image_only, None, None)):
            yield

    @contextmanager
    def _with(self, call: Call) -> Iterator[None]:
        before = self.call
        self._clip, self.image_only, self.frame_context, self.text = call
        try:
            yield
        finally:
            self._clip, self.image_only, self.frame_context, self.text = before

    @contextmanager
    def like(self, call: Call) -> Iterator[None]:
        """Run the body as in the call that :attr:`call` was read in."""
        if all(value is now for value, now in zip(call, self.call, strict=True)):
            yield  # keeps torch.compile free of a side effect inside a checkpointed region
            return
        with self._with(call):
            yield

    @property
    def call(self) -> Call:
        """What :meth:`like` needs to run something as in the present call."""
        return self._clip, self.image_only, self.frame_context, self.text

    @contextmanager
    def collecting_root(self) -> Iterator[None]:
        """Mark the body as collecting the state dict of the whole model."""
        before = self.in_root_state_dict
        self.in_root_state_dict = True
        try:
            yield
        finally:
            self.in_root_state_dict = before


def check_context(who: str, sample: Tensor, frame_context: Tensor, planes: int | None, num_frames: Any) -> None:
    """Raise a ``ValueError`` unless a frame context fits the sample of a call.

    Args:
        who: name of the model.
        sample: clips or images.
        frame_context: what came with them.
        planes: that the adapter takes; ``None`` if it takes no frame context.
        num_frames: frames of a clip; ``None`` for images.
    """
    got = tuple(frame_context.shape)
    if planes is None:
        raise ValueError(
            f"{who}: frame_context: expected None, since the adapter takes none, got shape {got}; inject with "
            "TemporalConfig(context=ContextConfig(channels=...)), or load with context=..."
        )
    if num_frames is None:
        raise ValueError(
            f"{who}: frame_context: expected None for images, which bypass the temporal layers anyway, got shape "
            f"{got}; pass clips as 5-D input, or set the adapter's num_frames"
        )
    batch = sample.shape[0] if sample.ndim == 5 else sample.shape[0] // num_frames
    height, width = sample.shape[-2:]
    expected = [(batch, planes, num_frames, height, width)]
    if sample.ndim == 4:
        expected.append((batch * num_frames, planes, height, width))
    if got not in expected:
        raise ValueError(
            f"{who}: frame_context: expected shape {' or '.join(map(str, expected))}, the planes of every frame of "
            f"every clip, got {got}; for guidance concatenate it along the batch as the sample, with zeros for clips "
            "without given frames"
        )


def text_of_clips(who: str, text: Tensor, batch: Any, num_frames: Any) -> Tensor:
    """The text of the temporal layers with one row a clip, that of its first frame if there is one a frame.

    Args:
        who: name of the model.
        text: what came with the call.
        batch: clips.
        num_frames: frames of a clip; ``None`` for images.

    Raises:
        ValueError: if the call is on images, or the text has another number of rows or axes.
    """
    got = tuple(text.shape)
    if num_frames is None:
        raise ValueError(
            f"{who}: temporal_encoder_hidden_states: expected None for images, which bypass the temporal layers "
            f"anyway, got shape {got}; pass clips as 5-D input, or set the adapter's num_frames"
        )
    if len(got) != 3 or got[0] not in (batch, batch * num_frames):
        raise ValueError(
            f"{who}: temporal_encoder_hidden_states: expected ({batch}, tokens, channels), one text a clip, or "
            f"({batch * num_frames}, tokens, channels), got {got}; for guidance concatenate it along the batch as "
            "encoder_hidden_states"
        )
    return text if got[0] == batch else text.unflatten(0, (batch, num_frames))[:, 0]


class FrameCheckpoint:
    """A gradient checkpointing function that recomputes with the clip length of the forward pass.

    Without it a recomputation would read the clip length of the latest call, which need not be the one whose backward
    pass is running, nor one with the layers switched on.

    Args:
        state: the model's state.
        function: the checkpointing function to wrap, called with a callable and its arguments.
    """

    def __init__(self, state: TemporalState, function: Callable) -> None:
        self.state = state
        self.function = function

    def __call__(self, module: Callable, *args: Any) -> Any:
        return self.function(_WithFrames(self.state, module), *args)


class _WithFrames:
    """``module`` with the clip length of now, whenever it is called.

    A class, not a nested function: diffusers asks for ``__call__``, which torch.compile does not find on a function.
    """

    def __init__(self, state: TemporalState, module: Callable) -> None:
        self.state, self.call, self.module = state, state.call, module

    def __call__(self, *inputs: Any) -> Any:
        with self.state.like(self.call):
            return self.module(*inputs)


CHECKPOINT = "_gradient_checkpointing_func"  # where diffusers keeps the function, on every module that checkpoints


def wrap_checkpointing(model: nn.Module, state: TemporalState) -> None:
    """Make all gradient checkpointing functions set on modules of ``model`` remember the clip length."""
    for module in model.modules():
        function = module.__dict__.get(CHECKPOINT)
        if function is not None and not isinstance(function, FrameCheckpoint):
            setattr(module, CHECKPOINT, FrameCheckpoint(state, function))


def unwrap_checkpointing(model: nn.Module) -> None:
    """Undo :func:`wrap_checkpointing`."""
    for module in model.modules():
        function = module.__dict__.get(CHECKPOINT)
        if isinstance(function, FrameCheckpoint):
            setattr(module, CHECKPOINT, function.function)
