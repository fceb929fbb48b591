"""The report's tables as Markdown, made from results.json alone.

    made = tables(json.loads(Path("results/results.json").read_text()))       # {name: Markdown}
    text = refresh(text, made)                                                # of REPORT.md, between its markers

Distances have a ruler, the network in whose features they are; each has columns and a floor of its own, and only those
in Inception's features, with its official weights, are called FID.
"""

import re
import statistics
from pathlib import Path
from typing import NamedTuple

from common.runs import UserError
from common.two_gaussians import goals


class Model(NamedTuple):
    """What is trained. minutes: of an epoch on two CPU cores, of all of wgan_gp.py; baseline: whom a probe compares it
    with; seeds: how many, None for --seeds."""

    title: str
    script: str
    flags: str
    minutes: float
    baseline: str | None = None
    seeds: int | None = None


MODELS = {
    "vae_128": Model("VAE, 128 dimensions", "vae.py", "--latent-dim 128", 2),
    "vae_64": Model("VAE, 64", "vae.py", "--latent-dim 64", 2),
    "vae_patches": Model("VAE, 128, patches", "vae.py", "--latent-dim 128 --patches 15", 2, "vae_128"),
    "vae_patches_64": Model("VAE, 64, patches", "vae.py", "--latent-dim 64 --patches 15", 2, "vae_64"),
    "vae_gan_128": Model("VAE-GAN, 128", "vae_gan.py", "--latent-dim 128", 7, "vae_128"),
    "vae_gan_64": Model("VAE-GAN, 64", "vae_gan.py", "--latent-dim 64", 7, "vae_64"),
    "vae_gan_patches": Model("VAE-GAN, 128, patches", "vae_gan.py", "--latent-dim 128 --patches 40", 7, "vae_gan_128"),
}
WGAN_GP = {
    "wgan_gp": Model("6-D latent, penalty (default)", "wgan_gp.py", "", 3, seeds=5),
    "wgan_gp_latent_2": Model("2-D latent", "wgan_gp.py", "--latent-dim 2", 3, seeds=3),
    "wgan_gp_latent_1": Model("1-D latent", "wgan_gp.py", "--latent-dim 1", 3, seeds=3),
    "wgan_gp_clip": Model("clipping at 0.1", "wgan_gp.py", "--loss clip", 3, seeds=3),
    "wgan_gp_two_sided": Model("two-sided penalty", "wgan_gp.py", "--no-one-sided", 3, seeds=1),
    "wgan_gp_no_drift": Model("no drift term", "wgan_gp.py", "--drift 0", 3, seeds=1),
    # the other reading of the assignment's "variance 0.10"
    "wgan_gp_sigma": Model("sigma 0.3162", "wgan_gp.py", "--sigma 0.3162", 3, seeds=3),
}
# Rulers: the keys in metrics.json, where {} is one of KINDS, "floor" or "images".
RULERS = {
    "fid_{}": "Inception FID",
    "fd_features_{}": "Frechet distance, classifier features",
    "fd_imagenet_{}": "Frechet distance, ImageNet features",
}
KERNELS = {
    "fid_{}_kid": "Inception kernel distance",
    "fd_features_{}_kid": "kernel distance, classifier features",
    "fd_imagenet_{}_kid": "kernel distance, ImageNet features",
}
# The summary's names of the rulers, and the notes under it.
SHORT = {"fd_features_{}": "Frechet distance*", "fd_imagenet_{}": "Frechet distance†", "fid_{}": "FID"}
NOTES = {
    "fd_features_{}": "\\* in the features of classifier.py's network, not Inception's; ",
    "fd_imagenet_{}": "† in those of an ImageNet network, not Inception's either; ",
}
KINDS = {
    "reconstruction": "reconstructions",
    "generation": "samples, z ~ N(0, I)",
    "generation_expost": "ex-post samples",
}
# Columns are {title: (key of a run's numbers, format)}.
COUNT = {"n": ("n", "n")}  # how many runs a row has
ELBO = {"ELBO, nats": ("elbo_nats", ".1f")}
ERRORS = {"bits per dimension": ("bits_per_dim", ".3f"), "squared error": ("mse", ".5f")}
DETAILS = {
    "KL, nats": ("kl", ".1f"),
    "active units": ("active_units", ".1f"),
    "sharpness of reconstructions": ("sharpness_reconstruction", ".3f"),
    "of samples": ("sharpness_generation", ".3f"),
    "of ex-post samples": ("sharpness_generation_expost", ".3f"),
    "minutes": ("minutes", ".1f"),
}
ACCURACY = {"linear accuracy, %": ("mu", ".2f")}
PROBED = {
    "mu, or what the row names, %": ("mu", ".2f"),
    "95 % interval, first seed": ("mu interval", ""),
    "sample of q(z\\|x), %": ("z ~ q(z|x)", ".2f"),
    "layer below, %": ("layer below mu", ".2f"),
    "first seed against another model: points (95 %), McNemar's p": ("against", ""),
}
REFERENCES = {  # title: kind of run, row of its metrics
    "reference: trained with labels, 128 dimensions": ("supervised_128", "supervised"),
    "reference: trained with labels, 64 dimensions": ("supervised_64", "supervised"),
    "mu of the encoder trained with labels, frozen, 128": ("probe_supervised_128", "mu"),
    "baseline: raw pixels": ("probe_vae_128", "raw pixels"),
    "baseline: principal components, 128": ("probe_vae_128", "principal components"),
    "baseline: untrained encoder, 128": ("probe_vae_128", "untrained encoder"),
    "baseline: principal components, 64": ("probe_vae_64", "principal components"),
    "baseline: untrained encoder, 64": ("probe_vae_64", "untrained encoder"),
    "classifier.py's ResNet, on 5,000 held-out training images": ("classifier", "end to end"),
}
MODES = {
    "weight of mode 1": ("mode 1", ".1%"),
    "worst mean error": ("worst means", ".4f"),
    "standard deviation, worst direction: error": ("worst stds", ".1%"),
    "worst correlation": ("worst correlation", ".3f"),
    "within 3 sigma": ("within_3_sigma", ".2%"),
    "bridge": ("bridge", ".2%"),
    "W2 in the worse mode / floor": ("worst w2", ".2f"),
    "the same, within 4 sigma": ("worst w2 core", ".2f"),
    "W2 over both": ("w2", ".3f"),
    "log-likelihood, nats": ("log_likelihood", ".3f"),
    "goals met": ("met", ""),
}
MISSING = "not measured"


