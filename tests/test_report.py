"""The run's page and table."""

import re
import warnings
import xml.etree.ElementTree as ET
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedpft.report.page import MEANINGS, format_table, write_report

SUMMARY: dict[str, Any] = {
    "task": "sequence-classification",
    "metrics": {
        "plugged_in": {"accuracy": 0.5713, "macro_f1": 0.5603},
        "majority": {"accuracy": 0.0525, "macro_f1": 0.005},
        "proxy": {"accuracy": 0.5531, "macro_f1": 0.5402},
        "head_only": {"accuracy": 0.4312, "macro_f1": 0.41},
    },
    "parameters": {
        "model": 22_721_684,
        "proxy": 19_174_100,
        "model_transformer": 10_646_784,
        "proxy_transformer": 7_107_072,
        "adapter": 154_772,
    },
    "holdings": {
        "embeddings": {"model": 11_920_512, "proxy": 11_920_512},
        "attention": {"model": 3_548_160, "proxy": 3_548_160},
        "ffn": {"model": 7_089_408, "proxy": 3_549_696},
        "norms": {"model": 9_216, "proxy": 9_216},
    },
    "data": {
        "server": {"public": {"samples": 4000, "cut_texts": 31}, "test": {"samples": 900, "cut_texts": 0}},
        "silos": {"south": {"samples": 1234}, "<north>": {"samples": 77, "skipped_rows": 3, "cut_texts": 5}},
    },
    "bytes": {"down": 236_182_345, "up": 11_143_584},
    "seconds": {"distillation": 61.4, "rounds": 214.9},
    "rounds": [
        {"round": 1, "train_loss": 2.5, "score": 0.31, "alignment_loss": None, "silos": 3},
        {"round": 2, "train_loss": 1.5, "score": None, "alignment_loss": 0.09, "silos": 2},
    ],
    "versions": {"torch": "2.13.0"},
    "seed": 0,
    "config": {"proxy": {"neurons": "<hidden>"}},
}
UNTESTED = SUMMARY | {"metrics": {}}  # without test data there are no rows, and no drawing of them
COMPARED = {"full_model": {"accuracy": 0.58, "macro_f1": 0.57}, "layer_drop": {"accuracy": 0.53, "macro_f1": 0.52}}
CURVES: dict[str, Any] = {
    "distillation": [{"stage": "layer-level", "loss": [0.3, 0.2, 0.1]}, {"stage": "round 2", "loss": [0.1, 0.08]}],
    "alignment": {
        "layers": [1, 2],
        "stages": [
            {"stage": "as cut", "hidden_error": [0.1, 0.2], "gradient_cosine": [0.5, 0.4]},
            {"stage": "distilled", "hidden_error": [0.05, 0.1], "gradient_cosine": [0.8, 0.7]},
        ],
    },
    "saliency_kept": {"layers": [0, 1, 2, 3], "share": [1.0, 0.31, 0.33, 1.0]},
    "rounds": [{"round": 1, "proxy": 0.3, "plugged_in": 0.31}, {"round": 2, "proxy": 0.5, "plugged_in": 0.52}],
    "split": {"labels": ["sport", "$x$ <b>"], "silos": {"north": [120, 31], "south": [0, 77]}},
}


def page(directory: Path, summary: dict[str, Any], curves: dict[str, Any]) -> str:
    write_report(summary, curves, directory / "report.html")
    return (directory / "report.html").read_text(encoding="utf-8")


