"""What vae.py and vae_gan.py do alike around their models: flags, what is read, rates, what a run leaves."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from common import data, devices, pictures, runs
from common.inception import load_extractor
from common.loop import add_training_flags, check_batch
from common.runs import UserError, number
from common.streams import note

REUSE = ("resume", "eval_only", "sample")  # flags that go on from a checkpoint, with the flags it was made with
MAY_DIFFER = ("prior", "epochs", "data_dir", "save_every", "capture", "fid", "features")  # flags that may change then
FRAME_SAMPLES = 64  # in a frame of training.gif, which has a frame for each checkpoint at an epoch's end
MAX_FRAMES = 30  # of training.gif: a file that a page can show
POINTS = 8  # of an interpolation
DISTANCES = ("fid_", "fd_")  # how their names in metrics.json begin


def add_flags(parser, name, batch_size, lr):
    """All flags that the scripts share. name: of the run, by default."""
    runs.add_run_flags(parser, name)
    data.add_flags(parser)
    add_training_flags(parser, 50, batch_size, lr)
    add = parser.add_argument
    add("--latent-dim", type=number(int, 1), default=128, help="dimensions of z")
    add("--patches", type=number(float, 0), default=0.0, help="weight of common/patches.py's likelihood; 0: without")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate")
    add("--ema", type=number(float, 0, 1), default=0.999, help="decay of the averaged weights")
    add("--capture", action=argparse.BooleanOptionalAction, default=False, help="CUDA graph of the step")
    add("--save-every", type=number(int, 1), default=1, help="epochs between checkpoints")
    # evaluation
    add("--eval-only", action="store_true", help="measure and draw again from the checkpoint")
    add("--sample", type=number(int, 1), help="write SAMPLE images from the checkpoint, do no more")
    add("--prior", choices=["normal", "expost"], default="normal", help="what --sample draws z from")
    count = number(int, 2, words=("auto", "off"))
    add(
        "--fid",
        type=count,
        metavar="N",
        default="auto",
        help="images: auto (10,000; on a CPU only with --features), off, up to N",
    )
    add("--features", nargs="+", help="of the distances: inception (the default), torch.export programs, or several")


def check_flags(args):
    """Raises UserError for flags of which one would be ignored."""
    if args.prior != "normal" and not args.sample:
        raise UserError(f"--prior {args.prior} is of --sample: give how many images, or omit it")


def begin(args, script, argv):
    """-> the run, training and test images (uint8), fid.py's extractors. Raises UserError for what is missing: here,
    before the training, it can be helped. argv: what main was given.
    """
    check_flags(args)
    trains = not (args.eval_only or args.sample)  # the flags of a training on a GPU must not bind who measures it
    device = devices.start(args.device, args.precision if trains else "fp32", args.capture and trains)
    if args.sample and args.prior == "normal":
        images = torch.empty(0, 3, 32, 32, dtype=torch.uint8, device=device)  # it takes none
        return runs.Run(args, script, argv), images, images, []
    dataset = data.splits(args, device)
    if trains:
        check_batch(args.batch_size, len(dataset.images))
    if args.resume:
        check_goes_on(args)
    data.note_files(args, dataset)
    extractors = [] if args.sample else wanted_extractors(args, device)
    return runs.Run(args, script, argv), dataset.images, dataset.test, extractors


def check_goes_on(args):
    """Raises UserError when a resumed training would not be the one that was begun."""
    if args.schedule == "cosine":
        begun = runs.load_checkpoint(runs.ROOT / args.name / "checkpoint.pt")["args"]["epochs"]
        if args.epochs != begun:
            raise UserError(
                f"--schedule cosine falls over the {begun} epochs that the run was begun with: omit --epochs, or "
                "start another with --name"
            )


def wanted_extractors(args, device):
    """What --fid and --features ask for -> fid.py's extractors. Inception's may be missing, which is said; other
    features must be there and take images of 32x32, or a UserError is raised."""
    if args.fid == "off" or (args.fid == "auto" and device.type == "cpu" and not args.features):
        return []
    names = args.features or ["inception"]
    if isinstance(names, str):  # from the checkpoint of an earlier commit
        names = [names]
    found = []
    for name in names:
        try:
            found.append(load_extractor(features=None if name == "inception" else name, device=device))
        except (UserError, SystemExit) as error:  # SystemExit: main_first's, in the ranks beside the main one
            if name != "inception":
                raise
            note(f"there will be no FID: {error}")  # and the training goes on
    for extractor in found:
        extractor([torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)])
    if len({extractor.ruler for extractor in found}) < len(found):
        raise UserError("two of --features have one name, under which their distances would be kept: rename one")
    return found


def set_rates(args, loop, *optimizers):
    """Give the optimisers the learning rate of the loop's step -> it, and the decay of averaged weights there."""
    lr = devices.learning_rate(loop.step, loop.total, args.lr, args.schedule)
    for optimizer in optimizers:
        devices.set_lr(optimizer, lr)
    return lr, devices.average_decay(loop.step, args.ema, loop.device)


def restore(run, average):
    """Load a run's averaged model into `average` -> `average`, {"step", "seconds", "cpu_seconds"} of its training."""
    state = run.restore({"average": average})
    return average, {key: state[key] for key in ("step", "seconds", "cpu_seconds") if key in state}


