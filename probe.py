"""How well a linear classifier reads the class from an encoder's codes; and the ceiling, the same encoder with labels.

    python probe.py runs/vae                         # a run's folder or checkpoint, of vae.py or vae_gan.py
    python probe.py runs/vae --latent sample --layer # also one sample of q(z|x), and the 1024 features below mu
    python probe.py runs/vae --against runs/other    # McNemar's test on the same test images
    python probe.py --supervised                     # encoder and linear layer trained end to end with labels
    python probe.py runs/supervised                  # that encoder's mu, frozen, like any other's

The classifier is one linear layer with softmax on frozen features, fitted to the labels of all training images. The
cross-entropy with weight decay is convex, so there is one best accuracy to report and no schedule to tune: it is
solved to a gradient of about zero by full-batch L-BFGS with the strong Wolfe line search (Nocedal & Wright 2006, ch. 7)
in float64. The weight decay is the one of GRID with the lowest cross-entropy on a tenth of the training images, held
out for that (5,000 of CIFAR-10's); then all of them are fitted. Test labels serve the accuracy alone.

Rows to compare with, on CIFAR-10's test images at 128 dimensions, seed 0: raw pixels 41.5 %, their first principal
components 40.5 %, mu of an untrained encoder 38.6 %. They take minutes on a CPU, once, and are kept in
runs/probe-baselines.json; after that a probe takes 26 s of one core (AMD EPYC, torch 2.13.0+cpu, 2026-11-24).
The ceiling with --holdout 5000 --precision bf16: 76.4 % after 5 epochs (113 s of one core), 77.9 % after 10 (197 s).
"""

import contextlib
import hashlib
import json
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn
from tqdm import tqdm

import sampling
import vae
from common import data, devices, pictures, runs

GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)  # weight decays, of standardised features


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="a run's folder, or its checkpoint.pt")
    parser.add_argument("--name", type=runs.run_name, help="results go to runs/NAME; default: the run's and -probe")
    parser.add_argument("--seed", type=runs.number(int, 0), default=0, help="seed of every random draw")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    parser.add_argument("--against", help="another run: McNemar's test between the two")
    parser.add_argument("--latent", choices=["mu", "sample"], default="mu", help="sample: a row for z ~ q(z|x), too")
    parser.add_argument("--layer", action="store_true", help="a row for the 1024 features below mu, too")
    data.add_flags(parser)
    parser.set_defaults(data=None, data_dir=None, holdout=None)  # the checkpoint's
    # the ceiling
    parser.add_argument("--supervised", action="store_true", help="train an encoder with labels instead")
    parser.add_argument("--latent-dim", type=runs.number(int, 1), default=128, help="dimensions of its mu")
    parser.add_argument("--epochs", type=runs.number(int, 1), default=10, help="passes over the training images")
    parser.add_argument("--batch-size", type=runs.number(int, 2), default=128, help="images a step")
    parser.add_argument("--lr", type=runs.number(float, above=0), default=1e-3, help="Adam's peak rate; half a cosine")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the training")
    args = parser.parse_args(argv)
    if args.supervised == (args.checkpoint is not None):
        raise runs.UserError("give either a checkpoint to probe or --supervised (--help lists the flags)")
    if args.supervised and args.against:
        raise runs.UserError("--against compares checkpoints: train with --supervised first, then compare its run")
    return args


# --- the classifier -----------------------------------------------------------------------------------------------


def standardise(train, *others):
    """Features (N, D) -> float64, by the training features' mean and standard deviation; constant ones become 0."""
    home = "cpu" if train.device.type == "mps" else train.device  # mps has no float64
    train, *others = (x.to(home).double() for x in (train, *others))
    mean, std = train.mean(0), train.std(0)
    std[std < 1e-9] = math.inf
    return [(x - mean).div_(std) for x in (train, *others)]


def second_moments(x):
    """(D, D), of features (N, D), from at most 20,000 of them: where this serves, near enough is enough."""
    some = x[:: math.ceil(len(x) / 20_000)].float()
    return (some.T @ some).double() / len(some)


