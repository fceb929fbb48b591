"""What both theorems share, checked: the ELBO as a divergence, and Lemma 1.

Lemma 1. Let f be a density on the plane with f = g(x) N(z; m(x), v(x)) and f = h(z) N(x; mu(z), s(z)) almost
everywhere, where g and h are densities, m and mu any measurable functions and v, s > 0. If g or h is Gaussian, then f
is a bivariate Gaussian: both marginals are Gaussian, m and mu are affine, v and s are constant.

    python prior_proofs/lemma.py

Every step of algebra is a function that returns (claim, residual) pairs; the step holds when sympy reduces every
residual to exactly zero. `slip` puts a wrong term into each claim, so that a test can see that the check would notice
it. What sympy cannot see is said where it is used: null sets and Fubini (README.md, section 2), limits (section 3).
"""

import sys
from pathlib import Path

import sympy as sp

# The scripts of this folder are run as files, and then Python looks here, not in the repository's root, for common/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import runs  # noqa: E402

x, z, b, d, mu, m = sp.symbols("x z b d mu m", real=True)
a, c = sp.symbols("a c", real=True)
s, v, n, sigma = sp.symbols("s v n sigma", positive=True)


# --- the harness --------------------------------------------------------------------------------------------------


def vanishes(residual):
    """True when sympy reduces the expression, or every entry of the matrix, to exactly 0."""
    entries = [sp.sympify(entry) for entry in (residual if isinstance(residual, sp.MatrixBase) else [residual])]
    if not entries:
        return False  # an equation without solutions proves nothing

    def reduce(entry):
        if entry.is_rational_function():
            return sp.cancel(entry)  # a canonical form
        return sp.simplify(sp.expand_log(entry, force=True))

    return all(reduce(entry) == 0 for entry in entries)


def walk(steps, slipped=None, script=""):
    """Print every claim with PASS or FAIL. `slipped`: the name of a step to spoil. -> {"module.step": True or False}

    script: the module's name of steps that are defined in the file that is run.
    """
    results = {}
    for step in steps:
        name = step.__name__
        print(f"\n  {name}: {step.__doc__.splitlines()[0]}")
        verdicts = []
        for claim, residual in step(slip=int(name == slipped)):
            verdicts.append(vanishes(residual))
            print(f"    {'PASS' if verdicts[-1] else 'FAIL'}  {claim}")
        module = step.__module__.rpartition(".")[2]
        results[f"{script if module == '__main__' else module}.{name}"] = all(verdicts)
    return results


def main_of(doc, steps):
    """-> the main function of a file that has steps only."""

    def main(argv=None):
        parser = runs.Parser(doc)
        parser.add_argument("--slip", choices=[step.__name__ for step in steps], help="spoil this step: it must FAIL")
        args = parser.parse_args(argv)
        print(doc)
        if not all(walk(steps, args.slip).values()):
            sys.exit(1)

    return main


def log_normal(y, mean, variance):
    """log N(y; mean, variance)"""
    return -((y - mean) ** 2) / (2 * variance) - sp.log(2 * sp.pi * variance) / 2


def normal_mean(expression, variable):
    """E of a polynomial in a standard normal variable, from E u^2k = (2k - 1)!!; odd moments are 0."""
    terms = sp.Poly(sp.expand(expression), variable).terms()
    return sum(coefficient * sp.factorial2(k - 1) for (k,), coefficient in terms if k % 2 == 0)


def expect(expression, means):
    """E over Gaussians drawn one after another. means: [(variable, mean, variance)], the last drawn last."""
    u = sp.Dummy("u", real=True)
    for variable, mean, variance in reversed(means):
        expression = normal_mean(expression.subs(variable, mean + sp.sqrt(variance) * u), u)
    return sp.expand(expression)


# --- the ELBO as a divergence -------------------------------------------------------------------------------------


