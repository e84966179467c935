"""`python -m bench.accuracy`: what each change of the method is worth, one at a time, at equal budgets.

    OUT/accuracy.jsonl          one record for each cell that is done
    OUT/accuracy-dials-*.svg    everything over K
    WORK/                       as of bench.paper

Worlds, cells and what it costs to run them are those of bench.paper; a cell here is also asked how far the proxy's
gradients are from the FM's, and what it answered to each test row, so that two rows of a table are compared on the same
samples. It can be stopped at any time, and goes on where it stopped.
"""

import argparse
import json
import logging
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.paper import cells, worlds
from bench.paper.__main__ import add_options
from bench.paper.cells import Cell, Record
from bench.paper.shown import line, spread, standing_alone
from bench.paper.worlds import Files, World
from fedpft import atomic
from fedpft.command import run_command
from fedpft.demo.run import Settings, merged
from fedpft.report.figures import score_by_round
from fedpft.tasks import TASKS, Metric

log = logging.getLogger(__name__)

GAP_SAMPLES = 16
KEPT = "K, neurons kept in a layer"
PRODUCT, FULL_MODEL, PAPER = "fedpft", "full_model", "paper"
LAYER_DROPS = ("layer_drop", "layer_drop, not distilled")  # either may be the better one
QUARTER = 4  # --quick: of the rows, in half the rounds

# What each changes in the product's settings, which are a world's and beside them the defaults of server.yaml.
CHANGES: dict[str, dict[str, Settings]] = {
    "rivals": {PRODUCT: {}, PAPER: {"preset": "paper"}},  # and what bench.paper compares with
    "neurons": {
        "weights": {"proxy": {"importance": "weights"}},
        "variance": {"proxy": {"importance": "variance"}},
        "random": {"proxy": {"importance": "random"}},
        "global spread": {"proxy": {"spread": "global"}},
    },
    "making up": {
        "no closed form": {"distillation": {"closed_form_samples": 0}},
        "fixed ridge": {"distillation": {"closed_form_ridge": 1e-3}},
        "probes 0.1": {"distillation": {"closed_form_probes": 0.1}},
        "a quarter of the samples": {"distillation": {"closed_form_samples": 64}},
    },
    "distillation": {
        "no steps": {"distillation": {"steps": 0}},
        "steps with probes 0.3": {"distillation": {"probe_term": 0.3}},
        "each layer by itself": {"distillation": {"local": True}},
        "layer by layer": {"distillation": {"mode": "layers", "closed_form_samples": 256}},
        "no alignment": {"alignment": {"every_rounds": 0}},
    },
    "ffn": {  # at rank 4 fewer bytes than rank 8 has on attention alone, at rank 5 a few more
        "LoRA in the FFN, R 4": {"adapter": {"ffn": True, "rank": 4, "alpha": 24.0}},
        "LoRA in the FFN, R 5": {"adapter": {"ffn": True, "rank": 5, "alpha": 30.0}},
        "LoRA in the FFN, R 5, no steps": {
            "adapter": {"ffn": True, "rank": 5, "alpha": 30.0},
            "distillation": {"steps": 0},
        },
    },
    "federation": {
        "least inactive": {"alignment": {"update": "active"}},
        "at random": {"alignment": {"update": "random"}},
        "by gradient": {"alignment": {"update": "gradient"}},
        "public counts": {"alignment": {"counts": "public"}},
        "refitted": {"alignment": {"closed_form_samples": 256}},
        "refitted, no steps": {"alignment": {"closed_form_samples": 256, "steps": 0}},
        "refits alone": {  # no gradient at the server, before the federation or during it
            "distillation": {"steps": 0},
            "alignment": {"closed_form_samples": 256, "steps": 0},
        },
        "all refitted, no steps": {"alignment": {"closed_form_samples": 256, "steps": 0, "updated_fraction": 1.0}},
    },
    "silos": {  # some of which have little room: for half of the proxy's neurons, or for coarse ones
        "half of the silos narrow": {"simulation": {"narrow_fraction": 0.5}},
        "all silos narrow": {"simulation": {"narrow_fraction": 1.0}},
        "all silos int8": {"simulation": {"narrow_fraction": 1.0, "narrow_width": 1.0, "narrow_weights": "int8"}},
        "all silos int4": {"simulation": {"narrow_fraction": 1.0, "narrow_width": 1.0, "narrow_weights": "int4"}},
    },
    "dials": {},
    "steps": {},
    "after": {
        "layer scales": {"plug_in": {"layer_scales": True}},
        "towards the change": {"plug_in": {"steps": 60, "towards": "change"}},
        "towards the proxy": {"plug_in": {"steps": 60, "towards": "proxy"}},
    },
}
STEPS = {"steps / 4": 1 / 4, "steps x 4": 4, "steps x 16": 16}  # of the layer-level distillation; a world's own between
DIALS = {f"K = F / {part}": 1 / part for part in (16, 8, 2, 1)}  # K as a share of F; the product's K = D is between
WORDS: dict[str, Settings] = {  # of language models alone
    "logits": {"distillation": {"logit_term": 1.0}},
    "logit offset": {"evaluation": {"logit_offset": True}},
}
REFITTED: dict[str, Settings] = {  # the narrow silos where there is a closed form
    "half narrow, refitted": {"proxy": {"widths": [0.5]}, "simulation": {"narrow_fraction": 0.5}},
    "all narrow, refitted": {"proxy": {"widths": [0.5]}, "simulation": {"narrow_fraction": 1.0}},
}


