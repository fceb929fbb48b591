"""Every experiment of the assignment, each as a process of its own, and the tables made from their numbers.

    python reproduce.py                              # all of it on CIFAR-10; a finished part is not run again
    python reproduce.py --quick                      # all of it small, on built-in data: shows that everything runs
    python reproduce.py --only wgan_gp --only probe  # parts whose names begin so
    python reproduce.py --only measure               # fill in distances, once their networks can be had
    # with --only, give the --epochs, --seeds and --precision that the trainings had
    cp -a runs/vae_128_seed_0 runs/vae_128_seed_0-epoch5     # after its epoch 5: a row of what training buys

After Ctrl-C or a crash the same command goes on. A part is finished when runs/NAME/metrics.json is there, the
command in its args.json has the same flags, and nothing that it needs is newer. A VAE or VAE-GAN that had
fewer --epochs goes on from its checkpoint, and its earlier numbers stay in metrics-epochN.json. Its rate is
constant, so this is the longer training but for the start: the rate's rise over the first 2 % of the steps
was over 2 % of fewer steps. With GPUs each has a part of its own, and those that need none run beside them on
the CPU; without, one part runs after another. What a part prints is in runs/reproduce/NAME.out and NAME.err.

The end writes results/results.json (each finished run: command, seed, machine, versions, seconds, metrics),
the tables made from it (results/tables.md, and in REPORT.md and README.md between `<!-- table: NAME -->` and
`<!-- end -->`) and the figures. Runs that results.json has from another machine stay in it if their command
is the same. Results that were made with another --epochs or --precision are not touched: the tables go to
runs/reproduce then. --quick writes into runs/ alone: runs/quick-NAME and runs/quick.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common import inception, pictures, runs
from common.jobs import Queue, say
from common.runs import read_json
from common.tables import MISSING, MODELS, by_ruler, collect, publish, stage_columns, stages, tables

IMAGENET = runs.ROOT / "imagenet_features" / "imagenet.pt2"  # benchmarks/imagenet_features.py makes it
RULER_MINUTES = {"fd_features": 4, "fd_imagenet": 20, "fid": 60}
QUICK_IMAGES = 800


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
    return args


# --- the parts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """`command`, as a person types it, leaves runs/FOLDER/metrics.json. minutes: on two CPU cores, roughly."""

    name: str
    command: str
    folder: str
    minutes: float
    where: tuple = ()  # more words, which differ between machines
    needs: tuple = ()  # names of parts
    rulers: dict | None = None  # find_rulers', of a part that adds distances to a model's metrics.json
    prints: bool = False  # its numbers, instead of leaving them in a file
    resumes: bool = False
    cpu: bool = False  # gains nothing from a GPU

    @property
    def script(self):
        return self.command.split()[1]


def table(args, rulers):
    """-> {name: Part}, in the order in which they run; what a part needs stands before it."""
    parts = [*wgan_gp_parts(args), *proof_parts(args), *label_parts(args)]
    for seed in range(args.seeds):
        parts += [*training_parts(args, seed), *measuring_parts(args, seed, rulers), *probe_parts(args, seed)]
    parts += earlier_parts(args, rulers)
    return {part.name: part for part in parts}


def folder(name, args):
    return f"quick-{name}" if args.quick else name


def make(args, name, script, minutes, *flags, before="", run=None, **options):
    """The part `name`, `python SCRIPT BEFORE --name RUN FLAGS`; its run is named as itself unless given."""
    run = folder(run or name, args)
    command = " ".join(word for word in ("python", script, before, "--name", run, *flags) if word)
    scale = 0.04 if args.quick else 1
    return Part(name, command, run, 0.3 + scale * minutes, **options)  # 0.3: to start, and to measure


def place(args):
    device = ("--device", args.device) if args.device != "auto" else ()
    return ("--data-dir", args.data_dir, *device)


def data(args):
    return f"--data shapes --limit {QUICK_IMAGES} --holdout 200" if args.quick else ""


def wgan_gp_parts(args):
    variants = {  # name: seeds, flags
        "": (5, ""),
        "latent_2_": (3, "--latent-dim 2"),
        "latent_1_": (3, "--latent-dim 1"),
        "clip_": (3, "--loss clip"),
        "two_sided_": (1, "--no-one-sided"),
        "no_drift_": (1, "--drift 0"),
        "sigma_": (3, "--sigma 0.3162"),  # the other reading of the assignment's "variance 0.10"
    }
    if args.quick:  # most of a short run is its exact measurement
        variants = {"": (1, "--iterations 200 --plot-every 200")}
    options = {"where": ("--device", "cpu"), "resumes": True, "cpu": True}
    for variant, (seeds, flags) in variants.items():
        for seed in range(seeds):
            yield make(args, f"wgan_gp_{variant}seed_{seed}", "wgan_gp.py", 3, f"--seed {seed}", flags, **options)


def proof_parts(args):
    flags = "--json --floors 0.5 --knots 16" if args.quick else "--json"
    yield make(args, "prior_gaussian", "prior_proofs/gaussian_case.py", 1, flags, cpu=True)
    yield make(args, "prior_non_gaussian", "prior_proofs/non_gaussian_case.py", 1.5, flags, cpu=True)
    name, command = "prior_counterexample", "python prior_proofs/counterexample_2d.py --json"
    yield Part(name, command, folder(name, args), 0.4, prints=True, cpu=True)


def label_parts(args):
    """The networks trained with labels: the classifier, whose features are a ruler, and the encoder with labels."""
    flags = (data(args), f"--precision {args.precision} --seed 0", "--epochs 1" if args.quick else "")
    options = {"where": place(args), "resumes": True}
    yield make(args, "classifier", "classifier.py", 16, *flags, **options)
    for dims in (128, 64):
        name, own = f"supervised_{dims}", f"--supervised --latent-dim {dims}"
        yield make(args, name, "probe.py", 12, own, *flags, **options)
    yield probe_part(args, "supervised_128", ("supervised_128",))


def training_parts(args, seed):
    options = {"where": place(args), "resumes": True}
    for model, spec in MODELS.items():
        flags = f"{spec.flags} --seed {seed} --epochs {args.epochs} --precision {args.precision}"
        minutes = spec.minutes * args.epochs
        yield make(args, f"{model}_seed_{seed}", spec.script, minutes, flags, data(args), "--fid off", **options)


def measuring_parts(args, seed, rulers):
    """Of each model its distances by all rulers; of a VAE-GAN also a picture beside the VAE's."""
    for model, spec in MODELS.items():
        run, beside = f"{model}_seed_{seed}", f"{model.replace('_gan', '')}_seed_{seed}"
        needs, where = (run, "classifier"), ()
        if beside != run:
            needs, where = (*needs, beside), ("--compare", str(runs.ROOT / folder(beside, args)))
        yield measuring_part(args, run, spec, rulers, needs, *where)


