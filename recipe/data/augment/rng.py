"""Random numbers of a sample, a function of its key: threads, processes and restarts do not change them."""

from __future__ import annotations

import struct
from hashlib import blake2b
from statistics import NormalDist

KEY = struct.Struct("<6Q")  # stream, seed, epoch, index, copy, block
BLOCK = struct.Struct("<8Q")  # all 64 bytes of BLAKE2b (RFC 7693), as words


class Rng:
    """Random numbers of copy `copy` of sample `index` in `epoch`. `stream` separates their purposes.

    Parts of the key are below 2**64 and not negative. Seeding a generator of numpy would take ten times as long as
    drawing the few numbers of a sample here.
    """

    def __init__(self, stream: int, seed: int, epoch: int, index: int, copy: int = 0) -> None:
        self.key = (stream, seed, epoch, index, copy)
        self.blocks = 0  # hashed so far
        self.words: list[int] = []  # of the last block, not used yet

    def word(self) -> int:
        """64 random bits."""
        if not self.words:
            self.words = list(BLOCK.unpack(blake2b(KEY.pack(*self.key, self.blocks)).digest()))
            self.blocks += 1
        return self.words.pop()

    def random(self) -> float:
        """A multiple of 2**-53 in [0, 1)."""
        return (self.word() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """A number in [`low`, `high`)."""
        return low + (high - low) * self.random()

    def integer(self, count: int) -> int:
        """An integer in [0, `count`), uniform up to `count` / 2**64."""
        return self.word() * count >> 64

    def normal(self, mean: float, std: float) -> float:
        """A normally distributed number, by the inverse distribution. `std` is above 0."""
        return NormalDist(mean, std).inv_cdf(((self.word() >> 12) + 0.5) * 2.0**-52)  # not 0 or 1
