"""What a run came to: a table for the terminal, and a page that needs nothing beside itself.

Both read `summary.json`'s structure; the page adds curves, each left out where the run has none.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from fedpft import atomic
from fedpft.report import figures
from fedpft.tasks import TASKS, Metric

MEANINGS = {
    **dict(task.baseline for task in TASKS.values() if task.baseline is not None),
    "zero_shot": "the FM as it was",
    "head_only": "no adapters: a head trained federated on the frozen proxy, plugged into the FM",
    "proxy_zero_shot": "the proxy without tuning: what whoever has it has at once",
    "proxy": "the tuned proxy by itself",
    "logit_offset": "the FM as it was, the proxy's tuning added to its logits",
    "plugged_in_raw": "the product before it was refined on public data",
    "plugged_in": "the FM with the silos' adapter: the product",
    "full_model": "federated LoRA on the full FM: the upper bound, with the FM given away",
    "layer_drop": "FedOT: a proxy of whole layers, with as many transformer weights",
    "no_distillation": "no distillation at all",
    "before_only": "distillation before the federation only",
    "during_only": "distillation during the federation only",
    "secure_aggregation": "the product, of sums over silos alone (secure aggregation)",
    "private": "the same, and each silo's samples with differential privacy",
    "local_only": "mean over silos of tuning alone on their own data, plugged in",
}
BASELINES = tuple({task.baseline[0] for task in TASKS.values() if task.baseline is not None})
ALWAYS = (
    *BASELINES,
    "zero_shot",
    "head_only",
    "proxy_zero_shot",
    "proxy",
    "logit_offset",
    "plugged_in_raw",
    "plugged_in",
)
PARAMETERS = {
    "model": "the FM",
    "proxy": "the proxy: what the silos receive",
    "model_transformer": "the FM's transformer layers",
    "proxy_transformer": "the proxy's transformer layers",
    "adapter": "the adapter: what a silo trains and returns",
}
HOLDINGS = {
    "embeddings": "embeddings, and all else outside of the layers",
    "attention": "attention",
    "ffn": "FFN",
    "norms": "norms, and what else is in the layers",
}
DATA = {
    "samples": "samples#",
    "skipped_rows": "skipped rows#",
    "cut_texts": "texts cut#",
    "cut_completions": "answers cut#",
}
SERVER_DATA = {"public": "public data", "test": "test data"}
LISTED_SILOS = 20  # in the table of data, the largest; others are added up
BYTES = {"down": "server to silos", "up": "silos to server"}


def format_table(summary: Mapping[str, Any]) -> str:
    """The metrics as plain text, one line a row, and what plugging in is worth; without a line end after the last.

    Args:
        summary: of which `task` and `metrics` are needed, and `gain` is shown.
    """
    head = ("row", *(metric.title for metric in _metrics(summary)), "meaning")
    rows = _metric_rows(summary)
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
    lines = []
    for row in (head, ("-" * widths[0], *("-" * width for width in widths[1:]), "-" * len("meaning")), *rows):
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:], strict=True))
        lines.append(f"{row[0]:<{widths[0]}}{numbers}  {row[-1]}")
    return "\n".join([*lines, *(["", sentence] if (sentence := _gain(summary)) else [])])


def write_report(summary: Mapping[str, Any], curves: Mapping[str, Any], path: Path) -> None:
    """Writes report.html, whole or not at all.

    Args:
        summary: as summary.json.
        curves: {"distillation": [{"stage": "layer-level" or "round 2", "loss": [..]}], "refinement": {"loss": [..]},
            "alignment": {"layers": [..], "stages": [{"stage": str, "hidden_error": [..], "gradient_cosine": [..]}]},
            "saliency_kept": {"layers": [..], "share": [..]},
            "rounds": [{"round": i, "proxy": headline, "plugged_in": headline}],
            "split": {"labels": [name, ..], "silos": {name: [rows of each label]}}, or without labels a silo's rows};
            any of them may be missing.
    """
    atomic.write_text(path, _page(_headline(summary), _sections(summary, curves)))


def write_tables(
    path: Path,
    title: str,
    lead: str,
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    drawings: Sequence[tuple[str, str]],
    after: str = "",
) -> None:
    """Writes another page in the same look, whole or not at all: drawings, then tables.

    Args:
        tables: (title, columns, rows) of each; a column whose name ends in # holds numbers.
        drawings: (what fedpft.report.figures drew, caption) of each.
        after: a paragraph at the end.
    """
    sections = [_figure(*drawing) for drawing in drawings] + [_table(*table) for table in tables]
    sections.append(after and f"<p>{escape(after)}</p>")
    atomic.write_text(path, _page(lead, [section for section in sections if section], title))


# --- words and numbers ------------------------------------------------------------------------------------------------


def _metrics(summary: Mapping[str, Any]) -> tuple[Metric, ...]:
    """What the rows were measured by, headline first, as far as they were."""
    measured = {name for row in summary.get("metrics", {}).values() for name in row}
    return tuple(metric for metric in TASKS[summary["task"]].metrics if metric.name in measured)


def _metric_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    metrics = summary.get("metrics", {})
    names = [name for name in MEANINGS if name in metrics] + [name for name in metrics if name not in MEANINGS]
    shown = _metrics(summary)
    return [
        (name, *(_decimal(metrics[name].get(metric.name)) for metric in shown), MEANINGS.get(name, ""))
        for name in names
    ]


def _headlines(summary: Mapping[str, Any]) -> dict[str, float]:
    """Row -> the number that it is judged by."""
    name = TASKS[summary["task"]].headline.name
    return {row: found[name] for row, found in summary.get("metrics", {}).items()}


def _data_table(data: Mapping[str, Any]) -> str:
    """The server's files and each silo's, as far as it shares that."""
    told = {SERVER_DATA.get(name, name): {"skipped_rows": 0} | found for name, found in data.get("server", {}).items()}
    silos: dict[str, dict[str, int]] = data.get("silos", {})
    largest = sorted(silos, key=lambda silo: (-silos[silo]["samples"], silo))[:LISTED_SILOS]
    told |= {f"silo {name}": silos[name] for name in sorted(largest)}
    if others := [found for name, found in silos.items() if name not in largest]:
        known = [key for key in DATA if all(key in found for found in others)]
        told[f"the {len(others)} other silos"] = {key: sum(found[key] for found in others) for key in known}
    titles = {key: title for key, title in DATA.items() if any(key in found for found in told.values())}
    rows = [(name, *(_count(found[key]) if key in found else "-" for key in titles)) for name, found in told.items()]
    return _table("Data", ["whose", *titles.values()], rows)


def _headline(summary: Mapping[str, Any]) -> str:
    found, metric = _headlines(summary), TASKS[summary["task"]].headline
    parameters = summary.get("parameters", {})
    sentences = []
    if "plugged_in" in found:
        others = [
            f"{metric.shown(found[name])} {words}"
            for name, words in (
                ("proxy", "of the proxy alone"),
                ("head_only", "without adapters"),
                ("zero_shot", "before"),
            )
            if name in found
        ]
        beside = f", against {' and '.join(others)}" if others else ""
        measured = f"{metric.title} of {metric.shown(found['plugged_in'])}"
        sentences.append(f"The FM with the silos' adapter has a test {measured}{beside}.")
    sentences += filter(None, [_gain(summary)])
    if {"full_model", "layer_drop", "plugged_in"} <= found.keys():
        way = found["full_model"] - found["layer_drop"]
        if way > 0 if metric.more_is_better else way < 0:
            covered = (found["plugged_in"] - found["layer_drop"]) / way
            sentences.append(f"That is {covered:.0%} of the way from dropping layers to tuning the full model.")
    if parameters.get("model_transformer"):
        share = parameters["proxy_transformer"] / parameters["model_transformer"]
        sentences.append(f"The silos received {share:.0%} of its transformer parameters; the FM stayed on the server.")
    return " ".join(sentences)


def _gain(summary: Mapping[str, Any]) -> str:
    """What the owner has that a silo with the tuned proxy has not, in a sentence; empty if it was not measured."""
    if (gain := summary.get("gain")) is None:
        return ""
    metric, worth = TASKS[summary["task"]].headline, float(gain["value"])
    scale, unit = (100.0, " points") if metric.percent else (1.0, "")
    size, error = (f"{scale * abs(value):.{1 if metric.percent else 3}f}" for value in (worth, gain["standard_error"]))
    changes = "improves" if worth >= 0 else "worsens"
    return (
        f"Plugging the adapter into the FM {changes} the {metric.title} by {size}{unit} beside the tuned proxy's "
        f"(standard error {error}, on the same test samples)."
    )


def _which_is_better(metric: Metric) -> str:
    return "" if metric.more_is_better else "; lower is better"


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u2009")  # a thin space: no reader takes it for a decimal sign


def _share(part: Mapping[str, int]) -> str:
    return f"{part['proxy'] / part['model']:.1%}" if part["model"] else "-"


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def _decimal(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# --- the page ---------------------------------------------------------------------------------------------------------


def _sections(summary: Mapping[str, Any], curves: Mapping[str, Any]) -> list[str]:
    found, metric = _headlines(summary), TASKS[summary["task"]].headline
    alignment, saliency = curves.get("alignment", {}), curves.get("saliency_kept", {})
    parameters, traffic, seconds = (summary.get(key, {}) for key in ("parameters", "bytes", "seconds"))
    refined = {"stage": "refinement", "loss": curves.get("refinement", {}).get("loss", [])}
    reference = {name: found[name] for name in ("zero_shot", "head_only", *BASELINES) if name in found}
    by_round = figures.score_by_round(curves.get("rounds", []), reference, metric)
    compared = found if found.keys() - set(ALWAYS) or not by_round else {}
    measured = [f"{each.title}#" for each in _metrics(summary)]
    sections = [
        _table("Result", ["row", *measured, "meaning"], _metric_rows(summary), strong="plugged_in"),
        _figure(
            figures.rows_compared(compared, metric),
            f"Test {metric.title} of every row{_which_is_better(metric)}.",
        ),
        _figure(
            by_round,
            f"Test {metric.title} {_between_rounds(summary)}, of the tuned proxy and of the FM with the same "
            f"adapter{_which_is_better(metric)}.",
        ),
        _answers(summary.get("written", [])),
        _figure(
            figures.distillation_loss([*curves.get("distillation", []), refined]),
            "Distillation loss on public data: thin as measured, thick smoothed.",
        ),
        _figure(
            figures.alignment_gap(alignment.get("layers", []), alignment.get("stages", [])),
            "How far the proxy is from the FM on a public batch: the error of its hidden states (lower is better), and "
            "the cosine between the adapter's gradients on proxy and FM (1 is the FM's own direction).",
        ),
        _figure(
            figures.saliency_kept(saliency.get("layers", []), saliency.get("share", [])),
            "Share of each layer's squared saliency that the kept neurons hold.",
        ),
        _figure(figures.who_has_what(curves.get("split", {})), _split_caption(curves.get("split", {}))),
        _table(
            "Rounds",
            ["round#", "silos#", "training loss#", f"{metric.title}#", "alignment loss#"],
            [
                (
                    str(entry["round"]),
                    str(entry["silos"]),
                    *(_decimal(entry.get(key)) for key in ("train_loss", "score", "alignment_loss")),
                )
                for entry in summary.get("rounds", [])
            ],
        ),
        _data_table(summary.get("data", {})),
        _table(
            "Parameters",
            ["part", "parameters#", "share of the FM#"],
            [
                (PARAMETERS.get(name, name), _count(value), f"{value / parameters['model']:.1%}")
                for name, value in parameters.items()
            ],
        ),
        _table(
            "What the silos received",
            ["part of the FM", "FM#", "proxy#", "share#"],
            [
                (HOLDINGS.get(name, name), _count(part["model"]), _count(part["proxy"]), _share(part))
                for name, part in summary.get("holdings", {}).items()
            ],
        ),
        _table(
            "Traffic",
            ["direction", "payload#", "bytes#"],
            [(BYTES.get(name, name), _size(value), _count(value)) for name, value in traffic.items()],
        ),
        _table(
            "What each row took",
            ["row", "seconds#", "largest silo's memory#", "bytes a silo moved#"],
            [
                (row, _decimal(cost["seconds"], 1), _size(cost["silo_peak_bytes"]), _size(cost["silo_bytes"]))
                for row, cost in summary.get("costs", {}).items()
            ],
        ),
        _table(
            "Time",
            ["phase", "seconds#"],
            [(name.replace("_", " "), _decimal(value, 1)) for name, value in seconds.items()],
        ),
        _setup(summary),
    ]
    return [section for section in sections if section]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], strong: str = "", look: str = "") -> str:
    """An HTML table; a column whose name ends in # holds numbers. Nothing if there are no rows."""
    if not rows:
        return ""
    numeric = [column.endswith("#") for column in columns]

    def line(tag: str, cells: Sequence[str], mark: str = "") -> str:
        written = (
            f"<{tag}{' class=n' if number else ''}>{escape(cell)}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )
        return f"<tr{mark}>{''.join(written)}</tr>"

    head = line("th", [column.removesuffix("#") for column in columns])
    body = "\n".join(line("td", row, " class=strong" if row[0] == strong else "") for row in rows)
    return (
        f"<section><h2>{escape(title)}</h2>\n<div class=wide><table{look and f' class={look}'}><thead>{head}</thead>\n"
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _answers(written: Sequence[Mapping[str, str]]) -> str:
    """Some test samples as the FM answers them, before and after, beside what was wanted."""
    rows = [
        (sample["asked"], sample["wanted"], *(sample.get(row, "-") for row in ("zero_shot", "plugged_in")))
        for sample in written
    ]
    return _table(
        "Answers", ["asked", "wanted", "the FM as it was", "the FM with the silos' adapter"], rows, look="said"
    )


def _figure(svg: str, caption: str) -> str:
    return svg and f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _between_rounds(summary: Mapping[str, Any]) -> str:
    """When the curve's points were measured, and on what: the last point and the table's row may differ by that."""
    tested = summary.get("data", {}).get("server", {}).get("test", {}).get("samples", 0)
    used = summary.get("config", {}).get("evaluation", {}).get("samples_per_round", tested)
    return (
        f"after each round on {_count(used)} of the {_count(tested)} test samples"
        if used < tested
        else "after each round"
    )


def _split_caption(split: Mapping[str, Any]) -> str:
    silos = len(split.get("silos", {}))
    shown = ""
    if silos > figures.MOST_SILOS:
        shown = f" {figures.MOST_SILOS} of the {silos} silos are drawn, taken evenly in order of size."
    if not split.get("labels"):
        return f"How the data was dealt out: each silo's rows.{shown}"
    return f"How the data was dealt out: each silo's rows, and which labels they have, fuller colour for more.{shown}"


def _setup(summary: Mapping[str, Any]) -> str:
    shown = {key: summary[key] for key in ("seed", "versions", "config") if key in summary}
    if not shown:
        return ""
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return f"<details><summary>Seed, versions and configuration</summary><pre>{escape(text)}</pre></details>"


def _page(headline: str, sections: Sequence[str], title: str = "FedPFT run") -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1>
<p class=lead>{escape(headline)}</p></header>
{chr(10).join(sections)}
</main>
</body>
</html>
"""


CSS = """
:root {
  color-scheme: light dark;
  --page: #fdfdfc; --ink: #1d2126; --muted: #666e78; --rule: #dfe2e5; --tint: #f0f4f9;
  --accent: #1f62b3; --second: #c0601a; --third: #9db0c6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --ink: #e4e7ea; --muted: #98a1ab; --rule: #333a42; --tint: #1c2733;
    --accent: #6aaaf0; --second: #eb9a5b; --third: #50647a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 { margin: 0; font-size: .8rem; font-weight: 600; letter-spacing: .08em; text-transform: uppercase;
  color: var(--muted); }
.lead { margin: .6rem 0 0; font-size: 1.35rem; line-height: 1.45; text-wrap: pretty; }
h2 { margin: 3rem 0 .6rem; font-size: 1rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem 1rem .42rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 500; color: var(--muted); white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
tr > :first-child { padding-left: .5rem; }
tr > :last-child { padding-right: .5rem; }
.strong { background: var(--tint); }
.strong td:not(:last-child) { font-weight: 600; }
.said { table-layout: fixed; min-width: 44rem; }
.said th { white-space: normal; }
.said th:first-child { width: 38%; }
td:last-child:not(.n) { min-width: 8rem; }
.said td { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
figure { margin: 2.8rem 0 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; font-variant-numeric: tabular-nums; }
figcaption { margin-top: .5rem; padding-left: .5rem; font-size: .85rem; color: var(--muted); text-wrap: pretty; }
details { margin-top: 3rem; font-size: .9rem; }
summary { cursor: pointer; color: var(--muted); }
pre { overflow-x: auto; padding: 1rem; background: var(--tint); font: .8rem/1.5 ui-monospace, monospace; }
@media print { main { padding: 0; } figure, tr { break-inside: avoid; } }
"""
