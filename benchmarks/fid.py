"""fid.py against pytorch-fid: the same folders, the same weights; time, ratio and difference.

    python benchmarks/fid.py --images 1000               # 1,000 + 1,000 CIFAR-10 test images as PNG, about 15 minutes
    python benchmarks/fid.py --images 50 --data shapes   # a quick look; nothing is downloaded
    python benchmarks/fid.py --images 10000 --device cuda --fast bf16 --weights pt_inception-2015-12-05-6726825d.pth

Needs requirements.txt alone, which pins pytorch-fid. Without --weights both get the same random network, its batch
norm calibrated on images: its numbers mean nothing, their difference and the times do.

Both programs run as a person would start them, from their start to their printed number. They take turns: while one
runs, the other's processes are stopped, so that both meet the same load of a shared machine.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, where `fid` is this file

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from common import data, inception, pictures, runs  # noqa: E402

PYTORCH_FID = (
    "import torch; torch.backends.cudnn.allow_tf32 = False; "  # on by default, and a difference of its own
    "from common import data; data.import_torchvision(); from pytorch_fid.fid_score import main; main()"
)


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("--images", type=runs.number(int, 2, 5000), default=1000, help="images in each folder")
    parser.add_argument("--data", choices=["cifar10", "shapes"], default="cifar10", help="test images of which set")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or is downloaded to")
    parser.add_argument("--weights", help="of Inception; by default random and calibrated")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for both programs")
    parser.add_argument("--fast", choices=["tf32", "bf16"], help="fid.py's --fast")
    return parser.parse_args(argv)


# --- pytorch-fid, and weights for it ------------------------------------------------------------------------------


def calibrated_weights(path, images, seed=0):
    """Write random weights for pytorch-fid's Inception to `path`, with batch norm calibrated on images.

    images: (N, 3, H, W) float in [0, 1]. Uncalibrated, the features of so deep a random network vanish, and any two
    folders are 1e-14 apart. In training mode with momentum 1 each batch norm stores the statistics of what it is
    given, which the layers before it have normalised already.
    """
    torchvision = data.import_torchvision()
    from pytorch_fid import inception

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        state = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
            net = inception.fid_inception_v3().train()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
        net(2 * F.interpolate(images, size=(299, 299), mode="bilinear") - 1)
    torch.save(net.state_dict(), path)


def pytorch_fid(weights):
    """pytorch-fid's own functions with these weights, on the CPU and in this process."""
    data.import_torchvision()
    from pytorch_fid import fid_score, inception

    state = torch.load(weights, weights_only=True)
    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        net = inception.InceptionV3()

    def statistics(path, batch_size=20):
        return fid_score.compute_statistics_of_path(str(path), net, batch_size, 2048, "cpu", num_workers=0)

    def distance(*paths):
        return fid_score.calculate_frechet_distance(*statistics(paths[0]), *statistics(paths[1]))

    def read(files):
        return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in fid_score.ImagePathDataset(files)]

    frechet, suffixes = fid_score.calculate_frechet_distance, fid_score.IMAGE_EXTENSIONS
    return SimpleNamespace(statistics=statistics, distance=distance, read=read, frechet=frechet, suffixes=suffixes)


# --- the measurements ---------------------------------------------------------------------------------------------


def alternate(commands, slices, env):
    """Run programs to their ends, in turns of so many seconds each. -> for each its seconds and what it printed."""
    files = [tempfile.TemporaryFile("w+") for _ in commands]
    processes = [
        subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL, env=env, start_new_session=True)
        for command, file in zip(commands, files, strict=True)
    ]
    seconds = [0.0] * len(commands)
    try:
        for process in processes:
            os.killpg(process.pid, signal.SIGSTOP)
        while any(process.poll() is None for process in processes):
            for i, process in enumerate(processes):
                if process.poll() is None:
                    began = time.perf_counter()
                    os.killpg(process.pid, signal.SIGCONT)
                    try:
                        process.wait(slices[i])
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGSTOP)
                    seconds[i] += time.perf_counter() - began
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for process, command in zip(processes, commands, strict=True):
        if process.returncode:
            raise runs.UserError(f"`{' '.join(command[:4])} ...` failed: run it alone to see why")
    printed = []
    for file in files:
        file.seek(0)
        printed.append(file.read())
        file.close()
    return seconds, printed


