"""What is lost when something breaks? A campaign of faults: trainings killed, without space, with damaged files.

    python benchmarks/faults.py                      # a few minutes on two cores; the last line says how long it took
    python benchmarks/faults.py --only SIGKILL --kills 100 --seed 1

Every fault runs a script as a person would, on the CPU, in a folder of its own below the system's temporary one. It is
survived when the script ends as it should (done, or one sentence and exit status 2, or 130 after Ctrl-C; no traceback)
and what lies on the disk is right: checkpoints that were there still load and are what they were, and a training that
goes on ends with the checkpoint and the log of an unbroken one, bit for bit, seconds aside. "lost" counts the faults
after which a checkpoint or a line of the log was wrong or gone. Exit status 1 when a fault was not survived.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import inception, runs  # noqa: E402

LIMIT = 900  # seconds that a script may take, so that a hanging one is a fault and not the end of the campaign
VARIES = {"seconds", "cpu_seconds", "resume"}  # what an unbroken run and a resumed one need not share
IMAGES = "--data ../images --batch-size 8 --epochs 2 --log-every 1 --device cpu"
TRAININGS = {  # each of `STEPS` steps, with a checkpoint in the middle and one at the end
    "vae.py": f"--latent-dim 2 {IMAGES}",
    "vae_gan.py": f"--latent-dim 2 {IMAGES}",
    "classifier.py": IMAGES,
    "probe.py": f"--supervised --latent-dim 2 {IMAGES}",
    "wgan_gp.py": "--iterations 6 --plot-every 3 --log-every 1 --depth 1 --width 8 --batch-size 8 --device cpu",
}
STEPS = 6
WORK = Path()  # the campaign's temporary folder; `main` sets it
HERE = threading.local()  # .folders: that one fault, tried by one thread, has made
ONE_AT_A_TIME = threading.RLock()  # held while something is made that several faults use


class Fault(Exception):
    """A fault that was not survived. lost: whether something that was on the disk before is wrong or gone."""

    def __init__(self, text, lost=False):
        super().__init__(text)
        self.lost = lost


class Skip(Exception):
    """A fault that cannot be tried on this machine."""


def require(condition, text, lost=False):
    if not condition:
        raise Fault(text, lost)


# --- scripts as a person starts them --------------------------------------------------------------------------------


class Child:
    """A script that runs in `folder`. shell: how bash calls it ("$@"); python: flags of the interpreter."""

    live = set()

    def __init__(self, folder, script, flags="", shell='exec "$@"', python=(), env=None):
        self.script = Path(script).name
        self.said = Path(tempfile.mkdtemp(dir=WORK / "said"))
        words = [sys.executable, *python, str(ROOT / script), *flags.split()]
        one_thread = {"OMP_NUM_THREADS": "1"}  # with which a resumed training repeats the unbroken one bit for bit
        with open(self.said / "out", "wb") as out, open(self.said / "err", "wb") as err:
            self.process = subprocess.Popen(
                ["bash", "-c", f"set -o pipefail; {shell}", "bash", *words],
                **{"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "start_new_session": True},
                **{"cwd": folder, "env": os.environ | one_thread | (env or {})},
            )
        Child.live.add(self)

    def signal(self, which):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, which)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()
        Child.live.discard(self)

    def wait_for(self, condition):
        """Wait until condition() -> True, or the script has ended -> False."""
        end = time.monotonic() + LIMIT
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > end:
                self.kill()
                raise Fault(f"{self.script} did not end within {LIMIT} s")
            time.sleep(0.002)
        return condition()

    def ends(self):
        """-> the exit status."""
        self.wait_for(lambda: False)
        Child.live.discard(self)
        return self.process.returncode

    def errors(self):
        """The lines that a terminal shows of stderr."""
        text = (self.said / "err").read_text(errors="replace")
        return [line.split("\r")[-1].strip() for line in text.split("\n") if line.strip()]

    def succeeds(self):
        code = self.ends()
        require(code == 0, f"{self.script} ended with exit status {code}: {' '.join(self.errors()[-1:])}")
        require("Traceback" not in " ".join(self.errors()), f"{self.script} left a traceback")

    def refuses(self, *words, code=2):
        """The script has to end with exit status `code`, and one sentence with these words as its last line."""
        found, lines = self.ends(), self.errors()
        require("Traceback" not in " ".join(lines), f"{self.script} left a traceback: {' '.join(lines[-1:])}")
        require(found == code, f"{self.script} ended with exit status {found}, not {code}: {' '.join(lines[-1:])}")
        sentences = [line for line in lines if line.startswith(f"{self.script}: ")]
        require(len(sentences) == 1 and sentences[0] == lines[-1], f"{self.script} said no single last sentence")
        for word in words:
            require(word in sentences[0], f"{self.script} did not say {word!r}, but: {sentences[0]}")


def fresh():
    """-> an empty folder to start a script in, until `attempt` removes it. The images are at ../images."""
    HERE.folders.append(Path(tempfile.mkdtemp(dir=WORK)))
    return HERE.folders[-1]


def train(folder, script, more="", **how):
    """Start the training of `script` with runs/x as its run."""
    return Child(folder, script, f"--name x {TRAININGS[script]} {more}", **how)


# --- what lies on the disk ------------------------------------------------------------------------------------------


def load(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise Fault(f"{path.name} does not load ({type(error).__name__})", lost=True) from error


def read_log(run):
    try:
        return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError):
        return []


def difference(a, b, where=""):
    """Where two records (dictionaries, lists, tensors, numbers) differ in a bit -> its place, or None."""
    if type(a) is not type(b):
        return where
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else where
    if isinstance(a, dict):
        if set(a) - VARIES != set(b) - VARIES:
            return f"{where}: keys"
        pairs = [(key, a[key], b[key]) for key in a if key not in VARIES]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: length"
        pairs = [(i, *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else where
    found = (difference(x, y, f"{where}.{key}") for key, x, y in pairs)
    return next((place for place in found if place is not None), None)


def finished(run):
    """Whether the training has written its last checkpoint and the last line of its log."""
    last = [record for record in read_log(run) if record["step"] == STEPS]  # of the training batch, and of the test
    return len(last) >= 2 and (run / "checkpoint.pt").is_file() and load(run / "checkpoint.pt")["step"] == STEPS


def snapshot(folder):
    """{path: checksum} of all files but locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: zlib.crc32(path.read_bytes()) for path in files}


