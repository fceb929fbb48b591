"""What all trainings promise alike: they resume bit for bit, stop on Ctrl-C, survive a full disk and a kill, refuse
nan and bad flags, and move an earlier run aside.

pytest tests/test_promises.py -k wgan_gp         # one script alone

Each training has 4 steps and a checkpoint at every second one. The third step lies in the middle of an epoch and
between two lines of the log.
"""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import helpers
import pytest
import torch
from helpers import DEVICES, ROOT, checkpoint, ctrl_c_in, environment, log, metrics, same, write_images

import classifier
import probe
import vae
import vae_gan
import wgan_gp
from common import runs
from common.loop import Loop

IMAGES = ("--data", "images", "--batch-size", 30, "--epochs", 2)  # of 60 training images: two steps an epoch
SMALL = ("--latent-dim", 2)
ONE_STEP = ("--batch-size", 60, "--epochs", 1)  # whose loss is still finite, unlike its weights


@dataclasses.dataclass(frozen=True)
class Script:
    module: ModuleType
    short: tuple  # flags of a training of four steps
    long: tuple  # and what makes it last for hours
    diverges: tuple  # flags with which the loss is not finite
    advice: str  # what is said then
    other: tuple  # a flag and a value that contradict `short`, and what it was made with
    bad: dict  # flags that are refused: what the sentence says of them

    @property
    def name(self):
        return self.module.__name__

    @property
    def stranger(self):
        """Another script, and flags with which it gets as far as to this one's checkpoint."""
        if self.module is wgan_gp:
            return vae, ("--data", "images")
        if self.module is vae:
            return vae_gan, ()
        return wgan_gp, ()

    def main(self, argv):
        if self.module is probe and "--resume" not in argv:
            argv = ["--supervised", *argv]
        self.module.main([str(word) for word in argv])

    def run(self, *argv):
        self.main(argv)


OF_IMAGES = {
    ("--epochs", -1): "out of range",
    ("--lr", "blue"): "'blue' is not a number",
    ("--device", "warp"): "--device warp",
    ("--device", "cpu", "--precision", "tf32"): "tf32 is a mode of CUDA",
    ("--data", "nowhere"): "neither cifar10, shapes nor a folder",
    ("--data", "images", "--batch-size", 61): "do not fill a batch",
    ("--data", "images", "--holdout", 60): "leaves nothing",
    ("--resume",): "there is no checkpoint",
    ("--epoch", 5): "unrecognized arguments",
}
OF_A_MODEL = {
    ("--sample", 5): "there is no checkpoint",
    ("--device", "cpu", "--capture"): "--capture takes a CUDA device",
    ("--data", "images", "--batch-size", 30, "--features", "no.pt2", "--fid", 9): "cannot read --features",
}

SCRIPTS = [
    Script(
        vae,
        short=(*IMAGES, *SMALL, "--log-every", 2),
        long=("--epochs", 100_000),
        diverges=("--lr", 1e8, *ONE_STEP),
        advice="lower --lr, or raise --sigma",
        other=("--latent-dim", 8, 2),
        bad=OF_IMAGES | OF_A_MODEL | {("--sigma", "blue"): "'blue' is not a number"},
    ),
    Script(
        vae_gan,
        short=(*IMAGES, *SMALL, "--log-every", 2, "--patches", 10),
        long=("--epochs", 100_000),
        diverges=("--lr", 1e8, *ONE_STEP),
        advice="lower --lr, and start anew; an earlier checkpoint",
        other=("--feature-layer", "fc", "conv2"),
        bad=OF_IMAGES
        | OF_A_MODEL
        | {
            ("--gamma", -1): "--gamma: -1 is out of range",
            ("--feature-layer", "conv9"): "invalid choice: 'conv9'",
            ("--beta", 2): "unrecognized arguments: --beta",
            ("--data", "images", "--batch-size", 30, "--compare", "runs/nothing"): "there is no checkpoint",
        },
    ),
    Script(
        wgan_gp,
        short=(
            "--iterations",
            4,
            "--plot-every",
            2,
            "--log-every",
            2,
            "--width",
            8,
            "--critic-width",
            8,
            "--batch-size",
            30,
            *SMALL,
        ),
        long=("--iterations", 100_000_000),
        diverges=("--lr", 1e30, "--critic-lr", 1e30),
        advice="lower --lr and --critic-lr",
        other=("--width", 16, 8),
        bad={
            ("--loss", "hinge"): "invalid choice",
            ("--latent-dim", 0): "at least 1",
            ("--sigma", 0): "at least 0.0001",
            ("--ema", 1): "at most",
            ("--iteration", 5): "unrecognized",
            ("--sample", 5): "no checkpoint",
            ("--resume",): "no checkpoint",
            ("--device", "cpu", "--capture"): "--capture takes a CUDA device",
            ("--device", "warp"): "--device warp",
        },
    ),
    Script(
        classifier,
        short=(*IMAGES, "--log-every", 2),
        long=("--epochs", 100_000),
        diverges=("--lr", 1e30, *ONE_STEP),
        advice="lower --lr",
        other=("--epochs", 3, 2),
        bad=OF_IMAGES | {("--data", "images/class0", "--batch-size", 10): "has one class"},
    ),
    Script(
        probe,
        short=(*IMAGES, *SMALL, "--log-every", 2),
        long=("--epochs", 100_000),
        diverges=("--lr", 1e30, *ONE_STEP),
        advice="lower --lr",
        other=("--batch-size", 20, 30),
        bad=OF_IMAGES
        | {
            ("--against", "runs/vae"): "--against, --layer and --latent are of a probe",
            ("--layer",): "are of a probe",
            ("runs/vae",): "give either a checkpoint",
            ("--data", "images/class0"): "has one class",
        },
    ),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    helpers.quickly(monkeypatch)


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.name)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def place(script, tmp_path_factory):
    """A folder with images/, for a script's runs."""
    folder = tmp_path_factory.mktemp(script.name)
    write_images(folder / "images")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module", params=DEVICES)
