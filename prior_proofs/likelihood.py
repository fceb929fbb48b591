"""What the ELBO's gap says about the likelihood, and what it does not: Theorems E and F, the algebra.

    python prior_proofs/likelihood.py                   # the proof's steps
    python prior_proofs/likelihood.py --slip two_gaps

    gap = KL(P || Q) = KL(p_d || p_theta) + E_{p_d} KL(q(z|x) || p_theta(z|x))

The left part is the likelihood's own gap. Theorem E: whatever density the prior is, a Gaussian decoder alone reaches
p_theta = p_d exactly when p_d is a mixture of normal densities, and under a floor, s >= c^2, exactly when p_d is
N(0, c^2) convolved with a probability measure. Theorem F: for such data the likelihood's maximiser need not be the
ELBO's: if all components have the floor's variance, and two or more centres, it never is. README.md, section 4, has the
proofs.
"""

import sys
from pathlib import Path

import sympy as sp

# The scripts of this folder are run as files, and then Python looks here, not in the repository's root, for common/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import runs  # noqa: E402
from prior_proofs.lemma import a, b, c, d, expect, log_normal, m, main_of, mu, s, sigma, v, x, z  # noqa: E402


def gaussian_kl(mean1, variance1, mean2, variance2):
    return (sp.log(variance2 / variance1) + (variance1 + (mean1 - mean2) ** 2) / variance2 - 1) / 2


def two_gaps(slip=0):
    """KL(P || Q) = KL(p_d || p_theta) + E KL(q || p_theta(z|x)), here for Gaussian data and affine maps."""
    total = a**2 + s  # p_theta = N(b, a^2 + s), p_theta(z|x) = N(a(x - b)/total, s/total)
    data, encoder = (x, mu, sigma**2), (z, c * x + d, v)
    log_p = log_normal(x, mu, sigma**2) + log_normal(z, c * x + d, v)
    log_q = log_normal(z, 0, 1) + log_normal(x, a * z + b, s)
    whole = expect(log_p - log_q, [data, encoder])
    of_likelihood = gaussian_kl(mu, sigma**2, b, total)
    of_encoder = expect(gaussian_kl(c * x + d, v, a * (x - b) / total, s / total), [data])
    yield "the two parts make the whole", whole - of_likelihood - of_encoder + slip * a


def mixtures_of_normals(slip=0):
    """Laplace and Student-t densities are mixtures of N(0, s), so mu = 0 and a map s(z) reach them without a floor."""
    beta, y, u, t = sp.symbols("beta y u t", positive=True)  # y = |x|; u = s, then 1/s
    rate = 1 / (2 * beta**2)
    of_mixture = sp.integrate(sp.exp(-u * t**2 / 2) * rate * sp.exp(-rate * u), (u, 0, sp.oo))
    of_laplace = sp.integrate(sp.cos(t * y) * sp.exp(-y / beta) / beta, (y, 0, sp.oo))
    claimed = 1 / (1 + (1 + slip) * beta**2 * t**2)
    yield "exponential s of mean 2 beta^2: the characteristic function is 1/(1 + beta^2 t^2)", of_mixture - claimed
    yield "which is that of exp(-|x|/beta)/(2 beta), the Laplace density", of_laplace - claimed
    rate_t = sp.Rational(3, 2)  # 1/s Gamma distributed with shape 5/2 and this rate
    student = sp.integrate(
        sp.sqrt(u / (2 * sp.pi)) * sp.exp(-u * y**2 / 2) * rate_t ** sp.Rational(5, 2) / sp.gamma(sp.Rational(5, 2))
        * u ** sp.Rational(3, 2) * sp.exp(-rate_t * u), (u, 0, sp.oo))  # fmt: skip
    claimed = sp.gamma(3) / sp.gamma(sp.Rational(5, 2)) / sp.sqrt(3 * sp.pi) * (1 + y**2 / 3) ** -3
    yield "inverse-gamma s: Student's t with 5 degrees of freedom, variance 1", student - claimed * (1 + slip)


def floors_and_mixtures(slip=0):
    """N(m, s) is N(0, c^2) convolved with N(m, s - c^2): s >= c^2 allows exactly the convolutions with N(0, c^2)."""
    y = sp.symbols("y", real=True)
    c2, rest = sp.symbols("c2 rest", positive=True)
    left = log_normal(x, y, c2) + log_normal(y, m, rest)
    back = log_normal(y, (rest * x + c2 * m) / (c2 + rest), c2 * rest / (c2 + rest))
    yield (
        "the integral of N(x; y, c^2) N(y; m, r) over y is N(x; m, c^2 + r)",
        (left - log_normal(x, m, c2 + rest) - back + slip * x * y),
    )


def not_reached_under_a_floor(slip=0):
    """A convolution with N(0, c^2) is an entire function of x, and its characteristic function over N(0, c^2)'s is at
    most 1."""
    y, c2, part = sp.symbols("y c2 part", positive=True)
    student = 3 * sp.log(1 + y**2 / 3)  # of 1/p_d, up to a constant
    at_pole = sp.exp(student).subs(y, sp.I * sp.sqrt(3 + slip))
    yield "Student-t: 1/p_d vanishes at i sqrt(3), so p_d is not entire", sp.expand(at_pole)
    right, left = (-sp.sqrt(2) * sign * y for sign in (1, -1))
    yield "Laplace: (log p_d)' jumps by -2 sqrt(2) at 0", right.diff(y) - left.diff(y) + (2 + slip) * sp.sqrt(2)
    t = 2 * sp.pi  # where cos(t) = 1, for centres +-1 and components of variance `part`
    ratio = sp.log(sp.cos(t)) - part * t**2 / 2 + c2 * t**2 / 2
    yield (
        "mixture: its logarithm at 2 pi is 2 pi^2 (c^2 - part) > 0 if c^2 > part",
        (ratio - (2 + slip) * sp.pi**2 * (c2 - part)),
    )


def best_encoder_is_spread(slip=0):
    """Theorem F: if |mu| <= top, s = c^2, the best encoder has log v >= -1 - 2 rho, rho = 2 top|x|/c^2 + top^2/2c^2."""
    top, c2, rho, size = sp.symbols("top c2 rho size", positive=True)  # size = |x|
    bound = 2 * top * size / c2 + top**2 / (2 * c2)
    spread = ((size + top) ** 2 - (size - top) ** 2) / (2 * c2)  # of log p(x|z) over |mu| <= top, for |x| >= top
    yield "for |x| >= top log p(x|z) varies by rho - top^2/2c^2 over z", bound - spread - top**2 / ((2 + slip) * c2)
    inside = (size + top) ** 2 / (2 * c2)  # for |x| <= top, where the best mu is x itself
    yield (
        "for |x| <= top by rho - |x|(2 top - |x|)/2c^2",
        bound - inside - size * (2 * top - (1 + slip) * size) / (2 * c2),
    )
    kl = gaussian_kl(m, v, 0, 1)
    yield "KL(N(m, v) || N(0, 1)) is at least -(1 + log v)/2", kl + (1 + sp.log(v)) / 2 - (m**2 + v) / (2 + slip)
    at_bound = (-(1 + sp.log(v)) / 2 - rho).subs(v, sp.exp(-1 - (2 + slip) * rho))
    yield "so KL <= rho means v >= exp(-1 - 2 rho)", sp.expand_log(at_bound, force=True)


STEPS = (two_gaps, mixtures_of_normals, floors_and_mixtures, not_reached_under_a_floor, best_encoder_is_spread)


if __name__ == "__main__":
    runs.cli(main_of(__doc__, STEPS))
