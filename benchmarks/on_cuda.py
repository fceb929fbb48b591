"""What waits for a CUDA machine, in one command: the tests, training speed, fid.py's speed, tuning. Tables at the end.

    python benchmarks/on_cuda.py                        # all four; the same command goes on where --minutes ended it
    python benchmarks/on_cuda.py tune --precision bf16 --capture --features runs/classifier/features.pt2
    python benchmarks/on_cuda.py speed-vae-graph fid    # items whose names begin so
    python benchmarks/on_cuda.py --quick --out runs/cuda-quick      # all of it tiny, on built-in data; also on a CPU

Not yet run on CUDA.

tests   the fast test suite, a file at a time
speed   the steps of vae.py and vae_gan.py beside the plain loop: each row a process of its own, the median of several
        rounds after warm-up. `loss` is that of one step: the same in all rows of one precision, or capture or compiler
        are wrong. Then what a setting costs: trainings judged on held-out training images, two seeds each
fid     fid.py beside pytorch-fid, by phase, with random weights: the distance means nothing, but is to be the same
tune    judged on held-out training images, the most telling first: learning rate and schedule of the VAE, gamma and
        feature layer of the VAE-GAN, the weight of --contrastive with the probe's accuracy

An item leaves --out/NAME.json when it is measured, and all that it printed in NAME.txt. What is measured is not
measured again, what failed is. Tests and trainings (in runs/cuda-NAME) run --jobs at a time: no time is taken of them.
"""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, which has a vae.py and a fid.py, too

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402

import fid  # noqa: E402
import vae  # noqa: E402
import vae_gan  # noqa: E402
from common import data, devices, pictures, runs  # noqa: E402
from common.tables import read  # noqa: E402

sys.path.append(str(ROOT / "benchmarks"))  # where they look for `timing`
import timing  # noqa: E402

from benchmarks import fid as fid_speed  # noqa: E402
from benchmarks import vae as vae_speed  # noqa: E402
from benchmarks import vae_gan as vae_gan_speed  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

LIMIT, GRACE = 300, 45  # seconds: a process that takes longer hangs; what still runs after --minutes may take so long
PRECISIONS = ("fp32", "tf32", "bf16")
QUALITY = {"vae": (*PRECISIONS, "graph-fp32", "graph-bf16"), "vae_gan": ("fp32", "graph-bf16")}
FID = {"reference": "fid.py, float32", "tf32": "fid.py --fast tf32", "bf16": "fid.py --fast bf16"}
FID |= {"pytorch-fid": "pytorch-fid (PyTorch's default is TF32)", "pytorch-fid-fp32": "pytorch-fid, float32"}
FLAGS = {
    "vae": ("vae.py", "--lr", "--schedule"),
    "vae_gan": ("vae_gan.py", "--gamma", "--feature-layer"),
    "contrastive": ("vae.py", "--contrastive"),
}
TUNE = """vae 5e-4 constant, vae 1e-3 cosine, vae_gan 1e-2 conv2, contrastive 300, contrastive 0, vae 1e-3 constant,
 vae 5e-4 cosine, vae_gan 3e-2 conv2, vae_gan 1e-2 conv1, contrastive 600, vae_gan 3e-3 conv2, vae_gan 1e-2 fc,
 contrastive 150, vae 2e-3 cosine, vae_gan 1e-1 conv2, contrastive 1200, vae 2.5e-4 constant, vae 2.5e-4 cosine,
 vae 2e-3 constant"""
