"""Drawn tokens follow the distribution that the parameters describe, for every seed and position anew."""

import math

import numpy as np
import pytest
from scipy import stats

from autopar.serve.request import BadParameter, Sampling
from autopar.serve.sampling import Sampler, largest, log_softmax, logprob, random_key, uniform

RNG = np.random.default_rng(0)


def expected(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution, straight from the definitions: temperature, top-k, top-p, min-p, in this order."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def draws(logits: np.ndarray, sampling: Sampling, count: int, seed: int = 0) -> np.ndarray:
    sampler = Sampler(sampling, seed, 0)
    return np.array([sampler.choose(logits, position) for position in range(count)])


@pytest.mark.parametrize("size", [12, 1000])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, min_p=0.1),
        Sampling(top_k=3),
        Sampling(top_k=300, top_p=0.99),
        Sampling(top_p=0.8),
        Sampling(top_p=0.999, temperature=3.0),
        Sampling(top_k=8, top_p=0.7, min_p=0.2, temperature=1.3),
    ],
)
def test_draws_follow_the_distribution(sampling, size):
    logits = (np.random.default_rng(1).normal(size=size) * 2).astype(np.float32)
    p = expected(logits, sampling)
    count = 4000
    counts = np.bincount(draws(logits, sampling, count), minlength=size)
    assert counts[p == 0].sum() == 0
    order = np.argsort(-p)
    groups = np.minimum(np.cumsum(p[order] * count) // 20, (p > 0).sum() - 1).astype(int)  # 20 each or more
    seen, wanted = np.bincount(groups, counts[order]), np.bincount(groups, p[order] * count)
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    if len(seen) > 1:
        assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-4


def test_random_numbers_are_uniform_over_positions_and_over_seeds_and_answers():
    over_positions = [uniform(random_key(3, 0), at) for at in range(5000)]
    over_seeds = [uniform(random_key(seed, 0), 7) for seed in range(5000)]
    over_answers = [uniform(random_key(3, index), 7) for index in range(5000)]
    for values in (over_positions, over_seeds, over_answers):
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(stats.spearmanr(over_positions[1:], over_positions[:-1]).statistic) < 0.05
    assert abs(stats.spearmanr(over_positions, over_answers).statistic) < 0.05


def test_greedy_takes_the_lowest_id_among_equals():
    logits = np.array([0, 5, 1, 5], np.float32)
    assert Sampler(Sampling(temperature=0), 0, 0).choose(logits, 0) == 1
    assert draws(logits, Sampling(top_k=1), 50).tolist() == [1] * 50


def test_the_likeliest_come_in_order_with_the_lowest_id_first():
    values = RNG.integers(0, 40, 3000).astype(np.float32)
    for count in (1, 5, 500, 3000):
        assert largest(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


def test_penalties_and_bias():
    logits = np.array([2.0, -2.0, 1.0, 0.5, 0.0], np.float32)
    sampling = Sampling(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={4: 3.0, 0: 1.0}
    )
    sampler = Sampler(sampling, 0, 0, prompt=[0, 1, 0])
    assert sampler.adjust(logits).tolist() == [1.5, -4.0, 1.0, 0.5, 3.0]
    for token in (2, 1, 2):
        sampler.add(token)
    assert sampler.adjust(logits).tolist() == [1.5, -4.75, -0.75, 0.5, 3.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5, 0.0], "the logits themselves stay"


def test_repetition_penalty_counts_many_tokens():
    sampler = Sampler(Sampling(frequency_penalty=1.0), 0, 0, prompt=[1])
    tokens = RNG.integers(0, 200, 1000)
    for token in tokens.tolist():
        sampler.add(token)
    assert (-sampler.adjust(np.zeros(200, np.float32))).tolist() == np.bincount(
        tokens, minlength=200
    ).tolist()


def test_logits_that_are_not_numbers_are_refused():
    bad = np.full(10, np.nan, np.float32)
    assert Sampler(Sampling(), 0, 0).choose(bad, 0) == -1
    assert Sampler(Sampling(temperature=0), 0, 0).choose(bad - np.inf, 0) == -1
    some = np.zeros(10, np.float32)
    some[3] = np.nan
    assert Sampler(Sampling(), 0, 0).choose(some, 0) == -1
    only = np.full(10, -np.inf, np.float32)
    only[4] = 0
    assert set(draws(only, Sampling(), 20)) == {4} and set(draws(only, Sampling(top_p=0.9), 20)) == {4}


def test_log_probabilities():
    logits = (RNG.normal(size=300) * 4).astype(np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert np.allclose(log_softmax(logits), exact, atol=1e-5)
    found = logprob(logits, 17, 5)
    assert found.logprob == pytest.approx(exact[17], abs=1e-5)
    assert [token for token, _ in found.top] == np.argsort(-exact)[:5].tolist()
    assert math.isclose(found.top[0][1], exact.max(), abs_tol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "at least 0 and at most 100"),
        ("temperature", float("nan"), "temperature must be"),
        ("temperature", "hot", "a number"),
        ("top_p", 0.0, "more than 0"),
        ("top_p", 1.5, "at most 1"),
        ("top_k", -1, "at least 0"),
        ("top_k", 2.5, "an integer"),
        ("min_p", 2.0, "at most 1"),
        ("max_tokens", -1, "at least 0"),
        ("repetition_penalty", 0.0, "more than 0"),
        ("presence_penalty", 3.0, "at least -2 and at most 2"),
        ("n", 0, "at least 1"),
        ("n", 1000, "at most 128 on this server"),
        ("best_of", 0, "at least 1"),
        ("logprobs", -1, "at least 0"),
        ("logit_bias", {100: 1.0}, "token 100"),
        ("logit_bias", {1: float("nan")}, "must lie in"),
        ("stop", ("",), "not empty"),
        ("stop_token_ids", (100,), "must lie in 0 … 99"),
        ("seed", 2**64, "seed must be"),
    ],
)
def test_parameters_out_of_range_are_named_with_their_range(field, value, words):
    with pytest.raises(BadParameter) as error:
        Sampling(**{field: value}).check(100)
    assert error.value.parameter == field and words in str(error.value)


def test_beams_refuse_what_goes_with_sampling_only():
    for field, value in [
        ("top_p", 0.5),
        ("best_of", 4),
        ("stop", ("x",)),
        ("logprobs", 1),
        ("temperature", 0.7),
    ]:
        with pytest.raises(BadParameter, match="num_beams"):
            Sampling(num_beams=4, **{field: value}).check(100)
    with pytest.raises(BadParameter, match="at most num_beams = 4"):
        Sampling(num_beams=4, n=5).check(100)
    with pytest.raises(BadParameter, match="at least n = 3"):
        Sampling(n=3, best_of=2).check(100)
    Sampling(num_beams=4, n=4, temperature=0, repetition_penalty=1.2).check(100)
