"""Pictures of images and of curves, as PNG files that appear whole or not at all."""

import math
import os
import shutil

import matplotlib

matplotlib.use("Agg")  # draw into files; no screen needed
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from tqdm import tqdm  # noqa: E402

from common.runs import UserError, cannot_write, writing  # noqa: E402


def save_figure(figure, path, dpi="figure"):
    """Write a matplotlib figure and close it."""
    with writing(path) as part:
        figure.savefig(part, dpi=dpi)
    plt.close(figure)


def plot_curves(log, path, titles, measured):
    """One panel for each key of `titles`, against epochs, from the records of log.jsonl.

    Records that hold "loss" are of training batches, the others of `measured` images.
    """
    size = (4.4 * len(titles), 3.6)
    figure, axes = plt.subplots(1, len(titles), figsize=size, dpi=100, layout="constrained", squeeze=False)
    axes = axes[0]
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        train, test = ([r for r in log if key in r and ("loss" in r) == kind] for kind in (True, False))
        ax.plot([r["epoch"] for r in train], [r[key] for r in train], lw=0.8, label="training batches")
        ax.plot([r["epoch"] for r in test], [r[key] for r in test], "o-", ms=3, label=f"{measured} images")
        values = [r[key] for r in train[len(train) // 20 :] + test]  # the first steps would flatten the rest
        if values:
            room = 0.05 * (max(values) - min(values)) or 1.0
            ax.set_ylim(min(values) - room, max(values) + room)
        ax.set(xlabel="epoch", title=title)
        ax.grid(alpha=0.3)
    axes[0].legend()
    save_figure(figure, path)


def plot_stages(models, columns, path):
    """What training buys: a panel for each of columns, {title: (key, digits)}, against epochs, a line a model.

    models: {title: [{"epochs": n, key: number}]}, in the order of the epochs; a number may be missing.
    """
    wide = math.ceil((len(columns) + 1) / 2)
    figure, axes = plt.subplots(2, wide, figsize=(3.6 * wide, 6.4), dpi=100, layout="constrained")
    for ax, (title, (key, _)) in zip(axes.flat, columns.items(), strict=False):
        for i, (model, some) in enumerate(models.items()):
            known = [each for each in some if key in each]
            if known:
                epochs, values = [each["epochs"] for each in known], [each[key] for each in known]
                ax.plot(epochs, values, "o-", ms=3, c=f"C{i}", label=model)
        ax.set_title(title.replace(": ", ":\n"), fontsize=9)
        ax.locator_params(axis="x", integer=True)
        ax.set_xlabel("epochs")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(columns) :]:
        ax.axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", fontsize=9)
    save_figure(figure, path)


def write_images(images, folder):
    """images (N, 3, H, W) uint8 -> folder/00000.png ...; a folder written earlier is replaced when all are there."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        for i, image in enumerate(tqdm(images.permute(0, 2, 3, 1).cpu().numpy(), "writing", leave=False)):
            Image.fromarray(image).save(part / f"{i:05d}.png")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise UserError(cannot_write(folder, error)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def tiled(images, columns):
    """images (N, 3, 32, 32) uint8, laid row by row on white -> one picture (34 rows, 34 columns, 3), an array."""
    rows = math.ceil(len(images) / columns)
    sheet = torch.full((rows * columns, 3, 34, 34), 255, dtype=torch.uint8)
    sheet[: len(images), :, 1:33, 1:33] = images.cpu()
    return sheet.view(rows, columns, 3, 34, 34).permute(0, 3, 1, 4, 2).reshape(rows * 34, columns * 34, 3).numpy()


def plot_grid(images, path, title, columns=16):
    """images (N, 3, 32, 32) uint8, drawn row by row -> one PNG."""
    rows = math.ceil(len(images) / columns)
    figure = plt.figure(figsize=(columns * 0.68, rows * 0.68 + 0.4), dpi=100)
    axes = figure.add_axes((0, 0, 1, rows * 0.68 / (rows * 0.68 + 0.4)))
    axes.imshow(tiled(images, columns), interpolation="nearest")
    axes.axis("off")
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


def plot_rows(sets, path, title):
    """Sets of as many uint8 images (N, 3, 32, 32) -> one PNG: a row of the first set, under it the second's, and so on.

    Rows have up to 16 images; images that fill no row are left out.
    """
    columns = min(16, len(sets[0]))
    whole = len(sets[0]) // columns * columns
    rows = zip(*(images[:whole].split(columns) for images in sets), strict=True)
    plot_grid(torch.cat([row for group in rows for row in group]), path, title, columns)


def write_frame(images, path, title):
    """images (N, 3, 32, 32) uint8, eight a row, under a title -> one PNG, a pixel for each of theirs."""
    sheet = Image.fromarray(tiled(images, 8))
    frame = Image.new("RGB", (sheet.width, sheet.height + 16), "white")
    frame.paste(sheet, (0, 16))
    ImageDraw.Draw(frame).text((3, 1), title, fill="black", font=ImageFont.load_default(size=12))
    with writing(path) as part:
        frame.save(part)


def read_pictures(files):
    """The RGB pictures of some files, one after another."""
    for file in files:
        with Image.open(file) as picture:
            yield picture.convert("RGB")


def write_sheet(files, path, columns=2):
    """Pictures of equal size side by side, `columns` a row, in the order of the list -> one PNG."""
    drawn = list(read_pictures(files))
    width, height = drawn[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(drawn) / columns) * height), "white")
    for i, picture in enumerate(drawn):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    with writing(path) as part:
        sheet.save(part)


def spread(frames, most):
    """At most so many of a list, evenly over it, with the first and the last."""
    if len(frames) <= most:
        return frames
    return [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]


def write_gif(frames, path, colours=48):
    """One animation of pictures of equal size; the last one stays longer. colours: 48 are enough for plots."""
    pictures = [picture.quantize(colours, dither=Image.Dither.NONE) for picture in read_pictures(frames)]
    durations = [600] * (len(pictures) - 1) + [2500]
    with writing(path) as part:
        pictures[0].save(part, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def plain(names):
    """Names of a person's folders as matplotlib shows them as they are: "$" would begin a formula."""
    return [name.replace("$", r"\$") for name in names]


def plot_confusion(predicted, labels, names, path):
    """Rows true, columns predicted, per cent of the true class -> one PNG."""
    counts = torch.zeros(len(names), len(names)).index_put_((labels, predicted), torch.ones(len(labels)), True)
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, ax = plt.subplots(figsize=(6.4, 5.6), dpi=100, layout="constrained")
    ax.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(share.tolist()):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "black", size=9)
    ax.set_xticks(range(len(names)), plain(names), rotation=45, ha="right")
    ax.set_yticks(range(len(names)), plain(names))
    ax.set(xlabel="predicted", ylabel="true", title="per cent of the true class")
    save_figure(figure, path)


