"""What went where in a conversion."""

from dataclasses import dataclass

from temporal_layers.adapters.convert.source import Source

__all__ = ["ConversionReport"]


@dataclass(frozen=True)
class ConversionReport:
    """Every name of a file, and what became of it. ``print`` it, or look for what you expect.

    Attributes:
        source: the format that was found.
        licence: what is known of the weights' licence; kept in the adapter's metadata.
        loaded: names in the file, with the full names in the model that got their values.
        ignored: names that were left out on purpose, with the reason.
        unknown: names nobody knows; empty unless they were allowed.
        notes: what else there is to know.
    """

    source: Source
    licence: str
    loaded: dict[str, tuple[str, ...]]
    ignored: dict[str, str]
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """A few lines: the format, counts by reason, notes, licence."""
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        for reason in dict.fromkeys(self.ignored.values()):
            count = sum(value == reason for value in self.ignored.values())
            lines.append(f"  {count} ignored: {reason}")
        if self.unknown:
            lines.append(f"  {len(self.unknown)} unknown, not loaded: {', '.join(self.unknown)}")
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(f"  licence: {self.licence}")
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"{name} -> {', '.join(targets)}" for name, targets in self.loaded.items()]
        lines += [f"{name} ignored: {reason}" for name, reason in self.ignored.items()]
        lines += [f"{name} unknown" for name in self.unknown]
        return "\n".join([self.summary(), *lines])
