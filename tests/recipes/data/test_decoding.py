"""Windows of videos: the frames that a plain decode gives, wherever the video lies and whoever decodes it."""

import io
import sys
import tarfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from temporal_layers.recipes.data import opening
from temporal_layers.recipes.data.decoding import PyAvDecoder, TorchCodecDecoder, Window, covering, make_decoder
from temporal_layers.recipes.data.items import DrivingFile, VideoFile
from temporal_layers.recipes.data.shards import scan
from temporal_layers.recipes.data.video_io import bunny_path, write_video
from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus

BUNNY = (54, 96)


def indices(frames):
    """Which frames of the counted video these are."""
    return (frames.float().mean((0, 2, 3)) / 255 * 40).round().int().tolist()


@pytest.fixture(scope="module")
def plain():
    """All frames of the packaged clip by nothing but PyAV: uint8 (3, 66, 54, 96)."""
    with av.open(str(bunny_path())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


@pytest.mark.parametrize("start", [0, 1, 17, 40, 58])
def test_a_window_is_what_a_plain_decode_from_the_beginning_gives(plain, start):
    window = Window(num_frames=8, size=BUNNY, start=start / 12.5)
    frames, fps = PyAvDecoder().window(bunny_path(), window)
    assert frames.dtype == torch.uint8 and frames.is_contiguous() and fps == 12.5
    assert torch.equal(frames, plain[:, start : start + 8])


def test_stride_and_rate_take_every_second_frame(plain):
    by_stride, rate = PyAvDecoder().window(bunny_path(), Window(num_frames=9, size=BUNNY, stride=2, start=0.8))
    by_fps, fps = PyAvDecoder().window(bunny_path(), Window(num_frames=9, size=BUNNY, fps=6.25, start=0.8))
    assert rate == fps == 6.25
    assert torch.equal(by_stride, plain[:, 10:28:2]) and torch.equal(by_fps, by_stride)


def test_path_bytes_and_a_stretch_of_an_archive_give_the_same(plain, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(bunny_path(), "zero.mp4")
        archive.add(bunny_path(), "one.mp4")
    sample = scan(str(tmp_path / "a.tar"))[1]
    stretch = VideoFile(str(tmp_path / "a.tar"), sample.offset, sample.size, "one.mp4")
    window = Window(num_frames=4, size=BUNNY, start=2.0)
    for file in (bunny_path(), bunny_path().read_bytes(), stretch):
        assert torch.equal(PyAvDecoder().window(file, window)[0], plain[:, 25:29])
        assert PyAvDecoder().probe(file) == PyAvDecoder().probe(bunny_path())


def test_a_share_places_the_window_between_the_first_and_the_last_frame(counted_video):
    taken = [
        indices(PyAvDecoder().window(counted_video, Window(num_frames=5, size=(32, 48), share=share, **rate))[0])
        for share in (0.0, 0.5, 1.0)
        for rate in ({}, {"fps": 5.0}, {"stride": 2})
    ]
    assert taken[0] == [0, 1, 2, 3, 4] and taken[1] == taken[2] == [0, 2, 4, 6, 8]
    assert taken[3] == [18, 19, 20, 21, 22] and taken[4] == taken[5] == [16, 18, 20, 22, 24]
    assert taken[6] == [36, 37, 38, 39, 40] and taken[7] == taken[8] == [32, 34, 36, 38, 40]


def test_seeking_decodes_from_the_key_frame_before_the_window(tmp_path, monkeypatch):
    path = tmp_path / "keys.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "bf": "0", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for value in range(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 4 * value, np.uint8))))
        container.mux(stream.encode())
    seen = []

    def counting(container, stream):
        for frame in av.container.InputContainer.decode(container, stream):
            seen.append(frame.pts)
            yield frame

    class Counting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def decode(self, stream):
            return counting(self.container, stream)

    real = av.open
    monkeypatch.setattr(opening.av, "open", lambda *arguments: Counting(real(*arguments)))
    frames, _ = PyAvDecoder().window(path, Window(num_frames=3, size=(32, 32), start=4.5))
    assert [round(value / 4) for value in frames.float().mean((0, 2, 3)).tolist()] == [45, 46, 47]
    assert len(seen) == 8  # key frame 40 to frame 47


def halves(tmp_path, height, width, vertical):
    """A video whose left (or upper) half is dark and whose other half is bright."""
    frames = torch.full((3, 6, height, width), 0.1)
    if vertical:
        frames[:, :, height // 2 :] = 0.9
    else:
        frames[:, :, :, width // 2 :] = 0.9
    return write_video(tmp_path / "halves.mp4", frames, 10)


@pytest.mark.parametrize("vertical", [False, True])
def test_crop_chooses_the_part_that_is_kept(tmp_path, vertical):
    path = halves(tmp_path, *((64, 32) if vertical else (32, 64)), vertical)
    sides = [
        PyAvDecoder().window(path, Window(num_frames=2, size=(16, 16), crop=(place, place)))[0].float().mean() / 255
        for place in (0.0, 0.5, 1.0)
    ]
    assert sides[0] < 0.15 and 0.4 < sides[1] < 0.6 and sides[2] > 0.85


def test_scaling_keeps_what_a_picture_shows(plain):
    frames, _ = PyAvDecoder().window(bunny_path(), Window(num_frames=4, size=(27, 40), start=1.6, crop=(0.5, 0.0)))
    box = (0, 0, 40 * 2, 54)
    for index in range(4):
        picture = Image.fromarray(plain[:, 20 + index].permute(1, 2, 0).numpy())
        expected = np.asarray(picture.resize((40, 27), Image.Resampling.BICUBIC, box=box)).astype(float)
        error = np.abs(frames[:, index].permute(1, 2, 0).numpy() - expected)
        # Two bicubic filters: swscale's works on the half-resolution colours before they are converted.
        assert error.mean() < 3


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((54, 96), (27, 40), (27, 48)), ((54, 96), (54, 96), (54, 96)), ((90, 50), (32, 48), (86, 48))],
)
def test_covering_is_the_smallest_size_with_the_same_proportions(shape, size, expected):
    assert covering(shape, size) == expected


def test_a_rotated_video_is_shown_upright(tmp_path):
    path = halves(tmp_path, 32, 64, False)
    turned = tmp_path / "turned.mp4"
    with av.open(str(path)) as source, av.open(str(turned), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with opening.open_video(turned) as video:
        assert next(iter(video.frames(0.0)))[2].rotation % 180 == 90
    info = PyAvDecoder().probe(turned)
    assert (info.height, info.width) == (64, 32)
    frames, _ = PyAvDecoder().window(turned, Window(num_frames=2, size=(32, 16)))
    halves_of = frames.float().mean((0, 1, 3)) / 255
    assert abs(halves_of[:15].mean() - halves_of[17:].mean()) > 0.7


def test_the_driving_corpus_is_read_like_a_video():
    config = DrivingConfig(height=32, width=48, fps=8.0)
    file = DrivingFile(3, 20, 5, config)
    frames, fps = PyAvDecoder().window(file, Window(num_frames=4, size=(32, 48), fps=4.0, start=1.0))
    whole = DrivingCorpus(config, seed=5).clip(3, 20).frames
    assert fps == 4.0
    assert torch.equal(frames, (whole[:, 8:16:2] * 255).round().byte())


def test_fewer_frames_are_enough_if_the_window_says_so(counted_video):
    frames, _ = PyAvDecoder().window(counted_video, Window(num_frames=60, least=30, size=(32, 48)))
    assert indices(frames) == list(range(41))
    with pytest.raises(ValueError, match=r"counted\.mp4: expected at least 60 frames at 10 fps, got 41; ask for fewer"):
        PyAvDecoder().window(counted_video, Window(num_frames=60, size=(32, 48)))


def test_a_file_that_is_shorter_than_it_says_gives_its_beginning(counted_video, monkeypatch):
    monkeypatch.setattr(opening, "_seconds", lambda *_: 400.0)
    frames, _ = PyAvDecoder().window(counted_video, Window(num_frames=5, size=(32, 48), share=0.9))
    assert indices(frames) == [0, 1, 2, 3, 4]


def bad_files(folder):
    """Bytes that are no whole video, by what is wrong with them."""
    whole = bunny_path().read_bytes()
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {"empty": b"", "text": b"not found" * 50, "truncated": whole[:20000], "sound": sound.getvalue()}


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "sound"])
def test_bad_files_are_errors_that_name_the_file(tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    path.write_bytes(bad_files(tmp_path)[kind])
    reason = {"truncated": "truncated: expected 33357 bytes, got 20000", "sound": "expected a video stream, got none"}
    for call in (PyAvDecoder().probe, lambda file: PyAvDecoder().window(file, Window(num_frames=2, size=(8, 8)))):
        with pytest.raises(ValueError, match=rf"{kind}\.mp4: {reason.get(kind, 'expected a readable video, got')}"):
            call(path)


def test_a_picture_in_a_video_file_is_refused(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.jpg")
    (tmp_path / "picture.jpg").rename(tmp_path / "picture.mp4")
    with pytest.raises(ValueError, match=r"picture\.mp4: expected at least 2 frames at .* fps, got 1"):
        PyAvDecoder().window(tmp_path / "picture.mp4", Window(num_frames=2, size=(8, 8)))


def test_a_codec_that_is_unknown_and_a_rate_that_is_missing_are_named(tmp_path, monkeypatch):
    path = tmp_path / "codec.mp4"
    path.write_bytes(bunny_path().read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(ValueError, match=r"codec\.mp4: expected a codec that this FFmpeg decodes, got an unknown one"):
        PyAvDecoder().probe(path)
    monkeypatch.setattr(opening, "_rate", lambda stream: 0.0)
    with pytest.raises(ValueError, match=r"bigbuck.*: expected a video with a frame rate, got none \(a picture\?\)"):
        PyAvDecoder().probe(bunny_path())


def test_a_known_fault_is_raised_when_the_video_is_opened():
    with pytest.raises(ValueError, match=r"open_video: a\.tar:x: expected a video, got none"):
        PyAvDecoder().probe(VideoFile("a.tar", 0, 0, "x", "expected a video, got none"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_frames": 0}, "expected num_frames, size and stride of 1 or more, got num_frames=0"),
        ({"size": (0, 8)}, r"of 1 or more, got .*size=\(0, 8\)"),
        ({"stride": 0}, "of 1 or more, got .*stride=0"),
        ({"fps": 0.0}, "expected fps above 0 without a stride, got fps=0.0, stride=1"),
        ({"fps": 5.0, "stride": 2}, "expected fps above 0 without a stride, got fps=5.0, stride=2; drop one"),
        ({"start": -1.0}, "expected start of 0 or more, share and crop from 0 to 1, got start=-1.0"),
        ({"share": 1.5}, "expected start of 0 or more, share and crop from 0 to 1, got .*share=1.5"),
        ({"crop": (0.0, 2.0)}, r"share and crop from 0 to 1, got .*crop=\(0.0, 2.0\)"),
    ],
)
def test_bad_windows(options, text):
    with pytest.raises(ValueError, match=f"Window: .*{text}"):
        Window(**{"num_frames": 4, "size": (8, 8), **options})


def test_a_rate_above_the_files_is_refused(counted_video):
    with pytest.raises(
        ValueError, match=r"decode: .*counted\.mp4: fps: expected at most the file's rate 10, got 12\.0"
    ):
        PyAvDecoder().window(counted_video, Window(num_frames=4, size=(8, 8), fps=12.0))


def test_torchcodec_that_is_missing_and_unknown_decoders_are_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(
        ValueError, match=r"TorchCodecDecoder: expected the package torchcodec .* use the decoder 'pyav'"
    ):
        make_decoder("torchcodec")
    with pytest.raises(ValueError, match="make_decoder: expected 'pyav' or 'torchcodec', got 'cv2'"):
        make_decoder("cv2")


@pytest.fixture(scope="module")
def torchcodec():
    try:
        return TorchCodecDecoder()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 8, "start": 1.0},
        {"num_frames": 8, "fps": 6.25, "start": 1.0},
        {"num_frames": 9, "stride": 3, "start": 1.3},
        {"num_frames": None, "stride": 3, "start": 1.3},
        {"num_frames": None, "fps": 7.0},
        {"num_frames": 5, "fps": 5.0, "share": 1.0},
        {"num_frames": 5, "share": 0.37},
        {"num_frames": 90, "least": 10, "fps": 12.5},
    ],
)
def test_torchcodec_gives_the_frames_of_pyav(torchcodec, options):
    window = Window(**{"size": BUNNY, **options})
    expected, fps = PyAvDecoder().window(bunny_path(), window)
    frames, rate = torchcodec.window(bunny_path(), window)
    assert torch.equal(frames, expected) and rate == fps


def test_torchcodec_scales_nearly_as_pyav_and_refuses_the_same(torchcodec, tmp_path, counted_video):
    window = Window(num_frames=4, size=(30, 40), start=1.0, crop=(0.0, 1.0))
    expected, frames = (decoder.window(bunny_path(), window)[0] for decoder in (PyAvDecoder(), torchcodec))
    assert (frames.float() - expected.float()).abs().mean() < 4
    assert torchcodec.probe(bunny_path().read_bytes()) == PyAvDecoder().probe(bunny_path())
    for kind, content in bad_files(tmp_path).items():
        path = tmp_path / f"{kind}.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{kind}\.mp4: expected"):
            torchcodec.window(path, Window(num_frames=60, size=(8, 8)))
    with pytest.raises(ValueError, match=r"counted\.mp4: expected at least 60 frames at 10 fps, got 41"):
        torchcodec.window(counted_video, Window(num_frames=60, size=(32, 48)))
    with pytest.raises(ValueError, match=r"a\.tar:x: expected a video, got none"):
        torchcodec.probe(VideoFile("a.tar", 0, 0, "x", "expected a video, got none"))
