"""Look at every video of a source once: its size, rate and length, or why it cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from temporal_layers.recipes.data.decoding import DecoderName, Window, make_decoder
from temporal_layers.recipes.data.items import Reference, VideoFile
from temporal_layers.recipes.data.opening import VideoInfo
from temporal_layers.recipes.data.sources import Source


@dataclass(frozen=True)
class Probe:
    """What is known of a video.

    Attributes:
        info: Size, rate and length; None if it cannot be read.
        fault: Why not; otherwise empty.
    """

    info: VideoInfo | None
    fault: str = ""


def probe_all(
    source: Source,
    *,
    decoder: DecoderName = "pyav",
    workers: int = 0,
    thorough: bool = False,
    store: str | Path | None = None,
) -> Iterator[Probe]:
    """Probe every item, in order.

    Args:
        source: To be probed.
        decoder: See ``make_decoder``.
        workers: Processes; 0 for this one.
        thorough: Decode every frame, not only the first.
        store: File in which results are kept, and looked up while a video's size and time stay the same.

    Yields:
        One probe an item.
    """
    known = {} if store is None else _load(Path(store))
    stamps = [_stamp(source[index].file, thorough) if store is not None else "" for index in range(len(source))]
    missing = [index for index, stamp in enumerate(stamps) if stamp not in known]
    dataset = _Probing(source, decoder, thorough)
    loader = iter(DataLoader(dataset, sampler=missing, batch_size=8, collate_fn=list, num_workers=workers))
    fresh = (probe for batch in loader for probe in batch)
    unknown = set(missing)
    if store is not None:
        Path(store).parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if store is None else open(store, "a", encoding="utf-8") as stream:
        for index, stamp in enumerate(stamps):
            if index not in unknown:
                yield known[stamp]
                continue
            probe = next(fresh)
            if stream is not None and stamp:
                print(json.dumps({"stamp": stamp, **asdict(probe)}), file=stream)
            yield probe


class _Probing(Dataset):
    def __init__(self, source: Source, decoder: DecoderName, thorough: bool) -> None:
        self.source, self.decoder, self.thorough = source, make_decoder(decoder), thorough

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Probe:
        file = self.source[index].file
        try:
            info = self.decoder.probe(file)
            if self.thorough:
                self.decoder.window(file, Window(num_frames=None, size=(8, 8)))
        except ValueError as error:
            return Probe(None, str(error))
        return Probe(info)


def _stamp(file: Reference, thorough: bool) -> str:
    """Changes whenever the probe of a file may change; empty for what is not worth storing."""
    if not isinstance(file, VideoFile):
        return ""
    try:
        status = os.stat(file.path)
    except OSError:
        return ""
    facts = (file, status.st_size, status.st_mtime_ns, thorough)
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def _load(store: Path) -> dict[str, Probe]:
    known: dict[str, Probe] = {}
    if not store.is_file():
        return known
    for line in store.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            info = row["info"] and VideoInfo(**row["info"])
            known[row["stamp"]] = Probe(info, row["fault"])
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off when a run was stopped; its video is probed again
    return known
