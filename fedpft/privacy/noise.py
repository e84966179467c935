"""Randomness that nobody can foretell: which samples are in a step, and the noise on what is learned from them.

The operating system draws a key, which is never used again, and ChaCha20 (RFC 8439) stretches it. Nothing here has a
seed: a sampling that the server could repeat would amplify no privacy, and noise that it could would be none.
"""

import math
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

# A normal number in floating point is not dense, which an attacker with a part of the result could use (Mironov 2012);
# the mean of several takes that from him (Holohan and Braghin 2021, arXiv 2107.10138, section 3.3).
DRAWS = 4
PROPOSALS = 1 << 18  # of integers at a time
MOST_DEVIATION = 2.0**40  # in steps, so that all sums below are exact


class Secret:
    """A stream of random numbers."""

    def __init__(self, key: bytes | None = None) -> None:
        """key: 32 bytes that were drawn for this stream alone, if it is to be had again; default: from the system."""
        self._cipher = Cipher(ChaCha20(os.urandom(32) if key is None else key, bytes(16)), None).encryptor()

    def uniform(self, count: int) -> Tensor:
        """Of (0, 1), (count,) float64, 53 bits each."""
        found: Tensor = (self._bits(count, 53).double() + 0.5) * 2.0**-53
        return found

    def normal(self, count: int) -> Tensor:
        """With mean 0 and deviation 1, (count,) float64."""
        half = -(-count // 2)
        total = torch.zeros(2 * half, dtype=torch.float64)
        for _ in range(DRAWS):
            size, angle = (-2.0 * self.uniform(half).log()).sqrt(), 2.0 * torch.pi * self.uniform(half)
            total += torch.cat([size * angle.cos(), size * angle.sin()])
        drawn: Tensor = total[:count] / DRAWS**0.5
        return drawn

    def sample(self, count: int, rate: float) -> Tensor:
        """Each of `count` things with the same probability, by itself: ascending, int64; possibly none."""
        chosen: Tensor = (self.uniform(count) < rate).nonzero().squeeze(1)
        return chosen

    def discrete_gaussian(self, count: int, deviation: float) -> Tensor:
        """Integers x with probability in proportion to exp(-x^2 / 2 deviation^2), (count,) int64.

        By rejection (Canonne, Kamath, Steinke 2020, arXiv 2004.00010, algorithm 3): x is proposed with probability in
        proportion to exp(-|x| / t), and kept with exp(-(|x| - deviation^2 / t)^2 / 2 deviation^2). With t a power of
        two, |x| mod t is drawn as bits, exactly. The rest compares uniform numbers, which have 53 significant bits
        however small they are, with exponentials in double precision: the probability of each x within 12 deviations
        is off by a factor of 1 +- 2^-44 at most, of 10^7 values together by 1 +- 6e-7.
        """
        if not 0.0 < deviation <= MOST_DEVIATION:
            raise ValueError(f"a deviation of {deviation:g} steps cannot be drawn")
        kept, missing = [torch.empty(0, dtype=torch.int64)], count
        while missing > 0:
            kept.append(self._kept(min(3 * missing + 64, PROPOSALS), deviation))
            missing -= len(kept[-1])
        return torch.cat(kept)[:count]

    def _kept(self, count: int, deviation: float) -> Tensor:
        """Of so many proposals."""
        digits = max(math.ceil(math.log2(deviation)), 0)
        square, scale = deviation**2, 1 << digits
        drawn = self._bits(count, digits + 1)
        negative, low = drawn.bitwise_and(1).bool(), drawn.bitwise_right_shift(1)
        high = self._fine(count).log_().neg_().floor_()
        size = high * scale + low
        exponent = low / scale + (size - square / scale).square_() / (2.0 * square)
        keep = (self._fine(count) < exponent.neg_().exp_()) & ~(negative & (size == 0))
        found = size.to(torch.int64)
        return torch.where(negative, -found, found)[keep]

    def _fine(self, count: int) -> Tensor:
        """Of (0, 1], (count,) float64, with 53 significant bits down to 2^-53, and 53 bits below."""
        return (self._bits(count, 53).double() + self.uniform(count)).mul_(2.0**-53)

    def _bits(self, count: int, digits: int) -> Tensor:
        """(count,) int64 below 2^digits, at most 2^63."""
        drawn = torch.frombuffer(bytearray(self._cipher.update(bytes(8 * count))), dtype=torch.int64)
        found: Tensor = drawn.bitwise_right_shift(64 - digits).bitwise_and((1 << digits) - 1)
        return found
