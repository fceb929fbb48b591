"""prior_proofs/: every symbolic step, each with a deliberate mistake; closed forms; quadrature; bounds; bad input.

pytest tests/test_prior_proofs.py            # pytest -m "not slow" leaves the full runs out
"""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.integrate import quad

from common import runs
from prior_proofs import counterexample_2d, densities, elbo, gaussian_case, lemma, non_gaussian_case
from prior_proofs.densities import Density, fejer, gauss, laplace, mixture, normal, student_t, uniform

STEPS = {
    f"{module.__name__.split('.')[-1]}.{step.__name__}": step
    for module in (lemma, gaussian_case, non_gaussian_case, counterexample_2d)
    for step in (getattr(module, "STEPS", None) or module.SHARED)
    if step.__module__ == module.__name__
}
REFERENCE = {0.5: 0.23953, 0.3: 0.11592, 0.2: 0.059693, 0.1: 0.014972, 0.05: 0.0028368, 0.02: 1.9756e-4}


@pytest.fixture(scope="module")
def mixture_best():
    """The mixture with prior N(0, 1), free maps, at every reference floor."""
    data, prior, found = Density(mixture, "data density"), Density(normal, "prior"), {}
    for floor in REFERENCE:
        found[floor] = elbo.best_elbo(data, prior, "free", floor, starts=list(found.values())[-1:])
    return found


# --- the symbolic steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_step_holds_and_its_spoilt_variant_fails(name):
    right, wrong = list(STEPS[name]()), list(STEPS[name](slip=1))
    assert right and len(right) == len(wrong)
    for claim, residual in right:
        assert lemma.vanishes(residual), claim
    for claim, residual in wrong:  # every single claim, not only one of the step
        assert not lemma.vanishes(residual), claim


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
    gaps = [-data.entropy - elbo.affine_elbo(data, prior, 0.0, 0.8, rho, 0.0)[0] for rho in (0.0, 0.3, 0.6, 0.9)]
    assert np.ptp(gaps) < 1e-8
    off = -data.entropy - elbo.affine_elbo(data, prior, 0.0, 1.0, 0.3, 0.0)[0]
    assert off > max(gaps) + 1e-3


def test_matched_case_reaches_the_bound_with_free_maps():
    for floor in (0.5, 0.05):
        best = elbo.best_elbo(normal, normal, "free", floor)
        assert abs(best.gap) < 1e-10


def test_positive_control_attains_the_bound_though_neither_is_gaussian():
    found = non_gaussian_case.positive_control(())[1]
    assert found["elbo"] == pytest.approx(-0.9549366622, abs=1e-9)
    assert abs(found["gap"]) < 1e-10


def test_counterexample_in_two_dimensions_has_no_gap():
    found = counterexample_2d.expectations(64)
    for claim in ("claim A", "claim B"):
        assert abs(found[claim]["gap"]) < 1e-10
    assert found["claim B"]["entropy"] == pytest.approx(math.log(2 * math.pi * math.e) / 2, abs=1e-10)


def test_construction_has_the_pointwise_gap_of_theorem_d():
    """The plane's quadrature against one integral in x of the pointwise identity, by scipy, with z in units of v."""
    gamma, data, prior = 0.3, Density(laplace, "data"), Density(normal, "prior")
    mean, variance = elbo.transport_encoder(data, prior, gamma, pure=True)
    u, w = gauss(np.linspace(-9, 9, 60))
    w = w * np.exp(normal(u))

    def integrand(x):
        x = np.array([x])
        v = variance(x)
        miss = data.quantile(prior.logit(mean(x) + np.sqrt(v) * u)) - x
        return (np.exp(data(x)) * (v / 2 - 0.5 + w @ miss**2 / (2 * gamma**2)))[0]

    expected = sum(quad(integrand, a, b, epsabs=1e-9)[0] for a, b in ((-12, -2), (-2, 0), (0, 2), (2, 12)))

    def decoder(z, moments):
        return data.quantile(prior.logit(z)), np.full_like(z, gamma**2)

    value, error, _ = elbo.evaluate(data, prior, mean, variance, decoder, gamma)
    assert -data.entropy - value == pytest.approx(expected, abs=2 * error + 1e-5)
    assert expected > 0.01


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
    value, error, identity = elbo.evaluate(data, prior, mean, variance, elbo.free_decoder(floor), floor)
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
    assert value == pytest.approx(expected, abs=error + 1e-7)
    assert error < 1e-5 and identity < 1e-8


