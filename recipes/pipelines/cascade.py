"""The whole Video LDM: key frames, interpolation twice, decoding, upscaling (figure 5 and section 4)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from temporal_layers.recipes.conditioning import FACTOR
from temporal_layers.recipes.pipelines.injected import InjectedPipeline
from temporal_layers.recipes.pipelines.interpolation import LEVELS, VideoInterpolationPipeline
from temporal_layers.recipes.pipelines.outputs import Frames, VideoOutput, check_output_type, frames_of
from temporal_layers.recipes.pipelines.prediction import VideoPredictionPipeline
from temporal_layers.recipes.pipelines.prompts import Prompts
from temporal_layers.recipes.pipelines.upscaling import VideoUpscalePipeline
from temporal_layers.recipes.pipelines.video_ldm import VideoLDMPipeline
from temporal_layers.recipes.sampling.sampler import Generators

_WHO = "VideoCascade"
STAGES = ("key frames", "interpolation", "decoding", "upscaling")
KEY_FRAME_RATE = 1.875
"""Key frames a second in the paper; interpolated twice, 30."""


@dataclass
class CascadeOutput(VideoOutput):
    """What the cascade made.

    Attributes:
        fps: Frames per second of ``frames``.
        stages: What the stages that were to be kept made, by their name: latents ``(clips, channels, frames, height,
            width)`` of key frames and interpolation, frames ``(clips, 3, frames, height, width)`` in [0, 1] of the
            others.
    """

    fps: float = 0.0
    stages: dict[str, Tensor] = field(default_factory=dict)


OnStage = Callable[[str, Tensor, float], None]
"""Called with the name of a stage, what it made (as in `CascadeOutput`) and its rate, as soon as it is done."""


class VideoCascade:
    """A pipeline for each stage, which run one after the other.

    Args:
        key_frames: Makes the key frames. A `VideoPredictionPipeline` goes on beyond the frames of its training;
            `VideoLDMPipeline` works in one piece.
        interpolation: Makes three frames between two, at one rate or two; None leaves the key frames as they are. Of
            these two the last one decodes, through the temporal layers of its autoencoder if there are any: those are
            for the rate that its frames have.
        upscaling: Makes frames larger; None leaves them as they are.
        fps: Key frames per second.

    Example:
        >>> cascade = VideoCascade.from_pretrained("my-cascade").to("cuda")  # doctest: +SKIP
        >>> clip = cascade("a road at night", num_key_frames=8).frames[0]  # 113 frames  # doctest: +SKIP
    """

    parts: ClassVar[dict[str, tuple[type, ...]]] = {
        "key_frames": (VideoPredictionPipeline, VideoLDMPipeline),
        "interpolation": (VideoInterpolationPipeline,),
        "upscaling": (VideoUpscalePipeline,),
    }

    def __init__(
        self,
        key_frames: VideoPredictionPipeline | VideoLDMPipeline,
        interpolation: VideoInterpolationPipeline | None = None,
        upscaling: VideoUpscalePipeline | None = None,
        *,
        fps: float = KEY_FRAME_RATE,
    ) -> None:
        self.key_frames, self.interpolation, self.upscaling, self.fps = key_frames, interpolation, upscaling, fps
        for name, kinds in self.parts.items():
            part = getattr(self, name)
            if not isinstance(part, kinds) and not (part is None and name != "key_frames"):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{_WHO}: {name}: expected a {wanted}, got {type(part).__name__}")
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> VideoCascade:
        """Run on a device. Each stage moves there when its turn comes, and back when it is done."""
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts = None,
        image: Frames | None = None,
        *,
        num_key_frames: int = 8,
        levels: int = LEVELS,
        generator: Generators = None,
        key_frames: Mapping[str, Any] | None = None,
        interpolation: Mapping[str, Any] | None = None,
        upscaling: Mapping[str, Any] | None = None,
        decode_chunk_size: int | None = None,
        keep: Collection[str] = (),
        on_stage: OnStage | None = None,
        progress: bool = True,
        output_type: str = "pil",
    ) -> CascadeOutput:
        """Make clips of ``4 ** levels * (num_key_frames - 1) + 1`` frames.

        Args:
            prompt: What they are to show; see `VideoLDMPipeline`.
            image: First key frames; see there.
            num_key_frames: Eight become 29 and then 113 frames.
            levels: How many times three frames are made between two; 0 for none.
            generator: Of all noise, in the order of the stages: one for all clips, or one a clip.
            key_frames: Further arguments of the call of that pipeline.
            interpolation: Likewise.
            upscaling: Likewise.
            decode_chunk_size: Frames that are decoded at a time.
            keep: Stages, of `STAGES`, whose results are returned too.
            on_stage: Called as soon as a stage is done, to write its result for instance.
            progress: Show one progress bar over all stages.
            output_type: ``pil``, ``np`` or ``pt``; see `VideoOutput`.

        Raises:
            ValueError: If arguments do not fit each other, or a stage refuses what it is told; if a stage is missing.
        """
        check_output_type(_WHO, output_type)
        self._check(output_type, levels, num_key_frames, keep)
        decoder = self.interpolation if self._takes_part("interpolation", levels) else self.key_frames
        decoder.check_decoding(decode_chunk_size)
        done: dict[str, Tensor] = {}
        run = _Run(self, progress, [name for name in STAGES if self._takes_part(name, levels)])
        with run:
            latents, rate = self._made_key_frames(run, prompt, image, num_key_frames, generator, key_frames), self.fps
            _finish(done, "key frames", latents, rate, keep, on_stage)
            if self._takes_part("interpolation", levels):
                words = {"frames_latents": latents, "levels": levels, "generator": generator, "output_type": "latent"}
                latents = run("interpolation", self.interpolation, prompt=prompt, **{**words, **(interpolation or {})})
                rate = rate * FACTOR**levels
                _finish(done, "interpolation", latents, rate, keep, on_stage)
            with run.stage("decoding", decoder):
                clips = decoder.decode_clips(latents.to(self.device), decode_chunk_size=decode_chunk_size).cpu()
            del latents
            _finish(done, "decoding", clips, rate, keep, on_stage)
            if self.upscaling is not None:
                clips = self._upscaled(run, clips, prompt, generator, upscaling)
                _finish(done, "upscaling", clips, rate, keep, on_stage)
        return CascadeOutput(frames=frames_of(clips, output_type), fps=rate, stages=done)

    def _made_key_frames(
        self, run: _Run, prompt: Prompts, image: Any, count: int, generator: Generators, options: Any
    ) -> Tensor:
        given = {} if image is None else {"image": image}
        words = {"num_frames": count, "generator": generator, "output_type": "latent", **given, **(options or {})}
        return run("key frames", self.key_frames, prompt=prompt, **words)

    def _upscaled(self, run: _Run, clips: Tensor, prompt: Prompts, generator: Generators, options: Any) -> Tensor:
        told = {}
        if self.upscaling.text_encoder is not None:
            told = {"prompt": [_text(each) for each in prompt] if isinstance(prompt, list) else _text(prompt)}
        frames = clips.transpose(1, 2)
        words = {"generator": generator, "output_type": "pt", **told, **(options or {})}
        return run("upscaling", self.upscaling, video=frames, **words).transpose(1, 2).cpu()

    def _takes_part(self, stage: str, levels: int) -> bool:
        if stage == "interpolation":
            return levels > 0
        return stage != "upscaling" or self.upscaling is not None

    def _check(self, output_type: str, levels: int, num_key_frames: int, keep: Collection[str]) -> None:
        if output_type == "latent":
            raise ValueError(
                f"{_WHO}: output_type: expected 'pil', 'np' or 'pt', got 'latent'; latents are what "
                "keep=('interpolation',) returns"
            )
        if not 0 <= levels <= LEVELS or num_key_frames < 1 or (levels and num_key_frames < 2):
            raise ValueError(
                f"{_WHO}: expected levels from 0 to {LEVELS} and num_key_frames of at least 1, or 2 to interpolate "
                f"between, got levels={levels} and num_key_frames={num_key_frames}"
            )
        if levels and self.interpolation is None:
            raise ValueError(
                f"{_WHO}: levels: expected 0 without an interpolation pipeline, got {levels}; pass interpolation=..., "
                "trained by `temporal-layers train interpolate`"
            )
        if unknown := sorted(set(keep) - set(STAGES)):
            raise ValueError(f"{_WHO}: keep: expected some of {', '.join(STAGES)}, got {', '.join(unknown)}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write each pipeline to a folder of its own: ``key_frames``, ``interpolation``, ``upscaling``."""
        for name in self.parts:
            if getattr(self, name) is not None:
                getattr(self, name).save_pretrained(Path(folder) / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, fps: float = KEY_FRAME_RATE, **options: Any) -> VideoCascade:
        """Load what `save_pretrained` wrote.

        Args:
            folder: With ``key_frames``, and perhaps ``interpolation`` and ``upscaling``.
            fps: Key frames per second.
            **options: Of each pipeline's ``from_pretrained``.

        Raises:
            ValueError: If there are no key frames.
        """
        folder, found = Path(folder), {}
        for name, kinds in cls.parts.items():
            index = folder / name / "model_index.json"
            if index.is_file():
                kind = next((kind for kind in kinds if f'"{kind.__name__}"' in index.read_text()), kinds[0])
                found[name] = kind.from_pretrained(folder / name, **options)
        if "key_frames" not in found:
            raise ValueError(
                f"{_WHO}.from_pretrained: expected a folder with key_frames/model_index.json, got {folder}; write one "
                f"with {_WHO}.save_pretrained"
            )
        return cls(**found, fps=fps)


