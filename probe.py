"""How well a linear classifier reads the class from an encoder's codes; and, as a reference, the encoder with labels.

    python probe.py runs/vae                         # a run's folder or checkpoint, of vae.py or vae_gan.py
    python probe.py runs/vae --latent sample --layer # also one sample of q(z|x), and the 1024 features below mu
    python probe.py runs/vae --against runs/other    # McNemar's test on the same test images; --data, --data-dir and
                                                     # --holdout are those of the run, unless given
    python probe.py --supervised                     # encoder and linear layer trained end to end with labels
    python probe.py --supervised --resume            # go on after Ctrl-C or a crash
    python probe.py runs/supervised                  # that encoder's mu, frozen, like any other's

The classifier is one linear layer with softmax on frozen features, fitted to the labels of all training images. The
cross-entropy with weight decay is convex, so there is one best accuracy to report and no schedule to tune: it is
solved to a gradient of about zero by full-batch L-BFGS with the strong Wolfe line search (Nocedal & Wright 2006, ch. 7)
in float64. The weight decay is the last of GRID, from the strongest down, before the cross-entropy rises on a tenth of
the training images, held out for that (5,000 of CIFAR-10's); then all are fitted. Test labels serve the accuracy alone.

Rows to compare with (raw pixels, their principal components, mu of an untrained encoder) take minutes on a CPU, once,
and are kept in runs/probe-baselines.json; after that a probe took 26 s of one core (AMD EPYC with bf16, torch
2.13.0+cpu, 2026-11-24). Accuracies are in REPORT.md.
"""

import hashlib
import math
import re
import time

import torch
import torch.nn.functional as F
from torch import nn

import vae
from common import data, devices, pictures, runs
from common.loop import Loop, add_training_flags, check_batch
from common.scores import mcnemar, score
from common.streams import note

SEEN = 1000  # training images that are measured at each checkpoint of --supervised
GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)  # weight decays, of standardised features


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="a run's folder, or its checkpoint.pt")
    runs.add_run_flags(parser, name=None)  # the default depends on what is asked for
    parser.add_argument("--against", help="another run: McNemar's test between the two")
    parser.add_argument("--latent", choices=["mu", "sample"], default="mu", help="sample: a row for z ~ q(z|x), too")
    parser.add_argument("--layer", action="store_true", help="a row for the 1024 features below mu, too")
    data.add_flags(parser)
    parser.add_argument("--supervised", action="store_true", help="train an encoder with labels instead")
    parser.add_argument("--latent-dim", type=runs.number(int, 1), default=128, help="dimensions of mu of --supervised")
    add_training_flags(parser, epochs=10, batch_size=128, lr=1e-3)
    args = parser.parse_args(argv)
    args.supervised |= args.resume and args.checkpoint is None  # only the training can go on
    if args.supervised == (args.checkpoint is not None):
        raise runs.UserError("give either a checkpoint to probe or --supervised (--help lists the flags)")
    if args.supervised and (args.against or args.layer or args.latent == "sample"):
        raise runs.UserError("--against, --layer and --latent are of a probe: train first, then probe that run")
    if args.supervised:
        parser.set_defaults(name="supervised", supervised=True)
        return runs.parse(parser, argv, "probe.py", may_differ=("data_dir",))
    if args.resume:
        raise runs.UserError("--resume continues a training with --supervised; a probe begins anew and takes seconds")
    for key in ("latent_dim", "epochs", "batch_size", "lr", "log_every", "precision"):
        if getattr(args, key) != parser.get_default(key):
            raise runs.UserError(f"{runs.spelled(key)} is of a training with --supervised: omit it")
    saved = runs.load_checkpoint(runs.checkpoint_file(args.checkpoint))["args"]
    parser.set_defaults(name=f"{name_of_run(args.checkpoint)}-probe")
    parser.set_defaults(**{key: saved[key] for key in ("data", "data_dir", "data_files", "holdout") if key in saved})
    args = parser.parse_args(argv)
    if args.data != saved.get("data"):  # other data: what the checkpoint says of its own is void
        parser.set_defaults(data_files=None, holdout=0)
        args = parser.parse_args(argv)
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
    The largest entry of the gradient in V and b ends at most at `tolerance`, unless rounding or 2000 iterations stop
    the search before.
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
    """The last member of GRID, from the strongest down, before the cross-entropy on a random tenth rises after fitting
    the others. Each fit begins at the last one's end.
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


# --- features -----------------------------------------------------------------------------------------------------


def name_of_run(path):
    """The name of the run to which a folder or checkpoint.pt belongs."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", runs.checkpoint_file(path).resolve().parent.name)


