"""A VAE-GAN on CIFAR-10: a VAE whose likelihood compares a discriminator's features instead of pixels.

Paper: Larsen, Sonderby, Larochelle & Winther 2016 (arXiv 1512.09300), Algorithm 1. Encoder and decoder are vae.py's.

    python vae_gan.py --epochs 50                    # CIFAR-10 in data/ or downloaded there; CUDA where there is one
    python vae_gan.py --data shapes --limit 10000 --epochs 4         # built-in data, minutes on a CPU
    torchrun --nproc-per-node=2 vae_gan.py --epochs 50               # same global batch on two GPUs (or CPU processes)
    python vae_gan.py --resume                       # go on after Ctrl-C or a crash; --eval-only measures again
    python vae_gan.py --eval-only --compare runs/vae # beside a run of vae.py: comparison.png
    python vae_gan.py --epochs 50 --patches 40       # codes that tell a linear classifier more: common/patches.py

Symbols: x image, z ~ q(z|x) its code, x_hat = Dec(z) its reconstruction (the paper's x tilde), z_p ~ N(0, I) and
x_p = Dec(z_p) a sample, Dis(x) the probability that x is real, as a logit, Dis_l(x) the features of its layer l.

The routing, which is the paper's and which ports often lose (the tests check each line):
    encoder        <- KL(q(z|x) || p(z)) - log p(Dis_l(x)|z)         nothing from the GAN; --patches adds its term here
    decoder        <- gamma * -log p(Dis_l(x)|z) + L_GAN             nothing from the KL
    discriminator  <- -L_GAN                                         nothing from the likelihood
These are losses to descend; L_GAN is what the discriminator gains (its sign in Algorithm 1 is the other way round).

Deviations from the paper: the likelihood's variance is each batch's best one (theirs 1: features have no scale of their
own), so gamma is another number, 3e-3 (their code, on CIFAR-10: 1e-5); the decoder climbs log Dis(fake) (theirs:
descends log(1 - Dis(fake))); Adam with beta1 0.5 (RMSProp); codes and samples pass the decoder as two batches; the
assignment's discriminator, without batch norm (theirs has it); random flips; averaged weights are measured. Unlike
their code, no update is skipped. REPORT.md's appendix compares each choice.
"""

import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from common import data, devices, patches, pictures, ranks, runs, script
from common.loop import Loop
from common.runs import number
from vae import SEEN, VAE, decode, draw_latents, encode, evaluate, finish, gaussian_nll, kl_to_prior, load

CURVES = {"feature_nll": "-log p(Dis_l(x)|z), nats", "kl": "KL, nats per image", "mse": "squared error per pixel"}
LAYERS = ("conv1", "conv2", "fc")
ADVICE = "lower --lr"
PATIENCE = 10  # log lines in a row that must tell of a collapse before it is said


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    script.add_flags(parser, name="vae_gan", batch_size=64, lr=3e-4)
    parser.add_argument("--feature-layer", choices=LAYERS, default="conv2", help="the likelihood's layer l")
    parser.add_argument("--gamma", type=number(float, 0), default=3e-3, help="likelihood against GAN in decoder")
    parser.add_argument("--compare", metavar="RUN", help="folder of a run of vae.py to draw beside: comparison.png")
    return runs.parse(parser, argv, "vae_gan.py", script.REUSE, script.MAY_DIFFER, anew=("compare",))


# --- model --------------------------------------------------------------------------------------------------------


class Discriminator(nn.Module):
    """x (B, 3, 32, 32) in [0, 1] -> logit of Dis(x) (B,), Dis_l(x) (B, D): layer l before its ReLU.

    feature_layer: conv1 (D = 16,384), conv2 (8,192) or fc (1,024).
    """

    def __init__(self, feature_layer="conv2"):
        super().__init__()
        self.feature_layer = feature_layer
        self.conv1 = nn.Conv2d(3, 64, kernel_size=4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1)
        self.fc = nn.Linear(128 * 8 * 8, 1024)
        self.out = nn.Linear(1024, 1)

    def forward(self, x):
        conv1 = self.conv1(2 * x - 1)  # (B, 64, 16, 16)
        conv2 = self.conv2(F.relu(conv1))  # (B, 128, 8, 8)
        fc = self.fc(F.relu(conv2).flatten(1))  # (B, 1024)
        features = {"conv1": conv1, "conv2": conv2, "fc": fc}[self.feature_layer]
        return self.out(F.relu(fc)).squeeze(1).to(x.dtype), features.flatten(1).to(x.dtype)


# --- losses and their routing -------------------------------------------------------------------------------------


def gan_terms(real, hat, p):
    """L_GAN = log Dis(x) + log(1 - Dis(x_hat)) + log(1 - Dis(x_p)) of each image, in nats.  Algorithm 1.

    real, hat, p: the three logits (B,) -> (B,)
    """
    return F.logsigmoid(real) + F.logsigmoid(-hat) + F.logsigmoid(-p)


