"""Two dimensions: with a full covariance that depends on the other variable, both claims are false.

    python prior_proofs/counterexample_2d.py

Let z, x2 and e be independent N(0, 1) and x1 = -z x2 + e. Then, with x = (x1, x2),

    p(z) = N(0, 1),    p(x|z) = N(0, Lambda(z)^-1),  Lambda(z) = [[1, z], [z, 1 + z^2]],
    q(z|x) = N(-x1 x2 / (1 + x2^2), 1 / (1 + x2^2))

are Gaussian, the data p_d(x) ~ (1 + x2^2)^(-1/2) exp(-x2^2/2 - x1^2 / 2(1 + x2^2)) are not, and the ELBO of these maps
is -H(p_d): Theorem A fails for two data dimensions and a full decoder covariance. Read backward, with z as the data
and x as the latent, the data are N(0, 1), the prior is p_d, and Theorem B fails for two latent dimensions and a full
encoder covariance. README.md, section 7, has the proof that constant or diagonal covariances cannot do this.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import sympy as sp

# The scripts of this folder are run as files, and then Python looks here, not in the repository's root, for common/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import runs  # noqa: E402
from prior_proofs.lemma import log_normal, normal_mean, walk, z  # noqa: E402

x1, x2 = sp.symbols("x1 x2", real=True)


def log_densities(slip=0):
    """log p(z), log p(x|z), log q(z|x), log p_d(x) as sympy expressions."""
    precision = sp.Matrix([[1, z], [z, 1 + z**2 + slip]])
    point = sp.Matrix([x1, x2])
    decoder = -(point.T * precision * point)[0] / 2 + sp.log(precision.det()) / 2 - sp.log(2 * sp.pi)
    spread = 1 / (1 + x2**2)
    encoder = log_normal(z, -x1 * x2 * spread, spread)
    data = log_normal(x2, 0, 1) + log_normal(x1, 0, 1 + x2**2)
    return log_normal(z, 0, 1), decoder, encoder, data


def same_joint(slip=0):
    """P = Q: p_d(x) q(z|x) = p(z) p(x|z) at every point."""
    prior, decoder, encoder, data = log_densities(slip)
    yield "log p(z) + log p(x|z) - log q(z|x) - log p_d(x) = 0", prior + decoder - encoder - data


def construction(slip=0):
    """The joint is that of z, x2, e independent N(0, 1) and x1 = -z x2 + e."""
    prior, decoder, _, _ = log_densities(slip)
    drawn = log_normal(z, 0, 1) + log_normal(x2, 0, 1) + log_normal(x1, -z * x2, 1)
    yield "p(z) p(x|z) = N(z; 0, 1) N(x2; 0, 1) N(x1; -z x2, 1)", prior + decoder - drawn
    yield "det Lambda(z) = 1 for all z", sp.Matrix([[1, z], [z, 1 + z**2 + slip]]).det() - 1


def not_gaussian(slip=0):
    """p_d is not Gaussian: its component x1 has fourth cumulant E x1^4 - 3 (E x1^2)^2 = 6."""
    second = normal_mean(1 + x2**2, x2)  # x1 given x2 is N(0, 1 + x2^2)
    fourth = normal_mean(3 * (1 + x2**2) ** 2, x2)
    yield "a Gaussian's would be 0", fourth - 3 * second**2 - 6 + slip


def mirror(slip=0):
    """Backward: data z ~ N(0, 1), latent x ~ p_d, encoder p(x|z), decoder q(z|x): the same identity, no gap."""
    prior, decoder, encoder, data = log_densities(slip)
    elbo = data + encoder - decoder  # log prior(latent) + log decoder - log encoder
    yield "its integrand is log N(z; 0, 1) = log of the data's density", elbo - prior


def constant_covariance(slip=0):
    """A full covariance that does not vary cannot do this: b^T Lambda^-1 b of degree 2 makes b(z) affine (Lemma 2)."""
    one, two, full1, full2, off = sp.symbols("one two full1 full2 off", real=True)
    precision, lead = sp.Matrix([[full1, off], [off, full2]]), sp.Matrix([one, two])  # of b(z), the terms with z^2
    form = (lead.T * precision.adjugate() * lead)[0]
    squares = ((full2 * one - off * two) ** 2 + precision.det() * two**2 * (1 + slip)) / full2
    yield "det Lambda times its z^4 term is a sum of squares, 0 only if b has no z^2", form - squares


STEPS = (same_joint, construction, not_gaussian, mirror, constant_covariance)


def expectations(nodes):
    """Both ELBOs and entropies by Gauss-Hermite over (z, x2, e), the construction's three independent Gaussians.

    -> {"claim A": {"elbo", "entropy", "gap"}, "claim B": ...}, in nats
    """
    t, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    Z, X2, E = np.meshgrid(t, t, t, indexing="ij")
    weight = w[:, None, None] * w[:, None] * w
    functions = [sp.lambdify((x1, x2, z), expression, "numpy") for expression in log_densities()]
    prior, decoder, encoder, data = (np.sum(weight * f(-Z * X2 + E, X2, Z)) for f in functions)
    claim_a, claim_b = prior + decoder - encoder, data + encoder - decoder
    return {
        "claim A": {"elbo": claim_a, "entropy": -data, "gap": -claim_a + data},
        "claim B": {"elbo": claim_b, "entropy": -prior, "gap": -claim_b + prior},
    }


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("--name", type=runs.run_name, default="prior_counterexample", help="results go to runs/NAME")
    parser.add_argument("--nodes", type=runs.number(int, 8, 160), default=120, help="Gauss-Hermite nodes per axis")
    parser.add_argument("--slip", choices=[step.__name__ for step in STEPS], help="spoil this step: it must FAIL")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    began = time.time()
    run = runs.Run(args, "prior_proofs/counterexample_2d.py", argv)
    run.begin()
    print(__doc__.split("\n\n", 2)[2])
    checks = walk(STEPS, args.slip, "counterexample_2d")
    fine, coarse = expectations(args.nodes), expectations(args.nodes // 2)
    for claim, found in fine.items():
        found["error"] = max(abs(found[key] - coarse[claim][key]) for key in ("elbo", "entropy"))
        print(
            f"\n  {claim}: L = {found['elbo']:.10f}, -H = {-found['entropy']:.10f} +- {found['error']:.0e}, "
            f"gap = {found['gap']:.1e} nats"
        )
    if not (all(checks.values()) and all(math.isclose(found["gap"], 0, abs_tol=1e-10) for found in fine.values())):
        sys.exit(1)
    record = {**fine, "checks": checks, "seconds": round(time.time() - began, 1)}
    runs.write_json(run / "metrics.json", record)
    print(f"\n  numbers: {run / 'metrics.json'}; {record['seconds']} s")


if __name__ == "__main__":
    runs.cli(main)
