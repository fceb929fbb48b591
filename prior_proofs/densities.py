"""Densities on the line, given by a log-density: checked, cut into quadrature panels, with distribution function.

A log-density is a Python callable that takes a numpy float64 array and returns an array of the same shape, in nats,
-inf outside the support. What is looked at, and so what is promised:

- The mode is sought by zooming into the largest value on a grid that is geometric about 0, from 1e-6 to 1e6.
- From the mode outward, 40 points per decade of distance between 1e-6 and 1e7, the callable must return numbers. A
  change to or from -inf is an edge of the support, located by bisection.
- Panels between those points are halved until two rules agree on the mass and the entropy (so kinks and jumps are met
  by bisection; 2^-45 of a panel is the limit). Mass in peaks that no point sees is missing, and then the total is not
  1, which is an error.
- A tail that falls no faster than |x|^-3 has no variance, which is an error too: the tails that the quadrature leaves
  away could not be bounded.
"""

import math

import numpy as np
from scipy.interpolate import CubicHermiteSpline
from scipy.special import kve

from common.runs import UserError

NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)  # on [-1, 1]
FEJER = 11  # nodes of the independent rule


def gauss(edges):
    """Composite 8-point Gauss-Legendre rule. edges: (n+1,) -> nodes, weights: (8n,)"""
    half, mid = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    return (mid[:, None] + half[:, None] * NODES).ravel(), (half[:, None] * WEIGHTS).ravel()