def players(vae, discriminator, head):
    """The parameters that each player descends; `head` goes with the encoder."""
    return {
        "encoder": [*vae.encoder.parameters(), *head.parameters()],
        "decoder": list(vae.decoder.parameters()),
        "discriminator": list(discriminator.parameters()),
    }


def routed_gradients(vae, discriminator, head, x, eps, z_p, rows, args):
    """One pass of Algorithm 1 up to its updates.

    x: (B, 3, 32, 32), eps and z_p: (B, Z) standard normal, rows: (B,) which training images x are; args: gamma,
    precision, and `patches`, the weight of the likelihood by patches.Head, which encoder and head alone receive
    -> {player: the gradients to descend, in the order of `players`}, {name: what was measured of the batch}

    Nothing is computed twice. Forward: the encoder once, the decoder once a kind of z, the discriminator once a kind of
    image. Backward: once through the discriminator for all of L_GAN, once from its layer l to x_hat, once through the
    decoder to z without its weights, once to its weights, once through the encoder. The graph is cut at z and at the
    images: across a cut passes only what is handed over below.
    """
    grad = torch.autograd.grad
    own = players(vae, discriminator, head)
    with devices.autocast(x.device, args.precision):
        mu, logvar = vae.encoder(x)  # Z <- Enc(X)
        mu, logvar = mu.to(x.dtype), logvar.to(x.dtype)  # under autocast the networks answer in bfloat16
        z = mu + eps * torch.exp(0.5 * logvar)
        z_cut = z.detach().requires_grad_()
        x_hat = vae.decoder(z_cut).to(x.dtype)  # X~ <- Dec(Z)
        x_p = vae.decoder(z_p).to(x.dtype)  # X_p <- Dec(Z_p)
        hat_cut, p_cut = x_hat.detach().requires_grad_(), x_p.detach().requires_grad_()
        real, features = discriminator(x)
        hat, features_hat = discriminator(hat_cut)
        p, _ = discriminator(p_cut)
    kl = kl_to_prior(mu, logvar).mean()  # L_prior
    sigma2 = (features - features_hat).detach().square().mean()
    ranks.all_reduce_mean(sigma2)
    feature_nll = gaussian_nll(features.detach(), features_hat, sigma2).mean()  # L_llike
    l_gan = gan_terms(real, hat, p).mean()  # L_GAN

    # discriminator: L_GAN alone
    (like_hat,) = grad(feature_nll, hat_cut, retain_graph=True)
    *to_discriminator, gan_hat, gan_p = grad(-l_gan, [*own["discriminator"], hat_cut, p_cut])
    # decoder: it climbs log Dis(fake), not -log(1 - Dis(fake)). Without batch norm in the discriminator an image's
    # gradient is that of its own logit times a number, so the one loss's is the other's times -(1 - Dis) / Dis, which
    # is -exp(-logit). Beyond 60 float32 could not hold the two factors.
    gan_hat = -gan_hat * torch.exp(-hat.detach().clamp(min=-60)).view(-1, 1, 1, 1)
    gan_p = -gan_p * torch.exp(-p.detach().clamp(min=-60)).view(-1, 1, 1, 1)
    # encoder: the KL and the patches' likelihood as they are, that of Dis_l(x) by its gradient at z
    direct = kl
    if args.patches:
        patch_nll = head.nll(mu, rows).mean()
        direct = kl + args.patches * patch_nll
    (like_z,) = grad(x_hat, z_cut, like_hat, retain_graph=True)
    gradients = {
        "encoder": grad((direct, z), own["encoder"], (None, like_z)),
        "decoder": grad((x_hat, x_p), own["decoder"], (args.gamma * like_hat + gan_hat, gan_p)),
        "discriminator": to_discriminator,
    }
    numbers = {
        "loss": direct + feature_nll,
        "kl": kl,
        "feature_nll": feature_nll,
        "mse": (x - x_hat).square().mean(),
        "dis_real": torch.sigmoid(real).mean(),
        "dis_hat": torch.sigmoid(hat).mean(),
        "dis_p": torch.sigmoid(p).mean(),
        # of samples over that of images, which may be alike in a batch of two: 0 when all samples are alike
        "spread": x_p.std(0).mean() / x.std(0).mean().clamp(min=1e-6),
    }
    if args.patches:
        numbers["patch_nll"] = patch_nll
    return gradients, {name: value.detach() for name, value in numbers.items()}


# --- training -----------------------------------------------------------------------------------------------------


def make_update(vae, average, discriminator, head, optimizers, images, args):
    """One update as a function of what varies; it draws and reads back nothing, so that a CUDA graph can hold it."""
    learned = players(vae, discriminator, head)

    def update(rows, flip, eps, z_p, decay):
        x = data.batch(images, rows, flip)  # X <- a mini-batch
        gradients, numbers = routed_gradients(vae, discriminator, head, x, eps, z_p, rows, args)
        vae.variance(numbers["mse"])  # only for evaluate(): what these weights are worth as a VAE
        ranks.all_reduce_mean(*(g for each in gradients.values() for g in each))
        norms = {f"norm_{name}": nn.utils.get_total_norm(each) for name, each in gradients.items()}
        for name, parameters in learned.items():
            for parameter, gradient in zip(parameters, gradients[name], strict=True):
                parameter.grad = gradient
        optimizers["encoder"].step()  # theta_Enc <- - grad (L_prior + L_llike)
        optimizers["decoder"].step()  # theta_Dec <- - grad (gamma L_llike + L_GAN)
        optimizers["discriminator"].step()  # theta_Dis <- - grad -L_GAN
        devices.average_weights(average, vae, decay)
        return norms | numbers

    return devices.Captured(update) if args.capture else update