def whole(request, script, place):
    """-> the device; runs/whole-DEVICE is the unbroken run there."""
    device = request.param
    with pytest.MonkeyPatch.context() as patch:
        helpers.quickly(patch)
        patch.chdir(place)
        script.run(*script.short, "--device", device, "--name", f"whole-{device}")
    return device


def equals_the_unbroken_run(name, device):
    """On a CPU bit for bit. On CUDA sums of floating-point numbers may change their order from run to run."""
    unbroken = f"whole-{device}"
    if device == "cpu":
        assert same(checkpoint(unbroken), checkpoint(name))
        assert log(unbroken) == log(name)
    else:
        assert same(checkpoint(unbroken), checkpoint(name), rtol=1e-3, atol=1e-4)
        assert [record["step"] for record in log(unbroken)] == [record["step"] for record in log(name)]


# --- stopping and going on ----------------------------------------------------------------------------------------


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not(script, whole, here, monkeypatch, capsys):
    name = f"broken-{whole}"
    earlier = Path("runs", name, "notes.txt")
    earlier.parent.mkdir()
    earlier.write_text("of an earlier run")
    how = f"stopped at step 3 of 4 and saved; `python {script.name}.py --name {name} --resume` goes on"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted, match=re.escape(how)):
        ctrl_c_in(patch, 3)
        script.run(*script.short, "--device", whole, "--name", name)
    assert signal.getsignal(signal.SIGINT) == handler  # Ctrl-C is again what it was
    stopped = checkpoint(name)
    assert stopped["step"] == 3
    assert Path("runs", f"{name}.1", "notes.txt").read_text() == "of an earlier run"
    assert f"was moved to runs/{name}.1" in capsys.readouterr().out and not Path("runs", name, "notes.txt").exists()

    script.run("--name", name, "--resume")
    equals_the_unbroken_run(name, whole)
    assert set(metrics(f"whole-{whole}")) == set(metrics(name))
    for clock in ("seconds", "cpu_seconds"):  # of both parts
        assert checkpoint(name)[clock] > stopped[clock] > 0


def test_a_full_disk_keeps_the_previous_checkpoint_from_which_the_run_goes_on(
    script, whole, here, monkeypatch, refused
):
    name = f"full-{whole}"
    fsync = os.fsync

    def full(file):
        if Path("runs", name, "checkpoint.pt").exists():  # the first checkpoint still fits
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "fsync", full)
        flags = [*script.short, "--device", whole, "--name", name]
        message = refused(script.main, *flags)
    assert "No space left on device" in message and "checkpoint.pt" in message
    assert checkpoint(name)["step"] == 2
    assert not list(Path("runs", name).glob(".*"))  # nothing half-written is left
    script.run("--name", name, "--resume")
    equals_the_unbroken_run(name, whole)


def test_a_flag_that_contradicts_the_run_is_refused(script, whole, here, refused):
    name = f"whole-{whole}"
    before = Path("runs", name, "log.jsonl").read_bytes()
    assert f"runs/{name} was made with --seed 0, not 1: omit --seed" in refused(
        script.main, "--name", name, "--resume", "--seed", 1
    )
    flag, value, made = script.other
    assert f"was made with {flag} {made}, not {value}" in refused(script.main, "--name", name, "--resume", flag, value)
    other, flags = script.stranger
    words = f"was made by {script.name}.py, not {other.__name__}.py"
    assert words in refused(other.main, "--name", name, "--resume", *flags)
    if script.module in (vae, vae_gan):  # a training may be made longer, but not shorter than it is
        assert "is at step 4, past --epochs 1" in refused(script.main, "--name", name, "--resume", "--epochs", 1)
    assert Path("runs", name, "log.jsonl").read_bytes() == before


