"""The report's figures, each an SVG element that takes its colours and its font from the page around it.

matplotlib knows no CSS, so it draws with stand-in colours which are then replaced by CSS variables: one drawing is
readable on a light and on a dark page.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedpft.data.rows import alike
from fedpft.tasks import Metric

INK, MUTED, RULE, ACCENT, SECOND, THIRD, PAGE = (f"#0000{number:02x}" for number in range(1, 8))
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", SECOND: "second", THIRD: "third"}
VARIABLES[PAGE] = "page"

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedpft",  # the same numbers give the same file
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.06,
}
EACH_LAYER_NAMED = 14  # beyond so many there is no room
WIDTH_INCHES, HEIGHT_INCHES = 7.4, 2.7
ONCE = {"layer-level": "layer-level distillation", "refinement": "refinement after plug-in"}  # stages, and titles
MOST_SILOS, MOST_LABELS = 120, 30  # that are told apart
EACH_SILO_NAMED, EACH_SILO_COUNTED = 20, 8
NAME_CHARACTERS = 18
# Up to this share: so opaque. No limit is near the share of one of few or of 10 or 20 equal labels.
SHADES = ((0.03, 0.12), (0.12, 0.28), (0.28, 0.48), (0.6, 0.72), (1.0, 1.0))
LIGHT_TEXT_ABOVE = 0.28


def score_by_round(
    rounds: Sequence[Mapping[str, Any]],
    reference: Mapping[str, float],
    metric: Metric,
    by: str = "round",
    *,
    from_zero: bool = True,
) -> str:
    """The headline of proxy and plugged-in model by round; `reference` are rows without rounds, drawn as levels.

    Args:
        by: another key of `rounds` that has whole numbers, and what is written below them.
        from_zero: whether a share is drawn from 0, or as far as the values reach.
    """
    series = {
        name: [(entry[by], entry[name]) for entry in rounds if entry.get(name) is not None]
        for name in ("proxy", "plugged_in")
    }
    if not any(series.values()):
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels(1)
        for (name, points), color, marker in zip(series.items(), (SECOND, ACCENT), ("s", "o"), strict=True):
            if points:
                label = name.replace("_", "-")
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label, clip_on=False)
        for (name, level), dashes in zip(reference.items(), ((5, 3), (1.5, 2.5), (8, 2)), strict=False):
            axes.axhline(level, color=MUTED, linewidth=1.1, dashes=dashes, label=name)
        axes.set_xlabel(by)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if metric.percent:
            axes.set_ylim(bottom=0 if from_zero else None)
            _percent(axes)
        _legend_beside(axes)
        said = "; ".join(
            f"{name.replace('_', '-')} from {metric.shown(points[0][1])} to {metric.shown(points[-1][1])}"
            for name, points in series.items()
            if points
        )
        return _svg(figure, f"Line chart of test {metric.title} by {by}: {said}.")


def distillation_loss(stages: Sequence[Mapping[str, Any]]) -> str:
    """Loss by step: what was done once in a panel of its own, the alignments in one, one after another."""
    stages = [stage for stage in stages if stage["loss"]]
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        panels.setdefault(ONCE.get(stage["stage"], "alignment"), []).append(stage)
    if not panels:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, all_axes = _panels(len(panels))
        for axes, (title, panel) in zip(all_axes, panels.items(), strict=True):
            start = 1
            for stage in panel:
                losses = stage["loss"]
                steps = range(start, start + len(losses))
                axes.plot(steps, losses, color=ACCENT, linewidth=0.8, alpha=0.35)
                axes.plot(steps, _smooth(losses), color=ACCENT)
                if title not in ONCE.values():
                    _name_span(axes, stage["stage"], start, len(losses))
                start += len(losses)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
        said = "; ".join(f"{stage['stage']} from {stage['loss'][0]:.3g} to {stage['loss'][-1]:.3g}" for stage in stages)
        return _svg(figure, f"Line chart of distillation loss by step: {said}.")


def alignment_gap(layers: Sequence[int], stages: Sequence[Mapping[str, Any]]) -> str:
    """Relative hidden-state error, and cosine of the adapter's gradients, per layer and stage."""
    panels = [
        (key, title)
        for key, title in (("hidden_error", "relative hidden-state error"), ("gradient_cosine", "gradient cosine"))
        if any(stage.get(key) for stage in stages)
    ]
    if not panels:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, all_axes = _panels(len(panels))
        for axes, (key, title) in zip(all_axes, panels, strict=True):
            shown = [stage for stage in stages if stage.get(key)]
            for number, stage in enumerate(shown):
                # The first stage is the gap that everything after it is to close.
                look: dict[str, Any] = (
                    {"color": MUTED, "linestyle": (0, (4, 2.5)), "marker": "s"}
                    if number == 0
                    else {"color": ACCENT, "alpha": 0.3 + 0.7 * number / (len(shown) - 1), "marker": "o"}
                )
                axes.plot(layers, stage[key], label=stage["stage"], clip_on=False, **look)
            axes.set_title(title)
            _layers(axes, layers)
            axes.set_ylim(bottom=min(0.0, *(value for stage in shown for value in stage[key])))
            if key == "gradient_cosine":
                axes.set_ylim(top=1.0)
        _legend_beside(all_axes[-1])
        said = "; ".join(
            f"{title} {_mean(stage[key]):.3g} {stage['stage']}"
            for key, title in panels
            for stage in stages
            if stage.get(key)
        )
        return _svg(figure, f"Line charts per layer; means over layers: {said}.")


