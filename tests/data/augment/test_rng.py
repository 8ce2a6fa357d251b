"""The same numbers as numpy's own generator, whatever the key."""

from __future__ import annotations

import random

import numpy as np
import pytest

from recipe.data.augment.rng import Draws, seed_words


def keys() -> list[tuple[int, ...]]:
    """Keys as the augmentation has them, and longer ones with numbers of one to four words."""
    chance = random.Random(5)
    usual = [(2, chance.randrange(1000), epoch, chance.randrange(14_000_000)) for epoch in range(100)]
    bits = (1, 8, 31, 32, 33, 64, 100)
    odd = [tuple(chance.getrandbits(chance.choice(bits)) for _ in range(1 + length % 7)) for length in range(200)]
    return [*usual, *odd, (0,), (0, 0, 0, 0, 0), (2**32 - 1,) * 4, (2**32,) * 4]


def test_seeds_are_numpys() -> None:
    for key in keys():
        assert seed_words(key) == np.random.SeedSequence(key).generate_state(8).tolist(), key


@pytest.mark.parametrize("order", range(3))
def test_draws_are_numpys_in_any_order(order: int) -> None:
    """Whole numbers take halves of a double word; counts near 2**31 and above make draws again likely."""
    chance = random.Random(order)
    counts = [1, 2, 3, 224, 500, 2**31 + 1, 2**32 - 1]
    for key in keys():
        draws, numpys = Draws(key), np.random.default_rng(key)
        for _ in range(12):
            kind, low, count = chance.randrange(3), chance.random(), chance.choice(counts)
            if kind == 0:
                assert draws.random() == numpys.random()
            elif kind == 1:
                assert draws.uniform(low, 4 / 3) == numpys.uniform(low, 4 / 3)
            else:
                assert draws.below(count) == int(numpys.integers(0, count))