def fejer(edges):
    """Composite Fejer rule (Chebyshev nodes): shares no node with `gauss`. edges: (n+1,) -> (11n,)"""
    angle = (np.arange(FEJER) + 0.5) * math.pi / FEJER
    k = np.arange(1, FEJER // 2 + 1)
    weights = 2 / FEJER * (1 - 2 * (np.cos(2 * np.outer(angle, k)) / (4 * k**2 - 1)).sum(1))
    half, mid = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    return (mid[:, None] - half[:, None] * np.cos(angle)).ravel(), (half[:, None] * weights).ravel()


class Density:
    """A checked density. `role` names it in error texts. Raises UserError.

    mean, variance, entropy (nats); breaks: panel edges; low, high: the part of the support that quadrature covers
    (tails of mass 1e-15, at most 1000 standard deviations); tail: the mass left away.
    """

    def __init__(self, log_density, role):
        if not callable(log_density):
            raise UserError(f"the {role} must be a callable that maps an array to its log-density")
        self.function, self.role = log_density, role
        mode = self.find_mode()
        steps = np.geomspace(1e-6, 1e7, 521)
        points = np.concatenate([mode - steps[::-1], [mode], mode + steps])
        values = self(points)
        self.check_variance(mode, points, values)
        inside = np.isfinite(values)
        self.bounded = not inside[0], not inside[-1]
        self.edges = [self.bisect(points[i], points[i + 1]) for i in np.flatnonzero(inside[1:] != inside[:-1])]
        self.breaks = self.refine(self.first_panels(points, values))
        self.summarise()

    def __call__(self, x):
        """The log-density in nats. x: array -> array of the same shape. Raises UserError when it is no number."""
        with np.errstate(all="ignore"):  # a callable may well compute log(0) outside its support
            values = np.asarray(self.function(x), dtype=np.float64)
        if values.shape != np.shape(x):
            raise UserError(f"the {self.role}'s log-density must return an array of the shape it is given")
        if np.isnan(values).any() or (values == np.inf).any():
            raise UserError(f"the {self.role}'s log-density is not finite everywhere: it returns nan or +infinity")
        return values

    def find_mode(self):
        wide = np.geomspace(1e-6, 1e6, 481)
        grid = np.concatenate([-wide[::-1], [0.0], wide])
        for _ in range(40):
            values = self(grid)
            if not np.isfinite(values).any():
                raise UserError(f"the {self.role}'s log-density is -infinity at every point tried: it is no density")
            best = int(np.argmax(values))
            if grid[best] == 0.0:
                return 0.0  # keep a symmetric density symmetric
            low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
            grid = np.linspace(low, high, 9)
        return float(grid[np.argmax(self(grid))])

    def check_variance(self, mode, points, values):
        """A tail with d log p / d log|x| above -3 has no second moment."""
        for near, far in ((1, 0), (-2, -1)):
            if np.isfinite(values[[near, far]]).all():
                slope = (values[far] - values[near]) / math.log(abs(points[far] - mode) / abs(points[near] - mode))
                if slope > -3.001:
                    raise UserError(f"the {self.role} has no finite variance: its tail must fall faster than |x|^-3")

    def bisect(self, a, b):
        inside = np.isfinite(self(np.array([a])))[0]
        for _ in range(100):
            mid = (a + b) / 2
            a, b = (mid, b) if np.isfinite(self(np.array([mid])))[0] == inside else (a, mid)
        return a if inside else b

    def first_panels(self, points, values):
        """Panel edges that double in distance from the mode, without what is surely negligible."""
        mode, top = points[len(points) // 2], values.max()
        kept = points[values + np.log1p(np.abs(points - mode)) > -110]
        near = np.abs(points[(values > top - 0.5)] - mode).max()  # the density's scale
        steps = max(near, 1e-6) * 2.0 ** np.arange(60)
        panels = np.concatenate([mode - steps, [mode], mode + steps])
        panels = panels[(panels > kept[0]) & (panels < kept[-1])]
        return np.unique(np.concatenate([kept[[0, -1]], panels, self.edges]))

    def refine(self, panels):
        """Halve panels until one 8-point rule and two on the halves agree on mass and entropy."""
        done, todo = [], list(zip(panels[:-1], panels[1:], strict=True))
        smallest = {pair: (pair[1] - pair[0]) * 2.0**-45 for pair in todo}
        todo = [(a, b, smallest[a, b]) for a, b in todo]
        while todo:
            a, b = np.array([t[0] for t in todo]), np.array([t[1] for t in todo])
            mid = (a + b) / 2
            whole = self.moments(a, b)
            error = np.abs(whole - self.moments(a, mid) - self.moments(mid, b)).max(0)
            good = (error < 1e-14) | (error < 1e-13 * np.abs(whole).max(0))
            good |= b - a < np.maximum([t[2] for t in todo], 1e-14 * (1 + np.abs(a)))
            done += [(t[0], t[1]) for t, ok in zip(todo, good, strict=True) if ok]
            halves = [(t, m) for t, m, ok in zip(todo, mid, good, strict=True) if not ok]
            todo = [(t[0], m, t[2]) for t, m in halves] + [(m, t[1], t[2]) for t, m in halves]
        return np.array(sorted({a for a, _ in done} | {b for _, b in done}))

    def moments(self, a, b):
        """Mass and -p log p of panels [a, b]. (n,), (n,) -> (2, n)"""
        half, mid = (b - a) / 2, (a + b) / 2
        logp = self(mid[:, None] + half[:, None] * NODES)
        p = np.exp(logp)
        return np.stack([(f @ WEIGHTS) * half for f in (p, np.where(p > 0, -p * np.maximum(logp, -1e4), 0.0))])

    def summarise(self):
        fine = [np.linspace(a, b, 129) for a, b in zip(self.breaks[:-1], self.breaks[1:], strict=True)]
        fine += [edge + sign * np.geomspace(1e-12, 1, 41) for edge in self.edges for sign in (-1, 1)]
        edges = np.unique(np.concatenate(fine))
        x, w = gauss(edges)
        logp = self(x)
        p = np.exp(logp) * w
        total = p.sum()
        if abs(total - 1) > 1e-6:
            raise UserError(f"the {self.role} is not normalised: its integral is {total:.6g}, and it must be 1")
        self.mean = float(p @ x)
        self.variance = float(p @ (x - self.mean) ** 2)
        self.entropy = float(-(p * np.where(p > 0, logp, 0.0)).sum())
        masses = p.reshape(-1, 8).sum(1)
        left = np.concatenate([[0.0], np.cumsum(masses)])
        right = np.concatenate([np.cumsum(masses[::-1])[::-1], [0.0]])
        ok = (left > 1e-40) & (right > 1e-40)
        slope = np.exp(self(edges)) / np.maximum(left * right, 1e-300)
        ok &= np.isfinite(slope) & (slope > 0)
        logit = np.log(np.maximum(left, 1e-300)) - np.log(np.maximum(right, 1e-300))
        ok &= np.concatenate([[True], np.diff(np.maximum.accumulate(np.where(ok, logit, -1e9))) > 1e-12])
        self.to_logit = CubicHermiteSpline(edges[ok], logit[ok], slope[ok])
        self.from_logit = CubicHermiteSpline(logit[ok], edges[ok], 1 / slope[ok])
        sd, covered = math.sqrt(self.variance), edges[(left > 1e-15) & (right > 1e-15)]
        self.low = self.edges[0] if self.bounded[0] else max(covered[0], self.mean - 1000 * sd)
        self.high = self.edges[-1] if self.bounded[1] else min(covered[-1], self.mean + 1000 * sd)
        self.tail = float(p[(x < self.low) | (x > self.high)].sum())

    def logit(self, x):
        """log F(x) / (1 - F(x)). x: array -> array"""
        ends = self.to_logit.x[[0, -1]]
        return self.to_logit(np.clip(x, *ends))

    def quantile(self, logit):
        """The inverse of `logit`. array -> array"""
        return self.from_logit(np.clip(logit, *self.from_logit.x[[0, -1]]))


# --- the densities of the tables: all of variance 1 but for the mixture (1.1225) and the control -------------------


def normal(x):
    return -(x**2) / 2 - math.log(2 * math.pi) / 2


WIDTH = 0.35  # the standard deviation of each part of the mixture


def mixture(x):
    """0.5 N(-1, 0.35^2) + 0.5 N(1, 0.35^2)"""
    part = [-(((x - m) / WIDTH) ** 2) / 2 for m in (-1, 1)]
    return np.logaddexp(*part) - math.log(2 * WIDTH) - math.log(2 * math.pi) / 2


def laplace(x):
    return -math.sqrt(2) * np.abs(x) - math.log(2) / 2


def uniform(x):
    return np.where(np.abs(x) <= math.sqrt(3), -math.log(2 * math.sqrt(3)), -np.inf)


def student_t(x):
    """Student's t with 5 degrees of freedom, scaled to variance 1."""
    constant = math.lgamma(3) - math.lgamma(2.5) - math.log(3 * math.pi) / 2
    return constant - 3 * np.log1p(x**2 / 3)


def control(x):
    """Proportional to exp(-x^2) / sqrt(1 + x^2): the marginal, twice, of exp(-x^2 - z^2 - x^2 z^2)."""
    constant = math.log(kve(0, 0.5))  # the integral is e^(1/2) K_0(1/2)
    return -(x**2) - np.log1p(x**2) / 2 - constant
