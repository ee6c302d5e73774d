"""Three frames between every two of clips, once or twice (Video LDM, sections 3.3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.conditioning import FACTOR, interpolated_length
from temporal_layers.recipes.pipelines.context import ContextPipeline, Prepared
from temporal_layers.recipes.pipelines.injected import OnStepEnd
from temporal_layers.recipes.pipelines.outputs import Frames
from temporal_layers.recipes.pipelines.prompts import Prompts
from temporal_layers.recipes.sampling.interpolation import interpolate_windows, interpolation_windows
from temporal_layers.recipes.sampling.loop import OnStep

LEVELS = 2
"""Of the paper: between key frames, and between the frames that came of these."""


class VideoInterpolationPipeline(ContextPipeline):
    """An image model with temporal layers that make three frames between two, at one rate or two.

    Eight frames become 29 and then 113. The given frames are encoded, and decoded again: in pixels they are what the
    autoencoder makes of them.

    Example:
        >>> pipeline = VideoInterpolationPipeline.from_image_pipeline(image_pipeline, adapter="mine")  # doctest: +SKIP
        >>> frames = pipeline("night rain", key_frames).frames[0]  # doctest: +SKIP
    """

    def stream(
        self,
        prompt: Prompts = None,
        frames: Frames | None = None,
        *,
        frames_latents: Float[Tensor, "b c f h w"] | None = None,
        levels: int = LEVELS,
        first_level: int = 0,
        height: int | None = None,
        width: int | None = None,
        pairs: int = 1,
        folder: str | Path | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **sampling: Any,
    ) -> Iterator[Float[Tensor, "b c some h w"]]:
        """Fill in clips, and hand out latents as they come, window by window.

        Besides the given frames, no more are held than a few windows have. `decode_clips` makes frames of latents.

        Args:
            prompt: What clips are to show; see `prepare`. Where it changes in the course of a clip, the numbers are
                those of the given frames, and a window is told the prompt that holds at its first frame.
            frames: Of clips, two or more: a list of images, or a list of lists with one for each clip.
            frames_latents: Their latents, in place of them.
            levels: How many times there are three frames made between two.
            first_level: What the first time is: 0 between key frames, 1 between the frames that came of them.
            height: In pixels; that of the image model's training if not given.
            width: Likewise.
            pairs: Pairs of given frames in a window, as in training.
            folder: Where latents are kept as they come. The same call, with a generator in the same state, then goes
                on with the windows that are missing, after a kill as well, and comes to the same clips bit for bit. A
                call with other arguments is refused.
            callback_on_step_end: Called as ``callback(pipeline, step, timestep, {"latents": latents})`` after each
                step, counted over all windows. It may return a dictionary with other latents, and set
                ``pipeline._interrupt`` to end the clips with the window before.
            callback_on_step_end_tensor_inputs: What it gets.
            **sampling: Further arguments of `prepare`.

        Returns:
            Latents of unit scale on the CPU, those of the given frames as they came.

        Raises:
            ValueError: If arguments do not fit each other, the model or the clips; the text says which.
        """
        planes = self.planes
        if first_level < 0 or levels < 1 or first_level + levels > LEVELS:
            raise ValueError(
                f"{type(self).__name__}: expected at least one level, of {LEVELS} that there are with first_level, got "
                f"levels={levels} and first_level={first_level}"
            )
        if first_level and not planes.rate:
            raise ValueError(
                f"{type(self).__name__}: first_level: expected 0, as the model is not told the rate, got {first_level}"
            )
        call = self.prepare(
            prompt, self._given("frames", frames, frames_latents, self._size(height, width)), **sampling
        )

        def parts(on_step: OnStep) -> Iterator[Tensor]:
            filled, timeline = call.given, call.timeline
            for level in range(first_level, first_level + levels):
                filled = interpolate_windows(
                    call.base,
                    planes,
                    timeline,
                    filled,
                    call.options,
                    rate=float(level) if planes.rate else 0.0,
                    pairs=pairs,
                    folder=None if folder is None else Path(folder, f"level-{level}"),
                    negative=call.negative,
                    on_step=on_step,
                    device=self._execution_device,
                )
                timeline = timeline.stretched(FACTOR)
            return filled

        loops = _loops(call, pairs, levels)
        return self._reported(parts, loops, call.options, callback_on_step_end, callback_on_step_end_tensor_inputs)


def _loops(call: Prepared, pairs: int, levels: int) -> int:
    """How many batches of windows there are in all levels."""
    clips, count, size = len(call.given), call.given.shape[2], call.options.batch_size
    together, loops = max(size // clips, 1), 0
    for level in range(levels):
        windows = len(interpolation_windows(interpolated_length(count, levels=level), pairs))
        whole, rest = divmod(windows, together)
        loops += whole * math.ceil(clips * together / size) + math.ceil(clips * rest / size)
    return loops