def tables(results):
    """results.json's content -> {name: Markdown}."""
    found, settings = results["runs"], results["settings"]
    models = {spec.title: [numbers(found, name) for name in pick(found, model)] for model, spec in MODELS.items()}
    probes = [f"probe_{model}" for model in MODELS]
    images = "CIFAR-10. "
    if settings["quick"]:
        images = f"Built-in shapes, {settings['images']} images: these numbers mean nothing. "
    budget = images + command(settings, found)
    trained = origin(found, *MODELS)
    measured = origin(found, *MODELS, *probes, "supervised_128")
    pairs = [MODELS[each].title for kind in MODELS if "_gan" in kind for each in (vae_of(kind), kind)]
    variants = [kind for kind in WGAN_GP if kind not in ("wgan_gp", "wgan_gp_sigma")]
    return {
        "summary": summary(budget + measured, found, models),
        "compare": summary(budget + measured, found, {title: models[title] for title in pairs}),
        "models": table(budget + trained, COUNT | ELBO | ERRORS | DETAILS, models.items()),
        "distances": distances(budget + trained, models),
        "kernel": kernel_distances(images + trained, models),
        "classification": classification(budget, found, probes),
        "training": training(budget, found),
        "wgan_gp": two_modes(found, ["wgan_gp"]),
        "wgan_gp_sigma": two_modes(found, ["wgan_gp_sigma"]),
        "wgan_gp_variants": two_modes(found, variants),
        "proofs": proofs(found),
    }


