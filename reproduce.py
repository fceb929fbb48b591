"""Every experiment of the assignment, each as a process of its own, and the tables made from their numbers.

    python reproduce.py                              # all of it on CIFAR-10; a finished part is not run again
    python reproduce.py --quick                      # all of it small, on built-in data: shows that everything runs
    python reproduce.py --only wgan_gp --only probe  # parts whose names begin so
    python reproduce.py --only measure               # fill in distances, once their networks can be had
    # with --only, give the --epochs, --seeds and --precision that the trainings had
    cp -a runs/vae_128_seed_0 runs/vae_128_seed_0-epoch5     # after its epoch 5: a row of what training buys

After Ctrl-C or a crash the same command goes on. A reproduce.py that was killed (kill -9) leaves its parts
running: until they have ended they are refused as in use; give the command again then. A part is finished when
runs/NAME/metrics.json is there, the command in its args.json has the same flags, and nothing that it needs is
newer. A VAE or VAE-GAN that had fewer --epochs goes on from its checkpoint, and its earlier numbers stay in
metrics-epochN.json. Its rate is constant, so this is the longer training but for the start: the rate's rise
over the first 2 % of the steps was over 2 % of fewer steps. With GPUs each has a part of its own, and those
that need none run beside them on the CPU; without, one part runs after another. What a part prints is in
runs/reproduce/NAME.out and NAME.err.

The end writes results/results.json (each finished run: command, seed, machine, versions, seconds, metrics),
the tables made from it (results/tables.md, and in REPORT.md and README.md between `<!-- table: NAME -->` and
`<!-- end -->`) and the figures. Runs that results.json has from another machine stay in it if their command
is the same. Results that were made with another --epochs or --precision are not touched: the tables go to
runs/reproduce then. --quick writes into runs/ alone: runs/quick-NAME and runs/quick.
"""

import re
import sys
from pathlib import Path

from common import data, inception, jobs, pictures, ranks, runs, tables
from common.jobs import Part, Queue, say
from common.script import MAY_DIFFER
from common.tables import MISSING