def probe_parts(args, seed):
    """Of each model's codes, and compared with those of its baseline."""
    for model, spec in MODELS.items():
        run, other = f"{model}_seed_{seed}", f"{spec.baseline}_seed_{seed}"
        needs, against = (run,), ""
        if spec.baseline:
            needs, against = (run, other), f"--against {runs.ROOT / folder(other, args)}"
        yield probe_part(args, run, needs, f"--seed {seed} --latent sample --layer", against)


def earlier_parts(args, rulers):
    """What training buys: distances and probe of each copy of a model's folder as it was at epoch N, NAME-epochN."""
    for model, spec in MODELS.items():
        for copy in sorted(runs.ROOT.glob(f"{folder(model, args)}_seed_0-epoch*")):
            if not re.search(r"-epoch\d+$", copy.name):  # a probe of one, or one moved aside
                continue
            run = f"{model}_seed_0-{copy.name.rpartition('-')[2]}"
            yield measuring_part(args, run, spec, rulers, ("classifier",))
            yield probe_part(args, run, (f"measure_{run}",), "--seed 0")


def measuring_part(args, run, spec, rulers, needs, *where):
    where = (*place(args), "--features", *rulers.values(), *where)
    minutes = sum(RULER_MINUTES[ruler] for ruler in rulers)
    flags = f"--eval-only --fid {200 if args.quick else 10_000}"
    options = {"run": run, "where": where, "needs": needs, "rulers": rulers}
    return make(args, f"measure_{run}", spec.script, minutes, flags, **options)


