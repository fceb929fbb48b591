"""WGAN-GP on two Gaussians in the plane: learned by a Wasserstein GAN with gradient penalty, and measured.

Arjovsky, Chintala, Bottou 2017 (arXiv 1701.07875); Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville 2017 (1704.00028).

    python wgan_gp.py                                  train, measure, draw: runs/wgan_gp/
    python wgan_gp.py --resume                         go on after Ctrl-C
    python wgan_gp.py --sample 10000                   samples.npy and samples.png from the trained generator
    python wgan_gp.py --loss clip --name clip          weight clipping instead of the penalty
    python wgan_gp.py --no-one-sided --name two_sided  the paper's two-sided penalty

The task: z ~ U[-1, 1]; real x from 1/2 N(mu_1, sigma^2 I) + 1/2 N(mu_2, sigma^2 I), mu_1 = (0.5, 0.5) (misprinted
there as "(0, 5, 0.5)"), mu_2 = (-0.5, -0.5), sigma = 0.1. Its text calls 0.10 the variance: --sigma 0.3162.
Measured: REPORT.md, question 1, with its machine and commit; how the defaults were chosen: its appendix.

Symbols: z latent, x_fake = G(z) (the paper's x-tilde), x_interp the point between a real and a fake sample where the
penalty is taken (its x-hat), critic f (its D), mix 1 minus its epsilon.

Deviations from Gulrajani et al., Algorithm 1 and their toy experiments: the penalty is one-sided (theirs is two-sided
by default) with weight 0.1 (10; toy: 0.1); a drift term, 0.3 times the mean of critic(x_real)^2 (Karras et al. 2018,
arXiv 1710.10196, with 0.001); learning rates 2e-3, the generator's falling linearly to 0, the critic's to 0.3 of it, so
that it keeps up (1e-4, constant); Adam betas (0, 0.99) ((0, 0.9); toy: (0.5, 0.9)); inputs times 10; a leaky critic
whose first biases are times 10; all measurements on a running average of the generator's weights; z with six uniform
dimensions (the task: one; toy: two normal ones); networks of 4 and 2 hidden layers of 128 (toy: 3 of 512); 4000 steps
(toy: 100,000).
--loss clip uses Adam (Arjovsky et al.: RMSProp) and |w| <= 0.1 (0.01). --capture was not yet run on CUDA.
"""

import copy
import math
from argparse import BooleanOptionalAction

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from torch import nn

from common import devices, pictures, runs
from common.loop import Loop
from common.two_gaussians import MEANS, measure, measure_truth, plot_curves, print_goals, reach, sample_real

N_PLOT, DRAWS = 2000, 10  # samples in a picture; draws of 2000 that W2 is averaged over at the end
SHEET = 12  # pictures on densities.png, at most
SCALE = 10.0  # of what the networks are given: data and z are small, and a larger input makes steep functions easy
BETAS = (0.0, 0.99)  # Adam; the paper has (0, 0.9)


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_run_flags(parser, "wgan_gp")
    add, positive, count = parser.add_argument, runs.number(float, above=0), runs.number(int, 1)
    add("--iterations", type=count, default=4000, help="generator steps")
    add("--plot-every", type=count, default=500, help="generator steps between plots, measurements and checkpoints")
    add("--log-every", type=count, default=50, help="generator steps between lines of log.jsonl")
    add("--threads", type=runs.number(int, 1, 1024), default=1, help="CPU threads; so small a network needs no more")
    add("--sample", type=count, metavar="N", help="only draw N samples from runs/NAME into samples.npy and samples.png")
    add("--sigma", type=runs.number(float, 1e-4, 1e4), default=0.1, help="standard deviation of each mode, on an axis")
    add("--latent-dim", type=count, default=6, help="dimension of z ~ U[-1, 1]^dim; 1 can only draw a curve")
    add("--width", type=count, default=128, help="units of each of the generator's hidden layers")
    add("--depth", type=count, default=4, help="hidden layers of the generator")
    add("--critic-width", type=count, default=128, help="units of each of the critic's two hidden layers")
    add("--loss", choices=("gp", "clip"), default="gp", help="gradient penalty, or the original weight clipping")
    add("--penalty", type=positive, default=0.1, help="weight of the gradient penalty (--loss gp)")
    add("--one-sided", action=BooleanOptionalAction, default=True, help="penalise only norms above 1 (--loss gp)")
    add("--drift", type=runs.number(float, 0), default=0.3, help="weight of mean critic(x_real)^2 (--loss gp)")
    add("--clip", type=positive, default=0.1, help="largest absolute critic weight (--loss clip)")
    add("--critic-steps", type=count, default=5, help="critic steps for each generator step")
    add("--batch-size", type=count, default=256, help="samples of each kind in a step")
    add("--lr", type=positive, default=2e-3, help="the generator's learning rate at the start; falls linearly to 0")
    add("--critic-lr", type=positive, default=2e-3, help="the critic's learning rate at the start (Adam)")
    add("--critic-end", type=runs.number(float, 0, 1), default=0.3, help="share of --critic-lr at the end (linear)")
    add("--ema", type=runs.number(float, 0, 0.999999), default=0.999, help="largest decay of the weights' average")
    add("--capture", action=BooleanOptionalAction, default=False, help="CUDA graphs (CUDA only)")
    return runs.parse(parser, argv, "wgan_gp.py", reuse=("resume", "sample"), may_differ=("capture", "threads"))


