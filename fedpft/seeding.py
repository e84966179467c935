"""The one place that randomness comes from."""

import hashlib


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for one purpose, the same on every machine and for every order of calls.

    Args:
        seed: the federation's seed.
        labels: what the seed is for, such as ("local training", "north", 3).
    """
    text = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
