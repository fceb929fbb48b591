"""prior_proofs/: every symbolic step, each with a deliberate mistake; formulas; quadrature; likelihood; bounds; bad
input. What REPORT.md says of them: test_report_question_4.py.

pytest tests/test_prior_proofs.py            # pytest -m "not slow" leaves the full runs out
"""

import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from helpers import metrics
from scipy.integrate import quad
from scipy.special import gammaincinv

from common import runs
from prior_proofs import (
    approach,
    counterexample_2d,
    densities,
    elbo,
    gaussian_case,
    lemma,
    likelihood,
    mixing,
    non_gaussian_case,
    plane,
)
from prior_proofs.densities import Density, fejer, gauss, laplace, mixture, normal, student_t, uniform

STEPS = {
    f"{module.__name__.split('.')[-1]}.{step.__name__}": step
    for module in (lemma, likelihood, approach, gaussian_case, non_gaussian_case, counterexample_2d)
    for step in (getattr(module, "STEPS", None) or module.SHARED)
    if step.__module__ == module.__name__
}
REFERENCE = {0.5: 0.23953, 0.3: 0.11592, 0.2: 0.059693, 0.1: 0.014972, 0.05: 0.0028368, 0.02: 1.9756e-4}


@functools.cache
def mixture_best(floor):
    """The mixture with prior N(0, 1), free maps."""
    return elbo.best_elbo(Density(mixture, "data density"), Density(normal, "prior"), "free", floor, knots=81)


# --- the symbolic steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_step_holds_and_its_spoilt_variant_fails(name):
    right, wrong = list(STEPS[name]()), list(STEPS[name](slip=1))
    assert right and len(right) == len(wrong)
    for claim, residual in right:
        assert lemma.vanishes(residual), claim
    for claim, residual in wrong:  # every single claim, not only one of the step
        assert not lemma.vanishes(residual), claim


def test_an_equation_without_solutions_is_no_pass():
    assert lemma.vanishes(lemma.sp.Matrix([0, 0])) and not lemma.vanishes(lemma.sp.Matrix([]))


def test_normal_mean_has_the_moments_of_a_standard_normal():
    u = lemma.sp.Symbol("u")
    for k in range(9):
        by_quadrature = quad(lambda t, k=k: t**k * math.exp(normal(t)), -12, 12)[0]
        assert float(lemma.normal_mean(u**k, u)) == pytest.approx(by_quadrature, abs=1e-8)


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, prior, gap, tolerance",
    [
        (mixture, normal, 0.4205051693, 1e-8),
        (laplace, normal, (math.log(math.pi) - 1) / 2, 1e-8),
        (uniform, normal, math.log(math.pi * math.e / 6) / 2, 1e-8),
        (normal, laplace, 0.5 + math.log(2 / math.pi), 1e-8),
        (normal, normal, 0.0, 1e-10),
    ],
)
def test_affine_optimum_is_the_closed_form(data, prior, gap, tolerance):
    best = elbo.best_elbo(data, prior)
    assert best.gap == pytest.approx(gap, abs=tolerance)
    assert best.elbo == pytest.approx(-best.entropy - best.gap, abs=1e-12)
    assert best.error < 1e-8
    p = best.parameters
    variance = Density(data, "data").variance
    if prior is normal:  # not the single parameters: the optimum is a ridge
        assert p["a"] ** 2 + p["s"] == pytest.approx(variance, abs=1e-5)
    assert p["c"] ** 2 * variance + p["v"] == pytest.approx(p["tau"] ** 2, abs=1e-9)


def test_affine_gap_is_the_closed_form_for_other_data_off_the_origin():
    data = lambda x: mixture((x - 3) / 2) - math.log(2)  # noqa: E731
    checked = Density(data, "data")
    expected = math.log(2 * math.pi * math.e * checked.variance) / 2 - checked.entropy
    assert elbo.best_elbo(data, normal).gap == pytest.approx(expected, abs=1e-8)


