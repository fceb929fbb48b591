"""A variational autoencoder on CIFAR-10 with a calibrated Gaussian likelihood.

Papers: Kingma & Welling 2014 (arXiv 1312.6114); the decoder's variance after Rybkin et al. 2021 (arXiv 2006.13202).

    python vae.py --epochs 50                        # CIFAR-10 in data/ or downloaded there; CUDA where there is one
    python vae.py --data shapes --limit 10000 --epochs 4             # built-in data, minutes on a CPU
    torchrun --nproc-per-node=2 vae.py --epochs 50   # same global batch on two GPUs (or CPU processes)
    python vae.py --epochs 50 --contrastive 300      # codes that tell a linear classifier more
    python vae.py --name vae --resume                # go on after Ctrl-C or a crash; --eval-only measures again
    python vae.py --name vae --sample 10000 --prior expost           # PNG files in runs/vae/samples-expost/

Measured with OMP_NUM_THREADS=1 python vae.py --epochs 6 (CIFAR-10, seed 0), on the test images: ELBO 3292.5 nats,
6.454 bits per dimension, squared error 0.0055, KL 253.9 nats, 128 of 128 units active; 25.1 minutes at 199 images/s
(AMD EPYC, float32, torch 2.13.0+cpu, 2026-11-23). FID, CUDA and 50 epochs: not measured.

Symbols: x image, z latent, mu and logvar mean and log-variance of q(z|x), x_hat = decoder(z) mean of p(x|z), sigma2 the
decoder's variance. ELBO = E_q[log p(x|z)] - beta KL(q(z|x) || p(z)), in nats per image, summed over pixels and latents.

How the assignment's table is read: padding 1 at stride 2 (32 -> 16 -> 8 pixels and back); 'same' zero padding for the
last 4x4 convolution, one before and two after; the encoder's last layer "FC 128" is two heads, mean and log-variance;
the table says 128 latent dimensions, the classification task 64: --latent-dim sets it.

Choices, and deviations from the papers
- p(x|z) = N(x_hat, sigma2 I) with each batch's one best sigma2 (sigma-VAE): with sigma2 = 1 the 3072 squared errors
  would hardly count against the KL. Adam with batches of 128 (Kingma & Welling: Adagrad, 100).
- Bits per dimension are those of dequantised images; training sees the undisturbed ones.
- Chosen by the ELBO (trained and averaged weights, nats) on 5,000 held-out training images after two epochs
  (--holdout 5000 --epochs 2 --precision bf16, seed 0). Cosine schedule: 2555 and 2546 at a rate of 2e-3, 2644 and 2637
  at 1e-3, 2677 and 2672 at 5e-4. Constant: 2660 and 2753 at 1e-3, 2635 and 2822 at 5e-4, 2657 and 2801 at 2.5e-4. So:
  constant, 5e-4, averaged. Batches of 64 (2706 and 2841) gain less than twice the steps cost. A longer training may
  want another schedule.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import contrastive
import data
import devices
import fid
import runs
import sampling

REUSE = ("resume", "eval_only", "sample")  # flags that go on from a checkpoint, with the flags it was made with
FREE = ("prior", "epochs", "data_dir", "save_every", "fid", "features")  # but these may change
CURVES = {"bits_per_dim": "-ELBO, bits per dimension", "kl": "KL, nats per image", "mse": "squared error per pixel"}


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_run_flags(parser, name="vae")
    add_flags(parser)
    sigma = runs.number(float, 1e-4, 1e4, words=("auto",))
    parser.add_argument("--sigma", type=sigma, default="auto", help="decoder's std: auto (optimal) or a number")
    parser.add_argument("--beta", type=runs.number(float, 0), default=1.0, help="weight of the KL term")
    return runs.parse(parser, argv, reuse=REUSE, may_differ=FREE)


def add_flags(parser):
    """The flags that vae_gan.py has, too."""
    parser.add_argument("--eval-only", action="store_true", help="measure and draw again from the checkpoint")
    parser.add_argument(
        "--sample", type=runs.number(int, 1), help="write SAMPLE images from the checkpoint, do no more"
    )
    parser.add_argument("--prior", choices=["normal", "expost"], default="normal", help="what --sample draws z from")
    data.add_flags(parser)
    # model
    parser.add_argument("--latent-dim", type=runs.number(int, 1), default=128, help="dimensions of z")
    weight = runs.number(float, 0)
    parser.add_argument("--contrastive", type=weight, default=0.0, help="weight of contrastive.py's term; 0: without")
    # optimisation
    parser.add_argument("--epochs", type=runs.number(int, 1), default=50, help="passes over the training images")
    parser.add_argument("--batch-size", type=runs.number(int, 2), default=128, help="images a step, over all ranks")
    parser.add_argument("--lr", type=runs.number(float, above=0), default=5e-4, help="Adam's peak learning rate")
    parser.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate")
    parser.add_argument("--ema", type=runs.number(float, 0, 1), default=0.999, help="decay of the averaged weights")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of convolutions, matmuls"
    )
    parser.add_argument(
        "--capture", action=argparse.BooleanOptionalAction, default=False, help="CUDA graph of the step"
    )
    # evaluation
    count = runs.number(int, 2, words=("auto", "off"))
    parser.add_argument("--fid", type=count, default="auto", help="images: auto (10,000, but off on a CPU), off, or N")
    parser.add_argument("--features", help="a torch.export program for the distances, in place of Inception")
    # run
    parser.add_argument("--save-every", type=runs.number(int, 1), default=1, help="epochs between checkpoints")
    parser.add_argument("--log-every", type=runs.number(int, 1), default=20, help="steps between lines of log.jsonl")


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
            nn.ZeroPad2d((1, 2, 1, 2)),  # 'same' for a 4x4 kernel, which has no centre
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


def load(path, device):
    """A run's folder or checkpoint.pt, of vae.py or vae_gan.py -> its averaged VAE on `device`, the run's flags."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    state = runs.load_checkpoint(file)
    if "average" not in state or "latent_dim" not in state["args"]:
        raise runs.UserError(f"{file} holds no encoder and decoder: give a run of vae.py or vae_gan.py")
    vae = VAE(state["args"]["latent_dim"]).to(device)
    runs.load_weights(vae, state["average"], file)
    return vae.eval(), state["args"]


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


