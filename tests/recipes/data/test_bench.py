"""The benchmark compares like with like: its bare loop decodes what the loader decodes."""

import pytest
import torch

from temporal_layers.recipes.data import bench
from temporal_layers.recipes.data.decoding import PyAvDecoder, Window
from temporal_layers.recipes.data.video_io import bunny_path

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_the_bare_loop_gives_the_clips_of_the_decoder(share):
    window = Window(num_frames=6, size=(40, 60), fps=6.25, share=share, crop=(0.2, 0.7))
    assert torch.equal(bench.bare_window(str(bunny_path()), window), PyAvDecoder().window(bunny_path(), window)[0])


def test_a_video_that_is_too_short_for_it_is_an_error():
    with pytest.raises(ValueError, match=r"bare_window: .*bigbuck.*: expected 200 frames, got \d+"):
        bench.bare_window(str(bunny_path()), Window(num_frames=200, size=(40, 60), fps=6.25, share=0.0))


def test_a_small_run_prints_a_row_for_each_number_of_workers(grey_folder, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    words = ["--frames", "4", "--size", "24", "32", "--fps", "5", "--clips", "4", "--batch-size", "2"]
    words += ["--repeats", "1", "--workers", "1"]
    assert bench.main(["--path", str(grey_folder), *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["bare", "0", "1"]
    assert all(float(row[-3]) > 0 for row in rows)
