"""Result files: JSON for machines, a Markdown table for people."""

import json
from pathlib import Path

from temporal_layers.kernels.benchmarks.cases import OPS
from temporal_layers.kernels.benchmarks.run import Row

# What stands for today's practice in the summary, the first that has a time.
PRACTICE = ("diffusers", "eager", "sdpa", "conv3d")

COLUMNS = (
    "case", "dtype", "pass", "provider", "median µs", "20 to 80 %", "TB/s", "% of copy", "TFLOP/s", "% of GEMM",
    "peak MB", "time / ours",
)  # fmt: skip


def save(path: Path, machine: dict, ceilings: dict, rows: list[Row]) -> None:
    """Writes the JSON document."""
    document = {"machine": machine, "ceilings": ceilings, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> tuple[dict, dict, list[Row]]:
    """Reads a document that :func:`save` has written."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["machine"], document["ceilings"], document["rows"]


def markdown(machine: dict, ceilings: dict, rows: list[Row], *, details: bool = True) -> str:
    """The document in Markdown: the machine, a summary and, for details, a table for each operator."""
    parts = [f"# Benchmark on {machine['device']}\n", conditions(machine, ceilings), summary(rows)]
    for op in OPS:
        mine = [row for row in rows if row["op"] == op]
        if mine and details:
            parts.append(f"## {op}\n\n" + table(COLUMNS, 4, [cells(row) for row in mine]))
    return "\n".join(parts)


def conditions(machine: dict, ceilings: dict) -> str:
    """What the figures hold for."""
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "cudnn", "diffusers") if machine.get(name)
    )
    if machine["kind"] == "cuda":
        clock = "device time, each call on a cold L2 cache"
    elif machine["threads"] == 1:
        clock = "CPU time of one thread"
    else:
        clock = f"wall time of {machine['threads']} threads"
    gemm = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in ceilings["gemm"].items())
    return (
        f"{versions}; commit {machine['commit']}. Times are {clock}, medians of calls in turns. Load of the machine: "
        f"{machine['load']} on {machine['cores']} cores.\n\n"
        f"Measured ceilings: copy {ceilings['copy'] / 1e12:.3g} TB/s; matrix product {gemm}.\n"
    )


def summary(rows: list[Row]) -> str:
    """How many times as long today's practice takes as this library, for each case."""
    lines = [headline(group) for group in grouped(rows).values()]
    found = [line for line in lines if line]
    columns = ("operator", "case", "dtype", "pass", "ours", "against", "time / ours")
    return "## Summary\n\n" + (table(columns, 6, found) if found else "No provider has a time.\n")


def headline(group: list[Row]) -> tuple[str, ...] | None:
    """The summary's line for one operator, case, dtype and mode; None without both sides."""
    times = {row["provider"]: row for row in group if row.get("median_us")}
    ours = next((name for name in ("fused", "reference") if name in times), None)
    peer = next((name for name in PRACTICE if name in times), None)
    if ours is None or peer is None:
        return None
    first = group[0]
    return (
        first["op"], first["case"], first["dtype"], first["mode"], ours, peer, f"{times[peer]['versus_ours']:.2f}",
    )  # fmt: skip


def grouped(rows: list[Row]) -> dict[tuple, list[Row]]:
    """Rows of the same measurement by operator, case, dtype and mode."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"], row["dtype"], row["mode"]), []).append(row)
    return groups


def cells(row: Row) -> tuple[str, ...]:
    """A row of an operator's table."""
    first = row["case"], row["dtype"], row["mode"], row["provider"]
    if row["error"]:
        # Markdown would take a bar for the end of the cell.
        return *first, str(row["error"]).replace("|", "\\|"), *[""] * (len(COLUMNS) - 5)
    spread = f"{row['p20_us']:,.0f} to {row['p80_us']:,.0f}"
    peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}"
    ratio = "" if row["versus_ours"] is None else f"{row['versus_ours']:.2f}"
    computes = bool(row["flops"])
    return (
        *first, f"{row['median_us']:,.0f}", spread, f"{row['tb_per_s']:.3g}", f"{row['percent_of_copy']:.0f}",
        f"{row['tflop_per_s']:.3g}" if computes else "", f"{row['percent_of_gemm']:.0f}" if computes else "",
        peak, ratio,
    )  # fmt: skip


def table(columns: tuple[str, ...], words: int, lines: list[tuple[str, ...]]) -> str:
    """A Markdown table whose first ``words`` columns are left-aligned and whose others are numbers."""
    rule = "|" + " --- |" * words + " ---: |" * (len(columns) - words)
    return "\n".join(["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines), ""])
