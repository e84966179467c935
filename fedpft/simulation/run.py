"""One simulated federation, from start to files.

Construction, state machine, training, encoding, checks, aggregation and ledger are those of a real federation, and the
same seed, data and threads give the same bytes; what is missing is the wire, and the silos' own processes. Here they
train one after the other on one proxy, or on one in each of several processes, so that memory does not grow with their
number. Beside what server/run.py names, OUT/silos/<silo>/ holds what a silo has on disk between two rounds.
"""

from pathlib import Path
from typing import Any

from fedpft.config import RoundSettings, SimulationConfig
from fedpft.server import run as server
from fedpft.server.ledger import Ledger
from fedpft.simulation.crew import Post, cluster, crew
from fedpft.simulation.data import SilosData
from fedpft.simulation.silos import SimulatedSilos
from fedpft.wire.hello import Terms


def simulate(config: SimulationConfig, *, processes: int = 1, ray: str | None = None) -> dict[str, Any]:
    """Runs a whole federation and writes OUT as the server does; one that was stopped goes on.

    Args:
        processes: in which silos train at the same time; 1: in this one, one after the other.
        ray: address of the Ray cluster on which they train instead, "auto" for the one that this machine is part of.

    Returns:
        What is in OUT/summary.json.

    Raises:
        FedPFTError: docs/errors.md.
    """
    silos_data = SilosData(config)
    config = silos_data.config
    joined = None if ray is None else cluster(ray)  # before the proxy is built, which may take hours

    def reach(_: object, bundle: Path, settings: RoundSettings, ledger: Ledger, __: Terms) -> SimulatedSilos:
        post = Post(bundle, settings, silos_data)
        return SimulatedSilos(config, bundle, settings, ledger, silos_data, crew(post, processes, joined))

    return server.run(config, reach)
