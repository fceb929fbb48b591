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
import io
import time

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn
from tqdm import tqdm

from common import data, devices, pictures, runs

CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_run_flags(parser, name="classifier")
    data.add_flags(parser)
    parser.add_argument("--epochs", type=runs.number(int, 1), default=10, help="passes over the training images")
    parser.add_argument("--batch-size", type=runs.number(int, 2), default=500, help="images a step")
    parser.add_argument("--lr", type=runs.number(float, above=0), default=0.75, help="peak learning rate")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the training")
    parser.add_argument("--log-every", type=runs.number(int, 1), default=20, help="steps between lines of log.jsonl")
    return runs.parse(parser, argv, may_differ=("data_dir",))


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


def export(net, path):
    """Write `net` as a program of torch.export that maps any number and size of uint8 images to features."""
    example, buffer = torch.zeros(2, 3, 48, 40, dtype=torch.uint8), io.BytesIO()
    sizes = {0: torch.export.Dim("B"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    torch.export.save(torch.export.export(net.eval(), (example,), dynamic_shapes=(sizes,)), buffer)
    runs.write_bytes(path, buffer.getbuffer())


def shifted(x, shift):
    """x (B, 3, H, W), shift (2, B) in 0..4 -> each image moved by shift - 2 pixels, its edges reflected."""
    windows = F.pad(x, [2] * 4, mode="reflect").unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    return windows[torch.arange(len(x), device=x.device), :, shift[0], shift[1]]  # of (B, 3, 5, 5, H, W)


@torch.no_grad()
def evaluate(net, images, labels):
    """-> cross entropy; accuracy; accuracy_flip, of the mean logits of image and mirror; Wilson's 95 % intervals."""
    net.eval()
    plain, mirror = (torch.cat([net.logits(net(part)) for part in x.split(500)]) for x in (images, images.flip(3)))
    found = {"cross_entropy": F.cross_entropy(plain, labels).item()}
    for key, logits in {"accuracy": plain, "accuracy_flip": plain + mirror}.items():
        test = binomtest((logits.argmax(1) == labels).sum().item(), len(labels))
        found[key], (found[f"{key}_low"], found[f"{key}_high"]) = test.statistic, test.proportion_ci(method="wilson")
    return found


def train(args, run, net, images, labels, test, test_labels):
    """Train `net` to args.epochs, with --resume from the checkpoint. -> its slow weights, {clock: seconds}."""
    device, average = images.device, copy.deepcopy(net)
    weights, biases = ([p for p in net.parameters() if p.requires_grad and (p.ndim == 1) == one] for one in (0, 1))
    groups = [{"params": weights, "factor": 1, "weight_decay": 1.3e-3}, {"params": biases, "factor": 64}]
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.85, nesterov=True)
    parts, state = {"model": net, "average": average, "optimizer": optimizer}, {"step": 0} | dict.fromkeys(CLOCKS, 0.0)
    if args.resume:
        state = run.restore(parts)
        run.rewind_log(state["step"])
    else:
        run.begin()
    began = {key: clock() - state[key] for key, clock in CLOCKS.items()}
    per_epoch = len(images) // args.batch_size  # the last, incomplete batch is dropped
    total = args.epochs * per_epoch
    mirrored = torch.rand(len(images), generator=devices.generator("cpu", args.seed, "mirror")).to(device) < 0.5
    with runs.stop_on_signal() as stop, tqdm(total=total, initial=state["step"], unit="step") as bar:
        for step in range(state["step"], total):
            done, (epoch, i) = step + 1, divmod(step, per_epoch)
            order = torch.randperm(len(images), generator=devices.generator("cpu", args.seed, "order", epoch))
            index = order[i * args.batch_size :][: args.batch_size].to(device)
            noise = devices.generator(device, args.seed, "shift", step)
            shift = torch.randint(0, 5, (2, args.batch_size), device=device, generator=noise)
            x, y = shifted(data.batch(images, index, mirrored[index] ^ bool(epoch % 2)), shift), labels[index]
            factor = min((step + 1) / (0.2 * total + 1), (total - step) / (0.8 * total))  # up for a fifth, then down
            for group in optimizer.param_groups:
                group["lr"] = args.lr * group["factor"] * factor
            h = net.stem(x.contiguous(memory_format=torch.channels_last))  # whitening would magnify bfloat16's rounding
            with devices.autocast(device, args.precision):
                logits = net.logits(net.body(h))
            loss = F.cross_entropy(logits, y, label_smoothing=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if done % 5 == 0 or done == total:  # Lookahead: the slow weights follow, the fast ones go on from there
                devices.average_weights(average, net, torch.tensor(0.77 * (done / total) ** 3, device=device))
                net.load_state_dict(average.state_dict())
            bar.update()
            complete, stopping = i == per_epoch - 1, stop.requested and done < total
            spent = {key: clock() - began[key] for key, clock in CLOCKS.items()}
            if done % args.log_every == 0:  # the only time that the host waits for the device
                found = {"loss": loss.item(), "cross_entropy": F.cross_entropy(logits, y).item()}
                found["accuracy"] = (logits.argmax(1) == y).double().mean().item()
                runs.check_finite(found["loss"], done, "lower --lr")
                run.log(step=done, epoch=done / per_epoch, lr=args.lr * factor, **spent, **found)
                bar.set_postfix(found)
            if complete or stopping:
                glimpse = evaluate(average, test[:1000], test_labels[:1000])
                runs.check_finite(glimpse["cross_entropy"], done, "lower --lr")  # what is saved must be finite
                run.save(done, parts=parts, **spent)
            if complete:
                run.log(step=done, epoch=epoch + 1, **glimpse)
            if stopping:
                run.stop(done, total)
    return average, {key: clock() - began[key] for key, clock in CLOCKS.items()}


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, args.precision)
    run = runs.Run(args, "classifier.py")
    found = data.splits(args, device, labelled=True)
    images, labels, test, test_labels = found.images, found.labels, found.test, found.test_labels
    args.data_files = found.fingerprint  # goes into args.json and the checkpoint
    if args.resume:
        data.note_change(args, run.load()["args"])
    runs.check_batch(args.batch_size, len(images))
    torch.manual_seed(args.seed)  # the initial weights
    net = ResNet(len(found.classes))
    net.whiten(images[:5000].cpu())
    net.to(device, memory_format=torch.channels_last)
    net, spent = train(args, run, net, images, labels, test, test_labels)
    metrics = {**evaluate(net, test, test_labels), "parameters": sum(p.numel() for p in net.parameters()), **spent}
    runs.write_json(run / "metrics.json", metrics)
    pictures.plot_curves(run.read_log(), run / "curves.png", {"accuracy": "accuracy", "cross_entropy": "nats per image"})
    export(net.to("cpu", memory_format=torch.contiguous_format), run / "features.pt2")
    title = f"{args.data}, {len(test)} {'held-out training' if args.holdout else 'test'} images"
    run.summary(title, metrics, ["curves.png"])


if __name__ == "__main__":
    runs.cli(main)
