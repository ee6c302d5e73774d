"""What all pipelines share: models with temporal layers among their components, in files as well, and the loop."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from huggingface_hub import snapshot_download
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.adapters import TemporalAdapter, adapter_of
from temporal_layers.adapters.files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from temporal_layers.adapters.weights import AdapterWeights
from temporal_layers.recipes.sampling.loop import OnStep, denoise
from temporal_layers.recipes.sampling.regions import Denoiser
from temporal_layers.recipes.sampling.sampler import Generators, Sampler
from temporal_layers.recipes.stages.personal import image_model, is_injected

OnStepEnd = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
"""Called as ``callback(pipeline, step, timestep, {"latents": ...})``; may return a dictionary with other latents."""

AdapterSource = str | PathLike | AdapterWeights
"""A folder or hub repository that an adapter was saved to, or ``adapter.snapshot()``."""

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class InjectedPipeline(DiffusionPipeline):
    """A pipeline some of whose components have temporal layers in them.

    Such a component is saved as the image model that it was, which diffusers' own classes load, and its temporal
    layers beside it as an adapter, which ``TemporalAdapter.from_pretrained`` loads; `from_pretrained` puts the two
    together again.

    Attributes:
        adapter_folders: Components that may have temporal layers, and the folder that these are saved in.
    """

    adapter_folders: ClassVar[dict[str, str]] = {"unet": "temporal_adapter", "vae": "temporal_decoder"}
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _interrupt = False
    _num_timesteps = 0

    def adapters(self) -> dict[str, TemporalAdapter]:
        """The temporal layers that are there, by the name of their component."""
        components = {name: getattr(self, name, None) for name in self.adapter_folders}
        return {
            name: adapter_of(model) for name, model in components.items() if model is not None and is_injected(model)
        }

    @property
    def num_timesteps(self) -> int:
        """Steps of the run that is under way or over, of all its loops."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run ends after this step; callbacks set ``_interrupt``."""
        return self._interrupt

    def save_pretrained(self, save_directory: str | PathLike, **options: Any) -> None:
        """Write the image components as diffusers does, and the temporal layers beside them.

        Args:
            save_directory: Made if needed.
            **options: Of ``DiffusionPipeline.save_pretrained``.

        Raises:
            ValueError: If a component has a LoRA on it, with which its file would be that of no model.
        """
        self._check_no_lora()
        images = copy.copy(self)
        for name, adapter in self.adapters().items():
            adapter.save_pretrained(Path(save_directory) / self.adapter_folders[name])
            setattr(images, name, image_model(getattr(self, name)))
        super(InjectedPipeline, images).save_pretrained(str(save_directory), **options)
        for name in self.adapter_folders.keys() - self.adapters().keys():
            _forget(Path(save_directory) / self.adapter_folders[name])

    def _check_no_lora(self) -> None:
        for name, part in self.components.items():
            # PEFT's wrappers of layers change the names of the weights; diffusers would load others at random.
            if isinstance(part, nn.Module) and any(hasattr(module, "base_layer") for module in part.modules()):
                raise ValueError(
                    f"{type(self).__name__}.save_pretrained: {name}: expected the image model's own layers, got a LoRA "
                    "on them; call unload_lora_weights() first, or fuse_lora() before that to keep its effect"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **options: Any) -> InjectedPipeline:
        """Load what `save_pretrained` wrote, or an image pipeline with the same components, which has no adapters.

        Args:
            pretrained_model_name_or_path: Folder, or repository of the Hugging Face hub.
            **options: Of ``DiffusionPipeline.from_pretrained``. A component that is passed with temporal layers in it
                keeps these.
        """
        source = pretrained_model_name_or_path
        pipeline = super().from_pretrained(source, **options)
        folder = Path(source) if Path(source).is_dir() else _download(str(source), cls.adapter_folders, options)
        for name, inside in cls.adapter_folders.items():
            model = getattr(pipeline, name, None)
            if model is not None and not is_injected(model) and (folder / inside).is_dir():
                TemporalAdapter.from_pretrained(model, folder / inside)
        return pipeline

    def denoise(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        start: Float[Tensor, "b c f h w"],
        generator: Generators = None,
        *,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Float[Tensor, "b c f h w"]:
        """The loop from noisy clips to clean ones, with a progress bar and callbacks; ends early if interrupted.

        Args:
            denoiser: What the model says.
            sampler: The steps.
            start: Of ``sampler.start``.
            generator: Of fresh noise, where the scheduler draws any.
            callback_on_step_end: Called after each step.
            callback_on_step_end_tensor_inputs: What it gets: ``latents``, or nothing.

        Raises:
            ValueError: If a callback asks for another tensor.
        """
        with self.reporting(
            len(sampler.timesteps), callback_on_step_end, callback_on_step_end_tensor_inputs
        ) as on_step:
            return denoise(denoiser, sampler, start, generator, on_step=on_step, stop=lambda: self._interrupt)

    @contextmanager
    def reporting(
        self,
        total: int,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Iterator[OnStep]:
        """One progress bar, and callbacks that count on, over the steps of one loop or of several.

        Args:
            total: Steps of all loops.
            callback_on_step_end: Called after each step.
            callback_on_step_end_tensor_inputs: What it gets: ``latents``, or nothing.

        Yields:
            What the loops are to call after each step.

        Raises:
            ValueError: If a callback asks for another tensor.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: callback_on_step_end_tensor_inputs: expected some of "
                f"{self._callback_tensor_inputs}, got {unknown}; leave these out"
            )
        self._interrupt, self._num_timesteps, steps = False, total, itertools.count()
        with self.progress_bar(total=total) as progress:

            def on_step(_: int, timestep: Tensor, latents: Tensor) -> Tensor:
                progress.update()
                if callback_on_step_end is None:
                    return latents
                told = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                return (callback_on_step_end(self, next(steps), timestep, told) or {}).get("latents", latents)

            yield on_step


def _forget(folder: Path) -> None:
    """Take away the adapter that an earlier save left in ``folder``."""
    for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def put_layers(who: str, parts: dict[str, Any], adapter: AdapterSource | None, decoder: AdapterSource | None) -> None:
    """Put adapters into the UNet and the autoencoder among the components of a pipeline.

    Args:
        who: Name of the pipeline.
        parts: Components by name.
        adapter: For ``unet``; None if its layers are there.
        decoder: For ``vae``; None for the layers that are there, or none.

    Raises:
        ValueError: If an adapter does not fit, or the UNet is left without temporal layers.
    """
    for name, source in (("unet", adapter), ("vae", decoder)):
        if source is not None:
            TemporalAdapter.from_pretrained(parts[name], source)
    if not is_injected(parts["unet"]):
        raise ValueError(
            f"{who}.from_image_pipeline: expected an adapter, or a UNet with temporal layers, got neither; pass "
            "adapter=..., or inject layers to be trained first"
        )


def _download(repository: str, folders: dict[str, str], options: dict[str, Any]) -> Path:
    """The temporal layers of a repository of the hub, where diffusers' own download leaves them out."""
    known = {name: options[name] for name in DOWNLOAD_OPTIONS if name in options}
    return Path(snapshot_download(repository, allow_patterns=[f"{inside}/*" for inside in folders.values()], **known))