def write_samples(run, args, samples):
    """--sample: uint8 images (N, 3, H, W) as PNG files in the run's folder."""
    folder = run / f"samples-{args.prior}"
    pictures.write_images(samples, folder)
    print(f"{len(samples)} samples are in {folder}")


def great_circle(a, b, points):
    """From a to b, both included, by slerp of directions and linearly in the norm: each (N, Z) -> (N, points, Z)."""
    # Not the straight line: the mu of images have about the norm of z ~ N(0, I), two of them stand about at right
    # angles, so that the line between them comes nearer to 0 than the codes of images do, and there the decoder blurs.
    first, last = (mu.cpu().double()[:, None] for mu in (a, b))
    t = torch.linspace(0, 1, points, dtype=first.dtype)[:, None]
    norm = torch.lerp(first.norm(dim=-1, keepdim=True), last.norm(dim=-1, keepdim=True), t)
    first, last = F.normalize(first, dim=-1), F.normalize(last, dim=-1)
    cosine = (first * last).sum(-1, keepdim=True)
    angle = torch.acos(cosine.clamp(-1 + 1e-9, 1 - 1e-9))  # of equal and of opposite codes: next to it
    z = norm * (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * last) / torch.sin(angle)
    return z.to(a)


def draw_interpolations(run, test, encode, decode):
    """interpolations.png: a row for each of up to eight pairs of test images, one at each end, between them POINTS
    images made from codes on the way from the one's mu to the other's.

    encode: uint8 images (N, 3, 32, 32) -> mu (N, Z); decode: z (N, Z) -> uint8 images.
    """
    n = min(8, len(test) // 2)
    if n == 0:
        return
    pairs = test[: 2 * n].unflatten(0, (n, 2))  # (n, 2, 3, 32, 32)
    mu = encode(test[: 2 * n]).unflatten(0, (n, 2))  # (n, 2, Z)
    z = great_circle(mu[:, 0], mu[:, 1], POINTS)
    made = decode(z.flatten(0, 1)).unflatten(0, (n, POINTS))
    rows = torch.cat([pairs[:, :1], made, pairs[:, 1:]], 1)
    title = "images at the ends; between them decoded codes, from mu to mu"
    pictures.plot_grid(rows.flatten(0, 1), run / "interpolations.png", title, POINTS + 2)


def label(args):
    """The name of the measured images' statistics in the cache."""
    return f"{Path(args.data).name}-{data.measured_on(args).split()[0]}"


def earlier_distances(run, args, step, extractors):
    """The distances that metrics.json already holds of the weights at `step` and the same images: they took long.

    Not those of `extractors`, which are about to be measured anew, perhaps on other images.
    """
    old = runs.read_json(run / "metrics.json")
    if old.get("step") != step or old.get("data_files", args.data_files) != args.data_files:
        return {}
    anew = tuple(f"{extractor.ruler}_" for extractor in extractors)
    return {key: value for key, value in old.items() if key.startswith(DISTANCES) and not key.startswith(anew)}


def distance_sets(args, **sets):
    """{name: images (N, ...)} -> of each as many as --fid says, and no more than the smallest set has."""
    wanted = 10_000 if args.fid == "auto" else args.fid
    count = min(wanted, *map(len, sets.values()))
    if count < wanted and args.fid != "auto":
        note(f"--fid {wanted}: the smallest set has {count} images, so {count} of each are compared")
    return {name: images[:count] for name, images in sets.items()}


def finish(run, args, metrics, test, made, curves):
    """metrics.json, the curves ({key of the log: title}), pictures of what the model made, the closing table.

    metrics: what the script has measured; made: {"reconstruction" of test, "generation" from N(0, I),
    "generation_expost": uint8 images}. Added is their sharpness_*, high-frequency energy over the test images', where
    these have some.
    """
    metrics["images_per_second"] = metrics["step"] * args.batch_size / metrics["seconds"]  # evaluations included
    metrics["data_files"] = args.data_files
    detail = data.high_frequency_energy(test)
    if detail > 0:
        metrics |= {f"sharpness_{name}": data.high_frequency_energy(x) / detail for name, x in made.items()}
    measured = data.measured_on(args)
    pictures.plot_curves(run.read_log(), run / "curves.png", curves, measured)
    rows = [test[:64], made["reconstruction"][:64]]
    pictures.plot_rows(rows, run / "reconstructions.png", f"{measured} images, each row above its reconstructions")
    pictures.plot_grid(made["generation"][:128], run / "samples-normal.png", "samples, z ~ N(0, I)")
    expost = "samples, z ~ Gaussian fitted to training codes"
    pictures.plot_grid(made["generation_expost"][:128], run / "samples-expost.png", expost)
    if run.frames():
        pictures.write_gif(pictures.spread(run.frames(), MAX_FRAMES), run / "training.gif", colours=256)
    runs.write_json(run / "metrics.json", metrics)  # last: it says that the run is finished
    run.summary(f"{args.data}, {len(test)} {measured} images", metrics)
    measured_any = any(key.startswith(DISTANCES) for key in metrics)
    if args.fid == "auto" and test.device.type == "cpu" and not measured_any:
        print("  no FID: --fid auto leaves Inception out on a CPU, where it takes most of an hour. This fills it in:")
        print(f"  python {run.script} --name {args.name} --eval-only --fid 10000")