class _Run:
    """One run of a cascade: the bar over all stages, and the device that they take turns on."""

    def __init__(self, cascade: VideoCascade, shown: bool, stages: list[str]) -> None:
        self.cascade = cascade
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
        self.progress = Progress(*columns, TimeElapsedColumn(), disable=not shown)
        self.task = self.progress.add_task(stages[0], total=len(stages))
        self.stages, self.done = stages, 0

    def __enter__(self) -> _Run:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, stage: str, pipeline: InjectedPipeline, **words: Any) -> Tensor:
        """Call the pipeline of a stage."""
        with self.stage(stage, pipeline):
            theirs = words.pop("callback_on_step_end", None)

            def on_step_end(
                part: InjectedPipeline, step: int, timestep: Tensor, told: dict[str, Any]
            ) -> dict[str, Any]:
                share = (step + 1) / max(part.num_timesteps, 1)
                self.progress.update(self.task, completed=self.done + min(share, 1.0))
                return {} if theirs is None else theirs(part, step, timestep, told) or {}

            words = {name: value for name, value in words.items() if value is not None}
            return pipeline(callback_on_step_end=on_step_end, **words).frames

    @contextmanager
    def stage(self, name: str, pipeline: InjectedPipeline) -> Iterator[None]:
        """Have the models of a stage on the device, its own bar hidden, and give their memory back afterwards."""
        device, before = self.cascade.device, getattr(pipeline, "_progress_bar_config", {})
        self.progress.update(self.task, description=name)
        pipeline.set_progress_bar_config(**{**before, "disable": True})
        pipeline.to(device)
        try:
            yield
        finally:
            pipeline.set_progress_bar_config(**before)
            if device.type != "cpu":
                pipeline.to("cpu")
                gc.collect()
                torch.get_device_module(device).empty_cache()
        self.done += 1
        self.progress.update(self.task, completed=self.done)


def _finish(
    done: dict[str, Tensor], stage: str, result: Tensor, rate: float, keep: Collection[str], on_stage: OnStage | None
) -> None:
    if on_stage is not None:
        on_stage(stage, result, rate)
    if stage in keep:
        done[stage] = result.cpu()


def _text(prompt: Any) -> str | None:
    """The text of a clip for a stage that takes one: the first of those that it changes between."""
    return prompt[min(prompt)] if isinstance(prompt, Mapping) else prompt