def test_affine_gap_does_not_change_along_the_ridge():
    data, prior = Density(normal, "data"), Density(laplace, "prior")
    ridge = [elbo.affine_elbo(data, prior, 0.0, 0.8, rho, 0.0) for rho in (0.0, 0.3, 0.6, 0.9)]
    gaps, likelihood_gaps = ([-data.entropy - at.elbo for at in ridge], [at.likelihood_gap for at in ridge])
    assert np.ptp(gaps) < 1e-8
    off = -data.entropy - elbo.affine_elbo(data, prior, 0.0, 1.0, 0.3, 0.0).elbo
    assert off > max(gaps) + 1e-3
    assert abs(likelihood_gaps[0]) < 1e-10  # the decoder that ignores z; on the ridge the ELBO does not see the others
    assert (np.diff(likelihood_gaps) > 1e-7).all() and likelihood_gaps[-1] < gaps[-1]


def test_matched_case_reaches_the_bound_with_free_maps():
    for floor in (0.5, 0.05):
        best = elbo.best_elbo(normal, normal, "free", floor, knots=41)
        assert abs(best.gap) < 1e-10 and abs(best.likelihood_gap) < 1e-10


def test_positive_control_attains_the_bound_though_neither_is_gaussian():
    found = non_gaussian_case.positive_control()[1]
    assert found["elbo"] == pytest.approx(-0.9549366622, abs=1e-9)
    assert abs(found["gap"]) < 1e-10


def test_counterexample_in_two_dimensions_has_no_gap():
    found = counterexample_2d.expectations(64)
    for claim in ("claim A", "claim B"):
        assert abs(found[claim]["gap"]) < 1e-10
    assert found["claim B"]["entropy"] == pytest.approx(math.log(2 * math.pi * math.e) / 2, abs=1e-10)


@pytest.mark.parametrize("constant", [False, True])
def test_construction_has_the_gap_of_theorem_d(constant):
    """The plane's quadrature, which knows nothing of T' or of the identity, against the pointwise identity."""
    epsilon, data, prior = 0.3, Density(laplace, "data"), Density(normal, "prior")
    transport = approach.Transport(data, prior)

    def width(z):
        return np.exp(-transport.log_slope(z)) if constant else 1 / (1 + np.abs(z))

    def mean(x):
        return prior.quantile(np.clip(data.logit(x), -27, 27))

    def decoder(z, moments):
        return transport(z), (epsilon * width(z) * np.exp(transport.log_slope(z))) ** 2

    found = plane.evaluate(data, prior, mean, lambda x: (epsilon * width(mean(x))) ** 2, decoder, epsilon / 2)
    expected, error = approach.gap_of_construction(data, prior, epsilon, constant)
    assert -data.entropy - found.elbo == pytest.approx(expected, abs=2 * (found.error + error) + 1e-5)
    assert expected > 0.01


@pytest.mark.parametrize(
    "data, prior, lam, ell, bend",  # the constants of README.md, section 5
    [
        (laplace, normal, math.sqrt(2 / math.pi), 0, 1),
        (uniform, normal, 1, 0, 1),
        (student_t, normal, 5, 0, 1),
        (normal, laplace, math.sqrt(2), math.sqrt(2), 0),
        (normal, student_t, 2 * math.sqrt(3), math.sqrt(3), 0),
    ],
)
def test_gap_of_the_construction_is_below_theorem_ds_bound_and_falls(data, prior, lam, ell, bend):
    data, prior = Density(data, "data"), Density(prior, "prior")
    assert approach.least_lambda(data, prior) < lam * 1.001
    gaps = []
    for epsilon in (0.1, 0.03, 0.01):
        a, b = (1 + lam) * epsilon, (1 + lam) * epsilon + 2 * lam * epsilon**2
        bound = math.sqrt(2 / math.pi) * (ell + 1 + lam) * epsilon + (bend / 2 + lam) * epsilon**2
        bound += (math.exp(a) * (1 - 2 * b) ** -1.5 - 1) / 2 if b < 0.5 else math.inf
        gap, error = approach.gap_of_construction(data, prior, epsilon)
        assert error < gap < bound
        gaps.append(gap)
    assert gaps[0] > 4 * gaps[1] > 16 * gaps[2]


