"""The network that comes with the package: small, blind to length of still clips, and in order under corruption."""

import pytest
import torch
import torch.nn.functional as F

from temporal_layers import fold_frames
from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.evaluation.distances import frechet, kernel_distance
from temporal_layers.recipes.evaluation.driving_network import (
    SHIPPED_FEATURES,
    build_driving_network,
    load_driving_network,
)
from temporal_layers.recipes.evaluation.features_stage import measure_network, render_labelled
from temporal_layers.recipes.evaluation.moments import Moments
from temporal_layers.recipes.evaluation.networks import NetworkConfig, load_network
from temporal_layers.recipes.stages.clips import DRIVING_FPS
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.stages.image_objectives import as_float

CLIPS, FRAMES = 66, 8


@pytest.fixture(scope="module")
def labelled():
    corpus = DrivingCorpus(DrivingConfig(fps=DRIVING_FPS))
    return render_labelled(corpus, 2 * CLIPS, FRAMES, first=HELD_OUT + 5000)


@pytest.fixture(scope="module")
def held_out(labelled):
    """Two sets of other clips."""
    return as_float(labelled.frames).split(CLIPS)


@pytest.fixture(scope="module")
def features():
    network = load_network(NetworkConfig())
    return lambda clips: torch.cat([network(part) for part in clips.split(12)])


def noisy(clips, strength):
    return (clips + strength * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def blurred(clips, side):
    """Averaged over squares of ``side`` pixels, and enlarged again."""
    frames = F.avg_pool2d(fold_frames(clips), side)
    frames = F.interpolate(frames, size=clips.shape[3:], mode="bilinear")
    return frames.unflatten(0, (len(clips), clips.shape[2])).transpose(1, 2)


def shuffled(clips, share):
    """A share of the frames in another order."""
    count = round(share * clips.shape[2])
    generator = torch.Generator().manual_seed(0)
    made = clips.clone()
    for index in range(len(clips)):
        chosen = torch.randperm(clips.shape[2], generator=generator)[:count]
        made[index, :, chosen.sort().values] = clips[index, :, chosen]
    return made


def frozen(clips, share):
    """Still from the frame on with which the last share of a clip begins."""
    count = round((1 - share) * clips.shape[2])
    order = torch.arange(clips.shape[2]).clamp_max(max(count - 1, 0))
    return clips[:, :, order]


def spliced(clips, share):
    """A share of the frames of each clip from another clip."""
    count = round(share * clips.shape[2])
    return torch.cat([clips[:, :, : clips.shape[2] - count], clips.roll(1, 0)[:, :, clips.shape[2] - count :]], dim=2)


@pytest.mark.parametrize(
    ("corrupt", "levels"),
    [
        (noisy, (0.05, 0.1, 0.2)),
        (blurred, (4, 8)),
        (shuffled, (0.25, 0.5, 1.0)),
        (frozen, (0.25, 0.5, 1.0)),
        (spliced, (0.25, 0.5)),
    ],
)
def test_distances_grow_with_corruption(held_out, features, corrupt, levels):
    others, real = held_out
    rows = features(real)
    found = [features(clips) for clips in (others, *(corrupt(others, level) for level in levels))]
    distances = [frechet(Moments.of(made), Moments.of(rows)).value for made in found]
    assert distances == sorted(distances), distances
    assert distances[-1] > 2 * distances[0]
    kernel = [kernel_distance(made, rows).value for made in found]
    assert kernel == sorted(kernel), kernel


def test_it_tells_what_it_was_trained_to_tell(labelled):
    found = measure_network(load_driving_network(), labelled)
    assert found["label accuracy"] > 0.9 and found["order accuracy"] > 0.9
    assert found["speed explained"] > 0.8 and found["curvature explained"] > 0.6
    assert found["noise explained"] > 0.7


def test_a_still_clip_has_the_features_of_its_frame():
    network = build_driving_network(len(LABELS), (64, 96), seed=3).eval()
    frame = torch.rand(2, 3, 1, 64, 96)
    with torch.no_grad():
        expected = network(frame)
        for length in (2, 7, 16):
            torch.testing.assert_close(network(frame.expand(2, 3, length, 64, 96)), expected, rtol=1e-4, atol=1e-5)


def test_it_is_small():
    assert sum(path.stat().st_size for path in SHIPPED_FEATURES.rglob("*.safetensors")) < 2**20


def test_outputs_of_the_ready_made_network():
    clips = torch.rand(2, 3, 4, 32, 48)
    assert load_network(NetworkConfig())(clips).shape == (2, 64)
    assert load_network(NetworkConfig(output="logits"))(clips).shape == (2, len(LABELS))
    frames = load_network(NetworkConfig(reads="frames"))(clips)
    assert frames.shape == (8, 64)
    still = load_network(NetworkConfig())(clips[:, :, :1])
    torch.testing.assert_close(frames[::4], still)
