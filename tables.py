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

MODELS = ("vae_128", "vae_64", "vae_contrastive", "vae_gan_128", "vae_gan_64", "vae_gan_contrastive")
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
    """-> what results.json holds: {"settings", "runs": {name: command, seed, machine, versions, seconds, metrics}}.

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
        model: [run for name, run in found.items() if re.fullmatch(rf"{model}_seed_\d+", name)] for model in MODELS
    }
    what = "built-in shapes, 2,000 images: these numbers mean nothing" if settings["quick"] else "CIFAR-10"
    machines = ", ".join(sorted({str(run["machine"]) for run in found.values()}))
    caption = (
        f"{what}; each VAE and VAE-GAN: epochs {settings['epochs']}, {settings['precision']}; "
        f"mean ± standard deviation over n seeds; {machines}."
    )

    def models(columns):
        """columns: {title: (metrics -> value or None, digits)} -> rows, one a model."""
        rows = []
        for model, each in seeds.items():
            values = [cell([get(run["metrics"]) for run in each], digits) for get, digits in columns.values()]
            rows.append([model, len(each), *values])
        return ["model", "n", *columns], rows

    def key(name):
        return lambda metrics: metrics.get(name)

    elbo = {
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
    made = {"models": markdown(caption, *models(elbo))}
    made["distances"] = distances(caption, models, seeds)
    made["classification"] = classification(caption, found, seeds)
    made["wgan_gp"] = two_modes(found)
    made["proofs"] = proofs(found)
    return made


def distances(caption, models, seeds):
    kinds = {"reconstruction": "reconstruction", "generation": "z ~ N(0, I)", "generation_expost": "z ex-post"}

    def get(key, kind):
        def value(metrics):
            return metrics.get(f"{key}_{kind}") if key == "fid" or of_classifier(metrics) else None

        return value

    titles = {"fid": "Inception FID", "fd": "Frechet distance, classifier features"}
    columns = {f"{titles[k]}: {text}": (get(k, kind), 2) for k in titles for kind, text in kinds.items()}
    head, rows = models(columns)
    runs_of = [run["metrics"] for each in seeds.values() for run in each]
    floor = {k: [v for v in map(get(k, "floor"), runs_of) if v is not None][:1] for k in titles}  # the same for all
    rows.append(["floor: training images", "", *(cell(floor[k], 2) for k in titles for _ in kinds)])
    counts = {titles[k]: sorted({v for v in map(get(k, "images"), runs_of) if v}) for k in titles}
    counts = "; ".join(f"{title}: {', '.join(map(str, n)) or 'no'} images a set" for title, n in counts.items())
    return markdown(f"{caption} {counts}.", head, rows)


def classification(caption, found, seeds):
    def accuracy(probes, row):
        return cell([probe["metrics"]["rows"].get(row, {}).get("accuracy") for probe in probes], 2)

    def interval(row):
        return f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}"

    def versus(probe):
        test = probe["metrics"].get("against")
        if not test:
            return ""
        name, (low, high) = Path(test["checkpoint"]).name.removeprefix("quick-"), test["interval"]
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
    rows, all_probes = [], []
    for model in seeds:
        probes = [run for name, run in found.items() if re.fullmatch(rf"probe_{model}_seed_\d+", name)]
        all_probes += probes
        cells = [accuracy(probes, row) for row in ("mu", "z ~ q(z|x)", "layer below mu")]
        first = [interval(probes[0]["metrics"]["rows"]["mu"]), versus(probes[0])] if probes else [MISSING, ""]
        rows.append([model, len(probes), cells[0], first[0], *cells[1:], first[1]])
    others = {f"ceiling: trained with labels, {d} dimensions": (f"supervised_{d}", "supervised") for d in (128, 64)}
    others["its mu, frozen (128)"] = ("probe_supervised_128", "mu")
    for dims in (128, 64):
        name = next((n for n in found if re.match(rf"probe_vae_{dims}_seed", n)), None)
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
    return markdown(caption, head, rows)


def two_modes(found):
    names = [name for name in found if name.startswith("wgan_gp_")]
    if not names:
        return MISSING
    values = {name: goals(found[name]["metrics"], 0.1) for name in names}
    first = found[names[0]]["metrics"]
    floors = {key: first[key] for key in ("w2_floor", "w2_mode_floor")}
    truth = goals(first["truth"] | floors, 0.1)
    seeds = [name for name in names if re.fullmatch(r"wgan_gp_seed_\d+", name)]
    rows = [["goal: at most", *(f"{bound:g}" for *_, bound in truth), ""]]
    rows += [["real samples", *(f"{value:.4f}" for _, value, _ in truth), f"{first['truth']['bridge']:.4f}"]]
    for name in names:
        cells = [f"{value:.4f}" for _, value, _ in values[name]]
        rows.append([name.removeprefix("wgan_gp_"), *cells, f"{found[name]['metrics']['bridge']:.4f}"])
    if seeds:
        columns = [*zip(*([value for _, value, _ in values[name]] for name in seeds), strict=True)]
        columns.append([found[name]["metrics"]["bridge"] for name in seeds])
        rows.append([f"default flags, n = {len(seeds)}", *(cell(column, 4) for column in columns)])
    return markdown(
        "One run a row; the last: mean ± standard deviation.", ["", *(w for w, *_ in truth), "bridge"], rows
    )


def proofs(found):
    rows, floors = [], []
    for name in ("prior_gaussian", "prior_non_gaussian"):
        metrics = found.get(name, {}).get("metrics", {})
        for case, affine in metrics.get("affine", {}).items():
            free = metrics["free"][case]
            floors = floors or [row["floor"] for row in free]
            gaps = {row["floor"]: f"{row['gap']:.4g}" for row in free}
            case = case.replace(" | ", ", prior ")
            if case not in (row[0] for row in rows):  # both scripts have the same control
                rows.append([case, f"{affine['gap']:.8f}", *(gaps.get(floor, MISSING) for floor in floors)])
    for claim, numbers in found.get("prior_counterexample", {}).get("metrics", {}).items():
        rows.append([f"counterexample in 2-D, {claim}", f"{numbers['gap']:.1g}", *[""] * len(floors)])
    checks = [v for run in found.values() for v in run["metrics"].get("checks", {}).values()]
    caption = f"{sum(checks)} of {len(checks)} steps of the proofs PASS. Smallest gap found, in nats."
    head = ["data, prior", "affine maps", *(f"floor {floor:g}" for floor in floors)]
    return markdown(caption, head, rows) if rows else MISSING


def refresh(text, made):
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->`. Raises UserError for an unknown NAME."""

    def new(match):
        if match[1] not in made:
            raise runs.UserError(f"there is no table {match[1]}: the markers may name {', '.join(made)}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", new, text, flags=re.DOTALL)
