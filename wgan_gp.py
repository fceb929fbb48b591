"""WGAN-GP on two Gaussians in the plane: learned by a Wasserstein GAN with gradient penalty, and measured.

@@RESULTS@@
"""

import copy
import math
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import runs

MEANS = ((0.5, 0.5), (-0.5, -0.5))
N_PLOT, N_STATISTICS, DRAWS = 2000, 20_000, 10  # samples in a plot and in W2; in the shares; draws of W2 at the end
BETAS = (0.0, 0.99)  # Adam; the paper has (0, 0.9)
LIMIT = 1.0  # every picture shows [-LIMIT, LIMIT]^2


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_run_flags(parser, "wgan_gp")
    add, positive, count = parser.add_argument, runs.number(float, above=0), runs.number(int, 1)
    add("--iterations", type=count, default=4000, help="generator steps; the learning rates fall linearly to zero")
    add("--plot-every", type=count, default=500, help="generator steps between plots, measurements and checkpoints")
    add("--threads", type=count, default=1, help="CPU threads; so small a network gains nothing from more")
    add("--sample", type=count, metavar="N", help="only draw N samples from runs/NAME into samples.npy and samples.png")
    # data
    add("--sigma", type=positive, default=0.1, help="standard deviation of each Gaussian along each axis")
    # model
    add("--latent-dim", type=count, default=2, help="dimension of z ~ U[-1, 1]^dim; 1 can only draw a curve")
    add("--width", type=count, default=128, help="units of each of the two hidden layers, in both networks")
    # optimisation
    add("--loss", choices=("gp", "clip"), default="gp", help="gradient penalty, or the original weight clipping")
    add("--penalty", type=positive, default=0.1, help="weight of the gradient penalty (--loss gp)")
    add("--one-sided", action="store_true", help="penalise only gradient norms above 1 (--loss gp)")
    add("--clip", type=positive, default=0.1, help="largest absolute critic weight (--loss clip)")
    add("--critic-steps", type=count, default=5, help="critic steps for each generator step")
    add("--batch-size", type=count, default=128, help="samples of each kind in a step")
    add("--lr", type=positive, default=1e-3, help="the generator's learning rate at the start (Adam)")
    add("--critic-lr", type=positive, default=1e-3, help="the critic's learning rate at the start (Adam)")
    add("--ema", type=runs.number(float, 0, 0.999999), default=0.999, help="decay of the generator's averaged weights")
    add("--capture", action=runs.argparse.BooleanOptionalAction, default=False, help="CUDA graphs (CUDA only)")
    return runs.parse(parser, argv, reuse=("resume", "sample"), may_differ=("capture",))


# --- data and models ----------------------------------------------------------------------------------------------


def sample_real(n, sigma=0.1, generator=None, device="cpu"):
    """n draws from 1/2 N((.5, .5), sigma^2 I) + 1/2 N((-.5, -.5), sigma^2 I) -> (n, 2)."""
    mode = torch.randint(len(MEANS), (n,), generator=generator, device=device)
    noise = torch.randn(n, 2, generator=generator, device=device)
    return torch.tensor(MEANS, device=device)[mode] + sigma * noise


def sample_latent(n, dim, generator=None, device="cpu"):
    """n draws of z ~ U[-1, 1]^dim -> (n, dim)."""
    return torch.rand(n, dim, generator=generator, device=device) * 2 - 1


class Network(nn.Module):
    """A fully connected network with two hidden layers. `scale` multiplies its input: (B, n_in) -> (B, n_out).

    The data and z are small (0.1 wide modes, |z| <= 1): a larger input makes steep functions easy to reach.
    """

    def __init__(self, n_in, n_out, width, scale, activation):
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(
            nn.Linear(n_in, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, n_out)
        )

    def forward(self, x):
        return self.layers(self.scale * x)


class Generator(Network):
    """z (B, latent_dim) -> x_fake (B, 2)."""

    def __init__(self, latent_dim=2, width=128, scale=5.0):
        super().__init__(n_in=latent_dim, n_out=2, width=width, scale=scale, activation=nn.ReLU)


