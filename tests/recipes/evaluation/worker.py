"""Evaluates two folders on all processes: `python worker.py GENERATED REAL CACHE RESULT`; each writes its numbers."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig, make_source
from temporal_layers.recipes.evaluation.evaluate import Options, evaluate
from temporal_layers.recipes.evaluation.networks import FeatureNetwork, NetworkConfig
from temporal_layers.recipes.evaluation.presets import Measure, Preset

CLIPS = NetworkConfig(kind="torchscript", name="clips")
FRAMES = NetworkConfig(kind="torchscript", name="frames", reads="frames")
PRESET = Preset(
    about="",
    measures=(
        Measure(kind="frechet", network=CLIPS),
        Measure(kind="kernel", network=CLIPS),
        Measure(kind="kernel", network=FRAMES),
        Measure(kind="consistency", network=FRAMES),
        Measure(kind="warp_error"),
    ),
    samples=13,
    num_frames=4,
)
NETWORKS = {
    CLIPS: FeatureNetwork(name="clips", digest="none", module=lambda x: x.double().mean((3, 4)).flatten(1)[:, ::3]),
    FRAMES: FeatureNetwork(name="frames", digest="none", module=lambda x: x.double().mean((2, 3)), reads="frames"),
}


def run(generated, real, cache=None):
    sources = (make_source(DataConfig(path=str(folder), caption="")) for folder in (generated, real))
    options = Options(batch_size=2, loader=LoaderConfig(workers=0), networks=NETWORKS, cache=cache)
    return json.loads(json.dumps(evaluate(*sources, PRESET, options=options).as_dict()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    *folders, cache, result = map(Path, sys.argv[1:])
    found = [run(*folders, cache) for _ in range(2)]  # the second time real statistics are from the cache
    Path(f"{result}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
