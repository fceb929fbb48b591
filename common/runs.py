"""The plumbing of a run: flags, the run's folder with its lock, log and checkpoints, errors as one sentence.

Everything here is the same for every model, so that a model's script holds only model, losses, loop and plots.
Nothing here knows a model or a data set.

A run lives in runs/<name>/: args.json (flags, versions, commit), log.jsonl (one JSON object a line),
metrics.json (the results), checkpoint.pt (weights, optimiser, step, flags; tensors and plain types only)
and pictures; frames/ holds those that become an animation. Files appear whole or not at all: they are written beside
their place and moved there.
"""

import argparse
import contextlib
import errno
import fcntl
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from common import ranks, streams

ROOT = Path("runs")


# --- what a person can mend ---------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. Its text is one sentence: what is wrong, and what to do. Exit status 2."""


class Interrupted(Exception):
    """The run was asked to stop and has saved itself. Its text says how to go on. Exit status 130."""


def cli(main):
    """Run `main()` as a command: errors that a user can mend become one sentence on stderr, without a traceback."""
    code, message = 0, None
    streams.prepare()
    try:
        main()
    except UserError as error:
        code, message = 2, str(error)
    except Interrupted as stop:
        code, message = 130, str(stop)
    except KeyboardInterrupt:
        code, message = 130, "stopped; whatever was saved before is untouched"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, message = 2, "there is too little free memory for this: free some, or lower --batch-size if there is one"
    name = Path(sys.argv[0]).name
    if message and ranks.is_main():  # torchrun's other processes would say the same
        print(f"\r{name}: {message}", file=sys.stderr)
    elif code == 2 and ranks.world_size() > 1:  # but once at work, one of them can fail alone
        print(f"\r{name}: rank {ranks.rank()}: {message}", file=sys.stderr)
    ranks.leave()
    sys.exit(code)


def is_out_of_memory(error):
    """Whether an exception says that memory ran out, of the device or of the machine."""
    words = ["can't allocate memory", "not enough memory", "can't start new thread"]  # PyTorch's CPU allocator, threads
    words += ["out of memory", "alloc_failed", "failed to cuda calloc"]  # mps, CUDA, cuBLAS, cuDNN, NCCL
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in text for word in words)


# --- flags --------------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults, but for those that say nothing."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and errors as one UserError sentence."""

    def __init__(self, doc):
        first = doc.strip().splitlines()[0] if doc else None  # None with python -OO
        super().__init__(description=first, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, low=-math.inf, high=math.inf, above=-math.inf, words=()):
    """An argparse type: an int or float with low <= value <= high and value > above, or one of `words`."""

    def parse(text):
        if text in words:
            return text
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'}"
            ) from None
        if not (low <= value <= high and value > above and math.isfinite(value)):
            limits = {"at least": low, "above": above, "at most": high}
            bounds = [f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit)]
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {' and '.join(bounds) or 'finite'}")
        return value

    return parse


def run_name(text):
    """An argparse type: a name that stays inside runs/."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a folder: use letters, digits, '.', '_' and '-'")
    return text


def add_run_flags(parser, name):
    """The flags that every script with a run folder has. `name` is the default run name."""
    parser.add_argument("--name", type=run_name, default=name, help="results go to runs/NAME")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of every random draw")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    parser.add_argument("--resume", action="store_true", help="continue runs/NAME from its checkpoint")


def parse(parser, argv, script, reuse=("resume",), may_differ=(), anew=()):
    """Parse argv. With one of the `reuse` flags set, the flags saved in runs/NAME/checkpoint.pt become the defaults.

    A flag given on the command line that contradicts the saved one is an error unless listed in `may_differ`:
    a run continues with what it was started with. `anew`: flags that are not taken from the checkpoint.
    """
    args = parser.parse_args(argv)
    given = [spelled(flag) for flag in reuse if getattr(args, flag, None)]
    if not given:
        return args
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    path = ROOT / args.name / "checkpoint.pt"
    state = load_checkpoint(path)
    check_script(state, script, path)
    if args.resume:
        check_flags_are_known(state, args)
    own = ("name", *reuse, *anew)
    saved = {key: value for key, value in state["args"].items() if hasattr(args, key) and key not in own}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    free = {"device", *may_differ}
    if not args.resume:
        free.discard("epochs")  # nothing is trained
    if getattr(args, "sample", None):
        free.add("seed")  # other samples of the same model
    for key, value in saved.items():
        if getattr(args, key) != value and key not in free:
            raise UserError(
                f"runs/{args.name} was made with {spelled(key)} {value}, not {getattr(args, key)}: "
                f"omit {spelled(key)}, or start another with --name"
            )
    return args


def spelled(key):
    """The flag whose value is args.KEY."""
    return "--" + key.replace("_", "-")


def check_flags_are_known(state, args):
    """Raises UserError when a run used a flag that its script has no more: it would go on as another training."""
    for key, value in state["args"].items():  # a flag that is gone matters where it was on
        if value and value != "off" and not hasattr(args, key):
            raise UserError(
                f"runs/{args.name} was made with {spelled(key)} {value}, which {state['script']} has no more: "
                "go on with it at the commit that its args.json names"
            )


# --- files --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """Yield a temporary path beside `path` that takes its place when the block succeeds, else raise UserError.

    The suffix is kept, since writers of pictures choose the format by it.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def try_writing(path):
    """Raises UserError now, before the work, when `path` could not be written after it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error


def cannot_write(path, error):
    """The sentence for an OSError on writing `path`: what is wrong, and what helps."""
    advice = "choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space or choose another place"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "choose a place that you may write to"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        advice = "a file stands where a folder is needed"
    return f"cannot write {path}: {error.strerror or error}; {advice}"


def write_bytes(path, data):
    with writing(path) as part, open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path, record):
    write_bytes(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def read_json(path):
    """A JSON file's content, or {} when there is none that can be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def save_checkpoint(path, state):
    buffer = io.BytesIO()  # so that a full disk is met by write_bytes, which can say so
    torch.save(state, buffer)
    write_bytes(path, buffer.getbuffer())


