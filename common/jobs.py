"""Parts of an experiment: which are finished, and the others as processes, side by side where there are GPUs."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common import runs

SCRIPTS = Path(__file__).resolve().parents[1]
WAIT = 0.2  # seconds between looks at what runs


@dataclass(frozen=True)
class Part:
    """`command`, as a person types it, leaves runs/FOLDER/metrics.json."""

    name: str
    command: str
    folder: str
    minutes: float  # on two CPU cores, roughly
    where: tuple = ()  # more words, which differ between machines
    needs: tuple = ()  # names of parts
    rulers: dict | None = None  # {ruler: its features}, of a part that adds distances to a model's metrics.json
    cpu: bool = False  # gains nothing from a GPU

    @property
    def script(self):
        return self.command.split()[1]

    def __truediv__(self, file):
        return runs.ROOT / self.folder / file

    def finished(self, parts):
        """Whether its metrics.json is there, made with its flags and later than what it needs."""
        metrics = runs.read_json(self / "metrics.json")
        needed = [self / "checkpoint.pt", *map(Path, (self.rulers or {}).values())]
        needed += [parts[name] / "checkpoint.pt" for name in self.needs]
        newest = max((file.stat().st_mtime for file in needed if file.exists()), default=0)
        if not metrics or newest > (self / "metrics.json").stat().st_mtime:
            return False
        if self.rulers is not None:
            return all(f"{ruler}_generation_expost" in metrics for ruler in self.rulers)
        return self.made_with() == flags(self.command)  # in whatever order

    def resumable(self):
        """Whether its training can go on from a checkpoint: of the same flags, or the same but for fewer --epochs."""
        was, wanted = self.made_with(), flags(self.command)
        before, after = was.get("--epochs", ""), wanted.get("--epochs", "")
        if before.isdigit() and after.isdigit() and int(before) < int(after):
            was["--epochs"] = after
        return was == wanted and (self / "checkpoint.pt").exists()

    def made_with(self):
        return flags(runs.read_json(self / "args.json").get("command", ""))


def flags(command):
    """-> {flag: its value}, where python's value is the script with its arguments."""
    found = {}
    for words in re.split(" (?=--)", command):
        flag, _, value = words.partition(" ")
        found[flag] = value
    return found


class Job:
    """A part's process. Ctrl-C in a terminal does not reach it: it gets one SIGINT from `Queue.halt`."""

    def __init__(self, part, place, folder):
        self.part, self.began, resume = part, time.perf_counter(), part.resumable()
        self.out, self.err, self.note = (folder / f"{part.name}.{end}" for end in ("out", "err", "json"))
        self.earlier = runs.read_json(self.note).get("seconds", 0) if resume else 0
        words = [sys.executable, str(SCRIPTS / part.script), *part.command.split()[2:], *part.where]
        if resume:
            words.append("--resume")
        environment = os.environ | {"TQDM_MININTERVAL": "1"}
        if place:
            environment["CUDA_VISIBLE_DEVICES"] = place
        for file in (self.out, self.err):
            file.unlink(missing_ok=True)  # not emptied: what a killed reproduce.py left running writes on into it
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
            self.process = subprocess.Popen(words, env=environment, start_new_session=True, **streams)

    def seconds(self):
        return time.perf_counter() - self.began

    def last(self):
        """What stands last on its stderr: a progress bar, or why it failed."""
        lines = self.err.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def conclude(self, parts):
        """Note down what it took. -> why it failed, or None."""
        part, code = self.part, self.process.returncode
        runs.write_json(self.note, {"seconds": self.earlier + self.seconds()})
        if code:
            return self.last() or f"exit status {code}"
        if not part.finished(parts):
            return f"it ended well but left no such {'distances' if part.rulers else 'metrics.json'}"


def slots(device):
    """Where parts run at the same time: the GPUs, and '' for the CPU, or whatever --device says."""
    n = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(n)]
    return [*gpus[:n], ""]


