# ruff: noqa
"""Batch norm's statistics of a run's averaged network, averaged as in training, against estimated anew on training images.

    python prototype/batch_norm.py RUN DATA_DIR       # 2 minutes of one core

Anew: the cumulative mean over one pass of the 50,000 training images with flips, in batches of the training's size; the
decoder's on samples of q(z|x), and for a VAE-GAN on as many batches of z ~ N(0, I), too, as in training. Prints
vae.evaluate's numbers on the 10,000 test images for both.
"""
import sys
from pathlib import Path
import torch
from torch import nn
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import vae
from common import data

torch.set_num_threads(1)
run, folder = sys.argv[1:]
cpu = torch.device("cpu")
old, args = vae.load(run, cpu)
new, _ = vae.load(run, cpu)
images, test = (data.load("cifar10", folder, split)[0] for split in ("train", "test"))
for module in new.modules():
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        module.reset_running_stats()
        module.momentum = None
new.train()
g, size = torch.Generator().manual_seed(0), args["batch_size"]
rows = torch.randperm(len(images), generator=g)
with torch.no_grad():
    for i in range(0, len(rows) - size + 1, size):
        x = images[rows[i : i + size]].float() / 255
        flip = torch.rand(len(x), generator=g) < 0.5
        mu, logvar = new.encoder(torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x))
        new.decoder(mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=g))
        if "gamma" in args:
            new.decoder(torch.randn(mu.shape, generator=g))
for title, model in (("averaged", old), ("anew", new)):
    print(run, title, {key: round(value, 5) for key, value in vae.evaluate(model, test, 0).items()}, flush=True)
