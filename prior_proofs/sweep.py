"""The numerical half of gaussian_case.py and non_gaussian_case.py: flags, gaps over floors, the table on the screen."""

import json
import sys
import time
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from common import runs
from prior_proofs import approach, densities, elbo, figures, mixing
from prior_proofs.densities import Density
from prior_proofs.lemma import walk
from prior_proofs.plane import IDENTITY_TOLERANCE

RHOS = (0.0, 0.3, 0.6, 0.9)  # points of the ridge of affine optima: correlations of x and z; at 1, s would be 0
EPSILONS = (0.1, 0.03, 0.01)  # of Theorem D's construction


@dataclass
class Case:
    """One data/prior pair.

    label: for the figure. closed: its affine gap where a formula is known, else None. alone: the highest floor up to
    which a decoder alone reaches the data's density exactly (Theorem E): 0 if only without a floor, None if never.
    """

    data: str
    prior: str
    label: str
    closed: float | None = None
    alone: float | None = None

    @property
    def key(self):
        return f"{self.data} | {self.prior}"


def parse_args(doc, name, steps, argv=None):
    parser = runs.Parser(doc)
    positive = runs.number(float, above=0)
    parser.add_argument("--name", type=runs.run_name, default=name, help="results go to runs/NAME")
    parser.add_argument("--floors", type=positive, nargs="+", default=[0.5, 0.3, 0.2, 0.1, 0.05, 0.02],
                        help="least standard deviations of the decoder")  # fmt: skip
    parser.add_argument("--knots", type=runs.number(int, 8, 1300), default=641,
                        help="of the encoder's splines, at most: doubled until the gap settles")  # fmt: skip
    parser.add_argument("--proof-only", action="store_true", help="leave the numerical part away")
    parser.add_argument("--slip", choices=[step.__name__ for step in steps], help="spoil this step: it must FAIL")
    return parser.parse_args(argv)


def free_gaps(case, data, prior, floors, knots, bar):
    """-> [Best], one a floor"""
    found = []
    for floor in floors:
        bar.set_postfix_str(f"{case.key}, floor {floor:g}")
        found.append(elbo.best_elbo(data, prior, "free", floor, knots))
        bar.update()
    return found


def decoder_alone(case, data, floor, best, higher):
    """The least KL(p_d || p_theta) of decoders with s >= floor^2 -> plain values for JSON, the density as a function.

    exact: 0 by Theorem E. Otherwise gap is the least that was found: a mixture's, that of the ELBO's best maps, or the
    one at the next higher floor (its record, or None); and no decoder is below least.
    """
    if case.alone is not None and floor <= case.alone:
        return {"gap": 0.0, "error": 0.0, "least": 0.0, "exact": True}, lambda x: np.exp(data(x))
    found = mixing.best_marginal(data, floor)
    known = [(found.gap, found.error), (best.likelihood_gap, best.likelihood_error)]
    known += [(higher["gap"], higher["error"])] if higher else []
    gap, error = min(known)
    return {"gap": gap, "error": error, "least": found.least, "exact": False}, found


def load(case):
    """-> the Density of its data, that of its prior"""
    return Density(getattr(densities, case.data), "data density"), Density(getattr(densities, case.prior), "prior")


def affine_gap(case, data, prior, bar):
    """-> Best and the gaps along the ridge, [{"a", "s", "c", "v", "gap", "likelihood_gap"}]"""
    bar.set_postfix_str(f"{case.key}, affine")
    best, ridge = elbo.best_elbo(data, prior), []
    for rho in RHOS:
        point = best.parameters["eta"], best.parameters["tau"], rho
        p = elbo.affine_maps(data, *point, 0.0)[2]
        measured = elbo.affine_elbo(data, prior, *point, 0.0)
        gaps = {"gap": -data.entropy - measured.elbo, "likelihood_gap": measured.likelihood_gap}
        ridge.append({key: p[key] for key in "ascv"} | gaps)
    bar.update()
    return best, ridge


def plain(best, **more):
    """A Best as plain values for JSON."""
    names = ("elbo", "entropy", "gap", "error", "identity", "likelihood_gap", "likelihood_error")
    record = {key: float(getattr(best, key)) for key in names}
    record["starts"] = {key: float(value) for key, value in best.starts.items()}
    if best.parameters:
        record["parameters"] = {key: float(value) for key, value in best.parameters.items()}
    if best.knots:
        record |= {"knots": best.knots, "moved": best.moved}
    return {**more, **record}