# --- models -----------------------------------------------------------------------------------------------------


def sample_latent(n, dim, generator=None, device="cpu"):
    """n draws of z ~ U[-1, 1]^dim -> (n, dim)."""
    return torch.rand(n, dim, generator=generator, device=device) * 2 - 1


class Network(nn.Module):
    """`depth` hidden layers of `width` units, on SCALE times the input: (B, n_in) -> (B, n_out)."""

    def __init__(self, n_in, n_out, width, depth, activation):
        super().__init__()
        layers = [nn.Linear(n_in, width), activation]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), activation]
        self.layers = nn.Sequential(*layers, nn.Linear(width, n_out))

    def forward(self, x):
        return self.layers(SCALE * x)


class Generator(Network):
    """z (B, latent_dim) -> x_fake (B, 2)."""

    def __init__(self, latent_dim, width, depth):
        super().__init__(latent_dim, 2, width, depth, nn.ReLU())


class Critic(Network):
    """x (B, 2) -> score (B, 1), by two hidden layers. No batch norm: it mixes rows, and the penalty is per sample.

    Leaky, because a ReLU critic can die on a whole mode: all its units off there, it is constant and teaches nothing.
    """

    def __init__(self, width=128):
        super().__init__(2, 1, width, depth=2, activation=nn.LeakyReLU(0.2))
        # A unit of the first layer bends along a line. With PyTorch's biases all these lines pass near the centre, so
        # those that meet a mode run along the line through the means: the critic would not see a mode's width along it.
        with torch.no_grad():
            self.layers[0].bias.mul_(SCALE)


# --- losses -------------------------------------------------------------------------------------------------------