def variants(world: World, groups: Sequence[str]) -> dict[str, Settings]:
    """Row -> settings, the rivals first: a table without them says little."""
    of_the_paper = cells.methods(world.layers)
    names = {FULL_MODEL: "FedPETuning", LAYER_DROPS[0]: "FedOT", LAYER_DROPS[1]: "FedOT, not distilled"}
    known = CHANGES["rivals"] | {row: of_the_paper[name] for row, name in names.items()}
    found = known | {name: change for group in groups for name, change in CHANGES[group].items() if name not in known}
    if "dials" in groups:
        found |= {name: dial(world, share) for name, share in DIALS.items()}
    if "silos" in groups and merged(world.settings, world.accuracy)["distillation"]["closed_form_samples"]:
        found |= REFITTED
    if "steps" in groups:
        found |= {name: stepped(world, factor) for name, factor in STEPS.items()}
    if "distillation" in groups and not TASKS[world.settings["model"]["task"]].head:
        more = merged(WORDS["logits"], stepped(world, STEPS["steps x 4"]))
        found |= WORDS | {"logits, steps x 4": more}
        if "ffn" in groups:
            both = "LoRA in the FFN, R 5"
            found[f"{both}, logits, steps x 4"] = merged(more, CHANGES["ffn"][both])
    return found


def stepped(world: World, factor: float) -> Settings:
    """With so many times the world's own steps of the layer-level distillation."""
    return {"distillation": {"steps": round(factor * world.settings["distillation"]["steps"])}}


def dial(world: World, share: float) -> Settings:
    """With another K; layers that stay whole anyway do so as before."""
    return {"proxy": {"neurons": round(share * world.ffn), "allow_whole": share == 1}}


def table(world: World, groups: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The cells of one world; every row comes to its first seed before any to its second."""
    settings = merged(merged(world.settings, {"evaluation": {"gap_samples": GAP_SAMPLES}}), world.accuracy)
    return [
        Cell(world, name, "", {"preset": None} | merged(settings, change) | {"seed": seed}, counted=False)
        for seed in seeds
        for name, change in variants(world, groups).items()
    ]


def quick(world: World) -> World:
    """The same with a quarter of the rows and half the rounds: to try something, not to show it."""
    data = dict(world.origin["data"])
    data |= {part: data[part] // QUARTER for part in ("train", "test", "public") if part in data}
    rounds = max(1, world.settings["training"]["rounds"] // 2)
    settings = merged(world.settings, {"training": {"rounds": rounds}})
    return replace(world, settings=settings, origin={**world.origin, "data": data})


def run_cell(cell: Cell, files: Files, work: Path, *, device: str, threads: int | None) -> Record:
    """As bench.paper's, with `outcomes` and `gaps`."""
    record = cells.run_cell(cell, files, work, device=device, threads=threads)
    out = cells.directory_of(cell, work)
    answers = json.loads((out / "answers.json").read_text(encoding="utf-8"))
    stages = json.loads((out / "curves.json").read_text(encoding="utf-8"))["alignment"]["stages"]
    shutil.rmtree(out)
    return record | {
        "outcomes": {row: _outcomes(cell, files, found) for row, found in answers.items()},
        "gaps": [{name: found for name, found in stage.items() if name != "layers"} for stage in stages],
    }


def _outcomes(cell: Cell, files: Files, answers: Sequence[Any]) -> list[tuple[float, float]]:
    """Of each test row what adds up to the headline and what that is divided by: right or not of 1, nats of tokens."""
    if not TASKS[cell.settings["model"]["task"]].label_list:
        return [(round(loss, 4), tokens) for loss, tokens, _ in answers]
    assert files.labels is not None
    labels = files.labels.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in files.test.read_text(encoding="utf-8").splitlines()]
    return [(float(labels[answer] == row["label"]), 1.0) for answer, row in zip(answers, rows, strict=True)]


