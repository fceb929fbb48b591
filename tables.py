"""results.json from the runs, and the report's tables as Markdown from it alone; reproduce.py writes both.

    made = tables(json.loads(Path("results/results.json").read_text()))       # {name: Markdown}
    text = refresh(text, made)                                                # of REPORT.md, between its markers

A cell that no run has measured says so. Distances in Inception's features (fid_*) and in classifier.py's (fd_*) have
columns of their own; an fd_ of any other network is in neither.
"""

import json
import re
import statistics
from pathlib import Path

import runs
from two_gaussians import goals

MODELS = {
    "vae_128": "VAE, 128 dimensions",
    "vae_64": "VAE, 64",
    "vae_contrastive": "VAE, 128, contrastive",
    "vae_gan_128": "VAE-GAN, 128",
    "vae_gan_64": "VAE-GAN, 64",
    "vae_gan_contrastive": "VAE-GAN, 128, contrastive",
}
WGAN_GP = {
    "": "6-D latent, penalty (default)",
    "latent_2_": "2-D latent",
    "latent_1_": "1-D latent",
    "clip_": "clipping at 0.1",
    "two_sided_": "two-sided penalty",
    "no_drift_": "no drift term",
    "sigma_": "sigma 0.3162",
}
MISSING = "not measured"


def of_classifier(metrics):
    """Whether the fd_ distances in `metrics` are in the features of classifier.py."""
    return metrics.get("fd_features") == "Frechet distance (features of features.pt2)"


def read(path):
    """A JSON file's content, or {} when there is none that can be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def collect(parts, done, records, settings, old):
    """-> results.json's content: {"settings", "runs": {name: command, seed, epochs, machine, versions, seconds,
    metrics}}.

    parts: reproduce.table's; done: names of the finished ones; records: folder of what reproduce.py noted down of each;
    old: the results.json that is there, whose runs stay if settings and command are the same.
    """
    kept = old.get("runs", {}) if old.get("settings") == settings else {}
    kept = {name: run for name, run in kept.items() if name not in parts or run["command"] == parts[name].command}
    for name in done:
        part = parts[name]
        if part.kind in ("fd", "fid"):  # these stand in their model's metrics.json
            continue
        metrics, record = read(runs.ROOT / part.folder / "metrics.json"), read(records / f"{name}.json")
        made = read(runs.ROOT / part.folder / "args.json") or metrics.get("versions") or record.get("versions", {})
        kept[name] = {
            "command": part.command,
            "seed": int(part.words[part.words.index("--seed") + 1]) if "--seed" in part.words else None,
            "epochs": made.get("epochs"),
            "machine": made.get("machine"),
            "versions": {key: made.get(key) for key in ("python", "torch", "commit")},
            "seconds": metrics.get("seconds", record.get("seconds")),
            "metrics": metrics,
        }
    return {"settings": settings, "runs": {name: kept[name] for name in [*parts, *kept] if name in kept}}


def cell(values, digits):
    """Mean ± standard deviation of `values` (None where a run has not measured it), with n where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    text = f"{statistics.mean(known):.{digits}f}"
    text += f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return text + (f" (n = {len(known)})" if len(known) < len(values) else "")