class Unbroken:
    """An unbroken training: its run folder, its checkpoints by step, the seconds that it took."""

    def __init__(self, run):
        self.run, self.checkpoints, self.seconds = run, {}, None

    def keep(self):
        """Keep the checkpoint that is there now, by a second name."""
        if (self.run / "checkpoint.pt").exists():
            step = load(self.run / "checkpoint.pt")["step"]
            if step not in self.checkpoints:
                self.checkpoints[step] = self.run / f"step{step}.pt"
                os.link(self.run / "checkpoint.pt", self.checkpoints[step])

    def judge(self, run):
        """The checkpoint in `run` has to be one of the unbroken training's. -> its step; 0 without a checkpoint."""
        if not (run / "checkpoint.pt").exists():
            return 0
        state = load(run / "checkpoint.pt")
        require(state["step"] in self.checkpoints, f"a checkpoint at step {state['step']}", lost=True)
        place = difference(load(self.checkpoints[state["step"]]), state)
        require(place is None, f"the checkpoint at step {state['step']} differs in {place}", lost=True)
        return state["step"]

    def judge_end(self, run):
        """`run` has to end as the unbroken training did, with the same log."""
        step = self.judge(run)
        require(step == STEPS, f"the last checkpoint is of step {step}", lost=True)
        place = difference(read_log(self.run), read_log(run))
        require(place is None, f"log.jsonl differs in {place}", lost=True)

    def goes_on(self, folder, script):
        """Resume (without a checkpoint: start) the training in `folder` and judge its end."""
        resume = "--resume" if (folder / "runs/x/checkpoint.pt").exists() else ""
        child = train(folder, script, resume)
        if not child.wait_for(lambda: finished(folder / "runs/x")):
            raise Fault(f"{script} {resume} ended with {child.ends()}: {' '.join(child.errors()[-1:])}", lost=True)
        child.kill()  # what it still measures and draws is no part of the training
        self.judge_end(folder / "runs/x")


