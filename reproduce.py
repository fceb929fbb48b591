"""Every experiment of the assignment, each as a process of its own, and the tables made from their numbers.

    python reproduce.py                              # all of it on CIFAR-10; a finished part is not run again
    python reproduce.py --quick                      # all of it small, on built-in data: shows that everything runs
    python reproduce.py --only wgan_gp --only probe  # parts whose names begin so
    python reproduce.py --only fid                   # fill in FIDs from the checkpoints, once the weights can be had
    # with --only, give the --epochs, --seeds and --precision that the trainings had

After Ctrl-C or a crash the same command goes on. A part is finished when runs/NAME/metrics.json is there, made with the
same flags and not before what it needs. With GPUs each has a part of its own, and those that need none run beside them
on the CPU; without, one part runs after another. What a part prints is in runs/reproduce/NAME.out and NAME.err.

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

import extractors
import runs
from tables import MISSING, collect, of_classifier, read, refresh, tables

HERE = Path(__file__).resolve().parent
FREE = {"name", "device", "data_dir", "fid", "features", "eval_only", "compare", "json"}  # no part of a run's identity
WEIGHT = "300"  # of the contrastive term
# name: script, latent dimensions, more flags, whom the probe compares it with, minutes an epoch on two CPU cores
MODELS = {
    "vae_128": ("vae.py", 128, [], None, 2),
    "vae_64": ("vae.py", 64, [], None, 2),
    "vae_contrastive": ("vae.py", 128, ["--contrastive", WEIGHT], "vae_128", 3.5),
    "vae_gan_128": ("vae_gan.py", 128, [], "vae_128", 7),
    "vae_gan_64": ("vae_gan.py", 64, [], "vae_64", 7),
    "vae_gan_contrastive": ("vae_gan.py", 128, ["--contrastive", WEIGHT], "vae_gan_128", 9),
}


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a few hundred built-in images; the numbers mean nothing")
    parser.add_argument("--only", action="append", metavar="NAME", help="only parts whose names begin so; repeatable")
    parser.add_argument("--epochs", type=runs.number(int, 1), help="of each VAE and VAE-GAN; default: 50, --quick 1")
    parser.add_argument("--seeds", type=runs.number(int, 1), help="of each VAE and VAE-GAN; default: 3, --quick 1")
    parser.add_argument(
        "--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to; caches go there too"
    )
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of all trainings")
    parser.add_argument("--device", default="auto", help="auto (each cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    args.epochs, args.seeds = args.epochs or (1 if args.quick else 50), args.seeds or (1 if args.quick else 3)
    return args


# --- the parts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """`python SCRIPT WORDS` leaves runs/FOLDER/metrics.json. cost: minutes on two CPU cores, roughly."""

    name: str
    script: str
    words: tuple
    folder: str
    cost: float
    needs: tuple = ()  # names of parts
    kind: str = "run"  # "fd" or "fid": fills these distances into another part's metrics.json; "stdout": prints it
    resumes: bool = False
    cpu: bool = False  # gains nothing from a GPU

    @property
    def command(self):
        """As a person would type it, less what differs between machines."""
        words = " ".join(("python", self.script, *self.words))
        return re.sub(r" --(data-dir|device) \S+", "", words)

    @property
    def product(self):
        return runs.ROOT / self.folder / ("features.pt2" if self.script == "classifier.py" else "checkpoint.pt")


def table(args):
    """-> {name: Part}, in the order in which they run; what a part needs stands before it."""
    parts, quick = {}, args.quick
    scale = 0.04 if quick else 1  # of 50,000 images
    data = ["--data-dir", args.data_dir] + (["--device", args.device] if args.device != "auto" else [])
    small = ["--data", "shapes", "--limit", "800", "--holdout", "200"] if quick else []
    precision = ["--precision", args.precision]

    def folder(name):
        return f"quick-{name}" if quick else name

    def add(name, script, cost, *words, run=None, **options):
        named = ["--name", folder(run or name)] if options.get("kind") != "stdout" else []
        paths = [word for word in words[:1] if not word.startswith("--")]  # a checkpoint comes first
        words = (*paths, *named, *words[len(paths) :])
        parts[name] = Part(name, script, words, folder(run or name), cost + 0.3, **options)

    def wgan_gp(name, seed, *words):
        short = ["--iterations", "200", "--plot-every", "200"] if quick else []
        everything = ["--device", "cpu", "--seed", str(seed), *short, *words]
        add(f"wgan_gp_{name}seed_{seed}", "wgan_gp.py", 3 * scale, *everything, resumes=True, cpu=True)

    for seed in range(1 if quick else 5):
        wgan_gp("", seed)
    variants = {  # name: seeds, flags
        "latent_2_": (3, ["--latent-dim", "2"]),
        "latent_1_": (3, ["--latent-dim", "1"]),
        "clip_": (3, ["--loss", "clip"]),
        "two_sided_": (1, ["--no-one-sided"]),
        "no_drift_": (1, ["--drift", "0"]),
        "sigma_": (3, ["--sigma", "0.3162"]),  # the other reading of the assignment's "variance 0.10"
    }
    for name, (n, words) in variants.items():
        for seed in range(0 if quick else n):  # most of a short run would be its exact measurement
            wgan_gp(name, seed, *words)
    proof = ["--json", "--floors", "0.5", "--knots", "16"] if quick else ["--json"]
    add("prior_gaussian", "prior_proofs/gaussian_case.py", 1 * scale, *proof, cpu=True)
    add("prior_non_gaussian", "prior_proofs/non_gaussian_case.py", 1.5 * scale, *proof, cpu=True)
    add("prior_counterexample", "prior_proofs/counterexample_2d.py", 0.1, "--json", kind="stdout", cpu=True)

    short = ["--seed", "0", *(["--epochs", "1"] if quick else [])]
    add("classifier", "classifier.py", 16 * scale, *data, *small, *precision, *short, resumes=True)
    for dims in ("128", "64"):
        words = ["--supervised", "--latent-dim", dims, *data, *small, *precision, *short]
        add(f"supervised_{dims}", "probe.py", 12 * scale, *words)
    supervised = str(runs.ROOT / folder("supervised_128"))
    limit = small[2:4]  # of the training images; the rest is in the checkpoint
    add("probe_supervised_128", "probe.py", 3 * scale, supervised, *data, *limit, needs=("supervised_128",))

    for seed in range(args.seeds):
        for model, (script, dims, more, _, minutes) in MODELS.items():
            words = ["--latent-dim", str(dims), *more, "--seed", str(seed), "--epochs", str(args.epochs)]
            words += [*precision, *data, *small, "--fid", "off"]
            add(f"{model}_seed_{seed}", script, minutes * args.epochs * scale, *words, resumes=True)
        for model, (script, *_) in MODELS.items():
            name = f"{model}_seed_{seed}"
            n = ["--eval-only", "--fid", "200" if quick else "10000", *data]
            features = ["--features", str(runs.ROOT / folder("classifier") / "features.pt2")]
            partner = f"{model.replace('_gan', '')}_seed_{seed}"
            beside = ["--compare", str(runs.ROOT / folder(partner))] if partner != name else []
            needs = tuple(dict.fromkeys((name, "classifier", partner)))
            add(f"fd_{name}", script, 4 * scale, *n, *features, *beside, run=name, needs=needs, kind="fd")
            if not quick:
                add(f"fid_{name}", script, 60, *n, run=name, needs=(name,), kind="fid")
        for model, (*_, other, _) in MODELS.items():
            name, other = f"{model}_seed_{seed}", other and f"{other}_seed_{seed}"
            words = [str(runs.ROOT / folder(name)), *data, *limit, "--seed", str(seed), "--latent", "sample", "--layer"]
            words += ["--against", str(runs.ROOT / folder(other))] if other else []
            add(f"probe_{name}", "probe.py", 6 * scale, *words, needs=(name, other) if other else (name,))
    return parts


def chosen(parts, only):
    """The names of `parts` that begin with one of `only`; all of them for None. Raises UserError."""
    for prefix in only or ():
        if not any(name.startswith(prefix) for name in parts):
            raise runs.UserError(f"--only {prefix} fits no part: the parts are {', '.join(parts)}")
    return {name for name in parts if not only or name.startswith(tuple(only))}


# --- what is finished ---------------------------------------------------------------------------------------------


def work(args):
    return runs.ROOT / ("quick" if args.quick else "reproduce")


def plain(value):
    try:
        return float(str(value))  # 1000 on the command line is 1000.0 in args.json
    except ValueError:
        return str(value)


def agree(words, made):
    """Whether args.json, as a dictionary, says what the flags among `words` say."""
    flags = {}
    for word in words:
        if word.startswith("--"):
            values = flags[word[2:].replace("-", "_")] = []
        elif flags:
            values.append(word)
    for key in flags.keys() - FREE:
        switch = key.startswith("no_") and key not in made  # --no-KEY
        wanted, key = (["False"], key.removeprefix("no_")) if switch else (flags[key] or ["True"], key)
        saved = made[key] if isinstance(made.get(key), list) else [made.get(key)]
        if [plain(v) for v in wanted] != [plain(v) for v in saved]:
            return False
    return True


def finished(part, parts, args):
    """Whether its metrics.json is there, made with its flags and later than what it needs."""
    file = runs.ROOT / part.folder / "metrics.json"
    metrics, made = read(file), read(file.with_name("args.json"))
    needed = [parts[name].product for name in part.needs]
    if not metrics or any(p.exists() and p.stat().st_mtime > file.stat().st_mtime for p in needed):
        return False
    if part.kind in ("fid", "fd"):
        return f"{part.kind}_generation_expost" in metrics and (part.kind == "fid" or of_classifier(metrics))
    if not made:  # not every script leaves it
        return read(work(args) / f"{part.name}.json").get("done") == part.command
    return made.get("script") == part.script and agree(part.words, made)


def unfinished(parts, args):
    """The names of the parts to run: those not finished, and those that need one of them."""
    names = set()
    for name, part in parts.items():
        names |= {name} if names & set(part.needs) or not finished(part, parts, args) else set()
    return names


# --- running ------------------------------------------------------------------------------------------------------


class Job:
    """A part's process. Ctrl-C in a terminal does not reach it: it gets one SIGINT from `halt`."""

    def __init__(self, part, gpu, args):
        self.part, self.gpu, self.args, self.began = part, gpu, args, time.perf_counter()
        folder = runs.ROOT / part.folder
        made = read(folder / "args.json")
        self.resume = part.resumes and (folder / "checkpoint.pt").exists() and made.get("script") == part.script
        self.resume = self.resume and agree(part.words, made)
        words = [sys.executable, str(HERE / part.script), *part.words, *["--resume"] * self.resume]
        self.out, self.err = (work(args) / f"{part.name}.{end}" for end in ("out", "err"))
        environment = os.environ | {"TQDM_MININTERVAL": "1"} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            streams = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
            self.process = subprocess.Popen(words, env=environment, **streams)

    def seconds(self):
        return time.perf_counter() - self.began

    def last(self):
        """What stands last on its stderr: a progress bar, or why it failed."""
        lines = self.err.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def conclude(self, parts):
        """Note down what it took. -> None, or why it failed."""
        part, code, file = self.part, self.process.returncode, work(self.args) / f"{self.part.name}.json"
        if part.kind == "stdout" and code == 0:
            with contextlib.suppress(ValueError):  # without it the part is not finished, which is said below
                printed = json.loads("{" + self.out.read_text().rpartition("\n{\n")[2])
                runs.write_json(runs.ROOT / part.folder / "metrics.json", printed)
        before = read(file).get("seconds", 0) if self.resume else 0
        record = {"seconds": before + self.seconds(), "versions": runs.versions()}
        runs.write_json(file, record | ({"done": part.command} if code == 0 else {}))
        if code:
            return self.last() or f"exit status {code}"
        if not finished(part, parts, self.args):
            return f"it ended well but left no such {part.kind if part.kind[0] == 'f' else 'metrics.json'}"