class Critic(Network):
    """x (B, 2) -> score (B, 1). No batch norm: it mixes rows, and the penalty is per sample."""

    def __init__(self, width=128, scale=4.0):
        super().__init__(n_in=2, n_out=1, width=width, scale=scale, activation=nn.SiLU)


# --- losses -------------------------------------------------------------------------------------------------------


def gradient_norm(critic, x):
    """|grad_x critic(x)|_2 per sample, differentiable: x (B, ...) -> (B,)."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1)  # over the whole sample, not an axis of it


def gradient_penalty(critic, x_real, x_fake, generator=None, mix=None, one_sided=False):
    """(|grad critic(x_interp)| - 1)^2 per sample at x_interp = x_real + mix (x_fake - x_real). Gulrajani et al., eq. 3.

    x_real, x_fake: (B, ...) -> (B,). mix ~ U[0, 1] per sample is drawn from `generator` unless given.
    one_sided: max(0, |grad| - 1)^2, which a constant critic satisfies too.
    """
    if mix is None:
        mix = torch.rand(len(x_real), generator=generator, device=x_real.device)
    x_interp = torch.lerp(x_real, x_fake, mix.view(-1, *[1] * (x_real.dim() - 1)))
    excess = gradient_norm(critic, x_interp) - 1
    return (excess.clamp(min=0) if one_sided else excess).square()


def wasserstein_estimate(critic, x_real, x_fake):
    """mean critic(x_real) - mean critic(x_fake), a scalar: W1 if the critic were the best 1-Lipschitz function."""
    scores = critic(torch.cat((x_real, x_fake)))  # one pass for both
    return scores[: len(x_real)].mean() - scores[len(x_real) :].mean()


def set_gradients(module, loss):
    """module.p.grad = d loss / d p for this module's parameters alone: the other player's stay untouched."""
    parameters = list(module.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


def make_steps(args, generator, critic, averaged, generator_optimizer, critic_optimizer):
    """-> critic_steps(x_real, z, mix), generator_step(z). They draw nothing and read nothing back: capturable.

    critic_steps: x_real (K, B, 2), z (K, B, Z), mix (K, B) -> of the last critic step: Wasserstein estimate (), x_interp.
    """
    average = get_ema_multi_avg_fn(args.ema)

    def critic_steps(x_real, z, mix):  # Algorithm 1, lines 2 to 10, for K = n_critic
        with torch.no_grad():
            x_fake = generator(z)
        for real, fake, share in zip(x_real, x_fake, mix, strict=True):
            estimate = wasserstein_estimate(critic, real, fake)
            loss = -estimate
            if args.loss == "gp":
                penalty = gradient_penalty(critic, real, fake, mix=share, one_sided=args.one_sided)
                loss = loss + args.penalty * penalty.mean()
            set_gradients(critic, loss)
            critic_optimizer.step()
            if args.loss == "clip":
                with torch.no_grad():
                    for parameter in critic.parameters():
                        parameter.clamp_(-args.clip, args.clip)
        return estimate.detach(), torch.lerp(real, x_fake[-1], share[:, None])

    def generator_step(z):  # lines 11 and 12
        set_gradients(generator, -critic(generator(z)).mean())
        generator_optimizer.step()
        average(list(averaged.parameters()), list(generator.parameters()), None)

    return critic_steps, generator_step


# --- measurements -------------------------------------------------------------------------------------------------


def nearest_mode(x):
    """x (N, 2) -> index of the nearest mean (N,), distance to it (N,)."""
    distance = torch.cdist(x, torch.tensor(MEANS, dtype=x.dtype))
    nearest = distance.min(1)
    return nearest.indices, nearest.values


def statistics(x, sigma):
    """What samples x (N, 2) say about the modes, as plain values; a sample belongs to the mode of the nearest mean.

    mode_weights: shares. mode_means, mode_stds, mode_covariances: of the samples within 4 sigma of their mean.
    within_3_sigma: share within 3 sigma of a mean. bridge: share farther than 4 sigma from both means whose
    projection on the line through them lies between them. log_likelihood: mean log density of x under the truth, nats.
    """
    mode, distance = nearest_mode(x)
    first, second = torch.tensor(MEANS, dtype=x.dtype)
    along = (x - second) @ (first - second) / (first - second).square().sum()
    core = [x[(mode == k) & (distance < 4 * sigma)] for k in range(len(MEANS))]
    core = [c if len(c) > 1 else torch.zeros(2, 2) for c in core]  # an empty mode has mean and spread zero
    covariances = [torch.cov(c.T) for c in core]
    energy = -torch.cdist(x, torch.stack((first, second))).square() / (2 * sigma**2)
    log_density = torch.logsumexp(energy, 1) - math.log(2) - math.log(2 * math.pi * sigma**2)
    return {
        "mode_weights": [(mode == k).float().mean().item() for k in range(len(MEANS))],
        "mode_means": [c.mean(0).tolist() for c in core],
        "mode_stds": [c.diagonal().sqrt().tolist() for c in covariances],
        "mode_covariances": [c.tolist() for c in covariances],
        "within_3_sigma": (distance < 3 * sigma).float().mean().item(),
        "bridge": ((distance > 4 * sigma) & (along > 0) & (along < 1)).float().mean().item(),
        "log_likelihood": log_density.mean().item(),
    }


def w2(x, y):
    """Exact 2-Wasserstein distance of two point sets of equal size (N, 2), by optimal assignment."""
    cost = cdist(np.asarray(x), np.asarray(y), "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def w2_modes(x, sigma, generator=None, reach=math.inf):
    """W2 between the samples nearest to a mode, at most `reach` sigma away, and as many real ones -> [2], one a mode.

    A mode without two such samples is compared with all of x.
    """
    mode, distance = nearest_mode(x)
    values = []
    for k, mean in enumerate(MEANS):
        own = x[(mode == k) & (distance <= reach * sigma)]
        own = own if len(own) > 1 else x
        values.append(w2(own, torch.tensor(mean) + sigma * torch.randn(own.shape, generator=generator)))
    return values


def distances(sample, sigma, draws, key):
    """W2 on N_PLOT points of `sample(n, generator)` against real ones, overall and within the modes; mean of draws.

    w2_mode takes all samples nearest to a mode, bridge included; w2_mode_core those within 4 sigma: the shape alone.
    """
    rows = []
    for draw in range(draws):
        stream = runs.generator("cpu", *key, draw)
        x = sample(N_PLOT, stream)
        modes, core = w2_modes(x, sigma, stream), w2_modes(x, sigma, stream, reach=4)
        rows.append([w2(x, sample_real(N_PLOT, sigma, stream)), *modes, *core])
    mean = np.mean(rows, 0).tolist()
    return {"w2": mean[0], "w2_mode": mean[1:3], "w2_mode_core": mean[3:5]}


def measure(sample, sigma, draws, key):
    """All measurements of `sample(n, generator)` -> (n, 2) on the CPU; `key` seeds the draws."""
    x = sample(N_STATISTICS, runs.generator("cpu", *key, "statistics"))
    return {**distances(sample, sigma, draws, key), **statistics(x, sigma)}


def floor(sigma, seed):
    """`measure` of the truth itself: what no generator can be asked to beat."""
    truth = measure(lambda n, stream: sample_real(n, sigma, stream), sigma, DRAWS, (seed, "floor"))
    truth["w2_mode"] = [float(np.mean(truth["w2_mode"]))] * 2  # both modes are alike: one floor from twice the draws
    return truth


def goals(metrics, sigma):
    """-> [(what, worst value, bound, met)], the largest deviation of each kind against its bound."""
    means = np.abs(np.array(metrics["mode_means"]) - MEANS).max()
    stds = np.abs(np.array(metrics["mode_stds"]) / sigma - 1).max()
    rows = [
        ("mode weights, off 0.5 by at most", abs(metrics["mode_weights"][0] - 0.5), 0.02),
        ("means, off by at most", float(means), 0.02),
        ("standard deviations, relative error at most", float(stds), 0.12),
        ("farther than 3 sigma from both modes at most", 1 - metrics["within_3_sigma"], 0.02),
        ("W2 within a mode over its floor at most", max(metrics["w2_mode"]) / metrics["w2_mode_floor"][0], 1.5),
    ]
    return [(what, value, bound, value <= bound) for what, value, bound in rows]


# --- plots --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def critic_grid(critic, device, n=81):
    """The critic's scores on the pictures' square -> axis (n,), scores (n, n) with y first."""
    axis = torch.linspace(-LIMIT, LIMIT, n)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return axis.numpy(), critic(torch.stack((x, y), -1).view(-1, 2).to(device)).view(n, n).cpu().numpy()


def plot_density(x, x_real, sigma, title, path, grid=None):
    """Density of generated samples, that of as many real ones, and the generated points, side by side."""
    figure, axes = plt.subplots(1, 3, figsize=(11.4, 4.3), layout="constrained", sharex=True, sharey=True)
    # The default bandwidth is made for one mode and would blur these; the levels cut off the same masses in both.
    style = {"fill": True, "bw_adjust": 0.35, "levels": [0.005, 0.02, 0.1, 0.25, 0.5, 0.75, 1], "gridsize": 100}
    for axis, points, cmap, name in ((axes[0], x, "Blues", "generated"), (axes[1], x_real, "Greens", "real")):
        inside = points[np.abs(points).max(1) < LIMIT] if (np.abs(points).max(1) < LIMIT).sum() > 2 else points
        with np.errstate(all="ignore"):
            sns.kdeplot(x=inside[:, 0], y=inside[:, 1], ax=axis, cmap=cmap, warn_singular=False, **style)
        axis.set_title(f"{name}, density of {len(points)} samples")
    if grid is not None:
        axes[0].contour(grid[0], grid[0], grid[1], levels=14, colors="black", linewidths=0.5, alpha=0.5)
        axes[0].set_title("generated, and the critic's contours")
    axes[2].scatter(x[:, 0], x[:, 1], s=2, color="tab:blue", alpha=0.5, linewidths=0, label="generated")
    axes[2].set_title("generated points")
    for k, mean in enumerate(MEANS):
        label = "3 sigma of the truth" if k == 0 else None
        axes[2].add_patch(plt.Circle(mean, 3 * sigma, fill=False, color="tab:green", label=label))
    axes[2].legend(loc="upper left", markerscale=4, fontsize=8)
    for axis in axes:
        axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    figure.suptitle(title)
    with runs.writing(path) as part:
        figure.savefig(part, dpi=75)
    plt.close(figure)


def write_gif(frames, path):
    """One animation of pictures of equal size; the last one stays longer."""
    pictures = []
    for frame in frames:
        with Image.open(frame) as picture:
            pictures.append(picture.convert("RGB").quantize(48, dither=Image.Dither.NONE))
    durations = [600] * (len(pictures) - 1) + [2500]
    with runs.writing(path) as part:
        pictures[0].save(part, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def plot_curves(records, truth, sigma, path):
    """The log's curves; dashed lines are the truth's own values, measured on as many samples."""
    steps = [r for r in records if "wasserstein" in r]
    plots = [r for r in records if "w2" in r]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), layout="constrained", sharex=True)
    at = [r["step"] for r in plots]
    axes[0, 0].plot([r["step"] for r in steps], [r["wasserstein"] for r in steps], lw=0.8)
    axes[0, 0].set(title="Wasserstein estimate of the critic", yscale="symlog")
    axes[0, 0].axhline(0, color="gray", lw=0.5)
    axes[0, 1].plot([r["step"] for r in steps], [r["gradient_norm"] for r in steps], lw=0.8)
    axes[0, 1].set(title="critic's gradient norm at interpolates")
    axes[0, 2].plot(at, [r["w2"] for r in plots], "o-", ms=3, label="both modes")
    axes[0, 2].axhline(truth["w2"], color="tab:blue", ls="--", lw=0.8)
    axes[0, 2].plot(at, [np.mean(r["w2_mode"]) for r in plots], "o-", ms=3, color="tab:orange", label="within a mode")
    axes[0, 2].axhline(truth["w2_mode"][0], color="tab:orange", ls="--", lw=0.8)
    axes[0, 2].set(title="exact $W_2$ on 2000 points", yscale="log")
    axes[1, 0].plot(at, [r["mode_weights"] for r in plots], "o-", ms=3, label=["mode 1", "mode 2"])
    axes[1, 0].set(title="mode weights", ylim=(0, 1))
    axes[1, 0].axhline(0.5, color="gray", ls="--", lw=0.8)
    labels = ["mode 1, $x_1$", "mode 1, $x_2$", "mode 2, $x_1$", "mode 2, $x_2$"]
    axes[1, 1].plot(at, [np.ravel(r["mode_stds"]) / sigma for r in plots], "o-", ms=3, label=labels)
    axes[1, 1].set(title="standard deviations over the true one")
    axes[1, 1].axhline(1, color="gray", ls="--", lw=0.8)
    axes[1, 2].plot(at, [1 - r["within_3_sigma"] for r in plots], "o-", ms=3, label="farther than 3 sigma")
    axes[1, 2].axhline(1 - truth["within_3_sigma"], color="tab:blue", ls="--", lw=0.8)
    axes[1, 2].plot(at, [r["bridge"] for r in plots], "o-", ms=3, label="bridge")
    axes[1, 2].set(title="share of samples off the modes", yscale="symlog")
    axes[1, 2].set_yscale("symlog", linthresh=1e-3)
    for axis in (axes[0, 2], *axes[1]):
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("generator iterations")
    with runs.writing(path) as part:
        figure.savefig(part, dpi=75)
    plt.close(figure)


# --- training -----------------------------------------------------------------------------------------------------


def sampler(generator, args, device):
    """-> sample(n, stream): n samples on the CPU, the latent drawn from `stream` on the CPU."""

    @torch.no_grad()
    def sample(n, stream):
        return generator(sample_latent(n, args.latent_dim, stream).to(device)).float().cpu()

    return sample


def build(args, device):
    """-> generator, critic, averaged generator on `device`, with weights drawn from --seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        generator, critic = Generator(args.latent_dim, args.width), Critic(args.width)
    generator, critic = generator.to(device), critic.to(device)
    return generator, critic, copy.deepcopy(generator).requires_grad_(False)


