"""Decoding a clip piece by piece: which frames a piece takes, and how the pieces are put together again."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temporal_layers import TemporalTransformerBlock
from temporal_layers.adapters.reach import layers_in, receptive_field, unbounded_layers
from temporal_layers.adapters.registry import MODELS, find
from temporal_layers.adapters.state import TemporalState
from temporal_layers.config import check_at_least

__all__ = ["Chunk", "Chunking", "InPieces", "Joined", "plan_chunks", "rows_of", "sample_of"]

WHO = "TemporalAdapter.enable_temporal_chunking"


class Chunk(NamedTuple):
    """Latent frames of one piece: ``low`` to ``high`` are decoded, ``start`` to ``stop`` are its own."""

    low: int
    start: int
    stop: int
    high: int


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How a clip is cut.

    Args:
        num_frames: frames of a chunk.
        past: frames in front of it that are decoded as well.
        future: frames behind it, likewise.
        blend: frames on each side of a cut over which both chunks are blended; 0 drops what was decoded in addition.
    """

    num_frames: int
    past: int = 0
    future: int = 0
    blend: int = 0

    def chunks(self, num_frames: int) -> list[Chunk]:
        """Cut a clip of ``num_frames`` frames; the last chunk may be shorter."""
        cuts = range(0, num_frames, self.num_frames)
        ends = [*cuts[1:], num_frames]
        return [
            Chunk(max(0, start - self.past), start, stop, min(num_frames, stop + self.future))
            for start, stop in zip(cuts, ends, strict=True)
        ]


def plan_chunks(model: nn.Module, state: TemporalState, num_frames: int, overlap: int | None) -> Chunking:
    """Find the chunking that :meth:`~temporal_layers.adapters.TemporalAdapter.enable_temporal_chunking` asks for.

    Raises:
        ValueError: as there.
    """
    root = find(MODELS, type(model))
    if root is None or root.family != "autoencoder" or root.part is None:
        raise ValueError(
            f"{WHO}: expected an autoencoder whose registration names the part with the layers, got "
            f"{type(model).__name__}; UNets take a clip as a whole"
        )
    check_at_least(f"{WHO}: num_frames", num_frames, 1)
    if overlap is not None:
        check_at_least(f"{WHO}: overlap", overlap, 0)
    layers = list(layers_in(model, state.sites))
    _check_alpha(layers)
    field, obstacle = receptive_field(model, state.sites), _obstacle(model, state, layers)
    if obstacle is None and (overlap is None or overlap >= max(field)):
        return Chunking(num_frames=num_frames, past=field[0], future=field[1])
    if overlap is None:
        raise ValueError(
            f"{WHO}: overlap: expected a number of frames, got None, which is for chunks that give the decoding of the "
            f"whole clip; here none do, because of {obstacle}; pass an overlap for approximate chunks, or inject "
            "layers that see a few frames only"
        )
    if num_frames < 2 * overlap:
        raise ValueError(
            f"{WHO}: overlap: expected at most half of num_frames={num_frames}, so that no frame is in three chunks, "
            f"got {overlap}; take longer chunks or a smaller overlap"
        )
    return Chunking(num_frames=num_frames, past=overlap, future=overlap, blend=overlap)


def _check_alpha(layers: list[tuple[str, nn.Module]]) -> None:
    for name, layer in layers:
        blend = getattr(layer, "blend", None)
        if blend is not None and blend.config.shape == "frame":
            raise ValueError(
                f"{WHO}: {name}: expected an alpha for clips of any length, got one per frame of "
                f"{blend.config.num_frames} frames; decode the clip as a whole, or use shape='scalar'"
            )


def _obstacle(model: nn.Module, state: TemporalState, layers: list[tuple[str, nn.Module]]) -> str | None:
    """What keeps chunks from giving what the whole clip gives, or ``None``."""
    for name, reason in unbounded_layers(model, state.sites).items():
        return f"{name}: {reason}"
    for name, layer in layers:
        if isinstance(layer, TemporalTransformerBlock) and layer.config.position.startswith("sinusoidal"):
            position = layer.config.position
            return f"{name}: positions counted from the start of what it is given (position={position!r})"
    return None