def probe_part(args, run, needs, *flags):
    """A linear classifier on the codes of `run`."""
    limit = f"--limit {QUICK_IMAGES}" if args.quick else ""  # the checkpoint has the other flags of the data
    options = {"where": place(args), "needs": needs, "before": str(runs.ROOT / folder(run, args))}
    return make(args, f"probe_{run}", "probe.py", 6, limit, *flags, **options)


def find_rulers(args):
    """{ruler: what --features calls it} of those that can be had; Inception's weights may be downloaded here."""
    rulers = {"fd_features": str(runs.ROOT / folder("classifier", args) / "features.pt2")}
    if args.quick:
        return rulers
    if IMAGENET.exists():
        rulers["fd_imagenet"] = str(IMAGENET)
    else:
        say(f"distances in ImageNet features will be {MISSING}: benchmarks/imagenet_features.py makes {IMAGENET}")
    try:
        inception.find_weights()
        rulers["fid"] = "inception"
    except runs.UserError as error:
        say(f"Inception FID will be {MISSING}: {error}")
    return rulers


def chosen(parts, only):
    """The names of `parts` that begin with one of `only`; all of them for None. Raises UserError."""
    for prefix in only or ():
        if not any(name.startswith(prefix) for name in parts):
            raise runs.UserError(f"--only {prefix} fits no part: the parts are {', '.join(parts)}")
    return {name for name in parts if not only or name.startswith(tuple(only))}


# --- what is finished ---------------------------------------------------------------------------------------------


def work(args):
    return runs.ROOT / ("quick" if args.quick else "reproduce")


def as_given(flag, made):
    """A flag and its value, e.g. "--seed 0", as args.json of an earlier commit has it, which names no command."""
    name, _, value = flag.partition(" ")
    key, value = name[2:].replace("-", "_"), value or "True"
    if key.startswith("no_") and key not in made:  # --no-KEY
        key, value = key[3:], "False"
    was = str(made.get(key))
    return flag if was in (value, f"{value}.0") else f"{name} {was}"  # 300 on the command line is 300.0 there


def contradictions(part, args):
    """How the run in the part's folder differs from the part -> its flags, the part's flags; None without a run.

    Each is a set of texts as "--seed 0"; one without a flag is the script with its arguments.
    """
    wanted = set(re.split(" (?=--)", part.command))
    made = read_json(runs.ROOT / part.folder / "args.json") or read_json(work(args) / f"{part.name}.json")
    if "command" in made:
        was = set(re.split(" (?=--)", made["command"]))
    elif "script" in made:
        was = {as_given(flag, made) if flag.startswith("--") else f"python {made['script']}" for flag in wanted}
    else:
        return None
    return was - wanted, wanted - was


def finished(part, parts, args):
    """Whether its metrics.json is there, made with its flags and later than what it needs."""
    file = runs.ROOT / part.folder / "metrics.json"
    metrics = read_json(file)
    needed = [runs.ROOT / parts[name].folder / "checkpoint.pt" for name in part.needs]
    needed += [file.with_name("args.json"), file.with_name("checkpoint.pt"), *map(Path, (part.rulers or {}).values())]
    if not metrics or any(p.exists() and p.stat().st_mtime > file.stat().st_mtime for p in needed):
        return False
    if part.script == "wgan_gp.py" and "sigma" not in metrics:  # of an earlier commit, whose defaults were others
        return False
    if part.rulers is not None:
        return all(f"{ruler}_generation_expost" in by_ruler(metrics) for ruler in part.rulers)
    return contradictions(part, args) == (set(), set())


