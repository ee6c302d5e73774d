"""One self-contained HTML page about a run: clips, contact sheet, numbers, curves, and the command that repeats it.

The page holds its pictures and videos as data URLs, runs no script and asks for nothing from the network (its content
policy forbids both), follows the reader's light or dark setting and fits a phone.
"""

from __future__ import annotations

import base64
import math
import mimetypes
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.data.video_io import write_video

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
svg .smooth { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
"""

_WIDTH = 480


def _number(value: object) -> str:
    """Floats to four significant digits without an exponent where that stays short; anything else as it prints."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _clips_html(clips: Mapping[str, Tensor], fps: float) -> str:
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for label, frames in clips.items():
            url = _data_url(write_video(Path(folder) / "clip.mp4", frames, fps))
            video = f'<video src="{url}" controls loop autoplay muted playsinline aria-label="{escape(label)}"></video>'
            figures.append(f"<figure>{video}<figcaption>{escape(label)}</figcaption></figure>")
    return f'<div class="grid">{"".join(figures)}</div>'


def _sheet_html(sheet: str | Path) -> str:
    sheet = Path(sheet)
    if not sheet.is_file():
        raise ValueError(f"write_report: sheet: expected an image file, got {str(sheet)!r}; write it by contact_sheet")
    image = f'<img class="sheet" src="{_data_url(sheet)}" alt="Frames of each clip, one clip a row">'
    return f'<div class="scroll">{image}</div>'


def _numbers_html(table: Mapping[str, Mapping[str, object]]) -> str:
    columns = list(next(iter(table.values())))
    for row, cells in table.items():
        if list(cells) != columns:
            raise ValueError(f"write_report: table: row {row!r}: expected columns {columns}, got {list(cells)}")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row)}</th>'
        + "".join(f"<td>{escape(_number(cell))}</td>" for cell in cells.values())
        + "</tr>"
        for row, cells in table.items()
    )
    body = f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="scroll"><table class="numbers">{body}</table></div>'


def _settings_html(heading: str, settings: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_number(value))}</td></tr>'
        for name, value in settings.items()
    )
    return f'<section><h2>{heading}</h2><table class="settings"><tbody>{rows}</tbody></table></section>'