class InPieces(nn.Module):
    """Stands in for the decoder while a model decodes, and runs it on one piece of one clip after the other.

    Below the model's own ``decode``, so that what is made once for all frames (the noise of a consistency decoder, the
    loss of a quantiser) is made once, and tiles are cut outside of chunks.

    Args:
        part: the decoder.
        state: the model's state.
        num_frames: frames of a clip.
        chunking: how to cut it; ``None`` to take it as a whole.
    """

    def __init__(self, part: nn.Module, state: TemporalState, num_frames: int, chunking: Chunking | None) -> None:
        super().__init__()
        self.part, self.state, self.num_frames = part, state, num_frames
        if chunking is None:
            chunking = Chunking(num_frames=num_frames)
        elif not state.active:  # frames do not see each other
            chunking = Chunking(num_frames=chunking.num_frames)
        self.chunking = chunking

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the decoder returns for all frames, which come folded into the batch of the first argument."""
        total = len(args[0])
        joined, chunks = None, self.chunking.chunks(self.num_frames)
        for first in range(0, total, self.num_frames):
            tail = None  # what the chunk before decoded of the frames around the cut
            for chunk in chunks:
                output = self._run(slice(first + chunk.low, first + chunk.high), total, args, kwargs)
                joined = joined or Joined(output, total)
                tail = self._append(joined, chunk, sample_of(output), tail)
                del output  # not to be kept while the next piece is decoded
        return joined.result()

    def _run(self, rows: slice, total: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        frames = rows.stop - rows.start if self.state.active else None
        with self.state.during(frames, None):
            return self.part(*rows_of(args, rows, total), **rows_of(kwargs, rows, total))

    def _append(self, joined: "Joined", chunk: Chunk, piece: Tensor, tail: Tensor | None) -> Tensor | None:
        """Add the frames of a chunk that are final, and return those around the next cut."""
        blend, done = self.chunking.blend, chunk.start
        if tail is not None:
            done = chunk.low + len(tail)
            weight = torch.arange(1, len(tail) + 1, device=piece.device) / (2 * blend + 1)
            weight = weight.to(piece.dtype).reshape(-1, 1, 1, 1)
            # A lerp, not a sum of two products: it keeps what both chunks agree on bit for bit.
            joined.add(tail.lerp(piece[: len(tail)], weight))
        if chunk.stop == self.num_frames:
            joined.add(piece[done - chunk.low : chunk.stop - chunk.low])
            return None
        cut = chunk.stop - blend
        joined.add(piece[done - chunk.low : cut - chunk.low])
        return piece[cut - chunk.low :] if blend else None


def rows_of(value: Any, rows: slice, total: int) -> Any:
    """Some rows of every tensor with ``total`` rows in ``value``, however deep in tuples, lists and dictionaries."""
    if torch.is_tensor(value):
        return value[rows] if value.ndim > 0 and len(value) == total else value
    if isinstance(value, dict):
        return {name: rows_of(item, rows, total) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(rows_of(item, rows, total) for item in value)
    return value


def sample_of(output: Any) -> Tensor:
    """The feature map that a module returned alone, first in a tuple or as ``sample``."""
    if torch.is_tensor(output):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


class Joined:
    """The rows of all pieces, in one tensor that is made at the first: a view would keep its whole piece alive.

    With gradients the graph keeps the pieces anyway, and they are concatenated.
    """

    def __init__(self, output: Any, total: int) -> None:
        sample = sample_of(output)
        self.output = None if torch.is_tensor(output) else output
        self.pieces: list[Tensor] | None = [] if sample.requires_grad else None
        self.frames = None if sample.requires_grad else sample.new_empty((total, *sample.shape[1:]))
        self.at = 0

    def add(self, piece: Tensor) -> None:
        """Append rows."""
        if self.frames is None:
            self.pieces.append(piece)
        else:
            self.frames[self.at : self.at + len(piece)] = piece
        self.at += len(piece)

    def result(self) -> Any:
        """What the module returned, with all rows."""
        frames = torch.cat(self.pieces) if self.frames is None else self.frames
        if self.output is None:
            return frames
        if isinstance(self.output, tuple):
            return (frames, *self.output[1:])
        self.output.sample = frames
        return self.output
