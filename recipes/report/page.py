"""One self-contained HTML page about a run: clips, contact sheet, numbers, curves, and the command that repeats it.

The page holds its pictures and videos as data URLs, runs no script and asks for nothing from the network (its content
policy forbids both), follows the reader's light or dark setting and fits a phone.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.inspection import AttentionRecord
from temporal_layers.recipes.report.drawing import Curve, alphas_svg, curves_svg, losses_svg, number_text

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1f2328; --faint: #656d76;
  --line: #d9dde3; --accent: #2563a8; --soft: #dbe7f5; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e5e7eb; --faint: #9aa3af;
  --line: #333842; --accent: #6cb0f5; --soft: #24405e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 1.1rem; margin: 40px 0 12px; }
p { margin: 0 0 12px; max-width: 70ch; }
.note, figcaption { color: var(--faint); font-size: 0.875rem; }
.grid { display: grid; gap: 20px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; }
figcaption { margin-top: 6px; }
video { width: 100%; display: block; border-radius: 8px; background: #000; }
.scroll { overflow-x: auto; margin-bottom: 10px; }
.sheet { display: block; width: 100%; min-width: 720px; border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; }
thead th { color: var(--faint); font-size: 0.875rem; vertical-align: bottom; }
.numbers { width: auto; }
.numbers td, .numbers thead th { text-align: right; padding: 7px 0 7px 20px; }
.settings { font-size: 0.875rem; }
.settings th { font-weight: 400; color: var(--faint); width: 40%; }
.settings td { overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .faint { fill: var(--faint); }
svg .track { fill: var(--line); opacity: 0.45; }
svg .bar { fill: var(--soft); }
svg .axis { stroke: var(--line); }
svg .raw { fill: none; stroke: var(--accent); opacity: 0.35; }
.maps { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); }
.maps img { width: 100%; image-rendering: pixelated; display: block; border-radius: 4px; }
.maps figcaption { font-size: 0.75rem; overflow-wrap: anywhere; }
svg .smooth { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
"""


@dataclass(frozen=True)
class Table:
    """Numbers.

    Attributes:
        rows: Row to column to value; every row has the same columns. Floats are shown to four significant digits.
        note: How to read them.
    """

    rows: Mapping[str, Mapping[str, object]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is on the page, in this order; what is empty is left out.

    Attributes:
        title: Heading of the page.
        summary: One paragraph below it.
        clips: Caption to clip: floating, in [0, 1], or an MP4 file; shown as looping videos.
        fps: Frames per second of the clips that are no files.
        pictures: Caption to image file, for example from `contact_sheet`.
        tables: Numbers.
        losses: Training to the loss of each step; values that are not finite are counted below the curve.
        curves: Caption to curves by name, over the same steps as the first of the losses.
        alphas: Layer name to alpha, in [0, 1].
        attention: Whom frames attend to.
        config: Settings of the run.
        environment: Versions and hardware.
        command: What to run to get this page again.
    """

    title: str
    summary: str = ""
    clips: Mapping[str, Float[Tensor, "3 frames height width"] | Path] = field(default_factory=dict)
    fps: float = 10.0
    pictures: Mapping[str, Path] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    attention: AttentionRecord | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    command: str = ""


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page about a run. All text is escaped.

    Args:
        path: HTML file to write; parent folders are made.
        report: What is on the page.

    Returns:
        ``path`` as a `Path`.

    Raises:
        ValueError: Rows with different columns, an alpha outside [0, 1], a missing file, or clips that
            `temporal_layers.recipes.data.video_io.write_video` refuses.
    """
    settings = [("Configuration", report.config), ("Environment", report.environment)]
    sections = {
        "Clips": _clips_html(report.clips, report.fps) if report.clips else "",
        "Frames": "".join(_picture_html(caption, file) for caption, file in report.pictures.items()),
        "Numbers": "".join(_numbers_html(table) for table in report.tables),
        "Training": _training_html(report),
        "Attention over frames": _attention_html(report.attention) if report.attention is not None else "",
    }
    body = "".join(f"<section><h2>{name}</h2>{html}</section>" for name, html in sections.items() if html)
    body += f'<div class="grid">{"".join(_settings_html(heading, rows) for heading, rows in settings if rows)}</div>'
    body += f"<section><h2>Run it again</h2><pre>{escape(report.command)}</pre></section>" if report.command else ""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page_html(report.title, report.summary, body), encoding="utf-8")
    return path