def saliency_kept(layers: Sequence[int], share: Sequence[float]) -> str:
    """Share of each layer's squared saliency that the kept neurons hold."""
    if not share:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels(1)
        bars = axes.bar(layers, share, width=0.62, color=[THIRD if value >= 1 else ACCENT for value in share])
        if len(layers) <= EACH_LAYER_NAMED:
            axes.bar_label(bars, [f"{value:.0%}" for value in share], padding=3, color=INK)
        _layers(axes, layers)
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        _percent(axes)
        said = ", ".join(f"layer {layer} {value:.0%}" for layer, value in zip(layers, share, strict=True))
        return _svg(figure, f"Bar chart of the saliency kept: {said}.")


def rows_compared(found: Mapping[str, float], metric: Metric, strong: str = "plugged_in") -> str:
    """The headline of every row, best first; the product, `strong`, stands out."""
    if not found:
        return ""
    ranked = sorted(found.items(), key=lambda row: row[1], reverse=not metric.more_is_better)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels(1, height_inches=0.5 + 0.27 * len(ranked))
        colors = [ACCENT if name == strong else THIRD for name, _ in ranked]
        bars = axes.barh([name for name, _ in ranked], [value for _, value in ranked], height=0.66, color=colors)
        axes.bar_label(bars, [metric.shown(value) for _, value in ranked], padding=4, color=INK)
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.margins(y=0.02)
        said = ", ".join(f"{name} {metric.shown(value)}" for name, value in reversed(ranked))
        return _svg(figure, f"Bar chart of test {metric.title}: {said}.")


def beside_guessing(rows: Sequence[tuple[str, float, float, float]], what: str) -> str:
    """What attacks reached, each (name, value, what guessing would, standard error of that)."""
    if not rows:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels(1, height_inches=0.7 + 0.27 * len(rows))
        names, values, guesses, errors = zip(*rows[::-1], strict=True)
        least = [guess - 2 * error for guess, error in zip(guesses, errors, strict=True)]
        places = range(len(rows))
        axes.barh(places, [4 * error for error in errors], left=least, height=0.5, color=THIRD)
        axes.vlines(guesses, [y - 0.36 for y in places], [y + 0.36 for y in places], color=MUTED, linewidth=1.1)
        axes.plot(values, places, linestyle="", marker="o", color=ACCENT, clip_on=False)
        axes.set_yticks(places, names)
        axes.set_xlim(min(0.4, *values, *least), 1.0)
        axes.set_xlabel(what)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        said = ", ".join(f"{name} {value:.2f} where guessing has {guess:.2f}" for name, value, guess, _ in rows)
        return _svg(figure, f"{what} of attacks: {said}.")


def by_width(neurons: Sequence[int], rows: Mapping[str, Sequence[float]], metric: Metric) -> str:
    """The headline over K, of the FM in full lines and of what a silo has in dashed ones; each row (K,) long."""
    if len(neurons) < 2:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels(1)
        for place, (name, values) in enumerate(rows.items()):
            color, dashes = (ACCENT, SECOND, MUTED)[place // 2], (4, 2.5) if place % 2 else ()
            axes.plot(neurons, values, color=color, marker="o", label=name, linestyle=(0, dashes) if dashes else "-")
        axes.set_xlabel("K, neurons kept in a compressed layer")
        axes.set_xticks(neurons)
        if metric.percent:
            _percent(axes)
        _legend_beside(axes)
        said = "; ".join(f"{name} {', '.join(map(metric.shown, values))}" for name, values in rows.items())
        return _svg(figure, f"Line chart of test {metric.title} at K = {', '.join(map(str, neurons))}: {said}.")


def who_has_what(split: Mapping[str, Any]) -> str:
    """Each silo's rows as bars and, if they have labels, what share of them has which.

    Args:
        split: {"labels": names, "silos": {name: count of each label}}; without labels: one count, of rows.
    """
    silos: dict[str, Sequence[int]] = dict(split.get("silos", {}))
    if not silos:
        return ""
    names, counts = _most_frequent(split["labels"], list(silos.values()))
    rows = [sum(count) for count in counts]
    shown = list(range(len(silos)))
    if by_size := len(silos) > EACH_SILO_NAMED:
        shown = sorted(shown, key=lambda silo: -rows[silo])
        taken = min(len(shown), MOST_SILOS)
        shown = [shown[round(place * (len(shown) - 1) / max(1, taken - 1))] for place in range(taken)]
    with matplotlib.rc_context(STYLE):
        heights = [1.1, 0.35 + 0.19 * len(names)] if names else [1.7]
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.5))
        all_axes: list[Axes] = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
        bars = all_axes[0].bar(range(len(shown)), [rows[silo] for silo in shown], width=0.8, color=THIRD)
        if len(shown) <= EACH_SILO_COUNTED:
            all_axes[0].bar_label(bars, padding=2, color=INK)
        all_axes[0].set_ylabel("rows")
        all_axes[0].yaxis.set_major_locator(MaxNLocator(3, integer=True))
        if names:
            shades = _shares(all_axes[1], names, [counts[silo] for silo in shown])
            place: Any = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.05), "borderaxespad": 0}
            all_axes[0].legend(handles=shades, title="share of\na silo's rows", handlelength=1.2, **place)
        for axes in all_axes:
            axes.set_xlim(-0.6, len(shown) - 0.4)
            axes.set_xticks([])
        if by_size:
            all_axes[-1].set_xlabel(f"{len(shown)} silos, largest first")
        else:
            ticks = [_short(name) for name in silos]
            turned = sum(map(len, ticks)) + 2 * len(ticks) > 90
            all_axes[-1].set_xticks(shown, ticks, rotation=90 if turned else 0, parse_math=False)
            all_axes[-1].tick_params(axis="x", length=0)
        said = f"{len(silos)} silos with {min(rows)} to {max(rows)} rows"
        if names:
            said += f" of {len(split['labels'])} labels, of which a silo has "
            held = [sum(each > 0 for each in count) for count in silos.values()]
            said += f"{min(held)} to {max(held)}"
        return _svg(figure, f"Who has what: {said}.")


