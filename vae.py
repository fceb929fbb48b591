"""A variational autoencoder on CIFAR-10 with a calibrated Gaussian likelihood.

Papers: Kingma & Welling 2014 (arXiv 1312.6114); the decoder's variance after Rybkin et al. 2021 (arXiv 2006.13202).

    python vae.py --epochs 50                        # CIFAR-10 in data/ or downloaded there; CUDA where there is one
    python vae.py --data shapes --limit 10000 --epochs 4             # built-in data, minutes on a CPU
    torchrun --nproc-per-node=2 vae.py --epochs 50   # same global batch on two GPUs (or CPU processes)
    python vae.py --epochs 50 --patches 15           # codes that tell a linear classifier more: common/patches.py
    python vae.py --name vae --resume                # go on after Ctrl-C or a crash; --eval-only measures again
    python vae.py --name vae --sample 10000 --prior expost           # PNG files in runs/vae/samples-expost/

Measured with OMP_NUM_THREADS=1 python vae.py --epochs 6 (CIFAR-10, seed 0), on the test images: ELBO 3292.5 nats,
6.454 bits per dimension, squared error 0.0055, KL 253.9 nats, 128 of 128 units active; 25.1 minutes at 199 images/s
(AMD EPYC, float32, torch 2.13.0+cpu, 2026-11-23). FID, CUDA and 50 epochs: not measured.

Symbols: x image, z latent, mu and logvar mean and log-variance of q(z|x), x_hat = decoder(z) mean of p(x|z), sigma2 the
decoder's variance. ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)), in nats an image, over all pixels and latents; training
weighs the KL by --beta.
Deviations: the encoder's "FC 128" is two heads, mu and logvar; padding 1 at stride 2, 'same' zero padding for the last
convolution; one variance, each batch's best (Rybkin et al.); Adam, batches of 128 (Kingma & Welling: Adagrad, 100);
random flips; trained on values k / 255, its ELBO measured on dequantised ones, (k + u) / 256; what is measured are
averaged weights. REPORT.md's appendix says how rate, schedule and average were chosen.
"""

import copy
import math

import torch
from torch import nn

import fid
from common import data, devices, patches, ranks, runs, script
from common.loop import Loop
from common.runs import UserError, number