def _clips_html(clips: Mapping[str, Tensor | Path], fps: float) -> str:
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for label, clip in clips.items():
            file = (
                _existing("clips", clip) if isinstance(clip, Path) else write_video(Path(folder) / "c.mp4", clip, fps)
            )
            url = _data_url(file)
            video = f'<video src="{url}" controls loop autoplay muted playsinline aria-label="{escape(label)}"></video>'
            figures.append(f"<figure>{video}<figcaption>{escape(label)}</figcaption></figure>")
    return f'<div class="grid">{"".join(figures)}</div>'


def _existing(what: str, file: str | Path) -> Path:
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"write_report: {what}: expected a file, got {str(file)!r}, which is none")
    return file


def _picture_html(caption: str, file: str | Path) -> str:
    image = f'<img class="sheet" src="{_data_url(_existing("pictures", file))}" alt="{escape(caption)}">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _training_html(report: Report) -> str:
    steps = max((len(losses) for losses in report.losses.values()), default=0)
    charts = [losses_svg(name, losses) for name, losses in report.losses.items() if len(losses)]
    charts += [curves_svg(curves, steps, caption) for caption, curves in report.curves.items() if curves]
    charts += [alphas_svg(report.alphas)] if report.alphas else []
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def _attention_html(attention: AttentionRecord) -> str:
    figures = []
    for name, weights in attention.weights.items():
        for (row, column), pixel in zip(attention.pixels, weights[0], strict=True):
            values = (pixel.float() / pixel.max() * 255).round().byte().cpu().numpy()
            data = io.BytesIO()
            Image.fromarray(values).save(data, "png")
            place = f"{name}, at {row:.2f} of the height and {column:.2f} of the width"
            image = f'<img src="{_encoded("image/png", data.getvalue())}" alt="{escape(place)}">'
            figures.append(f"<figure>{image}<figcaption>{escape(place)}</figcaption></figure>")
    note = "The frame of a row attends to that of a column: white most, black not at all. Mean over heads."
    return f'<div class="maps">{"".join(figures)}</div><p class="note">{note}</p>' if figures else ""


def _numbers_html(table: Table) -> str:
    columns = list(next(iter(table.rows.values())))
    for row, cells in table.rows.items():
        if list(cells) != columns:
            raise ValueError(f"write_report: tables: row {row!r}: expected columns {columns}, got {list(cells)}")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row)}</th>'
        + "".join(f"<td>{escape(number_text(cell))}</td>" for cell in cells.values())
        + "</tr>"
        for row, cells in table.rows.items()
    )
    body = f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody>"
    note = f"<figcaption>{escape(table.note)}</figcaption>" if table.note else ""
    return f'<figure><div class="scroll"><table class="numbers">{body}</table></div>{note}</figure>'


def _settings_html(heading: str, settings: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(number_text(value))}</td></tr>'
        for name, value in settings.items()
    )
    return f'<section><h2>{heading}</h2><table class="settings"><tbody>{rows}</tbody></table></section>'


def _page_html(title: str, summary: str, body: str) -> str:
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    lead = f"<p>{escape(summary)}</p>" if summary else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{lead}{body}</main></body></html>\n"
    )


def _data_url(path: Path) -> str:
    return _encoded(mimetypes.guess_type(path.name)[0] or "application/octet-stream", path.read_bytes())


def _encoded(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