def slots(device):
    """{GPU: whether it takes the parts that need no GPU}; '' is the CPU, or whatever --device says."""
    n = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))).split(",")[:n]
    return {gpu: False for gpu in gpus} | {"": True}


def run_all(todo, parts, args, lost=()):
    """Run the parts named in `todo`. lost: {name: why} of other parts that are not there. -> it and the failed ones.

    Raises Interrupted.
    """
    waiting = [name for name in parts if name in todo]
    done, jobs, failed, places = 0, {}, dict(lost), slots(args.device)
    with runs.stop_on_signal() as stop:
        while (waiting or jobs) and not stop.requested:
            for gpu, job in list(jobs.items()):
                if job.process.poll() is not None:
                    name, why = jobs.pop(gpu).part.name, job.conclude(parts)
                    done, failed = done + 1, failed | ({name: why} if why else {})
                    rest = left(waiting, jobs, parts, args)
                    say(f"[{done}/{len(todo)}] {name}: {why or f'{job.seconds():.0f} s'}{rest}")
            for name in list(waiting):
                part = parts[name]
                missing = next((need for need in part.needs if need in failed), None)
                if missing:
                    state = "failed" if missing in todo else "is not finished"
                    failed[name] = f"not run: it needs {missing}, which {state}"
                    waiting.remove(name)
                    done += 1
                    continue
                busy = {job.part.folder for job in jobs.values()}  # two parts would write the same metrics.json
                pending = {*waiting, *(job.part.name for job in jobs.values())}
                free = [gpu for gpu in places if gpu not in jobs and (places[gpu] == part.cpu or len(places) == 1)]
                if free and part.folder not in busy and not pending & set(part.needs):
                    jobs[free[0]] = Job(part, free[0], args)
                    waiting.remove(name)
            if sys.stderr.isatty() and jobs:
                job = next(iter(jobs.values()))
                line = f"{done}/{len(todo)}{left(waiting, jobs, parts, args)}  {job.part.name} {job.last()}"
                print(f"\r{line[: os.get_terminal_size(2).columns - 1]}\033[K", end="", file=sys.stderr, flush=True)
            time.sleep(0.2)
        if stop.requested:
            halt(jobs, parts, stop)
    return failed