SHOWN = ("elbo_nats", "kl", "mse", "sharpness_reconstruction", "sharpness_generation", "fd_reconstruction")
SHOWN += ("fd_generation", "fd_generation_expost", "probe_mu")


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    phases = ["tests", "speed", "fid", "tune"]
    parser.add_argument("names", nargs="*", default=phases, help="of items, or how they begin")
    parser.add_argument("--out", type=Path, default=Path("runs/cuda"), help="folder of records, logs and tables.md")
    parser.add_argument("--minutes", type=runs.number(float, 0), default=8.5, help="after which no item is begun")
    parser.add_argument("--jobs", type=runs.number(int, 1), help="trainings or tests at a time; default: 3, on a CPU 1")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1; with --quick also cpu")
    parser.add_argument("--quick", action="store_true", help="seconds an item; the numbers mean nothing")
    parser.add_argument("--data", choices=["cifar10", "shapes"], help="default: cifar10, --quick shapes")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or is downloaded to")
    parser.add_argument("--row", help="measure this one row in this process, and print it")
    # of the trainings
    parser.add_argument("--limit", type=runs.number(int, 128), help="use only the first LIMIT training images")
    parser.add_argument("--epochs", type=runs.number(int, 1), help="passes over the images; default: 15, --quick 1")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="while tuning")
    parser.add_argument("--capture", action="store_true", help="a CUDA graph of the step while tuning")
    parser.add_argument("--features", help="a torch.export program for distances, which are left out without")
    args = parser.parse_args(argv)
    args.data = args.data or ("shapes" if args.quick else "cifar10")
    args.epochs, args.limit = args.epochs or (1 if args.quick else 15), args.limit or (256 if args.quick else None)
    return args


# --- rows: each has its process to itself, so that nothing that is changed here is put back -------------------------


