"""Text for people: Markdown tables, durations, sizes in bytes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns: the first to the left, the others to the right.

    Examples
    --------
    >>> print(markdown(["arm", "top1"], [["finetune", "93.1"], ["scratch_e", "92.8"]]))
    | arm       | top1 |
    | --------- | ---: |
    | finetune  | 93.1 |
    | scratch_e | 92.8 |
    """
    # A rule that aligns to the right needs two characters: "-:".
    widths = [max(2, *map(len, cells)) for cells in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, [columns, rule, *rows]))


def duration(seconds: float) -> str:
    """Return seconds in the units that suit them.

    Examples
    --------
    >>> duration(59.6), duration(61), duration(7260)
    ('1 min 00 s', '1 min 01 s', '2 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: int) -> str:
    """Return bytes in the unit that suits them: three digits, units of 1000.

    Examples
    --------
    >>> size(512), size(3_412_072)
    ('512 B', '3.41 MB')
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def dotted_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, each with its dotted name.

    Examples
    --------
    >>> dict(dotted_items({"seed": 0, "recipe": {"lr": 0.1, "milestones": [80, 120]}}))
    {'seed': 0, 'recipe.lr': 0.1, 'recipe.milestones': [80, 120]}
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