@functools.cache
def run_unbroken(script):
    folder = Path(tempfile.mkdtemp(dir=WORK))
    found, began = Unbroken(folder / "runs/x"), time.monotonic()
    child = train(folder, script)

    def done():
        found.keep()
        return finished(found.run)

    if not child.wait_for(done):
        raise Fault(f"{script} ended with {child.ends()}: {' '.join(child.errors()[-1:])}")
    found.keep()
    found.seconds = time.monotonic() - began
    child.kill()
    return found


def unbroken(script):
    with ONE_AT_A_TIME:
        return run_unbroken(script)


def halfway(script):
    """-> a folder with runs/x as it was at the first checkpoint of `script`, and the log of the whole."""
    whole, folder = unbroken(script), fresh()
    (folder / "runs/x").mkdir(parents=True)
    shutil.copy(whole.checkpoints[min(whole.checkpoints)], folder / "runs/x/checkpoint.pt")
    for name in ("args.json", "log.jsonl"):
        shutil.copy(whole.run / name, folder / "runs/x" / name)
    return folder


# --- the faults: what breaks, and how it has to end -----------------------------------------------------------------


def inode(run):
    """What changes whenever another checkpoint takes its place; None without one."""
    file = run / "checkpoint.pt"
    return file.stat().st_ino if file.exists() else None


def is_time(moment, run, before, late):
    """moment: "any", i.e. at `late`; "writing", i.e. while a checkpoint is written; "written", i.e. just after."""
    if moment == "writing" and any(run.glob(".checkpoint.*")):
        time.sleep(random.uniform(0, 0.1))
        return True
    return inode(run) != before if moment == "written" else time.monotonic() > late


def kill(script, moments, seed):
    """SIGKILL one training again and again, each time going on from what is there; at last let it end."""
    whole, folder, draw = unbroken(script), fresh(), random.Random(f"{seed} {script}")
    step, late_ones = 0, 0
    for moment in moments:
        run, before = folder / "runs/x", inode(folder / "runs/x")
        child = train(folder, script, "--resume" if step else "")
        late = time.monotonic() + (draw.uniform(0, whole.seconds) if moment == "any" else LIMIT)
        if not child.wait_for(functools.partial(is_time, moment, run, before, late)):
            child.succeeds()
            late_ones += 1
        child.kill()
        earlier, step = step, whole.judge(run)
        require(step >= earlier, f"the checkpoint of step {earlier} became one of step {step}", lost=True)
        if step == STEPS:
            whole.judge_end(run)
            folder, step = fresh(), 0
    whole.goes_on(folder, script)
    return f"{late_ones} came after the end" if late_ones else None


def stop(script, which):
    whole, folder = unbroken(script), fresh()
    child = train(folder, script)
    child.wait_for(lambda: read_log(folder / "runs/x"))
    child.signal(which)
    child.refuses("--resume", code=130)
    step = load(folder / "runs/x/checkpoint.pt")["step"]
    require(read_log(folder / "runs/x")[-1]["step"] <= step, "the log is ahead of the checkpoint", lost=True)
    whole.goes_on(folder, script)


def no_space(script):
    """`ulimit -f` makes each write beyond half a checkpoint fail, as a full disk does."""
    whole, folder = unbroken(script), halfway(script)
    run = folder / "runs/x"
    step, blocks = whole.judge(run), (run / "checkpoint.pt").stat().st_size // 2048
    child = train(folder, script, "--resume", shell=f'ulimit -f {blocks}; exec "$@"')
    child.refuses("cannot write", "File too large")
    require(whole.judge(run) == step, "the earlier checkpoint is gone", lost=True)
    records = read_log(run)
    place = difference(read_log(whole.run)[: len(records)], records)
    require(records and place is None, f"log.jsonl differs in {place}", lost=True)
    require(not list(run.glob(".*.part*")), "a half-written file remained")


