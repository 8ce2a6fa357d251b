"""The statistics of the on-track check, beside textbook tests, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from recipe.review.findings import CANNOT_TELL
from recipe.review.watch.statistics import (
    OFF_TRACK,
    Numbers,
    Seeds,
    band,
    bands,
    detectable_shift,
    effective_count,
    judge,
    neighbours,
    phases,
    pooled,
    tail_degrees,
)


def one_metric(values: Numbers, phase_of: list[int] | None = None) -> Seeds:
    return Seeds({"loss": values}, phase_of if phase_of is not None else [0] * values.shape[1])


def correlated(generator: np.random.Generator, runs: int, epochs: int, correlation: float) -> Numbers:
    """Gaussian AR(1) noise of unit variance, [runs, epochs]."""
    noise = generator.standard_normal((runs, epochs))
    for epoch in range(1, epochs):
        noise[:, epoch] = correlation * noise[:, epoch - 1] + math.sqrt(1 - correlation**2) * noise[:, epoch]
    return noise


@pytest.mark.parametrize("count", [3, 5, 20])
def test_a_single_epoch_is_the_two_sample_t_test_of_one_run_against_the_seeds(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipe.review.watch.statistics.tail_degrees", lambda *_: math.inf)  # Gaussian tails
    values = np.random.default_rng(count).normal(2.0, 0.3, (count, 1))
    own = band(values, [0], level=0.01)
    at_limit = own.mean[0] + own.limit[0]
    result = stats.ttest_ind_from_stats(values.mean(), values.std(ddof=1), count, at_limit, 0.0, 1, equal_var=True)
    assert result.pvalue == pytest.approx(0.01, rel=1e-9)


def test_all_epochs_and_metrics_share_the_error() -> None:
    values = np.random.default_rng(0).normal(size=(4, 6))
    together = bands(Seeds({"a": values, "b": values}, [0] * 6), alpha=0.12)
    alone = band(values, [0] * 6, level=0.12 / 12)
    np.testing.assert_array_equal(together["a"].limit, alone.limit)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("spread", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0)])
def test_pooled_epochs_count_for_as_many_as_the_variance_of_their_mean_says(
    correlation: float, spread: tuple[float, ...]
) -> None:
    variances = np.array(spread) ** 2
    means = (correlated(np.random.default_rng(1), 200_000, 3, correlation) ** 2 * variances).mean(axis=1)
    measured = 2 * means.mean() ** 2 / means.var()  # a mean of k equal independent squares: 2 / k of its square
    distances = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    assert effective_count(variances, distances, correlation) == pytest.approx(measured, rel=0.05)


def test_the_window_grows_with_the_training_and_keeps_to_its_phase() -> None:
    assert neighbours([0] * 90, 40) == list(range(33, 48))  # 15 epochs of 90
    assert neighbours([0] * 10, 0) == [0, 1]
    assert neighbours([0, 0, 1, 1, 1], 1) == [0, 1]
    assert neighbours([0, 0, 1, 1, 1], 2) == [2, 3]


def test_phases_end_after_the_warm_up_and_after_each_fall() -> None:
    assert phases(6, [0]) == [1] * 6
    assert phases(6, [2, 4]) == [0, 0, 1, 1, 2, 2]
    assert phases(3, [0.5]) == [1, 1, 1]  # the first epoch ends after the warm-up
    assert phases(4, [0, 0]) == [1, 1, 1, 1]


def test_the_spread_before_a_fall_of_the_rate_does_not_widen_the_band_after_it() -> None:
    noise = np.random.default_rng(2).normal(size=(20, 12))
    noise[:, 6:] *= 0.1
    apart, _ = pooled(noise, phases(12, [0, 6]))
    mixed, _ = pooled(noise, phases(12, [0]))
    variances = noise.var(axis=0, ddof=1)
    assert apart[6] == pytest.approx(max(variances[6], variances[6:8].mean()) ** 0.5)
    assert apart[6] < 0.2 < mixed[6]


def test_an_epoch_that_spreads_more_than_its_neighbours_is_not_narrowed_by_them() -> None:
    noise = np.random.default_rng(8).normal(size=(6, 12))
    noise[:, 5] *= 10
    sd, degrees = pooled(noise, [0] * 12)
    assert sd[5] == pytest.approx(noise[:, 5].std(ddof=1))
    assert degrees[5] == pytest.approx(5, rel=0.1)  # its own five degrees, the neighbours add nothing


def false_alarms(generator: np.random.Generator, count: int, tail: float, repeats: int = 400) -> tuple[int, int]:
    """How many of `repeats` sound runs `judge` and mean +- 3 sd call off track, beside `count` seeds each.

    Residuals are AR(1) over 12 epochs, their spread falls from 1.5 to 0.1, they have the tails of t with `tail`
    degrees of freedom.
    """
    epochs, spread = 12, np.geomspace(1.5, 0.1, 12)
    alarms = naive_alarms = 0
    for _ in range(repeats):
        noise = correlated(generator, count + 1, epochs, 0.4)
        if not math.isinf(tail):
            noise /= np.sqrt(generator.chisquare(tail, noise.shape) / tail)
        runs = noise * spread + np.linspace(2.3, 1.0, epochs)
        seeds, run = runs[:-1], runs[-1]
        alarms += judge(one_metric(seeds, [0] * epochs), {"loss": run}).verdict == OFF_TRACK
        naive_alarms += bool(np.any(np.abs(run - seeds.mean(axis=0)) > 3 * seeds.std(axis=0, ddof=1)))
    return alarms, naive_alarms


@pytest.mark.parametrize("count", [3, 5, 20])
@pytest.mark.parametrize("tail", [math.inf, 5.0])
def test_the_stated_error_is_kept_where_the_naive_band_breaks_it(count: int, tail: float) -> None:
    alarms, naive_alarms = false_alarms(np.random.default_rng(count), count, tail)
    most = stats.binom.ppf(0.999, 400, 0.05)
    assert alarms <= most
    assert naive_alarms > most


def test_without_their_tails_heavy_residuals_would_break_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.review.watch.statistics.tail_degrees", lambda *_: math.inf)
    heavy, _ = false_alarms(np.random.default_rng(20), 20, 5.0)
    gaussian, _ = false_alarms(np.random.default_rng(20), 20, math.inf)
    low, high = stats.binom.ppf([0.001, 0.999], 400, 0.05)
    assert heavy > high
    assert low - 8 <= gaussian <= high  # Bonferroni and the larger of two spreads stay a little below 5 %


def test_tails_grow_light_with_what_was_seen() -> None:
    generator = np.random.default_rng(9)
    few, many = (tail_degrees(generator.normal(size=(count, 90)), 0.3) for count in (3, 40))
    assert 5 < few < 12 < many
    assert tail_degrees(generator.standard_t(5, size=(40, 90)), 0.3) < 7
    assert tail_degrees(np.tile(generator.normal(size=(40, 1)), 90), 1.0) < many  # one epoch, ninety times


def test_the_detectable_shift_of_a_known_spread_is_the_sum_of_two_normal_quantiles() -> None:
    # The other tail is negligible from 3 sd on.
    assert detectable_shift(3.0, 1e12) == pytest.approx(3.0 + stats.norm.ppf(0.9), abs=1e-6)
    assert detectable_shift(3.0, 1e12, power=0.5) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize(("quantile", "degrees"), [(3.0, 40.0), (4.0, 10.0), (6.0, 3.0)])
def test_the_detectable_shift_is_that_of_the_noncentral_t(quantile: float, degrees: float) -> None:
    shift = detectable_shift(quantile, degrees)
    inside = stats.nct.cdf(quantile, degrees, shift) - stats.nct.cdf(-quantile, degrees, shift)
    assert inside == pytest.approx(0.1, abs=1e-4)


def test_the_detectable_shift_is_found_as_often_as_stated() -> None:
    generator, repeats, count = np.random.default_rng(5), 1000, 5
    found = 0
    for _ in range(repeats):
        seeds = generator.normal(size=(count, 1))
        own = band(seeds, [0], level=0.01)
        true_scale = math.sqrt(1 + 1 / count)  # of unit variance
        shift = detectable_shift(float(own.quantiles[0]), count - 1) * true_scale
        found += abs(generator.normal(shift) - own.mean[0]) > own.limit[0]
    low, high = stats.binom.ppf([0.001, 0.999], repeats, 0.9)
    assert low <= found <= high


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_deviation_is_found_on_both_sides_with_its_first_epoch_and_size(sign: int) -> None:
    seeds = np.random.default_rng(3).normal(1.0, 0.01, (10, 8))
    run = np.full(8, np.nan)
    run[:6] = 1.0
    run[3] += sign * 0.5
    judgement = judge(one_metric(seeds), {"loss": run})
    assert (judgement.verdict, judgement.epoch) == (OFF_TRACK, 6)  # a run does not come back on track
    [deviation] = judgement.since
    assert (deviation.metric, deviation.epoch) == ("loss", 4)
    assert deviation.difference == pytest.approx(1.0 + sign * 0.5 - seeds[:, 3].mean())


def test_the_verdict_depends_neither_on_the_order_of_seeds_nor_on_units() -> None:
    generator = np.random.default_rng(4)
    for _ in range(20):
        seeds, run = generator.normal(size=(6, 10)), generator.normal(size=10) * 2
        verdicts = {
            judge(one_metric(a * values + b), {"loss": a * run + b}).verdict
            for values in (seeds, seeds[::-1])
            for a, b in ((1.0, 0.0), (-250.0, 3.0))
        }
        assert len(verdicts) == 1


def test_two_seeds_cannot_tell() -> None:
    judgement = judge(one_metric(np.random.default_rng(6).normal(size=(2, 4))), {"loss": np.full(4, 1e6)})
    assert judgement.verdict == CANNOT_TELL
    assert judgement.reason == "2 reference seeds: a spread needs 3"


def test_seeds_without_any_spread_judge_nothing() -> None:
    values = np.full((5, 4), 0.1)
    judgement = judge(one_metric(values), {"loss": np.array([0.1, 0.9, np.nan, np.nan])})
    assert judgement.verdict == CANNOT_TELL
    assert np.isnan(judgement.bands["loss"].limit).all()


def test_nothing_completed_cannot_tell() -> None:
    values = np.random.default_rng(7).normal(size=(5, 4))
    assert judge(one_metric(values), {"loss": np.full(4, np.nan)}).verdict == CANNOT_TELL