# --- the likelihood -----------------------------------------------------------------------------------------------


def test_the_gap_is_the_likelihoods_and_the_encoders():
    """KL(p_d || p_theta) and E KL(q || posterior) by trapezoids in the plane, for maps that are nobody's optimum."""
    data, prior = Density(mixture, "data density"), Density(student_t, "prior")
    mean, variance = (lambda x: np.sin(x) + 0.3 * x), (lambda x: 0.2 + 0.1 * np.cos(x))
    decoder = (lambda z: np.tanh(2 * z)), (lambda z: 0.3 + 0.1 * np.sin(z))
    found = plane.evaluate(data, prior, mean, variance, lambda z, moments: (decoder[0](z), decoder[1](z)), 0.4)
    x, z = np.linspace(-5, 5, 801), np.linspace(-40, 40, 8001)[:, None]
    joint = np.exp(student_t(z) - (x - decoder[0](z)) ** 2 / (2 * decoder[1](z))) / np.sqrt(2 * np.pi * decoder[1](z))
    model = joint.sum(0) * (z[1, 0] - z[0, 0])
    dx, p = x[1] - x[0], np.exp(mixture(x))
    of_likelihood = (p * np.log(p / model)).sum() * dx
    assert found.likelihood_gap == pytest.approx(of_likelihood, abs=1e-5)
    near = (np.abs(z) < 8)[:, 0]
    log_q = -((z[near] - mean(x)) ** 2) / (2 * variance(x)) - np.log(2 * np.pi * variance(x)) / 2
    of_encoder = (p * np.exp(log_q) * (log_q - np.log(joint[near] / model))).sum() * dx * (z[1, 0] - z[0, 0])
    assert -data.entropy - found.elbo == pytest.approx(of_likelihood + of_encoder, abs=1e-5)
    assert of_likelihood > 0.01 and of_encoder > 0.01


@pytest.mark.parametrize(
    "data, variance",  # at the uniform quantile u of z: scale mixtures with mu = 0
    [
        (laplace, lambda u: -np.log1p(-u)),
        (student_t, lambda u: 1.5 / gammaincinv(2.5, u)),
        (normal, lambda u: 1.0),
    ],
)
def test_decoders_of_theorem_e_have_the_datas_density(data, variance):
    for x in (0.0, 0.7, 3.0):
        density = quad(
            lambda u, x=x: math.exp(-(x**2) / (2 * variance(u))) / math.sqrt(2 * math.pi * variance(u)), 0, 1
        )
        assert density[0] == pytest.approx(math.exp(data(np.float64(x))), abs=1e-6)


def test_best_marginal_is_bounded_from_both_sides():
    for function, floor, below in ((uniform, 0.3, 0.053), (mixture, 0.5, 0.0972)):
        data = Density(function, "data")
        found = mixing.best_marginal(data, floor)
        assert 0.98 * found.gap < found.least <= found.gap < below
        assert (found.variances >= floor**2).all() and found.weights.sum() == pytest.approx(1, abs=1e-9)
        ends = (-math.sqrt(3), math.sqrt(3)) if function is uniform else (-4, 4)

        def loss(x, found=found, function=function):
            log_p = function(np.array([x]))
            return (np.exp(log_p) * (log_p - np.log(found(np.array([x])))))[0]

        assert found.gap == pytest.approx(quad(loss, *ends, epsabs=1e-8, limit=200)[0], abs=1e-6)


