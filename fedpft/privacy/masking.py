"""Masks: streams of AES-256-CTR that are added to a vector of 32-bit words, and taken off again.

A key is made for one stream and one direction, from 256 random bits; so its counter begins at 0. AES-CTR was faster
than ChaCha20 on the machines that were tried (8 against 5 GB/s, bench/secagg.py), and both are of `cryptography`, that
is OpenSSL, which does not branch on secrets.
"""

import hashlib
import hmac
from collections.abc import Sequence

import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

KEY_BYTES = 32
CHUNK_WORDS = 1 << 14  # of a vector at a time: with it a piece of each stream stays in the cache
_ZEROS = bytes(4 * CHUNK_WORDS)
_MARGIN = 4  # words that the cipher wants to have room for, and does not write

Mask = tuple[bytes, int]  # the key of its stream, and 1 if it is added or -1


class Streams:
    """The words that keys stand for, from the first on; a word is four bytes of the key stream, the lowest first."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._encryptors = [Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor() for key in keys]
        self._rows = torch.empty(len(keys), CHUNK_WORDS + _MARGIN, dtype=torch.int32)

    def next(self, count: int) -> Tensor:
        """(keys, count) int32, the next words of each, at most CHUNK_WORDS; good until the next call."""
        zeros = memoryview(_ZEROS)[: 4 * count]
        for encryptor, row in zip(self._encryptors, self._rows.numpy(), strict=True):
            encryptor.update_into(zeros, memoryview(row).cast("B"))
        return self._rows[:, :count]


def add_masks(words: Tensor, masks: Sequence[Mask], sign: int = 1) -> None:
    """Adds masks to (L,) int32 words, in place, modulo 2^32; with sign -1 takes them off."""
    streams = Streams([key for key, _ in masks])
    for chunk in words.split(CHUNK_WORDS):
        for (_, own), row in zip(masks, streams.next(len(chunk)), strict=True):
            chunk.add_(row, alpha=sign * own)


def derived(secret: bytes, *purpose: str | int | bytes) -> bytes:
    """A key for one purpose, by HKDF-SHA256."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=packed(*purpose)).derive(secret)


def hashed(*fields: str | int | bytes) -> bytes:
    """SHA-256 of the fields."""
    return hashlib.sha256(packed(*fields)).digest()


def same(one: bytes, other: bytes) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(one, other)


def packed(*fields: str | int | bytes) -> bytes:
    """The fields as bytes, each after its type and length, so that no two lists of fields give the same."""
    parts = [b"fedpft secure aggregation, 1"]
    for each in fields:
        content = each if isinstance(each, bytes) else str(each).encode()
        parts.append(b"%c%d:%b" % (type(each).__name__.encode()[0], len(content), content))
    return b"".join(parts)