def test_another_seed_is_another_run(script, whole, here, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        ctrl_c_in(patch, 2)
        script.run(*script.short, "--device", whole, "--name", "seed", "--seed", 1)
    ours, theirs = log("seed")[0], log(f"whole-{whole}")[0]
    assert ours["step"] == theirs["step"] == 2 and ours != theirs


# --- numbers that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_diverging_run_says_what_to_change_and_saves_no_nonsense(script, here, refused, log_every):
    flags = [*script.short, "--device", "cpu", "--name", "diverges", "--log-every", log_every, *script.diverges]
    message = refused(script.main, *flags)
    assert re.search(r" became (-?inf|nan|infinite or nan) at step", message) and script.advice in message
    found = Path("runs/diverges/checkpoint.pt")
    assert not found.exists()


def test_weights_that_become_nan_leave_the_last_good_checkpoint(script, here, monkeypatch, refused):
    """Also where Ctrl-C is pressed before anything is logged or measured."""
    steps = Loop.__iter__

    def poisoned(loop):
        for step in steps(loop):
            if step == 3:
                for part in loop.parts.values():
                    if isinstance(part, torch.nn.Module):
                        for parameter in part.parameters():
                            parameter.data.fill_(float("nan"))
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "__iter__", poisoned)
        ctrl_c_in(patch, 3)
        flags = [*script.short, "--device", "cpu", "--name", "poisoned", "--log-every", 1000]
        message = refused(script.main, *flags)
    assert "at step 3" in message and script.advice in message
    assert checkpoint("poisoned")["step"] == 2


# --- bad flags ----------------------------------------------------------------------------------------------------


def test_bad_flags_get_one_sentence_and_leave_nothing(script, place, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    os.symlink(place / "images", "images")
    for argv, words in script.bad.items():
        assert words in refused(script.main, *argv), argv
    left = os.listdir("runs") if Path("runs").exists() else []
    assert all(name.startswith(".") and name.endswith(".lock") for name in left)


# --- real processes -----------------------------------------------------------------------------------------------


def start(script, *argv):
    """The script as a process of its own, here; -> the process."""
    words = [sys.executable, ROOT / "tests" / "quick.py", script.name, *argv]
    if script.module is probe:
        words.append("--supervised")
    pipe = subprocess.PIPE
    return subprocess.Popen([str(word) for word in words], stdout=pipe, stderr=pipe, text=True, env=environment())


def wait_until(condition, process, seconds=300):
    """Wait for a condition, at most so long. -> whether it came true."""
    end = time.time() + seconds
    while time.time() < end:
        if condition():
            return True
        if process.poll() is not None:
            pytest.fail(f"the process has ended: {process.communicate()}")
        time.sleep(0.001)
    return False


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_ctrl_c_saves_it(script, here, refused):
    if script.module not in (vae, wgan_gp):
        pytest.skip("benchmarks/faults.py kills all five; here their Loop is the same, and a process takes its time")
    flags = ["--device", "cpu", "--name", "killed"]
    file = Path("runs/killed/checkpoint.pt")
    process = start(script, *script.short, *script.long, *flags)
    try:
        assert wait_until(file.exists, process)
        in_use = refused(script.main, *script.short, *flags)
        wait_until(lambda: list(file.parent.glob(".checkpoint.*")), process, seconds=5)  # half of the next one
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert "runs/killed is in use by process" in in_use and f"{script.name}.py" in in_use
    step = checkpoint("killed")["step"]
    assert step >= 2 and step % 2 == 0

    lines = file.with_name("log.jsonl")
    with open(lines, "a") as end:
        end.write('\n{"step": 123456789}\n{"step": 1234')  # a line after the checkpoint, and one cut short
    process = start(script, "--name", "killed", "--resume")
    try:
        assert wait_until(lambda: "123456789" not in lines.read_text(), process)
        kept = lines.read_text().count("\n")
        assert wait_until(lambda: lines.read_text().count("\n") > kept, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said
    stopped = int(re.search(r"stopped at step (\d+) of", said).group(1))
    assert f"python {script.name}.py --name killed --resume" in said
    assert checkpoint("killed")["step"] == stopped > step
    steps = [record["step"] for record in log("killed")]
    assert steps == sorted(steps) and steps[-1] <= stopped
