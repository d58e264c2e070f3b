"""The printed comparison: a block per metric, a line per method, a column per sparsity."""

from __future__ import annotations

from torchprune_bayes.cli._experiment import DENSE
from torchprune_bayes.reports import ResultsTable
from torchprune_bayes.reports.layout import Cell, Row

# Column of the results, factor, decimals, title.
_BLOCKS = (
    ("accuracy", 100.0, 1, "Accuracy in %"),
    ("nll", 1.0, 2, "Negative log-likelihood in nats"),
    ("ece", 100.0, 1, "Expected calibration error in %"),
)


def in_blocks(table: ResultsTable, width: int | None = None) -> str:
    """Format the runs of a comparison for a terminal, averaged over seeds.

    Args:
        table: Rows as :class:`~torchprune_bayes.cli._experiment.Trial` makes them. The dense
            network, whose sparsity is 0, is repeated in every column to compare with.
        width: Columns of the terminal; if the lines are longer, the spread over seeds is left
            out.

    Example:
        >>> measured = {"nll": 0.1, "ece": 0.02, "seed": 0}
        >>> table = ResultsTable()
        >>> table.add(method="dense", sparsity=0.0, accuracy=0.98, **measured)
        >>> table.add(method="random", sparsity=0.5, accuracy=0.71, seconds=0.2, **measured)
        >>> print(in_blocks(table).partition("Negative")[0])
        Accuracy in % at each sparsity; seconds per run
        method   0.5  seconds
        ------  ----  -------
        dense   98.0
        random  71.0      0.2
    """
    whole = _blocks(table, with_spread=True)
    narrow = width is not None and max(map(len, whole.splitlines()), default=0) > width
    return _blocks(table, with_spread=False) if narrow else whole


def _blocks(table: ResultsTable, *, with_spread: bool) -> str:
    successes = ResultsTable(row for row in table if "error" not in row)
    summary = list(successes.summarise(["method", "sparsity"], [block[0] for block in _BLOCKS]))
    methods = list(dict.fromkeys(str(row["method"]) for row in table))
    sparsities = sorted({float(row["sparsity"]) for row in table if row["method"] != DENSE})
    blocks = []
    for value, factor, decimals, title in _BLOCKS:
        block = ResultsTable()
        for method in methods:
            rows = {row["sparsity"]: row for row in summary if row["method"] == method}
            cells: dict[str, Cell] = {"method": method}
            for sparsity in sparsities:
                row = rows.get(0.0 if method == DENSE else sparsity, {})
                parts = ("mean", "std") if with_spread else ("mean",)
                cells |= _spread(row, value, f"{sparsity:g}", factor, decimals, parts)
            if value == "accuracy":
                cells |= _seconds(table, method) | _error(table, method)
                title = "Accuracy in % at each sparsity; seconds per run"
            block.add(**cells)
        blocks.append(f"{title}\n{block}")
    return "\n\n".join(blocks)


def _spread(
    row: Row, value: str, name: str, factor: float, decimals: int, parts: tuple[str, ...]
) -> Row:
    # A mean without its spread is a plain column.
    return {
        f"{name}_{part}" if len(parts) > 1 else name: round(
            factor * float(row[f"{value}_{part}"]), decimals
        )
        for part in parts
        if row
    }


def _seconds(table: ResultsTable, method: str) -> Row:
    spent = [float(r["seconds"]) for r in table if r["method"] == method and "seconds" in r]
    return {"seconds": round(sum(spent) / len(spent), 2)} if spent else {}


def _error(table: ResultsTable, method: str) -> Row:
    errors = [row for row in table if row["method"] == method and "error" in row]
    if not errors:
        return {}
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return {"error": f"at {first['sparsity']:g}: {first['error']}{more}"}