def gradient_norm(critic, x):
    """|grad_x critic(x)|_2 per sample, differentiable: x (B, ...) -> (B,)."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1)  # over the whole sample, not an axis of it


def gradient_penalty(critic, x_real, x_fake, mix, one_sided=False):
    """(|grad critic(x_interp)| - 1)^2 per sample at x_interp = x_real + mix (x_fake - x_real). Gulrajani et al., eq. 3.

    x_real, x_fake: (B, ...), mix ~ U[0, 1]: (B,) -> (B,). one_sided: max(0, |grad| - 1)^2, 0 for a constant critic too.
    """
    x_interp = torch.lerp(x_real, x_fake, mix.view(-1, *[1] * (x_real.dim() - 1)))
    excess = gradient_norm(critic, x_interp) - 1
    return (excess.clamp(min=0) if one_sided else excess).square()


def critic_loss(critic, x_real, x_fake, mix, args):
    """-> what the critic descends (Algorithm 1, line 7, and the drift), its Wasserstein estimate: a scalar each."""
    on_real, on_fake = critic(torch.cat((x_real, x_fake))).chunk(2)  # one pass for both
    estimate = on_real.mean() - on_fake.mean()  # W1, were the critic the best 1-Lipschitz function
    if args.loss == "clip":
        return -estimate, estimate
    penalty = gradient_penalty(critic, x_real, x_fake, mix, args.one_sided).mean()
    return -estimate + args.penalty * penalty + args.drift * on_real.square().mean(), estimate


def set_gradients(module, loss):
    """module.p.grad = d loss / d p for this module's parameters alone: the other player's stay untouched."""
    parameters = list(module.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


def make_steps(args, generator, critic, averaged, generator_optimizer, critic_optimizer):
    """-> critic_steps(x_real, z, mix), generator_step(z, decay). They draw nothing and read nothing back: capturable.

    critic_steps: x_real (K, B, 2), z (K, B, Z), mix (K, B) -> the last step's Wasserstein estimate and x_interp.
    """

    def critic_steps(x_real, z, mix):  # Algorithm 1, lines 2 to 10, for K = n_critic
        with torch.no_grad():
            x_fake = generator(z)
        for k in range(len(x_real)):
            loss, estimate = critic_loss(critic, x_real[k], x_fake[k], mix[k], args)
            set_gradients(critic, loss)
            critic_optimizer.step()
            if args.loss == "clip":
                with torch.no_grad():
                    for parameter in critic.parameters():
                        parameter.clamp_(-args.clip, args.clip)
        return estimate.detach(), torch.lerp(x_real[-1], x_fake[-1], mix[-1][:, None])

    def generator_step(z, decay):  # lines 11 and 12; decay: the average's, a scalar tensor
        set_gradients(generator, -critic(generator(z)).mean())
        generator_optimizer.step()
        devices.average_weights(averaged, generator, decay)

    return critic_steps, generator_step


# --- plots --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def critic_grid(critic, device, sigma, n=81):
    """The critic's scores on the pictures' square -> axis (n,), scores (n, n) with y first."""
    axis = torch.linspace(-reach(sigma), reach(sigma), n)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return axis.numpy(), critic(torch.stack((x, y), -1).view(-1, 2).to(device)).view(n, n).cpu().numpy()


def plot_density(x, x_real, sigma, title, path, grid=None):
    """Density of generated samples, that of as many real ones, and the generated points, side by side."""
    figure, axes = plt.subplots(1, 3, figsize=(11.4, 4.3), layout="constrained", sharex=True, sharey=True)
    for axis, points, color, name in ((axes[0], x, "tab:blue", "generated"), (axes[1], x_real, "tab:green", "real")):
        # The default bandwidth follows the spread of all samples, modes apart, and would blur each along their line.
        style = {"fill": True, "bw_adjust": 0.4, "thresh": 0.01, "gridsize": 100, "warn_singular": False}
        sns.kdeplot(x=points[:, 0], y=points[:, 1], ax=axis, color=color, **style)
        axis.set_title(f"{name}, density of {len(points)} samples")
    if grid is not None:
        axes[0].contour(grid[0], grid[0], grid[1], levels=14, colors="black", linewidths=0.5, alpha=0.5)
        title += "; lines on the left: the critic's contours"
    axes[2].scatter(x[:, 0], x[:, 1], s=3, color="tab:blue", linewidths=0, label="generated")
    axes[2].set_title("generated points")
    for mean, label in zip(MEANS, ("3 sigma of the truth", None), strict=True):
        axes[2].add_patch(plt.Circle(mean, 3 * sigma, fill=False, color="tab:green", label=label))
    axes[2].legend(loc="upper left", markerscale=4, fontsize=8)
    far = reach(sigma)
    plt.setp(axes, xlim=(-far, far), ylim=(-far, far), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    figure.suptitle(title)
    pictures.save_figure(figure, path, dpi=75)


# --- training -----------------------------------------------------------------------------------------------------


def build(args, device):
    """-> both players, the averaged generator and the optimisers on `device`; the weights depend on --seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        generator = Generator(args.latent_dim, args.width, args.depth).to(device)
        critic = Critic(args.critic_width).to(device)
    return {
        "generator": generator,
        "critic": critic,
        "averaged": copy.deepcopy(generator).requires_grad_(False),
        "generator_optimizer": devices.adam(generator.parameters(), args.lr, device, betas=BETAS),
        "critic_optimizer": devices.adam(critic.parameters(), args.critic_lr, device, betas=BETAS),
    }


def sampler(generator, args, device):
    """-> sample(n, stream): n samples of the generator on the CPU, the latent drawn there from `stream`."""

    @torch.no_grad()
    def sample(n, stream):
        return generator(sample_latent(n, args.latent_dim, stream).to(device)).cpu()

    return sample


def draw_batches(args, device, step):
    """All that a generator iteration draws -> x_real (K, B, 2), z (K, B, Z), mix (K, B); the generator's z (B, Z)."""
    stream, shape = devices.generator(device, args.seed, "train", step), (args.critic_steps, args.batch_size)
    n = math.prod(shape)
    x_real = sample_real(n, args.sigma, stream, device).view(*shape, 2)
    z = sample_latent(n + args.batch_size, args.latent_dim, stream, device)
    mix = torch.rand(shape, generator=stream, device=device)
    return (x_real, z[:n].view(*shape, -1), mix), z[n:]


