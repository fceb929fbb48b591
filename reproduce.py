"""Every experiment of the assignment, each as a process of its own, and the tables made from their numbers.

    python reproduce.py                              # all of it on CIFAR-10; a finished part is not run again
    python reproduce.py --quick                      # all of it small, on built-in data: shows that everything runs
    python reproduce.py --only wgan_gp --only probe  # parts whose names begin so
    python reproduce.py --only measure               # fill in distances, once their networks can be had
    # with --only, give the --epochs, --seeds and --precision that the trainings had
    cp -a runs/vae_128_seed_0 runs/vae_128_seed_0-epoch5             # during a training: measured then, for a table

After Ctrl-C or a crash the same command goes on. A part is finished when runs/NAME/metrics.json is there, the command
in its args.json has the same flags, and nothing that it needs is newer. A VAE or VAE-GAN that had fewer --epochs goes
on from its checkpoint, and its earlier numbers stay in metrics-epochN.json. Its rate is constant, so this is the longer
training but for the start: the rate's rise over the first 2 % of the steps was over 2 % of fewer steps. With GPUs each
has a part of its own, and those that need none run beside them on the CPU; without, one part runs after another. What a
part prints is in runs/reproduce/NAME.out and NAME.err.

The end writes results/results.json (each finished run: command, seed, machine, versions, seconds, metrics), the tables
made from it (results/tables.md, and in REPORT.md and README.md between `<!-- table: NAME -->` and `<!-- end -->`) and
the figures. Runs that results.json has from another machine stay in it if their command is the same. Results that were
made with another --epochs or --precision are not touched: the tables go to runs/reproduce then. --quick writes into
runs/ alone: runs/quick-NAME and runs/quick.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common import inception, pictures, runs
from common.runs import read_json
from common.tables import MISSING, MODELS, by_ruler, collect, publish, stage_columns, stages, tables

HERE = Path(__file__).resolve().parent
IMAGENET = runs.ROOT / "imagenet_features" / "imagenet.pt2"  # benchmarks/imagenet_features.py makes it
RULER_MINUTES = {"fd_features": 4, "fd_imagenet": 20, "fid": 60}
QUICK_IMAGES = 800
WAIT = 0.2  # seconds between looks at what runs


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
    if part.rulers is not None:
        return all(f"{ruler}_generation_expost" in by_ruler(metrics) for ruler in part.rulers)
    return contradictions(part, args) == (set(), set())


def resumable(part, args):
    """Whether its training can go on from a checkpoint: of the same flags, or the same but for fewer --epochs."""
    differ = contradictions(part, args)
    if not part.resumes or differ is None or not (runs.ROOT / part.folder / "checkpoint.pt").exists():
        return False
    epochs = [re.fullmatch(r"--epochs (\d+)", " ".join(flags)) for flags in differ]
    return differ == (set(), set()) or (all(epochs) and int(epochs[0][1]) < int(epochs[1][1]))


def unfinished(parts, args):
    """The names of the parts to run: those not finished, and those that need one of them."""
    names = set()
    for name, part in parts.items():
        if names & set(part.needs) or not finished(part, parts, args):
            names.add(name)
    return names


# --- running ------------------------------------------------------------------------------------------------------


class Job:
    """A part's process. Ctrl-C in a terminal does not reach it: it gets one SIGINT from `Queue.halt`."""

    def __init__(self, part, gpu, args):
        self.part, self.began, self.resume = part, time.perf_counter(), resumable(part, args)
        self.out, self.err, self.note = (work(args) / f"{part.name}.{end}" for end in ("out", "err", "json"))
        words = [sys.executable, str(HERE / part.script), *part.command.split()[2:], *part.where]
        if self.resume:
            words.append("--resume")
        environment = os.environ | {"TQDM_MININTERVAL": "1"}
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
            self.process = subprocess.Popen(words, env=environment, start_new_session=True, **streams)

    def seconds(self):
        return time.perf_counter() - self.began

    def last(self):
        """What stands last on its stderr: a progress bar, or why it failed."""
        lines = self.err.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def conclude(self, parts, args):
        """Note down what it took. -> None, or why it failed."""
        part, code = self.part, self.process.returncode
        if part.prints and code == 0:
            with contextlib.suppress(ValueError):  # without it the part is not finished, which is said below
                printed = json.loads("{" + self.out.read_text().rpartition("\n{\n")[2])
                runs.write_json(runs.ROOT / part.folder / "metrics.json", printed)
        before = read_json(self.note).get("seconds", 0) if self.resume else 0
        note = {"seconds": before + self.seconds(), "versions": runs.versions()}
        runs.write_json(self.note, note | ({"command": part.command} if code == 0 else {}))
        if code:
            return self.last() or f"exit status {code}"
        if not finished(part, parts, args):
            return f"it ended well but left no such {'distances' if part.rulers else 'metrics.json'}"


def slots(device):
    """Where parts run at the same time: the GPUs, and '' for the CPU, or whatever --device says."""
    n = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))).split(",")[:n]
    return [*gpus, ""]