def fit(x, y, weight_decay, classes, moments, start=None, tolerance=1e-6):
    """Minimise mean cross-entropy + weight_decay / 2 |W|^2 over W and b, logits x W + b.

    L-BFGS walks in coordinates V with W = L^-T V, where L L^T approximates the Hessian by the features' second moments:
    same optimum, and correlated features (pixels) no longer cost thousands of iterations.

    x: (N, D) float64, standardised; y: (N,) int64; moments: (D, D) `second_moments`; start: W, b to begin at
    -> W (D, classes), b (classes,)
    The largest entry of the gradient in V and b ends at most at `tolerance`, unless rounding stops the search before.
    """
    hessian = (1 - 1 / classes) / classes * moments  # where the softmax knows nothing: at the start
    scale = torch.linalg.cholesky(hessian + (weight_decay + 1e-9) * torch.eye(len(hessian)).to(hessian)).T
    w, b = start or (x.new_zeros(x.shape[1], classes), x.new_zeros(classes))
    v, b = (scale @ w).requires_grad_(), b.clone().requires_grad_()
    limits = {"max_iter": 2000, "tolerance_grad": tolerance, "tolerance_change": 0}
    solver = torch.optim.LBFGS([v, b], line_search_fn="strong_wolfe", **limits)

    def loss():
        solver.zero_grad()
        w = torch.linalg.solve_triangular(scale, v, upper=True)
        value = objective(x, y, w, b, weight_decay)
        value.backward()
        return value

    solver.step(loss)
    return torch.linalg.solve_triangular(scale, v.detach(), upper=True), b.detach()


def objective(x, y, w, b, weight_decay):
    return F.cross_entropy(x @ w + b, y) + weight_decay / 2 * w.square().sum()


def choose_weight_decay(x, y, classes, moments, seed):
    """The member of GRID with the lowest cross-entropy on a random tenth after fitting the others.

    From the strongest down, each fit beginning at the last one's end, until the held-out loss rises.
    """
    order = torch.randperm(len(x), generator=devices.generator("cpu", seed, "probe")).to(x.device)
    held, rest = order.split([len(x) // 10, len(x) - len(x) // 10])
    (held_x, held_y), (rest_x, rest_y) = (x[held], y[held]), (x[rest], y[rest])
    best, best_loss, start = None, math.inf, None
    for weight_decay in GRID:
        start = fit(rest_x, rest_y, weight_decay, classes, moments, start, tolerance=1e-3)
        loss = objective(held_x, held_y, *start, 0).item()
        if loss >= best_loss:
            break
        best, best_loss = weight_decay, loss
    return best


def classify(train, labels, test, classes, seed):
    """Fit a linear classifier on features `train` (N, D) -> classes of `test` (M,), and how the fit went."""
    began = time.perf_counter()
    x, test_x = standardise(train, test)
    y = labels.to(x.device)
    if x.shape[1] > len(x):  # the best W lies in the span of the training features: so many dimensions suffice
        basis = torch.linalg.qr(x.T).Q
        x, test_x = x @ basis, test_x @ basis
    moments = second_moments(x)
    weight_decay = choose_weight_decay(x, y, classes, moments, seed)
    w, b = fit(x, y, weight_decay, classes, moments)
    gradient = torch.func.grad(lambda w: objective(x, y, w, b, weight_decay))(w).abs().max().item()
    facts = {"dims": train.shape[1], "weight_decay": weight_decay, "largest_gradient": gradient}
    return (test_x @ w + b).argmax(1).cpu(), facts | {"seconds": time.perf_counter() - began}


# --- statistics ---------------------------------------------------------------------------------------------------


def wilson(right, n, z=1.96):
    """The 95 % interval of a share of which `right` of n were seen, in per cent.  Wilson 1927."""
    p, denominator = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))  # rounding must not leave -0.00


def mcnemar(first, second):
    """Two classifiers on the same images, by the images on which just one of them is right.  McNemar 1947.

    first, second: (N,) bool, right or not -> difference of the accuracies in points, its 95 % interval, the exact
    two-sided p-value of both being equally good
    """
    n = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    one = only_first + only_second
    difference = (only_first - only_second) / n
    half = 1.96 * math.sqrt(max(one / n - difference**2, 0) / n)
    p = binomtest(only_first, one).pvalue if one else 1.0
    return {
        "only_first_right": only_first,
        "only_second_right": only_second,
        "difference": 100 * difference,
        "interval": [100 * (difference - half), 100 * (difference + half)],
        "p_value": float(p),
    }


def score(predicted, labels):
    right = int((predicted == labels).sum())
    return {"accuracy": 100 * right / len(labels), "interval": wilson(right, len(labels))}


# --- features -----------------------------------------------------------------------------------------------------


def run_name(path):
    """The name of the run to which a folder or checkpoint.pt belongs."""
    path = Path(path).resolve()
    return path.name if path.is_dir() else path.parent.name


@torch.no_grad()
def below_mu(model, images, batch_size=500):
    """The 1024 features from which mu and logvar are read, of uint8 images."""
    model.eval()
    return torch.cat([model.encoder.features(part.float() / 255) for part in images.split(batch_size)])