def vae_of(kind):
    """The VAE that a VAE-GAN is compared with; of a VAE itself."""
    return kind.replace("_gan", "")


def pick(found, *kinds):
    """{name: run} of some kinds; the runs of one kind differ in their seeds."""
    return {name: found[name] for kind in kinds for name in found if re.fullmatch(rf"{kind}(_seed_\d+)?", name)}


def command(settings, found):
    """The second words of a caption: the command with its epochs and seeds."""
    quick = "--quick " if settings["quick"] else ""
    seeds = 1 + max((run["seed"] for run in pick(found, *MODELS).values()), default=0)
    flags = f"{quick}--epochs {settings['epochs']} --precision {settings['precision']} --seeds {seeds}"
    return f"`python reproduce.py {flags}`; mean ± standard deviation where n > 1. "


def origin(found, *kinds):
    """Machines, versions of torch and commits of some runs, in words."""
    some = pick(found, *kinds).values()
    machines = {machine for run in some for machine in str(run["machine"]).split("; ")}
    torches = {str(run["versions"].get("torch")) for run in some}
    commits = {commit for run in some for commit in re.split("[,;] ", str(run["versions"].get("commit")))}
    machines = " and ".join(sorted(machines))
    torches, commits = (", ".join(sorted(each)) for each in (torches, commits))
    dirty = " (-dirty: and changes that are in no commit)" if "-dirty" in commits else ""
    return f"{machines}; torch {torches}; commit {commits}{dirty}." if some else ""