def markdown(caption, head, rows):
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join([caption, "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def tables(results):
    """results.json's content -> {name: Markdown}."""
    found, settings = results["runs"], results["settings"]
    seeds = {
        model: {name: run for name, run in found.items() if re.fullmatch(rf"{model}_seed_\d+", name)}
        for model in MODELS
    }
    runs_of = {name: run for each in seeds.values() for name, run in each.items()}
    what = "Built-in shapes, 800 images: these numbers mean nothing" if settings["quick"] else "CIFAR-10"
    numbers = sorted({run["seed"] for run in runs_of.values()})
    flags = ["--quick"] if settings["quick"] else []
    flags += [f"--{key} {settings[key]}" for key in ("epochs", "precision")]
    flags += [f"--seeds {numbers[-1] + 1}"] if numbers else []
    spread = ", mean ± standard deviation where there are several" if len(numbers) > 1 else ""
    caption = (
        f"{what}. `python reproduce.py {' '.join(flags)}`: {settings['epochs']} epochs of each VAE and VAE-GAN, "
        f"seed {', '.join(map(str, numbers)) or 'none so far'}{spread}. {origin(runs_of.values())}"
    )
    made = {
        "summary": summary(caption, found, seeds),
        "models": markdown(caption, *by_model(seeds, ELBO)),
        "distances": distances(caption, seeds),
        "classification": classification(caption, found, seeds),
    }
    made["wgan_gp"] = two_modes(found, [""])
    made["wgan_gp_sigma"] = two_modes(found, ["sigma_"])
    made["wgan_gp_variants"] = two_modes(found, [name for name in WGAN_GP if name not in ("", "sigma_")])
    return made | {"proofs": proofs(found)}


def origin(some):
    """Machines, versions of torch and commits of some runs, in words."""
    some = list(some)
    words = [sorted({str(run["machine"]) for run in some})]
    words += [sorted({str(run["versions"].get(key)) for run in some}) for key in ("torch", "commit")]
    return f"{', '.join(words[0])}; torch {', '.join(words[1])}; commit {', '.join(words[2])}." if some else ""


def key(name):
    return lambda metrics: metrics.get(name)


ELBO = {  # title: (metrics -> value or None, digits)
    "ELBO, nats": (key("elbo_nats"), 1),
    "bits per dimension": (key("bits_per_dim"), 3),
    "squared error": (key("mse"), 5),
    "KL, nats": (key("kl"), 1),
    "active units": (key("active_units"), 1),
    "sharpness of reconstructions": (key("sharpness_reconstruction"), 3),
    "of samples": (key("sharpness_generation"), 3),
    "of ex-post samples": (key("sharpness_generation_expost"), 3),
    "minutes": (lambda metrics: metrics["seconds"] / 60, 1),
}
KINDS = {
    "reconstruction": "reconstructions",
    "generation": "samples, z ~ N(0, I)",
    "generation_expost": "ex-post samples",
}


def distance(key, kind):
    """-> a function of metrics: the distance, or None. key: fid, Inception's; fd, in classifier.py's features."""
    return lambda metrics: metrics.get(f"{key}_{kind}") if key == "fid" or of_classifier(metrics) else None


def by_model(seeds, columns):
    """columns: {title: (metrics -> value or None, digits)} -> head and rows, one a model."""
    rows = []
    for model, each in seeds.items():
        values = [cell([get(run["metrics"]) for run in each.values()], digits) for get, digits in columns.values()]
        rows.append([MODELS[model], len(each), *values])
    return ["model", "n", *columns], rows


def floor(seeds, key):
    """The distance between training and test images: [value], or []; it is the same for all models."""
    each = [distance(key, "floor")(run["metrics"]) for some in seeds.values() for run in some.values()]
    return [value for value in each if value is not None][:1]


def probes(found, model):
    return {name: run for name, run in found.items() if re.fullmatch(rf"probe_{model}_seed_\d+", name)}


def accuracies(some, row):
    return [probe["metrics"]["rows"].get(row, {}).get("accuracy") for probe in some.values()]


def summary(caption, found, seeds):
    """The README's table: one row a model."""
    columns = {title: ELBO[title] for title in ("bits per dimension", "squared error")}
    columns |= {f"Frechet distance*: {text}": (distance("fd", kind), 1) for kind, text in KINDS.items()}
    columns |= {f"FID: {text}": (distance("fid", kind), 1) for kind, text in KINDS.items()}
    head, rows = by_model(seeds, columns)
    if all(cells[-3:] == [MISSING] * 3 for cells in rows):
        head, rows = head[:-3], [cells[:-3] for cells in rows]
        caption += " Inception FID: not measured, for its weights were not at hand."
    for each, cells in zip(seeds.values(), rows, strict=True):
        own = {name: found.get(f"probe_{name}", {"metrics": {"rows": {}}}) for name in each}
        cells.append(cell(accuracies(own, "mu"), 2))
    floors = [cell(floor(seeds, "fd"), 1)] * 3 + [cell(floor(seeds, "fid"), 1)] * (len(head) - 7)
    ceiling = accuracies({name: found[name] for name in ("supervised_128",) if name in found}, "supervised")
    rows.append(["as many training images", "", "", "", *floors, ""])
    rows.append(["the encoder trained with labels, 128", *[""] * (len(head) - 1), cell(ceiling, 2)])
    note = "\n\n\\* in the features of classifier.py's network, not Inception's; "
    note += "accuracy: of a linear classifier on the mean of q(z\\|x), test images."
    return markdown(caption, [*head, "linear accuracy, %"], rows) + note


def distances(caption, seeds):
    titles = {"fid": "Inception FID", "fd": "Frechet distance, classifier features"}
    columns = {f"{titles[k]}: {text}": (distance(k, kind), 2) for k in titles for kind, text in KINDS.items()}
    head, rows = by_model(seeds, columns)
    rows.append(["floor: training images", "", *(cell(floor(seeds, k), 2) for k in titles for _ in KINDS)])
    metrics = [run["metrics"] for each in seeds.values() for run in each.values()]
    counts = {titles[k]: sorted({v for v in map(distance(k, "images"), metrics) if v}) for k in titles}
    counts = "; ".join(f"{title}: {', '.join(map(str, n)) or 'no'} images a set" for title, n in counts.items())
    return markdown(f"{caption} {counts}.", head, rows)


def classification(caption, found, seeds):
    def interval(row):
        return f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}"

    def versus(probe):
        test = probe["metrics"].get("against")
        if not test:
            return ""
        name, (low, high) = Path(test["checkpoint"]).name.removeprefix("quick-"), test["interval"]
        name = MODELS.get(re.sub(r"_seed_\d+$", "", name), name)
        return f"{test['difference']:+.2f} ({low:+.2f} to {high:+.2f}) to {name}, p = {test['p_value']:.1g}"

    head = [
        "linear classifier on",
        "n",
        "mu, %",
        "95 % interval, first seed",
        "sample of q(z\\|x), %",
        "layer below, %",
    ]
    head += ["first seed against another model: points (95 %), McNemar's p"]
    rows = []
    for model in seeds:
        own = probes(found, model)
        cells = [cell(accuracies(own, row), 2) for row in ("mu", "z ~ q(z|x)", "layer below mu")]
        one = next(iter(own.values()), None)
        first = [interval(one["metrics"]["rows"]["mu"]), versus(one)] if one else [MISSING, ""]
        rows.append([MODELS[model], len(own), cells[0], first[0], *cells[1:], first[1]])
    others = {f"ceiling: trained with labels, {d} dimensions": (f"supervised_{d}", "supervised") for d in (128, 64)}
    others["its mu, frozen (128)"] = ("probe_supervised_128", "mu")
    for dims in (128, 64):
        name = next(iter(probes(found, f"vae_{dims}")), None)
        for row in ("raw pixels", "principal components", "untrained encoder"):
            if dims == 128 or row != "raw pixels":
                others[f"baseline: {row}" + (f", {dims}" if row != "raw pixels" else "")] = (name, row)
    for title, (name, row) in others.items():
        score = found[name]["metrics"]["rows"].get(row) if name in found else None
        cells = [1, f"{score['accuracy']:.2f}", interval(score)] if score else [0, MISSING, MISSING]
        rows.append([title, *cells, "", "", ""])
    resnet = found.get("classifier", {}).get("metrics")
    cells = [0, MISSING, MISSING]
    if resnet:
        low, high = 100 * resnet["accuracy_low"], 100 * resnet["accuracy_high"]
        cells = [1, f"{100 * resnet['accuracy']:.2f}", f"{low:.2f} to {high:.2f}"]
    rows.append(["classifier.py's ResNet, end to end", *cells, "", "", ""])
    labelled = {run.get("epochs") for name, run in found.items() if name.startswith(("supervised_", "classifier"))}
    if labelled := " or ".join(str(n) for n in sorted(labelled - {None})):
        caption += f" The networks trained with labels had {labelled} epochs."
    return markdown(caption, head, rows)


def two_modes(found, variants):
    """What two_gaussians.py measured of the runs of wgan_gp.py named in `variants`, a row each."""

    def worst(name):
        return lambda metrics: goals(metrics, metrics["sigma"])[name].value

    columns = {  # title: (metrics -> value, how to print it)
        "weight of mode 1": (lambda m: m["mode_weights"][0], "{:.1%}"),
        "worst mean error": (worst("means"), "{:.4f}"),
        "standard deviation, worst direction: error": (worst("stds"), "{:.1%}"),
        "worst correlation": (worst("correlation"), "{:.3f}"),
        "within 3 sigma": (key("within_3_sigma"), "{:.2%}"),
        "bridge": (key("bridge"), "{:.2%}"),
        "W2 in the worse mode / floor": (worst("w2"), "{:.2f}"),
        "the same, within 4 sigma": (lambda m: max(m["w2_mode_core"]) / m["w2_mode_floor"], "{:.2f}"),
        "W2 over both": (key("w2"), "{:.3f}"),
        "log-likelihood, nats": (key("log_likelihood"), "{:.3f}"),
    }

    def line(title, metrics):
        verdicts = [goal.met for goal in goals(metrics, metrics["sigma"]).values()]
        cells = [text.format(get(metrics)) for get, text in columns.values()]
        return [title, *cells, f"{sum(verdicts)} of {len(verdicts)}"]

    own = {v: {n: r for n, r in found.items() if re.fullmatch(rf"wgan_gp_{v}seed_\d+", n)} for v in variants}
    some = {name: run for each in own.values() for name, run in each.items()}
    if not some:
        return MISSING
    first = next(iter(some.values()))["metrics"]
    bound = {name: goal.bound for name, goal in goals(first, first["sigma"]).items()}
    goal = [f"{0.5 - bound['weights']:.0%} to {0.5 + bound['weights']:.0%}", bound["means"], f"{bound['stds']:.0%}"]
    goal += [bound["correlation"], f"{1 - bound['far']:.0%}", "", bound["w2"], "", "", "", ""]
    truth = first["truth"] | {name: first[name] for name in ("sigma", "w2_mode_floor")}
    rows = [["goal", *goal], line("real samples", truth)]
    for variant, each in own.items():
        rows += [line(f"{WGAN_GP[variant]}, seed {run['seed']}", run["metrics"]) for run in each.values()]
        if len(each) > 1:
            cells = []
            for get, text in columns.values():
                values = [get(run["metrics"]) for run in each.values()]
                cells.append(f"{text.format(statistics.mean(values))} ± {text.format(statistics.stdev(values))}")
            rows.append([f"{WGAN_GP[variant]}: mean ± standard deviation, n = {len(each)}", *cells, ""])
    caption = f"20,000 samples, for W2 10 times 2,000. {origin(some.values())}"
    table = markdown(caption, ["", *columns, "goals met"], rows)
    if len(variants) > 1:
        return table
    missed = [
        f"seed {run['seed']}, {goal.what} {goal.value:.3g} (at most {goal.bound:g})"
        for run in some.values()
        for goal in goals(run["metrics"], run["metrics"]["sigma"]).values()
        if not goal.met
    ]
    words = f"**Missed:** {'; '.join(missed)}." if missed else "**Every goal is met by every run.**"
    return f"{table}\n\n{words}"


def proofs(found):
    rows, floors = [], []
    for name in ("prior_gaussian", "prior_non_gaussian"):
        metrics = found.get(name, {}).get("metrics", {})
        for case, affine in metrics.get("affine", {}).items():
            free = metrics["free"][case]
            floors = floors or [row["floor"] for row in free]
            gaps = {row["floor"]: f"{row['gap']:.4g} ({row['error']:.0e})" for row in free}
            case = case.replace(" | ", ", prior ")
            if case not in (row[0] for row in rows):  # both scripts have the same control
                gap = f"{affine['gap']:.10f}" if abs(affine["gap"]) > 1e-9 else f"{affine['gap']:.0e}"
                cells = [f"{-affine['entropy']:.6f}", gap]
                rows.append([case, *cells, *(gaps.get(floor, MISSING) for floor in floors)])
    control = found.get("prior_non_gaussian", {}).get("metrics", {}).get("positive control")
    if control:
        gap = f"{control['gap']:.1g} ({control['error']:.0e})"
        rows.append(["neither Gaussian, its exact maps", f"{control['elbo'] + control['gap']:.6f}", gap])
        rows[-1] += [""] * len(floors)
    for claim, numbers in found.get("prior_counterexample", {}).get("metrics", {}).items():
        gap = f"{numbers['gap']:.1g} ({numbers['error']:.0e})"
        rows.append([f"counterexample in 2-D, {claim}", f"{-numbers['entropy']:.6f}", gap, *[""] * len(floors)])
    checks = [v for run in found.values() for v in run["metrics"].get("checks", {}).values()]
    own = [run for name, run in found.items() if name in ("prior_gaussian", "prior_non_gaussian")]
    caption = f"{sum(checks)} of {len(checks)} steps of the proofs PASS. Smallest gap found, in nats; in brackets the "
    caption += f"quadrature's error. {origin(own)}"
    head = ["data, prior", "-H(p_d)", "affine maps", *(f"floor {floor:g}" for floor in floors)]
    return markdown(caption, head, rows) if rows else MISSING


def refresh(text, made):
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->`. Raises UserError for an unknown NAME."""

    def new(match):
        if match[1] not in made:
            raise runs.UserError(f"there is no table {match[1]}: the markers may name {', '.join(made)}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", new, text, flags=re.DOTALL)