def discriminants(x, y, classes):
    """The two directions (D, 2) that separate the classes best, against the spread within them.  Fisher 1936."""
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    inside = x - means[y]
    root = torch.linalg.cholesky(inside.T @ inside / len(x) + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype))
    white = torch.linalg.solve_triangular(root, (means - means.mean(0)).T, upper=False)  # (D, classes)
    _, vectors = torch.linalg.eigh(white @ white.T)
    return torch.linalg.solve_triangular(root.T, vectors[:, -2:].flip(1), upper=True)


def plot_latents(train, labels, test, test_labels, names, path, n=3000):
    """Two planes fitted to standardised training codes (N, D) float64, with n test codes in them -> one PNG."""
    train, test, labels, test_labels = train.cpu(), test[:n].cpu(), labels.cpu(), test_labels[:n].cpu()
    if train.shape[1] < 2:  # one dimension spans no plane
        return
    _, axes = torch.linalg.eigh(torch.cov(train.T))
    planes = {
        "two principal components (no labels)": axes[:, -2:].flip(1),
        "two linear discriminants (training labels)": discriminants(train, labels, len(names)),
    }
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.6), dpi=100, layout="constrained")
    for ax, (title, plane) in zip(panels, planes.items(), strict=True):
        for c, name in enumerate(plain(names)):
            points = (test[test_labels == c] @ plane).T.numpy()
            ax.scatter(*points, s=6, alpha=0.7, color=plt.cm.tab10(c % 10), label=name)
        ax.set(title=f"mu of test images, {title}", xticks=[], yticks=[])
    panels[1].legend(markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)