def elbo_terms(vae, x, eps, codes=None):
    """-log p(x|z) at z = mu + eps * std, and KL(q(z|x) || p(z)).  Kingma & Welling 2014, eq. 10 with one sample.

    x: (B, 3, 32, 32), eps: (B, Z) standard normal -> nll (B,), kl (B,), mean squared error (scalar)
    codes: the encoder's answer to x, when it is there already.
    """
    mu, logvar = codes or vae.encoder(x)
    mu, logvar = mu.to(x.dtype), logvar.to(x.dtype)  # under autocast the networks answer in bfloat16
    x_hat = vae.decoder(mu + eps * torch.exp(0.5 * logvar)).to(x.dtype)
    mse = (x - x_hat.detach()).square().mean()
    return gaussian_nll(x, x_hat, vae.variance(mse)), kl_to_prior(mu, logvar), mse


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
    noise = devices.generator(images.device, seed, "evaluate")
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


# --- training -----------------------------------------------------------------------------------------------------


def make_step(vae, average, optimizer, images, args):
    """One update as a function of what varies; it draws and reads back nothing, so that a CUDA graph can hold it."""
    parameters = list(vae.parameters())

    def step(index, flip, eps, keep, *views):  # views: contrastive.draw's numbers, or none
        optimizer.zero_grad(set_to_none=True)
        x = data.batch(images, index, flip)
        with devices.autocast(images.device, args.precision):
            codes = vae.encoder(x)
            nll, kl, mse = elbo_terms(vae, x, eps, codes)
            contrast = [contrastive.term(vae.encoder, x, codes[0], u).mean() for u in views]
        loss = sum((args.contrastive * value for value in contrast), (nll + args.beta * kl).mean())
        loss.backward()
        runs.average_gradients(parameters)
        optimizer.step()
        devices.average_weights(average, vae, keep)
        return torch.stack([loss, nll.mean(), kl.mean(), mse, *contrast]).detach()

    return devices.Captured(step) if args.capture else step