@pytest.mark.parametrize("function, floor", [(uniform, 0.05), (uniform, 0.1), (mixture, 0.5)])
def test_the_bound_on_a_decoder_alone_holds_for_means_that_were_no_candidates(function, floor):
    """Lindsay's D by another rule, the trapezoid, at 20,000 means inside and outside the data's range."""
    data = Density(function, "data")
    found = mixing.best_marginal(data, floor)
    x = np.linspace(data.low, data.high, 4001)
    ratio = np.exp(function(x)) / found(x) * (x[1] - x[0])
    ratio[[0, -1]] /= 2
    highest = 0.0
    for means in np.array_split(np.linspace(data.low - 1, data.high + 1, 20_000), 100):
        highest = max(highest, (np.exp(mixing.log_normal(means[:, None], x, floor**2)) @ ratio).max())
    bound = found.gap - math.log(highest)
    assert found.least < bound + 1e-6  # so no decoder can be below it
    assert found.least > bound - 1e-4 and found.least > 0.97 * found.gap  # and it is worth printing


def test_best_marginal_finds_zero_where_theorem_e_says_so():
    assert abs(mixing.best_marginal(Density(mixture, "data"), 0.3).gap) < 1e-8
    assert abs(mixing.best_marginal(Density(normal, "data"), 0.9).gap) < 1e-8
    assert mixing.best_marginal(Density(laplace, "data"), 0.3).gap > 1e-4  # never with a floor


def test_no_maps_of_the_elbo_beat_the_best_decoder():
    best = mixture_best(0.5)
    assert mixing.best_marginal(Density(mixture, "data"), 0.5).least < best.likelihood_gap < best.gap


@pytest.mark.parametrize("floor", [0.3, 0.2, 0.1])
def test_the_elbos_maps_do_not_have_the_datas_density(floor):
    best = mixture_best(floor)
    assert 0.05 * best.gap < best.likelihood_gap < best.gap  # a decoder alone would reach 0 (Theorem E)


def test_best_encoder_of_the_sign_decoder_against_a_grid():
    """Theorem F's example at one x: no point of a grid over m and v is better."""
    odds = 2 * 0.3 / densities.WIDTH**2
    found = min(non_gaussian_case.encoder_gap(odds, start) for start in ((0.0, 0.0), (0.8, -1.0)))
    z = np.linspace(-8, 8, 8001)
    log_posterior = normal(z) + math.log(2) - np.logaddexp(0, -np.sign(z) * odds)
    grid = []
    for m in np.linspace(-0.5, 2, 26):
        for v in np.linspace(0.1, 1.2, 23):
            log_q = -((z - m) ** 2) / (2 * v) - math.log(2 * math.pi * v) / 2
            grid.append((np.exp(log_q) * (log_q - log_posterior)).sum() * (z[1] - z[0]))
    assert found - 1e-4 < min(grid) < found + 0.01


# --- quadrature ---------------------------------------------------------------------------------------------------


def test_rules_integrate_polynomials_and_share_no_node():
    edges = np.array([-1.0, 0.3, 2.0])
    nodes = []
    for rule, degree in ((gauss, 15), (fejer, 10)):
        x, w = rule(edges)
        nodes.append(x)
        assert (np.diff(x) > 0).all()  # the blocks of `posterior` are cut from sorted nodes
        for k in range(degree + 1):
            assert w @ x**k == pytest.approx((2.0 ** (k + 1) - (-1.0) ** (k + 1)) / (k + 1), rel=1e-12)
    assert np.abs(nodes[0][:, None] - nodes[1]).min() > 1e-4


@pytest.mark.parametrize("function", [normal, mixture, laplace, uniform, student_t, densities.control])
def test_density_moments_against_scipy(function):
    density = Density(function, "data")
    ends = [-np.inf, 0, np.inf] if function is not uniform else [-math.sqrt(3), 0, math.sqrt(3)]

    def integral(f):
        return sum(quad(f, a, b, epsabs=1e-12, limit=400)[0] for a, b in zip(ends[:-1], ends[1:], strict=True))

    p = lambda x: float(np.exp(function(np.float64(x))))  # noqa: E731
    assert integral(p) == pytest.approx(1, abs=1e-9)
    assert density.variance == pytest.approx(integral(lambda x: x * x * p(x)), abs=1e-6)
    assert density.entropy == pytest.approx(integral(lambda x: -p(x) * math.log(p(x)) if p(x) > 0 else 0.0), abs=1e-8)
    x = np.array([-1.5, -0.2, 0.4, 1.6])
    np.testing.assert_allclose(density.quantile(density.logit(x)), x, atol=1e-5)