CURVES = {"bits_per_dim": "-ELBO, bits per dimension", "kl": "KL, nats per image", "mse": "squared error per pixel"}
SEEN = 1000  # test images that are measured at each checkpoint; nothing is chosen by them


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    script.add_flags(parser, name="vae", batch_size=128, lr=5e-4)
    sigma = number(float, 1e-4, 1e4, words=("auto",))
    parser.add_argument("--sigma", type=sigma, default="auto", help="decoder's std: auto (optimal) or a number")
    parser.add_argument("--beta", type=number(float, 0), default=1.0, help="weight of the KL term")
    return runs.parse(parser, argv, "vae.py", script.REUSE, script.MAY_DIFFER)


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
        ranks.all_reduce_mean(mse)  # under several ranks the variance is that of the global batch
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

    x, x_hat: (B, C, H, W), sigma2: scalar tensor -> (B,). With sigma2 the batch's mean squared error this is Rybkin et
    al. 2021, eq. 6: the best shared variance, so the derivative by sigma2 vanishes and its gradient may be left out.
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

    A density on [0, 1] becomes a probability of one of 256 levels by the level's width: hence the 8 bits.
    """
    return 8 - elbo / (dims * math.log(2))


# --- training -----------------------------------------------------------------------------------------------------


def make_update(vae, average, head, optimizer, images, args):
    """One update as a function of what varies; it draws and reads back nothing, so that a CUDA graph can hold it."""
    parameters = [*vae.parameters(), *head.parameters()]

    def update(rows, flip, eps, decay):
        optimizer.zero_grad(set_to_none=True)
        x = data.batch(images, rows, flip)
        with devices.autocast(images.device, args.precision):
            codes = vae.encoder(x)
            nll, kl, mse = elbo_terms(vae, x, eps, codes)
            numbers = {"loss": (nll + args.beta * kl).mean(), "nll": nll.mean(), "kl": kl.mean(), "mse": mse}
            if args.patches:
                numbers["patch_nll"] = head.nll(codes[0], rows).mean()
                numbers["loss"] = numbers["loss"] + args.patches * numbers["patch_nll"]
        numbers["loss"].backward()
        ranks.all_reduce_mean(*(p.grad for p in parameters))
        optimizer.step()
        devices.average_weights(average, vae, decay)
        return {name: value.detach() for name, value in numbers.items()}

    return devices.Captured(update) if args.capture else update


def train(args, run, images, test):
    """Train to args.epochs -> the moving average of weights and statistics, which is what counts; steps and seconds."""
    torch.manual_seed(args.seed)  # the initial weights
    vae = VAE(args.latent_dim, args.sigma).to(images.device)
    average = copy.deepcopy(vae)
    z = draw_latents(average, script.FRAME_SAMPLES, "normal", images, args.seed)  # of each frame of training.gif
    head = patches.head(args, images)
    optimizer = devices.adam([*vae.parameters(), *head.parameters()], args.lr, images.device)
    parts = {"model": vae, "average": average, "optimizer": optimizer}
    if args.patches:
        parts["head"] = head
    vae.train()
    update = make_update(vae, average, head, optimizer, images, args)
    with Loop.of_epochs(run, args, parts, images, "lower --lr, or raise --sigma if you set one") as loop:
        for _ in loop:
            noise = loop.generator("noise")
            flip = torch.rand(args.batch_size, device=images.device, generator=noise) < 0.5
            eps = torch.randn(args.batch_size, args.latent_dim, device=images.device, generator=noise)
            lr, decay = script.set_rates(args, loop, optimizer)
            loop.add(update(*ranks.shard(loop.rows(images), flip, eps), decay))
            if loop.logs():  # the only time that the host waits for the device
                means = loop.means()
                elbo = -means["nll"] - means["kl"]
                bits = bits_per_dim(elbo, images[0].numel())  # of x as trained on; only evaluate() dequantises
                loop.log(lr=lr, **means, bits_per_dim=bits, sigma=vae.sigma2.sqrt().item())
                loop.show(f"elbo {elbo:.0f} nats, kl {means['kl']:.1f}, mse {means['mse']:.4f}")
            if loop.saves():
                ranks.average_buffers(vae, average)
                loop.save(evaluate(average, test[:SEEN], args.seed), decode(average, z))
    return average, {"step": loop.step, **loop.spent()}


# --- a trained VAE: codes, samples, numbers --------------------------------------------------------------------------


@torch.no_grad()
def encode(vae, images, seed=None, batch_size=500):
    """Codes (N, Z) of uint8 images (N, 3, 32, 32): the means, or with a seed one sample of q(z|x) each."""
    vae.eval()
    noise = devices.generator(images.device, seed, "encode")
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


def draw_latents(vae, n, prior, images, seed):
    """z (n, Z) from N(0, I), or for prior 'expost' from the full Gaussian fitted to one code of each image."""
    noise = devices.generator(images.device, seed, "latents")
    z = torch.randn(n, vae.encoder.mu.out_features, device=images.device, generator=noise)
    if prior == "normal":
        return z
    codes = encode(vae, images, seed).cpu().double()
    scale = torch.linalg.cholesky(torch.cov(codes.T) + 1e-9 * torch.eye(codes.shape[1]))  # unused units have no spread
    return codes.mean(0).to(z) + z @ scale.T.to(z)


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
    nll, kl, sse = (sums / len(images)).tolist()
    elbo, dims, active = -nll - kl, images[0].numel(), int((torch.cat(means).var(0) > 0.01).sum())
    found = {"elbo_nats": elbo, "bits_per_dim": bits_per_dim(elbo, dims), "nll": nll, "mse": sse / dims, "kl": kl}
    return found | {"active_units": active}


def load(path, device):
    """A run's folder or its checkpoint.pt -> its averaged VAE on `device`, and the run's flags. Raises UserError."""
    file = runs.checkpoint_file(path)
    state = runs.load_checkpoint(file)
    if "average" not in state or "latent_dim" not in state["args"]:
        raise UserError(f"{file} holds no encoder and decoder: give a run of vae.py or of a script built on it")
    vae = VAE(state["args"]["latent_dim"]).to(device)
    runs.load_weights(vae, state["average"], file)
    return vae.eval(), state["args"]


def finish(run, args, vae, images, test, extractors, metrics, curves):
    """--sample's images, or all that is measured and drawn of a trained VAE. metrics: steps and seconds.

    With extractors also distances to the test images; "floor" is that of as many training images.
    """
    if args.sample:
        z = draw_latents(vae, args.sample, args.prior, images, args.seed)
        script.write_samples(run, args, decode(vae, z))
        return
    made = {"reconstruction": decode(vae, encode(vae, test))}
    for name, prior in {"generation": "normal", "generation_expost": "expost"}.items():
        made[name] = decode(vae, draw_latents(vae, max(len(test), 128), prior, images, args.seed))
    metrics |= evaluate(vae, test, args.seed) | script.earlier_distances(run, args, metrics["step"], extractors)
    script.draw_interpolations(run, test, lambda x: encode(vae, x), lambda z: decode(vae, z))
    for extractor in extractors:
        sets = script.distance_sets(args, **made, floor=images)
        metrics |= fid.model_distances(sets, test, extractor, args.data_dir, script.label(args))
    script.finish(run, args, metrics, test, made, curves)


def main(argv=None):
    args = parse_args(argv)
    run, images, test, extractors = script.begin(args, "vae.py", argv)
    if args.eval_only or args.sample:
        vae, metrics = script.restore(run, VAE(args.latent_dim).to(images.device))
    else:
        vae, metrics = train(args, run, images, test)
    if ranks.leave_group():
        finish(run, args, vae, images, test, extractors, metrics, CURVES)


if __name__ == "__main__":
    runs.cli(main)
