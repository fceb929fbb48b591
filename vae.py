"""A variational autoencoder on CIFAR-10 with a calibrated Gaussian likelihood.

Papers: Kingma & Welling 2014 (arXiv 1312.6114); the decoder's variance as in sigma-VAE, Rybkin et al. 2021 (2006.13202).

    python vae.py --epochs 50                        # CIFAR-10 in data/ or downloaded there; CUDA where there is one
    python vae.py --data shapes --limit 6400 --epochs 4 --holdout 2000      # built-in data, minutes on a CPU
    torchrun --nproc-per-node=2 vae.py --epochs 50   # same global batch on two GPUs (or CPU processes)
    python vae.py --name vae --resume                # go on after Ctrl-C or a crash; --eval-only measures again
    python vae.py --name vae --sample 10000 --prior expost       # PNG files into runs/vae/samples-expost/
"""

import argparse
import math
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import runs


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_run_flags(parser, name="vae")
    parser.add_argument("--eval-only", action="store_true", help="measure and draw again from the checkpoint")
    parser.add_argument(
        "--sample", type=runs.number(int, 1), help="write SAMPLE images from the checkpoint, do no more"
    )
    parser.add_argument("--prior", choices=["normal", "expost"], default="normal", help="what to sample z from")
    data.add_flags(parser)
    # model
    parser.add_argument("--latent-dim", type=runs.number(int, 1), default=128, help="dimensions of z")
    parser.add_argument("--sigma", type=sigma_value, default="auto", help="decoder's std: auto (optimal) or a number")
    parser.add_argument("--beta", type=runs.number(float, 0), default=1.0, help="weight of the KL term")
    # optimisation
    parser.add_argument("--epochs", type=runs.number(int, 1), default=50, help="passes over the training images")
    parser.add_argument("--batch-size", type=runs.number(int, 2), default=128, help="images a step, over all ranks")
    parser.add_argument("--lr", type=runs.number(float, above=0), default=1e-3, help="Adam's peak learning rate")
    parser.add_argument("--schedule", choices=["constant", "cosine"], default="cosine", help="of the learning rate")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of convolutions, matmuls"
    )
    parser.add_argument(
        "--capture", action=argparse.BooleanOptionalAction, default=False, help="CUDA graph of the step"
    )
    parser.add_argument("--log-every", type=runs.number(int, 1), default=20, help="steps between lines of log.jsonl")
    return runs.parse(parser, argv, reuse=("resume", "eval_only", "sample"), may_differ=("prior", "epochs", "data_dir"))


def sigma_value(text):
    return text if text == "auto" else runs.number(float, above=0)(text)


# --- model --------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """q(z|x) = N(mu, diag exp(logvar)).  x (B, 3, 32, 32) in [0, 1] -> mu, logvar, each (B, latent_dim)."""

    def __init__(self, latent_dim=128):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=4, stride=2, padding=1),  # (B, 64, 16, 16)
            nn.ReLU(),
            nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1),  # (B, 128, 8, 8)
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128 * 8 * 8, 1024),
            nn.BatchNorm1d(1024),
            nn.ReLU(),
        )
        self.mu = nn.Linear(1024, latent_dim)
        self.logvar = nn.Linear(1024, latent_dim)

    def forward(self, x):
        h = self.features(x)  # (B, 1024)
        return self.mu(h), self.logvar(h)


class SamePad(nn.Module):
    """Zero padding that keeps 32x32 under a 4x4 kernel: one pixel before, two after (an even kernel has no centre)."""

    def forward(self, x):
        return F.pad(x, (1, 2, 1, 2))


