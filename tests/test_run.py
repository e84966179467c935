"""Whole federations of real processes: what the method promises has to hold from end to end.

They run a tiny ViT on scikit-learn's digits, over loopback.
"""

import json
import socket
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from fedpft.config import ColumnsSection, LimitsSection, RoundSettings
from fedpft.demo import corpora
from fedpft.demo.run import run_federation
from fedpft.model import adapters, loading
from fedpft.model.architectures import layers_of
from fedpft.model.subffn import projections
from fedpft.proxy.bundle import load_proxy
from fedpft.proxy.selection import load_selection
from fedpft.tasks import TASKS
from fedpft.training import train_round

SILOS = ("north", "south")
Digits = tuple[Path, corpora.DemoData]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """A ViT of 3 layers, D 32, F 128, and the digits of two silos."""
    root = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_labels=10,
    )
    transformers.ViTForImageClassification(config).save_pretrained(root / "model")
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(root / "model")
    data = corpora.prepare_digits(
        root / "data", silos=SILOS, images=500, test_images=100, public_images=64, concentration=1.0, seed=0
    )
    return root / "model", data


def server_settings(digits: Digits, silos: tuple[str, ...]) -> dict[str, Any]:
    model, data = digits
    return {
        "seed": 3,
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "threads": 1,
        "model": {"path": str(model), "labels": str(data.labels), "task": "image-classification"},
        "proxy": {"neurons": 40},
        "distillation": {"steps": 4, "batch": 16, "weight_term": 0.0},
        "alignment": {"counts": "silos", "every_rounds": 1, "steps": 2, "batch": 16},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"rounds": 2, "local_epochs": 12.0, "batch": 16, "learning_rate": 0.01},
        "federation": {"silos": list(silos)},
        "public_data": str(data.public),
        "test_data": str(data.test),
        "evaluation": {"samples_per_round": 50},
    }


def silo_settings(digits: Digits, name: str) -> dict[str, Any]:
    return {
        "insecure_loopback": True,
        "insecure_name": name,
        "data": {"path": str(digits[1].silos[name])},
        "threads": 1,
    }