def test_elbo_against_the_trapezoid_rule_in_the_plane():
    """Every term of L by an independent rule, for maps that are nobody's optimum."""
    data, prior, floor = Density(mixture, "data"), Density(student_t, "prior"), 0.4
    mean, variance = (lambda x: np.sin(x) + 0.3 * x), (lambda x: 0.2 + 0.1 * np.cos(x))
    found = plane.evaluate(data, prior, mean, variance, plane.free_decoder(floor), floor)
    x, z = np.linspace(-5, 5, 1501), np.linspace(-6, 6, 1501)
    dx, dz = x[1] - x[0], z[1] - z[0]
    m, v = mean(x)[:, None], variance(x)[:, None]
    log_q = -((z - m) ** 2) / (2 * v) - np.log(2 * np.pi * v) / 2
    joint = np.exp(mixture(x)[:, None] + log_q)
    q, first, second = (joint * np.stack([x**k for k in range(3)])[:, :, None]).sum(1) * dx
    mu = first / q
    s = np.maximum(second / q - mu**2, floor**2)
    log_x = -((x[:, None] - mu) ** 2) / (2 * s) - np.log(2 * np.pi * s) / 2
    expected = (joint * (student_t(z) + log_x - log_q)).sum() * dx * dz
    assert found.elbo == pytest.approx(expected, abs=found.error + 1e-7)
    assert found.error < 1e-5 and found.identity < 1e-8


def test_gradient_is_the_derivative():
    data, prior, floor = Density(laplace, "data"), Density(normal, "prior"), 0.3
    mean, variance = (lambda x: np.tanh(x)), (lambda x: 0.3 + 0 * x)
    grid = plane.Grid(data, prior, mean, variance, floor)
    m, v = mean(grid.x), variance(grid.x)
    _, by_m, by_log_v = plane.elbo(grid, m, v, plane.free_decoder(floor))
    rng = np.random.default_rng(0)
    along, step = rng.standard_normal((2, len(m))), 1e-5
    up, down = (
        plane.elbo(grid, m + e * along[0], v * np.exp(e * along[1]), plane.free_decoder(floor))[0]
        for e in (step, -step)
    )
    assert (up - down) / (2 * step) == pytest.approx(by_m @ along[0] + by_log_v @ along[1], rel=1e-5)


def test_data_may_have_a_hole_in_their_support():
    two_blocks = lambda x: np.where(np.abs(np.abs(x) - 2) < 1, -math.log(4), -np.inf)  # noqa: E731
    best = elbo.best_elbo(two_blocks, normal)
    assert best.entropy == pytest.approx(math.log(4), abs=1e-10)
    assert best.gap == pytest.approx(math.log(2 * math.pi * math.e * 13 / 3) / 2 - math.log(4), abs=1e-8)


def test_unresolved_quadrature_is_an_error_not_a_number(monkeypatch):
    honest = plane.divergence
    monkeypatch.setattr(plane, "divergence", lambda *a: honest(*a) + 1e-5)
    with pytest.raises(runs.UserError, match="differ by 1.0e-05;"):
        plane.evaluate(
            Density(normal, "d"),
            Density(normal, "p"),
            lambda x: 0 * x,
            lambda x: 1 + 0 * x,
            lambda z, _: (0 * z, 1 + 0 * z),
        )


def test_a_prior_whose_mass_is_lost_is_an_error_not_a_gap(monkeypatch):
    """In L + H + KL all terms of Q cancel, so this sum alone would not see it."""
    prior = Density(normal, "p")
    monkeypatch.setattr(prior, "function", lambda z: normal(z) + 1 + np.sin(37 * z))
    maps = (lambda x: 0 * x), (lambda x: 1 + 0 * x)
    with pytest.raises(runs.UserError, match="the prior's mass and 1, differ by"):
        plane.evaluate(Density(normal, "d"), prior, *maps, plane.free_decoder(0.3))