def halt(jobs, parts, stop):
    """Ask the processes to save themselves and wait; a second Ctrl-C ends them. Raises Interrupted."""
    say("stopping: what runs saves itself first; Ctrl-C again ends it at once")
    stop.requested = False
    for job in jobs.values():
        job.process.send_signal(signal.SIGINT)
    for job in jobs.values():
        while job.process.poll() is None:
            if stop.requested:
                job.process.kill()
            time.sleep(0.1)
        job.conclude(parts)
    raise runs.Interrupted("stopped; the same command goes on from here")


def say(text):
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def left(waiting, jobs, parts, args):
    """The time left in words, from what the parts that ran took and what they were planned to take."""
    took = {name: read(work(args) / f"{name}.json") for name in parts}
    took = {name: record["seconds"] for name, record in took.items() if record.get("done")}

    def rate(script):
        known = [name for name in took if parts[name].script == script] or list(took)
        return sum(took[name] for name in known) / sum(parts[name].cost for name in known)

    if not took or not (waiting or jobs):
        return ""
    seconds = sum(parts[name].cost * rate(parts[name].script) for name in waiting)
    seconds += sum(max(0, job.part.cost * rate(job.part.script) - job.seconds()) for job in jobs.values())
    seconds /= max(1, len(slots(args.device)) - 1)
    return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"


