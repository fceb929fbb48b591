"""A small residual network for CIFAR-10, trained in minutes, with features for fid.py where Inception is out of reach.

After He et al. 2016 (1512.03385), airbench (Jordan 2024, 2404.00498) and Lookahead (Zhang et al. 2019, 1907.08610).

    python classifier.py                             # CIFAR-10 in data/ or downloaded there; CUDA where there is one
    python classifier.py --precision bf16            # faster where the processor or GPU computes in bfloat16
    python classifier.py --name classifier --resume  # go on after Ctrl-C or a crash; measure a finished run again
    python fid.py cifar10:test FOLDER --features runs/classifier/features.pt2

Measured with OMP_NUM_THREADS=1 python classifier.py --precision bf16 (CIFAR-10, seed 0): 93.03 % of the test images
(95 % interval 92.5 to 93.5), 93.62 % with mirror images averaged; 18 minutes of one core's time (AMD EPYC with bf16;
the core was shared, 49 minutes by the clock), torch 2.13.0+cpu, 2026-11-23, commit aee8cae. CUDA: not measured.

features.pt2 is a program of torch.export: uint8 images (B, 3, H, W), resized to 32x32 inside -> (B, 256) float32, what
the last layer sees. The network knows its training images: compare with held-out ones.

Choices: images are mirrored in every second epoch and shifted by up to 2 pixels; SGD with Nesterov's momentum; smoothed
labels; batch norm's biases learn 64 times as fast, its scales are fixed. What is measured and exported are Lookahead's
slow weights and their averaged statistics. Unlike airbench: residual connections, a fixed first layer for 3x3 patches.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from common import data, devices, inception, pictures, runs
from common.loop import Loop, add_training_flags, check_batch
from common.scores import wilson

SEEN = 1000  # test images that are measured at each checkpoint; nothing is chosen by them


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_run_flags(parser, name="classifier")
    data.add_flags(parser)
    add_training_flags(parser, epochs=10, batch_size=500, lr=0.75)
    return runs.parse(parser, argv, "classifier.py", may_differ=("data_dir",))


def convolution(inputs, outputs, *pool):
    conv, norm = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outputs)
    nn.init.dirac_(conv.weight[:inputs])  # at first a copy of the inputs, followed by random mixtures of them
    norm.weight.requires_grad_(False)
    return nn.Sequential(conv, *pool, norm, nn.GELU())


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class ResNet(nn.Module):
    """uint8 images (B, 3, H, W) -> features (B, D), by the fixed stem and the body. `logits` of them: (B, classes)."""

    def __init__(self, classes=10, widths=(32, 64, 256, 256)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], kernel_size=3), nn.GELU()).requires_grad_(False)
        layers = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):  # to 15, 7 and 3 pixels
            layers += [convolution(inputs, outputs, nn.MaxPool2d(2)), Residual(convolution(outputs, outputs))]
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes, bias=False)

    @torch.no_grad()
    def whiten(self, images):
        """Make the stem the leading principal components of the images' 3x3 patches, scaled to unit variance."""
        patches = F.unfold(images / 255, kernel_size=3, stride=3).transpose(0, 1).flatten(1)  # (27, patches)
        variance, basis = torch.linalg.eigh(torch.cov(patches))  # ascending
        rows = (basis / (variance.clamp(min=0) + 1e-4).sqrt()).T[-self.stem[0].out_channels // 2 :]
        weight = torch.cat([rows, -rows])  # GELU hides one half of a component: the negative shows it
        self.stem[0].load_state_dict({"weight": weight.view(-1, 3, 3, 3), "bias": -weight @ patches.mean(1)})

    def forward(self, images):  # those of 32x32 pass the resize unchanged
        x = F.interpolate(images / 255, size=(32, 32), mode="bilinear", antialias=True)
        return self.body(self.stem(x))

    def logits(self, features):
        return self.head(features).float() / 9  # so that the head takes the learning rate of the convolutions


def shifted(x, shift):
    """x (B, 3, H, W), shift (2, B) in 0..4 -> each image moved by 2 - shift pixels, its edges reflected."""
    windows = F.pad(x, [2] * 4, mode="reflect").unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    return windows[torch.arange(len(x), device=x.device), :, shift[0], shift[1]]  # of (B, 3, 5, 5, H, W)


@torch.no_grad()
def evaluate(net, images, labels):
    """-> cross entropy; accuracy; accuracy_flip, of the mean logits of image and mirror; Wilson's 95 % intervals."""
    net.eval()
    plain, mirror = (torch.cat([net.logits(net(part)) for part in x.split(500)]) for x in (images, images.flip(3)))
    found = {"cross_entropy": F.cross_entropy(plain, labels).item()}
    for key, logits in {"accuracy": plain, "accuracy_flip": plain + mirror}.items():
        share, low, high = wilson(logits.argmax(1) == labels)
        found |= {key: share, f"{key}_low": low, f"{key}_high": high}
    return found


def make_optimizer(net, lr):
    """SGD with Nesterov's momentum; batch norm's biases learn 64 times as fast, and do not decay."""
    trained = [p for p in net.parameters() if p.requires_grad]
    weights = {"params": [p for p in trained if p.ndim > 1], "factor": 1, "weight_decay": 1.3e-3}
    biases = {"params": [p for p in trained if p.ndim == 1], "factor": 64}
    return torch.optim.SGD([weights, biases], lr, momentum=0.85, nesterov=True)


def train(args, run, net, dataset):
    """Train `net` to args.epochs, with --resume from the checkpoint. -> its slow weights, seconds."""
    images, labels = dataset.images, dataset.labels
    average = copy.deepcopy(net)
    optimizer = make_optimizer(net, args.lr)
    parts = {"model": net, "average": average, "optimizer": optimizer}
    coin = devices.generator("cpu", args.seed, "mirror")
    mirrored = torch.rand(len(images), generator=coin).to(images.device) < 0.5  # in even epochs; in odd ones the others
    with Loop.of_epochs(run, args, parts, images, "lower --lr") as loop:
        for step in loop:
            rows = loop.rows(images)
            flip = mirrored[rows] ^ bool(loop.epoch() % 2)
            shift = torch.randint(0, 5, (2, len(rows)), device=images.device, generator=loop.generator("shift"))
            x, y = shifted(data.batch(images, rows, flip), shift), labels[rows]
            rise, fall = step / (0.2 * loop.total + 1), (loop.total - step + 1) / (0.8 * loop.total)
            share = min(rise, fall)  # of args.lr: up for a fifth of the steps, then down
            for group in optimizer.param_groups:
                group["lr"] = args.lr * group["factor"] * share
            h = net.stem(x.contiguous(memory_format=torch.channels_last))  # whitening would magnify bfloat16's rounding
            with devices.autocast(images.device, args.precision):
                logits = net.logits(net.body(h))
            loss = F.cross_entropy(logits, y, label_smoothing=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 5 == 0 or step == loop.total:  # Lookahead: slow weights follow, the fast go on there
                devices.average_weights(average, net, torch.full((), 0.77 * (step / loop.total) ** 3, device=x.device))
                net.load_state_dict(average.state_dict())
            if loop.logs():  # the only time that the host waits for the device
                found = {"loss": loss.item(), "cross_entropy": F.cross_entropy(logits, y).item()}
                found["accuracy"] = (logits.argmax(1) == y).float().mean().item()
                loop.log(lr=args.lr * share, **found)
                loop.show(f"loss {found['loss']:.3f}, accuracy {found['accuracy']:.3f}")
            if loop.saves():
                loop.save(evaluate(average, dataset.test[:SEEN], dataset.test_labels[:SEEN]))
    return average, loop.spent()


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, args.precision, divides=False)
    dataset = data.splits(args, device, labelled=True)
    check_batch(args.batch_size, len(dataset.images))
    run = runs.Run(args, "classifier.py", argv)
    data.note_files(args, dataset)
    torch.manual_seed(args.seed)  # the initial weights
    net = ResNet(len(dataset.classes))
    net.whiten(dataset.images[:5000].cpu())
    net.to(device, memory_format=torch.channels_last)
    net, spent = train(args, run, net, dataset)
    metrics = evaluate(net, dataset.test, dataset.test_labels)
    metrics |= {"parameters": sum(p.numel() for p in net.parameters()), **spent}
    titles = {"accuracy": "accuracy", "cross_entropy": "cross-entropy, nats per image"}
    measured = data.measured_on(args)
    pictures.plot_curves(run.read_log(), run / "curves.png", titles, measured)
    inception.export(net.to("cpu", memory_format=torch.contiguous_format), run / "features.pt2")
    runs.write_json(run / "metrics.json", metrics)  # last: it says that the run is finished
    title = f"{args.data}, {len(dataset.test)} {measured} images"
    run.summary(title, metrics)


if __name__ == "__main__":
    runs.cli(main)
