"""Lays out what simulation.yaml here names: one labelled file, public and test data, and the model."""

from pathlib import Path

from fedpft.demo.corpora import model_directory, prepare

HERE = Path(__file__).resolve().parent

prepare(
    HERE / "data",
    corpus="20newsgroups",
    silos=["everybody"],
    documents=4000,
    test_documents=600,
    public_documents=1500,
    concentration=1.0,
    seed=0,
)
(HERE / "model").unlink(missing_ok=True)
(HERE / "model").symlink_to(model_directory(), target_is_directory=True)
print(f"ready: data/ and model/ are in {HERE}")
