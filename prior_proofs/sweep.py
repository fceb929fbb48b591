"""The numerical half of gaussian_case.py and non_gaussian_case.py: flags, gaps over floors, table, figure."""

import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from common import pictures, runs
from prior_proofs import densities, elbo
from prior_proofs.lemma import walk

RHOS = (0.0, 0.3, 0.6, 0.9)  # correlations of x and z at which the ridge of affine optima is looked at
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


@dataclass
class Case:
    """One data/prior pair. label: for the figure. closed: its affine gap where a formula is known, else None."""

    data: str
    prior: str
    label: str
    closed: float | None = None

    @property
    def key(self):
        return f"{self.data} | {self.prior}"


def parse_args(doc, name, steps, argv=None):
    parser = runs.Parser(doc)
    positive = runs.number(float, above=0)
    parser.add_argument("--name", type=runs.run_name, default=name, help="results go to runs/NAME")
    parser.add_argument("--floors", type=positive, nargs="+", default=[0.5, 0.3, 0.2, 0.1, 0.05, 0.02],
                        help="least standard deviations of the decoder")  # fmt: skip
    parser.add_argument("--knots", type=runs.number(int, 8, 400), default=80, help="of the encoder's splines")
    parser.add_argument("--proof-only", action="store_true", help="leave the numerical part away")
    parser.add_argument("--slip", choices=[step.__name__ for step in steps], help="spoil this step: it must FAIL")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON on stdout, everything else on stderr")
    return parser.parse_args(argv)


def free_gaps(case, floors, knots, bar):
    """-> [Best], floors falling; each starts from the one before, too."""
    data, prior = load(case)
    found = []
    for floor in sorted(floors, reverse=True):
        bar.set_postfix_str(f"{case.key}, floor {floor:g}")
        found.append(elbo.best_elbo(data, prior, "free", floor, knots, starts=found[-1:]))
        bar.update()
    return found


def load(case):
    return (
        elbo.Density(getattr(densities, case.data), "data density"),
        elbo.Density(getattr(densities, case.prior), "prior"),
    )


def affine_gap(case, bar):
    """-> Best and the gaps along the ridge, [[a, s, c, v, gap]]"""
    bar.set_postfix_str(f"{case.key}, affine")
    data, prior = load(case)
    best, ridge = elbo.best_elbo(data, prior), []
    for rho in RHOS:
        point = best.parameters["eta"], best.parameters["tau"], rho
        p = elbo.affine_maps(data, *point, 0.0)[2]
        gap = -data.entropy - elbo.affine_elbo(data, prior, *point, 0.0)[0]
        ridge.append([p["a"], p["s"], p["c"], p["v"], gap])
    bar.update()
    return best, ridge


def numbers(best, **more):
    """A Best as plain values for JSON."""
    record = {key: float(getattr(best, key)) for key in ("elbo", "entropy", "gap", "error", "identity")}
    record["starts"] = {key: float(value) for key, value in best.starts.items()}
    if best.parameters:
        record["parameters"] = {key: float(value) for key, value in best.parameters.items()}
    return {**more, **record}


def measure(cases, control, floors, knots, extra=()):
    """Everything numerical, under one progress bar. extra: functions -> (name, value). -> record, {key: [Best]}"""
    floors = sorted(floors, reverse=True)
    record, maps = {"affine": {}, "free": {}}, {}
    total = (len(cases) + 1) * (1 + len(floors)) + len(extra)
    with tqdm(total=total, file=sys.stderr, dynamic_ncols=True) as bar:
        for case in (*cases, control):
            best, ridge = affine_gap(case, bar)
            record["affine"][case.key] = numbers(best, closed_form=case.closed, ridge_a_s_c_v_gap=ridge)
            maps[case.key] = free_gaps(case, floors, knots, bar)
            free = [numbers(b, floor=f) for b, f in zip(maps[case.key], floors, strict=True)]
            record["free"][case.key] = free
        for function in extra:
            name, value = function(floors)
            record[name] = value
            bar.update()
    return record, maps