def drawings(html: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run that was compared, with every figure."""
    summary = {**SUMMARY, "metrics": {**SUMMARY["metrics"], **COMPARED}}
    return page(tmp_path_factory.mktemp("report"), summary, CURVES)


def test_the_table_has_every_row_in_its_order() -> None:
    lines = format_table({"task": SUMMARY["task"], "metrics": {**COMPARED, **SUMMARY["metrics"]}}).splitlines()
    names = [line.split()[0] for line in lines[2:]]
    assert names == ["majority", "head_only", "proxy", "plugged_in", "full_model", "layer_drop"]
    assert lines[0].split() == ["row", "accuracy", "macro-F1", "meaning"]
    assert lines[5] == "plugged_in    0.5713    0.5603  the FM with the silos' adapter: the product"
    assert len({line.index(MEANINGS[name]) for line, name in zip(lines[2:], names, strict=True)}) == 1


@pytest.mark.parametrize(
    ("task", "value", "sentence"),
    [
        (
            "sequence-classification",
            0.0637,
            "improves the accuracy by 6.4 points beside the tuned proxy's (standard",
        ),
        ("sequence-classification", -0.004, "worsens the accuracy by 0.4 points"),
        ("causal-lm", 0.8042, "by 0.804 beside the tuned proxy's (standard error 0.012,"),
    ],
)
def test_what_plugging_in_is_worth_stands_below_the_table(
    task: str, value: float, sentence: str, tmp_path: Path
) -> None:
    gain = {"value": value, "standard_error": 0.0123}
    headline = {"sequence-classification": "accuracy", "causal-lm": "loss"}[task]
    summary = {**SUMMARY, "task": task, "gain": gain, "metrics": {"plugged_in": {headline: 0.5}}}
    assert sentence in format_table(summary).splitlines()[-1]
    assert sentence.split(" (")[0].replace("'", "&#x27;") in page(tmp_path, summary, {})
    assert "beside the tuned" not in page(tmp_path, {**summary, "gain": None}, {})


def test_rows_are_drawn_by_round_or_else_beside_each_other(tmp_path: Path) -> None:
    bars, lines = "Bar chart of test accuracy: plugged_in 57.1%", "Line chart of test accuracy by round"
    by_round, without = page(tmp_path, SUMMARY, CURVES), page(tmp_path, SUMMARY, {**CURVES, "rounds": []})
    assert (lines in by_round, bars in by_round) == (True, False)
    assert (lines in without, bars in without) == (False, True)


def test_the_page_needs_nothing_beside_itself(tmp_path: Path) -> None:
    html = page(tmp_path, SUMMARY, CURVES)
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', html) == []
    assert "<script" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_page_shows_every_number_of_the_summary(whole: str) -> None:
    html = whole.replace("\u2009", "")
    for shown in ("0.5713", "0.5603", "22721684", "84.4%", "236182345", "236.2 MB", "61.4", "0.0900", "2.5000"):
        assert shown in html, shown
    assert "has a test accuracy of 57.1%, against 55.3% of the proxy alone and 43.1% without adapters." in html
    assert "67% of its transformer parameters" in html
    assert "<td>FFN</td><td class=n>7089408</td><td class=n>3549696</td><td class=n>50.1%</td>" in html


def test_text_from_the_run_is_escaped(whole: str) -> None:
    assert "&lt;hidden&gt;" in whole
    assert "<hidden>" not in whole


def test_tags_are_balanced(whole: str) -> None:
    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(whole)
    parser.close()
    assert parser.open == []


def test_every_figure_is_well_formed_and_says_what_it_shows(whole: str) -> None:
    found = drawings(whole)
    assert len(found) == 6
    labels = []
    for drawing in found:
        root = ET.fromstring(drawing.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
        assert root.get("role") == "img"
        labels.append(root.get("aria-label") or "")
        assert not re.search(r"#0000\d\d|#000000", drawing), "a colour that the page cannot set"
    assert any("plugged-in from 31.0% to 52.0%" in label for label in labels)
    assert any("round 2 from 0.1 to 0.08" in label for label in labels)
    assert any("gradient cosine 0.75 distilled" in label for label in labels)
    assert any("layer 1 31%" in label for label in labels)
    assert any("2 silos with 77 to 151 rows of 2 labels, of which a silo has 1 to 2" in label for label in labels)
    assert any("full_model 58.0%, plugged_in 57.1%" in label for label in labels)


def test_ids_of_different_figures_differ(whole: str) -> None:
    found = drawings(whole)
    ids = [set(re.findall(r'\bid="([^"]+)"', drawing)) for drawing in found]
    assert sum(map(len, ids)) == len(set().union(*ids))
    for drawing, own in zip(found, ids, strict=True):
        assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', drawing)) <= own


def test_the_headline_says_how_far_it_is_to_the_full_model(tmp_path: Path) -> None:
    html = page(tmp_path, {**SUMMARY, "metrics": {**SUMMARY["metrics"], **COMPARED}}, {})
    assert "83% of the way from dropping layers to tuning the full model" in html


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    assert page(tmp_path, SUMMARY, CURVES) == page(tmp_path, SUMMARY, CURVES)


@pytest.mark.parametrize("missing", [*CURVES, "all"])
def test_a_missing_curve_leaves_no_empty_figure(tmp_path: Path, missing: str) -> None:
    curves = {} if missing == "all" else {name: curve for name, curve in CURVES.items() if name != missing}
    html = page(tmp_path, UNTESTED, curves)
    assert len(drawings(html)) == html.count("<figure>") == len(curves)


def test_empty_curves_leave_no_figure(tmp_path: Path) -> None:
    curves = {
        "distillation": [{"stage": "layer-level", "loss": []}],
        "alignment": {"layers": [], "stages": []},
        "saliency_kept": {"layers": [], "share": []},
        "rounds": [{"round": 1, "proxy": None, "plugged_in": None}],
        "split": {"labels": [], "silos": {}},
    }
    assert drawings(page(tmp_path, UNTESTED, curves)) == []


def test_one_stage_and_one_step_are_drawn(tmp_path: Path) -> None:
    curves = {
        "distillation": [{"stage": "round 2", "loss": [0.1]}],
        "alignment": {"layers": [1], "stages": [{"stage": "as cut", "hidden_error": [0.1]}]},
        "rounds": [{"round": 1, "proxy": 0.2}],
    }
    assert len(drawings(page(tmp_path, UNTESTED, curves))) == 3


def cells(drawing: str) -> int:
    """How many rectangles the shares of a split are drawn as, over all shades; the legend's are not clipped."""
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: var\(--accent\)', drawing)
    return sum(path.count("z") for path in paths)


def test_the_refinement_after_plug_in_is_drawn_beside_the_distillations(tmp_path: Path) -> None:
    curves = CURVES | {"refinement": {"layer_scales": [1.0, 0.9], "loss": [0.5, 0.25]}}
    html = page(tmp_path, UNTESTED, curves)
    assert "refinement from 0.5 to 0.25" in html
    assert "refinement after plug-in" in html
    assert "refinement" not in page(tmp_path, SUMMARY, CURVES | {"refinement": {"layer_scales": [], "loss": []}})


def test_a_small_split_is_drawn_with_every_count_and_name(tmp_path: Path) -> None:
    (drawing,) = drawings(page(tmp_path, UNTESTED, {"split": CURVES["split"]}))
    texts = [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawing)]
    for shown in ("north", "south", "sport", "$x$ <b>", "120", "31", "151", "60% to 100%"):
        assert shown in texts, shown
    assert texts.count("77") == 2, "above its bar, and in its cell"
    assert "0" not in texts[texts.index("120") :], "a label that a silo does not have has no cell"


