"""Tables and drawings of what has been run, beside the paper's figures where it has one."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence

from bench.paper.cells import TABLES, Cell, Record
from fedpft.report.figures import rows_compared
from fedpft.tasks import TASKS, Metric, Task

# Percent. Peng et al., IJCAI 2024: (table, model, task, method, variation).
PAPER: dict[tuple[str, str, str, str, str], float] = {
    ("iid", "bert-base", "sst2", "FedPFT", ""): 91.6,
    ("iid", "bert-base", "qnli", "FedPFT", ""): 87.5,
    ("iid", "bert-base", "mnli-m", "FedPFT", ""): 78.6,
    ("iid", "bert-base", "mnli-mm", "FedPFT", ""): 79.0,
    ("iid", "bert-base", "qqp", "FedPFT", ""): 86.3,
    ("iid", "roberta-base", "sst2", "FedPFT", ""): 93.1,
    ("iid", "roberta-base", "qnli", "FedPFT", ""): 88.7,
    ("iid", "roberta-base", "mnli-m", "FedPFT", ""): 83.4,
    ("iid", "roberta-base", "mnli-mm", "FedPFT", ""): 83.2,
    ("iid", "roberta-base", "qqp", "FedPFT", ""): 87.1,
    ("iid", "bert-base", "sst2", "FedPETuning", ""): 91.6,
    ("iid", "bert-base", "qnli", "FedPETuning", ""): 88.4,
    ("iid", "bert-base", "mnli-m", "FedPETuning", ""): 80.7,
    ("iid", "bert-base", "mnli-mm", "FedPETuning", ""): 81.6,
    ("iid", "bert-base", "qqp", "FedPETuning", ""): 87.8,
    ("iid", "roberta-base", "sst2", "FedPETuning", ""): 93.6,
    ("iid", "roberta-base", "qnli", "FedPETuning", ""): 90.8,
    ("iid", "roberta-base", "mnli-m", "FedPETuning", ""): 86.1,
    ("iid", "roberta-base", "mnli-mm", "FedPETuning", ""): 85.5,
    ("iid", "roberta-base", "qqp", "FedPETuning", ""): 88.3,
    ("iid", "bert-base", "qnli", "FedOT", ""): 83.9,
    ("iid", "roberta-base", "qnli", "FedOT", ""): 85.3,
    ("dirichlet", "bert-base", "sst2", "FedPFT", "1"): 89.7,
    ("dirichlet", "bert-base", "sst2", "FedPFT", "5"): 91.1,
    ("dirichlet", "bert-base", "sst2", "FedPFT", "10"): 91.6,
    ("dirichlet", "roberta-base", "sst2", "FedPFT", "1"): 92.1,
    ("dirichlet", "roberta-base", "sst2", "FedPFT", "5"): 92.7,
    ("dirichlet", "roberta-base", "sst2", "FedPFT", "10"): 93.1,
    ("dirichlet", "bert-base", "qnli", "FedPFT", "1"): 86.1,
    ("dirichlet", "bert-base", "qnli", "FedPFT", "5"): 86.9,
    ("dirichlet", "bert-base", "qnli", "FedPFT", "10"): 87.2,
    ("dirichlet", "roberta-base", "qnli", "FedPFT", "1"): 87.2,
    ("dirichlet", "roberta-base", "qnli", "FedPFT", "5"): 87.6,
    ("dirichlet", "roberta-base", "qnli", "FedPFT", "10"): 88.1,
    ("ablation", "bert-base", "qnli", "FedPFT_N", ""): 83.0,
    ("ablation", "bert-base", "qnli", "FedPFT_B", ""): 86.9,
    ("ablation", "bert-base", "qnli", "FedPFT_D", ""): 84.3,
    ("ablation", "bert-base", "qnli", "FedPFT", ""): 87.5,
    ("ablation", "roberta-base", "qnli", "FedPFT_N", ""): 78.9,
    ("ablation", "roberta-base", "qnli", "FedPFT_B", ""): 86.7,
    ("ablation", "roberta-base", "qnli", "FedPFT_D", ""): 85.5,
    ("ablation", "roberta-base", "qnli", "FedPFT", ""): 88.7,
}
# Of 81M transformer parameters, how many are sent. A million must be 2 ** 20 there: BERT-base has 85,054,464.
PAPER_SENT = {"FedPETuning": 81.0, "FedPFT": 47.0}


def markdown(table: str, cells: Sequence[Cell], records: Mapping[str, Record]) -> str:
    """The table of one world, from those of its cells that have been run; what is missing is a dash."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.variation), []).append(cell)
    world, section = cells[0].world, TABLES[table]
    show = _counts if section.counted else _measures
    task = TASKS[world.settings["model"]["task"]]
    columns = show(table, task)
    head = ["method", *([section.varied] if section.varied else []), *columns, "seeds"]
    lines = [f"{world.model}, {world.task}", "", line(head), line(["---"] * len(head))]
    for (method, variation), group in groups.items():
        found = [records[cell.key] for cell in group if cell.key in records]
        values = [column(group[0], found) if found else "-" for column in columns.values()]
        seeds = " ".join(str(cell.seed) for cell in group if cell.key in records) or "-"
        lines.append(line([method, *([variation] if section.varied else []), *values, seeds]))
    return "\n".join(lines)