def checkpoint_file(path):
    """A run's folder or its checkpoint.pt -> the latter."""
    path = Path(path)
    return path / "checkpoint.pt" if path.is_dir() else path


def load_checkpoint(path):
    """-> the saved dictionary, on the CPU. Raises UserError when there is none or it is not one of `Run.save`."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # compares checksums, which torch.load does not
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint at {path}: train first, or name another run, as runs/NAME") from None
    except Exception as error:  # a damaged file fails in as many ways as it has parts
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError):
            raise UserError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}): train anew") from error
    if not (isinstance(state, dict) and {"script", "args", "step"} <= set(state)):
        raise UserError(f"{path} is not a checkpoint of these scripts: train anew, or give another --name")
    return state


def check_script(state, script, path):
    """Raises UserError unless the checkpoint `state` is one of `script`, e.g. "vae.py"."""
    if state["script"] != script:
        raise UserError(f"{path} was made by {state['script']}, not {script}: give another --name")


def load_weights(module, weights, path):
    """module.load_state_dict with one sentence instead of a list of keys. Raises UserError."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError):
        raise UserError(
            f"{path} holds another architecture than {type(module).__name__}: give the script that made it"
        ) from None


def versions(device):
    """What a result depends on besides its flags. device: as in `machine`."""
    commit = None
    here = Path(__file__).resolve().parents[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "machine": machine(device),
    }


def machine(device):
    """The hardware in words: 'AMD EPYC, 2 threads', or the GPU where `device` does not say cpu; of torchrun's
    processes, which compute on one kind each, how many there are."""
    processes = ranks.world_size()
    if torch.cuda.is_available() and device != "cpu":
        several = f"{processes} x " if processes > 1 else ""
        return several + torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    if torch.backends.mps.is_available() and device != "cpu":
        return f"{cpu}, GPU"
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    threads = torch.get_num_threads()
    words = f"{cpu}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{words}, {processes} processes" if processes > 1 else words


def stop_signals():
    """What asks a process to save and leave: Ctrl-C, SIGTERM, a terminal that closes (unless nohup says to go on)."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def typed(script, argv=None):
    """The command as a person types it, less --resume and what differs between machines. argv: None for sys.argv's."""
    words, rest = ["python", script], iter(sys.argv[1:] if argv is None else argv)
    for word in rest:
        flag, equals, _ = word.partition("=")
        if flag in ("--data-dir", "--device"):
            if not equals:
                next(rest, None)
        elif flag != "--resume":
            words.append(word)
    return shlex.join(words)


