"""Training speed of vae.py's step in images per second, beside the plain loop of most tutorials. One run, one table.

    python benchmarks/vae.py                    # about two minutes on two idle CPU cores; also --device cuda

Every row is a process of its own (memory settings and graphs outlive a measurement). "Plain" is DataLoader with two
workers, ToTensor per image, Adam with its defaults, and loss.item() in every step.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one folder up
import timing

import vae
from common import data, devices, runs

ROWS = {
    "plain": "plain DataLoader loop",
    "returned": "ours, memory returned to the system",
    "fp32": "ours",
    "tf32": "ours, TF32",
    "bf16": "ours, bf16",
    "graph-fp32": "ours, CUDA graph",
    "graph-tf32": "ours, CUDA graph, TF32",
    "graph-bf16": "ours, CUDA graph, bf16",
}


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("--row", choices=ROWS, help="measure one row only, and print the number")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--batch-size", type=runs.number(int, 2), default=128, help="images a step")
    parser.add_argument("--steps", type=runs.number(int, 1), default=30, help="timed steps, after five others")
    return parser.parse_args(argv)


def plain(args, device):
    """The same model and loss, written the usual way."""
    transforms = data.import_torchvision().transforms
    images = torch.randint(0, 256, (50_000, 32, 32, 3), dtype=torch.uint8).numpy()

    class Images(torch.utils.data.Dataset):
        augment = transforms.Compose(
            [transforms.ToPILImage(), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return self.augment(images[i])

    loader = iter(torch.utils.data.DataLoader(Images(), args.batch_size, shuffle=True, num_workers=2, drop_last=True))
    model = vae.VAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(_):
        x = next(loader).to(device)
        nll, kl, _ = vae.elbo_terms(model, x, torch.randn(len(x), 128, device=device))
        loss = (nll + kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def ours(args, device):
    precision = args.row.removeprefix("graph-") if args.row != "returned" else "fp32"
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, device=device)
    model = vae.VAE().to(device)
    settings = SimpleNamespace(precision=precision, beta=1.0, capture=args.row.startswith("graph"))
    optimizer = devices.adam(model.parameters(), 1e-3, device)
    update = vae.make_step(model, vae.copy.deepcopy(model), optimizer, images, settings)

    def step(i):
        noise = devices.generator(device, 0, "noise", i)
        index = torch.randint(0, len(images), (args.batch_size,), device=device, generator=noise)
        flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
        eps = torch.randn(args.batch_size, 128, device=device, generator=noise)
        update(index, flip, eps, torch.full((), 0.999, device=device))

    return step


def measure(args):
    precision = args.row.removeprefix("graph-")
    device = devices.pick_device(args.device)
    if args.row not in ("plain", "returned"):
        devices.start(args.device, precision)
    elif device.type == "cuda":  # PyTorch's own defaults for the plain loop
        torch.backends.cudnn.benchmark = False
    step = plain(args, device) if args.row == "plain" else ours(args, device)
    return args.batch_size * args.steps / timing.time_steps(step, args.steps, device)


def main(argv=None):
    args = parse_args(argv)
    if args.row:
        print(measure(args))
        return
    device = devices.pick_device(args.device)
    rows = [row for row in ROWS if device.type == "cuda" or not row.startswith(("graph", "tf32"))]
    rows = [row for row in rows if device.type == "cpu" or row != "returned"]
    timing.compare({row: ROWS[row] for row in rows}, __file__, args, "training step of vae.py")


if __name__ == "__main__":
    runs.cli(main)