def without_rights(folder):
    """Take the right to write into `folder` -> a shell in which it is missed: root has to give up what ignores it."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() != 0:
        return 'exec "$@"'
    if not shutil.which("setpriv"):
        raise Skip("root may write everywhere, and there is no setpriv")
    return 'exec setpriv --bounding-set -dac_override,-dac_read_search "$@"'


def cannot_write(script, make_folder, more=""):
    folder = make_folder()
    before = snapshot(folder)
    train(folder, script, more, shell=without_rights(folder)).refuses("Permission denied")
    require(snapshot(folder) == before, "files changed", lost=True)


def cannot_cache():
    folder, cache = halfway("vae.py"), fresh()
    flags = f"--eval-only --fid 12 --features {features()} --data-dir {cache}"
    train(folder, "vae.py", flags, shell=without_rights(cache)).succeeds()
    found = json.loads((folder / "runs/x/metrics.json").read_text())
    require(any(key.startswith("fd_") for key in found), "the distance is not in metrics.json", lost=True)


class Colours(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.float().mean((2, 3)), x.float().square().mean((2, 3))], 1)


def features():
    """-> a program of torch.export for --features: mean colours, and means of their squares."""
    path = WORK / "features.pt2"
    with ONE_AT_A_TIME:
        if not path.exists():
            inception.export(Colours(), path)
    return path


def two_of_one_name(script, *others):
    whole, folder = unbroken(script), halfway(script)
    run = folder / "runs/x"
    before = (run / "log.jsonl").stat().st_ino
    first = train(folder, script, "--resume")
    first.wait_for(lambda: (run / "log.jsonl").stat().st_ino != before)  # it has gone back to the checkpoint
    first.signal(signal.SIGSTOP)
    try:
        files = snapshot(folder)
        for more in others:
            train(folder, script, more).refuses("runs/x is in use", f"process {first.process.pid}", "--name")
        require(snapshot(folder) == files, "files of the first run changed", lost=True)
    finally:
        first.signal(signal.SIGCONT)
    require(first.wait_for(lambda: finished(run)), "the first run did not end", lost=True)
    first.kill()
    whole.judge_end(run)


def flipped(data, where):
    return data[:where] + bytes(255 - byte for byte in data[where : where + 64]) + data[where + 64 :]


def damaged_checkpoint(script, damage):
    folder = halfway(script)
    path = folder / "runs/x/checkpoint.pt"
    data = damage(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    before = snapshot(folder)
    train(folder, script, "--resume").refuses("runs/x")
    require(snapshot(folder) == before, "files changed", lost=True)


def odd_images(script, *damaged):
    """Files that are damaged, or a FIFO named pipe.png, in a folder of images."""
    folder = fresh()
    own = shutil.copytree(WORK / "images", folder / "own") / "train/class0"
    for name in damaged:
        png = (WORK / "images/train/class0/00.png").read_bytes()
        (own / name).write_bytes(png[:400] if name == "cut.png" else b"no image\n")
    if not damaged:
        os.mkfifo(own / "pipe.png")
    if script == "fid.py":
        child = Child(folder, script, f"own/train own/test --features {features()} --device cpu")
    else:
        child = train(folder, script, "--epochs 1 --data own")
    if damaged:
        child.refuses(damaged[0])
        require(not (folder / "runs/x").exists(), "a run was begun")
    else:
        child.succeeds()


def without_stream(script, shell):
    whole, folder = unbroken(script), halfway(script)
    train(folder, script, "--resume", shell=shell).succeeds()
    whole.judge_end(folder / "runs/x")
    require((folder / "runs/x/metrics.json").exists(), "metrics.json is missing", lost=True)


def strange_name():
    folder = fresh()
    shutil.copytree(WORK / "images", folder / "été_图")
    train(folder, "vae.py", "--epochs 1 --data été_图", env={"PYTHONIOENCODING": "cp1252"}).succeeds()
    require((folder / "runs/x/metrics.json").exists(), "metrics.json is missing", lost=True)


def optimised(script):
    folder = halfway(script)
    Child(folder, script, "--name x --sample 4", python=["-OO"]).succeeds()
    require(any(folder.glob("runs/x/samples*")), "no samples")


def damaged_archive(*names):
    folder = fresh()
    for name in names:
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(bytes(1000))
    away = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nothing is downloaded
    Child(folder, "vae.py", "--name x --device cpu", env=away).refuses(Path(names[0]).name)
    require(not (folder / "runs/x").exists(), "a run was begun")


def undivided():
    folder = fresh()
    child = train(folder, "wgan_gp.py", python=["-m", "torch.distributed.run", "--nproc-per-node=2"])
    require(child.ends() != 0, "it was not refused")  # torchrun itself then prints a traceback of its own
    require(any("does not divide its work" in line for line in child.errors()), "it did not say why")
    require(not (folder / "runs/x").exists(), "a run was begun")


NOTES = {  # kind of fault: how it has to end
    "SIGKILL": "any moment, while a checkpoint is written, just after; resumed",
    "Ctrl-C, SIGTERM": "saved, exit status 130, resumed",
    "full disk": "refused; the earlier checkpoint stays",
    "read-only folders": "refused; caches done without",
    "two runs of one name": "the second refused, the first unharmed",
    "damaged checkpoints": "refused, nothing changed",
    "damaged images": "named; a FIFO passed over",
    "closed streams": "trained to the end",
    "encoding, -OO": "done as usual",
    "damaged CIFAR-10": "refused, the file named",
    "torchrun": "refused where the work is not divided",
}


def campaign(kills, seed):
    """-> (kind, what, how many faults it is, a function that raises Fault) for each."""
    moments = itertools.cycle(("any", "writing", "written", "any"))
    for i, script in enumerate(TRAININGS):
        mine = [next(moments) for _ in range(i, kills, len(TRAININGS))]
        if mine:
            yield "SIGKILL", f"{script}, {len(mine)} times", len(mine), lambda s=script, m=mine: kill(s, m, seed)
    yield "Ctrl-C, SIGTERM", "vae.py, Ctrl-C", 1, lambda: stop("vae.py", signal.SIGINT)
    yield "Ctrl-C, SIGTERM", "probe.py, SIGTERM", 1, lambda: stop("probe.py", signal.SIGTERM)
    for script in TRAININGS:
        yield "full disk", script, 1, lambda s=script: no_space(s)
    kind = "read-only folders"
    yield kind, "vae.py in one", 1, lambda: cannot_write("vae.py", fresh)
    yield kind, "wgan_gp.py in one", 1, lambda: cannot_write("wgan_gp.py", fresh)
    yield kind, "probe.py --resume", 1, lambda: cannot_write("probe.py", lambda: halfway("probe.py"), "--resume")
    yield kind, "vae.py --fid with such a --data-dir", 1, cannot_cache
    kind = "two runs of one name"
    yield kind, "vae.py", 3, lambda: two_of_one_name("vae.py", "", "--eval-only", "--sample 4")
    yield kind, "wgan_gp.py", 2, lambda: two_of_one_name("wgan_gp.py", "", "--sample 4")
    kind = "damaged checkpoints"
    yield kind, "cut short", 1, lambda: damaged_checkpoint("vae.py", lambda data: data[: len(data) // 2])
    yield kind, "first bytes", 1, lambda: damaged_checkpoint("classifier.py", lambda data: flipped(data, 0))
    yield kind, "a weight", 1, lambda: damaged_checkpoint("vae_gan.py", lambda data: flipped(data, len(data) // 2))
    yield kind, "empty", 1, lambda: damaged_checkpoint("probe.py", lambda data: b"")
    yield kind, "gone", 1, lambda: damaged_checkpoint("wgan_gp.py", lambda data: None)
    other = lambda data: (unbroken("probe.py").run / "checkpoint.pt").read_bytes()  # noqa: E731
    yield kind, "of another script", 1, lambda: damaged_checkpoint("vae.py", other)
    for script in ("vae.py", "fid.py"):
        yield "damaged images", f"{script}, two", 2, lambda s=script: odd_images(s, "cut.png", "text.png")
        yield "damaged images", f"{script}, a FIFO", 1, lambda s=script: odd_images(s)
    kind = "closed streams"
    yield kind, "vae.py 2>&-", 1, lambda: without_stream("vae.py", 'exec "$@" 2>&-')
    yield kind, "probe.py >&-", 1, lambda: without_stream("probe.py", 'exec "$@" >&-')
    yield kind, "vae_gan.py <&- >&- 2>&-", 1, lambda: without_stream("vae_gan.py", 'exec "$@" <&- >&- 2>&-')
    yield kind, "vae.py 2>&1 | true", 1, lambda: without_stream("vae.py", '"$@" 2>&1 | true')
    yield "encoding, -OO", "a folder été_图, output in cp1252", 1, strange_name
    yield "encoding, -OO", "python -OO vae.py --sample", 1, lambda: optimised("vae.py")
    yield "encoding, -OO", "python -OO wgan_gp.py --sample", 1, lambda: optimised("wgan_gp.py")
    folder, rest = "cifar-10-batches-py", ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(2, 6))]
    batches = [f"{folder}/{name}" for name in ("data_batch_1", *rest)]
    yield "damaged CIFAR-10", "the archive", 1, lambda: damaged_archive("cifar-10-python.tar.gz")
    yield "damaged CIFAR-10", "data_batch_1", 1, lambda: damaged_archive(*batches)
    yield "torchrun", "wgan_gp.py", 1, undivided


# --- the campaign -----------------------------------------------------------------------------------------------------


def attempt(kind, what, count, fault):
    """Try one fault -> what became of it."""
    survived, lost, HERE.folders = count, 0, []
    try:
        note = fault()
    except Skip as skip:
        count = survived = 0
        note = f"skipped: {what} ({skip})"
    except Fault as error:
        survived, lost, note = 0, int(error.lost), f"{what}: {error}"
    except Exception as error:  # a fault of the campaign itself must not end it, nor pass for survival
        survived, note = 0, f"{what}: {type(error).__name__} {error}"
    for path in HERE.folders:
        shutil.rmtree(path, ignore_errors=True)
    print(f"{kind}: {what}: survived {survived} of {count}{f' ({note})' if note else ''}", file=sys.stderr, flush=True)
    return {"kind": kind, "tried": count, "survived": survived, "lost": lost, "note": note}


def make_images(folder):
    """24 images of two classes to train on, 12 to test."""
    draw = np.random.default_rng(0)
    for i in range(36):
        file = folder / ("test" if i % 3 == 2 else "train") / f"class{i % 2}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((draw.integers(0, 128, (32, 32, 3)) + 127 * (i % 2)).astype(np.uint8)).save(file)


def table(found):
    """The rows that `attempt` gave -> lines of Markdown."""
    lines = ["| fault | tried | survived | lost | |", "| --- | ---: | ---: | ---: | --- |"]
    for kind in [*dict.fromkeys(row["kind"] for row in found), "all"]:
        rows = [row for row in found if kind in (row["kind"], "all")]
        sums = [str(sum(row[key] for row in rows)) for key in ("tried", "survived", "lost")]
        notes = [] if kind == "all" else [NOTES[kind], *(row["note"] for row in rows if row["note"])]
        lines.append(f"| {kind} | {' | '.join(sums)} | {'; '.join(notes).replace('|', chr(92) + '|')} |")
    return lines


def main(argv=None):
    global WORK
    parser = runs.Parser(__doc__)
    parser.add_argument("--kills", type=runs.number(int, 0), default=20, help="SIGKILLs, spread over the trainings")
    parser.add_argument("--seed", type=runs.number(int, 0), default=0, help="of the moments")
    parser.add_argument("--only", choices=NOTES, action="append", help="one kind of fault; may be repeated")
    parser.add_argument("--jobs", type=runs.number(int, 1), default=os.cpu_count(), help="scripts at a time")
    args = parser.parse_args(argv)
    began = time.monotonic()
    wanted = [each for each in campaign(args.kills, args.seed) if each[0] in (args.only or NOTES)]
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        WORK = Path(folder).resolve()
        WORK.chmod(0o755)
        (WORK / "said").mkdir()
        make_images(WORK / "images")
        run_unbroken.cache_clear()
        pool = ThreadPoolExecutor(args.jobs)
        try:
            found = list(pool.map(lambda each: attempt(*each), wanted))
        finally:  # after Ctrl-C, too
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(Child.live):
                child.kill()
    print("", *table(found), "", sep="\n")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    here = runs.versions("cpu")
    print(f"{here['machine']}; torch {here['torch']}; commit {here['commit']}; seed {args.seed}")
    print(f"{spent.ru_utime + spent.ru_stime:.0f} processor seconds, {time.monotonic() - began:.0f} by the clock")
    return int(any(row["survived"] < row["tried"] or row["lost"] for row in found))


if __name__ == "__main__":
    runs.cli(lambda: sys.exit(main()))
