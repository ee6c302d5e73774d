"""Which arms are compared, what the paper found, and the table that says what was found here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Results = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Numbers by arm, by seed, by name."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A question with two arms.

    Attributes:
        question: What is asked.
        without: Arm that lacks something.
        with_it: Arm that has it.
        metric: Which of their numbers is compared.
        paper: What the paper reports, in its own units.
        higher: Whether more is better.
    """

    question: str
    without: str
    with_it: str
    metric: str = "frechet"
    paper: str
    higher: bool = False

    def gains(self, results: Results) -> dict[int, float]:
        """By seed, how much better the arm with it is; positive if it is better."""
        sign = 1 if self.higher else -1
        both = results.get(self.without, {}).keys() & results.get(self.with_it, {}).keys()
        return {
            seed: sign * (results[self.with_it][seed][self.metric] - results[self.without][seed][self.metric])
            for seed in sorted(both)
        }


NAMES = {
    "frechet": "Fréchet distance",
    "difference": "frame difference",
    "motion": "motion agreement",
    "psnr": "PSNR (dB)",
    "flicker": "flicker",
}


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; the value itself if there is one."""
    if len(values) < 2:
        return f"{values[0]:.3g}"
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.2g}"


def verdict(gains: Mapping[int, float]) -> str:
    """Whether the sign is the paper's, and with how many seeds."""
    right, count = sum(gain > 0 for gain in gains.values()), len(gains)
    if right == count:
        return f"yes, {right} of {count} seeds"
    return f"**no**, {right} of {count} seeds" if right == 0 else f"**not with every seed**, {right} of {count}"


def comparison_table(comparisons: Sequence[Comparison], results: Results) -> str:
    """Markdown: one row a question; questions whose runs are missing are left out."""
    rows = ["| question | measure | without | with | as in the paper? | the paper |", "|---|---|---|---|---|---|"]
    for one in comparisons:
        gains = one.gains(results)
        if not gains:
            continue
        values = [[results[arm][seed][one.metric] for seed in gains] for arm in (one.without, one.with_it)]
        measure = f"{NAMES[one.metric]} {'↑' if one.higher else '↓'}"
        cells = [one.question, measure, spread(values[0]), spread(values[1]), verdict(gains), one.paper]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def arm_table(results: Results) -> str:
    """Markdown: every number of every arm."""
    found = [name for name in NAMES if any(name in row for arm in results.values() for row in arm.values())]
    rows = [f"| arm | seeds | {' | '.join(NAMES[name] for name in found)} |", "|---" * (2 + len(found)) + "|"]
    for arm, by_seed in results.items():
        columns = ([row[name] for row in by_seed.values() if name in row] for name in found)
        cells = [spread(values) if values else "" for values in columns]
        rows.append(f"| {arm.replace('_', ' ')} | {len(by_seed)} | {' | '.join(cells)} |")
    return "\n".join(rows)