def drawing(table: str, cells: Sequence[Cell], records: Mapping[str, Record]) -> str:
    """The headline of one world's rows as an SVG file; empty if nothing has been run."""
    task = TASKS[cells[0].world.settings["model"]["task"]]
    varied = TABLES[table].varied.split(",")[0]
    values: dict[str, list[float]] = {}
    for cell in cells:
        if not cell.counted and cell.key in records:
            name = cell.method + (f", {varied} {cell.variation}" if cell.variation else "")
            values.setdefault(name, []).append(_headline(records[cell.key], task.headline))
    svg = rows_compared({name: statistics.fmean(each) for name, each in values.items()}, task.headline, "FedPFT")
    return standing_alone(svg)


def standing_alone(svg: str) -> str:
    """A figure of the report, which has its colours from the page, as a file with colours of its own."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = "svg{background:#fff;--ink:#1d2126;--muted:#666e78;--rule:#dfe2e5;"
    style += "--accent:#1f62b3;--second:#c0601a;--third:#9db0c6}text{font-family:sans-serif}"
    return re.sub(r"<svg ([^>]*)>", rf"<svg {names} \1><style>{style}</style>", svg, count=1)


Column = Callable[[Cell, Sequence[Record]], str]


def _measures(table: str, task: Task) -> dict[str, Column]:
    metric = task.headline
    better = 1 if metric.more_is_better else -1

    def paper(cell: Cell, _: Sequence[Record]) -> str:
        world = cell.world
        value = PAPER.get((table, world.model, world.task, cell.method, cell.variation))
        return "-" if value is None else f"{value:.1f}"

    def gain(record: Record) -> float:
        rows = record["metrics"]
        return better * float(rows["plugged_in"][metric.name] - rows["proxy"][metric.name])

    def zero_shot(_: Cell, found: Sequence[Record]) -> str:
        values = [record["metrics"]["zero_shot"][metric.name] for record in found if "zero_shot" in record["metrics"]]
        return spread(values, metric) if values else "-"

    def mean(name: str, unit: float) -> Column:
        return lambda _, found: f"{statistics.fmean(record[name] for record in found) / unit:,.1f}"

    return {
        metric.title + (", %" if metric.percent else ""): lambda _, found: spread(
            [_headline(record, metric) for record in found], metric
        ),
        "s.e.": lambda _, found: _shown(statistics.fmean(standard_error(record, metric) for record in found), metric),
        "paper": paper,
        "plugged in - proxy": lambda _, found: spread([gain(record) for record in found], metric),
        "zero-shot": zero_shot,
        "sent, M parameters": lambda _, found: f"{found[0]['parameters']['proxy_transformer'] / 1e6:.1f}",
        "adapter, MB": mean("adapter_bytes", 1e6),
        "MB a silo moved": mean("silo_bytes", 1e6),
        "silo seconds a round": mean("silo_seconds", 1.0),
        "seconds in all": lambda _, found: f"{statistics.fmean(sum(each['seconds'].values()) for each in found):,.0f}",
        "peak memory, MB": mean("peak_bytes", 1e6),
    }


def _counts(table: str, task: Task) -> dict[str, Column]:
    def millions(name: str) -> Column:
        return lambda _, found: f"{found[0]['parameters'][name] / 1e6:.1f}"

    def share(_: Cell, found: Sequence[Record]) -> str:
        parameters = found[0]["parameters"]
        return f"{parameters['proxy_transformer'] / parameters['model_transformer']:.0%}"

    def paper(cell: Cell, _: Sequence[Record]) -> str:
        of_the_paper = cell.world.setting.startswith("paper")
        return f"{PAPER_SENT[cell.method]:.0f} of 81" if of_the_paper and cell.method in PAPER_SENT else "-"

    return {
        "transformer of the FM, M": millions("model_transformer"),
        "of it sent, M": millions("proxy_transformer"),
        "share": share,
        "paper": paper,
        "sent in all, M": millions("proxy"),
        "adapter a round, M": lambda _, found: f"{found[0]['parameters']['adapter'] / 1e6:.2f}",
    }


def standard_error(record: Record, metric: Metric) -> float:
    """Of the headline of the plugged-in model, over the test rows."""
    row = record["metrics"]["plugged_in"]
    if metric.percent:
        share = float(row[metric.name])
        return math.sqrt(share * (1 - share) / record["samples"]["test"])
    return float(row[f"{metric.name}_se"])


def _headline(record: Record, metric: Metric) -> float:
    return float(record["metrics"]["plugged_in"][metric.name])


def _shown(value: float, metric: Metric) -> str:
    return f"{100 * value:.1f}" if metric.percent else f"{value:.3f}"


def spread(values: Sequence[float], metric: Metric) -> str:
    """The mean, and the standard deviation if there are several; in percent, if the metric is a share."""
    mean = _shown(statistics.fmean(values), metric)
    return f"{mean} ± {_shown(statistics.stdev(values), metric)}" if len(values) > 1 else mean


def line(values: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(values)} |"