def resumable(part, args):
    """Whether its training can go on from a checkpoint: of the same flags, or the same but for fewer --epochs."""
    differ = contradictions(part, args)
    if not part.resumes or differ is None or not (runs.ROOT / part.folder / "checkpoint.pt").exists():
        return False
    if part.script == "wgan_gp.py" and "command" not in read_json(runs.ROOT / part.folder / "args.json"):
        return False  # of an earlier commit, whose critic was another
    epochs = [re.fullmatch(r"--epochs (\d+)", " ".join(flags)) for flags in differ]
    return differ == (set(), set()) or (all(epochs) and int(epochs[0][1]) < int(epochs[1][1]))


def unfinished(parts, args):
    """The names of the parts to run: those not finished, and those that need one of them."""
    names = set()
    for name, part in parts.items():
        if names & set(part.needs) or not finished(part, parts, args):
            names.add(name)
    return names


# --- results ------------------------------------------------------------------------------------------------------


def write_results(parts, args):
    """results.json and tables.md, and where the pages show these results, pages and figures. -> the tables."""
    settings = {"quick": args.quick, "epochs": args.epochs, "precision": args.precision}
    if args.quick:
        settings["images"] = QUICK_IMAGES
    public = Path("results")
    shown = read_json(public / "results.json").get("settings", settings)  # what the pages show
    here = public if shown == settings and not args.quick else work(args)
    open_parts = unfinished(parts, args)
    done = {name: part for name, part in parts.items() if name not in open_parts}
    results = collect(parts, done, work(args), settings, read_json(here / "results.json"))
    made = tables(results)
    runs.write_json(here / "results.json", results)
    text = "\n\n".join(f"## {name}\n\n{content}" for name, content in made.items()) + "\n"
    runs.write_bytes(here / "tables.md", text.encode())
    if "training" in made:
        models = stages(results["runs"])
        pictures.plot_stages(models, stage_columns(models), here / "training.png")
    if here == public:
        publish(made, done, public)
    elif not args.quick:
        say(
            f"{public}, REPORT.md and README.md stay as they are, made with --epochs {shown['epochs']} --precision "
            f"{shown['precision']}: these tables are in {here}; to replace those, move {public}/results.json away"
        )
    return text


def main(argv=None):
    args = parse_args(argv)
    if "RANK" in os.environ:
        raise runs.UserError("each part is a process of its own: start this script with python, not with torchrun")
    runs.try_writing(work(args) / "results.json")
    runs.lock(work(args), instead="")
    measures = not args.only or any("measure_".startswith(name) or name.startswith("measure_") for name in args.only)
    parts = table(args, find_rulers(args) if measures else {})
    names, open_parts = chosen(parts, args.only), unfinished(parts, args)
    todo = names & open_parts
    small = "; --quick: small trainings on built-in images, whose numbers mean nothing" if args.quick else ""
    say(f"{len(names)} parts, {len(todo)} to run{small}")
    queue = Queue(
        todo,
        parts,
        args.device,
        work(args),
        finished=lambda part: finished(part, parts, args),
        resumable=lambda part: resumable(part, args),
        lost=dict.fromkeys(open_parts - todo, "not finished"),
    )
    try:
        failed = queue.run()
    finally:
        text = write_results(parts, args)
    print(text)
    if args.quick:
        print("--quick: these numbers mean nothing; that every part ran is what it shows")
    failed = {name: why for name, why in failed.items() if name in todo}
    for name, why in failed.items():
        say(f"failed: {name}: {why}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    runs.cli(main)
