"""What a run is judged by: systems one by one, and the answer rather than one thin step."""

import numpy as np
import pytest

from pp_diffusion.posterior.verdicts import (
    BELIEVABLE,
    COLLAPSED,
    DOUBTFUL,
    FEWEST_CHAINS,
    Findings,
    Plain,
    evidence_error,
    judge,
)

CHAINS, SYSTEMS, PARTICLES = 8, 3, 1000


def findings(**changes):
    """Of three systems with nothing wrong."""
    rng = np.random.default_rng(0)
    healthy = Findings(
        log_evidences=-5 + 0.02 * rng.normal(size=(CHAINS, SYSTEMS)),
        final_ess=np.full((CHAINS, SYSTEMS), 400.0),
        least_ess=np.full((CHAINS, SYSTEMS), 300.0),
        independent_draws=np.full(SYSTEMS, 300.0),
        num_particles=PARTICLES,
        plain=Plain(np.full(SYSTEMS, -5.05), np.full(SYSTEMS, 0.1), np.full(SYSTEMS, 90.0)),
    )
    return healthy._replace(**changes)


def names(found):
    return [verdict.name for verdict in judge(found)]


def with_system(array, system, value):
    out = np.array(array)
    out[..., system] = value
    return out


def test_a_healthy_run_is_believable():
    assert names(findings()) == [BELIEVABLE] * SYSTEMS
    assert all(not verdict.reasons for verdict in judge(findings()))


def test_one_thin_step_condemns_nothing_where_chains_agree():
    least = with_system(findings().least_ess, 1, 1.6)
    assert names(findings(least_ess=least)) == [BELIEVABLE] * SYSTEMS


@pytest.mark.parametrize(("least", "expected"), [(1.6, COLLAPSED), (30.0, DOUBTFUL), (80.0, BELIEVABLE)])
def test_with_one_chain_the_thinnest_step_decides(least, expected):
    healthy = findings()
    one = healthy._replace(
        log_evidences=healthy.log_evidences[:1],
        final_ess=healthy.final_ess[:1],
        least_ess=with_system(healthy.least_ess[:1], 2, least),
        independent_draws=np.full(SYSTEMS, np.inf),
    )
    assert names(one) == [BELIEVABLE, BELIEVABLE, expected]


@pytest.mark.parametrize(("sd", "expected"), [(3.0, COLLAPSED), (0.7, DOUBTFUL), (0.1, BELIEVABLE)])
def test_spread_of_the_evidences(sd, expected):
    spread = -5 + sd * np.linspace(-1.43, 1.43, CHAINS)  # of standard deviation sd
    found = findings(log_evidences=with_system(findings().log_evidences, 0, spread))
    assert names(found) == [expected, BELIEVABLE, BELIEVABLE]


def test_a_spread_counts_more_where_particles_were_few():
    spread = -5 + 0.4 * np.linspace(-1.43, 1.43, CHAINS)
    thin = findings(
        log_evidences=with_system(findings().log_evidences, 0, spread),
        least_ess=with_system(findings().least_ess, 0, 3.0),
    )
    assert names(thin) == [COLLAPSED, BELIEVABLE, BELIEVABLE]
    assert names(thin._replace(least_ess=findings().least_ess)) == [BELIEVABLE] * SYSTEMS


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_evidence_that_is_no_number_is_a_collapse(value):
    evidences = np.array(findings().log_evidences)
    evidences[3, 1] = value
    found = findings(log_evidences=evidences)
    assert names(found) == [BELIEVABLE, COLLAPSED, BELIEVABLE]
    assert "in 1 of 8 chains" in judge(found)[1].reasons[0]
    assert evidence_error(found)[1] == np.inf


def test_a_dead_chain_is_a_collapse():
    evidences = np.array(findings().log_evidences)
    evidences[3, 1] = -np.inf
    assert names(findings(log_evidences=evidences)) == [BELIEVABLE, COLLAPSED, BELIEVABLE]


@pytest.mark.parametrize(("draws", "expected"), [(1.2, COLLAPSED), (5.0, DOUBTFUL), (50.0, BELIEVABLE)])
def test_chains_whose_draws_differ(draws, expected):
    found = findings(independent_draws=np.array([300.0, draws, 300.0]))
    assert names(found) == [BELIEVABLE, expected, BELIEVABLE]


@pytest.mark.parametrize(
    ("log_evidence", "ess", "expected"),
    [
        (-4.0, 40.0, COLLAPSED),  # e times as much, known to 16 %
        (-4.0, 3.0, BELIEVABLE),  # the same, from three draws
        (2.0, 3.0, COLLAPSED),  # a thousand times as much: Markov
        (-9.0, 40.0, BELIEVABLE),  # less: it was the plain draws that missed something
    ],
)
def test_mass_that_plain_draws_found(log_evidence, ess, expected):
    plain = Plain(
        np.array([-5.0, log_evidence, -5.0]), np.array([0.1, 1 / np.sqrt(ess), 0.1]), np.array([90.0, ess, 90.0])
    )
    found = judge(findings(plain=plain))
    assert [verdict.name for verdict in found] == [BELIEVABLE, expected, BELIEVABLE]
    if expected == COLLAPSED:
        assert "missed" in found[1].reasons[0]


@pytest.mark.parametrize("sd", [0.02, 0.3])
def test_twice_the_error_covers_95_percent(sd):
    """Of 20 000 runs of eight chains with log-normal evidences: an error rate of 1e-6 for the bounds."""
    rng = np.random.default_rng(1)
    evidences = rng.normal(-0.5 * sd**2, sd, (FEWEST_CHAINS, 20_000))
    zeros = np.ones((FEWEST_CHAINS, 20_000))
    error = evidence_error(Findings(evidences, zeros, zeros, zeros[0], PARTICLES, None))
    mean = np.logaddexp.reduce(evidences, axis=0) - np.log(FEWEST_CHAINS)
    assert 0.94 < np.mean(np.abs(mean) <= 2 * error) < 0.962


def test_fewer_chains_have_no_error():
    found = findings()
    few = found._replace(log_evidences=found.log_evidences[: FEWEST_CHAINS - 1])
    assert np.isnan(evidence_error(few)).all()