def build_all(args, device):
    """-> the two players, the averaged generator and the optimisers, by the names that make_steps and files use."""
    generator, critic, averaged = build(args, device)
    return {
        "generator": generator,
        "critic": critic,
        "averaged": averaged,
        "generator_optimizer": runs.adam(generator.parameters(), args.lr, device, betas=BETAS),
        "critic_optimizer": runs.adam(critic.parameters(), args.critic_lr, device, betas=BETAS),
    }


def iterate(args, device, step, critic_steps, generator_step):
    """One generator iteration: one draw for all of its steps, K critic steps, one generator step."""
    stream, shape = runs.generator(device, args.seed, "train", step), (args.critic_steps, args.batch_size)
    n = math.prod(shape)
    x_real = sample_real(n, args.sigma, stream, device).view(*shape, 2)
    z = sample_latent(n + args.batch_size, args.latent_dim, stream, device)
    mix = torch.rand(shape, generator=stream, device=device)
    result = critic_steps(x_real, z[:n].view(*shape, -1), mix)
    generator_step(z[n:])
    return result


def train(args):
    """Train and measure; -> metrics. Leaves pictures, log, metrics and checkpoint in runs/NAME."""
    device = runs.start(args.device)
    if args.capture and device.type != "cuda":
        raise runs.UserError("--capture needs CUDA: leave it away, or choose --device cuda")
    torch.set_num_threads(args.threads)
    run = runs.Run(args, "wgan_gp.py")
    models = build_all(args, device)
    generator, critic, averaged = (models[name] for name in ("generator", "critic", "averaged"))
    steps = make_steps(args, **models)
    done, before = 0, 0.0
    if args.resume:
        state = run.load()
        done, before = state["step"], state["seconds"]
        for name, model in models.items():
            model.load_state_dict(state[name])
        run.rewind_log(done)
    else:
        run.begin()
    if args.capture:
        steps = [runs.Captured(step) for step in steps]
    began = time.perf_counter()
    truth = floor(args.sigma, args.seed)
    x_real = sample_real(N_PLOT, args.sigma, runs.generator("cpu", args.seed, "plot")).numpy()
    sample = sampler(averaged, args, device)

    def save(step):
        states = {name: model.state_dict() for name, model in models.items()}
        run.save(step, before + time.perf_counter() - began, **states)

    def look(step, path):
        x = sample(N_PLOT, runs.generator("cpu", args.seed, "plot latent")).numpy()  # the same z in every picture
        plot_density(x, x_real, args.sigma, f"after {step} generator iterations", path, critic_grid(critic, device))

    with runs.stop_on_signal() as stop:
        for step in range(done + 1, args.iterations + 1):
            decay = 1 - (step - 1) / args.iterations
            runs.set_lr(models["generator_optimizer"], args.lr * decay)
            runs.set_lr(models["critic_optimizer"], args.critic_lr * decay)
            estimate, x_interp = iterate(args, device, step, *steps)
            plot = step % args.plot_every == 0 or step == args.iterations
            if plot or step % 50 == 0:
                value = estimate.item()
                runs.check_finite(value, step, "lower --lr and --critic-lr")
                norm = gradient_norm(critic, x_interp).mean().item()
                run.log(step=step, wasserstein=value, gradient_norm=norm)
            if plot:
                measured = measure(sample, args.sigma, 1, (args.seed, "look", step))
                run.log(step=step, seconds=before + time.perf_counter() - began, **measured)
                look(step, run / f"density_{step:06d}.png")
                speed = (step - done) / (time.perf_counter() - began)
                print(
                    f"{step}/{args.iterations}  Wasserstein estimate {value:.4f}  gradient norm {norm:.2f}  "
                    f"W2 in a mode {np.mean(measured['w2_mode']):.4f} (floor {truth['w2_mode'][0]:.4f})  "
                    f"{speed:.0f} it/s, {(args.iterations - step) / speed:.0f} s to go",
                    flush=True,
                )
                save(step)
            if stop.requested:
                save(step)
                run.stop(step, args.iterations)

    metrics = measure(sample, args.sigma, DRAWS, (args.seed, "end"))
    metrics |= {"w2_floor": truth["w2"], "w2_mode_floor": truth["w2_mode"], "truth": truth}
    look(args.iterations, run / "final.png")
    write_gif(sorted(run.folder.glob("density_*.png")), run / "training.gif")
    plot_curves(run.read_log(), truth, args.sigma, run / "curves.png")
    metrics["seconds"] = before + time.perf_counter() - began
    runs.write_json(run / "metrics.json", metrics)
    print(f"\n{'goal':46} {'bound':>7} {'here':>8} {'truth':>8}")
    best = goals(metrics | truth, args.sigma)
    for (what, value, bound, met), (_, true, _, _) in zip(goals(metrics, args.sigma), best, strict=True):
        print(f"{what:46} {bound:7.3f} {value:8.4f} {true:8.4f}  {'met' if met else 'missed'}")
    print(f"{run.folder}: {metrics['seconds']:.0f} s; final.png, training.gif, curves.png, metrics.json")
    return metrics


def draw(args):
    """--sample: N samples of the averaged generator, in runs/NAME/samples.npy (N, 2) float32 and samples.png."""
    device = runs.start(args.device)
    run = runs.Run(args, "wgan_gp.py")
    averaged = build(args, device)[2]
    runs.load_weights(averaged, run.load()["averaged"], run / "checkpoint.pt")
    x = sampler(averaged, args, device)(args.sample, runs.generator("cpu", args.seed, "sample")).numpy()
    with runs.writing(run / "samples.npy") as part:
        np.save(part, x)
    x_real = sample_real(N_PLOT, args.sigma, runs.generator("cpu", args.seed, "plot")).numpy()
    plot_density(x[:N_PLOT], x_real, args.sigma, f"{run.folder}: samples", run / "samples.png")
    print(f"{run / 'samples.npy'}: {x.shape[0]} x 2 samples; {run / 'samples.png'}: the first {min(N_PLOT, len(x))}")


def main():
    args = parse_args()
    draw(args) if args.sample else train(args)


if __name__ == "__main__":
    runs.cli(main)