def table(record):
    """The gaps, each with its error, and the spread over starts, in nats."""
    print("\n  smallest gap found (nats) +- error of the quadrature; in [ ] the gaps that the other starts led to\n")
    for key, affine in record["affine"].items():
        closed = affine["closed_form"]
        known = "" if closed is None else f"; closed form {closed:.10f}, off by {abs(affine['gap'] - closed):.0e}"
        print(f"  {key:20} -H(p_d) = {-affine['entropy']:.10f}")
        print(f"    affine        {affine['gap']:.10f} +- {affine['error']:.0e}{known}")
        for a, s, c, v, gap in affine["ridge_a_s_c_v_gap"]:
            print(f"      ridge: a = {a:.4f}, s = {s:.4f}, c = {c:.4f}, v = {v:.4f}: gap {gap:.10f}")
        for row in record["free"][key]:
            others = ", ".join(f"{name} {gap:.5g}" for name, gap in row["starts"].items())
            print(f"    floor {row['floor']:<7g} {row['gap']:.5e} +- {row['error']:.0e}   [{others}]")
    worst = max(r["identity"] for rows in record["free"].values() for r in rows)
    worst = max(worst, *(r["identity"] for r in record["affine"].values()))
    print(
        f"\n  |L + H(p_d) + KL(P || Q)| was at most {worst:.0e} nats; {elbo.IDENTITY_TOLERANCE:.0e} would be an error"
    )


def draw(path, title, cases, control, floors, record, maps, shown):
    """Gaps against the floor, the controls in a strip at zero, and the best maps of `shown` = (case, floors).

    Reads the record and the maps only; writes one file.
    """
    floors = sorted(floors, reverse=True)
    figure = plt.figure(figsize=(15, 7.2), layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.75))
    top, strip = left.subplots(2, 1, sharex=True, height_ratios=(9, 1.5))
    for case, colour in zip(cases, COLOURS, strict=False):
        rows = record["free"][case.key]
        gaps = np.array([row["gap"] for row in rows])
        errors = np.array([row["error"] for row in rows])
        top.errorbar(floors, gaps, np.minimum(errors, 0.99 * gaps), color=colour, marker="o", ms=5, label=case.label)
        top.axhline(record["affine"][case.key]["gap"], color=colour, ls="--", lw=1.2)
    top.plot([], [], color="0.4", ls="--", lw=1.2, label="affine maps (no floor needed)")
    top.set(xscale="log", yscale="log", ylabel="smallest gap found, $-H(p_d) - L$ (nats)")
    top.legend(fontsize=8.5, loc="lower left")
    top.grid(alpha=0.25)
    control_gaps = [row["gap"] for row in record["free"][control.key]]
    strip.plot(floors, control_gaps, "s", color="0.25", ms=5)
    strip.axhline(0, color="0.25", lw=0.8)
    strip.set(ylim=(-1e-9, 1e-9), yticks=[0], xlabel=r"floor on the decoder's standard deviation $\sqrt{s}$")
    worst = max(abs(gap) for gap in control_gaps)
    note = f"control, {control.label}: at most {worst:.0e}"
    strip.text(0.02, 0.9, note, transform=strip.transAxes, va="top", fontsize=8.5)
    if "positive control" in record:
        note = f"control, neither Gaussian, its exact maps: {record['positive control']['gap']:.0e}"
        strip.text(0.02, 0.1, note, transform=strip.transAxes, fontsize=8.5)
    strip.set_xticks(floors, [f"{floor:g}" for floor in floors])
    strip.xaxis.set_minor_locator(NullLocator())
    strip.invert_xaxis()
    case, wanted = shown
    columns = [f for f in wanted if f in floors] or floors[:1]
    axes = right.subplots(3, len(columns), squeeze=False, height_ratios=(2, 1, 1))
    right.suptitle(f"best maps found: {case.label}", fontsize=11)
    for column, floor in zip(axes.T, columns, strict=True):
        draw_maps(column, case, maps[case.key][floors.index(floor)], floor)
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


