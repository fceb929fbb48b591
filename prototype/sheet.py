# ruff: noqa: E402
"""sheet.py DATA_DIR OUT.png RUN=TITLE ...: of each run 32 samples, the same z for all, and 32 reconstructions."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib.pyplot as plt
import torch

import vae
from common import data

data_dir, out, *named = sys.argv[1:]
torch.set_num_threads(1)
images = data.load("cifar10", data_dir, "train")[0]
held = images[-32:]  # of those that --holdout 5000 left out
rows = [("held-out images", held, images[-64:-32])]
for word in named:
    run, title = word.split("=", 1)
    model, args = vae.load(run, torch.device("cpu"))
    z = vae.draw_latents(model, 32, "normal", images, 0)
    rows.append((title, vae.decode(model, vae.encode(model, held)), vae.decode(model, z)))
figure, axes = plt.subplots(
    len(rows), 2, figsize=(14, 1.0 * len(rows) + 0.3), width_ratios=(1, 1), layout="constrained", dpi=100
)
for line, (title, left, right) in zip(axes, rows, strict=True):
    for ax, some in zip(line, (left, right), strict=True):
        ax.set_xticks([]), ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(False)
        n = 16
        grid = some.unflatten(0, (-1, n)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        ax.imshow(grid.numpy())
    line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
axes[0][0].set_title("images; below their reconstructions")
axes[0][1].set_title("images; below samples, z ~ N(0, I), the same z for all")
figure.savefig(out)
