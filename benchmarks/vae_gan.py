"""Training speed of vae_gan.py's step in images per second, beside a pass for each player. One run, one table.

    python benchmarks/vae_gan.py                # about two minutes on two idle CPU cores; also --device cuda

"Plain" computes the same three losses the usual way: for each player in turn all networks forward, and its loss
backward through all that it touches. Data, model, optimiser and memory settings are the same for all rows.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one folder up
import timing

import vae
import vae_gan
from common import data, devices, runs

ROWS = {
    "plain": "a forward and a backward pass for each player",
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
    parser.add_argument("--batch-size", type=runs.number(int, 2), default=64, help="images a step")
    parser.add_argument("--steps", type=runs.number(int, 1), default=30, help="timed steps, after five others")
    return parser.parse_args(argv)


def plain_step(model, average, discriminator, optimizers, images, args):
    """As vae_gan.make_step, but each player for itself, with backward() and zero_grad()."""

    def losses(x, eps, z_p):
        mu, logvar = model.encoder(x)
        z = mu + eps * torch.exp(0.5 * logvar)
        x_hat, x_p = model.decoder(z), model.decoder(z_p)
        (real, features), (hat, features_hat), (p, _) = discriminator(x), discriminator(x_hat), discriminator(x_p)
        sigma2 = (features - features_hat).detach().square().mean()
        like = vae.gaussian_nll(features.detach(), features_hat, sigma2).mean()
        fool = -(F.logsigmoid(hat) + F.logsigmoid(p)).mean()
        return {
            "encoder": vae.kl_to_prior(mu, logvar).mean() + like,
            "decoder": args.gamma * like + fool,
            "discriminator": -vae_gan.gan_terms(real, hat, p).mean(),
        }

    def step(index, flip, eps, z_p, keep):
        x = data.batch(images, index, flip)
        for name, optimizer in optimizers.items():
            for other in optimizers.values():
                other.zero_grad()
            losses(x, eps, z_p)[name].backward()
            optimizer.step()
        devices.average_weights(average, model, keep)

    return step


def measure(args):
    precision = args.row.removeprefix("graph-") if args.row != "plain" else "fp32"
    device = devices.start(args.device, precision)
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, device=device)
    model, discriminator = vae.VAE().to(device), vae_gan.Discriminator().to(device)
    average = vae_gan.copy.deepcopy(model)
    players = {"encoder": model.encoder, "decoder": model.decoder, "discriminator": discriminator}
    optimizers = {name: devices.adam(module.parameters(), 3e-4, device) for name, module in players.items()}
    settings = SimpleNamespace(precision=precision, gamma=1e-3, contrastive=0.0, capture=args.row.startswith("graph"))
    make = plain_step if args.row == "plain" else vae_gan.make_step
    update = make(model, average, discriminator, optimizers, images, settings)

    def step(i):
        noise = devices.generator(device, 0, "noise", i)
        index = torch.randint(0, len(images), (args.batch_size,), device=device, generator=noise)
        flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
        eps, z_p = torch.randn(2, args.batch_size, 128, device=device, generator=noise)
        update(index, flip, eps, z_p, torch.full((), 0.999, device=device))

    return args.batch_size * args.steps / timing.time_steps(step, args.steps, device)


def main(argv=None):
    args = parse_args(argv)
    if args.row:
        print(measure(args))
        return
    device = devices.pick_device(args.device)
    rows = {row: ROWS[row] for row in ROWS if device.type == "cuda" or not row.startswith(("graph", "tf32"))}
    timing.compare(rows, __file__, args, "training step of vae_gan.py")


if __name__ == "__main__":
    runs.cli(main)
