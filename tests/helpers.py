"""What several test files need of runs: to start them as processes, to interrupt them, to compare what they leave."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn

import vae
import vae_gan
import wgan_gp
from common import images, patches, pictures, runs, two_gaussians
from common.loop import Loop

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def write_images(folder):
    """72 PNG images of two classes, a dark and a bright one; by their names 60 are to train on, 12 to test on."""
    random = np.random.default_rng(0)
    for i in range(72):
        pixels = random.integers(0, 128, (32, 32, 3)) + 127 * (i % 2)
        file = folder / f"class{i % 2}" / f"u{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)


def no_figures(patch):
    def save(figure, path, **options):
        plt.close(figure)
        Image.new("RGB", (8, 8)).save(path)

    patch.setattr(pictures, "save_figure", save)


class SmallEncoder(vae.Encoder):
    """vae.Encoder with other layers: what it is to a training, with next to no arithmetic."""

    def __init__(self, latent_dim=128):
        nn.Module.__init__(self)  # none of the large layers
        convolution = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.features = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16))
        self.mu, self.logvar = nn.Linear(16, latent_dim), nn.Linear(16, latent_dim)


class SmallDecoder(vae.Decoder):
    def __init__(self, latent_dim=128):
        nn.Module.__init__(self)
        self.net = nn.Sequential(
            nn.Linear(latent_dim, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Unflatten(1, (8, 8, 8)),
            nn.ConvTranspose2d(8, 3, kernel_size=4, stride=4),
            nn.Sigmoid(),
        )


class SmallDiscriminator(nn.Module):
    def __init__(self, feature_layer="conv2"):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.out = nn.Linear(512, 1)

    def forward(self, x):
        features = self.conv(2 * x - 1).flatten(1)
        return self.out(features.relu()).squeeze(1).to(x.dtype), features.to(x.dtype)


def small_networks(patch):
    """For what does not depend on the networks: most of a short training's time goes into their 18 million weights."""
    patch.setattr(vae, "Encoder", SmallEncoder)
    patch.setattr(vae, "Decoder", SmallDecoder)
    patch.setattr(vae_gan, "Discriminator", SmallDiscriminator)


def few_filters(patch):
    """For what does not depend on their number: most of the time goes into the 2,400 columns that 300 filters make."""
    patch.setattr(patches, "FILTERS", 20)


def quickly(patch):
    """No drawing, small networks of images, few filters of patches, and measurements of wgan_gp.py too small to mean
    anything: each takes longer than a few steps."""
    patch.setattr(torch.backends.cudnn, "deterministic", True)  # else what has noise for a gradient drifts
    patch.setenv("FID_WEIGHTS", "none.pth")  # else --fid auto downloads them where there is a GPU
    patch.setattr(two_gaussians, "N_W2", 40)
    patch.setattr(two_gaussians, "N_STATISTICS", 100)
    patch.setattr(wgan_gp, "N_PLOT", 40)
    patch.setattr(wgan_gp, "DRAWS", 2)
    few_filters(patch)
    no_figures(patch)
    small_networks(patch)


def untrained_vae(name, folder, seed=0, latent_dim=4, **flags):
    """runs/NAME as vae.py would leave it without a step, of a folder of images."""
    torch.manual_seed(seed)
    argv = ["--data", folder, "--latent-dim", latent_dim, "--batch-size", 30, "--device", "cpu", "--name", name]
    flags = vars(vae.parse_args([str(word) for word in argv])) | flags
    state = {"script": "vae.py", "args": flags, "step": 0, "seconds": 1.0}
    runs.save_checkpoint(f"runs/{name}/checkpoint.pt", state | {"average": vae.VAE(latent_dim).state_dict()})


def read_image(file, convert):
    """-> the images.Picture of one file."""
    return next(images.decode([file], convert))


def environment():
    """Of a process that may import the scripts, what tests have, and packages that PYTHONPATH names."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def torchrun(folder, *argv, n=2):
    """The finished command `torchrun --nproc-per-node=n argv`, run in `folder`."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *map(str, argv)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, env=environment())


def ctrl_c_in(patch, step):
    """Let a loop's process receive Ctrl-C, as the signal that it is, at the beginning of a step."""
    original = Loop.__iter__

    def steps(loop):
        for now in original(loop):
            if now == step:
                os.kill(os.getpid(), signal.SIGINT)
            yield now

    patch.setattr(Loop, "__iter__", steps)


def checkpoint(name):
    return runs.load_checkpoint(Path("runs", name, "checkpoint.pt"))


def leaves(state, path=""):
    """All that a checkpoint holds by its path, without what two equal runs may differ in: clocks, name, --resume."""
    if path in ("/seconds", "/cpu_seconds", "/args/name", "/args/resume"):
        return {}
    if isinstance(state, list | tuple):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return {path: state}
    found = {}
    for key, value in state.items():
        found |= leaves(value, f"{path}/{key}")
    return found


def same(a, b, rtol=0, atol=0):
    """Whether two checkpoints agree: weights, averages, optimisers, sums, step, flags. By default bit for bit."""
    a, b = leaves(a), leaves(b)
    if a.keys() != b.keys():
        return False
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            if not torch.allclose(value, b[key], rtol, atol):
                return False
        elif value != b[key]:
            return False
    return True


def log(name):
    """The records of log.jsonl without the clocks."""
    lines = Path("runs", name, "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


def metrics(name):
    return json.loads(Path("runs", name, "metrics.json").read_text())