@torch.no_grad()
def below_mu(model, images, batch_size=500):
    """The 1024 features from which mu and logvar are read, of uint8 images."""
    model.eval()
    return torch.cat([model.encoder.features(part.float() / 255) for part in images.split(batch_size)])


def pixels(images):
    """uint8 images -> (N, 3072) float32 in [0, 1]."""
    return images.flatten(1).float() / 255


def principal_directions(x, dims, seed):
    """(D, dims): the first principal components of x (N, D), by randomised iteration (Halko et al. 2011)."""
    torch.manual_seed(seed)
    _, _, vectors = torch.pca_lowrank(x, q=min(2 * dims, *x.shape), niter=4)
    return vectors[:, :dims]


def baselines(dataset, latent_dim, classes, seed):
    """{row: score} of what needs no training, from runs/probe-baselines.json where it has them."""
    cache = runs.ROOT / "probe-baselines.json"
    key = hashlib.sha256(repr((latent_dim, seed, GRID)).encode())
    for tensor in (dataset.images, dataset.labels, dataset.test, dataset.test_labels):
        key.update(tensor.cpu().contiguous().numpy())
    known, key = runs.read_json(cache), key.hexdigest()
    if key not in known:
        directions = principal_directions(pixels(dataset.images), latent_dim, seed)
        torch.manual_seed(seed)
        untrained = vae.VAE(latent_dim).to(dataset.images.device)
        scores = Scores(dataset, classes, seed)
        scores.add("raw pixels", pixels)
        scores.add("principal components", lambda x: pixels(x) @ directions)
        scores.add("untrained encoder", lambda x: vae.encode(untrained, x))
        known = runs.read_json(cache) | {key: scores.rows}  # as it is by now: other probes may run beside this one
        runs.write_json(cache, known)
    return known[key]


# --- the reference: the same encoder with labels --------------------------------------------------------------------


def train_supervised(args, run, images, labels, classes):
    """Encoder and linear layer on mu, end to end with labels: cross-entropy, flips. -> model, the layer, seconds."""
    device = images.device
    torch.manual_seed(args.seed)
    model, layer = vae.VAE(args.latent_dim).to(device), nn.Linear(args.latent_dim, classes).to(device)
    optimizer = devices.adam([*model.encoder.parameters(), *layer.parameters()], args.lr, device)
    parts = {"average": model, "layer": layer, "optimizer": optimizer}  # "average": what vae.load reads
    model.train()
    with Loop.of_epochs(run, args, parts, images, "lower --lr") as loop:
        for step in loop:
            flip = torch.rand(args.batch_size, device=device, generator=loop.generator("noise")) < 0.5
            rows = loop.rows(images)
            devices.set_lr(optimizer, devices.learning_rate(step, loop.total, args.lr, "cosine"))
            optimizer.zero_grad(set_to_none=True)
            with devices.autocast(device, args.precision):
                logits = layer(model.encoder(data.batch(images, rows, flip))[0])
            loss = F.cross_entropy(logits.float(), labels[rows])
            loss.backward()
            optimizer.step()
            loop.add({"loss": loss.detach()})
            if loop.logs():
                loop.log(**loop.means())
            if loop.saves():
                with torch.no_grad():
                    logits = layer(vae.encode(model, images[:SEEN]))
                model.train()  # which encode had left
                loop.save({"train_cross_entropy": F.cross_entropy(logits, labels[:SEEN]).item()})
    return model.eval(), layer, loop.spent()


# --- main ---------------------------------------------------------------------------------------------------------


class Scores:
    """The table of a probe: linear classifiers on features of the same images, a row each."""

    def __init__(self, dataset, classes, seed):
        self.dataset, self.classes, self.seed = dataset, classes, seed
        self.rows = {}

    def add(self, row, features):
        """Fit to features(training images), score on features(test images) -> the predicted classes of the latter."""
        train, test = features(self.dataset.images), features(self.dataset.test)
        predicted, facts = classify(train, self.dataset.labels, test, self.classes, self.seed)
        self.rows[row] = score(predicted, self.dataset.test_labels) | facts
        return predicted


def check_unseen(path, flags, args, total):
    """Raises UserError when an encoder was trained with the labels of images that are to test it; says it when it was
    trained on such images without their labels.

    path: of its run; flags: those of its training; total: all training images, held out or not
    """
    if flags.get("data_files") != args.data_files:
        return
    trained = total - flags.get("holdout", 0)  # on the first so many training images
    if flags.get("limit"):
        trained = min(trained, flags["limit"])
    seen = trained - (total - args.holdout)
    if seen <= 0:
        return
    words = f"{path} was trained on {seen} of the {args.holdout} held-out images"
    if flags.get("supervised"):
        raise runs.UserError(
            f"{words}, with their labels: train it with --holdout {args.holdout}, or hold out fewer here"
        )
    note(f"{words}, without their labels")


