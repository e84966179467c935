"""Shamir's secret sharing of 32 bytes: any `threshold` of the shares give the secret, fewer give nothing.

    share x = secret + c_1 x + ... + c_{t-1} x^{t-1}  mod P,   c_k drawn evenly, x = 1 ... n,   P = 2^256 + 297, a prime

(Shamir 1979). How long it takes depends on threshold and number of shares alone, but for Python's arithmetic with large
numbers, whose time a party on another machine cannot tell.
"""

import secrets
from collections.abc import Callable, Mapping

PRIME = (1 << 256) + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of 33 bytes for x = 1 ... count."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"a secret of {len(secret)} bytes cannot be split into {count} shares, {threshold} needed")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_at(coefficients, x).to_bytes(SHARE_BYTES) for x in range(1, count + 1)]


def combine(shares: Mapping[int, bytes], threshold: int, fits: Callable[[bytes], bool]) -> bytes | None:
    """The secret, from shares by their x; None if no `threshold` of them in a row give one that `fits`.

    One wrong share among more than `threshold` does no harm.
    """
    known = sorted(shares)
    for first in range(len(known) if len(known) > threshold else 1):
        chosen = [known[(first + place) % len(known)] for place in range(min(threshold, len(known)))]
        found = _interpolated({x: int.from_bytes(shares[x]) for x in chosen})
        if len(chosen) == threshold and found < 1 << 256 and fits(secret := found.to_bytes(SECRET_BYTES)):
            return secret
    return None


def _at(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _interpolated(points: Mapping[int, int]) -> int:
    """The value at 0 of the polynomial through the points (Lagrange)."""
    total = 0
    for x, value in points.items():
        numerator, denominator = value, 1
        for other in points:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        total += numerator * pow(denominator, -1, PRIME)
    return total % PRIME