@dataclass(frozen=True)
class Compared:
    """A mean over seeds, and its standard error over test rows: of a difference, with both sides on the same rows."""

    value: float
    error: float

    def shown(self, metric: Metric) -> str:
        """In percent, if the metric is a share."""
        scale, digits = (100, 1) if metric.percent else (1, 3)
        return f"{scale * self.value:+.{digits}f} ± {scale * self.error:.{digits}f}"


def compared(ours: Sequence[Record], theirs: Sequence[Record], rows: tuple[str, str], metric: Metric) -> Compared:
    """Ours minus theirs, above 0 if ours is better.

    The seeds share their test rows, so a row's differences are averaged over the seeds before their spread is taken
    as that of a ratio of two sums.

    Args:
        ours, theirs: records of the same seeds.
        rows: which row of each.
    """
    (mean, residuals), (other, others) = (_mean_and_residuals(*side) for side in ((ours, rows[0]), (theirs, rows[1])))
    value = mean - other if metric.more_is_better else other - mean
    spread = statistics.stdev(a - b for a, b in zip(residuals, others, strict=True))
    return Compared(value, spread / math.sqrt(len(residuals)))


def _mean_and_residuals(records: Sequence[Record], row: str) -> tuple[float, list[float]]:
    """Of the headline; what each test row adds to its error, both averaged over the seeds."""
    means, residuals = [], []
    for outcomes in (record["outcomes"][row] for record in records):
        weight = statistics.fmean(each[1] for each in outcomes)
        means.append(statistics.fmean(each[0] for each in outcomes) / weight)
        residuals.append([(found - means[-1] * counted) / weight for found, counted in outcomes])
    return statistics.fmean(means), [statistics.fmean(each) for each in zip(*residuals, strict=True)]


def markdown(found: Sequence[Cell], records: Mapping[str, Record]) -> str:
    """The table of one world, from those of its cells that have been run."""
    world = found[0].world
    metric = TASKS[world.settings["model"]["task"]].headline
    rows: dict[str, dict[int, Record]] = {}
    for cell in found:
        if cell.key in records:
            rows.setdefault(cell.method, {})[cell.seed] = records[cell.key]
    head = [
        "row", "plugged_in", "proxy", "plugged_in - proxy", f"against {PRODUCT}", "of the way", "hidden error",
        "gradient cosine", "with labels", "distillation, s", "in all, s", "seeds",
    ]  # fmt: skip
    lines = [f"{world.model}, {world.task}{_before(rows, metric)}", "", line(head), line(["---"] * len(head))]
    for name, of_seed in rows.items():
        lines.append(line([name, *_columns(of_seed, rows, metric), " ".join(map(str, sorted(of_seed)))]))
    return "\n".join(lines)


def drawing(found: Sequence[Cell], records: Mapping[str, Record]) -> str:
    """The dials of one world as an SVG file: plugged-in model and proxy over K; empty if only one has been run."""
    world, metric = found[0].world, TASKS[found[0].settings["model"]["task"]].headline
    dials = {name: round(share * world.ffn) for name, share in DIALS.items()}
    values: dict[str, dict[str, list[float]]] = {}
    for cell in found:
        for row in ("proxy", "plugged_in") if cell.key in records else ():
            reached = records[cell.key]["metrics"][row][metric.name]
            values.setdefault(cell.method, {}).setdefault(row, []).append(reached)
    means = {name: {row: statistics.fmean(each) for row, each in rows.items()} for name, rows in values.items()}
    levels = {name: means[name]["plugged_in"] for name in (FULL_MODEL, *LAYER_DROPS) if name in means}
    points = [{KEPT: dials[name], **rows} for name, rows in means.items() if name in dials]
    if not points:
        return ""
    if PRODUCT in means:
        points.append({KEPT: world.hidden, **means[PRODUCT]})
    points.sort(key=lambda each: each[KEPT])
    return standing_alone(score_by_round(points, levels, metric, KEPT, from_zero=False))