def probe(args, encoders, dataset, classes):
    """Rows of the features of a run's VAE, and of the one of --against. encoders: {path of a run: its VAE, its flags}
    -> metrics, the classes predicted of the test images from mu."""
    model = encoders[args.checkpoint][0]
    scores = Scores(dataset, classes, args.seed)
    predicted = scores.add("mu", lambda x: vae.encode(model, x))
    if args.latent == "sample":
        scores.add("z ~ q(z|x)", lambda x: vae.encode(model, x, args.seed))
    if args.layer:
        scores.add("layer below mu", lambda x: below_mu(model, x))
    scores.rows |= baselines(dataset, model.encoder.mu.out_features, classes, args.seed)
    metrics = {"checkpoint": args.checkpoint}
    if args.against:
        other = encoders[args.against][0]
        theirs = scores.add(f"mu of {name_of_run(args.against)}", lambda x: vae.encode(other, x))
        truth = dataset.test_labels.cpu()
        metrics["against"] = {"checkpoint": args.against} | mcnemar(predicted == truth, theirs == truth)
    return metrics | {"rows": scores.rows}, predicted


def supervised(args, run, dataset, classes):
    """The reference: trained and scored. -> metrics, the encoder, the classes predicted of the test images."""
    check_batch(args.batch_size, len(dataset.images))
    model, layer, spent = train_supervised(args, run, dataset.images, dataset.labels, classes)
    with torch.no_grad():
        predicted = layer(vae.encode(model, dataset.test)).argmax(1).cpu()
    row = score(predicted, dataset.test_labels.cpu()) | {"dims": args.latent_dim, **spent}
    return {"rows": {"supervised": row}}, model, predicted


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, args.precision, divides=False)
    run = runs.Run(args, "probe.py", argv)
    if not args.supervised:
        encoders = {path: vae.load(path, device) for path in (args.checkpoint, args.against) if path}
    dataset = data.splits(args, device, labelled=True)
    data.note_files(args, dataset)
    if len(dataset.images) < 10:
        raise runs.UserError(f"{len(dataset.images)} training images are too few for a probe: it takes ten")
    classes = len(dataset.classes)
    if args.supervised:
        found, model, predicted = supervised(args, run, dataset, classes)
    else:
        if (run / "checkpoint.pt").exists():
            raise runs.UserError(f"{run.folder} holds a training: give the probe another --name")
        for path, (_, flags) in encoders.items():
            check_unseen(path, flags, args, dataset.total)
        run.write_args()
        (run / "metrics.json").unlink(missing_ok=True)  # an earlier probe's, perhaps with other flags
        model = encoders[args.checkpoint][0]
        found, predicted = probe(args, encoders, dataset, classes)
    names, truth = dataset.classes, dataset.test_labels.cpu()
    hits = {name: (predicted == truth)[truth == c] for c, name in enumerate(names)}
    per_class = {name: 100 * hit.double().mean().item() for name, hit in hits.items() if len(hit)}
    metrics = {"data": args.data, "holdout": args.holdout, "images": len(dataset.images), "test_images": len(truth)}
    metrics |= found | {"per_class": per_class}
    pictures.plot_confusion(predicted, truth, names, run / "confusion.png")
    codes, test_codes = standardise(vae.encode(model, dataset.images), vae.encode(model, dataset.test))
    pictures.plot_latents(codes, dataset.labels, test_codes, truth, names, run / "latents.png")
    runs.write_json(run / "metrics.json", metrics)  # last: it says that the run is finished
    print_table(run, args, metrics)


def print_table(run, args, metrics):
    print(f"\n{run.folder}: {args.data}, accuracy in per cent on {metrics['test_images']} images, 95 % interval")
    for row, found in metrics["rows"].items():
        low, high = found["interval"]
        facts = f"{found['dims']} dimensions, {found['seconds']:.0f} s"
        print(f"  {row:26} {found['accuracy']:6.2f}  {low:.2f} to {high:.2f}  {facts}")
    print("  by class: " + ", ".join(f"{name} {value:.1f}" for name, value in metrics["per_class"].items()))
    if "against" in metrics:
        test = metrics["against"]
        low, high = test["interval"]
        words = f"{test['difference']:+.2f} points, 95 % {low:+.2f} to {high:+.2f}"
        print(f"  against {test['checkpoint']}: {words}; McNemar's exact p = {test['p_value']:.2g}")


if __name__ == "__main__":
    runs.cli(main)