def speed(script, row, args, device):
    """A row of benchmarks/SCRIPT.py, or "loader" or "compile-..." -> images/s, and for our steps the loss of one."""
    bench, module, position = (vae_speed, vae, 0) if script == "vae" else (vae_gan_speed, vae_gan, len(vae_gan.NORMS))
    kind, seen = row.split("-")[0], []
    once, make, build = timing.time_steps, module.make_step, torch.utils.data.DataLoader
    route = vae_gan.routed_gradients
    # the plain loop must not come to the end of its 50,000 images
    steps, rounds = (1, 1) if args.quick else (40 if kind in ("plain", "loader") else 100, 7)

    def several(step, steps, device):
        return statistics.median(once(step, steps, device) for _ in range(rounds))

    def watched(model, average, *rest):
        if kind == "compile":  # the networks, in place; on a CPU without the compiler, which takes minutes there
            for part in (model.encoder, model.decoder, *(x for x in rest if isinstance(x, torch.nn.Module))):
                part.compile(dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")
        update = make(model, average, *rest)

        def call(*tensors):
            numbers = update(*tensors)
            if len(seen) < 6:  # before the last is a captured step, whose update it shows
                seen.append(numbers[position].clone())
            return numbers

        return call

    def contiguous(*given):
        gradients, numbers = route(*given)
        return {name: [g.contiguous() for g in each] for name, each in gradients.items()}, numbers

    def keep(*given, **options):
        seen.append(build(*given, **options))
        return seen[-1]

    options = bench.parse_args(["--device", str(device), "--steps", str(steps)])
    options.row, options.batch_size = row.removeprefix("compile-"), 8 if args.quick else options.batch_size
    timing.time_steps, module.make_step = several, watched
    if kind == "compile":
        # vae_gan.py goes back through a graph twice: the first time must not take the graph's tensors for its own. And
        # it hands gradients to Adam itself, which takes them in memory's order: the compiler's are in channels_last.
        torch._functorch.config.donated_buffer, vae_gan.routed_gradients = False, contiguous
        # torch 2.11's compiler may ask for TF32 by the older names, which raise unless they agree with devices.start
        torch.backends.cudnn.allow_tf32 = not row.endswith("fp32")
        torch.set_float32_matmul_precision("highest" if row.endswith("fp32") else "high")
    if kind == "loader":  # that of benchmarks/vae.py in front of vae_gan.py's peer
        torch.utils.data.DataLoader = keep
        vae_speed.plain(options, device)
        batches = iter(seen.pop())
        data.batch, options.row = lambda *_: next(batches).to(device), "plain"
    torch.manual_seed(0)
    found = {"images/s": bench.measure(options)}
    return found | {"loss": seen[-1].item()} if seen else found


def fid_beside_peer(mode, args, device):
    """-> images/s of fid.py's phases and of a folder's way to its statistics, seconds of the distance, the distance."""
    images, _ = data.load(args.data, args.data_dir, "test")
    n, rounds, dims, phases = (8, 1, 64, {}) if args.quick else (4000, 3, 2048, {})

    def seconds(call):
        taken = []
        for _ in range(rounds):
            began = timing.synchronised(device)
            call()
            taken.append(timing.synchronised(device) - began)
        return statistics.median(taken)

    with tempfile.TemporaryDirectory() as scratch:
        real, fake, weights = (Path(scratch) / name for name in ("real", "fake", "random.pth"))
        pictures.write_images(images[:n], real)
        pictures.write_images(torch.nn.functional.avg_pool2d(images[n : 2 * n].float(), 3, 1, 1).to(torch.uint8), fake)
        fid_speed.calibrated_weights(weights, images[-32:].float() / 255)
        if mode.startswith("pytorch-fid"):
            from pytorch_fid import fid_score, inception

            state, root = torch.load(weights, weights_only=True), fid_score.linalg.sqrtm
            inception.load_state_dict_from_url = lambda *_, **__: state
            fid_score.linalg.sqrtm = lambda a, disp: (root(a), 0)  # SciPy 1.18 knows no `disp`
            if mode.endswith("fp32"):
                torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
            net, workers = inception.InceptionV3().to(device), min(8, len(os.sched_getaffinity(0)))  # its defaults
            distance = fid_score.calculate_frechet_distance

            def of_folder(folder):
                return fid_score.compute_statistics_of_path(str(folder), net, 50, 2048, device, workers)
        else:
            devices.start(str(device))
            extractor = fid.load_extractor(weights, None, device, None if mode == "reference" else mode)
            batch, part, distance = fid.default_batch(device), images[:n].to(device), fid.frechet_distance

            def decoded(folder):
                return fid.read_images(fid.find_side(str(folder))[1], batch, Counter())

            def of_folder(folder):
                return fid.statistics(decoded(folder), extractor)[:2]

            @torch.inference_mode()
            def network():
                with fid.precision(extractor.fast):
                    for x in part.split(batch):
                        extractor([x])

            phases = {"decoding": lambda: list(decoded(real)), "network": network}
            phases["network and sums"] = lambda: fid.statistics(part, extractor)
        found = {}
        for name, call in (phases | {"folder to statistics": lambda: of_folder(real)}).items():
            if rounds > 1:
                call()  # loads what it needs, and searches for the fastest kernels
            found[f"{name}, images/s"] = n / seconds(call)
        stats = [part[(slice(dims),) * part.ndim] for folder in (real, fake) for part in of_folder(folder)]
        values = []
        found["distance, s"] = seconds(lambda: values.append(distance(*stats)))
    return found | {"distance": float(values[0])}


def measure(row, args, device):
    kind, _, rest = row.partition("-")
    return fid_beside_peer(rest, args, device) if kind == "fid" else speed(kind, rest, args, device)


# --- the items ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """Commands that give a row of a table; `result` makes it, {column: number}, of what they printed."""

    name: str
    title: str  # of the table
    label: str  # of the row
    commands: tuple
    result: Callable
    cuda: bool = False  # needs it
    beside: bool = False  # others may run at the same time

    @property
    def command(self):
        """As a person would type it, less what differs between machines."""
        text = " && ".join(" ".join(("python", *words[1:])) for words in self.commands)
        return re.sub(r" --(data-dir|device) \S+", "", text).replace(f"{ROOT}/", "")


def pieces(text):
    """What stands in a log that has progress bars, without the empty lines."""
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def table(args, device):
    """-> all items, in the order in which they run."""
    items, python = [], sys.executable
    place = ("--device", str(device), "--data-dir", args.data_dir)
    limit = ("--limit", str(args.limit)) if args.limit else ()
    n = "128" if args.quick else "5000"
    common = (*place, "--data", args.data, *limit, "--holdout", n, "--epochs", str(args.epochs))
    common += ("--save-every", str(args.epochs), "--fid", n if args.features else "off")
    common += ("--features", args.features) if args.features else ()

    def printed(text):
        return json.loads([line for line in pieces(text) if line.startswith("{")][-1])

    def counted(text):
        return {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped|deselected)", pieces(text)[-1])}

    def row(phase, name, title, label):
        words = (python, str(ROOT / "benchmarks" / "on_cuda.py"), "--row", name, *place, "--data", args.data)
        words += ("--quick",) * args.quick
        name, cuda = f"{phase}-{name.removeprefix('fid-')}", "tf32" in name or "graph" in name
        items.append(Item(name, title, label, (words,), printed, cuda))

    def training(name, title, label, script, words, probe=False):
        folder = runs.ROOT / f"cuda-{'quick-' * args.quick}{name}"
        commands = ((python, str(ROOT / script), "--name", folder.name, *words, *common),)
        commands += ((python, str(ROOT / "probe.py"), str(folder), *place, *limit),) * probe

        def result(_):
            found = read(folder / "metrics.json")
            if probe:
                rows = read(runs.ROOT / f"{folder.name}-probe" / "metrics.json")["rows"]
                found["probe_mu"] = rows["mu"]["accuracy"]
            return {key: value for key, value in found.items() if isinstance(value, int | float)}

        items.append(Item(name, title, label, commands, result, "tf32" in words or "--capture" in words, True))

    for file in sorted((ROOT / "tests").glob("test_contrastive.py" if args.quick else "test_*.py")):
        words = (python, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", "-rfE", str(file))
        items.append(Item(f"tests-{file.stem[5:]}", "Tests", file.stem, (words,), counted, beside=True))
    for script, bench in (("vae", vae_speed), ("vae_gan", vae_gan_speed)):
        rows = {"loader": "plain DataLoader loop, a pass for each player"} if script == "vae_gan" else {}
        rows |= {name: label for name, label in bench.ROWS.items() if name != "returned"}
        rows |= {f"compile-{precision}": f"{bench.ROWS[precision]}, networks compiled" for precision in PRECISIONS}
        for name, label in rows.items():
            row("speed", f"{script}-{name}", f"Training step of {script}.py at its default batch", label)
    for script, settings in QUALITY.items():
        for seed, setting in ((seed, setting) for seed in "01" for setting in settings):
            words = ["--precision", setting.removeprefix("graph-"), "--seed", seed]
            words += ["--capture"] * setting.startswith("graph")
            name, label = f"speed-quality-{script}-{setting}-seed-{seed}", f"{setting}, seed {seed}"
            training(name, f"Quality of {script}.py by precision", label, f"{script}.py", words)
    for mode, label in FID.items():
        row("fid", f"fid-{mode}", "fid.py beside pytorch-fid", label)
    for kind, *values in (candidate.split() for candidate in TUNE.split(",")):
        script, *flags = FLAGS[kind]
        words = [word for pair in zip(flags, values, strict=True) for word in pair]
        words += ["--precision", args.precision] + ["--capture"] * args.capture
        name, title = f"tune-{'-'.join((kind, *values))}", f"Tuning of {script}, {' and '.join(flags)}"
        training(name, title, ", ".join(values), script, words, probe=kind == "contrastive")
    return items


# --- running ------------------------------------------------------------------------------------------------------


def perform(item, args, device, ends, stop):
    """Run an item's commands and leave its record. -> why there is no result, or None."""
    late = f"not done within --minutes {args.minutes:g}"
    if stop.requested or time.monotonic() > ends:
        return "stopped" if stop.requested else late
    env = os.environ | {"TQDM_MININTERVAL": "10", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if item.beside:
        env.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
    log, began, failed = args.out / f"{item.name}.txt", time.monotonic(), None
    log.unlink(missing_ok=True)
    for words in item.commands:
        with open(log, "ab") as file:
            streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            process = subprocess.Popen(words, env=env, **streams)
        while process.poll() is None:
            over = time.monotonic() > ends + GRACE
            if stop.requested or over or time.monotonic() > began + LIMIT:
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too
                process.wait()
                if stop.requested or over:
                    return "stopped" if stop.requested else late
                failed = f"it took more than {LIMIT} s"
            time.sleep(0.05)
        text = log.read_text(errors="replace")
        if process.returncode:
            lines = pieces(text) or [f"exit status {process.returncode}"]
            tests = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]  # pytest's
            errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]  # a traceback's
            failed = failed or "; ".join(lines[-1:] + tests if tests else errors[-1:] or lines[-1:])[:500]
            break
    record = {"command": item.command, "device": device.type, "quick": args.quick} | runs.versions()
    record |= {"machine": machine(device), "seconds": time.monotonic() - began}
    try:
        record["result"] = {} if failed else item.result(text)
        failed = failed or next((f"{k} is {v}" for k, v in record["result"].items() if not math.isfinite(v)), None)
    except (LookupError, ValueError) as error:
        failed = f"it ended well but without a result ({error!r})"
    if failed:
        record |= {"failed": failed, "result": {}}
    runs.write_json(args.out / f"{item.name}.json", record)
    print(f"{item.name}: {failed or 'measured'} after {record['seconds']:.0f} s", file=sys.stderr, flush=True)
    return failed


def machine(device):
    """The hardware behind `device`, in words."""
    gpu_beside = device.type != "cuda" and torch.cuda.is_available()  # which runs.machine() would name
    return "the CPU beside " * gpu_beside + runs.machine()


def rounded(value):
    return "" if value is None else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def table_text(items, args, why):
    """The records in --out as Markdown: tables by title and machine, and under them what is missing, and why."""
    groups, text = {}, []
    for item in items:
        groups.setdefault(item.title, []).append((item, read(args.out / f"{item.name}.json")))
    for title, group in groups.items():
        text += [f"## {title}", ""]
        places = {}
        for item, record in group:
            if record.get("result"):
                place = f"{record['machine']}, torch {record['torch']}"
                place += ", --quick: the numbers mean nothing" * record["quick"]
                places.setdefault(place, {})[item.label] = record["result"]
        for place, rows in places.items():
            peer = rows.get(group[0][0].label, {}).get("images/s")
            if peer:
                rows = {label: row | {"ratio": row["images/s"] / peer} for label, row in rows.items()}
            columns = list(dict.fromkeys(key for row in rows.values() for key in row))
            columns = [key for key in SHOWN if key in columns] or columns
            text += [place, "", f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
            text += [f"| {k} | {' | '.join(rounded(row.get(key)) for key in columns)} |" for k, row in rows.items()]
            text.append("")
        missing = [(item, record) for item, record in group if not record.get("result")]
        for item, record in missing:
            text.append(f"- {item.label} ({item.name}): {why.get(item.name) or record.get('failed') or 'not measured'}")
        text += [""] * bool(missing)
    return "\n".join(text)


def main(argv=None):
    args = parse_args(argv)
    ends = time.monotonic() + 60 * args.minutes
    device = devices.pick_device(args.device)
    if args.row:
        print(json.dumps(measure(args.row, args, device)))
        return
    if device.type != "cuda" and not args.quick:
        raise runs.UserError("there is no CUDA device here: --quick tries everything on a CPU, in a small way")
    args.jobs = args.jobs or (3 if device.type == "cuda" else 1)
    items, todo, why = table(args, device), [], {}
    for name in args.names:
        if not any(item.name.startswith(name) for item in items):
            raise runs.UserError(f"no item's name begins with {name}: the phases are tests, speed, fid and tune")
    for item in items:
        file = args.out / f"{item.name}.json"
        record = read(file)
        if not item.name.startswith(tuple(args.names)):
            continue
        if not record.get("result"):
            todo.append(item)
        elif (record["command"], record["device"]) != (item.command, device.type):
            raise runs.UserError(
                f"{file} holds the result of `{record['command']}` on {record['device']}, not of `{item.command}` on "
                f"{device.type}: give another --out"
            )
    if device.type != "cuda":
        why = {item.name: "not measured: it needs CUDA" for item in todo if item.cuda}
        todo = [item for item in todo if not item.cuda]
    runs.write_bytes(args.out / "tables.md", b"")  # says at once when it cannot be
    failed = {}
    try:
        with runs.stop_on_signal() as stop:
            for beside, group in groupby(todo, key=lambda item: item.beside):
                with ThreadPoolExecutor(args.jobs if beside else 1) as pool:
                    jobs = {item.name: pool.submit(perform, item, args, device, ends, stop) for item in group}
                failed |= {name: job.result() for name, job in jobs.items()}
    finally:
        text = table_text(items, args, why | failed)
        runs.write_bytes(args.out / "tables.md", text.encode())
        print(text)
    if stop.requested:
        raise runs.Interrupted("stopped; the same command goes on from here")
    if any(failed.values()):
        sys.exit(1)


if __name__ == "__main__":
    runs.cli(main)
