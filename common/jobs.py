"""Parts of an experiment as processes: side by side on GPUs, one after another on a CPU; counted, resumed,
stopped.

A part has a name, a command (a text, as a person types it) and more words that differ between machines, names
of parts that it needs, planned minutes, and a folder under runs/ in which two parts never work at the same
time: see reproduce.Part.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import runs
from common.runs import read_json

ROOT = Path(__file__).resolve().parents[1]
WAIT = 0.2  # seconds between looks at what runs


class Job:
    """A part's process. Ctrl-C in a terminal does not reach it: it gets one SIGINT from `Queue.halt`."""

    def __init__(self, part, gpu, folder, resume):
        self.part, self.resume, self.began = part, resume, time.perf_counter()
        self.out, self.err, self.note = (folder / f"{part.name}.{end}" for end in ("out", "err", "json"))
        words = [sys.executable, str(ROOT / part.script), *part.command.split()[2:], *part.where]
        if resume:
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

    def conclude(self, finished):
        """Note down what it took. -> None, or why it failed."""
        part, code = self.part, self.process.returncode
        if part.prints and code == 0:
            with contextlib.suppress(ValueError):  # without it the part is not finished, which is said below
                printed = json.loads("{" + self.out.read_text().rpartition("\n{\n")[2])
                runs.write_json(runs.ROOT / part.folder / "metrics.json", printed)
        before = read_json(self.note).get("seconds", 0) if self.resume else 0
        note = {"seconds": before + self.seconds(), "versions": runs.versions("cpu" if part.cpu else None)}
        runs.write_json(self.note, note | ({"command": part.command} if code == 0 else {}))
        if code:
            return self.last() or f"exit status {code}"
        if not finished(part):
            return f"it ended well but left no such {'distances' if part.rulers else 'metrics.json'}"


def slots(device):
    """Where parts run at the same time: the GPUs, and '' for the CPU, or whatever --device says."""
    n = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))).split(",")[:n]
    return [*gpus, ""]


class Queue:
    """The parts named in `todo`: which wait, run, have failed.

    parts: {name: Part} of all; device: reproduce.py's --device; folder: of what parts print, and notes of them;
    finished, resumable: functions of a part; lost: {name: why} of other parts that are not there.
    """

    def __init__(self, todo, parts, device, folder, finished, resumable, lost):
        self.todo, self.parts, self.places, self.folder = todo, parts, slots(device), folder
        self.finished, self.resumable = finished, resumable
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
            for job in self.jobs.values():  # none is left behind, whatever went wrong here
                if job.process.poll() is None:
                    job.process.send_signal(signal.SIGINT)
        return self.failed

    def collect(self):
        """What has ended."""
        for gpu, job in list(self.jobs.items()):
            if job.process.poll() is not None:
                del self.jobs[gpu]
                why = job.conclude(self.finished)
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
                self.jobs[free[0]] = Job(part, free[0], self.folder, self.resumable(part))
                self.waiting.remove(name)

    def counted(self):
        return f"[{len(self.todo) - len(self.waiting) - len(self.jobs)}/{len(self.todo)}]"

    def left(self):
        """The time left in words, by what the parts that ran took, and were planned to take."""
        notes = {name: read_json(self.folder / f"{name}.json") for name in self.parts}
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
            job.conclude(self.finished)
        raise runs.Interrupted("stopped; the same command goes on from here")


def say(text):
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
