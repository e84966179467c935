"""The leakage report: a table for the terminal, and a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpft.leakage.scores import Finding
from fedpft.report import figures
from fedpft.report.page import HOLDINGS, write_tables
from fedpft.tasks import TASKS

ABILITIES = {
    "ability": "as it was",
    "thief": "tuned by a thief",
    "tuned": "tuned by the federation",
}
NOTE = (
    "An attack that finds nothing is one attack that finds nothing: a better one may. What guessing reaches is beside "
    "each figure, and what differs from it by less than two standard errors is no finding. Differential privacy bounds "
    "what any attack can tell of one row; secure aggregation takes single updates from the server's sight, and leaves "
    "the rows on sums."
)


def format_report(found: Mapping[str, Any]) -> str:
    """As plain text, without a line end after the last."""
    return "\n\n".join([lead(found), *map(_plain, _tables(found))])


def write_report(found: Mapping[str, Any], path: Path) -> None:
    """Writes leakage.html, whole or not at all. found: as leakage.json."""
    findings = [Finding(**each) for each in found["findings"]]
    ranked = [
        (f"{each.sees}: {each.goal.partition(', of those')[0]}", each.value, each.error)
        for each in findings
        if each.measure == "AUC"
    ]
    metric, held = TASKS[found["task"]].headline, found["held"]
    curves = {
        f"{who}, {title}": [each[key][side] for each in held]
        for key, title in ABILITIES.items()
        for side, who in (("model", "FM"), ("proxy", "proxy"))
    }
    drawings = [
        (
            figures.beside_guessing(ranked, 0.5, "AUC"),
            "How well each attack tells what is there from what is not: 0.5 is guessing, with two standard errors of "
            "it in grey, and 1 is certainty.",
        ),
        (
            figures.by_width([each["neurons"] for each in held], curves, metric),
            f"Test {metric.title} of the FM, which the owner has, and of the proxy, which a silo has.",
        ),
    ]
    write_tables(path, "What leaks", lead(found), _tables(found), drawings, NOTE)


def lead(found: Mapping[str, Any]) -> str:
    """In a few sentences."""
    findings = [Finding(**each) for each in found["findings"]]
    beyond = sum(each.found for each in findings)
    privacy = found["config"]["training"]["privacy"]
    private = f"differential privacy of epsilon {privacy['epsilon']:g}" if privacy else "no differential privacy"
    own = found["held"][-1] if found["held"] else None
    sentences = [
        f"{beyond} of {len(findings)} figures on a federation of {found['silos']} silos with {private} are beyond "
        "guessing."
    ]
    if own is not None:
        metric = TASKS[found["task"]].headline
        share = sum(part["proxy"] for part in own["parts"].values()) / sum(p["model"] for p in own["parts"].values())
        sentences.append(
            f"A silo holds {share:.0%} of the FM's parameters, all of its embeddings and attention among them, and has "
            f"a test {metric.title} of {metric.shown(own['tuned']['proxy'])} where the owner has "
            f"{metric.shown(own['tuned']['model'])}."
        )
    return " ".join(sentences)


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def _tables(found: Mapping[str, Any]) -> list[Table]:
    return [_attacks(found), *([_owner(found), _parts(found)] if found["held"] else [])]


def _attacks(found: Mapping[str, Any]) -> Table:
    rows = [
        (
            each.attacker,
            each.sees,
            each.goal,
            each.measure,
            f"{each.value:.3f}",
            f"{each.guess:.3f}" + (f" ± {2 * each.error:.3f}" if each.error else ""),
            "yes" if each.found else "no",
        )
        for each in (Finding(**each) for each in found["findings"])
    ]
    return "Against the silos", ["attacker", "sees", "looks for", "measure", "value#", "guessing#", "found"], rows


def _owner(found: Mapping[str, Any]) -> Table:
    metric = TASKS[found["task"]].headline
    rows = []
    for each in found["held"]:
        for key, title in ABILITIES.items():
            pair = each[key]
            share = "-" if pair["share"] is None else f"{pair['share']:.0%}"
            rows.append((str(each["neurons"]), title, metric.shown(pair["proxy"]), metric.shown(pair["model"]), share))
    columns = ["K#", f"test {metric.title}", "proxy#", "FM#", "of what the FM has above chance#"]
    return "Against the owner: what a silo has", columns, rows


def _parts(found: Mapping[str, Any]) -> Table:
    rows = [
        (
            str(each["neurons"]),
            HOLDINGS.get(name, name),
            f"{part['model']:,}",
            f"{part['proxy'] / max(part['model'], 1):.1%}",
        )
        for each in found["held"]
        for name, part in each["parts"].items()
    ]
    return "Against the owner: parameters that a silo holds", ["K#", "part of the FM", "parameters#", "held#"], rows


def _plain(table: Table) -> str:
    title, columns, rows = table
    head = [column.removesuffix("#") for column in columns]
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    numeric = [column.endswith("#") for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (head, ["-" * width for width in widths], *rows)
    ]
    return "\n".join([title, *lines])
