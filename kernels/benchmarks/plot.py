"""One picture of a run: how many times as long each provider takes as this library."""

from pathlib import Path

from temporal_layers.kernels.benchmarks.cases import OPS
from temporal_layers.kernels.benchmarks.report import grouped
from temporal_layers.kernels.benchmarks.run import Row

COLOURS = (
    "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd",
    "#2f4b7c", "#a05195", "#665191", "#003f5c",
)  # fmt: skip


def draw(path: Path, machine: dict, rows: list[Row]) -> None:
    """Draws the forward pass of every operator as bars, in the dtype that a model runs in on this kind of device.

    Args:
        path: PNG to write.
        machine: The document's machine.
        rows: The document's rows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtype = "bfloat16" if machine["kind"] == "cuda" else "float32"
    groups = [
        group for (_, _, kind, mode), group in grouped(rows).items() if kind == dtype and mode == "forward" and group
    ]
    present = [op for op in OPS if any(group[0]["op"] == op and timed(group) for group in groups)]
    figure = Figure(figsize=(11, 1 + 2.6 * max(len(present), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Forward pass, {dtype}, on {machine['device']}: time relative to ours (shorter is faster)")
    names = dict.fromkeys(row["provider"] for group in groups for row in group if row.get("versus_ours"))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    for index, op in enumerate(present):
        axes = figure.add_subplot(len(present), 1, index + 1)
        bars(axes, op, [group for group in groups if group[0]["op"] == op], colours)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def timed(group: list[Row]) -> dict[str, float]:
    """Factors against this library by provider, for those that have a time."""
    return {row["provider"]: row["versus_ours"] for row in group if row.get("versus_ours")}


def bars(axes, op: str, groups: list[list[Row]], colours: dict[str, str]) -> None:
    """Bars of one operator: a cluster for each case, a colour for each provider."""
    names = list(dict.fromkeys(row["provider"] for group in groups for row in group if row.get("versus_ours")))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        heights = [timed(group).get(name, 0.0) for group in groups]
        positions = [cluster + (place - (len(names) - 1) / 2) * width for cluster in range(len(groups))]
        drawn = axes.bar(positions, heights, width, label=name, color=colours[name])
        axes.bar_label(drawn, [f"{height:.1f}" if height else "" for height in heights], fontsize=6)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [group[0]["case"] for group in groups], fontsize=7)
    axes.set_title(op, fontsize=9, loc="left")
    axes.legend(fontsize=6, ncols=min(len(names), 6))
    axes.margins(y=0.15)
