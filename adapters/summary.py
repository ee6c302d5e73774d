"""The printed table of an adapter."""

from collections.abc import Mapping

from torch import nn

from temporal_layers.adapters.scale import scale_of

__all__ = ["table"]


def table(layers: Mapping[str, nn.Module]) -> list[str]:
    """Lines of a table: a row for every layer, by the name of its site, under two lines of head.

    The strength of the layers has a column only where one is not 1.
    """
    head = ["site", "layer", "channels", "heads", "text", "alpha", "parameters"]
    rows = [head, *(_row(name, layer) for name, layer in layers.items())]
    if any(scale_of(layer) != 1 for layer in layers.values()):
        for row, text in zip(rows, ["scale", *(f"{scale_of(layer):g}" for layer in layers.values())], strict=True):
            row.insert(-1, text)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if index < 2 else cell.rjust(width) for index, (cell, width) in cells)
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _row(name: str, layer: nn.Module) -> list[str]:
    # From the layer and not from the site, whose heads the options may overrule.
    attention = next(iter(getattr(layer, "attentions", ())), None)
    heads = "-" if attention is None else f"{attention.num_heads}x{attention.head_dim}"
    channels = layer.dim if hasattr(layer, "dim") else layer.channels
    text = getattr(layer, "context_dim", None) or "-"
    count = sum(parameter.numel() for parameter in layer.parameters())
    return list(map(str, (name, type(layer).__name__, channels, heads, text, _alpha_text(layer), f"{count:,}")))


def _alpha_text(layer: nn.Module) -> str:
    if not hasattr(layer, "blend"):
        return "-"
    alpha = layer.blend.alpha.detach()
    if alpha.is_meta:
        return f"{layer.blend.config.init:.3f}"
    low, high = alpha.min().item(), alpha.max().item()
    return f"{low:.3f}" if low == high else f"{low:.3f}..{high:.3f}"