def test_federation_of_one_silo_equals_local_training_bit_for_bit(digits: Digits, tmp_path: Path) -> None:
    settings = server_settings(digits, ("north",)) | {"alignment": {"every_rounds": 0}}
    settings["training"]["local_epochs"] = 0.5
    run_federation(tmp_path, settings, {"north": silo_settings(digits, "north")})

    proxy = load_proxy(tmp_path / "out" / "proxy" / "bundle")
    task = TASKS["image-classification"]
    samples = task.read_labelled(digits[1].silos["north"], ColumnsSection(), proxy.labels)
    dataset = task.encode(samples, proxy.processor, 1)
    rounds = RoundSettings(seed=3, adapter=settings["adapter"], training=settings["training"], inactive_below=0.01)
    adapters.attach(proxy.model, rounds.adapter, seed=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in (1, 2):
            result = train_round(
                task,
                proxy.model,
                dataset,
                rounds,
                silo="north",
                round=number,
                compressed=(),
                count_inactivity=False,
                limits=LimitsSection(),
                shift=task.logit_shift(task.label_counts(dataset, len(proxy.labels))),
            )
    finally:
        torch.set_num_threads(threads)
    federated = load_file(tmp_path / "out" / "adapter.safetensors")
    assert federated.keys() == result.adapter.keys()
    for name, tensor in federated.items():
        assert tensor.numpy().tobytes() == result.adapter[name].numpy().tobytes(), name


class Tap:
    """A TCP proxy in front of a server, which keeps every byte that passes, both ways.

    The server's address is read from a file when the first silo comes: by then it is there.
    """

    def __init__(self, address: Path) -> None:
        self.bytes, self._address = bytearray(), address
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            silo, _ = self._socket.accept()
            host, _, port = self._address.read_text(encoding="utf-8").strip().rpartition(":")
            server = socket.create_connection((host, int(port)))
            for source, sink in ((silo, server), (server, silo)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        # Each direction keeps its own stretch of bytes together, so that a weight is not torn by the other side.
        kept = bytearray()
        try:
            while piece := source.recv(1 << 16):
                kept += piece
                sink.sendall(piece)
        except OSError:
            pass  # one side closed first; the bytes so far count
        finally:
            self.bytes += kept
            sink.close()


@pytest.fixture(scope="module")
def captured(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The directory of a federation of two silos with alignment, and every byte that passed between its processes."""
    directory = tmp_path_factory.mktemp("captured")
    tap = Tap(directory / "out" / "address")
    silos = {name: silo_settings(digits, name) | {"server": tap.address} for name in SILOS}
    run_federation(directory, server_settings(digits, SILOS), silos)
    return directory, bytes(tap.bytes)


def test_tiny_vit_federation_beats_the_majority_and_fills_the_summary(captured: tuple[Path, bytes]) -> None:
    summary = json.loads((captured[0] / "out" / "summary.json").read_text(encoding="utf-8"))
    accuracy = {row: metrics["accuracy"] for row, metrics in summary["metrics"].items()}
    assert list(accuracy) == ["majority", "zero_shot", "proxy", "plugged_in"], "this FM has a head of its own"
    assert accuracy["plugged_in"] > accuracy["majority"] + 0.2
    assert accuracy["plugged_in"] > accuracy["zero_shot"] + 0.2
    first, last = summary["rounds"]
    assert (first["round"], first["silos"], last["silos"]) == (1, 2, 2)
    assert first["alignment_loss"] > 0
    assert last["alignment_loss"] is None
    parameters = summary["parameters"]
    assert parameters["proxy_transformer"] < parameters["model_transformer"]
    assert summary["data"]["server"] == {
        "public": {"samples": 64, "skipped_rows": 0, "cut_texts": 0},
        "test": {"samples": 100, "skipped_rows": 0, "cut_texts": 0},
    }
    told_by = [summary["data"]["silos"][name] for name in SILOS]
    assert sum(told["samples"] for told in told_by) == 500, "all of a silo's data, not what it went through in a round"
    for told in told_by:
        assert (told["skipped_rows"], told["cut_texts"]) == (0, 0)
    assert summary["bytes"]["down"] > 4 * parameters["proxy"] * len(SILOS)
    assert summary["bytes"]["up"] > 4 * parameters["adapter"] * len(SILOS) * 2
    assert {"construction", "distillation", "rounds", "alignment", "evaluation"} <= summary["seconds"].keys()


def test_both_forms_of_the_product_give_the_same_logits(captured: tuple[Path, bytes], digits: Digits) -> None:
    out, images = captured[0] / "out", torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    merged = transformers.AutoModelForImageClassification.from_pretrained(out / "merged").eval()
    labels = tuple(str(digit) for digit in range(10))
    model = loading.load_model(digits[0], "image-classification", labels, seed=3)
    with_adapter = peft.PeftModel.from_pretrained(model, out / "adapter").eval()
    torch.testing.assert_close(merged(images).logits, with_adapter(pixel_values=images).logits, rtol=1e-4, atol=1e-5)
    assert merged.config.id2label[3] == "3"


def test_the_same_seed_gives_the_same_bytes_whatever_the_order_of_updates(
    captured: tuple[Path, bytes], digits: Digits, tmp_path: Path
) -> None:
    run_federation(tmp_path, server_settings(digits, SILOS), {name: silo_settings(digits, name) for name in SILOS})
    for file in ("adapter.safetensors", "patch.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (captured[0] / "out" / file).read_bytes(), file


def test_no_dropped_neuron_crosses_the_wire_and_every_kept_one_does(
    captured: tuple[Path, bytes], digits: Digits
) -> None:
    directory, wire = captured
    model = loading.load_model(digits[0], "image-classification", [str(d) for d in range(10)], seed=3)
    selection = load_selection(directory / "out" / "proxy" / "selection.safetensors")
    for layer, neurons in enumerate(selection.neurons):
        (ffn,) = projections(model, layers_of(model)[layer])
        assert ffn["w_in"] is not None
        assert ffn["w_out"] is not None
        for weights in (ffn["w_in"], ffn["w_out"]):
            dropped = [j for j in range(len(weights)) if j not in set(neurons.tolist())]
            assert (len(dropped) == 0) == (layer in (0, 2))
            assert not [j for j in dropped if row_bytes(weights[j]) in wire]
    whole = projections(model, layers_of(model)[0])[0]["w_in"]
    assert whole is not None
    # HTTP/2 cuts what it carries into frames, and a row that lies across a cut is not found in one piece.
    found = sum(row_bytes(row) in wire for row in whole)
    assert found > 0.9 * len(whole)


def test_no_private_data_and_no_path_of_the_other_side_crosses_the_wire(
    captured: tuple[Path, bytes], digits: Digits
) -> None:
    directory, wire = captured
    model, data = digits
    assert str(model).encode() not in wire
    for path in data.silos.values():
        assert str(path.parent).encode() not in wire
        for image in sorted((path.parent / "images").iterdir())[:20]:
            assert image.name.encode() not in wire
            assert image.read_bytes()[-64:] not in wire
    for name in SILOS:
        assert str(model) not in (directory / f"silo-{name}.yaml").read_text(encoding="utf-8")
    server_yaml = (directory / "server.yaml").read_text(encoding="utf-8")
    assert not [path for path in data.silos.values() if str(path) in server_yaml]


def row_bytes(row: torch.Tensor) -> bytes:
    return row.contiguous().numpy().tobytes()


def test_bert_without_pooler_is_tuned_and_loads_everywhere_with_the_same_answers(tmp_path: Path) -> None:
    fm = tiny.without_pooler(tmp_path / "fm")
    rows = [f"the {color} {thing} moves" for color in ("red", "green", "blue") for thing in ("bird", "fish", "tree")]
    (tmp_path / "labels.txt").write_text("\n".join(tiny.LABELS))
    (tmp_path / "public.csv").write_text("\n".join(["text", *rows]))
    labelled = "\n".join(["text,label", *(f"{row},{tiny.LABELS[number % 3]}" for number, row in enumerate(rows))])
    for name in (*SILOS, "test"):
        (tmp_path / f"{name}.csv").write_text(labelled)
    settings = {
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "threads": 1,
        "model": {"path": str(fm), "labels": str(tmp_path / "labels.txt"), "max_tokens": 12},
        "distillation": {"steps": 1, "batch": 4},
        "alignment": {"every_rounds": 0},
        "training": {"rounds": 2, "batch": 4, "learning_rate": 0.01},
        "federation": {"silos": list(SILOS)},
        "public_data": str(tmp_path / "public.csv"),
        "test_data": str(tmp_path / "test.csv"),
    }
    silos = {
        name: {
            "insecure_loopback": True,
            "insecure_name": name,
            "data": {"path": str(tmp_path / f"{name}.csv")},
            "threads": 1,
        }
        for name in SILOS
    }
    summary = run_federation(tmp_path / "run", settings, silos)
    out = tmp_path / "run" / "out"
    first, last = (load_file(out / "rounds" / f"{number}" / "adapter.safetensors") for number in (0, 2))
    pooler = next(name for name in last if name.endswith("bert.pooler.dense.weight"))
    assert not torch.equal(first[pooler], last[pooler]), "the silos train what was drawn"
    holdings = summary["holdings"]
    assert holdings["attention"]["proxy"] == holdings["attention"]["model"]
    assert holdings["ffn"]["proxy"] < holdings["ffn"]["model"]
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(fm)

    inputs = tiny.batch("bert")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out / "merged")
    for seed in (1, 2):  # what would be drawn at random at each load
        torch.manual_seed(seed)
        names = {"id2label": merged.config.id2label, "label2id": merged.config.label2id}
        loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(out / "adapter"), **names).eval()
        torch.testing.assert_close(tiny.logits(loaded, inputs), tiny.logits(merged, inputs), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "adapter")
    assert tokenizer("the red bird")["input_ids"] == tiny.processor("bert")("the red bird")["input_ids"]