def table(caption, columns, rows, corner="model"):
    """rows: (title, [numbers of each of its runs]), or (title, {key: words}), blank where it has none."""
    lines = [[corner, *columns], ["---", *["---:"] * len(columns)]]
    for title, row in rows:
        if isinstance(row, dict):
            cells = [row.get(key, "") for key, _ in columns.values()]
        else:
            cells = [cell([run.get(key) for run in row], form) for key, form in columns.values()]
        lines.append([title, *cells])
    return "\n".join([caption, "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def cell(values, form):
    """Mean ± standard deviation of `values`, with n where some are None, for not measured; of words, the first."""
    known = [value for value in values if value is not None]
    if form == "n":
        return len(values)
    if not known:
        return MISSING
    if isinstance(known[0], str):
        return known[0]
    text = f"{statistics.mean(known):{form}}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):{form}}"
    if len(known) < len(values):
        text += f" (n = {len(known)})"
    return text


# --- questions 2 and 3: the models --------------------------------------------------------------------------------


def numbers(found, name):
    """Of a model and its probe -> metrics.json, with kernel distances and their standard errors as words, the minutes,
    and accuracies as `probed` names them."""
    metrics = found[name]["metrics"]
    errors = {key: metrics[f"{key}_stderr"] for key in metrics if key.endswith("_kid")}
    words = {key: f"{metrics[key]:.4g} ± {error:.1g}" for key, error in errors.items()}
    return metrics | words | {"minutes": metrics["seconds"] / 60} | probed(found.get(f"probe_{name}"))


def stages(found):
    """What training buys. -> {title of a model: [numbers and "epochs"]} of its first seed after some of its epochs and
    after all of them, and the columns that table and figure show: rulers by which the earlier ones were measured."""
    models = {}
    for model, spec in MODELS.items():
        own = [name for name in found if re.fullmatch(rf"{model}_seed_0(-epoch\d+)?", name)]
        after = {found[name]["epochs"]: name for name in own if found[name].get("epochs")}
        models[spec.title] = [numbers(found, after[n]) | {"epochs": n} for n in sorted(after)]
    earlier = {title: some[:-1] for title, some in models.items()}
    return models, ERRORS | distance_columns(used(earlier, RULERS), ".1f") | ACCURACY


def training(budget, found):
    """What training buys, where copies of a run were measured."""
    models, columns = stages(found)
    if all(len(some) < 2 for some in models.values()):
        return MISSING
    behind = [name for name in found if re.search(r"vae_.*_seed_0(-epoch\d+)?$", name)]
    rows = [(f"{title}: {each['epochs']} epochs", [each]) for title, some in models.items() for each in some]
    return table(budget + origin(found, *behind), COUNT | ELBO | columns, rows)


def seen(models, key):
    """What the runs measured under a key, each value once, the first first."""
    return list(dict.fromkeys(run[key] for some in models.values() for run in some if key in run))


def used(models, rulers):
    """Of rulers, {key: title}, those by which some run was measured."""
    return {ruler: title for ruler, title in rulers.items() if any(seen(models, ruler.format(kind)) for kind in KINDS)}


def distance_columns(rulers, form):
    columns = {}
    for ruler, title in rulers.items():
        columns |= {f"{title}: {words}": (ruler.format(kind), form) for kind, words in KINDS.items()}
    return columns


def floors(models, rulers, form):
    """As the distance of each kind, that of as many training images to the test images: the same for all models.

    Another floor is the mark of another program behind the same name, say of features trained on another machine.
    """
    row = {}
    for ruler in rulers:
        known = seen(models, ruler.format("floor"))
        floor = cell(known[:1], form)
        plain = [value for value in known if not isinstance(value, str)]  # kernel distances are words
        if plain and max(plain) > 1.01 * min(plain):  # other devices round otherwise, by far less
            floor = " or ".join(f"{value:{form}}" for value in plain) + ": of several programs, do not compare"
        row |= {ruler.format(kind): floor for kind in KINDS}
    return row


def summary(caption, found, models):
    """The README's table, and the report's comparison of VAE and VAE-GAN."""
    titles = used(models, SHORT)
    columns = COUNT | ERRORS | distance_columns(titles, ".1f") | ACCURACY
    labelled = probed(found.get("supervised_128")).get("supervised")
    rows = [
        *models.items(),
        ("as many training images", floors(models, titles, ".1f")),
        ("the encoder trained with labels, 128", {"mu": cell([labelled], ".2f")}),
    ]
    notes = "".join(note for ruler, note in NOTES.items() if ruler in titles)
    notes += "accuracy: of a linear classifier on the mean of q(z\\|x), test images."
    return f"{table(caption + without_fid(titles), columns, rows)}\n\n{notes}"


def without_fid(rulers):
    """What a caption says where no run was measured in Inception's features, for whose number the assignment asks."""
    return "" if "fid_{}" in rulers else " Inception FID: not measured, for its weights were not at hand."


def distances(caption, models):
    rulers, counts = used(models, RULERS), []
    for ruler, title in rulers.items():
        images = ", ".join(map(str, seen(models, ruler.format("images"))))
        counts.append(f" {title}: {images} images a set.")
    rows = [*models.items(), ("floor: training images", floors(models, rulers, ".2f"))]
    return table(caption + "".join(counts) + without_fid(rulers), COUNT | distance_columns(rulers, ".2f"), rows)


def kernel_distances(caption, models):
    """Of each model's first run, with their standard errors: how far two models' numbers may differ by chance."""
    rulers = used(models, KERNELS)
    if not rulers:
        return MISSING
    rows = [(title, some[:1]) for title, some in models.items()]
    rows.append(("floor: training images", floors(models, rulers, "")))
    caption += " The first seed's run; ± standard error over subsets."
    return table(caption, distance_columns(rulers, ""), rows)


def probed(run):
    """Of a run of probe.py or classifier.py, or None -> {row: accuracy, %; "ROW interval" and "against": words}."""
    metrics = run["metrics"] if run else {}
    rows, measured = metrics.get("rows", {}), {}
    if "accuracy" in metrics:
        bounds = [100 * metrics["accuracy_low"], 100 * metrics["accuracy_high"]]
        rows = {"end to end": {"accuracy": 100 * metrics["accuracy"], "interval": bounds}}
    for row, shown in rows.items():
        low, high = shown["interval"]
        measured[row] = shown["accuracy"]
        measured[f"{row} interval"] = f"{low:.2f} to {high:.2f}"
        measured["against"] = ""  # where a model has nobody to be compared with
    if metrics.get("against"):
        test = metrics["against"]
        name, (low, high) = Path(test["checkpoint"]).name.removeprefix("quick-"), test["interval"]
        model = MODELS.get(re.sub(r"_seed_\d+$", "", name))
        other = model.title if model else name
        points = f"{test['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        p_value = f"p = {test['p_value']:.1g}" if test["p_value"] > 1e-300 else "p < 1e-300"  # nearer to 0 are rounded
        measured["against"] = f"{points} to {other}, {p_value}"
    return measured


def classification(budget, found, probes):
    """How well a linear classifier reads each model's codes, beside baselines and networks trained with labels."""
    rows = [(MODELS[model].title, [probed(run) for run in pick(found, f"probe_{model}").values()]) for model in MODELS]
    for title, (kind, row) in REFERENCES.items():
        first = probed(next(iter(pick(found, kind).values()), None))
        words = {"n": int(row in first), "mu": cell([first.get(row)], ".2f")}
        rows.append((title, words | {"mu interval": first.get(f"{row} interval", MISSING)}))
    labelled = ("classifier", "supervised_128", "supervised_64")
    caption = budget + origin(found, *MODELS, *probes, "probe_supervised_128", *labelled)
    epochs = sorted({run["epochs"] for run in pick(found, *labelled).values() if run.get("epochs")})
    if epochs:
        caption += f" The networks trained with labels had {' or '.join(map(str, epochs))} epochs."
    return table(caption, COUNT | PROBED, rows, "linear classifier on")


# --- questions 1 and 4 --------------------------------------------------------------------------------------------


def mode_numbers(metrics):
    """What two_gaussians.measure gives, with sigma and w2_mode_floor -> the numbers of MODES."""
    judged = goals(metrics, metrics["sigma"])
    met = [goal.met for goal in judged.values()]
    worst = {f"worst {name}": goal.value for name, goal in judged.items()}
    worst["worst w2 core"] = max(metrics["w2_mode_core"]) / metrics["w2_mode_floor"]
    return metrics | worst | {"mode 1": metrics["mode_weights"][0], "met": f"{sum(met)} of {len(met)}"}


def two_modes(found, kinds):
    """The samples of wgan_gp.py: a row for each run of some kinds, and a mean where a kind has several."""
    first = next((run["metrics"] for run in pick(found, *kinds).values()), None)
    if not first:
        return MISSING
    bound = {name: goal.bound for name, goal in goals(first, first["sigma"]).items()}
    goal = {
        "mode 1": f"{0.5 - bound['weights']:.0%} to {0.5 + bound['weights']:.0%}",
        "worst means": bound["means"],
        "worst stds": f"{bound['stds']:.0%}",
        "worst correlation": bound["correlation"],
        "within_3_sigma": f"{1 - bound['far']:.0%}",
        "worst w2": bound["w2"],
    }
    rows, missed = [("goal", goal), ("real samples", [mode_numbers(first | first["truth"])])], []
    for kind in kinds:
        title, some = WGAN_GP[kind].title, []
        for run in pick(found, kind).values():
            some.append(mode_numbers(run["metrics"]))
            rows.append((f"{title}, seed {run['seed']}", some[-1:]))
            for each in goals(run["metrics"], run["metrics"]["sigma"]).values():
                if not each.met:
                    missed.append(f"seed {run['seed']}, {each.what} {each.value:.3g} (at most {each.bound:g})")
        if len(some) > 1:
            means = [each | {"met": ""} for each in some]
            rows.append((f"{title}: mean ± standard deviation, n = {len(some)}", means))
    text = table(f"20,000 samples, for W2 10 times 2,000. {origin(found, *kinds)}", MODES, rows, corner="")
    if len(kinds) > 1:
        return text
    return f"{text}\n\n" + (f"**Missed:** {'; '.join(missed)}." if missed else "**Every goal is met by every run.**")


def proofs(found):
    """For each data and prior the ELBO's smallest gap, the likelihood's gap of the same maps, and what a decoder
    alone can reach; then maps without a gap."""
    names = ("prior_non_gaussian", "prior_gaussian", "prior_counterexample")
    first, second, plane = (found.get(name, {}).get("metrics", {}) for name in names)
    free = first.get("free", {}) | second.get("free", {})  # both have the same control
    columns, rows = {"-H(p_d)": ("bound", ""), "affine maps": ("affine", "")}, []
    for case, affine in (first.get("affine", {}) | second.get("affine", {})).items():
        columns |= {f"floor {row['floor']:g}": (row["floor"], "") for row in free[case]}
        rows += case_rows(case, affine, free[case])
    exact = {f"counterexample in 2-D, {claim}": maps for claim, maps in plane.items() if claim.startswith("claim")}
    if "positive control" in first:
        exact = {"neither Gaussian, its exact maps": first["positive control"]} | exact
    for title, maps in exact.items():
        rows.append((title, {"bound": f"{maps['elbo'] + maps['gap']:.6f}", "affine": with_error(maps, ".1g")}))
    if not rows:
        return MISSING
    checks = {}  # those of the lemma stand in several runs, and count once
    for metrics in (first, second, plane):
        for step, passed in metrics.get("checks", {}).items():
            checks[step] = checks.get(step, True) and passed
    caption = f"{sum(checks.values())} of {len(checks)} steps of the proofs PASS. Smallest gap found, in nats; in "
    caption += f"brackets the quadrature's error. {origin(found, 'prior_gaussian', 'prior_non_gaussian')}"
    doubled = [row for some in free.values() for row in some if row.get("moved") is not None and row["gap"] > 1e-9]
    if doubled:
        knots, moved = (max(row[key] for row in doubled) for key in ("knots", "moved"))
        caption += f" Up to {knots} knots a spline; their last doubling moved a gap by at most {100 * moved:.2g} %."
    return table(caption, columns, rows, "data, prior")


def case_rows(case, affine, free):
    """The three rows of one data and prior. affine: its affine maps; free: its free ones, a floor each."""
    gap = with_error(affine, ".8f" if abs(affine["gap"]) > 1e-9 else ".1g")
    ridge = [maps["likelihood_gap"] for maps in affine["ridge"]]  # of affine maps that all have the smallest gap
    if max(ridge) - min(ridge) > 1e-9:
        of_affine = f"0 to {affine['gap']:.4g}, not reached"  # prior_proofs/README.md, section 6
    else:
        of_affine = f"{ridge[0]:.4g}" if ridge[0] > 1e-9 else "0"
    elbo, same, alone = {"bound": f"{-affine['entropy']:.6f}", "affine": gap}, {"affine": of_affine}, {}
    for row in free:
        elbo[row["floor"]] = with_error(row, ".4g")
        same[row["floor"]] = with_error(row, ".4g", "likelihood_")
        gap, least, error, exact = (row["decoder_alone"][key] for key in ("gap", "least", "error", "exact"))
        between = f"{least:.3g} to {gap:.3g}" if least > 0 else f"at most {max(gap, 0) + error:.2g}"
        alone[row["floor"]] = "0 exactly" if exact else between
    title = case.replace(" | ", ", prior ")
    return [
        (title, elbo),
        ("the likelihood's gap, the same maps", same),
        ("the likelihood's gap, a decoder alone", alone),
    ]


def with_error(maps, form, of=""):
    return f"{maps[f'{of}gap']:{form}} ({maps[f'{of}error']:.0e})"


def refresh(text, made):
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->`. Raises UserError for an unknown NAME."""

    def new(match):
        if match[1] not in made:
            raise UserError(f"there is no table {match[1]}: the markers may name {', '.join(made)}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", new, text, flags=re.DOTALL)
