"""Clips of any length, window by window, from given frames or none (Video LDM, sections 3.2 and 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.config import check_at_least
from temporal_layers.recipes.pipelines.context import ContextPipeline
from temporal_layers.recipes.pipelines.injected import OnStepEnd
from temporal_layers.recipes.pipelines.outputs import Frames
from temporal_layers.recipes.pipelines.prompts import Prompts
from temporal_layers.recipes.pipelines.video_ldm import NUM_FRAMES
from temporal_layers.recipes.sampling.loop import OnStep
from temporal_layers.recipes.sampling.prediction import predict_windows, prediction_windows


class VideoPredictionPipeline(ContextPipeline):
    """An image model with temporal layers that continue given frames, for clips of any length.

    The first window continues the given frames, or begins with nothing; each window behind it continues the last two
    frames of the one before.

    Example:
        >>> pipeline = VideoPredictionPipeline.from_image_pipeline(image_pipeline, adapter="my-model")  # doctest: +SKIP
        >>> futures = pipeline("night rain", image, num_frames=40, num_videos_per_prompt=3).frames  # doctest: +SKIP
    """

    def stream(
        self,
        prompt: Prompts = None,
        image: Frames | None = None,
        *,
        image_latents: Float[Tensor, "b c s h w"] | None = None,
        num_frames: int = NUM_FRAMES,
        height: int | None = None,
        width: int | None = None,
        window: int = NUM_FRAMES,
        window_overlap: int = 2,
        folder: str | Path | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **sampling: Any,
    ) -> Iterator[Float[Tensor, "b c some h w"]]:
        """Make clips, and hand out latents as they come: what was given, then the new frames of each window.

        No more frames are held than a window has. `decode_clips` makes frames of latents.

        Args:
            prompt: What clips are to show; see `prepare`. Where it changes in the course of a clip, a window is told
                the prompt that holds at its first new frame.
            image: First frames: an image, a list of images, or a list of lists with one for each clip; none to begin
                with nothing, for models trained with no frame given.
            image_latents: Their latents, in place of them.
            num_frames: Of a clip in the end, given ones included.
            height: In pixels; that of the image model's training if not given.
            width: Likewise.
            window: Frames that the model sees at a time, as in its training.
            window_overlap: Frames of a window that are given, once there are so many.
            folder: Where latents are kept as they come. The same call, with a generator in the same state, then goes
                on with the windows that are missing, after a kill as well, and comes to the same clips bit for bit; so
                does one with more ``num_frames``. A call with other arguments is refused.
            callback_on_step_end: Called as ``callback(pipeline, step, timestep, {"latents": latents})`` after each
                step, counted over all windows. It may return a dictionary with other latents, and set
                ``pipeline._interrupt`` to end the clips with the window before.
            callback_on_step_end_tensor_inputs: What it gets.
            **sampling: Further arguments of `prepare`.

        Returns:
            Latents of unit scale on the CPU.

        Raises:
            ValueError: If arguments do not fit each other, the model or the clips; the text says which.
        """
        check_at_least(f"{type(self).__name__}: num_frames", num_frames, 1)
        planes, size = self.planes, self._size(height, width)
        if image is None and image_latents is None:
            factor = self._factor
            given = torch.empty(1, planes.latent_channels, 0, size[0] // factor, size[1] // factor)
        else:
            given = self._given("image", image, image_latents, size)
        if given.shape[2] > num_frames:
            raise ValueError(
                f"{type(self).__name__}: num_frames: expected at least the {given.shape[2]} given frames, which it "
                f"includes, got {num_frames}; ask for more, or give the last ones only"
            )
        call = self.prepare(prompt, given, **sampling)
        passes = prediction_windows(num_frames, first=given.shape[2], window=window, overlap=window_overlap)

        def parts(on_step: OnStep) -> Iterator[Tensor]:
            return predict_windows(
                call.base,
                planes,
                call.timeline,
                call.given,
                num_frames,
                call.options,
                window=window,
                overlap=window_overlap,
                folder=folder,
                negative=call.negative,
                on_step=on_step,
                device=self._execution_device,
            )

        loops = len(passes) * math.ceil(len(call.given) / call.options.batch_size)
        return self._reported(parts, loops, call.options, callback_on_step_end, callback_on_step_end_tensor_inputs)
