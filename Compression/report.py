"""What pruning did, as text tables."""

from collections.abc import Sequence

from torch import Tensor

from Model.complexity import LayerCost, layer_costs, macs, parameters
from Model.generator import Generator


def _factor(before: int, after: int) -> str:
    return f"{before / after:.2f}x"


def summary(before: Generator, after: Generator) -> str:
    """Before and after: channels per layer, parameters, MACs, ratio."""
    names = ["input", "conv1", *(f"convs.{i}" for i in range(len(before.convs)))]
    rows = [("", "before", "after", "ratio")]
    for name, old, new in zip(names, before.channels, after.channels, strict=True):
        rows.append((f"channels of {name}", f"{old}", f"{new}", _factor(old, new)))
    for what, count in (("parameters", parameters), ("MACs per image", macs)):
        old, new = count(before), count(after)
        rows.append((what, f"{old:,}", f"{new:,}", _factor(old, new)))
    return "\n".join(f"{a:<22} {b:>16} {c:>16} {d:>8}" for a, b, c, d in rows)


def _layer_row(old: LayerCost, new: LayerCost) -> str:
    shape = f"{old.in_channels}>{old.out_channels}", f"{new.in_channels}>{new.out_channels}"
    saved = _factor(old.macs, new.macs) if old.macs else ""
    return (
        f"{old.name:<10} {old.side or '':>5} {shape[0]:>9} {shape[1]:>9}"
        f" {old.parameters:>11,} {new.parameters:>11,} {old.macs:>15,} {new.macs:>14,} {saved:>7}"
    )


def details(before: Generator, after: Generator) -> str:
    """Width, parameters and MACs of every layer, before and after."""
    head = (
        f"{'layer':<10} {'px':>5} {'in>out':>9} {'after':>9}"
        f" {'parameters':>11} {'after':>11} {'MACs':>15} {'after':>14} {'ratio':>7}"
    )
    costs = zip(layer_costs(before), layer_costs(after), strict=True)
    return "\n".join([head, *(_layer_row(old, new) for old, new in costs)])


def score_table(scores: Sequence[Tensor], keep: Sequence[Tensor]) -> str:
    """Range of the removed and of the kept scores of every channel group."""
    lines = [f"{'group':<6} {'removed':>8} {'with scores from .. to':>26} {'kept':>6} {'':>26}"]
    for i, (values, mask) in enumerate(zip(scores, keep, strict=True)):
        cells = []
        for part in (values[~mask], values[mask]):
            ends = f"{part.min():.4g} .. {part.max():.4g}" if len(part) else ""
            cells += [f"{len(part)}", ends]
        lines.append(f"{i:<6} {cells[0]:>8} {cells[1]:>26} {cells[2]:>6} {cells[3]:>26}")
    return "\n".join(lines)