@pytest.mark.parametrize(("silos", "labels", "shown"), [(20, 3, 20), (100, 20, 100), (121, 2, 120), (1000, 0, 120)])
def test_a_large_split_is_drawn_up_to_120_silos_in_order_of_size(
    silos: int, labels: int, shown: int, tmp_path: Path
) -> None:
    counts = {f"silo {silo}": [silo + 1] * max(1, labels) for silo in range(silos)}
    split = {"labels": [f"label {label}" for label in range(labels)], "silos": counts}
    html = page(tmp_path, UNTESTED, {"split": split})
    (drawing,) = drawings(html)
    assert cells(drawing) == shown * labels
    bars = re.findall(r'<path d="M \S+ (\S+) \nL \S+ \S+ \nL \S+ (\S+) [^"]*"[^>]*style="fill: var\(--third\)', drawing)
    heights = [float(foot) - float(top) for foot, top in bars]
    assert len(heights) == shown
    assert heights == sorted(heights, reverse=silos > 20)
    assert ("largest first" in drawing) == (silos > 20)
    assert ("120 of the" in html) == (silos > 120)
    assert f"{silos} silos with {max(1, labels)} to {silos * max(1, labels)} rows" in drawing


def test_the_rarest_of_very_many_labels_are_drawn_as_one(tmp_path: Path) -> None:
    names = [f"label {label}" for label in range(102)]
    split = {"labels": names, "silos": {"a": list(range(1, 103)), "b": [0] * 101 + [5]}}
    (drawing,) = drawings(page(tmp_path, UNTESTED, {"split": split}))
    assert [name in drawing for name in ("label 73<", "label 72<", "73 others<")] == [True, False, True]
    assert f">{sum(range(1, 74))}<" in drawing
    assert cells(drawing) == 30 + 1
    assert "of 102 labels, of which a silo has 1 to 102" in drawing


