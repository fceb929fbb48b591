"""How fast is the training step of wgan_gp.py beside a plain loop of the same sizes?

    python benchmarks/wgan_gp.py                      (add --device cuda, and --capture there)

The plain loop is the usual one: each critic step draws its own batch and generates its own fakes, scores real, fake
and interpolated points in three passes, fills .grad of both players by backward(), uses torch.optim.Adam as it comes
and reads the loss back with .item() every step. Both compute the same loss. The two take turns; the table gives the
median over the rounds. On a CPU the time is the processor's, so that waiting for a busy machine does not count.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wgan_gp  # noqa: E402
from common import (
    devices,  # noqa: E402
    runs,  # noqa: E402
)
from common.two_gaussians import sample_real  # noqa: E402


def plain(args, device):
    """-> a function that does one generator iteration the usual way."""
    models = wgan_gp.build(args, device)
    generator, critic = models["generator"], models["critic"]
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=wgan_gp.BETAS)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr, betas=wgan_gp.BETAS)

    def iteration(step):
        for _ in range(args.critic_steps):
            real = sample_real(args.batch_size, args.sigma, device=device)
            fake = generator(wgan_gp.sample_latent(args.batch_size, args.latent_dim, device=device)).detach()
            mix = torch.rand(args.batch_size, 1, device=device)
            between = (mix * fake + (1 - mix) * real).requires_grad_(True)
            scores = critic(between)
            gradient = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)[0]
            penalty = ((gradient.norm(2, dim=1) - 1).clamp(min=0) ** 2).mean()
            on_real = critic(real)
            loss = critic(fake).mean() - on_real.mean() + args.penalty * penalty + args.drift * (on_real**2).mean()
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            loss.item()
        loss = -critic(generator(wgan_gp.sample_latent(args.batch_size, args.latent_dim, device=device))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
        loss.item()

    return iteration


def ours(args, device):
    """-> a function that does one generator iteration as wgan_gp.py does."""
    models = wgan_gp.build(args, device)
    steps = wgan_gp.make_steps(args, **models)
    if args.capture:
        steps = [devices.Captured(step) for step in steps]
    return lambda step: wgan_gp.iterate(args, device, step, *steps)


def main():
    parser = runs.Parser(__doc__)
    parser.add_argument("--iterations", type=runs.number(int, 1), default=50, help="generator iterations a round")
    parser.add_argument("--rounds", type=runs.number(int, 1), default=7, help="rounds, after one that does not count")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--capture", action="store_true", help="our step as CUDA graphs (CUDA only)")
    flags = parser.parse_args()
    args = wgan_gp.parse_args([])
    args.capture = flags.capture
    device = devices.start(flags.device, capture=args.capture)
    torch.set_num_threads(args.threads)  # one: on a CPU the processor's time is then the time taken
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    loops = {"plain loop": plain(args, device), "wgan_gp.py": ours(args, device)}
    speeds = {name: [] for name in loops}
    for round_ in range(flags.rounds + 1):
        for name, iteration in loops.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = clock()
            for step in range(flags.iterations):
                iteration(round_ * flags.iterations + step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                speeds[name].append(flags.iterations / (clock() - began))
    base = statistics.median(speeds["plain loop"])
    print(f"{runs.machine()}, torch {torch.__version__}, batch {args.batch_size}, width {args.width}")
    print(f"{'':12} {'it/s':>7} {'lowest':>7} {'highest':>8} {'ratio':>6}")
    for name, found in speeds.items():
        middle = statistics.median(found)
        print(f"{name:12} {middle:7.1f} {min(found):7.1f} {max(found):8.1f} {middle / base:6.2f}")


if __name__ == "__main__":
    runs.cli(main)