class Queue:
    """The parts named in `todo`: which wait, run, have failed. lost: {name: why} of others that are not there."""

    def __init__(self, todo, parts, args, lost):
        self.todo, self.parts, self.args, self.places = todo, parts, args, slots(args.device)
        self.waiting, self.jobs, self.failed = [name for name in parts if name in todo], {}, dict(lost)
        self.stops = 0  # Ctrl-C and SIGTERM so far

    def run(self):
        """Run them all. -> {name: why} of the failed ones. Raises Interrupted."""

        def stop(which, frame):
            self.stops += 1

        handlers = {which: signal.signal(which, stop) for which in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (self.waiting or self.jobs) and not self.stops:
                self.collect()
                self.begin()
                if sys.stderr.isatty() and self.jobs:
                    job = next(iter(self.jobs.values()))
                    line = f"{self.counted()}{self.left()}  {job.part.name} {job.last()}"
                    print(f"\r{line[: os.get_terminal_size(2).columns - 1]}\033[K", end="", file=sys.stderr, flush=True)
                time.sleep(WAIT)
            if self.stops:
                self.halt()
        finally:
            for which, handler in handlers.items():
                signal.signal(which, handler)
        return self.failed

    def collect(self):
        """What has ended."""
        for gpu, job in list(self.jobs.items()):
            if job.process.poll() is not None:
                del self.jobs[gpu]
                why = job.conclude(self.parts, self.args)
                if why:
                    self.failed[job.part.name] = why
                say(f"{self.counted()} {job.part.name}: {why or f'{job.seconds():.0f} s'}{self.left()}")

    def begin(self):
        """Each part whose place is free and that waits for no other; those that need a failed one never."""
        for name in list(self.waiting):
            part, running = self.parts[name], [job.part for job in self.jobs.values()]
            missing = next((need for need in part.needs if need in self.failed), None)
            if missing:
                state = "failed" if missing in self.todo else "is not finished"
                self.failed[name] = f"not run: it needs {missing}, which {state}"
                self.waiting.remove(name)
                continue
            free = [gpu for gpu in self.places if gpu not in self.jobs]
            if len(self.places) > 1:
                free = [gpu for gpu in free if part.cpu == (gpu == "")]
            busy = any(other.folder == part.folder for other in running)  # both would write its metrics.json
            if free and not busy and not set(part.needs) & {*self.waiting, *(other.name for other in running)}:
                self.jobs[free[0]] = Job(part, free[0], self.args)
                self.waiting.remove(name)

    def counted(self):
        return f"[{len(self.todo) - len(self.waiting) - len(self.jobs)}/{len(self.todo)}]"

    def left(self):
        """The time left in words, by what the parts that ran took, and were planned to take."""
        notes = {name: read_json(work(self.args) / f"{name}.json") for name in self.parts}
        took = {name: note["seconds"] for name, note in notes.items() if "command" in note}
        if not took or not (self.waiting or self.jobs):
            return ""

        def seconds(part):
            known = [name for name in took if self.parts[name].script == part.script] or list(took)
            planned = sum(self.parts[name].minutes for name in known)
            return part.minutes * sum(took[name] for name in known) / planned

        rest = sum(seconds(self.parts[name]) for name in self.waiting)
        rest += sum(max(0, seconds(job.part) - job.seconds()) for job in self.jobs.values())
        return f", about {rest / 60 / max(1, len(self.places) - 1):.1f} min left"

    def halt(self):
        """Ask the processes to save themselves and wait; a second Ctrl-C ends them. Raises Interrupted."""
        say("stopping: what runs saves itself first; Ctrl-C again ends it at once")
        for job in self.jobs.values():
            job.process.send_signal(signal.SIGINT)
        for job in self.jobs.values():
            while job.process.poll() is None:
                if self.stops > 1:
                    job.process.kill()
                time.sleep(WAIT)
            job.conclude(self.parts, self.args)
        raise runs.Interrupted("stopped; the same command goes on from here")


def say(text):
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


# --- results ------------------------------------------------------------------------------------------------------


def write_results(parts, args):
    """results.json and tables.md, and where the pages show these results, pages and figures. -> the tables."""
    settings = {"quick": args.quick, "epochs": args.epochs, "precision": args.precision}
    if args.quick:
        settings["images"] = QUICK_IMAGES
    public = Path("results")
    shown = read_json(public / "results.json").get("settings", settings)  # what the pages show
    here = public if shown == settings and not args.quick else work(args)
    done = {name: part for name, part in parts.items() if name not in unfinished(parts, args)}
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
    work(args).mkdir(parents=True, exist_ok=True)
    measures = not args.only or any("measure_".startswith(name) or name.startswith("measure_") for name in args.only)
    parts = table(args, find_rulers(args) if measures else {})
    names, open_parts = chosen(parts, args.only), unfinished(parts, args)
    todo = names & open_parts
    small = "; --quick: small trainings on built-in images, whose numbers mean nothing" if args.quick else ""
    say(f"{len(names)} parts, {len(todo)} to run{small}")
    try:
        failed = Queue(todo, parts, args, dict.fromkeys(open_parts - todo, "not finished")).run()
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
