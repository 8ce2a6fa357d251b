"""A few random numbers of a key: those of `numpy.random.default_rng(key)`, without what it costs to set one up.

To seed a generator takes numpy 15 times as long as to draw from it, and every image has a generator of its own. The
algorithms are fixed and published: SeedSequence after M. E. O'Neill's seed_seq_fe128, PCG64 (XSL-RR 128/64) after her
PCG, and D. Lemire's bounded integers (arXiv:1805.10941). They are written out here in Python's integers, and a test
compares them with numpy's, so that the draws of a recipe are the same numbers as before, with any numpy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

WORD, HALF, DOUBLE, STATE = 0xFFFFFFFF, 16, 0xFFFFFFFFFFFFFFFF, (1 << 128) - 1  # masks of 32, 64 and 128 bits
POOL_WORDS, STATE_WORDS = 4, 8
HASH_START, HASH_FACTOR = 0x43B0D7E5, 0x931E8875  # of numpy's SeedSequence: what goes into its pool
OUT_START, OUT_FACTOR = 0x8B51F9DD, 0x58F38DED  # and what comes out of it
MIX_LEFT, MIX_RIGHT = 0xCA01F9DD, 0x4973F715
PCG_FACTOR = 0x2360ED051FC65DA44385DF649FCCF645
FRACTION = 2.0**-53


def constants(start: int, factor: int, count: int) -> list[tuple[int, int]]:
    """What a word is combined with by "exclusive or" and then multiplied with, for each word that is hashed."""
    powers = [start * pow(factor, exponent, 1 << 32) & WORD for exponent in range(count + 1)]
    return list(itertools.pairwise(powers))


INTO_POOL = constants(HASH_START, HASH_FACTOR, POOL_WORDS)
WITHIN_POOL = [
    (source, target, *pair)
    for (source, target), pair in zip(
        [(source, target) for source in range(POOL_WORDS) for target in range(POOL_WORDS) if source != target],
        constants(HASH_START, HASH_FACTOR, POOL_WORDS**2)[POOL_WORDS:],
        strict=True,
    )
]
OUT_OF_POOL = [(i % POOL_WORDS, *pair) for i, pair in enumerate(constants(OUT_START, OUT_FACTOR, STATE_WORDS))]


class Draws:
    """Random numbers of a key, in numpy's order."""

    def __init__(self, key: Sequence[int]) -> None:
        a, b, c, d, e, f, g, h = seed_words(key)
        start = (b << 96) | (a << 64) | (d << 32) | c
        self.increment = ((f << 97) | (e << 65) | (h << 33) | (g << 1) | 1) & STATE
        self.state = ((self.increment + start) * PCG_FACTOR + self.increment) & STATE
        self.half: int | None = None  # of a double word, not handed out yet

    def double_word(self) -> int:
        """64 random bits."""
        self.state = state = (self.state * PCG_FACTOR + self.increment) & STATE
        mixed, turn = (state >> 64) ^ (state & DOUBLE), state >> 122
        return (mixed >> turn | mixed << (64 - turn)) & DOUBLE

    def word(self) -> int:
        """32 random bits: the lower half of a double word, then its upper half."""
        if self.half is not None:
            word, self.half = self.half, None
            return word
        double = self.double_word()
        self.half = double >> 32
        return double & WORD

    def random(self) -> float:
        """At least 0, less than 1."""
        return (self.double_word() >> 11) * FRACTION

    def uniform(self, low: float, high: float) -> float:
        """At least `low`, less than `high`."""
        return low + (high - low) * self.random()

    def below(self, count: int) -> int:
        """A whole number from 0 to `count` - 1, all equally likely; as `integers(0, count)`, `count` below 2**32."""
        if count == 1:
            return 0
        product = self.word() * count
        if product & WORD < count:
            least = (WORD + 1 - count) % count
            while product & WORD < least:
                product = self.word() * count
        return product >> 32


def seed_words(key: Sequence[int]) -> list[int]:
    """The eight words with which numpy's SeedSequence begins a PCG64, of numbers that are not negative."""
    words = [word for number in key for word in words_of(number)]
    pool = []
    for (exclusive, factor), word in zip(INTO_POOL, words + [0] * POOL_WORDS, strict=False):
        hashed = (word ^ exclusive) * factor & WORD
        pool.append(hashed ^ hashed >> HALF)
    for source, target, exclusive, factor in WITHIN_POOL:
        hashed = (pool[source] ^ exclusive) * factor & WORD
        mixed = (MIX_LEFT * pool[target] - MIX_RIGHT * (hashed ^ hashed >> HALF)) & WORD
        pool[target] = mixed ^ mixed >> HALF
    if len(words) > POOL_WORDS:
        add_to_pool(pool, words[POOL_WORDS:])
    found = []
    for source, exclusive, factor in OUT_OF_POOL:
        hashed = (pool[source] ^ exclusive) * factor & WORD
        found.append(hashed ^ hashed >> HALF)
    return found


def add_to_pool(pool: list[int], words: Sequence[int]) -> None:
    """Mix further words of a key into all of the pool."""
    used = POOL_WORDS**2
    further = iter(constants(HASH_START, HASH_FACTOR, used + POOL_WORDS * len(words))[used:])
    for word in words:
        for target, (exclusive, factor) in zip(range(POOL_WORDS), further, strict=False):
            hashed = (word ^ exclusive) * factor & WORD
            mixed = (MIX_LEFT * pool[target] - MIX_RIGHT * (hashed ^ hashed >> HALF)) & WORD
            pool[target] = mixed ^ mixed >> HALF


def words_of(number: int) -> list[int]:
    """A number in words of 32 bits, the lowest first."""
    words = [number & WORD]
    while number := number >> 32:
        words.append(number & WORD)
    return words