class Decoder(nn.Module):
    """Mean of p(x|z).  z (B, latent_dim) -> x_hat (B, 3, 32, 32) in (0, 1)."""

    def __init__(self, latent_dim=128):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(latent_dim, 1024),
            nn.BatchNorm1d(1024),
            nn.ReLU(),
            nn.Linear(1024, 128 * 8 * 8),
            nn.BatchNorm1d(128 * 8 * 8),
            nn.ReLU(),
            nn.Unflatten(1, (128, 8, 8)),
            nn.ConvTranspose2d(128, 128, kernel_size=4, stride=2, padding=1),  # (B, 128, 16, 16)
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.ConvTranspose2d(128, 64, kernel_size=4, stride=2, padding=1),  # (B, 64, 32, 32)
            nn.BatchNorm2d(64),
            nn.ELU(),
            SamePad(),
            nn.Conv2d(64, 3, kernel_size=4, stride=1),
            nn.Sigmoid(),
        )

    def forward(self, z):
        return self.net(z)


class VAE(nn.Module):
    """Encoder, decoder and the decoder's one shared variance sigma2, in units of pixel values in [0, 1].

    sigma 'auto': each training batch uses its own optimal variance, its mean squared error; `sigma2` remembers
    their running mean (over the last hundred batches or so), and that is what evaluation uses. A number fixes it.
    """

    def __init__(self, latent_dim=128, sigma="auto"):
        super().__init__()
        self.encoder, self.decoder = Encoder(latent_dim), Decoder(latent_dim)
        self.auto = sigma == "auto"
        self.register_buffer("sigma2", torch.tensor(1.0 if self.auto else float(sigma) ** 2))
        self.register_buffer("batches", torch.tensor(0.0))

    def variance(self, mse):
        """The variance to use for a batch whose mean squared error is `mse` (a scalar without gradient)."""
        if not (self.auto and self.training):
            return self.sigma2
        runs.all_reduce_mean(mse)  # under several ranks the variance is that of the global batch
        self.batches += 1
        self.sigma2.lerp_(mse, (1 / self.batches).clamp(min=0.01))
        return mse


# --- the ELBO, per image and in nats ------------------------------------------------------------------------------


