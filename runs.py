"""The plumbing of a run: flags, run folder, log, checkpoints, stopping, errors, torchrun's processes.

Everything here is the same for every model, so that a model's script holds only model, losses, loop and plots.
Nothing here knows a model or a data set.

A run lives in runs/<name>/: args.json (flags, versions, commit), log.jsonl (one JSON object a line),
metrics.json (the results), checkpoint.pt (weights, optimiser, step, flags; tensors and plain types only)
and pictures. Files appear whole or not at all: they are written beside their place and moved there.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draw into files; no screen needed
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

ROOT = Path("runs")


# --- what a person can mend ---------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. Its text is one sentence: what is wrong, and what to do. Exit status 2."""


class Interrupted(Exception):
    """The run was asked to stop and has saved itself. Its text says how to go on. Exit status 130."""


def cli(main):
    """Run `main()` as a command: errors that a user can mend become one sentence on stderr, without a traceback."""
    code, message = 0, None
    try:
        main()
    except UserError as error:
        code, message = 2, str(error)
    except Interrupted as stop:
        code, message = 130, str(stop)
    except KeyboardInterrupt:
        code, message = 130, "stopped; whatever was saved before is untouched"
    except torch.OutOfMemoryError:
        code, message = 2, "the device has too little free memory for this; a smaller --batch-size helps"
    if message and os.environ.get("RANK", "0") == "0":  # torchrun's other processes would say the same
        print(f"\r{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# --- flags --------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and errors as one UserError sentence."""

    def __init__(self, doc):
        first = doc.strip().splitlines()[0]
        super().__init__(description=first, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)

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
            bounds = [f"at least {low}"] * (low > -math.inf) + [f"above {above}"] * (above > -math.inf)
            bounds += [f"at most {high}"] * (high < math.inf)
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
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of every random draw")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    parser.add_argument("--resume", action="store_true", help="continue runs/NAME from its checkpoint")


def parse(parser, argv=None, reuse=("resume",), may_differ=()):
    """Parse argv. With one of the `reuse` flags set, the flags saved in runs/NAME/checkpoint.pt become the defaults.

    A flag given on the command line that contradicts the saved one is an error unless listed in `may_differ`:
    a run continues with what it was started with.
    """
    args = parser.parse_args(argv)
    # argparse does not tell defaults from given flags: a second pass with suppressed defaults does.
    bare = argparse.Namespace(**dict.fromkeys(vars(args), argparse.SUPPRESS))
    parser.parse_args(argv, namespace=bare)
    given = {key for key, value in vars(bare).items() if value is not argparse.SUPPRESS}
    if any(getattr(args, flag, None) for flag in reuse):
        saved = load_checkpoint(ROOT / args.name / "checkpoint.pt")["args"]
        free = {"name", "device", *reuse, *may_differ}
        for key, value in saved.items():
            if key in free or not hasattr(args, key):
                continue
            if key in given and getattr(args, key) != value:
                flag = "--" + key.replace("_", "-")
                raise UserError(
                    f"runs/{args.name} was made with {flag} {value}, not {getattr(args, key)}: "
                    f"leave {flag} away, or start another with --name"
                )
            setattr(args, key, value)
        for key in set(saved) & {"device", *may_differ} - given:  # not fixed, but the saved value is the better default
            setattr(args, key, saved[key])
    return args


# --- several processes (torchrun) ---------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True in the one process that writes files and prints."""
    return rank() == 0


def shard(tensor):
    """This rank's rows of a global batch, which every rank has drawn alike. Rows must divide among the ranks."""
    return tensor[rank() :: world_size()] if world_size() > 1 else tensor


def check_batch(batch_size, images):
    """Raises UserError unless a batch gives each rank as many images, at least two, and the images fill one."""
    n = world_size()
    if batch_size % n or batch_size < 2 * n:  # batch norm needs two
        raise UserError(f"--batch-size {batch_size} does not divide among {n} processes: choose {2 * n} or a multiple")
    if images < batch_size:
        raise UserError(f"{images} training images do not fill a batch of {batch_size}: lower --batch-size")


def all_reduce_mean(*tensors):
    """Average tensors over ranks, in place, with one message. A no-op for one rank.

    Works for gradients from torch.autograd.grad too, which DistributedDataParallel's hooks never see.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def average_gradients(parameters):
    all_reduce_mean(*(p.grad for p in parameters if p.grad is not None))


def average_buffers(*modules):
    """Average batch norm's running statistics over ranks: each rank has seen its own part of every batch."""
    all_reduce_mean(*(b for module in modules for b in module.buffers() if b.is_floating_point()))


def group_device():
    """The device on which the process group's messages live."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def leave_group():
    """End the ranks' common work, e.g. after training. -> True in the process that goes on, False in the others."""
    main = is_main()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return main


def main_first(function):
    """Call function() in the main process first (it may download or cache), then in the others. -> its result."""
    if world_size() == 1:
        return function()
    failed, result = torch.zeros(1, device=group_device()), None
    if is_main():
        try:
            result = function()
        except BaseException:
            failed += 1
            dist.all_reduce(failed)
            raise
    dist.all_reduce(failed)
    if failed.item():
        sys.exit(2)  # the main process has said why
    return result if is_main() else function()


# --- stopping -----------------------------------------------------------------------------------------------------


class Stop:
    """Whether to stop, for a loop to ask after each step. Several ranks agree, and do so at every 20th step."""

    requested = False

    def now(self, step):
        if world_size() == 1:
            return self.requested
        if step % 20:
            return False
        flag = torch.tensor(float(self.requested), device=group_device())
        dist.all_reduce(flag)
        return flag.item() > 0


@contextlib.contextmanager
def stop_on_signal():
    """In this context Ctrl-C and SIGTERM are noted in a `Stop`, for the loop to save and leave between two steps."""
    stop = Stop()

    def request(signum, frame):
        stop.requested = True

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def check_finite(value, step, advice):
    """Raise UserError, with what to change, when a logged loss is nan or infinite."""
    if not math.isfinite(value):
        raise UserError(f"the loss became {value} at step {step}: {advice}; the last checkpoint is untouched")


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
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_bytes(path, data):
    with writing(path) as part, open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def save_figure(figure, path, dpi="figure"):
    """Write a matplotlib figure and close it."""
    with writing(path) as part:
        figure.savefig(part, dpi=dpi)
    plt.close(figure)


def plot_curves(log, path, titles):
    """One panel for each key of `titles`, against epochs, from the records of log.jsonl.

    Records that hold "loss" are of training batches, the others of test images.
    """
    figure, axes = plt.subplots(1, len(titles), figsize=(4.4 * len(titles), 3.6), dpi=100, layout="constrained")
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        train, test = ([r for r in log if key in r and ("loss" in r) == kind] for kind in (True, False))
        ax.plot([r["epoch"] for r in train], [r[key] for r in train], lw=0.8, label="training batches")
        ax.plot([r["epoch"] for r in test], [r[key] for r in test], "o-", ms=3, label="test images")
        values = [r[key] for r in train[len(train) // 20 :] + test]  # the first steps would flatten the rest
        if values:
            room = 0.05 * (max(values) - min(values)) or 1.0
            ax.set_ylim(min(values) - room, max(values) + room)
        ax.set(xlabel="epoch", title=title)
        ax.grid(alpha=0.3)
    axes[0].legend()
    save_figure(figure, path)


def write_json(path, record):
    write_bytes(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def save_checkpoint(path, state):
    buffer = io.BytesIO()  # so that a full disk is met by write_bytes, which can say so
    torch.save(state, buffer)
    write_bytes(path, buffer.getbuffer())


def load_checkpoint(path):
    """-> the saved dictionary, on the CPU. Raises UserError when there is none or it is not one of `Run.save`."""
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint at {path}: train first, or give its --name") from None
    except Exception as error:  # a damaged file fails in as many ways as it has parts
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}): train anew") from error
    if not (isinstance(state, dict) and {"script", "args", "step"} <= set(state)):
        raise UserError(f"{path} is not a checkpoint of these scripts: train anew, or give another --name")
    return state


def load_weights(module, weights, path):
    """module.load_state_dict with one sentence instead of a list of keys. Raises UserError."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError):
        raise UserError(
            f"{path} holds another architecture than {type(module).__name__}: give the script that made it"
        ) from None


def versions():
    """What a result depends on besides its flags."""
    commit = None
    here = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "machine": machine(),
    }


def machine():
    """The hardware in words, e.g. 'AMD EPYC, 2 threads' or a GPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    return f"{cpu}, {torch.get_num_threads()} threads"


class Run:
    """The folder runs/<name>/ and what goes into it. Only the main process writes."""

    def __init__(self, args, script):
        self.folder, self.script = ROOT / args.name, script
        self.args = vars(args)

    def __truediv__(self, name):
        return self.folder / name

    def begin(self):
        """A fresh folder with args.json. A run that is already there is moved aside: nothing is lost."""
        if not is_main():
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
            raise UserError(
                f"cannot make {self.folder}: {error.strerror or error}; run from a folder you can write"
            ) from error
        write_json(self / "args.json", {"script": self.script, **self.args, **versions()})

    def save(self, step, seconds, parts, **plain):
        """Write checkpoint.pt. parts: {name: module or optimiser}; `plain` holds plain values and tensors."""
        if is_main():
            record = {"script": self.script, "args": self.args, "step": step, "seconds": seconds, **plain}
            record |= {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(self / "checkpoint.pt", record)

    def restore(self, parts):
        """Load checkpoint.pt into modules and optimisers. -> the whole record."""
        state = self.load()
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                where = [group["lr"] for group in part.param_groups]
                part.load_state_dict(state[name])
                for group, lr in zip(part.param_groups, where, strict=True):
                    if isinstance(lr, torch.Tensor):  # it belongs on the device; the checkpoint was read on the CPU
                        group["lr"] = lr.copy_(group["lr"])
            else:
                load_weights(part, state[name], self / "checkpoint.pt")
        return state

    def load(self):
        """-> the checkpoint of this run. Raises UserError when another script made it."""
        state = load_checkpoint(self / "checkpoint.pt")
        if state.get("script") != self.script:
            raise UserError(
                f"{self / 'checkpoint.pt'} was made by {state.get('script')}, not {self.script}: give another --name"
            )
        return state

    def log(self, **record):
        """Append one line to log.jsonl."""
        if is_main():
            try:
                with open(self / "log.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self / 'log.jsonl'}: {error.strerror or error}") from error

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
        if is_main():
            kept = [json.dumps(record) for record in self.read_log() if record.get("step", 0) <= step]
            write_bytes(self / "log.jsonl", "".join(line + "\n" for line in kept).encode())

    def earlier_distances(self, step):
        """The Frechet distances that metrics.json already holds of the weights at `step`: they took long to measure."""
        try:
            old = json.loads((self / "metrics.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return {k: v for k, v in old.items() if k.startswith(("fid_", "fd_"))} if old.get("step") == step else {}

    def summary(self, title, metrics, pictures):
        """Print the closing table."""
        print(f"\n{self.folder}: {title}")
        for key, value in metrics.items():
            print(f"  {key:26} {value:.4f}" if isinstance(value, float) else f"  {key:26} {value}")
        print(f"  {'pictures':26} {', '.join(pictures)}")

    def stop(self, step, total):
        """Raise Interrupted with the way to go on. Call after save()."""
        raise Interrupted(
            f"stopped at step {step} of {total} and saved; "
            f"`python {self.script} --name {self.folder.name} --resume` goes on."
        )