IMAGENET = runs.ROOT / "imagenet_features" / "imagenet.pt2"  # benchmarks/imagenet_features.py makes it
RULER_MINUTES = {"fd_features": 4, "fd_imagenet": 20, "fid": 60}
QUICK_IMAGES = 800
PAGES = (Path("REPORT.md"), Path("README.md"), Path("prior_proofs/README.md"))
PUBLIC = Path("results")  # what the pages show


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    add, count = parser.add_argument, runs.number(int, 1)
    add("--quick", action="store_true", help="a few hundred built-in images; the numbers mean nothing")
    add("--only", action="append", metavar="NAME", help="only parts whose names begin so; repeatable")
    add("--epochs", type=count, help="of each VAE and VAE-GAN; default: 50, --quick 1")
    add("--seeds", type=count, help="of each VAE and VAE-GAN; default: 3, --quick 1")
    add("--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to; caches go there too")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of all trainings")
    add("--device", default="auto", help="auto (each cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (1 if args.quick else 50)
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.prefix = "quick-" if args.quick else ""  # of the folders in runs/
    args.work = runs.ROOT / ("quick" if args.quick else "reproduce")  # what the parts print and how long they took
    return args


def experiments(args, rulers):
    """Every experiment as a person would type it -> {name: Part}, in the order in which they run: what a part needs
    stands before it. rulers: of `find_rulers`."""
    parts, quick, prefix = {}, args.quick, args.prefix
    small = f"--data shapes --limit {QUICK_IMAGES} --holdout 200" if quick else ""
    precision = f"--precision {args.precision}"
    here = ("--data-dir", args.data_dir)
    if args.device != "auto":
        here = (*here, "--device", args.device)

    def add(name, minutes, script, flags, run=None, **options):
        """run: its name in runs/, where that is not the part's."""
        folder = prefix + (run or name)
        words = f"python {script} --name {folder} {flags}".split()
        parts[name] = Part(name, " ".join(words), folder, 1 if quick else minutes, **options)

    def measure(model, script, needs, *beside):
        """The distances of a model's images."""
        minutes = sum(RULER_MINUTES[ruler] for ruler in rulers)
        where = (*here, "--features", *rulers.values(), *beside)
        flags = f"--eval-only --fid {200 if quick else 10_000}"
        add(f"measure_{model}", minutes, script, flags, run=model, where=where, needs=needs, rulers=rulers)

    def probe(model, needs, flags):
        """A linear classifier on a model's codes; the checkpoint has the other flags of the data."""
        limit = f"--limit {QUICK_IMAGES}" if quick else ""
        script = f"probe.py {runs.ROOT}/{prefix}{model}"
        add(f"probe_{model}", 6, script, f"{limit} {flags}", where=here, needs=needs)

    # question 1; of a short run most is its exact measurement
    short = "--iterations 200 --plot-every 200" if quick else ""
    for kind, spec in tables.WGAN_GP.items():
        for seed in range(spec.seeds):
            if not quick or (kind, seed) == ("wgan_gp", 0):
                flags = f"--seed {seed} {spec.flags} {short}"
                add(f"{kind}_seed_{seed}", spec.minutes, spec.script, flags, where=("--device", "cpu"), cpu=True)

    # question 4
    few = "--floors 0.5 --knots 16" if quick else ""
    for case in ("gaussian", "non_gaussian"):
        add(f"prior_{case}", 1.5, f"prior_proofs/{case}_case.py", few, cpu=True)
    add("prior_counterexample", 0.3, "prior_proofs/counterexample_2d.py", "", cpu=True)

    # networks trained with labels: the classifier, whose features are a ruler, and the encoder with labels
    flags = f"{small} {precision} --seed 0 {'--epochs 1' if quick else ''}"
    holdout = "" if quick else "--holdout 5000"  # the ruler has not seen the images that settings were chosen on
    add("classifier", 16, "classifier.py", f"{flags} {holdout}", where=here)
    for dims in (128, 64):
        add(f"supervised_{dims}", 12, "probe.py", f"--supervised --latent-dim {dims} {flags}", where=here)
    probe("supervised_128", ("supervised_128",), "")

    # questions 2 and 3
    for seed in range(args.seeds):
        for kind, spec in tables.MODELS.items():
            model, vae = f"{kind}_seed_{seed}", f"{tables.vae_of(kind)}_seed_{seed}"
            flags = f"{spec.flags} --seed {seed} --epochs {args.epochs} {precision} {small} --fid off"
            add(model, spec.minutes * args.epochs, spec.script, flags, where=here)
            picture = () if vae == model else ("--compare", f"{runs.ROOT}/{prefix}{vae}")
            measure(model, spec.script, (model, "classifier", vae), *picture)
            needs, flags = (model,), f"--seed {seed} --latent sample --layer"
            if spec.baseline:
                other = f"{spec.baseline}_seed_{seed}"
                needs, flags = (model, other), f"{flags} --against {runs.ROOT}/{prefix}{other}"
            probe(model, needs, flags)

    # what training buys: copies of a model's folder as it was at epoch N
    for kind, spec in tables.MODELS.items():
        trained = trains(parts[f"{kind}_seed_0"].command)
        for copy in sorted(runs.ROOT.glob(f"{prefix}{kind}_seed_0-epoch*")):
            made = runs.read_json(copy / "args.json").get("command", "")
            if trains(made) == trained and re.search(r"-epoch\d+$", copy.name):  # and not one moved aside
                model = copy.name.removeprefix(prefix)
                measure(model, spec.script, ("classifier",))
                probe(model, (f"measure_{model}",), "--seed 0")
    return parts


def trains(command):
    """{flag: its value} of a command, less its name and what may change when a training goes on: what is trained."""
    free = {"--name", *map(runs.spelled, MAY_DIFFER)}
    return {flag: value for flag, value in jobs.flags(command).items() if flag not in free}


def programs(args):
    """{ruler: its file} of the rulers that are programs of torch.export, also of those that are still to be made."""
    return {"fd_features": runs.ROOT / f"{args.prefix}classifier/features.pt2", "fd_imagenet": IMAGENET}


def find_rulers(args):
    """{ruler: what --features calls it} of those that can be had; Inception's weights may be downloaded here."""
    rulers = {"fd_features": str(programs(args)["fd_features"])}
    if args.quick:
        return rulers
    if IMAGENET.exists():
        rulers["fd_imagenet"] = str(IMAGENET)
    else:
        say(f"distances in ImageNet features will be {MISSING}: benchmarks/imagenet_features.py makes {IMAGENET}")
    try:
        inception.check_official(inception.find_weights())
        rulers["fid"] = "inception"
    except runs.UserError as error:
        say(f"Inception FID will be {MISSING}: {error}")
    return rulers


# --- results ------------------------------------------------------------------------------------------------------


def finished(parts):
    """{name: part} of those that are finished, as are all that they need."""
    done = {}
    for name, part in parts.items():
        if part.finished(parts) and done.keys() >= set(part.needs):
            done[name] = part
    return done


def measured(part, rulers):
    """What a part's metrics.json holds, less the distances by a program that was made anew since.

    rulers: {ruler: its program}
    """
    file = part / "metrics.json"
    metrics = runs.read_json(file)
    for ruler, program in rulers.items():
        if program.exists() and program.stat().st_mtime > file.stat().st_mtime:
            metrics = {key: value for key, value in metrics.items() if not key.startswith(f"{ruler}_")}
    return metrics


def collect(parts, done, rulers, notes, settings, old):
    """-> results.json's content: {"settings", "runs": {name: command, seed, epochs, machine, versions, seconds,
    metrics}}.

    done: those of `parts` that are finished; rulers: as in `measured`; notes: folder of how long they took; old: the
    results.json that is there, whose runs stay if settings and command are the same.
    """
    found = dict(old.get("runs", {})) if old.get("settings") == settings else {}
    other = {name for name, run in found.items() if name in parts and run["command"] != parts[name].command}
    for name in list(found):
        of = re.sub(r"^probe_|-epoch\d+$", "", name)  # the run that a probe or a copy is of
        if name in other or of in other:
            del found[name]
    for name, part in done.items():
        run = name.removeprefix("measure_")
        if run != name and run in parts:
            continue  # its distances stand in its model's metrics.json
        copy = re.search(r"-epoch(\d+)$", run)
        made, metrics = runs.read_json(part / "args.json"), measured(part, rulers)
        epochs = int(copy[1]) if copy else made.get("epochs")
        found[run] = {
            "command": part.command,
            "seed": made.get("seed"),
            "epochs": epochs if (part / "checkpoint.pt").exists() else None,  # of a training
            "machine": made.get("machine"),
            "versions": {key: made.get(key) for key in ("python", "torch", "commit")},
            "seconds": metrics.get("seconds", runs.read_json(notes / f"{name}.json").get("seconds")),
            "metrics": metrics,
        }
    return {"settings": settings, "runs": {name: found[name] for name in [*parts, *found] if name in found}}


def write_results(parts, args):
    """results.json and tables.md, and where the pages show these results, pages and pictures. -> the tables."""
    settings = {"quick": args.quick, "epochs": args.epochs, "precision": args.precision}
    if args.quick:
        settings["images"] = QUICK_IMAGES
    shown = runs.read_json(PUBLIC / "results.json").get("settings", settings)
    here = PUBLIC if shown == settings and not args.quick else args.work
    done = finished(parts)
    old = runs.read_json(here / "results.json")
    results = collect(parts, done, programs(args), args.work, settings, old)
    gone = old.get("runs", {}).keys() - results["runs"].keys()
    if gone:
        say(f"dropped from {here}/results.json, for their commands are others now: {', '.join(sorted(gone))}")
    made = tables.tables(results)
    text = "\n\n".join(f"## {name}\n\n{content}" for name, content in made.items()) + "\n"
    runs.write_json(here / "results.json", results)
    runs.write_bytes(here / "tables.md", text.encode())
    if made["training"] != MISSING:
        pictures.plot_stages(*tables.stages(results["runs"]), here / "training.png")
    if here == PUBLIC:
        publish(made, done)
    elif not args.quick:
        say(
            f"{PUBLIC}, REPORT.md and README.md stay as they are, made with --epochs {shown['epochs']} --precision "
            f"{shown['precision']}: these tables are in {here}; to replace those, move {PUBLIC}/results.json away"
        )
    return text


def publish(made, done):
    """The tables into the pages, and those pictures of finished parts that the pages show into PUBLIC."""
    shown = set()
    for page in PAGES:
        text = page.read_text() if page.exists() else ""
        refreshed = tables.refresh(text, made)
        if refreshed != text:
            runs.write_bytes(page, refreshed.encode())
        shown |= set(re.findall(rf"{PUBLIC}/(\w+/[\w-]+\.(?:png|gif))", text))
    for part in done.values():
        for picture in runs.pictures_in(runs.ROOT / part.folder):
            if f"{part.folder}/{picture.name}" in shown:
                runs.write_bytes(PUBLIC / part.folder / picture.name, picture.read_bytes())


def main(argv=None):
    args = parse_args(argv)
    if ranks.launched():
        raise runs.UserError("each part is a process of its own: start this script with python, not with torchrun")
    results = PUBLIC / "results.json"
    if results.exists() and not runs.read_json(results):
        raise runs.UserError(f"{results} cannot be read, and would be written anew: mend it, or move it away")
    runs.try_writing(args.work / "results.json")
    runs.lock(args.work, instead="")
    only = tuple(args.only or [""])
    measures = any("measure_".startswith(prefix) or prefix.startswith("measure_") for prefix in only)
    parts = experiments(args, find_rulers(args) if measures else {})
    for prefix in only:
        if not any(name.startswith(prefix) for name in parts):
            raise runs.UserError(f"--only {prefix} fits no part: the parts are {', '.join(parts)}")
    chosen = {name for name in parts if name.startswith(only)}
    missing = parts.keys() - finished(parts).keys()
    todo = chosen & missing
    if args.quick:
        rest = "; --quick: small trainings on built-in images, whose numbers mean nothing"
    else:
        rest = f", about {sum(parts[name].minutes for name in todo) / 60:.1f} h on two CPU cores"
    say(f"{len(chosen)} parts, {len(todo)} to run{rest}")
    if not args.quick and len(jobs.slots(args.device)) > 1 and any(not parts[name].cpu for name in todo):
        data.load("cifar10", args.data_dir, "test")  # once: parts side by side would each download and unpack it
    try:
        failed = Queue(parts, todo, missing - todo, args.device, args.work).run()
    finally:
        text = write_results(parts, args)
    print(text)
    if args.quick:
        print("--quick: these numbers mean nothing; that every part ran is what it shows")
    for name, why in failed.items():
        say(f"failed: {name}: {why}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    runs.cli(main)