def train(args, run, device, images, test):
    """Train to args.epochs, with --resume from the checkpoint. Leaves log.jsonl, checkpoint.pt. -> average, seconds.

    What is measured and sampled is the exponential moving average of all weights and statistics, never a mixture.
    """
    torch.manual_seed(args.seed)  # the initial weights
    vae = VAE(args.latent_dim, args.sigma).to(device)
    average = copy.deepcopy(vae)
    optimizer = devices.adam(vae.parameters(), args.lr, device)
    parts = {"model": vae, "average": average, "optimizer": optimizer}
    names = ["loss", "nll", "kl", "mse"] + ["contrast"] * bool(args.contrastive)
    recent = torch.zeros(len(names), device=device)  # their sums since the last log line
    first, seconds = 0, 0.0
    if args.resume:
        state = run.restore(parts)
        recent.copy_(state["recent"])
        first, seconds = state["step"], state["seconds"]
        run.rewind_log(first)
    else:
        run.begin()
    per_epoch = len(images) // args.batch_size  # the last, incomplete batch is dropped
    total = args.epochs * per_epoch
    vae.train()
    update = make_step(vae, average, optimizer, images, args)
    began = time.perf_counter() - seconds

    if first > total:
        raise runs.UserError(f"{run.folder} is at step {first}, past --epochs {args.epochs}: give more, or --eval-only")
    advice = "lower --lr, or raise --sigma if you set one"
    bar = tqdm(total=total, initial=first, unit="step", disable=not runs.is_main(), dynamic_ncols=True)
    with runs.stop_on_signal() as stop, bar:
        for step in range(first, total):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == first:
                shuffle = devices.generator("cpu", args.seed, "order", epoch)
                order = torch.randperm(len(images), generator=shuffle).to(device)
            noise = devices.generator(device, args.seed, "noise", step)
            flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
            eps = torch.randn(args.batch_size, args.latent_dim, device=device, generator=noise)
            index = order[i * args.batch_size : (i + 1) * args.batch_size]
            lr = devices.learning_rate(step, total, args.lr, args.schedule)
            devices.set_lr(optimizer, lr)
            keep = torch.full((), min(args.ema, (1 + step) / (10 + step)), device=device)  # forgets the start sooner
            views = [contrastive.draw(args.batch_size, device, args.seed, step)] if args.contrastive else []
            recent += update(*map(runs.shard, (index, flip, eps)), keep, *map(runs.shard, views))
            done = step + 1
            bar.update()
            if done % args.log_every == 0:  # the only time that the host waits for the device
                runs.all_reduce_mean(recent)
                record = dict(zip(names, (recent / args.log_every).tolist(), strict=True))
                recent.zero_()
                runs.check_finite(record["loss"], done, advice)
                elbo, sigma = -record["nll"] - record["kl"], vae.sigma2.sqrt().item()
                where = {"step": done, "epoch": done / per_epoch, "lr": lr, "seconds": time.perf_counter() - began}
                run.log(**where, **record, bits_per_dim=bits_per_dim(elbo, images[0].numel()), sigma=sigma)
                bar.set_postfix_str(f"elbo {elbo:.0f} nats, kl {record['kl']:.1f}, mse {record['mse']:.4f}")
            complete = done % (args.save_every * per_epoch) == 0 or done == total
            stopping = stop.now(done) and done < total
            if complete or stopping:
                runs.average_buffers(vae, average)
                if runs.is_main():  # a glimpse: what is saved must be finite
                    glimpse = evaluate(average, test[:1000], args.seed)
                    runs.check_finite(glimpse["elbo_nats"], done, advice)
                run.save(done, time.perf_counter() - began, parts, recent=recent.cpu())
            if complete and runs.is_main():
                run.log(step=done, epoch=epoch + 1, **glimpse)
            if stopping:
                run.stop(done, total)
    return average, time.perf_counter() - began


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, args.precision, args.capture)
    run = runs.Run(args, "vae.py")
    images, _, test, _ = data.splits(args, device)
    runs.check_batch(args.batch_size, len(images))
    # before training, to say what is missing while it can be helped
    extractor = None if args.sample else fid.wanted_extractor(args.fid, args.features, device)
    if args.eval_only or args.sample:
        vae = VAE(args.latent_dim, args.sigma).to(device)
        state = run.restore({"average": vae})
        seconds, steps = state["seconds"], state["step"]
    else:
        vae, seconds = train(args, run, device, images, test)
        steps = args.epochs * (len(images) // args.batch_size)
    if not runs.leave_group():
        return
    if args.sample:
        sampling.write_samples(run, args, vae, images)
        return
    runs.plot_curves(run.read_log(), run / "curves.png", CURVES)
    speed = {"step": steps, "seconds": seconds, "images_per_second": steps * args.batch_size / seconds}
    metrics = speed | evaluate(vae, test, args.seed)
    sampling.report(run, args, vae, images, test, extractor, metrics, ["curves.png"])


if __name__ == "__main__":
    runs.cli(main)
