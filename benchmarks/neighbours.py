"""Do the models copy? The training images nearest to their samples, in pixels and in the features of a network.

    python benchmarks/neighbours.py runs/vae runs/vae_gan --features runs/classifier/features.pt2
    python benchmarks/neighbours.py runs/vae --features net.pt2 --limit 2000 --count 16       # quick

Samples are decoded from z ~ N(0, I), the same z for runs of as many dimensions. Distances are Euclidean: of pixels in
[0, 1], and of features as the program gives them. The picture shows 16 samples of each run above the training images
nearest to them, and below all as many test images above theirs. Printed are the mean distances to the nearest training
image, with standard errors, of --count samples of each run and of as many test images, which no model has seen.

How to read them: a model that copies has samples much nearer than test images are, and one sees it. But whatever is
blurred is nearer to many images, in features, too. So the last lines are of reconstructions of the test images: unseen
and as blurred as the samples. A model's samples are too near when they are nearer than these.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fid  # noqa: E402
import vae  # noqa: E402
from common import data, devices, inception, pictures, runs  # noqa: E402
from common.runs import UserError  # noqa: E402
from probe import pixels  # noqa: E402

DRAWN = 16
ROWS = ("", "nearest in\npixels", "nearest in\nfeatures")


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    add, count = parser.add_argument, runs.number(int, 2)
    add("runs", nargs="+", metavar="RUN", help="folders of runs of vae.py or vae_gan.py, on the same data")
    add("--features", required=True, help="a torch.export program, (B, 3, H, W) uint8 to (B, D)")
    add("--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to")
    add("--count", type=count, default=1000, help=f"samples of each run, and test images; the first {DRAWN} are drawn")
    add("--limit", type=count, help="search only the first LIMIT training images")
    add("--seed", type=runs.number(int, 0), default=0, help="of z")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    add("--out", default="runs/neighbours.png", help="the picture to write")
    return parser.parse_args(argv)


def same_data(flags):
    """Several runs' flags -> those that say which images they were trained on. Raises UserError if they differ."""
    chosen = [{key: each[key] for key in ("data", "limit", "holdout")} for each in flags]
    if any(each != chosen[0] for each in chosen):
        raise UserError("the runs were trained on different images (--data, --limit or --holdout): give one at a time")
    return chosen[0]


def features(images, extractor):
    """uint8 (N, 3, H, W) -> (N, D) float32 on the CPU."""
    kept = []
    fid.statistics(images, extractor, keep=kept)
    return torch.cat(kept)


def nearest(x, train):
    """For each of x (N, D) the nearest row of `train` (M, D), Euclidean -> distances (N,), rows (N,)."""
    # The search multiplies matrices, which rounds where the distance is small: the found ones are measured anew
    square = train.square().sum(1)
    rows = torch.cat([(square - 2 * part @ train.T).argmin(1) for part in x.split(200)])
    return (x.cpu().double() - train[rows].cpu().double()).norm(dim=1), rows


def draw(blocks, path):
    """blocks: {title: three rows of uint8 images (n, 3, 32, 32), as ROWS names them} -> one PNG."""
    size = (0.68 * DRAWN + 1.2, 2.5 * len(blocks))
    figure, axes = plt.subplots(len(blocks), 1, figsize=size, dpi=100, layout="constrained", squeeze=False)
    for ax, (title, rows) in zip(axes[:, 0], blocks.items(), strict=True):
        ax.imshow(pictures.tiled(torch.cat(rows), len(rows[0])), interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[17, 51, 85])
        ax.set_yticklabels(ROWS, fontsize=9)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    pictures.save_figure(figure, path)


def mean(x):
    """(N,) -> the mean and its standard error, in words."""
    return f"{x.mean():.4g} ± {x.std() / len(x) ** 0.5:.2g}"


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, divides=False)
    runs.try_writing(args.out)
    models = {str(run): vae.load(run, device) for run in args.runs}
    extractor = inception.load_extractor(features=args.features, device=device)
    which = argparse.Namespace(**same_data([flags for _, flags in models.values()]), data_dir=args.data_dir)
    dataset = data.splits(which, device)
    train, test = dataset.images[: args.limit], dataset.test
    count = min(args.count, len(test))
    drawn, blurred, unseen = {}, {}, data.measured_on(which)
    for name, (model, _) in models.items():
        z = vae.draw_latents(model, count, "normal", train, args.seed)
        drawn[f"{name}: samples, z ~ N(0, I)"] = vae.decode(model, z)
        blurred[f"{name}: reconstructed {unseen} images"] = vae.decode(model, vae.encode(model, test[:count]))
    drawn[f"{unseen} images"] = test[:count]
    spaces = {"pixels": pixels, "features": lambda images: features(images, extractor)}
    searched = {space: embed(train) for space, embed in spaces.items()}
    blocks = {}
    print(f"mean distance to the nearest of {len(train)} training images, {count} images a line")
    print(f"{'':60} {'in pixels':>20} {'in features':>20}")
    for title, images in (drawn | blurred).items():
        distances, block = [], [images[:DRAWN]]
        for space, embed in spaces.items():
            distance, rows = nearest(embed(images), searched[space])
            distances.append(mean(distance))
            block.append(train[rows[:DRAWN].to(train.device)])
        print(f"{title:60} {distances[0]:>20} {distances[1]:>20}")
        if title in drawn:
            blocks[title] = block
    draw(blocks, args.out)
    print(f"{args.out}: {min(count, DRAWN)} of each, and under them the training images nearest to them")


if __name__ == "__main__":
    runs.cli(main)
