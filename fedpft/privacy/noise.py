"""Randomness that nobody can foretell: which samples are in a step, and the noise on what is learned from them.

The operating system draws a key, which is never used again, and ChaCha20 (RFC 8439) stretches it. Nothing here has a
seed: a sampling that the server could repeat would amplify no privacy, and noise that it could would be none.
"""

import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

# A normal number in floating point is not dense, which an attacker with a part of the result could use (Mironov 2012);
# the mean of several takes that from him (Holohan and Braghin 2021, arXiv 2107.10138, section 3.3).
DRAWS = 4


class Secret:
    """A stream of random numbers."""

    def __init__(self) -> None:
        self._cipher = Cipher(ChaCha20(os.urandom(32), bytes(16)), None).encryptor()

    def uniform(self, count: int) -> Tensor:
        """Of (0, 1), (count,) float64, 53 bits each."""
        drawn = torch.frombuffer(bytearray(self._cipher.update(bytes(8 * count))), dtype=torch.int64)
        bits: Tensor = drawn.bitwise_right_shift(11).bitwise_and((1 << 53) - 1)
        found: Tensor = (bits.double() + 0.5) * 2.0**-53
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