def test_maps_that_no_memory_would_hold_are_refused():
    steep = (lambda x: np.sin(1e9 * x)), (lambda x: np.full(np.shape(x), 1e-12))
    with pytest.raises(runs.UserError, match="too steep to be integrated: raise the floor"):
        plane.evaluate(Density(normal, "d"), Density(normal, "p"), *steep, plane.free_decoder(0.3))


def test_a_spline_that_overshoots_leaves_the_other_starts():
    """With 17 knots the first one swings between those at the ends of a uniform density."""
    best = elbo.best_elbo(uniform, normal, "free", 0.4, knots=17)
    assert set(best.starts) == {"transport", "gentle"} and 0 < best.error < best.gap < 0.17648521


def test_a_step_that_no_grid_resolves_does_not_lose_its_start(monkeypatch):
    data, prior = Density(mixture, "data density"), Density(normal, "prior")
    spline, start = elbo.Spline.even(data, 9), elbo.transport_encoder(data, prior, 0.5)
    measured = []

    def grid(*args, halve=False, **options):  # halved panels judge an encoder: the start's first, then each step's
        if halve:
            measured.append(args)
            if len(measured) > 1:
                raise runs.UserError("too steep")
        return plane.Grid(*args, halve=halve, **options)

    monkeypatch.setattr(elbo, "Grid", grid)
    m, v = elbo.descend(data, prior, 0.5, spline, start)
    assert len(measured) > 1
    np.testing.assert_allclose(m(spline.x), start[0](spline.x), atol=1e-12)
    np.testing.assert_allclose(v(spline.x), start[1](spline.x), rtol=1e-12)


def test_a_finer_grid_that_would_be_too_large_ends_the_descent_with_what_it_has(monkeypatch):
    data, prior = Density(laplace, "data density"), Density(normal, "prior")
    spline, start = elbo.Spline.even(data, 21), elbo.transport_encoder(data, prior, 0.1)
    steps = []

    def grid(*args, **options):  # the first step, and what judges it, have room
        if "width" in options:
            steps.append(options["width"])
            if len(steps) > 1:
                raise runs.UserError("too steep")
        return plane.Grid(*args, **options)

    monkeypatch.setattr(elbo, "Grid", grid)
    encoder = elbo.descend(data, prior, 0.1, spline, start)
    decoder = plane.free_decoder(0.1)
    before, after = (plane.evaluate(data, prior, *maps, decoder).elbo for maps in (start, encoder))
    assert len(steps) == 2 and after > before


# --- the optimiser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", REFERENCE)
def test_mixture_reaches_the_reference_gaps_and_no_less(floor):
    best = mixture_best(floor)
    assert 0.99 * REFERENCE[floor] < best.gap < 1.02 * REFERENCE[floor]
    assert best.gap > best.error > 0  # above the proven bound, by more than the quadrature's error
    assert min(best.starts.values()) == pytest.approx(best.gap, rel=5e-3)  # the starts had half the knots
    assert best.gap <= min(best.starts.values()) + best.error
    assert best.knots == 81 and best.moved < 5e-3
    assert best.identity < 1e-7