# --- results ------------------------------------------------------------------------------------------------------


def write_results(parts, args):
    """results.json, tables.md, the tables in REPORT.md and README.md, figures. -> the tables."""
    settings = {"quick": args.quick, "epochs": args.epochs, "precision": args.precision}
    public = Path("results")
    own = read(public / "results.json").get("settings", settings)  # of the results that the pages show
    folder = public if own == settings and not args.quick else work(args)
    done = parts.keys() - unfinished(parts, args)
    results = collect(parts, done, work(args), settings, read(folder / "results.json"))
    made = tables(results)
    runs.write_json(folder / "results.json", results)
    text = "\n\n".join(f"## {name}\n\n{content}" for name, content in made.items()) + "\n"
    runs.write_bytes(folder / "tables.md", text.encode())
    if folder != public:
        if not args.quick:
            say(
                f"{public}, REPORT.md and README.md stay as they are, made with --epochs {own['epochs']} --precision "
                f"{own['precision']}: these tables are in {folder}; to replace those, move {public}/results.json away"
            )
        return text
    for page in (Path("REPORT.md"), Path("README.md")):
        if page.exists() and (new := refresh(page.read_text(), made)) != page.read_text():
            runs.write_bytes(page, new.encode())
    for name, part in parts.items():
        one = "_seed_" not in name or name.endswith("_seed_0")
        pictures = (runs.ROOT / part.folder).glob("*.*") if one and name in done else ()
        for picture in pictures:
            if picture.suffix in (".png", ".gif") and not picture.name.startswith("density_"):
                runs.write_bytes(public / part.folder / picture.name, picture.read_bytes())
    return text


def main(argv=None):
    args = parse_args(argv)
    parts = table(args)
    names, open_parts = chosen(parts, args.only), unfinished(parts, args)
    todo = names & open_parts
    if any(parts[name].kind == "fid" for name in todo):
        try:
            extractors.find_weights()
        except runs.UserError as error:
            if args.only and all(parts[name].kind == "fid" for name in todo):
                raise
            say(f"Inception FID will be {MISSING}: {error}")
            todo = {name for name in todo if parts[name].kind != "fid"}
    small = "; --quick: small trainings on built-in images, whose numbers mean nothing" if args.quick else ""
    say(f"{len(names)} parts, {len(todo)} to run{small}")
    work(args).mkdir(parents=True, exist_ok=True)
    lost = {name: "not finished" for name in open_parts - todo}
    try:
        failed = run_all(todo, parts, args, lost)
    finally:
        text = write_results(parts, args)
    print(text + "\n--quick: these numbers mean nothing; that every part ran is what it shows" * args.quick)
    failed = {name: why for name, why in failed.items() if name in todo}
    for name, why in failed.items():
        say(f"failed: {name}: {why}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    runs.cli(main)