def principal_components(train, test, dims, seed):
    """Both (N, D) in the first `dims` principal components of `train`, by randomised iteration (Halko et al. 2011)."""
    torch.manual_seed(seed)
    _, _, vectors = torch.pca_lowrank(train, q=min(2 * dims, *train.shape), niter=4)
    return train @ vectors[:, :dims], test @ vectors[:, :dims]


def baselines(images, labels, test, test_labels, latent_dim, classes, seed):
    """{row: score} of what needs no training, from runs/probe-baselines.json where it has them."""
    cache = runs.ROOT / "probe-baselines.json"
    key = hashlib.sha256(repr((latent_dim, seed, GRID)).encode())
    for tensor in (images, labels, test, test_labels):
        key.update(tensor.cpu().contiguous().numpy())
    known, key = {}, key.hexdigest()
    with contextlib.suppress(OSError, json.JSONDecodeError):
        known = json.loads(cache.read_text())
    if key not in known:
        pixels = [part.flatten(1).float() / 255 for part in (images, test)]
        torch.manual_seed(seed)
        untrained = vae.VAE(latent_dim).to(images.device)
        features = {
            "raw pixels": pixels,
            "principal components": principal_components(*pixels, latent_dim, seed),
            "untrained encoder": [sampling.encode(untrained, part) for part in (images, test)],
        }
        rows = {}
        for name, (train, held) in features.items():
            predicted, facts = classify(train, labels, held, classes, seed)
            rows[name] = score(predicted, test_labels.cpu()) | facts
        known[key] = rows
        runs.write_json(cache, known)
    return known[key]


# --- pictures -----------------------------------------------------------------------------------------------------


def plot_confusion(predicted, labels, names, path):
    """Rows true, columns predicted, per cent of the true class -> one PNG."""
    counts = torch.zeros(len(names), len(names)).index_put_((labels, predicted), torch.ones(len(labels)), True)
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, ax = plt.subplots(figsize=(6.4, 5.6), dpi=100, layout="constrained")
    ax.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(share.tolist()):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "black", size=9)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="predicted", ylabel="true", title="per cent of the true class")
    pictures.save_figure(figure, path)


def discriminants(x, y, classes):
    """The two directions (D, 2) that separate the classes best, against the spread within them.  Fisher 1936."""
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    inside = x - means[y]
    root = torch.linalg.cholesky(inside.T @ inside / len(x) + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype))
    white = torch.linalg.solve_triangular(root, (means - means.mean(0)).T, upper=False)  # (D, classes)
    _, vectors = torch.linalg.eigh(white @ white.T)
    return torch.linalg.solve_triangular(root.T, vectors[:, -2:].flip(1), upper=True)


