"""Reading and writing of clips: what is decoded is what was encoded, and bad files are named."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from temporal_layers.recipes.data.clip_reader import ClipReader
from temporal_layers.recipes.data.video_io import (
    bunny_path,
    check_clip,
    iterate_clips,
    list_videos,
    read_video,
    write_video,
)


def psnr(actual, expected):
    return -10 * torch.log10((actual - expected).pow(2).mean()).item()


def counted_clip(num_frames, height=32, width=48):
    """Frame t is uniform grey t / (num_frames - 1): a frame's index can be read off its pixels."""
    values = torch.linspace(0, 1, num_frames)
    return values.view(1, -1, 1, 1).expand(3, num_frames, height, width)


def indices(frames, num_frames):
    return (frames.mean((0, 2, 3)) * (num_frames - 1)).round().int().tolist()


def write_stream(path, frames, rate, ticks=None):
    """Write by FFmpeg into any container, frame t at ``ticks[t] / rate`` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[2:], "yuv420p"
        for index, image in enumerate((frames * 255).round().byte().permute(1, 2, 3, 0).numpy()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = index if ticks is None else ticks[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def bunny():
    return read_video(bunny_path())


@pytest.fixture
def counted(tmp_path):
    """21 frames at 10 frames per second."""
    return write_video(tmp_path / "counted.mp4", counted_clip(21), 10)


def test_the_packaged_clip_is_what_its_readme_says(bunny):
    assert bunny.frames.shape == (3, 66, 54, 96)
    assert bunny.frames.dtype == torch.float32
    assert bunny.frames.min() >= 0 and bunny.frames.max() <= 1
    assert bunny.fps == 12.5
    readme = (bunny_path().parent / "README.md").read_text()
    assert f"{bunny_path().stat().st_size:,} bytes" in readme


@pytest.mark.parametrize(
    ("name", "least_db"), [("a.mp4", 35), ("a.webp", 33), ("a.gif", 31), ("a.png", 55), ("A.MP4", 35)]
)
def test_what_is_written_is_read_back(tmp_path, bunny, name, least_db):
    frames = bunny.frames[:, :12]
    again = read_video(write_video(tmp_path / "folder" / name, frames, 12.5))
    assert again.frames.shape == frames.shape
    assert again.fps == pytest.approx(12.5)
    assert psnr(again.frames, frames) > least_db


def test_a_folder_of_frames_is_lossless(tmp_path, bunny):
    frames = bunny.frames[:, :3]
    folder = write_video(tmp_path / "frames", frames, 8)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png"]
    pixels = np.stack([np.array(Image.open(file)) for file in files])
    np.testing.assert_array_equal(pixels, (frames * 255).round().byte().permute(1, 2, 3, 0).numpy())


def test_frames_of_an_earlier_longer_clip_do_not_stay_in_the_folder(tmp_path):
    write_video(tmp_path / "frames", torch.rand(3, 4, 8, 8), 8)
    (tmp_path / "frames" / "notes.png").write_text("")
    write_video(tmp_path / "frames", torch.rand(3, 2, 8, 8), 8)
    assert sorted(file.name for file in (tmp_path / "frames").iterdir()) == ["0000.png", "0001.png", "notes.png"]


@given(height=st.integers(16, 33), width=st.integers(16, 33), num_frames=st.integers(1, 4))
def test_odd_sizes_are_padded_to_even_by_the_edge(tmp_path_factory, height, width, num_frames):
    frames = torch.linspace(0, 1, width).expand(3, num_frames, height, width)
    again = read_video(write_video(tmp_path_factory.mktemp("odd") / "a.mp4", frames, 8)).frames
    assert again.shape == (3, num_frames, height + height % 2, width + width % 2)
    assert psnr(again[..., :height, :width], frames) > 33
    assert (again[..., -1, :width] - frames[..., -1, :]).abs().mean() < 0.03


@pytest.mark.parametrize("rgb", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.8, 0.4, 0.2), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_colours_survive(tmp_path, rgb, suffix):
    frames = torch.tensor(rgb).view(3, 1, 1, 1).repeat(1, 4, 32, 64)
    frames[..., 32:] = torch.linspace(0, 1, 4).view(1, 4, 1, 1)  # animated formats keep equal frames once
    again = read_video(write_video(tmp_path / f"a{suffix}", frames, 8)).frames
    tolerance = 9 if suffix == ".gif" else 3  # the dither moves a colour by up to 6 grey levels
    assert again.shape == frames.shape
    assert (again - frames)[..., :30].abs().max() * 255 <= tolerance


def test_mp4_says_its_colour_matrix_and_pixel_format(tmp_path, bunny):
    path = write_video(tmp_path / "a.mp4", bunny.frames[:, :2], 8)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.format.name, frame.colorspace, frame.color_range) == ("yuv420p", 1, 1)
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")  # a browser can start before the whole file is there


@pytest.mark.parametrize("fps", [8, 12.5, 24000 / 1001, 29.97, 60])
@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_the_rate_is_kept(tmp_path, fps, suffix):
    clip = read_video(write_video(tmp_path / f"a{suffix}", counted_clip(30), fps))
    assert clip.frames.shape[1] == 30
    assert clip.fps == pytest.approx(fps, rel=0.01)  # a .gif counts in hundredths of a second


def test_gif_has_one_palette_and_a_dither_that_stands_still(tmp_path):
    ramp = torch.linspace(0.2, 0.7, 96).expand(3, 64, 96)
    frames = torch.stack([ramp] * 6, dim=1).clone()
    frames[:, :, :8, :8] = torch.linspace(0, 1, 6).view(1, 6, 1, 1)  # something moves, in one corner
    again = read_video(write_video(tmp_path / "a.gif", frames, 8)).frames
    assert torch.equal(again[:, 1:, 8:], again[:, :-1, 8:])
    row = again[0, 0, 8:].mean(0)  # averaged over the dither pattern the ramp is smooth: no bands
    assert (row - ramp[0, 0]).abs().max() < 3 / 255


def test_repeated_frames_keep_their_time_in_animations(tmp_path):
    frames = counted_clip(3).repeat_interleave(torch.tensor([1, 4, 1]), dim=1)
    path = write_video(tmp_path / "a.gif", frames, 10)
    assert indices(read_video(path, fps=5).frames, 3) == [0, 1, 1]
    assert indices(read_video(path).frames, 3) == [0, 1, 2]


def test_stride_and_num_frames(counted):
    clip = read_video(counted, stride=3, num_frames=4)
    assert indices(clip.frames, 21) == [0, 3, 6, 9]
    assert clip.fps == pytest.approx(10 / 3)


def test_start_seeks_to_the_frame(counted):
    assert indices(read_video(counted, start=1.2, num_frames=3).frames, 21) == [12, 13, 14]
    assert indices(read_video(bunny_as(counted, ".png"), start=1.2, num_frames=3).frames, 21) == [12, 13, 14]


def bunny_as(path, suffix):
    clip = read_video(path)
    return write_video(path.with_suffix(suffix), clip.frames, clip.fps)


def test_start_reaches_behind_a_key_frame(bunny):
    later = read_video(bunny_path(), start=50 / 12.5, num_frames=4)  # key frames: 0 and 33
    assert torch.equal(later.frames, bunny.frames[:, 50:54])


def test_times_that_the_container_rounded_do_not_shift_frames(tmp_path):
    # Matroska counts whole milliseconds: frame 2 of 30 a second comes at 67 ms, not at 66.7.
    clip = read_video(write_stream(tmp_path / "rounded.mkv", counted_clip(25), rate=30), fps=15)
    assert indices(clip.frames, 25) == list(range(0, 25, 2))
    clip = read_video(write_stream(tmp_path / "three.mkv", counted_clip(3), rate=30), fps=30)
    assert indices(clip.frames, 3) == [0, 1, 2]


def test_bare_streams_without_times_are_counted(tmp_path):
    path = write_stream(tmp_path / "bare.h264", counted_clip(25), rate=25)
    assert indices(read_video(path, start=0.2, fps=12.5, num_frames=3).frames, 25) == [5, 7, 9]


@pytest.mark.parametrize(
    ("fps", "expected"), [(10, list(range(21))), (5, list(range(0, 21, 2))), (4, [0, 2, 5, 7, 10, 12, 15, 17, 20])]
)
def test_fps_takes_the_frame_on_screen(counted, fps, expected):
    clip = read_video(counted, fps=fps)
    assert clip.fps == fps
    assert indices(clip.frames, 21) == expected


@given(source=st.integers(5, 30), share=st.floats(0.05, 1))
def test_resampled_frames_were_on_screen_at_their_time(tmp_path_factory, source, share):
    fps = source * share
    path = write_video(tmp_path_factory.mktemp("rate") / "a.mp4", counted_clip(24), source)
    taken = indices(read_video(path, fps=fps).frames, 24)
    for position, index in enumerate(taken):
        assert index - 0.11 <= position / fps * source <= index + 1
    assert len(taken) == pytest.approx(24 / source * fps + 0.5, abs=0.6)


def test_frames_held_in_a_variable_rate_file_are_repeated(tmp_path):
    path = write_stream(tmp_path / "a.mkv", counted_clip(3), rate=10, ticks=[0, 1, 6])
    assert indices(read_video(path, fps=5).frames, 3) == [0, 1, 1, 2]


def test_size_scales_and_cuts_the_centre(tmp_path):
    frames = torch.zeros(3, 2, 32, 96)
    frames[0, :, :, :32], frames[1, :, :, 32:64], frames[2, :, :, 64:] = 1, 1, 1  # red, green, blue: only green stays
    frames[0, 1, :, :32] = 0.5
    path = write_video(tmp_path / "a.png", frames, 8)
    square = read_video(path, size=(16, 16)).frames
    assert square.shape == (3, 2, 16, 16)
    assert (square[..., 2:-2] - torch.tensor([0.0, 1, 0]).view(3, 1, 1, 1)).abs().max() < 0.01


def test_reducing_averages_instead_of_picking(tmp_path):
    stripes = (torch.arange(64) % 2).float().expand(3, 1, 64, 64)
    path = write_video(tmp_path / "a.png", torch.cat([stripes, 1 - stripes], dim=1), 8)
    assert (read_video(path, size=(8, 8)).frames - 0.5)[..., 1:-1].abs().max() < 0.02


def test_rotation_of_phones_is_applied(tmp_path):
    frames = torch.zeros(3, 3, 32, 64)
    frames[0, :, :16, :32] = 1  # red in the upper left quarter
    path = write_video(tmp_path / "a.mp4", frames, 8)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40  # the display matrix of the track: a quarter turn clockwise
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(data)
    turned = read_video(path).frames
    assert turned.shape == (3, 3, 64, 32)
    assert turned[0, :, :28, 20:].min() > 0.9  # now in the upper right one
    assert turned[0, :, 36:].max() < 0.1 and turned[0, :, :28, :12].max() < 0.1


def test_untagged_hd_is_taken_for_bt709(tmp_path):
    def written(height, tagged):
        path = tmp_path / f"{height}{tagged}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 32, height, "yuv420p"
            if tagged:
                stream.codec_context.colorspace = 1
            frame = av.VideoFrame(32, height, "yuv420p")
            for plane, value in zip(frame.planes, (63, 102, 240), strict=True):  # BT.709's pure red
                plane.update(bytes([value]) * plane.buffer_size)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return read_video(path, num_frames=1).frames[:, 0, 8, 8]

    red = torch.tensor([1.0, 0, 0])
    assert (written(720, tagged=False) - red).abs().max() < 0.03
    assert (written(64, tagged=True) - red).abs().max() < 0.03
    assert (written(64, tagged=False) - red).abs().max() > 0.05  # small untagged files are BT.601


def test_list_videos(tmp_path):
    for name in ("b.mp4", "a.MOV", "deep/er/c.webm", "notes.txt", "._b.mp4", "frame.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in list_videos(tmp_path)] == [
        "a.MOV",
        "b.mp4",
        "deep/er/c.webm",
    ]
    with pytest.raises(ValueError, match=r"list_videos: expected a folder, got .*nowhere"):
        list_videos(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected at least one video file, got none; known are \.avi"):
        list_videos(tmp_path / "empty")


def test_iterated_clips_join_to_the_whole(bunny):
    clips = list(iterate_clips(bunny_path(), num_frames=16))
    assert torch.equal(torch.cat([clip.frames for clip in clips], dim=1), bunny.frames[:, :64])
    with pytest.raises(ValueError, match=r"expected at least 40 frames at 6.25 fps, got 33"):
        list(iterate_clips(bunny_path(), num_frames=40, stride=2))


def damaged(source: Path, path: Path, kind: str) -> Path:
    data = source.read_bytes()
    if kind == "cut":
        data = data[: int(len(data) * 0.9)]
    elif kind == "overwritten":
        middle = data.find(b"mdat") + len(data) // 2
        data = data[:middle] + bytes(4000) + data[middle + 4000 :]
    elif kind == "text":
        data = b"this is not a video\n" * 20
    elif kind == "empty":
        data = b""
    path.write_bytes(data)
    return path


def test_bad_files_are_named(tmp_path, counted):
    with pytest.raises(ValueError, match=r"open_video: .*no\.mp4: expected a video file, got a path that is no file"):
        read_video(tmp_path / "no.mp4")
    with pytest.raises(ValueError, match=r"cut\.mp4: truncated: expected 33357 bytes, got 30021; copy the file again"):
        read_video(damaged(bunny_path(), tmp_path / "cut.mp4", "cut"))
    for kind in ("overwritten", "text", "empty"):
        with pytest.raises(ValueError, match=rf"{kind}\.mp4: expected a readable video, got damaged data \(.+\); copy"):
            read_video(damaged(bunny_path(), tmp_path / f"{kind}.mp4", kind))
    for suffix in (".webp", ".gif", ".png"):
        whole = bunny_as(counted, suffix)
        with pytest.raises(ValueError, match=rf"text\{suffix}: expected a readable video, got damaged data"):
            read_video(damaged(whole, tmp_path / f"text{suffix}", "text"))
        with pytest.raises(ValueError, match=rf"cut\{suffix}: expected a readable video, got damaged data"):
            read_video(damaged(whole, tmp_path / f"cut{suffix}", "cut"))


def test_files_without_moving_pictures_are_refused(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.mp4: expected a video stream, got none \(an audio file\?\)"):
        read_video(tmp_path / "sound.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    with pytest.raises(ValueError, match=r"still\.png: expected an animation with a duration per frame, got a still"):
        read_video(tmp_path / "still.png")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_frames": 0}, "num_frames: expected 1 or more, got 0"),
        ({"num_frames": 67}, r"expected at least 67 frames at 12.5 fps from 0.0 s on, got 66; ask for fewer"),
        ({"start": 99.0}, r"expected at least 1 frames at 12.5 fps from 99.0 s on, got 0"),
        ({"start": -1.0}, "start: expected 0 or more seconds, got -1.0"),
        ({"size": (0, 8)}, r"size: expected \(height, width\), both 1 or more, got \(0, 8\)"),
        ({"size": (8,)}, r"size: expected \(height, width\), both 1 or more, got \(8,\)"),
        ({"fps": 0.0}, "fps: expected more than 0, got 0.0"),
        ({"fps": 25.0}, "fps: expected at most the file's rate 12.5, got 25.0; ask for less"),
        ({"stride": 0}, "stride: expected 1 or more, got 0"),
        ({"fps": 5.0, "stride": 2}, r"expected fps or stride, got both \(fps=5.0, stride=2\)"),
    ],
)
def test_bad_arguments_of_read_video(arguments, text):
    with pytest.raises(ValueError, match=f"read_video: .*{text}"):
        read_video(bunny_path(), **arguments)


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        (torch.zeros(3, 8, 8), r"expected shape \(3, frames, height, width\), got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), r"expected shape \(3, frames, height, width\), got \(2, 3, 8, 8\)"),
        (torch.zeros(3, 0, 8, 8), r"expected shape \(3, frames, height, width\), got \(3, 0, 8, 8\)"),
        (torch.zeros(3, 2, 8, 8, dtype=torch.uint8), r"expected a floating dtype, got torch.uint8; divide 8-bit"),
        (torch.full((3, 2, 8, 8), -0.5), r"expected values in \[0, 1\], got \[-0.5, -0.5\]"),
        (torch.full((3, 2, 8, 8), 1.1), r"expected values in \[0, 1\], got \[1.1, 1.1\]"),
        (torch.full((3, 2, 8, 8), float("nan")), r"expected values in \[0, 1\], got \[nan, nan\]"),
    ],
)
def test_bad_clips_are_refused(tmp_path, frames, text):
    with pytest.raises(ValueError, match=f"write_video: frames: {text}"):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


def test_bad_names_and_rates_are_refused(tmp_path, bunny):
    with pytest.raises(ValueError, match=r"a\.avi: expected \.mp4, \.webp, \.gif, \.png or no suffix, got '\.avi'"):
        write_video(tmp_path / "a.avi", bunny.frames, 8)
    with pytest.raises(ValueError, match="write_video: fps: expected more than 0, got 0"):
        write_video(tmp_path / "a.mp4", bunny.frames, 0)


def test_rounding_noise_is_clamped():
    frames = torch.tensor([-1e-3, 0.5, 1 + 1e-3], dtype=torch.float64).view(3, 1, 1, 1)
    assert torch.equal(check_clip("test", frames).flatten(), torch.tensor([0.0, 0.5, 1.0]))


def test_clip_reader_names_what_it_skips(tmp_path, bunny):
    whole = write_video(tmp_path / "a.mp4", bunny.frames, 12.5)
    text = damaged(whole, tmp_path / "b.mp4", "text")
    half = damaged(bunny_path(), tmp_path / "c.mp4", "overwritten")
    short = write_video(tmp_path / "d.mp4", bunny.frames[:, :4], 12.5)
    reader = ClipReader(list_videos(tmp_path), num_frames=8, size=(24, 32), fps=6.25)
    shapes = {tuple(clip.frames.shape) for clip in reader}
    assert shapes == {(3, 8, 24, 32)}
    assert reader.report.clips[whole] == 33 // 8
    assert [skip.path for skip in reader.report.skipped] == [text, half, short]
    assert [skip.clips > 0 for skip in reader.report.skipped] == [False, True, False]
    assert reader.report.num_clips == 4 + reader.report.clips[half]
    lines = str(reader.report).splitlines()
    assert lines[0] == f"{reader.report.num_clips} clips from 2 files, 3 files with a fault"
    assert "expected at least 8 frames at 6.25 fps, got 2" in lines[3]


def test_clip_reader_starts_anew_and_stops_when_told(bunny):
    reader = ClipReader([bunny_path()], num_frames=16, size=(54, 96), max_clips_per_file=2)
    first, second = list(reader), list(reader)
    assert len(first) == len(second) == reader.report.num_clips == 2
    assert torch.equal(torch.cat([clip.frames for clip in second], dim=1), bunny.frames[:, :32])


def test_clip_reader_without_any_clip_is_an_error(tmp_path):
    reader = ClipReader([tmp_path / "no.mp4", bunny_path()], num_frames=100, size=(8, 8))
    with pytest.raises(ValueError, match=r"ClipReader: expected at least one clip, got none; 0 clips from 0 files, 2 "):
        list(reader)
    assert len(reader.report.skipped) == 2
