"""Makes the page performance.md and its drawings from the results in kernels/benchmarks/results.

python docs/performance.py
"""

import sys
from html import escape
from pathlib import Path

from temporal_layers.kernels.benchmarks.report import (
    PRACTICE,
    Row,
    conditions,
    grouped,
    headline,
    load,
    summary,
)

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "kernels" / "benchmarks" / "results"

INTRODUCTION = """# Performance

Made by `docs/performance.py` from the files in `kernels/benchmarks/results`, and from nothing else; `python3 dev.py
bench` writes such a file for your machine. How it is measured, what is expected of a GPU, and what the figures mean
stands in [Kernels](kernels.md#how-it-measures).
"""

READING = """The bars show how many times as long today's practice takes as this library for a forward pass: beyond
the line at 1 this library is faster, before it slower. Both were measured in one run, by turns. Practice is the first
of {practice} that has a time.
"""

BAR, GAP, LEFT, WIDTH, UNIT = 14, 6, 350, 760, 150
"""Of a drawing, in pixels: bar, gap between bars, room for names, whole width, length of a factor of 1."""


def documents() -> list[Path]:
    """Results of the operators' benchmark; a GPU's first."""
    found = [path for path in sorted(RESULTS.glob("*.json")) if not path.name.startswith("models-")]
    return sorted(found, key=lambda path: load(path)[0]["kind"] != "cuda")


def bars(rows: list[Row]) -> list[tuple[str, str, float]]:
    """Operator and case, practice, and its time over ours, for forward passes."""
    lines = [headline(group) for key, group in grouped(rows).items() if key[3] == "forward"]
    return [
        (f"{op} · {case} · {dtype.replace('float', 'fp').replace('bfp', 'bf')}", peer, float(ratio))
        for op, case, dtype, _, _, peer, ratio in (line for line in lines if line)
    ]


def drawing(title: str, lines: list[tuple[str, str, float]]) -> str:
    """The bars as SVG in the colours of the page."""
    longest = max(1.0, *(ratio for *_, ratio in lines))
    unit = min(UNIT, (WIDTH - LEFT - 110) / longest)
    height = (BAR + GAP) * len(lines) + 34
    parts = [
        f'<svg class="figure" viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title>",
        "<style>.figure{color:#1f2328;font:12px system-ui,sans-serif}.figure .bar{fill:#3b7dd8}"
        ".figure .lost{fill:#c9733a}@media(prefers-color-scheme:dark){.figure{color:#d8dee4}}</style>",
    ]
    for index, (name, peer, ratio) in enumerate(lines):
        top = 24 + index * (BAR + GAP)
        kind = "bar" if ratio >= 1 else "lost"
        parts += [
            f'<text x="{LEFT - 8}" y="{top + 11}" text-anchor="end" fill="currentColor">{escape(name)}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{unit * ratio:.1f}" height="{BAR}" rx="2"/>',
            f'<text x="{LEFT + unit * ratio + 6:.1f}" y="{top + 11}" fill="currentColor">{ratio:.2f} {peer}</text>',
        ]
    one = LEFT + unit
    parts += [
        f'<path d="M{one:.1f} 18V{height - 8}" stroke="currentColor" stroke-dasharray="3 3" fill="none"/>',
        f'<text x="{one:.1f}" y="13" text-anchor="middle" fill="currentColor">this library = 1</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def page() -> dict[str, str]:
    """Name in docs/ to content: the page and the drawings on it."""
    files: dict[str, str] = {}
    parts = [INTRODUCTION]
    practice = ", ".join(f"`{name}`" for name in PRACTICE)
    for path in documents():
        machine, ceilings, rows = load(path)
        name, title = f"assets/performance-{path.stem}.svg", f"Time of practice over ours on {machine['device']}"
        files[name] = drawing(title, bars(rows))
        parts += [
            f"## {machine['device']}\n",
            conditions(machine, ceilings),
            READING.format(practice=practice),
            f"![{title}]({name})\n",
            summary(rows).replace("## Summary", "### All of them, and backward passes"),
        ]
    return {"performance.md": "\n".join(parts), **files}


def main() -> int:
    """Write the files."""
    for name, text in page().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
