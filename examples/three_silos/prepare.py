"""Lays out what server.yaml and the three silo.yaml files here name: data, keys and certificates, and the model.

An institution has its own data and receives its kit; the owner has the model. Here all of them are one machine.
"""

from pathlib import Path

from fedpft.demo.corpora import model_directory, prepare
from fedpft.provision import provision

HERE = Path(__file__).resolve().parent
SILOS = ("north", "south", "east")

prepare(
    HERE / "data",
    corpus="r8",
    silos=SILOS,
    documents=1200,
    test_documents=500,
    public_documents=1000,
    concentration=1.0,
    seed=0,
)
provision(HERE / "kits", SILOS)
(HERE / "model").symlink_to(model_directory(), target_is_directory=True)
print(f"ready: data/, kits/ and model/ are in {HERE}")