def train(args, run, device):
    """Train to args.iterations; leaves density_*.png, log, checkpoint. -> both players, the average, and seconds."""
    models = build(args, device)
    critic, sample = models["critic"], sampler(models["averaged"], args, device)
    critic_steps, generator_step = make_steps(args, **models)
    if args.capture:
        critic_steps, generator_step = devices.Captured(critic_steps), devices.Captured(generator_step)
    with Loop(run, args, models, device, args.iterations, args.plot_every, "lower --lr and --critic-lr") as loop:
        for step in loop:
            rest = 1 - (step - 1) / args.iterations  # the rates fall linearly, the critic's to a share of itself
            devices.set_lr(models["generator_optimizer"], args.lr * rest)
            share = args.critic_end + (1 - args.critic_end) * rest
            devices.set_lr(models["critic_optimizer"], args.critic_lr * share)
            batches, z = draw_batches(args, device, step)
            estimate, x_interp = critic_steps(*batches)
            generator_step(z, devices.average_decay(step, args.ema, device))
            if loop.logs() or loop.complete():
                loop.log(wasserstein=estimate.item(), gradient_norm=gradient_norm(critic, x_interp).mean().item())
            if loop.saves():
                loop.check_weights()  # W2 of nan has no answer
                found = {}
                if loop.complete():
                    found = measure(sample, args.sigma, 1, args.seed, "look", step)
                    title, path = f"after {step} generator iterations", run / f"density_{step:06d}.png"
                    picture(args, sample, title, path, critic_grid(critic, device, args.sigma))
                    loop.say(f"Wasserstein estimate {estimate:.4f}, W2 in a mode {np.mean(found['w2_mode']):.4f}")
                loop.save(found)
    return models, loop.spent()


def picture(args, sample, title, path, grid=None):
    """plot_density of N_PLOT samples, the same z and the same real samples in every picture."""
    x = sample(N_PLOT, devices.generator("cpu", args.seed, "plot latent")).numpy()
    x_real = sample_real(N_PLOT, args.sigma, devices.generator("cpu", args.seed, "plot")).numpy()
    plot_density(x, x_real, args.sigma, title, path, grid)


def report(args, run, models, spent, device):
    """What a finished training leaves: metrics.json, pictures, training.gif, and the goals on screen."""
    sample = sampler(models["averaged"], args, device)
    metrics = measure(sample, args.sigma, DRAWS, args.seed, "end") | spent
    metrics |= measure_truth(args.sigma, DRAWS, args.seed)
    title = f"after {args.iterations} generator iterations"
    picture(args, sample, title, run / "final.png", critic_grid(models["critic"], device, args.sigma))
    densities = sorted(run.folder.glob("density_*.png")) or [run / "final.png"]  # a person may have cleared them
    pictures.write_sheet(pictures.spread(densities, SHEET), run / "densities.png")
    pictures.write_gif(densities, run / "training.gif")
    plot_curves(run.read_log(), metrics["truth"], args.sigma, run / "curves.png")
    runs.write_json(run / "metrics.json", metrics)  # last: it says that the run is finished
    print_goals(metrics)
    print(f"{run.folder}: {metrics['seconds']:.0f} s; final.png, densities.png, training.gif, curves.png, metrics.json")


def draw(args, run, device):
    """--sample: N samples of the averaged generator, in runs/NAME/samples.npy (N, 2) float32 and samples.png."""
    averaged = build(args, device)["averaged"]
    run.restore({"averaged": averaged})
    x = sampler(averaged, args, device)(args.sample, devices.generator("cpu", args.seed, "sample")).numpy()
    with runs.writing(run / "samples.npy") as part:
        np.save(part, x)
    x_real = sample_real(N_PLOT, args.sigma, devices.generator("cpu", args.seed, "plot")).numpy()
    shown = min(N_PLOT, len(x))
    plot_density(x[:shown], x_real[:shown], args.sigma, f"{run.folder}: samples", run / "samples.png")
    print(f"{run / 'samples.npy'}: {len(x)} x 2; {run / 'samples.png'} shows {shown} of them")


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, capture=args.capture and not args.sample, divides=False)
    torch.set_num_threads(args.threads)
    run = runs.Run(args, "wgan_gp.py", argv)
    if args.sample:
        draw(args, run, device)
        return
    models, spent = train(args, run, device)
    report(args, run, models, spent, device)


if __name__ == "__main__":
    runs.cli(main)
