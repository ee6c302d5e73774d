"""The report: one file that asks for nothing, escapes what it is told and draws what it was given."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from temporal_layers.recipes.data.video_io import bunny_path, read_video, write_video
from temporal_layers.recipes.inspection import AttentionRecord
from temporal_layers.recipes.report.page import Report, Table, write_report
from temporal_layers.recipes.sheets import contact_sheet

VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and texts; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def attributes(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def clip():
    return read_video(bunny_path(), num_frames=8).frames


def page(tmp_path, **content):
    path = write_report(tmp_path / "folder" / "report.html", Report(**{"title": "A run", "fps": 8.0, **content}))
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def svgs(html):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)]


def test_everything_given_is_on_the_page(tmp_path, clip):
    sheet = contact_sheet({"clip": clip}, tmp_path / "sheet.png")
    _, parsed = page(
        tmp_path,
        summary="What happened.",
        clips={"before": clip, "after": clip.flip(1)},
        pictures={"all frames": sheet},
        tables=[
            Table(
                {"real": {"difference": 0.0691234, "clips": 12}, "after": {"difference": 0.5, "clips": "-"}},
                "Lower is better.",
            ),
            Table({"one": {"more": 7}}),
        ],
        losses={"layers": [1.0, 0.5, 0.25]},
        alphas={"mid_block": 0.25},
        config={"steps": 400},
        environment={"torch": "2.13.0"},
        command="python3 dev.py demo",
    )
    for text in (
        *("A run", "What happened.", "before", "after", "real", "0.06912", "12", "0.5", "-", "Lower is better."),
        *("3 steps", "mid_block", "0.250", "steps", "400", "2.13.0", "python3 dev.py demo", "all frames", "more", "7"),
    ):
        assert text in parsed.texts, text
    assert [tag for tag, _ in parsed.tags].count("video") == 2
    image = parsed.attributes("img")[0]["src"]
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == sheet.read_bytes()


def test_videos_are_inside_and_play_by_themselves(tmp_path, clip):
    _, parsed = page(tmp_path, clips={"clip": clip})
    video = parsed.attributes("video")[0]
    assert {"controls", "loop", "autoplay", "muted", "playsinline"} <= video.keys()
    (tmp_path / "inside.mp4").write_bytes(base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,")))
    inside = read_video(tmp_path / "inside.mp4")
    assert inside.fps == 8
    assert (inside.frames - clip).abs().mean() < 0.02


def test_the_page_asks_for_nothing(tmp_path, clip):
    html, parsed = page(tmp_path, clips={"clip": clip}, losses={"a": [1.0, 0.5]}, alphas={"a": 0.5}, command="x")
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"https?:|@import|url\(|\son\w+=", re.sub(r"base64,[^\"]*", "", html))
    policy = next(meta["content"] for meta in parsed.attributes("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


HOSTILE = "<script>alert(1)</script>\"'&amp;"


def test_all_text_is_escaped(tmp_path, clip):
    sheet = contact_sheet({"clip": clip}, tmp_path / "sheet.png")
    plain, _ = page(
        tmp_path,
        title="t",
        summary="t",
        clips={"t": clip},
        tables=[Table({"t": {"t": "t"}}, "t")],
        pictures={"t": sheet},
        losses={"t": [1.0, 2.0]},
        curves={"t": {"t": [(0, 0.5), (1, 0.6)]}},
        attention=AttentionRecord(((0.5, 0.5),), {"t": torch.rand(1, 1, 2, 2)}),
        alphas={"t": 0.5},
        config={"t": "t"},
        environment={"t": "t"},
        command="t",
    )
    _, parsed = page(
        tmp_path,
        title=HOSTILE,
        summary=HOSTILE,
        clips={HOSTILE: clip},
        tables=[Table({HOSTILE: {HOSTILE: HOSTILE}}, HOSTILE)],
        pictures={HOSTILE: sheet},
        losses={HOSTILE: [1.0, 2.0]},
        curves={HOSTILE: {HOSTILE: [(0, 0.5), (1, 0.6)]}},
        attention=AttentionRecord(((0.5, 0.5),), {HOSTILE: torch.rand(1, 1, 2, 2)}),
        alphas={HOSTILE: 0.5},
        config={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        command=HOSTILE,
    )
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in Page(plain).tags]
    assert parsed.texts.count(HOSTILE) == Page(plain).texts.count("t") == 16
    assert sum(HOSTILE in text for text in parsed.texts) == 19  # and in the captions of loss, curve and attention
    assert parsed.attributes("video")[0]["aria-label"] == HOSTILE


def test_empty_sections_are_left_out(tmp_path):
    _, parsed = page(tmp_path)
    assert parsed.texts.count("A run") == 2
    assert not {"section", "video", "img", "table", "svg", "pre"} & {tag for tag, _ in parsed.tags}


def points(svg, kind):
    return [tuple(map(float, pair.split(","))) for pair in svg.find(f"polyline[@class='{kind}']").get("points").split()]


def test_the_loss_curve_shows_the_losses(tmp_path):
    losses = [1.0 - 0.5 * step / 99 for step in range(100)]
    html, _ = page(tmp_path, losses={"layers": losses})
    (svg,) = svgs(html)
    labels = {text.text: float(text.get("y")) - 4 for text in svg.findall("text") if text.get("text-anchor") == "end"}
    raw = points(svg, "raw")
    assert len(raw) == 100
    assert raw[0][1] == pytest.approx(labels["1"], abs=0.1)
    assert raw[-1][1] == pytest.approx(labels["0.5"], abs=0.1)
    assert raw[0][0] - 48 == pytest.approx(470 - raw[-1][0], abs=0.11)  # half a step from either end of the axis
    steps = torch.tensor(raw).diff(dim=0)
    assert (steps > 0).all() and (steps - steps.mean(0)).abs().max() < 0.11  # a straight line, falling to the right
    # The moving average of a line is the line.
    torch.testing.assert_close(torch.tensor(points(svg, "smooth")), torch.tensor(raw), atol=0.11, rtol=0)


@pytest.mark.parametrize("count", [1, 7, 240, 241, 10_007])
def test_long_curves_keep_their_mean_and_stay_small(tmp_path, count):
    losses = torch.rand(count, generator=torch.Generator().manual_seed(0)).double().tolist()
    html, _ = page(tmp_path, losses={"layers": losses})
    (svg,) = svgs(html)
    raw, smooth = points(svg, "raw"), points(svg, "smooth")
    assert len(raw) == len(smooth) <= 240
    assert all(48 <= x <= 470 and 9.9 <= y <= 210.1 for x, y in raw + smooth)
    assert len(html) < 20_000


@pytest.mark.parametrize("value", [0.0, 3e-7, 0.3, 12345.0, -2.0])
def test_constant_losses_have_an_axis(tmp_path, value):
    html, _ = page(tmp_path, losses={"layers": [value] * 5})
    (svg,) = svgs(html)
    ticks = [text.text for text in svg.findall("text")][:-2]
    assert 2 <= len(ticks) <= 7 and len(set(ticks)) == len(ticks)
    assert min(map(float, ticks)) <= value <= max(map(float, ticks))
    assert {y for _, y in points(svg, "raw")} == {points(svg, "smooth")[0][1]}


def test_losses_that_are_not_finite_are_counted(tmp_path):
    html, _ = page(tmp_path, losses={"layers": [1.0, math.nan, 0.5, math.inf]})
    assert "2 of 4 steps had no finite loss." in html
    assert len(points(svgs(html)[0], "raw")) == 2
    html, parsed = page(tmp_path, losses={"layers": [math.nan] * 3})
    assert "No finite loss was recorded." in parsed.texts and not svgs(html)


def test_alpha_bars_have_the_length_of_alpha(tmp_path):
    alphas = {"down_blocks.0": 0.0, "mid_block": 0.5, "up_blocks.1": 1.0}
    html, _ = page(tmp_path, alphas=alphas)
    (svg,) = svgs(html)
    full = [float(bar.get("width")) for bar in svg.findall("rect[@class='track']")]
    bars = [float(bar.get("width")) for bar in svg.findall("rect[@class='bar']")]
    assert [bar / width for bar, width in zip(bars, full, strict=True)] == pytest.approx(list(alphas.values()))
    assert [text.text for text in svg.findall("text")][::2] == list(alphas)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0691234, "0.06912"), (0.0, "0"), (-0.5, "-0.5"), (1.23e-7, "1.23e-07"), (1e9, "1.00e+09")]
)
@pytest.mark.parametrize("kind", ["tables", "config"])
def test_numbers_are_short(tmp_path, value, shown, kind):
    content = [Table({"row": {"column": value}})] if kind == "tables" else {"name": value}
    _, parsed = page(tmp_path, **{kind: content})
    assert shown in parsed.texts


def test_numbers_that_are_not_finite_are_shown_as_such(tmp_path):
    _, parsed = page(tmp_path, tables=[Table({"row": {"a": math.nan, "b": math.inf, "c": True, "d": 7}})])
    assert parsed.texts[-5:-1] == ["nan", "inf", "True", "7"]


def test_curves_tell_their_name_and_keep_their_steps(tmp_path):
    curves = {"alpha": {"mid": [(0, 0.0), (9, 1.0)], "up": [(4, 0.5)]}}
    html, parsed = page(tmp_path, losses={"layers": [1.0] * 10}, curves=curves)
    svg = svgs(html)[1]
    mid, up = svg.findall("polyline")
    assert [line.find("title").text for line in (mid, up)] == ["mid: 1", "up: 0.5"] and "alpha" in parsed.texts
    (x0, y0), (x9, y9) = (tuple(map(float, pair.split(","))) for pair in mid.get("points").split())
    (x4, y4) = map(float, up.get("points").split(","))
    assert y4 == pytest.approx((y0 + y9) / 2, abs=0.06) and x4 - x0 == pytest.approx((x9 - x0) * 4 / 9, abs=0.06)


def test_attention_is_drawn_pixel_by_pixel(tmp_path):
    weights = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[0.5, 0.5], [0.0, 1.0]]])[None]
    _, parsed = page(tmp_path, attention=AttentionRecord(((0.1, 0.2), (0.3, 0.4)), {"mid": weights}))
    images = parsed.attributes("img")
    assert [image["alt"] for image in images] == [
        "mid, at 0.10 of the height and 0.20 of the width",
        "mid, at 0.30 of the height and 0.40 of the width",
    ]
    for image, pixel in zip(images, weights[0], strict=True):
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(data)) as shown:
            values = torch.tensor(list(shown.tobytes())).reshape(2, 2) / 255
        torch.testing.assert_close(values, pixel / pixel.max(), atol=1 / 255, rtol=0)


def test_files_are_taken_as_they_are(tmp_path, clip):
    file = write_video(tmp_path / "clip.mp4", clip, 8.0)
    _, parsed = page(tmp_path, clips={"clip": file})
    assert base64.b64decode(parsed.attributes("video")[0]["src"].split(",")[1]) == file.read_bytes()


def test_bad_content_is_refused(tmp_path, clip):
    path = tmp_path / "report.html"
    for content, text in (
        (
            {"tables": [Table({"a": {"x": 1}, "b": {"y": 1}})]},
            r"tables: row 'b': expected columns \['x'\], got \['y'\]",
        ),
        ({"alphas": {"mid": 1.5}}, r"alphas: mid: expected a value in \[0, 1\], got 1.5"),
        ({"pictures": {"a": tmp_path / "no.png"}}, r"pictures: expected a file, got .*no\.png"),
        ({"clips": {"a": tmp_path / "no.mp4"}}, r"clips: expected a file, got .*no\.mp4"),
    ):
        with pytest.raises(ValueError, match=f"write_report: {text}"):
            write_report(path, Report(title="t", **content))
    with pytest.raises(ValueError, match=r"write_video: frames: expected shape \(3, frames, height, width\)"):
        write_report(path, Report(title="t", clips={"a": clip[None]}))
    assert not path.exists()