def draw_maps(axes, case, best, floor):
    """The encoder and decoder over P(x, z); the model's marginal against p_d; the aggregate posterior against p."""
    data, prior = load(case)
    joint, over_x, over_z = axes
    reach_x, reach_z = 3 * math.sqrt(data.variance), 3.5 * math.sqrt(prior.variance)
    x, z = np.linspace(-reach_x, reach_x, 1201), np.linspace(-reach_z, reach_z, 1601)
    m, v = best.encoder_mean(x), best.encoder_variance(x)
    mu, s = best.decoder_mean(z), best.decoder_variance(z)
    p = np.exp(data(x) - (z[:, None] - m) ** 2 / (2 * v) - np.log(2 * np.pi * v) / 2)
    q = np.exp(prior(z)[:, None] - (x - mu[:, None]) ** 2 / (2 * s[:, None]) - np.log(2 * np.pi * s[:, None]) / 2)
    shade = np.sqrt(p / p.max())  # the root shows the thin bridges between the modes
    dx, dz = x[1] - x[0], z[1] - z[0]
    m = np.where(p.sum(0) > 1e-4 * p.sum(0).max(), m, np.nan)  # where there are data
    mu = np.where(p.sum(1) > 1e-4 * p.sum(1).max(), mu, np.nan)  # and codes
    joint.imshow(shade, origin="lower", aspect="auto", extent=(x[0], x[-1], z[0], z[-1]), cmap="Greys", vmax=1.6)
    joint.plot(x, m, color="#0072b2", label=r"encoder $m(x) \pm \sqrt{v(x)}$")
    joint.fill_between(x, m - np.sqrt(v), m + np.sqrt(v), color="#0072b2", alpha=0.25, lw=0)
    joint.plot(mu, z, color="#d55e00", label=r"decoder $\mu(z) \pm \sqrt{s(z)}$")
    joint.fill_betweenx(z, mu - np.sqrt(s), mu + np.sqrt(s), color="#d55e00", alpha=0.25, lw=0)
    joint.set(xlim=(x[0], x[-1]), ylim=(z[0], z[-1]), xlabel="data $x$")
    joint.set_title(f"floor {floor:g}: gap {best.gap:.2g} nats", fontsize=10)
    over_x.fill_between(x, np.exp(data(x)), color="0.85", label="data $p_d$")
    over_x.plot(x, q.sum(0) * dz, color="#d55e00", label="model")
    over_x.set(xlabel="$x$", xlim=(x[0], x[-1]), ylim=(0, None))
    over_z.fill_between(z, np.exp(prior(z)), color="0.85", label="prior $p$")
    over_z.plot(z, p.sum(1) * dx, color="#0072b2", label="aggregate posterior")
    over_z.set(xlabel="$z$", xlim=(z[0], z[-1]), ylim=(0, None))


def run(args, script, theorem, steps, cases, control, title, figure, shown, extra=()):
    """The whole of a script: theorem, proof, numbers, figure. Exit status 1 when a step of the proof FAILs."""
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        began = time.time()
        folder = runs.Run(args, script)
        folder.begin()
        print(theorem)
        checks = walk(steps, args.slip)
        proved = all(checks.values())
        print(f"\n  {sum(checks.values())} of {len(checks)} steps PASS")
        record = {"script": script, "checks": checks}
        if proved and not args.proof_only:
            measured, maps = measure(cases, control, args.floors, args.knots, extra)
            record |= measured
            table(record)
            for name in (key for key in record if key not in ("script", "checks", "affine", "free")):
                print(f"  {name}: {json.dumps(record[name])}")
            draw(folder / figure, title, cases, control, args.floors, record, maps, shown)
            print(f"\n  figure: {folder / figure}")
        record |= {"seconds": round(time.time() - began, 1), **runs.versions()}
        runs.write_json(folder / "metrics.json", record)
        print(f"  numbers: {folder / 'metrics.json'}; {record['seconds']} s")
    if args.json:
        print(json.dumps(record, indent=2))
    if not proved:
        sys.exit(1)