def elbo_identity(slip=0):
    """L = -H(p_d) - KL(P || Q), here with p_d = N(mu, sigma^2), p = N(0, 1) and affine maps, in closed form."""
    data, encoder = (x, mu, sigma**2), (z, c * x + d, v)
    logs = log_normal(z, 0, 1) + log_normal(x, a * z + b, s) - log_normal(z, c * x + d, v)
    lower_bound = expect(logs, [data, encoder])
    # KL between bivariate Gaussians from the textbook's matrix formula, which knows nothing of encoders
    mean_p, mean_q = sp.Matrix([mu, c * mu + d]), sp.Matrix([b, 0])
    cov_p = sp.Matrix([[sigma**2, c * sigma**2], [c * sigma**2, c**2 * sigma**2 + v]])
    cov_q = sp.Matrix([[a**2 + s, a], [a, 1]])
    inverse, shift = cov_q.inv(), mean_q - mean_p
    kl = ((inverse * cov_p).trace() + (shift.T * inverse * shift)[0] - 2) / 2
    kl += sp.log(sp.factor(cov_q.det())) / 2 - sp.log(sp.factor(cov_p.det())) / 2
    entropy = sp.log(2 * sp.pi * sp.E * sigma**2) / 2
    yield "E_P[log p(z) p(x|z) / q(z|x)] = -H(p_d) - KL(P || Q)", lower_bound + entropy + kl + slip * c**2


# --- Lemma 1 ------------------------------------------------------------------------------------------------------


def three_points(slip=0):
    """If log f is a quadratic in z for three x, and in x for every z, its coefficients b_k(z) are quadratics in z."""
    x1, x2, x3 = sp.symbols("x1:4", real=True)
    points = (x1, x2, x3)
    vandermonde = sp.Matrix([[1, p, p**2] for p in points])
    yield (
        "Vandermonde: det [1, x_i, x_i^2] = (x2 - x1)(x3 - x1)(x3 - x2), not 0 for distinct x_i",
        vandermonde.det() - (x2 - x1) * (x3 - x1) * (x3 - x2) * (1 + slip),
    )
    alpha = sp.Matrix(3, 3, sp.symbols("alpha:9", real=True))
    sections = alpha * sp.Matrix([1, z, z**2]) + slip * sp.Matrix([z**3, 0, 0])  # a0(x_i) + a1(x_i) z + a2(x_i) z^2
    coefficients = vandermonde.LUsolve(sections)
    yield "the solution b_k(z) has third derivative 0", coefficients.diff(z, 3)


def marginal_integral(slip=0):
    """h(z) is the integral of f = exp(A x^2 + B x + C) over x, where A = -n < 0."""
    B, C = sp.symbols("B C", real=True)
    integral = sp.integrate(sp.exp(-n * x**2 + B * x + C), (x, -sp.oo, sp.oo))
    claimed = sp.sqrt(sp.pi / n) * sp.exp(C + B**2 / ((4 + slip) * n))
    yield "integral of exp(A x^2 + B x + C) dx = sqrt(pi / -A) exp(C - B^2 / 4A)", integral - claimed


def star(slip=0):
    """If h = exp(D), then (*)  -A'/(2A) = (D - C + B^2/(4A))', with polynomials A, B, C, D of z."""
    A, B, C, D = (sp.Function(name)(z) for name in "ABCD")
    log_h = sp.log(sp.pi) / 2 - sp.log(-A) / 2 + C - B**2 / (4 * A)
    claimed = -A.diff(z) / (2 * A) - (D - C + B**2 / (4 * A)).diff(z) * (1 + slip)
    yield "(log h - D)' = 0 is (*)", (log_h - D).diff(z) - claimed


def residue(expression, pole, order):
    """The residue at a pole of at most the given order."""
    cleared = sp.cancel(expression * (z - pole) ** order)
    return sp.cancel(sp.diff(cleared, z, order - 1).subs(z, pole) / sp.factorial(order - 1))


def residues(slip=0):
    """A has no zero, real or complex: at one of multiplicity k, (*) has residue -k/2 on the left and 0 on the right."""
    r, w = sp.symbols("r w")  # complex
    lead = sp.symbols("lead", nonzero=True)
    laurent = sum(coefficient * w**k for k, coefficient in zip(range(-5, 6), sp.symbols("l:11"), strict=True))
    yield (
        "the derivative of a Laurent series (order 5 here) has no term 1/w",
        sp.expand(laurent.diff(w) + slip / w).coeff(w, -1),
    )
    B = sum(coefficient * z**k for k, coefficient in enumerate(sp.symbols("b0:3")))
    cases = {
        "deg A = 1": (lead * (z - r), r, 1),
        "deg A = 2, a simple zero (of two real or two conjugate ones)": (lead * (z - r) * (z - w), r, 1),
        "deg A = 2, a double zero": (lead * (z - r) ** 2, r, 2),
    }
    for name, (A, pole, k) in cases.items():
        yield f"{name}: left residue -{k}/2", residue(-A.diff(z) / (2 * A), pole, k) + sp.Rational(k, 2) + slip
        right = (B**2 / (4 * A)).diff(z) + slip / (z - pole)  # D and C are polynomials: no poles
        yield f"{name}: right residue 0", residue(right, pole, k + 1)