def test_names_of_any_letters_are_drawn_without_a_word(tmp_path: Path) -> None:
    long = "a-silo-of-the-north-coast-07"
    split = {"labels": ["\u8d1f\u9762", "a\x01b", "$\\x^{"], "silos": {long: [1, 2, 3], "$b_$": [1, 0, 0]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (drawing,) = drawings(page(tmp_path, UNTESTED, {"split": split}))
    for shown in ("\u8d1f\u9762<", ">ab<", "$\\x^{<", "a-silo-of\u2026coast-07<", "$b_$<"):
        assert shown in drawing, shown


def test_the_data_of_the_server_and_of_each_silo_is_counted_as_far_as_it_is_shared(whole: str) -> None:
    section = whole[whole.index("<h2>Data</h2>") :]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", section)[:4]]
    assert rows == [
        ["public data", "4\u2009000", "0", "31"],
        ["test data", "900", "0", "0"],
        ["silo &lt;north&gt;", "77", "3", "5"],
        ["silo south", "1\u2009234", "-", "-"],
    ]


def test_of_many_silos_the_largest_are_listed_and_the_others_added_up(tmp_path: Path) -> None:
    silos = {f"silo-{number:02d}": {"samples": number, "cut_texts": 1} for number in range(1, 24)}
    del silos["silo-03"]["cut_texts"]
    write_report({**SUMMARY, "data": {"silos": silos}}, {}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    listed = re.findall(r"silo-\d\d", page[page.index("<h2>Data</h2>") :])
    assert listed == [f"silo-{number:02d}" for number in range(4, 24)]
    assert re.search(r"the 3 other silos</td><td[^>]*>6</td>(<td[^>]*>-</td>)+</tr>", page), (
        "one does not share a count"
    )


@pytest.mark.parametrize(
    ("used", "said"), [(300, "after each round on 300 of the 900 test samples, of"), (900, "after each round, of")]
)
def test_the_curve_says_if_it_was_measured_on_fewer_samples_than_the_table(
    tmp_path: Path, used: int, said: str
) -> None:
    html = page(tmp_path, SUMMARY | {"config": {"evaluation": {"samples_per_round": used}}}, CURVES)
    assert said in html


def test_a_run_without_evaluation_has_a_page(tmp_path: Path) -> None:
    html = page(tmp_path, {key: value for key, value in SUMMARY.items() if key != "metrics"}, {})
    assert "Parameters" in html
    assert "Result" not in html
