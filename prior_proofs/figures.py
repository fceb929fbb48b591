"""The figures of gaussian_case.py and non_gaussian_case.py. They read a record and the maps found, and write files."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator

from common import pictures

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
ENCODER, DECODER, DATA = "#0072b2", "#d55e00", "0.85"


class View:
    """What best maps do, on a plain grid of x and z: the densities P and Q, their marginals, the two shares of the gap.

    p, q: (z, x). model: p_theta. codes: the aggregate posterior, the z-marginal of P. back: the prior's codes, decoded
    and encoded again. lost_by_model, lost_by_encoder: nats per unit of x; the first is p_d log(p_d / p_theta) + p_theta
    - p_d, which is nowhere negative and has the same integral as without its last two terms.
    """

    def __init__(self, data, prior, best):
        reach_x, reach_z = 3 * math.sqrt(data.variance), 3.5 * math.sqrt(prior.variance)
        self.x, self.z = np.linspace(-reach_x, reach_x, 1201), np.linspace(-reach_z, reach_z, 1601)
        dx, dz = self.x[1] - self.x[0], self.z[1] - self.z[0]
        self.m, self.v = best.encoder_mean(self.x), best.encoder_variance(self.x)
        self.mu, self.s = best.decoder_mean(self.z), best.decoder_variance(self.z)
        z, mu, s = self.z[:, None], self.mu[:, None], self.s[:, None]
        self.encoder = np.exp(-((z - self.m) ** 2) / (2 * self.v)) / np.sqrt(2 * np.pi * self.v)
        self.data, self.prior = np.exp(data(self.x)), np.exp(prior(self.z))
        self.p = self.data * self.encoder
        self.q = self.prior[:, None] * np.exp(-((self.x - mu) ** 2) / (2 * s)) / np.sqrt(2 * np.pi * s)
        self.model, self.codes = self.q.sum(0) * dz, self.p.sum(1) * dx
        self.back = self.encoder @ self.model * dx
        self.posterior = self.q / np.maximum(self.model, 1e-300)
        tiny = 1e-200
        kl = (self.encoder * np.log((self.encoder + tiny) / (self.posterior + tiny))).sum(0) * dz
        self.lost_by_encoder = self.data * kl
        ratio = np.log(np.maximum(self.data, tiny) / np.maximum(self.model, tiny))
        self.lost_by_model = self.data * ratio + self.model - self.data


def draw(path, title, cases, control, record, views):
    """Gaps against the floor, the controls in a strip at zero, and the best maps. Writes one file.

    views: (case, {floor: (Best, View)})
    """
    figure = plt.figure(figsize=(15, 7.2), layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.75))
    draw_gaps(left, cases, control, record)
    case, shown = views
    axes = right.subplots(3, len(shown), squeeze=False, height_ratios=(2, 1, 1))
    right.suptitle(f"best maps found: {case.label}", fontsize=11)
    for column, (floor, (best, view)) in zip(axes.T, shown.items(), strict=True):
        draw_maps(column, best, view, floor)
    axes[0, 0].set_ylabel("latent $z$")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    axes[1, 0].set_ylabel("density of $x$")
    axes[2, 0].set_ylabel("density of $z$")
    for row in axes[1:]:
        row[0].legend(fontsize=8, loc="upper left", ncols=2)
        top_of_row = 1.4 * max(axis.get_ylim()[1] for axis in row)
        for axis in row:
            axis.set_ylim(0, top_of_row)  # room for the legend
    pictures.save_figure(figure, path, dpi=100)


def draw_gaps(figure, cases, control, record):
    """The smallest gap found against the floor, log-log, over a strip with the controls at zero."""
    top, strip = figure.subplots(2, 1, sharex=True, height_ratios=(9, 1.5))
    for case, colour in zip(cases, COLOURS, strict=False):
        rows = record["free"][case.key]
        floors, gaps, errors = (np.array([row[key] for row in rows]) for key in ("floor", "gap", "error"))
        top.errorbar(floors, gaps, np.minimum(errors, 0.99 * gaps), color=colour, marker="o", ms=5, label=case.label)
        top.axhline(record["affine"][case.key]["gap"], color=colour, ls="--", lw=1.2)
    top.plot([], [], color="0.4", ls="--", lw=1.2, label="affine maps (no floor needed)")
    top.set(xscale="log", yscale="log", ylabel="smallest gap found, $-H(p_d) - L$ (nats)")
    top.legend(fontsize=8.5, loc="lower left")
    top.grid(alpha=0.25)
    rows = record["free"][control.key]
    floors, gaps = ([row[key] for row in rows] for key in ("floor", "gap"))
    strip.plot(floors, gaps, "s", color="0.25", ms=5)
    strip.axhline(0, color="0.25", lw=0.8)
    strip.set(ylim=(-1e-9, 1e-9), yticks=[0], xlabel=r"floor on the decoder's standard deviation $\sqrt{s}$")
    note = f"control, {control.label}: at most {max(map(abs, gaps)):.0e}"
    strip.text(0.02, 0.9, note, transform=strip.transAxes, va="top", fontsize=8.5)
    if "positive control" in record:
        note = f"control, neither Gaussian, its exact maps: {record['positive control']['gap']:.0e}"
        strip.text(0.02, 0.1, note, transform=strip.transAxes, fontsize=8.5)
    strip.set_xticks(floors, [f"{floor:g}" for floor in floors])
    strip.xaxis.set_minor_locator(NullLocator())
    strip.invert_xaxis()


def draw_maps(axes, best, view, floor):
    """The encoder and decoder over P(x, z); the model's marginal against p_d; the aggregate posterior against p."""
    joint, over_x, over_z = axes
    x, z = view.x, view.z
    shade = np.sqrt(view.p / view.p.max())  # the root shows the thin bridges between the modes
    m = np.where(view.data > 1e-4 * view.data.max(), view.m, np.nan)  # where there are data
    mu = np.where(view.codes > 1e-4 * view.codes.max(), view.mu, np.nan)  # and codes
    joint.imshow(shade, origin="lower", aspect="auto", extent=(x[0], x[-1], z[0], z[-1]), cmap="Greys", vmax=1.6)
    joint.plot(x, m, color=ENCODER, label=r"encoder $m(x) \pm \sqrt{v(x)}$")
    joint.fill_between(x, m - np.sqrt(view.v), m + np.sqrt(view.v), color=ENCODER, alpha=0.25, lw=0)
    joint.plot(mu, z, color=DECODER, label=r"decoder $\mu(z) \pm \sqrt{s(z)}$")
    joint.fill_betweenx(z, mu - np.sqrt(view.s), mu + np.sqrt(view.s), color=DECODER, alpha=0.25, lw=0)
    joint.set(xlim=(x[0], x[-1]), ylim=(z[0], z[-1]), xlabel="data $x$")
    joint.set_title(f"floor {floor:g}: gap {best.gap:.2g} nats", fontsize=10)
    over_x.fill_between(x, view.data, color=DATA, label="data $p_d$")
    over_x.plot(x, view.model, color=DECODER, label="model")
    over_x.set(xlabel="$x$", xlim=(x[0], x[-1]), ylim=(0, None))
    over_z.fill_between(z, view.prior, color=DATA, label="prior $p$")
    over_z.plot(z, view.codes, color=ENCODER, label="aggregate posterior")
    over_z.set(xlabel="$z$", xlim=(z[0], z[-1]), ylim=(0, None))