def degree_of_b(slip=0):
    """With A = -n constant, (*) says B^2 = 4n (D - C - const), of degree at most 2, so B has degree at most 1."""
    b0, b1, b2, k0, k1, k2 = sp.symbols("b0 b1 b2 k0 k1 k2", real=True)
    B = b0 + b1 * z + b2 * z**2
    difference = sp.Poly(B**2 - 4 * n * (k0 + k1 * z + k2 * z**2), z)
    yield "the coefficient of z^4 is b2^2", difference.coeff_monomial(z**4) - b2**2 * (1 + slip)
    roots = sp.solve(difference.coeff_monomial(z**4) - slip, b2)
    yield "it vanishes only for b2 = 0", sp.Matrix(roots)


def joint_is_gaussian(slip=0):
    """log f = -n x^2 + (b0 + b1 z) x + c0 + c1 z + c2 z^2 is integrable only as a bivariate Gaussian."""
    b0, b1, c0, c1, c2 = sp.symbols("b0 b1 c0 c1 c2", real=True)
    log_f = -n * x**2 + (b0 + b1 * z) * x + c0 + c1 * z + c2 * z**2
    mean = (b0 + b1 * z) / (2 * n)
    rest = sp.Poly(sp.expand(log_f + n * (x - mean) ** 2), x, z)
    yield (
        "mu(z) = (b0 + b1 z)/2n is affine, s = 1/2n constant: the rest is free of x",
        rest.as_expr().diff(x) + slip * x,
    )
    curvature = rest.coeff_monomial(z**2)  # h is integrable only if this is negative
    hessian = -sp.hessian(log_f, (x, z))
    yield "det of the precision is -4n times the curvature of log h", hessian.det() + (4 + slip) * n * curvature
    other = (b1 * x + c1) / (-2 * c2)
    remainder = sp.expand(log_f - c2 * (z - other) ** 2).diff(z)
    yield "m(x) = -(c1 + b1 x)/2 c2 is affine, v = -1/(2 c2) constant: likewise", remainder + slip * z


def one_marginal_is_needed(slip=0):
    """f ~ exp(-x^2 - z^2 - x^2 z^2) has Gaussian conditionals both ways and no Gaussian marginal."""
    log_f = -(x**2) - z**2 - x**2 * z**2
    variance = 1 / (2 * (1 + z**2))
    yield "f(x|z) = N(0, 1/(2(1 + z^2)))", (log_f - log_normal(x, 0, variance)).diff(x) + slip * x
    marginal = sp.exp(-(z**2)) * sp.integrate(sp.exp(-n * x**2), (x, -sp.oo, sp.oo)).subs(n, 1 + z**2)
    claimed = sp.sqrt(sp.pi / (1 + z**2)) * sp.exp(-(z**2) * (1 + slip))
    yield "its marginal is ~ exp(-z^2) / sqrt(1 + z^2)", marginal - claimed
    third = sp.log(claimed).diff(z, 3)  # zero for a Gaussian
    value = sp.simplify(third.subs(z, 1))
    yield "whose logarithm has third derivative 1/2 at z = 1: no Gaussian", value - sp.Rational(1, 2) + slip
    gap = log_f - log_normal(x, 0, variance) - sp.log(claimed)  # P / Q with p_d = p = this marginal, unnormalised
    yield "so with p_d = p = this marginal P = Q: the gap is 0 though neither is Gaussian", gap


SHARED = (
    elbo_identity,
    three_points,
    marginal_integral,
    star,
    residues,
    degree_of_b,
    joint_is_gaussian,
    one_marginal_is_needed,
)


if __name__ == "__main__":
    runs.cli(main_of(__doc__, SHARED))
