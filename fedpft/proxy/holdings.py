"""What of the FM goes to the silos with the proxy: all of its embeddings and attention, and part of its FFNs."""

from collections.abc import Mapping

from torch import nn

from fedpft.config import ProxySection
from fedpft.errors import ModelError
from fedpft.proxy.cut import parameter_counts
from fedpft.proxy.selection import Selection


def check_holdings(selection: Selection, settings: ProxySection) -> None:
    """Raises ModelError if the proxy has every neuron of the FM, and nobody said that it may."""
    if selection.whole and not settings.allow_whole:
        raise ModelError(
            "the proxy would hold every FFN neuron of the FM, and so give all of it to the silos",
            "lower proxy.neurons, or name fewer layers in proxy.keep_layers; proxy.allow_whole: true if it is meant",
        )


def holdings(model: nn.Module, proxy: nn.Module) -> dict[str, dict[str, int]]:
    """For each part of the FM how many of its parameters there are, and how many of them the proxy holds."""
    whole, held = parameter_counts(model), parameter_counts(proxy)
    return {part: {"model": whole[part], "proxy": held[part]} for part in whole}


def format_holdings(parts: Mapping[str, Mapping[str, int]]) -> str:
    """The same in one line."""
    model, proxy = (sum(part[side] for part in parts.values()) for side in ("model", "proxy"))
    each = ", ".join(f"{name} {part['proxy'] / max(part['model'], 1):.0%}" for name, part in parts.items())
    return f"the silos receive {proxy / model:.0%} of the FM's parameters, {proxy:,} of {model:,}: {each}"