def plot_latents(train, labels, test, test_labels, names, path, n=3000):
    """Two planes fitted to training codes, with n test codes in them -> one PNG."""
    train, test = (x.cpu() for x in standardise(train, test[:n]))
    labels, test_labels = labels.cpu(), test_labels[:n].cpu()
    _, axes = torch.linalg.eigh(torch.cov(train.T))
    planes = {
        "two principal components (no labels)": axes[:, -2:].flip(1),
        "two linear discriminants (training labels)": discriminants(train, labels, len(names)),
    }
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.6), dpi=100, layout="constrained")
    for ax, (title, plane) in zip(panels, planes.items(), strict=True):
        for c, name in enumerate(names):
            points = (test[test_labels == c] @ plane).T.numpy()
            ax.scatter(*points, s=6, alpha=0.7, color=plt.cm.tab10(c % 10), label=name)
        ax.set(title=f"mu of test images, {title}", xticks=[], yticks=[])
    panels[1].legend(markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    pictures.save_figure(figure, path)


# --- the ceiling --------------------------------------------------------------------------------------------------


def train_supervised(args, run, device, images, labels, classes):
    """Encoder and linear layer on mu, end to end with labels: cross-entropy, flips. -> model, the layer, seconds."""
    torch.manual_seed(args.seed)
    model, layer = vae.VAE(args.latent_dim).to(device), nn.Linear(args.latent_dim, classes).to(device)
    optimizer = devices.adam([*model.encoder.parameters(), *layer.parameters()], args.lr, device)
    per_epoch = len(images) // args.batch_size
    total = args.epochs * per_epoch
    run.begin()
    model.train()
    began, recent = time.perf_counter(), torch.zeros((), device=device)
    for step in tqdm(range(total), unit="step", dynamic_ncols=True):
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            shuffle = devices.generator("cpu", args.seed, "order", epoch)
            order = torch.randperm(len(images), generator=shuffle).to(device)
        noise = devices.generator(device, args.seed, "noise", step)
        flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
        index = order[i * args.batch_size : (i + 1) * args.batch_size]
        devices.set_lr(optimizer, devices.learning_rate(step, total, args.lr, "cosine"))
        optimizer.zero_grad(set_to_none=True)
        with devices.autocast(device, args.precision):
            logits = layer(model.encoder(data.batch(images, index, flip))[0])
        loss = F.cross_entropy(logits.float(), labels[index])
        loss.backward()
        optimizer.step()
        recent += loss.detach()
        if (step + 1) % per_epoch == 0:
            mean = recent.item() / per_epoch
            runs.check_finite(mean, step + 1, "lower --lr")
            run.log(step=step + 1, epoch=epoch + 1, loss=mean)
            recent.zero_()
    seconds = time.perf_counter() - began
    run.save(total, seconds, {"average": model, "layer": layer})
    return model.eval(), layer, seconds


# --- main ---------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, args.precision)
    if args.supervised:
        args.name, saved = args.name or "supervised", {}
    else:
        model, saved = vae.load(args.checkpoint, device)
        args.name = args.name or f"{run_name(args.checkpoint)}-probe"
    for key, default in {"data": "cifar10", "data_dir": "data", "holdout": 0}.items():
        if getattr(args, key) is None:
            setattr(args, key, saved.get(key, default))
    run = runs.Run(args, "probe.py")
    found = data.splits(args, device, labelled=True)
    images, labels, test, test_labels, names = found.images, found.labels, found.test, found.test_labels, found.classes
    args.data_files = found.fingerprint  # goes into args.json and the checkpoint
    data.note_change(args, saved)
    if len(images) < 10:
        raise runs.UserError(f"{len(images)} training images are too few for a probe: it takes ten")
    classes, truth = len(names), test_labels.cpu()
    rows, metrics = {}, {"data": args.data, "holdout": args.holdout, "images": len(images), "test_images": len(test)}

    def add(row, train, held):
        predicted, facts = classify(train, labels, held, classes, args.seed)
        rows[row] = score(predicted, truth) | facts
        return predicted

    if args.supervised:
        model, layer, seconds = train_supervised(args, run, device, images, labels, classes)
        codes, test_codes = sampling.encode(model, images), sampling.encode(model, test)
        predicted = layer(test_codes).argmax(1).cpu()
        rows["supervised"] = score(predicted, truth) | {"dims": args.latent_dim, "seconds": seconds}
    else:
        metrics["checkpoint"] = args.checkpoint
        codes, test_codes = sampling.encode(model, images), sampling.encode(model, test)
        predicted = add("mu", codes, test_codes)
        if args.latent == "sample":
            add("z ~ q(z|x)", *(sampling.encode(model, part, args.seed) for part in (images, test)))
        if args.layer:
            add("layer below mu", below_mu(model, images), below_mu(model, test))
        rows |= baselines(images, labels, test, test_labels, codes.shape[1], classes, args.seed)
    if args.against:
        other, _ = vae.load(args.against, device)
        theirs = add(f"mu of {run_name(args.against)}", *(sampling.encode(other, part) for part in (images, test)))
        metrics["against"] = {"checkpoint": args.against} | mcnemar(predicted == truth, theirs == truth)

    hits = {name: (predicted == truth)[truth == c] for c, name in enumerate(names)}
    per_class = {name: 100 * hit.double().mean().item() for name, hit in hits.items() if len(hit)}
    metrics |= {"rows": rows, "per_class": per_class, "versions": runs.versions()}
    plot_confusion(predicted, truth, names, run / "confusion.png")
    plot_latents(codes, labels, test_codes, truth, names, run / "latents.png")
    runs.write_json(run / "metrics.json", metrics)
    print(f"\n{run.folder}: {args.data}, accuracy in per cent on {len(test)} images, 95 % interval")
    for row, found in rows.items():
        print(f"  {row:26} {found['accuracy']:6.2f}  {found['interval'][0]:.2f} to {found['interval'][1]:.2f}", end="")
        print(f"  {found['dims']} dimensions, {found['seconds']:.0f} s")
    print("  by class: " + ", ".join(f"{name} {value:.1f}" for name, value in per_class.items()))
    if args.against:
        m = metrics["against"]
        print(f"  against {m['checkpoint']}: {m['difference']:+.2f} points, 95 % {m['interval'][0]:+.2f} to ", end="")
        print(f"{m['interval'][1]:+.2f}; McNemar's exact p = {m['p_value']:.2g}")


if __name__ == "__main__":
    runs.cli(main)