def kl_to_prior(mu, logvar):
    """KL(N(mu, diag exp(logvar)) || N(0, I)) of each image, in nats.  Kingma & Welling 2014, appendix B.

    mu, logvar: (B, Z) -> (B,)
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def gaussian_nll(x, x_hat, sigma2):
    """-log N(x; x_hat, sigma2 I) of each image, in nats, summed over pixels and channels.

    With sigma2 the mean squared error of the batch this is Rybkin et al. 2021, eq. 6: the best shared variance.
    Its gradient may ignore that sigma2 depends on x_hat, because the derivative by sigma2 vanishes there.

    x, x_hat: (B, C, H, W), sigma2: scalar tensor -> (B,)
    """
    dims = x[0].numel()
    return (x - x_hat).square().flatten(1).sum(1) / (2 * sigma2) + dims / 2 * torch.log(2 * math.pi * sigma2)


def elbo_terms(vae, x, eps):
    """-log p(x|z) at z = mu + eps * std, and KL(q(z|x) || p(z)).  Kingma & Welling 2014, eq. 10 with one sample.

    x: (B, 3, 32, 32), eps: (B, Z) standard normal -> nll (B,), kl (B,), mean squared error (scalar)
    """
    mu, logvar = vae.encoder(x)
    x_hat = vae.decoder(mu + eps * torch.exp(0.5 * logvar)).float()
    mse = (x - x_hat.detach()).square().mean()
    return gaussian_nll(x, x_hat, vae.variance(mse)), kl_to_prior(mu.float(), logvar.float()), mse


def bits_per_dim(elbo, dims):
    """Bits per dimension of 8-bit images whose dequantised values (k + u) / 256 have the density bound `elbo` nats.

    A density on [0, 1] becomes a probability of the 256 levels by their width: hence the 8 bits.
    """
    return 8 - elbo / (dims * math.log(2))


# --- evaluation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(vae, images, seed, batch_size=500):
    """-> elbo_nats, bits_per_dim, nll, kl (nats per image), mse (at z = mu), active_units.

    The ELBO is that of dequantised images (k + u) / 256, u uniform, with one sample of z and the stored sigma2.
    A latent unit is active when its mean varies with the image by more than 0.01 (Burda et al. 2016, 1509.00519).
    """
    vae.eval()
    noise = runs.generator(images.device, seed, "evaluate")
    sums, means = torch.zeros(3), []
    for part in images.split(batch_size):
        x = part.float() / 255
        u = torch.rand(x.shape, device=x.device, generator=noise)
        eps = torch.randn(len(x), vae.encoder.mu.out_features, device=x.device, generator=noise)
        nll, kl, _ = elbo_terms(vae, (part + u) / 256, eps)
        mu, _ = vae.encoder(x)
        sse = (vae.decoder(mu) - x).square().sum()
        sums += torch.stack([nll.sum(), kl.sum(), sse]).cpu()
        means.append(mu)
    dims = images[0].numel()
    nll, kl, sse = (sums / len(images)).tolist()
    active = int((torch.cat(means).var(0) > 0.01).sum())
    return {
        "elbo_nats": -nll - kl,
        "bits_per_dim": bits_per_dim(-nll - kl, dims),
        "nll": nll,
        "mse": sse / dims,
        "kl": kl,
        "active_units": active,
    }


@torch.no_grad()
def encode(vae, images, seed=None, batch_size=500):
    """Codes (N, Z) of uint8 images: the means, or with a seed one sample of q(z|x) each."""
    vae.eval()
    noise = runs.generator(images.device, seed, "encode")
    codes = []
    for part in images.split(batch_size):
        mu, logvar = vae.encoder(part.float() / 255)
        if seed is not None:
            mu += torch.randn(mu.shape, device=mu.device, generator=noise) * torch.exp(0.5 * logvar)
        codes.append(mu)
    return torch.cat(codes)


@torch.no_grad()
def decode(vae, z, batch_size=500):
    """z (N, Z) -> uint8 images (N, 3, 32, 32): decoder means without pixel noise, rounded."""
    vae.eval()
    return torch.cat([vae.decoder(part).mul(255).round().to(torch.uint8) for part in z.split(batch_size)])


def draw_latents(vae, n, args, device, images):
    """z (n, Z) from N(0, I), or for --prior expost from the full Gaussian that fits one code of each training image."""
    noise = runs.generator(device, args.seed, "latents")
    z = torch.randn(n, args.latent_dim, device=device, generator=noise)
    if args.prior == "normal":
        return z
    codes = encode(vae, images, args.seed).double().cpu()
    return codes.mean(0).to(z) + z @ torch.linalg.cholesky(torch.cov(codes.T)).T.to(z)


# --- pictures -----------------------------------------------------------------------------------------------------


def plot_grid(images, path, title, columns=16):
    """images (N, 3, 32, 32) uint8, row by row -> one PNG."""
    rows = math.ceil(len(images) / columns)
    sheet = torch.full((rows * columns, 3, 34, 34), 255, dtype=torch.uint8)
    sheet[: len(images), :, 1:33, 1:33] = images.cpu()
    sheet = sheet.view(rows, columns, 3, 34, 34).permute(0, 3, 1, 4, 2).reshape(rows * 34, columns * 34, 3)
    figure = plt.figure(figsize=(columns * 0.68, rows * 0.68 + 0.4), dpi=100)
    axes = figure.add_axes((0, 0, 1, rows * 0.68 / (rows * 0.68 + 0.4)))
    axes.imshow(sheet.numpy(), interpolation="nearest")
    axes.axis("off")
    figure.suptitle(title, fontsize=12)
    runs.save_figure(figure, path)


def plot_reconstructions(vae, images, path):
    """Rows in pairs: images, and under them decoder(mu)."""
    pairs = zip(images.split(16), decode(vae, encode(vae, images)).split(16), strict=True)
    plot_grid(
        torch.cat([part for pair in pairs for part in pair]), path, "test images, each row over its reconstructions"
    )


def plot_curves(log, path):
    """log: records of log.jsonl -> the terms of the ELBO against epochs, training and test."""
    train = [record for record in log if "loss" in record]
    test = [record for record in log if "elbo_nats" in record]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), dpi=100, layout="constrained")
    for ax, key, label in zip(
        axes,
        ["bits_per_dim", "kl", "mse", "sigma"],
        ["-ELBO (bits per dimension)", "KL (nats per image)", "squared error (per pixel value)", "decoder's sigma"],
        strict=True,
    ):
        ax.plot([r["epoch"] for r in train], [r[key] for r in train], lw=0.8, alpha=0.7, label="training batches")
        if test and key in test[0]:
            style = dict(marker="o", ms=3, lw=1.2)
            ax.plot([r["epoch"] for r in test], [r[key] for r in test], **style, label="test images")
        ax.set(xlabel="epoch", title=label)
        late = sorted(r[key] for r in train[len(train) // 20 :] + [r for r in test if key in r])
        ax.set_ylim(late[0] - 0.05 * (late[-1] - late[0]), late[-1] + 0.05 * (late[-1] - late[0]) or 1)
        ax.grid(alpha=0.3)
    axes[0].legend()
    runs.save_figure(figure, path)


# --- training -----------------------------------------------------------------------------------------------------


def learning_rate(step, total, args):
    """A linear rise over the first 2 % of the steps, then constant, or half a cosine down to zero."""
    rise = min(1.0, (step + 1) / (0.02 * total + 1))
    fall = 0.5 + 0.5 * math.cos(math.pi * step / total) if args.schedule == "cosine" else 1.0
    return args.lr * rise * fall


def make_step(vae, optimizer, images, args):
    """One update as a function of what is drawn at random; it reads nothing back, so a CUDA graph can hold it."""
    parameters = list(vae.parameters())

    def step(index, flip, eps):
        optimizer.zero_grad(set_to_none=True)
        x = data.batch(images, index, flip)
        with runs.autocast(images.device, args.precision):
            nll, kl, mse = elbo_terms(vae, x, eps)
        loss = (nll + args.beta * kl).mean()
        loss.backward()
        runs.average_gradients(parameters)
        optimizer.step()
        return torch.stack([loss.detach(), nll.detach().mean(), kl.detach().mean(), mse])

    capture = args.capture and images.device.type == "cuda" and runs.world_size() == 1
    return runs.Captured(step) if capture else step


def train(args, run, device, images, test):
    """Train to args.epochs, from the checkpoint with --resume. Leaves log.jsonl and checkpoint.pt. -> vae, seconds."""
    torch.manual_seed(args.seed)  # the initial weights
    vae = VAE(args.latent_dim, args.sigma).to(device)
    optimizer = runs.adam(vae.parameters(), args.lr, device)
    per_epoch = len(images) // args.batch_size
    total, first, seconds, recent = args.epochs * per_epoch, 0, 0.0, torch.zeros(4)
    if args.resume:
        state = run.load()
        runs.load_weights(vae, state["model"], run / "checkpoint.pt")
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, recent = state["step"], state["seconds"], state["recent"]
        run.rewind_log(first)
    else:
        run.begin()
    recent = recent.to(device)
    step_fn = make_step(vae, optimizer, images, args)
    began = time.perf_counter() - seconds

    def save(step):
        runs.average_buffers(vae)
        state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "recent": recent.cpu()}
        run.save(step, time.perf_counter() - began, **state)

    bar = tqdm(total=total, initial=first, unit="step", disable=not runs.is_main(), dynamic_ncols=True)
    with runs.stop_on_signal() as stop, bar:
        for step in range(first, total):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == first:
                shuffle = runs.generator("cpu", args.seed, "order", epoch)
                order = torch.randperm(len(images), generator=shuffle).to(device)
            vae.train()
            noise = runs.generator(device, args.seed, "noise", step)
            flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
            eps = torch.randn(args.batch_size, args.latent_dim, device=device, generator=noise)
            index = order[i * args.batch_size : (i + 1) * args.batch_size]
            runs.set_lr(optimizer, learning_rate(step, total, args))
            recent += step_fn(*map(runs.shard, (index, flip, eps)))
            done = step + 1
            bar.update()
            if done % args.log_every == 0:  # the only host sync
                loss, nll, kl, mse = (recent / args.log_every).tolist()
                recent.zero_()
                runs.check_finite(loss, done, "lower --lr, or raise --sigma if you set one")
                elapsed = time.perf_counter() - began
                record = {"step": done, "epoch": done / per_epoch, "loss": loss, "nll": nll, "kl": kl, "mse": mse}
                record |= {
                    "bits_per_dim": bits_per_dim(-nll - kl, images[0].numel()),
                    "sigma": vae.sigma2.sqrt().item(),
                }
                record |= {"lr": learning_rate(step, total, args), "seconds": elapsed}
                run.log(**record)
                bar.set_postfix(
                    elbo=f"{-nll - kl:.0f}", kl=f"{kl:.1f}", mse=f"{mse:.4f}", sigma=f"{record['sigma']:.3f}"
                )
            if done % per_epoch == 0:
                save(done)
                if runs.is_main():  # a glimpse; the closing evaluation takes all images
                    run.log(step=done, epoch=done / per_epoch, **evaluate(vae, test[:1000], args.seed))
            elif stop.now(done):
                save(done)
                run.stop(done, total)
    return vae, time.perf_counter() - began


def load_vae(run, device):
    """-> the VAE of runs/NAME/checkpoint.pt and its step."""
    state = run.load()
    vae = VAE(state["args"]["latent_dim"], state["args"]["sigma"]).to(device)
    runs.load_weights(vae, state["model"], run / "checkpoint.pt")
    return vae, state


def report(vae, args, run, test, latents, seconds, seen):
    """Measure, draw, write metrics.json and print the closing table."""
    metrics = evaluate(vae, test, args.seed)
    metrics |= {"seconds": seconds, "images_per_second": seen / seconds}
    runs.write_json(run / "metrics.json", metrics)
    plot_curves(run.read_log(), run / "curves.png")
    plot_reconstructions(vae, test[:64], run / "reconstructions.png")
    z = "z ~ N(0, I)" if args.prior == "normal" else "z ~ the Gaussian fitted to training codes"
    plot_grid(decode(vae, latents(128)), run / f"samples-{args.prior}.png", f"samples, {z}")
    print(f"\n{run.folder}: {args.data}, {len(test)} {'held-out' if args.holdout else 'test'} images")
    for key, value in metrics.items():
        print(f"  {key:18} {value:.4f}" if isinstance(value, float) else f"  {key:18} {value}")
    print(f"  pictures: curves.png, reconstructions.png, samples-{args.prior}.png")


def main():
    args = parse_args()
    device = runs.start(args.device, args.precision)
    if args.batch_size % runs.world_size():
        raise runs.UserError(f"--batch-size {args.batch_size} does not divide among {runs.world_size()} processes")
    run = runs.Run(args, "vae.py")
    images, _, test, _ = data.splits(args, device)
    if len(images) < args.batch_size:
        raise runs.UserError(f"{len(images)} training images do not fill a batch: --batch-size {len(images)} or less")
    if args.eval_only or args.sample:
        vae, state = load_vae(run, device)
        seconds, steps = state["seconds"], state["step"]
    else:
        vae, seconds = train(args, run, device, images, test)
        steps = args.epochs * (len(images) // args.batch_size)
    if not runs.leave_group():
        return

    def latents(n):
        return draw_latents(vae, n, args, device, images)

    if args.sample:
        folder = run / f"samples-{args.prior}"
        data.write_images(decode(vae, latents(args.sample)), folder)
        print(f"{args.sample} samples are in {folder}")
    else:
        report(vae, args, run, test, latents, seconds, steps * args.batch_size)


if __name__ == "__main__":
    runs.cli(main)