def _most_frequent(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> tuple[list[str], list[list[int]]]:
    """Names and, of each silo, counts; of very many labels the rarest are one."""
    if len(labels) <= MOST_LABELS:
        return list(labels), [list(count) for count in counts]
    totals = [sum(column) for column in zip(*counts, strict=True)]
    kept = sorted(sorted(range(len(labels)), key=lambda label: -totals[label])[: MOST_LABELS - 1])
    return (
        [*(labels[label] for label in kept), f"{len(labels) - len(kept)} others"],
        [[*(count[label] for label in kept), sum(count) - sum(count[label] for label in kept)] for count in counts],
    )


def _shares(axes: Axes, names: Sequence[str], counts: Sequence[Sequence[int]]) -> list[PathPatch]:
    """A cell for each label and silo that has it, the more opaque the larger its share of the silo's rows.

    Returns:
        What the legend shows of each shade.
    """
    cells: dict[float, list[Path]] = {opacity: [] for _, opacity in SHADES}
    for silo, count in enumerate(counts):
        for label, rows in enumerate(count):
            if not rows:
                continue
            share = rows / sum(count)
            opacity = next(opacity for most, opacity in SHADES if share <= most)
            corners = [(silo + x, label + y) for x, y in ((-0.45, -0.42), (0.45, -0.42), (0.45, 0.42), (-0.45, 0.42))]
            cells[opacity].append(Path([*corners, corners[0]], closed=True))
            if len(counts) <= EACH_SILO_COUNTED:
                color = PAGE if share > LIGHT_TEXT_ABOVE else INK
                axes.text(silo, label, str(rows), ha="center", va="center", color=color, fontsize=8.5)
    shades, least = [], 0.0
    for most, opacity in SHADES:
        look: Any = {"facecolor": ACCENT, "alpha": opacity, "linewidth": 0}
        if cells[opacity]:
            axes.add_patch(PathPatch(Path.make_compound_path(*cells[opacity]), **look))
        shades.append(PathPatch(Path([(0, 0)]), **look, label=f"{least:.0%} to {most:.0%}"))
        least = most
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    return shades


def _short(name: str) -> str:
    """Without its middle, if it is long: names that are alike differ at one of their ends."""
    if len(name := alike(name)) <= NAME_CHARACTERS:
        return name
    return f"{name[: NAME_CHARACTERS // 2]}\u2026{name[1 - NAME_CHARACTERS // 2 :]}"


def _panels(count: int, height_inches: float = HEIGHT_INCHES) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches))
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _layers(axes: Axes, layers: Sequence[int]) -> None:
    axes.set_xlabel("layer")
    if len(layers) <= EACH_LAYER_NAMED:
        axes.set_xticks(list(layers))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def _legend_beside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0, handlelength=2.4)


def _name_span(axes: Axes, name: str, start: int, steps: int) -> None:
    if start > 1:
        axes.axvline(start - 0.5, color=RULE, linewidth=0.9)
    axes.annotate(
        name, (start + (steps - 1) / 2, 0.0), (0, 5), "data", "offset points", ha="center", color=MUTED, fontsize=8.5
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window that grows with the series; narrow at its start, where the loss is steep."""
    reach = max(1, len(values) // 20)
    return [_mean(values[i - min(reach, i) : i + min(reach, i) + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _svg(figure: Figure, alternative: str) -> str:
    """The drawing as an element for an HTML page, with `alternative` for those who cannot see it."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that matplotlib's own font lacks: the page's has it
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    mark = re.sub(r"\W", "", alternative)[:24].lower()  # ids must differ between the figures of one page
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{mark}-", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    label = escape(alternative, quote=True)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{label}" \g<1>>', svg, count=1)