class Queue:
    """Parts that are to run. parts: {name: Part} of all; todo: names of those to run; absent: names of those that are
    neither finished nor to run; folder: of what they print."""

    def __init__(self, parts, todo, absent, device, folder):
        self.parts, self.absent, self.folder, self.places = parts, absent, folder, slots(device)
        self.waiting = [part for name, part in parts.items() if name in todo]
        self.jobs, self.failed = {}, {}  # {place: Job}, {name: why}
        self.total, self.planned = len(todo), 0  # planned: minutes of the parts that have ended
        self.began, self.left = time.perf_counter(), ""  # left: the time left in words
        self.stops = 0  # Ctrl-C and SIGTERM so far

    def run(self):
        """Run them all. -> {name: why} of the failed ones. Raises Interrupted."""

        def stop(which, frame):
            self.stops += 1

        with contextlib.ExitStack() as at_the_end:  # the last callback first, whatever goes wrong
            for which in runs.stop_signals():
                at_the_end.callback(signal.signal, which, signal.signal(which, stop))
            at_the_end.callback(self.halt)  # no process is left behind
            while self.pending() and not self.stops:
                self.collect()
                self.begin()
                self.show()
                time.sleep(WAIT)
        if self.stops:
            raise runs.Interrupted("stopped; the same command goes on from here")
        return self.failed

    def collect(self):
        """What has ended."""
        for place, job in list(self.jobs.items()):
            if job.process.poll() is not None:
                del self.jobs[place]
                why = job.conclude(self.parts)
                if why:
                    self.failed[job.part.name] = why
                else:
                    self.planned += job.part.minutes
                rest = sum(part.minutes for part in self.pending())
                self.left = ""
                if rest and self.planned:
                    pace = (time.perf_counter() - self.began) / 60 / self.planned
                    self.left = f", about {rest * pace:.1f} min left"
                say(f"{self.progress()} {job.part.name}: {why or f'{job.seconds():.0f} s'}{self.left}")

    def begin(self):
        """Each part whose place is free and that waits for no other; those that need a failed one never."""
        for part in list(self.waiting):
            missing = next((name for name in part.needs if name in self.failed or name in self.absent), None)
            if missing:
                state = "failed" if missing in self.failed else "is not finished"
                self.failed[part.name] = f"not run: it needs {missing}, which {state}"
                self.waiting.remove(part)
                continue
            free = [place for place in self.places if place not in self.jobs]
            if len(self.places) > 1:
                free = [place for place in free if part.cpu == (place == "")]
            early = any(other.name in part.needs for other in self.pending())
            if free and not early:
                self.jobs[free[0]] = Job(part, free[0], self.folder)
                self.waiting.remove(part)

    def show(self):
        """A line that stays, on a terminal: what the first of the running parts says last."""
        if sys.stderr.isatty() and self.jobs:
            job = next(iter(self.jobs.values()))
            line = f"{self.progress()}{self.left}  {job.part.name} {job.last()}"
            print(f"\r{line[: os.get_terminal_size(2).columns - 1]}\033[K", end="", file=sys.stderr, flush=True)

    def pending(self):
        return [*(job.part for job in self.jobs.values()), *self.waiting]

    def progress(self):
        return f"[{self.total - len(self.pending())}/{self.total}]"

    def halt(self):
        """Ask the processes to save themselves and wait; a second Ctrl-C ends them."""
        if self.stops:
            say("stopping: what runs saves itself first; Ctrl-C again ends it at once")
        for job in self.jobs.values():
            job.process.send_signal(signal.SIGINT)
        for job in self.jobs.values():
            while job.process.poll() is None:
                if self.stops > 1:
                    job.process.kill()
                time.sleep(WAIT)
        for job in self.jobs.values():  # after all have ended: this writes, which may fail
            job.conclude(self.parts)


def say(text):
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