def test_the_decoder_found_respects_the_floor_and_is_the_conditional_mean():
    best = mixture_best(0.2)
    z = np.linspace(-2, 2, 41)
    assert best.decoder_variance(z).min() >= 0.2**2 * (1 - 1e-12)
    x, w = gauss(np.linspace(-4, 4, 400))
    v = best.encoder_variance(x)
    q = w * np.exp(mixture(x) - (z[:, None] - best.encoder_mean(x)) ** 2 / (2 * v)) / np.sqrt(v)
    np.testing.assert_allclose(best.decoder_mean(z), q @ x / q.sum(1), atol=2e-3)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, prior, more, words",
    [
        (lambda x: normal(x) + 0.1, normal, {}, "data density is not normalised: its integral is 1.105"),
        (normal, lambda z: normal(z) - 0.1, {}, "prior is not normalised"),
        (lambda x: np.where(x > 1, np.nan, normal(x)), normal, {}, "data density's log-density is not finite"),
        (lambda x: np.where(x == 0, np.inf, normal(x)), normal, {}, "not finite"),
        (lambda x: np.full_like(x, -np.inf), normal, {}, "it is no density"),
        (lambda x: -np.log1p(x**2) - math.log(math.pi), normal, {}, "data density has no finite variance"),
        (normal, uniform, {}, "prior vanishes where every Gaussian encoder has mass .* -1.732"),
        (normal, normal, {"floor": -0.1}, "floor -0.1 must be"),
        (normal, normal, {"floor": math.nan}, "floor nan must be"),
        (normal, normal, {"family": "free"}, "free maps need a floor above 0"),
        (normal, normal, {"family": "cubic"}, "family 'cubic' is not known"),
        (lambda x: 0.0, normal, {}, "array of the shape it is given"),
        (1.0, normal, {}, "must be a callable"),
    ],
)
def test_bad_input_gets_one_sentence(data, prior, more, words):
    with pytest.raises(runs.UserError, match=words) as caught:
        elbo.best_elbo(data, prior, **more)
    assert "\n" not in str(caught.value)


# --- the scripts --------------------------------------------------------------------------------------------------


def script(folder, *words):
    root = runs.Path(__file__).resolve().parents[1]
    command = [sys.executable, str(root / "prior_proofs" / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_exit_status_says_whether_the_proof_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counterexample_2d.main(["--nodes", "40"])  # raises SystemExit when a step fails
    assert "FAIL" not in capsys.readouterr().out
    assert all(metrics("prior_counterexample")["checks"].values())
    spoilt = script(tmp_path, "counterexample_2d.py", "--name", "spoilt", "--nodes", "40", "--slip", "mirror")
    assert spoilt.returncode == 1
    assert spoilt.stdout.count("FAIL") == 1 and not (runs.ROOT / "spoilt" / "metrics.json").exists()
    with pytest.raises(runs.UserError, match="--nodes"):
        counterexample_2d.main(["--nodes", "1"])


@pytest.mark.parametrize("module", [gaussian_case, non_gaussian_case])
def test_script_proves_only_or_fails_when_spoilt(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "STEPS", module.STEPS[-2:])  # the others have their own test
    module.main(["--proof-only", "--name", "proof"])
    name = module.__name__.rpartition(".")[2]
    assert metrics("proof")["checks"] == {f"{name}.{step.__name__}": True for step in module.STEPS}
    with pytest.raises(SystemExit) as stop:
        module.main(["--proof-only", "--name", "spoilt", "--slip", module.STEPS[-1].__name__])
    assert stop.value.code == 1 and not (runs.ROOT / "spoilt" / "metrics.json").exists()
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, folder", [("gaussian_case", "prior_gaussian"), ("non_gaussian_case", "prior_non_gaussian")]
)
def test_whole_script(name, folder, tmp_path):
    done = script(tmp_path, f"{name}.py", "--floors", "0.4", "0.2", "--knots", "33")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / folder / "metrics.json").read_text())
    assert all(record["checks"].values())
    for key, rows in record["free"].items():
        gaps = [row["gap"] for row in rows]
        if key == "normal | normal":
            assert max(map(abs, gaps)) < 1e-8
        else:
            assert 0 < gaps[1] < gaps[0] < record["affine"][key]["gap"]
            assert all(0 < row["error"] < row["gap"] for row in rows)
        for row in rows:
            assert row["decoder_alone"]["least"] - 1e-9 <= row["likelihood_gap"] <= row["gap"] + row["error"]
            assert row["decoder_alone"]["exact"] or key.endswith("| normal")
    assert (tmp_path / "runs" / folder / f"{name}.png").stat().st_size < 300_000