def pictures_in(folder):
    """The paths of the pictures and animations that lie in a run's folder itself, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".gif"))


LOCKS = {}  # {file: descriptor} of the locks that this process holds until it ends


def lock(folder, instead=", or give another --name"):
    """Make this process the only one that works in `folder`, until it ends, however it ends. Raises UserError.

    The lock is the operating system's (flock), on the file .NAME.lock beside the folder: what a crashed or killed
    process leaves of it, an unlocked file, hinders nobody.
    """
    path = folder.absolute().with_name(f".{folder.name}.lock")
    if path in LOCKS:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(cannot_write(folder.parent, error)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 500).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise UserError(f"{folder} is in use by {holder}: wait until that ends{instead}") from error
    except OSError as error:  # a file system without locks
        streams.note(f"two runs of one name would not be noticed in {folder.parent}: {error.strerror}")
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} ({command[:300]})".encode(errors="replace"))
    LOCKS[path] = descriptor


class Run:
    """The folder runs/<name>/ and what goes into it, locked while this process lives. Only the main process writes.

    argv: what the script's main was given, None for sys.argv's; args.json keeps it as "command".
    """

    def __init__(self, args, script, argv=None):
        self.folder, self.script = ROOT / args.name, script
        self.args, self.command = vars(args), typed(script, argv)
        if ranks.is_main():
            lock(self.folder)

    def __truediv__(self, name):
        return self.folder / name

    def begin(self):
        """A fresh folder with args.json. A run that is already there is moved aside: nothing is lost."""
        if not ranks.is_main():
            return
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                taken = {path.name for path in ROOT.iterdir()}
                free = next(i for i in range(1, len(taken) + 2) if f"{self.folder.name}.{i}" not in taken)
                aside = self.folder.with_name(f"{self.folder.name}.{free}")
                self.folder.rename(aside)
                print(f"the earlier run in {self.folder} was moved to {aside}")
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(cannot_write(self.folder, error)) from error
        self.write_args()

    def write_args(self):
        """args.json: the command, all flags, and what a result depends on besides them."""
        write_json(self / "args.json", {"script": self.script, "command": self.command, **self.args, **self.versions()})

    def versions(self):
        return versions(self.args.get("device", "cpu"))  # a script without --device computes on the CPU

    def go_on(self):
        """With --resume: args.json adds today's commit, machine and versions to the earlier ones. With other --epochs
        than before it says so, and what was measured before is kept aside.
        """
        if not ranks.is_main():
            return
        made = read_json(self / "args.json")
        if not made:  # somebody took it away
            self.write_args()
            return
        for key, now in self.versions().items():
            before = made.get(key)
            if before and now and now not in before.split("; "):
                made[key] = f"{before}; {now}"
            else:
                made[key] = before or now  # outside of git there is no commit
        before, epochs = made.get("epochs"), self.args.get("epochs")
        if before != epochs:
            with contextlib.suppress(FileNotFoundError):
                (self / "metrics.json").rename(self / f"metrics-epoch{before}.json")
            if "command" in made:
                made["command"] = re.sub(r" --epochs[ =]\S+", "", made["command"]) + f" --epochs {epochs}"
            made["epochs"] = epochs
        write_json(self / "args.json", made)

    def save(self, step, parts, **plain):
        """Write checkpoint.pt. parts: {name: module or optimiser}; `plain` holds plain values and tensors."""
        if ranks.is_main():
            record = {"script": self.script, "args": self.args, "step": step, **plain}
            record |= {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(self / "checkpoint.pt", record)

    def restore(self, parts):
        """Load checkpoint.pt into modules and optimisers. -> the whole record. Raises UserError, also when another
        script made it."""
        state = load_checkpoint(self / "checkpoint.pt")
        check_script(state, self.script, self / "checkpoint.pt")
        for name, part in parts.items():
            if name not in state:
                raise UserError(f"{self / 'checkpoint.pt'} holds no {name}: an earlier version made it; train anew")
            if isinstance(part, torch.optim.Optimizer):
                where = [(group["lr"], group.get("capturable")) for group in part.param_groups]
                part.load_state_dict(state[name])
                for group, (lr, capturable) in zip(part.param_groups, where, strict=True):
                    if isinstance(lr, torch.Tensor):  # it belongs on the device; the checkpoint was read on the CPU
                        group["lr"] = lr.copy_(group["lr"])
                    if capturable is not None:  # of this device, not of the one that made the checkpoint
                        group["capturable"] = capturable
            else:
                load_weights(part, state[name], self / "checkpoint.pt")
        return state

    def log(self, **record):
        """Append one line to log.jsonl."""
        if ranks.is_main():
            try:
                with open(self / "log.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UserError(cannot_write(self / "log.jsonl", error)) from error

    def read_log(self):
        """The log's records, oldest first; [] when there is none."""
        try:
            lines = (self / "log.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a kill
                records.append(json.loads(line))
        return records

    def rewind_log(self, step):
        """Drop the records after `step`: a resumed run writes them again."""
        if ranks.is_main():
            kept = [json.dumps(record) for record in self.read_log() if record.get("step", 0) <= step]
            write_bytes(self / "log.jsonl", "".join(line + "\n" for line in kept).encode())

    def frame(self, step):
        """The path of the picture of that step, for an animation."""
        return self / "frames" / f"{step:08d}.png"

    def frames(self):
        """The paths of those that are there, oldest first."""
        return sorted((self / "frames").glob("[0-9]*.png"))

    def drop_frames(self, step):
        """Delete the frames after `step`: a resumed run draws them again."""
        if ranks.is_main():
            for path in self.frames():
                if path.name > self.frame(step).name:
                    path.unlink(missing_ok=True)

    def summary(self, title, metrics):
        """Print the closing table, and which pictures the run has."""
        print(f"\n{self.folder}: {title}")
        for key, value in metrics.items():
            print(f"  {key:26} {value:.6g}" if isinstance(value, float) else f"  {key:26} {value}")
        print(f"  {'pictures':26} {', '.join(path.name for path in pictures_in(self.folder))}")