def _before(rows: Mapping[str, Mapping[int, Record]], metric: Metric) -> str:
    """What there was before any tuning."""
    found: dict[str, list[float]] = {}
    for record in rows.get(PRODUCT, {}).values():
        for name in ("majority", "zero_shot", "proxy_zero_shot"):
            if name in record["metrics"]:
                found.setdefault(name, []).append(record["metrics"][name][metric.name])
    return "".join(f"; {name} {spread(values, metric)}" for name, values in found.items())


def _columns(own: Mapping[int, Record], rows: Mapping[str, Mapping[int, Record]], metric: Metric) -> list[str]:
    product, records = rows.get(PRODUCT, {}), list(own.values())
    shared = sorted(own.keys() & product.keys())
    gain = compared(records, records, ("plugged_in", "proxy"), metric)
    against = [[side[seed] for seed in shared] for side in (own, product)]
    stages = [record["gaps"] for record in records]
    seconds = [record["seconds"] for record in records]
    return [
        spread([record["metrics"]["plugged_in"][metric.name] for record in records], metric),
        spread([record["metrics"]["proxy"][metric.name] for record in records], metric),
        gain.shown(metric),
        compared(*against, ("plugged_in", "plugged_in"), metric).shown(metric) if shared and own is not product else "",
        way(own, rows, metric),
        *(_last(stages, name) for name in ("hidden_error", "gradient_cosine", "task_cosine")),
        f"{statistics.fmean(each.get('distillation', 0.0) for each in seconds):,.0f}",
        f"{statistics.fmean(sum(each.values()) for each in seconds):,.0f}",
    ]


def way(own: Mapping[int, Record], rows: Mapping[str, Mapping[int, Record]], metric: Metric) -> str:
    """How much of the way from the better layer-drop proxy's product to the tuned full model, over the seeds of all."""
    sides = [side for name in (*LAYER_DROPS, FULL_MODEL) if (side := rows.get(name))]
    seeds = own.keys() & set.intersection(*map(set, sides)) if FULL_MODEL in rows and len(sides) > 1 else set()
    if not seeds:
        return ""
    *drops, end, reached = (
        statistics.fmean(side[seed]["metrics"]["plugged_in"][metric.name] for seed in seeds) for side in (*sides, own)
    )
    start = max(drops) if metric.more_is_better else min(drops)
    return f"{(reached - start) / (end - start):.0%}".replace("-0%", "0%") if end != start else ""


def _last(stages: Sequence[Sequence[Mapping[str, Any]]], name: str) -> str:
    """The mean over layers before the federation begins, when the distillation is over."""
    found = [
        [stage[name] for stage in each if stage["stage"] in ("cut", "distilled") and stage.get(name)] for each in stages
    ]
    means = [statistics.fmean(each[-1]) for each in found if each]
    return f"{statistics.fmean(means):.3f}" if means else ""


def run(arguments: argparse.Namespace) -> None:
    """Runs what is missing, and prints the tables."""
    work = arguments.work.absolute()
    found = worlds.chosen(worlds.worlds(), setting=None, model=arguments.model, task=arguments.task)
    out = arguments.out or (work / "quick" if arguments.quick else Path("bench/results"))
    records = cells.read_records(out / "accuracy.jsonl")
    for world in map(quick, found) if arguments.quick else found:
        planned = table(world, arguments.change, range(arguments.seeds))
        wanted = [cell for cell in planned if arguments.row in (None, cell.method)]
        missing = [cell for cell in wanted if cell.key not in records]
        if missing and not arguments.show:
            files = world.files(work, arguments.packages or work / "packages", arguments.data)
            for number, cell in enumerate(missing, 1):
                log.info("cell %d of %d: %s", number, len(missing), cell.title)
                record = run_cell(cell, files, work, device=arguments.device, threads=arguments.threads)
                records[cell.key] = record
                cells.add_record(out / "accuracy.jsonl", record)
        print(f"\n{markdown(planned, records)}", flush=True)
        if not arguments.show and (picture := drawing(planned, records)):
            atomic.write_text(out / f"accuracy-dials-{world.model}-{world.task}.svg", picture)


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--change", action="append", default=[], choices=CHANGES, help="a group of rows beside the rivals")
    add("--model", required=True)
    add("--task", required=True)
    add("--row", help="run only this one")
    add("--quick", action="store_true", help="a quarter of the rows, half the rounds")
    add_options(parser)
    return parser.parse_args(command_line)


def main() -> int:
    """The command."""
    arguments = parse()
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
