"""The leakage report: a table for the terminal, and a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpft import atomic
from fedpft.leakage.scores import Finding
from fedpft.report import figures
from fedpft.report.page import HOLDINGS, write_tables
from fedpft.tasks import TASKS

NOTE = (
    "An attack that finds nothing is one attack that finds nothing: a better one may. What guessing reaches is beside "
    "each figure, and what differs from it by less than two standard errors is no finding. Differential privacy bounds "
    "what any attack can tell of one row; secure aggregation takes single updates from the server's sight, and leaves "
    "the rows on sums."
)

FINISHED_NOTE = (
    "What attacks find out of the silos is not measured on a finished run, for the reasons given. Rehearse it: with a "
    "simulation.yaml without --finished, with a copy of the server.yaml that has a section `simulation` with data like "
    "the silos', and the privacy that they keep to as training.privacy."
)


def format_report(found: Mapping[str, Any]) -> str:
    """As plain text, without a line end after the last."""
    return "\n\n".join([lead(found), *map(_plain, _tables(found)), _note(found)])


def write(found: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Writes leakage.json and leakage.html, each whole or not at all; returns what is in the former."""
    text = json.dumps(found, indent=1)
    atomic.write_text(directory / "leakage.json", text)
    read: dict[str, Any] = json.loads(text)
    _write_page(read, directory / "leakage.html")
    return read


def _write_page(found: Mapping[str, Any], path: Path) -> None:
    findings = [Finding(**each) for each in found["findings"]]
    ranked = [
        (f"{each.sees}: {each.goal.partition(', of those')[0]}", each.value, each.guess, each.error)
        for each in findings
        if each.measure == "AUC"
    ]
    metric, held = TASKS[found["task"]].headline, found["held"]
    curves = {
        f"{who}, {title}": [each[key][side] for each in held]
        for key, title in _abilities(found).items()
        for side, who in (("model", "FM"), ("proxy", "proxy"))
    }
    drawings = [
        (
            figures.beside_guessing(ranked, "AUC"),
            "How well each attack tells what is there from what is not: 1 is certainty; a line is what guessing comes "
            "to, with two standard errors of it in grey.",
        ),
        (
            figures.by_width([each["neurons"] for each in held], curves, metric),
            f"Test {metric.title} of the FM, which the owner has, and of the proxy, which a silo has.",
        ),
    ]
    write_tables(
        path, "What leaks", lead(found), _tables(found), drawings, FINISHED_NOTE if found["finished"] else NOTE
    )


def lead(found: Mapping[str, Any]) -> str:
    """In a few sentences."""
    findings = [Finding(**each) for each in found["findings"]]
    beyond = sum(each.found for each in findings)
    privacy = found["config"]["training"]["privacy"]
    private = f"differential privacy of epsilon {privacy['epsilon']:g}" if privacy else "no differential privacy"
    sentences = [
        f"{beyond} of {len(findings)} figures on a federation of {found['silos']} silos with {private} are beyond "
        "guessing."
    ]
    if found["finished"]:
        rows = found["rows"]
        sentences = [
            f"A finished run of {found['silos']} silos: the owner's side is measured, on {rows['measured']:,} of its "
            f"test rows, where a thief has the other {rows['thief']:,}; attacks on the silos are not."
        ]
    own = found["held"][-1] if found["held"] else None
    if own is not None:
        metric = TASKS[found["task"]].headline
        share = sum(part["proxy"] for part in own["parts"].values()) / sum(p["model"] for p in own["parts"].values())
        sentences.append(
            f"A silo holds {share:.0%} of the FM's parameters, all of its embeddings and attention among them, and has "
            f"a test {metric.title} of {metric.shown(own['tuned']['proxy'])} where the owner has "
            f"{metric.shown(own['tuned']['model'])}."
        )
    return " ".join(sentences)


def _note(found: Mapping[str, Any]) -> str:
    return FINISHED_NOTE if found["finished"] else NOTE


def _abilities(found: Mapping[str, Any]) -> dict[str, str]:
    """What proxy and FM are held against each other by, and its title."""
    before = "a head alone, tuned by a thief" if TASKS[found["task"]].head else "before any tuning"
    return {"ability": before, "thief": "tuned by a thief", "tuned": "tuned by the federation"}


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def _tables(found: Mapping[str, Any]) -> list[Table]:
    owners = [_owner(found), _parts(found)] if found["held"] else []
    return [*owners, _seen(found), _unmeasured(found)] if found["finished"] else [_attacks(found), *owners]


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
        for key, title in _abilities(found).items():
            pair = each[key]
            share = "-" if pair["share"] is None else f"{pair['share']:.0%}"
            figures_of = (metric.shown(value) for value in (pair["proxy"], pair["model"], each["chance"]))
            rows.append((str(each["neurons"]), title, *figures_of, share))
    columns = ["K#", f"test {metric.title}", "proxy#", "FM#", "guessing#", "of what the FM has above chance#"]
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


def _seen(found: Mapping[str, Any]) -> Table:
    return "What the server has seen of the silos", ["what", "how"], list(found["seen"].items())


def _unmeasured(found: Mapping[str, Any]) -> Table:
    return "Not measured on a finished run", ["attacker", "looks for", "why not"], found["unmeasured"]


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
