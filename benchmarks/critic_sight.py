"""Can the critic of wgan_gp.py see that a mode is too narrow? Along the line through the means, and across it.

    python benchmarks/critic_sight.py                 (a minute of one core)

The fakes are true samples, narrowed to 0.8 of their standard deviation in one direction. For each direction a fresh
critic is trained on them with wgan_gp.py's loss, once with PyTorch's biases in its first layer and once with the biases
that wgan_gp.py gives it. The table says what it then feels, on new samples: the estimate mean f(real) - mean f(fake),
and how many of its first layer's lines (where a unit bends) came within 3 sigma of a mean, and how many of these run
across the line through the means rather than along it, before training. Mean and standard deviation over the seeds.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wgan_gp  # noqa: E402
from common import devices, runs  # noqa: E402
from common.two_gaussians import means, nearest_mode, sample_real  # noqa: E402

SIGMA, NARROW, BATCH = 0.1, 0.8, 512
DIRECTIONS = {"along": (0.5**0.5, 0.5**0.5), "across": (0.5**0.5, -(0.5**0.5))}


def narrowed(n, direction, stream):
    """n true samples with NARROW times their standard deviation in the unit vector `direction` -> (n, 2)."""
    x, unit = sample_real(n, SIGMA, stream), torch.tensor(direction)
    mode, _ = nearest_mode(x)
    offset = (x - means(x.device)[mode]) @ unit
    return x - (1 - NARROW) * offset[:, None] * unit


def lines(critic):
    """-> how many bending lines of the first layer meet a mode (within 3 sigma), how many of them run across."""
    weight, bias = wgan_gp.SCALE * critic.layers[0].weight.detach(), critic.layers[0].bias.detach()
    length = weight.norm(dim=1)
    distance = (means(weight.device) @ weight.T + bias).abs() / length  # (2, width)
    near = (distance < 3 * SIGMA).any(0)  # at either mode
    across = ((weight @ torch.tensor(DIRECTIONS["along"])) / length).square() > 0.5  # the normal is along
    return near.sum().item(), (near & across).sum().item()


def fresh(seed, spread):
    """A critic as wgan_gp.py makes it, or, without `spread`, with the biases that PyTorch gives."""
    torch.manual_seed(seed)
    critic = wgan_gp.Critic()
    if not spread:
        with torch.no_grad():
            critic.layers[0].bias.div_(wgan_gp.SCALE)
    return critic


def estimate(critic, direction, seed, steps):
    """Train `critic` against narrowed samples. -> its estimate on new samples."""
    args, stream = wgan_gp.parse_args(["--device", "cpu"]), devices.generator("cpu", "sight", seed)
    optimizer = devices.adam(critic.parameters(), args.critic_lr, torch.device("cpu"), betas=wgan_gp.BETAS)
    for step in range(steps):
        devices.set_lr(optimizer, args.critic_lr * (1 - step / steps))
        real, fake = sample_real(BATCH, SIGMA, stream), narrowed(BATCH, direction, stream)
        mix = torch.rand(BATCH, generator=stream)
        loss, _ = wgan_gp.critic_loss(critic, real, fake, mix, args)
        wgan_gp.set_gradients(critic, loss)
        optimizer.step()
    with torch.no_grad():
        real, fake = sample_real(50_000, SIGMA, stream), narrowed(50_000, direction, stream)
        return (critic(real).mean() - critic(fake).mean()).item()


def main():
    parser = runs.Parser(__doc__)
    parser.add_argument("--steps", type=runs.number(int, 1), default=300, help="training steps of each critic")
    parser.add_argument("--seeds", type=runs.number(int, 2), default=3, help="critics of each kind and direction")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'biases':>10} {'lines at a mode':>16} {'across':>7}  {'narrow along: estimate':>23} {'narrow across':>18}")
    for name, spread in (("PyTorch's", False), ("spread", True)):
        met, across = zip(*(lines(fresh(seed, spread)) for seed in range(flags.seeds)), strict=True)
        cells = []
        for direction in DIRECTIONS.values():
            values = [estimate(fresh(seed, spread), direction, seed, flags.steps) for seed in range(flags.seeds)]
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")
        print(f"{name:>10} {statistics.mean(met):16.0f} {statistics.mean(across):7.0f}  {cells[0]:>23} {cells[1]:>18}")


if __name__ == "__main__":
    runs.cli(main)