def trouble(means):
    """What the means of a log line say about a collapse: one sentence with what to change, or None."""
    if means["dis_real"] > 0.99 and max(means["dis_hat"], means["dis_p"]) < 0.01:
        return "the discriminator is certain of every image, so the decoder learns little: lower --gamma or --lr"
    if means["spread"] < 0.1:
        return "all samples look alike (mode collapse): raise --gamma or lower --lr"
    if means["kl"] < 0.5:
        return "the code says nothing about the image (posterior collapse): lower --lr, or try another --feature-layer"
    return None


def train(args, run, images, test):
    """Train to args.epochs -> the moving average of encoder and decoder, which is what counts; steps and seconds."""
    device = images.device
    torch.manual_seed(args.seed)  # the initial weights
    vae, discriminator = VAE(args.latent_dim).to(device), Discriminator(args.feature_layer).to(device)
    average = copy.deepcopy(vae)
    z = draw_latents(average, script.FRAME_SAMPLES, "normal", images, args.seed)  # of each frame of training.gif
    head = patches.head(args, images)
    optimizers = {
        name: devices.adam(parameters, args.lr, device, betas=(0.5, 0.999))
        for name, parameters in players(vae, discriminator, head).items()
    }
    parts = {"model": vae, "average": average, "discriminator": discriminator}
    if args.patches:
        parts["head"] = head
    parts |= {f"optimizer_{name}": optimizer for name, optimizer in optimizers.items()}
    vae.train()
    update = make_update(vae, average, discriminator, head, optimizers, images, args)
    lasted = 0  # log lines in a row that told of a collapse
    with Loop.of_epochs(run, args, parts, images, ADVICE) as loop:
        for _ in loop:
            noise = loop.generator("noise")
            flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
            eps, z_p = torch.randn(2, args.batch_size, args.latent_dim, device=device, generator=noise)
            lr, decay = script.set_rates(args, loop, *optimizers.values())
            loop.add(update(*ranks.shard(loop.rows(images), flip, eps, z_p), decay))
            if loop.logs():  # the only time that the host waits for the device
                means = loop.means()
                loop.log(lr=lr, **means)
                dis = " ".join(f"{means[key]:.2f}" for key in ("dis_real", "dis_hat", "dis_p"))
                loop.show(f"Dis {dis}, kl {means['kl']:.1f}, mse {means['mse']:.4f}")
                lasted = lasted + 1 if trouble(means) else 0
                if lasted == PATIENCE:
                    loop.say(f"{trouble(means)}, and start anew")
            if loop.saves():
                ranks.average_buffers(vae, average)
                loop.save(evaluate(average, test[:SEEN], args.seed), decode(average, z))
    return average, {"step": loop.step, **loop.spent()}


def plot_adversaries(log, path):
    """From log.jsonl's records: Dis on the three kinds of image, and the three gradient norms, against epochs."""
    log = [record for record in log if "loss" in record]
    epochs = [record["epoch"] for record in log]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), dpi=100, layout="constrained")
    names = {"dis_real": "images", "dis_hat": "reconstructions", "dis_p": "samples, z ~ N(0, I)"}
    for key, name in names.items():
        axes[0].plot(epochs, [record[key] for record in log], lw=0.8, label=name)
    axes[0].axhline(1 / 3, color="grey", ls="--", lw=0.8, label="a discriminator that knows nothing")
    axes[0].set(ylim=(0, 1), title="Dis: probability of being real")
    for player in ("encoder", "decoder", "discriminator"):
        axes[1].semilogy(epochs, [record[f"norm_{player}"] for record in log], lw=0.8, label=player)
    axes[1].set(title="norm of the gradient")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    pictures.save_figure(figure, path)


def main(argv=None):
    args = parse_args(argv)
    run, images, test, extractors = script.begin(args, "vae_gan.py", argv)
    other = load(args.compare, images.device)[0] if args.compare and not args.sample else None
    if args.eval_only or args.sample:
        vae, metrics = script.restore(run, VAE(args.latent_dim).to(images.device))
    else:
        vae, metrics = train(args, run, images, test)
    if not ranks.leave_group():
        return
    if not args.sample:
        plot_adversaries(run.read_log(), run / "adversaries.png")
    if other:
        rows = [test[:48], *(decode(model, encode(model, test[:48])) for model in (other, vae))]
        title = f"images, reconstructions by {Path(args.compare).name}, and by {args.name}"
        pictures.plot_rows(rows, run / "comparison.png", title)
    finish(run, args, vae, images, test, extractors, metrics, CURVES)


if __name__ == "__main__":
    runs.cli(main)
