"""Random numbers of a sample: a function of the key, uniform and independent over keys and within a key."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from recipe.data.augment.rng import Rng
from recipe.run.files import CHECKOUT

KEY = {"stream": 2, "seed": 42, "epoch": 3, "index": 1_281_166, "copy": 1}
COUNT = 20_000
SERIES: dict[str, Callable[[int], Rng]] = {  # consecutive keys that differ in one part
    "stream": lambda i: Rng(i, 0, 0, 0),
    "seed": lambda i: Rng(2, i, 0, 0),
    "epoch": lambda i: Rng(2, 0, i, 0),
    "index": lambda i: Rng(2, 0, 0, i),
    "copy": lambda i: Rng(2, 0, 0, 0, i),
}


def numbers(rng: Rng, count: int = 20) -> list[float]:
    return [rng.random() for _ in range(count)]


def first_numbers(series: Callable[[int], Rng]) -> NDArray[np.float64]:
    return np.array([series(i).random() for i in range(COUNT)])


def numbers_of_one_key() -> NDArray[np.float64]:
    """2,500 blocks of eight."""
    return np.array(numbers(Rng(**KEY), COUNT))


def test_the_numbers_never_change() -> None:
    """A change of these numbers changes the pixels that every recipe trains on."""
    rng = Rng(**KEY)
    assert numbers(rng, 2) == [0.0009848275014430197, 0.8837410659724939]
    assert rng.integer(1000) == 409
    assert rng.normal(0.0, 1.0) == pytest.approx(1.0879906774649672, rel=1e-12)
    assert numbers(rng, 5)[-1] == 0.7926510886302853, "of the second block"


@pytest.mark.process
def test_equal_keys_give_equal_numbers_in_another_process() -> None:
    program = f"from recipe.data.augment.rng import Rng; rng = Rng(**{KEY}); print([rng.random() for _ in range(20)])"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=CHECKOUT, env=environment, text=True)
    assert printed.strip() == str(numbers(Rng(**KEY)))


@pytest.mark.parametrize("part", KEY)
def test_another_key_gives_other_numbers(part: str) -> None:
    for value in (KEY[part] + 1, KEY[part] + 2**32, KEY[part] ^ 2**63):
        assert not set(numbers(Rng(**KEY))) & set(numbers(Rng(**KEY | {part: value})))


def test_parts_that_are_swapped_give_other_numbers() -> None:
    keys = [(1, 2, 3, 4, 5), (2, 1, 3, 4, 5), (1, 3, 2, 4, 5), (1, 2, 4, 3, 5), (1, 2, 3, 5, 4)]
    assert len({Rng(*key).word() for key in keys}) == len(keys)


def test_no_word_comes_twice() -> None:
    words = {Rng(2, 0, epoch, index).word() for epoch in range(100) for index in range(100)}
    rng = Rng(2, 0, 0, 0)
    assert len(words | {rng.word() for _ in range(10_000)}) == 20_000 - 1, "all but the first of that key, in both"


@pytest.mark.parametrize("part", [*SERIES, "within"])
def test_numbers_are_uniform_and_neighbours_independent(part: str) -> None:
    found = numbers_of_one_key() if part == "within" else first_numbers(SERIES[part])
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.histogram(found, 256, (0, 1))[0]).pvalue > 1e-3
    low_bits = np.mod(found * 2**20, 1)  # not only the highest bits
    assert stats.kstest(low_bits, "uniform").pvalue > 1e-3
    for lag in (1, 2, 7, 8, 9, 64):
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 4 / np.sqrt(COUNT - lag), lag


def test_streams_seeds_epochs_copies_and_draws_are_independent() -> None:
    columns = [
        *(first_numbers(lambda i, s=stream: Rng(s, 0, 0, i)) for stream in (2, 5, 7)),
        *(first_numbers(lambda i, s=seed: Rng(2, s, 0, i)) for seed in (1, 2)),
        *(first_numbers(lambda i, e=epoch: Rng(2, 0, e, i)) for epoch in (1, 2)),
        first_numbers(lambda i: Rng(2, 0, 0, i, 1)),
        *np.array([numbers(Rng(2, 0, 0, i), 10)[1:] for i in range(COUNT)]).T,
    ]
    correlations = np.corrcoef(columns)[np.triu_indices(len(columns), 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(COUNT)
    cells = np.histogram2d(columns[0], columns[1], 16, [[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3, 224, 500])
def test_integers_are_uniform(count: int) -> None:
    rng = Rng(**KEY)
    for found in ([rng.integer(count) for _ in range(COUNT)], [Rng(2, 0, 0, i).integer(count) for i in range(COUNT)]):
        times = np.bincount(found, minlength=count)
        assert len(times) == count, "from 0 to count - 1"
        assert times.min() > 0
        assert count == 1 or stats.chisquare(times).pvalue > 1e-3


def test_other_distributions() -> None:
    rng = Rng(**KEY)
    assert stats.kstest([rng.uniform(-2.0, 3.0) for _ in range(COUNT)], stats.uniform(-2, 5).cdf).pvalue > 1e-3
    assert stats.kstest([rng.normal(0.6, 0.05) for _ in range(COUNT)], stats.norm(0.6, 0.05).cdf).pvalue > 1e-3


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_the_ends(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rng, "word", lambda _: word)
    rng = Rng(**KEY)
    assert 0 <= rng.random() < 1
    assert [rng.integer(count) for count in (1, 2, 224)] == ([0, 0, 0] if word == 0 else [0, 1, 223])
    assert 8 < abs(rng.normal(0.0, 1.0)) < 9
