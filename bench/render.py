"""What `bench.kernels` measured, as Markdown tables and as a plot, from its JSON file alone."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CEILINGS = {"read": "of read bandwidth", "copy": "of copy bandwidth", "products": "of the products' rate"}
DOCS = Path(__file__).parents[1] / "docs"


def main(path: Path, picture: Path | None) -> int:
    """Prints the tables and draws the plot, by default docs/<name of the file>.svg."""
    results = json.loads(path.read_text(encoding="utf-8"))
    print("\n".join(tables(results)))
    plot(results, picture or DOCS / f"{path.stem}.svg")
    return 0


def origin(results: dict[str, Any]) -> str:
    """One line: machine, versions, commit, date."""
    machine, versions = results["machine"], results["versions"]
    gpu = f"{machine['gpu']}, driver {machine['driver']}, CUDA {versions['cuda']}; " if "gpu" in machine else ""
    cache = max(machine["caches_bytes"].values(), default=0) >> 20
    kernels = versions["fedpft"]["capability"] if not gpu else "cuda" if versions["fedpft"]["cuda"] else "reference"
    dirty = " with changes" if results["dirty"] else ""
    return (
        f"{gpu}{machine['cores']} x {machine['cpu']}, {cache} MiB last-level cache; torch {versions['torch']}, "
        f"Python {versions['python']}, {versions['compiler'] or 'no compiler'}, kernels {kernels}; "
        f"commit {results['commit']}{dirty}, {results['date']}"
    )


def tables(results: dict[str, Any]) -> list[str]:
    """Lines of Markdown: one table for each operator and set of peers, then the peak memory."""
    lines = [f"Measured on {origin(results)}.", ""]
    for rows in grouped(results["rows"]):
        lines += [*_table(rows), ""]
    for rows in grouped(results["memory"]):
        lines += [*_memory_table(rows), ""]
    return lines


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that have the same columns, in the order in which they were measured."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        columns = tuple(row["peers"] if "peers" in row else row["peak_bytes"])
        groups.setdefault((row["operator"], row["does"], columns), []).append(row)
    return list(groups.values())


def line(row: Row) -> str:
    """A row by itself, printed as soon as it is measured."""
    texts = (f"{name} {_ratio(peer)}{why(peer)}" for name, peer in row["peers"].items())
    return f"{row['operator']}, {_name(row)}: {_time(row['kernel'])}{why(row['kernel'])}; {', '.join(texts)}"


def memory_line(row: Row) -> str:
    """The peak memory of a case by itself."""
    texts = (f"{name} {_mebibytes(peak)}" for name, peak in row["peak_bytes"].items())
    return f"{row['operator']}, {row['case']}: peak memory, MiB: {', '.join(texts)}"


def _table(rows: Sequence[Row]) -> list[str]:
    peers = list(rows[0]["peers"])
    threads = any(row["threads"] != rows[0]["threads"] for row in rows)
    head = ["case", *(["threads"] if threads else []), "kernel, ms", "quartiles", CEILINGS[rows[0]["ceiling"]["of"]]]
    lines = [f"`{rows[0]['operator']}`, {rows[0]['does']}", "", *_head([*head, *peers])]
    notes: dict[str, None] = {}
    for row in rows:
        share = row["ceiling"]["share"]
        cells = [
            _name(row),
            *([str(row["threads"])] if threads else []),
            _time(row["kernel"]),
            _quartiles(row["kernel"]),
        ]
        cells += ["" if share is None else f"{share:.2f}", *map(_ratio, row["peers"].values())]
        lines.append(f"| {' | '.join(cells)} |")
        if row["runs"] == "reference":
            notes["- kernel: not compiled for this device, its reference ran"] = None
        for name, outcome in (("kernel", row["kernel"]), *row["peers"].items()):
            if reason := why(outcome):
                notes[f"- {name}{reason}"] = None
    return lines + ([""] if notes else []) + list(notes)


def _memory_table(rows: Sequence[Row]) -> list[str]:
    names = list(rows[0]["peak_bytes"])
    first, *others = names
    title = f"`{rows[0]['operator']}`, peak memory of {rows[0]['does']}, MiB; in brackets, as a share of `{first}`"
    threads = any(row["threads"] != rows[0]["threads"] for row in rows)
    lines = [title, "", *_head(["case", *(["threads"] if threads else []), *names])]
    for row in rows:
        peak = row["peak_bytes"]
        cells = [*([str(row["threads"])] if threads else []), _mebibytes(peak[first])]
        for name in others:
            known = isinstance(peak[name], int) and isinstance(peak[first], int)
            cells.append(_mebibytes(peak[name]) + (f" ({peak[name] / max(1, peak[first]):.2f})" if known else ""))
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]


def _name(row: Row) -> str:
    kind = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{row['case']}{kind}{', warm' if row['warm'] else ''}"


def _time(outcome: Row) -> str:
    return f"{1e3 * outcome['median_seconds']:.3g}" if "median_seconds" in outcome else _short(outcome)


def _quartiles(outcome: Row) -> str:
    return " to ".join(f"{1e3 * seconds:.3g}" for seconds in outcome.get("quartiles_seconds", ()))


def _ratio(outcome: Row) -> str:
    return f"{outcome['ratio']:.2f}" if "ratio" in outcome else _short(outcome)


def _short(outcome: Row) -> str:
    return "failed" if "failed" in outcome else "-" if "not_run" in outcome else ""


def why(outcome: Row) -> str:
    """What to say of an outcome that is no time."""
    text = outcome.get("failed") or outcome.get("not_run")
    return f": {text}" if text else ""


def _mebibytes(peak: int | str) -> str:
    return f"{peak / (1 << 20):.1f}" if isinstance(peak, int) else peak


# The plot

INK, MUTED, RULE, SLOWER = "#1a1a1a", "#5a5a5a", "#c4c4c4", "#f1ece6"
MARKS: dict[str, dict[str, Any]] = {  # told apart by shape and by fill, so that it reads in grey
    "published": {"marker": "^", "color": "#222222"},
    "published hook": {"marker": "^", "color": "#222222", "fill": False},
    "eager": {"marker": "o", "color": "#666666"},
    "eager + hook": {"marker": "s", "color": "#666666"},
    "eager, gathered": {"marker": "o", "color": "#666666", "fill": False},
    "eager, sums": {"marker": "o", "color": "#666666", "fill": False},
    "eager, in place": {"marker": "o", "color": "#666666", "fill": False},
    "eager, float64": {"marker": "o", "color": "#666666"},
    "eager, float32": {"marker": "s", "color": "#666666"},
    "eager, float32 blocks": {"marker": "s", "color": "#666666", "fill": False},
    "two norms": {"marker": "s", "color": "#666666", "fill": False},
    "squares": {"marker": "D", "color": "#222222", "fill": False},
    "split": {"marker": "v", "color": "#222222"},
    "cat": {"marker": "v", "color": "#222222", "fill": False},
    "packed": {"marker": "P", "color": "#222222"},
    "cublasLt": {"marker": "P", "color": "#222222", "fill": False},
    "compile": {"marker": "D", "color": "#c0561a"},
}


def plot(results: dict[str, Any], path: Path) -> None:
    """Every ratio of every row on a logarithmic axis, one panel for each table; left of 1 the kernel is the slower."""
    import matplotlib  # not for those who only measure
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    groups = [
        [row for row in rows if any("ratio" in peer for peer in row["peers"].values())]
        for rows in grouped(results["rows"])
    ]
    groups = [rows for rows in groups if rows]
    ratios = [p["ratio"] for rows in groups for row in rows for p in row["peers"].values() if "ratio" in p]
    left, right = min(0.8, *ratios) / 1.15, max(2.0, *ratios) * 1.15
    heights = [max(len(rows) + 1.9, 0.85 * len(rows[0]["peers"]) + 0.5) for rows in groups]
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "fedpft", "font.size": 8.5, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.4, 0.19 * sum(heights) + 0.5))
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, rows in zip(panels, groups, strict=True):
            _panel(axes, rows)
            axes.set_xlim(left, right)
            axes.set_xscale("log")
            axes.axvspan(left, 1.0, color=SLOWER, zorder=0, linewidth=0)
        ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if left <= tick <= right]
        panels[-1].set_xticks(ticks, minor=False)
        panels[-1].set_xticks([], minor=True)
        panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[-1].tick_params(axis="x", colors=MUTED)
        panels[-1].set_xlabel("peer's time / kernel's time: right of 1 the kernel is faster", color=MUTED)
        top, bottom = 1 - 0.3 / figure.get_figheight(), 0.45 / figure.get_figheight()
        figure.subplots_adjust(left=0.43, right=0.82, top=top, bottom=bottom, hspace=0)
        figure.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})


def _look(peer: str) -> dict[str, Any]:
    mark = MARKS[peer]
    face = mark["color"] if mark.get("fill", True) else "white"
    return {"linestyle": "", "marker": mark["marker"], "color": mark["color"], "markerfacecolor": face, "markersize": 5}


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    for height, row in enumerate(rows):
        for name, peer in row["peers"].items():
            if "ratio" in peer:
                axes.plot(peer["ratio"], height, **_look(name))
    for name in rows[0]["peers"]:
        axes.plot([], [], **_look(name), label=name)
    axes.axvline(1.0, color=INK, linewidth=0.9, zorder=1)
    axes.set_ylim(len(rows) - 0.4, -1.5)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
    axes.tick_params(axis="both", length=0)
    axes.grid(axis="both", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    title = f"{rows[0]['operator']}, {rows[0]['does']}"
    axes.text(-0.005, -1.0, title, transform=axes.get_yaxis_transform(), ha="right", va="center", fontweight="bold")
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.3,
        frameon=False,
        handletextpad=0.2,
        labelspacing=0.25,
        fontsize=8,
    )
