"""The rows that bench.py measures: as a Markdown table, and drawn against perplexity."""

from dataclasses import dataclass
from pathlib import Path

from errors import UserError

HIGH = 2.5  # of perplexities, against the lowest of a plot


@dataclass
class Row:
    """One line of the table. SI units; the median over the turns."""

    mode: str
    perplexity: float | None
    decode_tokens_per_s: float
    ratio_to_bf16: float | None
    bandwidth_bytes_per_s: float
    percent_of_read_bandwidth: float
    peak_memory_bytes: int
    weight_bytes: int
    time_to_first_token_s: float
    spread: float  # (max - min) / median of the turns' decode speeds
    noisy: bool


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["Technique", "Perplexity", "Tokens/s", "x bf16", "Bandwidth GB/s", "% of read",
            "Peak memory GB", "Model size GB", "First token ms"]  # fmt: skip
    cells = [head]
    for row in rows:
        cells.append([
            row.mode,
            "-" if row.perplexity is None else f"{row.perplexity:.3f}",
            f"{row.decode_tokens_per_s:.1f}" + (" (noisy)" if row.noisy else ""),
            "-" if row.ratio_to_bf16 is None else f"{row.ratio_to_bf16:.2f}",
            f"{row.bandwidth_bytes_per_s / 1e9:.1f}",
            f"{row.percent_of_read_bandwidth:.0f}%",
            f"{row.peak_memory_bytes / 1e9:.3f}",
            f"{row.weight_bytes / 1e9:.3f}",
            f"{row.time_to_first_token_s * 1e3:.1f}",
        ])  # fmt: skip
    return markdown(cells)


def markdown(cells: list[list[str]]) -> str:
    """A head and lines as a table, all but the first column right-aligned."""
    cells = [cells[0], ["---"] + ["---:"] * (len(cells[0]) - 1), *cells[1:]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pyplot():
    """matplotlib's pyplot, drawing to files, or a UserError that says how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}): pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def check_plot(path: Path | None) -> None:
    """A UserError, before the work begins, if no plot can be drawn into the file."""
    if path is None:
        return
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: a .png, .pdf or .svg file")
    pyplot()


def plot(rows: list[Row], path: Path, title: str = "") -> None:
    """Draw tokens/s and model size against perplexity, a labelled point for each row.

    What is over HIGH times the lowest perplexity stands at the top edge, its value in the label.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(15, 8))
    quantities = (
        ("tokens/s", lambda row: row.decode_tokens_per_s),
        ("model size, MB", lambda row: row.weight_bytes / 1e6),
    )
    points = [row for row in rows if row.perplexity is not None]
    top = HIGH * min((row.perplexity for row in points), default=1)
    for axis, (name, pick) in zip(axes, quantities, strict=True):
        for row in points:
            over = row.perplexity > top
            where = (pick(row), top if over else row.perplexity)
            axis.plot(*where, "^" if over else "o", color="C1" if over else "C0")
            axis.annotate(
                f"{row.mode}  {row.perplexity:.3g}" if over else row.mode, where, xytext=(2, 5),
                textcoords="offset points", fontsize="x-small", rotation=60,
            )  # fmt: skip
        axis.set(xlabel=name, ylabel="perplexity", yscale="log")
        axis.margins(y=0.12)
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    save(figure, path)


def save(figure, path: Path) -> None:
    """Write a figure to a file and close it."""
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    pyplot().close(figure)