def draw_losses(path, label, shown, alone):
    """Where the ELBO is lost: a row for each floor of shown = {floor: (Best, View)}. Writes one file.

    alone: {floor: (gap, density as a function)} of the best decoder that needs no encoder.
    """
    figure, axes = plt.subplots(len(shown), 4, figsize=(17, 3.7 * len(shown) + 1), layout="constrained", squeeze=False)
    figure.suptitle(
        f"Where the ELBO is lost: the best Gaussian encoder and decoder found, prior N(0, 1), on a {label}",
        fontsize=14,
    )
    for row, (floor, (best, view)) in zip(axes, shown.items(), strict=True):
        x, z = view.x, view.z
        data, codes, one, nats = row
        data.fill_between(x, view.data, color=DATA, label="the data")
        short = f"this model ({best.likelihood_gap:.2g} nats from the data)"
        data.plot(x, view.model, color=DECODER, lw=2, label=short)
        gap, density = alone[floor]
        words = "the same density as the data" if gap == 0 else f"{gap:.2g} nats from the data"
        data.plot(x, density(x), "k--", lw=1, label=f"best decoder if no encoder had to fit\n({words})")
        data.set(title="what the model generates: density of $x$", xlabel="$x$", ylim=(0, 1.55 * view.data.max()))
        data.set_ylabel(f"decoder's deviation\nat least {floor:g}", fontsize=13)
        codes.fill_between(z, view.prior, color=DATA, label="the prior")
        codes.plot(z, view.codes, color=ENCODER, lw=2, label="codes of the data")
        codes.plot(z, view.back, color=ENCODER, lw=1, ls="--", label="prior, decoded and encoded back")
        top = max(view.codes.max(), view.back.max(), view.prior.max())
        codes.set(title="the codes: density of $z$", xlabel="$z$", ylim=(0, 1.5 * top))
        worst = int(np.argmax(np.where(x >= 0, view.lost_by_encoder, -1)))
        one.fill_between(z, view.posterior[:, worst], color="#f2c6a0", label="posterior of this decoder")
        one.plot(z, view.encoder[:, worst], color=ENCODER, lw=2, label="the encoder's Gaussian")
        top = max(view.posterior[:, worst].max(), view.encoder[:, worst].max())
        one.set(title=f"one data point, $x$ = {x[worst]:.2f}: its codes", xlabel="$z$", ylim=(0, 1.4 * top))
        by_encoder = best.gap - best.likelihood_gap
        of_model, of_encoder = view.lost_by_model, view.lost_by_encoder
        words = f"the model's density is not the data's: {best.likelihood_gap:.2g}"
        nats.fill_between(x, of_model, color=DECODER, alpha=0.8, lw=0, label=words)
        words = f"the encoder is not the posterior: {by_encoder:.2g}"
        nats.fill_between(x, of_model, of_model + of_encoder, color=ENCODER, alpha=0.6, lw=0, label=words)
        top = (of_model + of_encoder).max()
        nats.set(title=f"lost: {best.gap:.2g} nats in all, by $x$", xlabel="$x$", ylim=(0, 1.45 * top))
        nats.set_ylabel("nats per unit of $x$")
        for axis in row:
            axis.legend(fontsize=9, loc="upper left", framealpha=0.9)
        for axis in (data, nats):
            axis.set_xlim(x[0], x[-1])
        for axis in (codes, one):
            axis.set_xlim(z[0], z[-1])
    pictures.save_figure(figure, path, dpi=100)