def measure(cases, control, floors, knots, shown, extra=()):
    """Everything numerical, under one progress bar.

    shown: (case, floors) of the figures. extra: functions -> (name, value). -> record, {floor: Best} and {floor: (gap,
    density)} of the shown case
    """
    floors = sorted(floors, reverse=True)
    record = {"affine": {}, "free": {}, "construction": {}}
    kept, alone = {}, {}
    total = (len(cases) + 1) * (1 + len(floors)) + len(cases) + len(extra)
    with tqdm(total=total, file=sys.stderr, dynamic_ncols=True) as bar:
        for case in (*cases, control):
            data, prior = load(case)
            best, ridge = affine_gap(case, data, prior, bar)
            record["affine"][case.key] = plain(best, closed_form=case.closed, ridge=ridge)
            rows, reach = [], None
            for floor, found in zip(floors, free_gaps(case, data, prior, floors, knots, bar), strict=True):
                reach, density = decoder_alone(case, data, floor, found, reach)
                rows.append(plain(found, floor=floor, decoder_alone=reach))
                if case is shown[0]:
                    kept[floor], alone[floor] = found, (reach["gap"], density)
            record["free"][case.key] = rows
            if case is not control:
                record["construction"][case.key] = approach.measure(data, prior, EPSILONS, constant=case is shown[0])
                bar.update()
        for function in extra:
            name, value = function()
            record[name] = value
            bar.update()
    return record, kept, alone


def table(record):
    """The gaps, each with its error, the likelihood's beside them, and what the other starts led to, in nats."""
    print("\n  smallest ELBO gap found, nats, +- error of the quadrature | KL(p_d || p_theta) of the same maps |")
    print("  the least KL of a decoder alone under the same floor | knots (moved at the last doubling)")
    print("  [gaps from each start, with the fewest knots]\n")
    for key, affine in record["affine"].items():
        closed = affine["closed_form"]
        known = "" if closed is None else f"; by formula {closed:.10f}, off by {abs(affine['gap'] - closed):.0e}"
        print(f"  {key:20} -H(p_d) = {-affine['entropy']:.10f}")
        print(f"    affine        {affine['gap']:.10f} +- {affine['error']:.0e}{known}")
        for at in affine["ridge"]:
            maps = ", ".join(f"{name} = {at[name]:.4f}" for name in "ascv")
            print(f"      ridge: {maps}: gap {at['gap']:.10f} | {at['likelihood_gap']:.10f}")
        for row in record["free"][key]:
            alone = row["decoder_alone"]
            reach = "0 exactly" if alone["exact"] else f"{alone['least']:.4e} to {alone['gap']:.4e}"
            moved = "never doubled" if row["moved"] is None else f"{row['moved']:.1e}"
            others = ", ".join(f"{name} {gap:.5g}" for name, gap in row["starts"].items())
            print(f"    floor {row['floor']:<5g} {row['gap']:.5e} +- {row['error']:.0e} | {row['likelihood_gap']:.3e}"
                  f" | {reach} | {row['knots']} ({moved})   [{others}]")  # fmt: skip
        for name, gaps in record["construction"].get(key, {}).items():
            if name != "lambda":
                points = ", ".join(f"{epsilon:g}: {gap:.3e}" for epsilon, gap, _ in gaps)
                variance = " with constant variance" if name != "rows" else ""
                print(f"    Theorem D's maps{variance}, by epsilon: {points}")
    rows = [*record["affine"].values(), *(row for rows in record["free"].values() for row in rows)]
    worst = max(row["identity"] for row in rows)
    what = "|L + H(p_d) + KL(P || Q)| and the error of the prior's mass"
    print(f"\n  {what} were at most {worst:.0e}; {IDENTITY_TOLERANCE:.0e} would be refused")


def run(args, script, theorem, steps, cases, control, title, figure, shown, losses=None, extra=(), argv=None):
    """The whole of a script: theorem, proof, numbers, figures. Exit status 1 when a step of the proof FAILs.

    shown: (case, floors) of the maps in the figure; losses: (file name, floors) of the second figure, if any.
    """
    began, used = time.time(), time.process_time()
    folder = runs.Run(args, script, argv)
    folder.begin()
    print(theorem)
    checks = walk(steps, args.slip, script.rpartition("/")[2].removesuffix(".py"))
    print(f"\n  {sum(checks.values())} of {len(checks)} steps PASS")
    if not all(checks.values()):
        sys.exit(1)
    record = {"checks": checks}
    if not args.proof_only:
        measured, kept, alone = measure(cases, control, args.floors, args.knots, shown, extra)
        record |= measured
        table(record)
        for name in measured.keys() - {"affine", "free", "construction"}:
            print(f"  {name}: {json.dumps(record[name])}")
        pair = load(shown[0])
        views = {floor: (best, figures.View(*pair, best)) for floor, best in kept.items()}

        def some(wanted):
            return {floor: views[floor] for floor in wanted if floor in views} or dict([*views.items()][:1])

        figures.draw(folder / figure, title, cases, control, record, (shown[0], some(shown[1])))
        print(f"\n  figure: {folder / figure}")
        if losses:
            figures.draw_losses(folder / losses[0], shown[0].label, some(losses[1]), alone)
            print(f"  figure: {folder / losses[0]}")
    record |= {"seconds": round(time.time() - began, 1), "cpu_seconds": round(time.process_time() - used, 1)}
    runs.write_json(folder / "metrics.json", record)
    print(f"  numbers: {folder / 'metrics.json'}; {record['seconds']} s, {record['cpu_seconds']} s of one core")