def test_gradient_is_the_derivative():
    data, prior, floor = Density(laplace, "data"), Density(normal, "prior"), 0.3
    mean, variance = (lambda x: np.tanh(x)), (lambda x: 0.3 + 0 * x)
    grid = elbo.Grid(data, prior, mean, variance, floor)
    m, v = mean(grid.x), variance(grid.x)
    _, by_m, by_log_v = elbo.elbo(grid, m, v, elbo.free_decoder(floor))
    rng = np.random.default_rng(0)
    along, step = rng.standard_normal((2, len(m))), 1e-5
    up, down = (
        elbo.elbo(grid, m + e * along[0], v * np.exp(e * along[1]), elbo.free_decoder(floor))[0] for e in (step, -step)
    )
    assert (up - down) / (2 * step) == pytest.approx(by_m @ along[0] + by_log_v @ along[1], rel=1e-5)


def test_data_may_have_a_hole_in_their_support():
    two_blocks = lambda x: np.where(np.abs(np.abs(x) - 2) < 1, -math.log(4), -np.inf)  # noqa: E731
    best = elbo.best_elbo(two_blocks, normal)
    assert best.entropy == pytest.approx(math.log(4), abs=1e-10)
    assert best.gap == pytest.approx(math.log(2 * math.pi * math.e * 13 / 3) / 2 - math.log(4), abs=1e-8)


def test_unresolved_quadrature_is_an_error_not_a_number(monkeypatch):
    honest = elbo.divergence
    monkeypatch.setattr(elbo, "divergence", lambda *a: honest(*a) + 1e-5)
    with pytest.raises(runs.UserError, match="differ by 1.0e-05 nats"):
        elbo.evaluate(
            Density(normal, "d"),
            Density(normal, "p"),
            lambda x: 0 * x,
            lambda x: 1 + 0 * x,
            lambda z, _: (0 * z, 1 + 0 * z),
        )


# --- the optimiser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", REFERENCE)
def test_mixture_reaches_the_reference_gaps_and_no_less(mixture_best, floor):
    best = mixture_best[floor]
    assert 0.99 * REFERENCE[floor] < best.gap < 1.02 * REFERENCE[floor]
    assert best.gap > best.error > 0  # above the proven bound, by more than the quadrature's error
    assert min(best.starts.values()) == pytest.approx(best.gap, rel=1e-3)
    assert best.identity < 1e-7


def test_the_decoder_found_respects_the_floor_and_is_the_conditional_mean(mixture_best):
    best = mixture_best[0.2]
    z = np.linspace(-2, 2, 41)
    assert best.decoder_variance(z).min() >= 0.2**2 * (1 - 1e-12)
    x, w = gauss(np.linspace(-4, 4, 400))
    v = best.encoder_variance(x)
    q = w * np.exp(mixture(x) - (z[:, None] - best.encoder_mean(x)) ** 2 / (2 * v)) / np.sqrt(v)
    np.testing.assert_allclose(best.decoder_mean(z), q @ x / q.sum(1), atol=2e-3)


@pytest.mark.parametrize(
    "data, prior", [(uniform, normal), (student_t, normal), (normal, mixture), (normal, student_t)]
)
def test_gap_is_positive_and_below_the_affine_one(data, prior):
    affine, free = elbo.best_elbo(data, prior), elbo.best_elbo(data, prior, "free", 0.3, knots=40)
    assert 0 < free.error < free.gap < affine.gap


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


def test_exit_status_says_whether_the_proof_holds(tmp_path, capsys):
    counterexample_2d.main(["--nodes", "40"])  # raises SystemExit when a step fails
    assert "FAIL" not in capsys.readouterr().out
    spoilt = script(tmp_path, "counterexample_2d.py", "--nodes", "40", "--slip", "mirror")
    assert spoilt.returncode == 1
    assert spoilt.stdout.count("FAIL") == 1
    with pytest.raises(runs.UserError, match="--nodes"):
        counterexample_2d.main(["--nodes", "1"])


@pytest.mark.parametrize("module", [gaussian_case, non_gaussian_case])
def test_script_proves_only_or_fails_when_spoilt(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "STEPS", module.STEPS[-2:])  # the others have their own test
    module.main(["--proof-only", "--json"])
    assert json.loads(capsys.readouterr().out)["checks"] == dict.fromkeys((s.__name__ for s in module.STEPS), True)
    with pytest.raises(SystemExit) as stop:
        module.main(["--proof-only", "--slip", module.STEPS[-1].__name__])
    assert stop.value.code == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, folder", [("gaussian_case", "prior_gaussian"), ("non_gaussian_case", "prior_non_gaussian")]
)
def test_whole_script(name, folder, tmp_path):
    done = script(tmp_path, f"{name}.py", "--floors", "0.4", "0.2", "--knots", "30", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert all(record["checks"].values())
    for key, rows in record["free"].items():
        gaps = [row["gap"] for row in rows]
        if key == "normal | normal":
            assert max(map(abs, gaps)) < 1e-8
        else:
            assert 0 < gaps[1] < gaps[0] < record["affine"][key]["gap"]
    assert (tmp_path / "runs" / folder / f"{name}.png").stat().st_size < 300_000
    assert json.loads((tmp_path / "runs" / folder / "metrics.json").read_text()) == record