def _nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round values from at or below ``low`` to at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span))
    step = next(step * factor for factor in (0.2, 0.25, 0.5, 1.0, 2.0) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _binned(values: Sequence[float], limit: int) -> list[tuple[float, float]]:
    """(step, mean) over runs of equal length, at most about ``limit``; values that are not finite are left out."""
    length = max(1, math.ceil(len(values) / limit))
    points = []
    for begin in range(0, len(values), length):
        finite = [value for value in values[begin : begin + length] if math.isfinite(value)]
        if finite:
            points.append((begin + (min(length, len(values) - begin) + 1) / 2, fmean(finite)))
    return points


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred mean over a tenth of the points, narrower at both ends so that no end is dragged inwards."""
    reach = len(points) // 20
    result = []
    for index, (step, _) in enumerate(points):
        width = min(reach, index, len(points) - 1 - index)
        result.append((step, fmean(value for _, value in points[index - width : index + width + 1])))
    return result


def _losses_svg(losses: Sequence[float]) -> str:
    """Loss over steps: means of short runs of steps (thin) and their moving average (bold)."""
    points = _binned(losses, limit=240)
    if not points:
        return '<p class="note">No finite loss was recorded.</p>'
    ticks = _nice_ticks(min(value for _, value in points), max(value for _, value in points))
    left, right, top, bottom = 48, _WIDTH - 10, 10, 210

    def place(point: tuple[float, float]) -> str:
        x = left + (right - left) * (point[0] - 0.5) / len(losses)
        y = bottom - (bottom - top) * (point[1] - ticks[0]) / (ticks[-1] - ticks[0])
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in ticks:
        y = float(place((0.5, tick)).split(",")[1])
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="faint" x="{left - 6}" y="{y + 4}" text-anchor="end">{_number(round(tick, 10))}</text>'
        )
    for kind, line in (("raw", points), ("smooth", _smoothed(points))):
        parts.append(f'<polyline class="{kind}" points="{" ".join(map(place, line))}"/>')
    parts.append(f'<text class="faint" x="{left}" y="{bottom + 18}">0</text>')
    parts.append(f'<text class="faint" x="{right}" y="{bottom + 18}" text-anchor="end">{len(losses)} steps</text>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {bottom + 24}" role="img" aria-label="Training loss">{"".join(parts)}</svg>'
    broken = sum(not math.isfinite(value) for value in losses)
    note = f" {broken} of {len(losses)} steps had no finite loss." if broken else ""
    return f"<figure>{svg}<figcaption>Training loss; bold: moving average.{note}</figcaption></figure>"


def _alphas_svg(alphas: Mapping[str, float]) -> str:
    """One bar a layer over the full range 0 to 1."""
    pitch, parts = 24, []
    for row, (name, alpha) in enumerate(alphas.items()):
        if not 0 <= alpha <= 1:
            raise ValueError(f"write_report: alphas: {name}: expected a value in [0, 1], got {alpha}")
        y = row * pitch
        parts.append(f'<rect class="track" y="{y}" width="{_WIDTH}" height="{pitch - 4}" rx="3"/>')
        parts.append(f'<rect class="bar" y="{y}" width="{alpha * _WIDTH:.1f}" height="{pitch - 4}" rx="3"/>')
        parts.append(f'<text x="8" y="{y + 14}">{escape(name)}</text>')
        parts.append(f'<text x="{_WIDTH - 8}" y="{y + 14}" text-anchor="end">{alpha:.3f}</text>')
    height = len(alphas) * pitch
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Alpha per layer">{"".join(parts)}</svg>'
    note = "alpha per layer: the weight of the image branch; 1 is the image model, 0 the temporal layer alone."
    return f"<figure>{svg}<figcaption>{note}</figcaption></figure>"


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


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str = "",
    clips: Mapping[str, Float[Tensor, "3 frames height width"]],
    fps: float,
    sheet: str | Path | None = None,
    table: Mapping[str, Mapping[str, object]] | None = None,
    table_note: str = "",
    losses: Sequence[float] = (),
    alphas: Mapping[str, float] | None = None,
    config: Mapping[str, object] | None = None,
    environment: Mapping[str, object] | None = None,
    command: str = "",
) -> Path:
    """Write the page about a run. All text is escaped; a section without content is left out.

    Args:
        path: HTML file to write; parent folders are made.
        title: heading of the page.
        summary: one paragraph below it.
        clips: caption to clip, floating, in [0, 1]; shown in order as looping H.264 videos.
        fps: frames per second of all clips.
        sheet: image file, for example from `contact_sheet`.
        table: row to column to value; every row has the same columns. Floats are shown to four significant digits.
        table_note: how to read the table.
        losses: training loss per step; values that are not finite are counted below the curve.
        alphas: layer name to alpha, in [0, 1].
        config: settings of the run.
        environment: versions and hardware.
        command: what to run to get this page again.

    Returns:
        ``path`` as a `Path`.

    Raises:
        ValueError: rows with different columns, an alpha outside [0, 1], a missing sheet, or clips that
            `temporal_layers.recipes.data.video_io.write_video` refuses.
    """
    charts = "".join([_losses_svg(losses) if len(losses) else "", _alphas_svg(alphas) if alphas else ""])
    note = f'<p class="note">{escape(table_note)}</p>' if table_note else ""
    settings = [("Configuration", config), ("Environment", environment)]
    sections = {
        "Clips": _clips_html(clips, fps) if clips else "",
        "Frames": _sheet_html(sheet) if sheet is not None else "",
        "Numbers": _numbers_html(table) + note if table else "",
        "Training": f'<div class="grid">{charts}</div>' if charts else "",
    }
    body = "".join(f"<section><h2>{name}</h2>{html}</section>" for name, html in sections.items() if html)
    body += f'<div class="grid">{"".join(_settings_html(heading, rows) for heading, rows in settings if rows)}</div>'
    body += f"<section><h2>Run it again</h2><pre>{escape(command)}</pre></section>" if command else ""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page_html(title, summary, body), encoding="utf-8")
    return path