def end_to_end(args, folders, weights, scratch):
    """-> seconds and distance of fid.py, and of pytorch-fid, from start to printed number."""
    hub = scratch / "hub" / "checkpoints"  # pytorch-fid has no flag for weights: it looks here
    hub.mkdir(parents=True)
    (hub / inception.WEIGHTS).symlink_to(Path(weights).resolve())
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # pytorch-fid may be there
    env = os.environ | {"TORCH_HOME": str(scratch), "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    paths = [*map(str, folders), "--device", args.device]
    fast = ["--fast", args.fast] if args.fast else []
    ours = [sys.executable, str(ROOT / "fid.py"), *paths, "--weights", str(weights), "--json", *fast]
    theirs = [sys.executable, "-c", PYTORCH_FID, *paths]
    seconds, printed = alternate([ours, theirs], (5, 10), env)  # twice the time for theirs: both end about together
    found = json.loads(printed[0])
    return seconds, [found.get("fid", found.get("fd")), float(re.search(r"FID:\s+(\S+)", printed[1]).group(1))]


def distances(n):
    """The distance alone, of two sets of n random correlated features. -> seconds and distances, ours and theirs."""
    import fid

    data.import_torchvision()
    from pytorch_fid import fid_score

    g = np.random.default_rng(0)
    mix = g.normal(size=(2048, 2048)) * np.logspace(0, -2, 2048) / 45
    sets = [np.maximum(g.normal(size=(n, 2048)) @ mix + 0.3 + 0.05 * i, 0) for i in range(2)]
    stats = [part for x in sets for part in (x.mean(0), np.cov(x, rowvar=False))]
    ours, theirs = fid.frechet_distance, fid_score.calculate_frechet_distance
    small = np.zeros(8), np.eye(8), np.zeros(8), np.eye(8)
    ours(*small), theirs(*small)  # loads what it needs
    seconds, values = {ours: [], theirs: []}, {}
    for function in (ours, theirs, ours, theirs):  # the first calls also fill caches and thread pools: the best counts
        began = time.perf_counter()
        values[function] = float(function(*stats))
        seconds[function].append(time.perf_counter() - began)
    return [min(taken) for taken in seconds.values()], list(values.values())


def row(name, seconds, values):
    ratio, difference = seconds[1] / seconds[0], abs(values[0] / values[1] - 1)
    return f"| {name} | {seconds[0]:.1f} s | {seconds[1]:.1f} s | {ratio:.1f} | {difference:.0e} |"


def main(argv=None):
    args = parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        images, _ = data.load(args.data, args.data_dir, "test")
        folders = scratch / "real", scratch / "fake"
        pictures.write_images(images[: args.images], folders[0])
        blurred = F.avg_pool2d(images[args.images : 2 * args.images].float(), 3, 1, 1).round().to(torch.uint8)
        pictures.write_images(blurred, folders[1])
        weights = args.weights or scratch / "random.pth"
        if not args.weights:
            calibrated_weights(weights, images[-32:].float() / 255)
        name = f"{args.images} + {args.images} images, {args.device}{', ' + args.fast if args.fast else ''}"
        rows.append(row(name, *end_to_end(args, folders, weights, scratch)))
    for n, text in ((5000, "distance alone, 5000 images a side"), (1000, "distance alone, 1000 images a side")):
        rows.append(row(text, *distances(n)))
    print("| | fid.py | pytorch-fid | ratio | relative difference |\n|---|---|---|---|---|")
    print("\n".join(rows))
    versions = runs.versions(args.device)
    print(
        f"\n{versions['machine']}, torch {versions['torch']}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, weights: {args.weights or 'random, calibrated'}"
    )


if __name__ == "__main__":
    runs.cli(main)
