"""results.json from the runs, and the report's tables as Markdown from it alone; reproduce.py writes both.

    made = tables(json.loads(Path("results/results.json").read_text()))       # {name: Markdown}
    text = refresh(text, made)                                                # of REPORT.md, between its markers

A cell that no run has measured says so. Distances have a ruler, the network in whose features they are; each
ruler has columns and a floor of its own, and only those in Inception's features, with its official weights,
are called FID.
"""

import re
import statistics
from pathlib import Path
from typing import NamedTuple

from common import runs
from common.runs import read_json
from common.two_gaussians import goals


class Model(NamedTuple):
    """What is trained. baseline: whom a probe compares it with; minutes: an epoch's, on two CPU cores."""

    title: str
    script: str
    flags: str
    baseline: str | None
    minutes: float


class Ruler(NamedTuple):
    """A network in whose features distances are measured. short: in the summary, where `note` explains it."""

    title: str
    short: str
    note: str


CONTRASTIVE = "--latent-dim 128 --contrastive 300"
MODELS = {
    "vae_128": Model("VAE, 128 dimensions", "vae.py", "--latent-dim 128", None, 2),
    "vae_64": Model("VAE, 64", "vae.py", "--latent-dim 64", None, 2),
    "vae_contrastive": Model("VAE, 128, contrastive", "vae.py", CONTRASTIVE, "vae_128", 3.5),
    "vae_gan_128": Model("VAE-GAN, 128", "vae_gan.py", "--latent-dim 128", "vae_128", 7),
    "vae_gan_64": Model("VAE-GAN, 64", "vae_gan.py", "--latent-dim 64", "vae_64", 7),
    "vae_gan_contrastive": Model("VAE-GAN, 128, contrastive", "vae_gan.py", CONTRASTIVE, "vae_gan_128", 9),
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
CLASSIFIER = "Frechet distance, classifier features"
IMAGENET = "Frechet distance, ImageNet features"
RULERS = {  # how their keys in metrics.json begin
    "fid": Ruler("Inception FID", "FID", ""),
    "fd_features": Ruler(
        CLASSIFIER, "Frechet distance*", "\\* in the features of classifier.py's network, not Inception's; "
    ),
    "fd_imagenet": Ruler(IMAGENET, "Frechet distance†", "† in those of an ImageNet network, not Inception's either; "),
}
KINDS = {
    "reconstruction": "reconstructions",
    "generation": "samples, z ~ N(0, I)",
    "generation_expost": "ex-post samples",
}
ELBO = {  # title: (key of `numbers`, digits)
    "ELBO, nats": ("elbo_nats", 1),
    "bits per dimension": ("bits_per_dim", 3),
    "squared error": ("mse", 5),
    "KL, nats": ("kl", 1),
    "active units": ("active_units", 1),
    "sharpness of reconstructions": ("sharpness_reconstruction", 3),
    "of samples": ("sharpness_generation", 3),
    "of ex-post samples": ("sharpness_generation_expost", 3),
    "minutes": ("minutes", 1),
}
MISSING = "not measured"


# --- results.json -------------------------------------------------------------------------------------------------


def collect(parts, done, notes, settings, old):
    """-> results.json's content: {"settings", "runs": {name: command, seed, epochs, machine, versions, seconds,
    metrics}}.

    parts: reproduce.table's; done: those of them that are finished; notes: folder of what reproduce.py noted down of
    each; old: the results.json that is there, whose runs stay if settings and command are the same.
    """
    found = old.get("runs", {}) if old.get("settings") == settings else {}
    found = {name: run for name, run in found.items() if name not in parts or run["command"] == parts[name].command}
    for name, part in done.items():
        copy = re.fullmatch(r"measure_(.*-epoch(\d+))", name)
        if copy:
            found[copy[1]] = record(part, notes) | {"epochs": int(copy[2])}
        elif part.rulers is None:  # else its distances stand in its model's metrics.json
            found[name] = record(part, notes)
    return {"settings": settings, "runs": {name: found[name] for name in [*parts, *found] if name in found}}


def record(part, notes):
    metrics, note = read_json(runs.ROOT / part.folder / "metrics.json"), read_json(notes / f"{part.name}.json")
    made = read_json(runs.ROOT / part.folder / "args.json") or metrics.get("versions") or note.get("versions", {})
    return {
        "command": part.command,
        "seed": made.get("seed"),
        "epochs": made.get("epochs") if part.resumes else None,  # of a training
        "machine": made.get("machine"),
        "versions": {key: made.get(key) for key in ("python", "torch", "commit")},
        "seconds": metrics.get("seconds", note.get("seconds")),
        "metrics": metrics,
    }


def by_ruler(metrics):
    """metrics with keys as RULERS has them. Earlier commits knew one ruler besides Inception, and called it fd_."""
    earlier = {}
    if metrics.get("fd_features") == "Frechet distance (features of features.pt2)":
        earlier = {re.sub("^fd_", "fd_features_", key): value for key, value in metrics.items()}
    return earlier | metrics


# --- tables of all kinds ------------------------------------------------------------------------------------------


def tables(results):
    """results.json's content -> {name: Markdown}."""
    found = results["runs"]
    models = {spec.title: [numbers(found, name) for name in names(found, model)] for model, spec in MODELS.items()}
    caption = budget(results["settings"], sorted({run["seed"] for name in MODELS for run in pick(found, name)}))
    made = {
        "summary": summary(caption, found, models),
        "models": markdown(f"{caption} {origin(pick(found, *MODELS))}", *by_model(models, ELBO)),
        "distances": distances(f"{caption} {origin(pick(found, *MODELS))}", models),
        "classification": classification(caption, found),
    }
    if any(len(some) > 1 for some in stages(found).values()):
        made["training"] = training(caption, found)
    made["wgan_gp"] = two_modes(found, [""])
    made["wgan_gp_sigma"] = two_modes(found, ["sigma_"])
    made["wgan_gp_variants"] = two_modes(found, [name for name in WGAN_GP if name not in ("", "sigma_")])
    return made | {"proofs": proofs(found)}


def names(found, kind):
    """The names of the runs of one kind, which differ in their seeds; of a kind with one run, its own."""
    return [name for name in found if re.fullmatch(rf"{kind}(_seed_\d+)?", name)]


def pick(found, *kinds):
    return [found[name] for kind in kinds for name in names(found, kind)]


def numbers(found, name):
    """What a model's run and its probe measured -> {key of metrics.json, "minutes", or a row of the probe: number}."""
    metrics, probe = by_ruler(found[name]["metrics"]), found.get(f"probe_{name}", {"metrics": {"rows": {}}})
    accuracies = {row: shown["accuracy"] for row, shown in probe["metrics"]["rows"].items()}
    return metrics | {"minutes": metrics["seconds"] / 60} | accuracies


def seen(models, key):
    """What the runs measured under a key, each value once, the first first."""
    return list(dict.fromkeys(run[key] for some in models.values() for run in some if key in run))


def budget(settings, seeds):
    """A caption's first words: the data, the command, epochs and seeds."""
    flags = ["--quick"] if settings["quick"] else []
    flags += [f"--{key} {settings[key]}" for key in ("epochs", "precision")]
    flags += [f"--seeds {seeds[-1] + 1}"] if seeds else []
    data = "CIFAR-10"
    if settings["quick"]:
        data = f"Built-in shapes, {settings['images']} images: these numbers mean nothing"
    spread = ", mean ± standard deviation where there are several" if len(seeds) > 1 else ""
    return (
        f"{data}. `python reproduce.py {' '.join(flags)}`: {settings['epochs']} epochs of each VAE and VAE-GAN, "
        f"seed {', '.join(map(str, seeds)) or 'none so far'}{spread}."
    )


def origin(some):
    """Machines, versions of torch and commits of some runs, in words."""
    some = list(some)
    machines = {str(run["machine"]) for run in some}
    torches = {str(run["versions"].get("torch")) for run in some}
    commits = {commit for run in some for commit in str(run["versions"].get("commit")).split(", ")}
    machines, torches, commits = (", ".join(sorted(each)) for each in (machines, torches, commits))
    dirty = " (-dirty: and changes that are in no commit)" if "-dirty" in commits else ""
    return f"{machines}; torch {torches}; commit {commits}{dirty}." if some else ""


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


# --- the six models -----------------------------------------------------------------------------------------------


def by_model(models, columns):
    """models: {title: [numbers]}, columns: {title: (key of `numbers`, digits)} -> head and rows, one a model."""
    rows = []
    for title, some in models.items():
        cells = [cell([run.get(key) for run in some], digits) for key, digits in columns.values()]
        rows.append([title, len(some), *cells])
    return ["model", "n", *columns], rows


def measured(models, ruler):
    return any(seen(models, f"{ruler}_{kind}") for kind in KINDS)


def distance_columns(ruler, heading, digits):
    return {f"{heading}: {text}": (f"{ruler}_{kind}", digits) for kind, text in KINDS.items()}


def floors(models, rulers, digits):
    """A cell for each distance: that between as many training images and the test images, the same for all models."""
    return [cell(seen(models, f"{ruler}_floor")[:1], digits) for ruler in rulers for _ in KINDS]


def summary(caption, found, models):
    """The README's table."""
    rulers = [ruler for ruler in ("fd_features", "fd_imagenet", "fid") if measured(models, ruler)]
    columns = {title: ELBO[title] for title in ("bits per dimension", "squared error")}
    for ruler in rulers:
        columns |= distance_columns(ruler, RULERS[ruler].short, 1)
    head, rows = by_model(models, columns | {"linear accuracy, %": ("mu", 2)})
    rows.append(["as many training images", "", "", "", *floors(models, rulers, 1), ""])
    labelled = [run["metrics"]["rows"]["supervised"]["accuracy"] for run in pick(found, "supervised_128")]
    rows.append(["the encoder trained with labels, 128", *[""] * (len(head) - 2), cell(labelled, 2)])
    behind = pick(found, *MODELS, *(f"probe_{model}" for model in MODELS), "supervised_128")
    missing = "" if "fid" in rulers else " Inception FID: not measured, for its weights were not at hand."
    notes = "".join(RULERS[ruler].note for ruler in rulers)
    notes += "accuracy: of a linear classifier on the mean of q(z\\|x), test images."
    return markdown(f"{caption} {origin(behind)}{missing}", head, rows) + f"\n\n{notes}"


def distances(caption, models):
    rulers = [ruler for ruler in RULERS if ruler == "fid" or measured(models, ruler)]  # the assignment asks for FID
    columns, counts = {}, []
    for ruler in rulers:
        columns |= distance_columns(ruler, RULERS[ruler].title, 2)
        images = ", ".join(map(str, seen(models, f"{ruler}_images"))) or "no"
        counts.append(f"{RULERS[ruler].title}: {images} images a set")
    head, rows = by_model(models, columns)
    rows.append(["floor: training images", "", *floors(models, rulers, 2)])
    return markdown(f"{caption} {'; '.join(counts)}.", head, rows)


def stages(found):
    """{title of a model: [numbers and "epochs"]} of its first seed after some of its epochs, and after all."""
    models = {}
    for model, spec in MODELS.items():
        own = [name for name in found if re.fullmatch(rf"{model}_seed_0(-epoch\d+)?", name)]
        numbered = {found[name]["epochs"]: name for name in own if found[name].get("epochs")}
        models[spec.title] = [numbers(found, numbered[n]) | {"epochs": n} for n in sorted(numbered)]
    return models


def stage_columns(models):
    """What the figure and the table show of `stages`: {title: (key of `numbers`, digits)}."""
    columns = {title: ELBO[title] for title in ("bits per dimension", "squared error")}
    for ruler in RULERS:
        if measured(models, ruler):
            columns |= distance_columns(ruler, RULERS[ruler].title, 1)
    return columns | {"linear accuracy, %": ("mu", 2)}


def training(caption, found):
    """What training buys."""
    models = stages(found)
    rows = {f"{title}: {each['epochs']} epochs": [each] for title, some in models.items() for each in some}
    behind = [run for name, run in found.items() if re.search(r"^(probe_)?vae_.*_seed_0(-epoch\d+)?$", name)]
    return markdown(
        f"{caption} {origin(behind)}", *by_model(rows, {"ELBO, nats": ELBO["ELBO, nats"]} | stage_columns(models))
    )


def classification(caption, found):
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
    for model in MODELS:
        probes = pick(found, f"probe_{model}")
        read = [{row: shown["accuracy"] for row, shown in probe["metrics"]["rows"].items()} for probe in probes]
        mu, *rest = (cell([each.get(row) for each in read], 2) for row in ("mu", "z ~ q(z|x)", "layer below mu"))
        first = [interval(probes[0]["metrics"]["rows"]["mu"]), *rest, versus(probes[0])] if probes else []
        rows.append([MODELS[model].title, len(probes), mu, *(first or [MISSING, *rest, ""])])
    for title, shown in references(found).items():
        cells = [1, f"{shown['accuracy']:.2f}", interval(shown)] if shown else [0, MISSING, MISSING]
        rows.append([title, *cells, "", "", ""])
    labelled = pick(found, "classifier", "supervised_128", "supervised_64")
    behind = pick(found, *MODELS, *(f"probe_{model}" for model in MODELS), "probe_supervised_128")
    caption = f"{caption} {origin([*behind, *labelled])}"
    epochs = sorted({run["epochs"] for run in labelled if run.get("epochs")})
    if epochs:
        caption += f" The networks trained with labels had {' or '.join(map(str, epochs))} epochs."
    return markdown(caption, head, rows)


def interval(shown):
    low, high = shown["interval"]
    return f"{low:.2f} to {high:.2f}"


def versus(probe):
    """McNemar's test of a probe against another run's, in words; "" without one."""
    test = probe["metrics"].get("against")
    if not test:
        return ""
    name, (low, high) = Path(test["checkpoint"]).name.removeprefix("quick-"), test["interval"]
    model = MODELS.get(re.sub(r"_seed_\d+$", "", name))
    other = model.title if model else name
    return f"{test['difference']:+.2f} ({low:+.2f} to {high:+.2f}) to {other}, p = {test['p_value']:.1g}"


def references(found):
    """What has one seed -> {title: {"accuracy", "interval"} in per cent, or None}."""
    rows = {  # title: kind of run, row of its metrics
        "reference: trained with labels, 128 dimensions": ("supervised_128", "supervised"),
        "reference: trained with labels, 64 dimensions": ("supervised_64", "supervised"),
        "its mu, frozen (128)": ("probe_supervised_128", "mu"),
        "baseline: raw pixels": ("probe_vae_128", "raw pixels"),
        "baseline: principal components, 128": ("probe_vae_128", "principal components"),
        "baseline: untrained encoder, 128": ("probe_vae_128", "untrained encoder"),
        "baseline: principal components, 64": ("probe_vae_64", "principal components"),
        "baseline: untrained encoder, 64": ("probe_vae_64", "untrained encoder"),
    }
    shown = {
        title: [run["metrics"]["rows"].get(row) for run in pick(found, kind)] for title, (kind, row) in rows.items()
    }
    resnet = [run["metrics"] for run in pick(found, "classifier")]
    bounds = ("accuracy_low", "accuracy_high")
    resnet = [{"accuracy": 100 * m["accuracy"], "interval": [100 * m[key] for key in bounds]} for m in resnet]
    shown["classifier.py's ResNet, end to end"] = resnet
    return {title: each[0] if each else None for title, each in shown.items()}


# --- questions 1 and 4 --------------------------------------------------------------------------------------------


def key(name):
    return lambda metrics: metrics.get(name)


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
    """Question 4: for each data and prior the ELBO's smallest gap, the likelihood's gap of the same maps, and what a
    decoder alone can reach."""
    rows, floors, every = [], [], []
    for name in ("prior_non_gaussian", "prior_gaussian"):
        metrics = found.get(name, {}).get("metrics", {})
        for case, affine in metrics.get("affine", {}).items():
            title = case.replace(" | ", ", prior ")
            if title in (row[0] for row in rows):  # both scripts have the same control
                continue
            free = metrics["free"][case]
            every += free
            floors = floors or [row["floor"] for row in free]
            of = {row["floor"]: row for row in free}
            some = [of.get(floor) for floor in floors]
            cells = [f"{row['gap']:.4g} ({row['error']:.0e})" if row else MISSING for row in some]
            gap = f"{affine['gap']:.10f}" if abs(affine["gap"]) > 1e-9 else f"{affine['gap']:.0e}"
            rows.append([title, f"{-affine['entropy']:.6f}", gap, *cells])
            if "ridge" in affine:
                rows += likelihoods(affine, some)
    control = found.get("prior_non_gaussian", {}).get("metrics", {}).get("positive control")
    if control:
        gap = f"{control['gap']:.1g} ({control['error']:.0e})"
        rows.append(["neither Gaussian, its exact maps", f"{control['elbo'] + control['gap']:.6f}", gap])
        rows[-1] += [""] * len(floors)
    for claim, numbers in found.get("prior_counterexample", {}).get("metrics", {}).items():
        if claim != "checks":
            gap = f"{numbers['gap']:.1g} ({numbers['error']:.0e})"
            rows.append([f"counterexample in 2-D, {claim}", f"{-numbers['entropy']:.6f}", gap, *[""] * len(floors)])
    checks = {}  # those of the lemma stand in several runs, and count once
    for run in found.values():
        for step, passed in run["metrics"].get("checks", {}).items():
            checks[step] = checks.get(step, True) and passed
    own = [run for name, run in found.items() if name in ("prior_gaussian", "prior_non_gaussian")]
    caption = (
        f"{sum(checks.values())} of {len(checks)} steps of the proofs PASS. Smallest gap found, in nats; in brackets "
    )
    caption += f"the quadrature's error. {knots_in_words(every)}{origin(own)}"
    head = ["data, prior", "-H(p_d)", "affine maps", *(f"floor {floor:g}" for floor in floors)]
    return markdown(caption, head, rows) if rows else MISSING


def likelihoods(affine, some):
    """The two rows of `proofs` on the likelihood. some: records of one data and prior, a floor each, or None."""

    def alone(row):
        if row["decoder_alone"]["exact"]:
            return "0 exactly"
        gap, least, error = (row["decoder_alone"][key] for key in ("gap", "least", "error"))
        return f"{least:.3g} to {gap:.3g}" if least > 0 else f"at most {max(gap, 0) + error:.2g}"

    ridge = [at["likelihood_gap"] for at in affine["ridge"]]
    ends = [f"{end:.4g}" if end > 1e-9 else "0" for end in (min(ridge), max(ridge))]
    of_affine = ends[0] if ends[0] == ends[1] else " to ".join(ends)
    same = [f"{row['likelihood_gap']:.4g} ({row['likelihood_error']:.0e})" if row else MISSING for row in some]
    return [
        ["its likelihood, the same maps", "", of_affine, *same],
        ["its likelihood, a decoder alone", "", "", *(alone(row) if row else MISSING for row in some)],
    ]


def knots_in_words(every):
    """How many knots the gaps above rounding had, and how far the last doubling moved them."""
    some = [row for row in every if row.get("moved") is not None and row["gap"] > 1e-9]
    if not some:
        return ""
    knots, worst = [row["knots"] for row in some], max(some, key=lambda row: row["moved"])
    return (
        f"The splines' knots, {min(knots)} to {max(knots)}, were doubled until the gap settled: the last doubling "
        f"moved it by at most {100 * worst['moved']:.2g} %. "
    )


# --- the pages ----------------------------------------------------------------------------------------------------


def refresh(text, made):
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->`. Raises UserError for an unknown NAME."""

    def new(match):
        if match[1] not in made:
            raise runs.UserError(f"there is no table {match[1]}: the markers may name {', '.join(made)}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", new, text, flags=re.DOTALL)


def publish(made, done, public):
    """The tables into REPORT.md and README.md, and the pictures of finished parts, of one seed each, into `public`."""
    for page in (Path("REPORT.md"), Path("README.md")):
        if page.exists() and (new := refresh(page.read_text(), made)) != page.read_text():
            runs.write_bytes(page, new.encode())
    for name, part in done.items():
        if "_seed_" in name and not name.endswith("_seed_0"):
            continue
        for picture in (runs.ROOT / part.folder).glob("*.*"):
            if picture.suffix in (".png", ".gif") and not picture.name.startswith("density_"):
                runs.write_bytes(public / part.folder / picture.name, picture.read_bytes())
