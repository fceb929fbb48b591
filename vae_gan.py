"""A VAE-GAN on CIFAR-10: a VAE whose likelihood compares a discriminator's features instead of pixels.

Paper: Larsen, Sonderby, Larochelle & Winther 2016 (arXiv 1512.09300), Algorithm 1. Encoder and decoder are vae.py's.

    python vae_gan.py --epochs 50                    # CIFAR-10 in data/ or downloaded there; CUDA where there is one
    python vae_gan.py --data shapes --limit 10000 --epochs 4         # built-in data, minutes on a CPU
    torchrun --nproc-per-node=2 vae_gan.py --epochs 50               # same global batch on two GPUs (or CPU processes)
    python vae_gan.py --resume                       # go on after Ctrl-C or a crash; --eval-only measures again
    python vae_gan.py --eval-only --compare runs/vae # beside a run of vae.py: comparison.png

Measured with OMP_NUM_THREADS=1 python vae_gan.py --epochs 6 --precision bf16 (CIFAR-10, seed 0), on the test images, in
parentheses vae.py after its 6 epochs. Frechet distance in classifier.py's features: reconstructions 135 (448), samples
289 (589), ex-post samples 259 (544), training images 2.8. High-frequency energy of reconstructions over that of the
images 0.60 (0.23), squared error 0.0112 (0.0055), KL 337.7 nats (253.9). 34.2 minutes at 146 images/s on one core (AMD
EPYC, the other busy), torch 2.13.0+cpu, 2026-11-24, commit 0dc5c94. FID, CUDA and 50 epochs: not measured.

Symbols: x image, z ~ q(z|x) its code, x_hat = Dec(z) its reconstruction (the paper's x tilde), z_p ~ N(0, I) and
x_p = Dec(z_p) a sample, Dis(x) the probability that x is real, as a logit, Dis_l(x) the features of its layer l.

The routing, which is the paper's and which ports often lose (the tests check each line):
    encoder        <- KL(q(z|x) || p(z)) - log p(Dis_l(x)|z)         nothing from the GAN
    decoder        <- gamma * -log p(Dis_l(x)|z) + L_GAN             nothing from the KL
    discriminator  <- -L_GAN                                         nothing from the likelihood
These are losses to descend; L_GAN is what the discriminator gains (its sign in Algorithm 1 is the other way round).

Deviations from the paper, chosen by the Frechet distances of reconstructions / samples / ex-post samples to 5,000
held-out training images, after one epoch of the other 45,000 (--holdout 5000 --epochs 1 --precision bf16, seed 0, 2,000
images each, in classifier.py's features after 6 of its 10 epochs; commit 6486c8d holds the candidates). The defaults
gave 353 / 432 / 444.
- The likelihood's variance is each batch's best one, as in vae.py. With the paper's 1: 614 / 643 / 557, and a KL of 9
  nats: the code says little, because a discriminator's features have no scale of their own.
- The decoder climbs log Dis(fake) instead of descending log(1 - Dis(fake)). With the latter the discriminator becomes
  certain (0.94 on images, 0.03 on the others) and the decoder's GAN gradient vanishes; after one epoch it shows little:
  368 / 451 / 458 against 371 / 443 / 457, both at gamma 3e-3.
- gamma is 1e-2. 3e-3: 371 / 443 / 457, 1e-3: 489 / 579 / 529, 3e-4: 504 / 554 / 462, 1e-4: 522 / 623 / 518.
- Layer l is conv2 (8 x 8 x 128), before its ReLU. conv1: 432 / 495 / 517; fc was not tried.
- The decoder sees codes and samples as two batches, each with its own batch norm. As one: 423 / 475 / 531.
- Adam (beta1 0.5) instead of RMSProp (365 / 459 / 461), at the paper's rate and batch size: 3e-4, 64. What is measured
  are averaged weights.
- No other stabiliser: no skipped updates, no decay of rate or weights, no noise.
"""

import copy
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import contrastive
import data
import devices
import fid
import runs
import sampling
from vae import FREE, REUSE, VAE, add_flags, evaluate, gaussian_nll, kl_to_prior, load

CURVES = {"feature_nll": "-log p(Dis_l(x)|z), nats", "kl": "KL, nats per image", "mse": "squared error per pixel"}
LAYERS = ("conv1", "conv2", "fc")
# what a step reports, as means over the batch; loss is the encoder's
STEP = ["loss", "kl", "feature_nll", "mse", "dis_real", "dis_hat", "dis_p", "spread"]
NORMS = ["norm_encoder", "norm_decoder", "norm_discriminator"]
ADVICE = "lower --lr, or raise --gamma, and start anew"
PATIENCE = 10  # log lines in a row that must tell of a collapse before it is said


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_run_flags(parser, name="vae_gan")
    add_flags(parser)
    parser.set_defaults(batch_size=64, lr=3e-4)
    parser.add_argument("--feature-layer", choices=LAYERS, default="conv2", help="the likelihood's layer l")
    parser.add_argument("--gamma", type=runs.number(float, 0), default=1e-2, help="likelihood against GAN in decoder")
    parser.add_argument("--compare", metavar="RUN", help="folder of a run of vae.py to draw beside: comparison.png")
    return runs.parse(parser, argv, reuse=REUSE, may_differ=(*FREE, "compare"))


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


def routed_gradients(vae, discriminator, x, eps, z_p, gamma, precision="fp32", weight=0.0, views=()):
    """One pass of Algorithm 1 up to its updates.

    x: (B, 3, 32, 32), eps and z_p: (B, Z) standard normal -> the gradients to descend, a list for each of encoder,
    decoder and discriminator, in the order of their parameters(); the numbers of STEP, a tensor. With `views`, a list
    of one draw of contrastive.py's numbers, the encoder gets that term's gradient times `weight`, too.

    Nothing is computed twice. Forward: the encoder once, the decoder once a kind of z, the discriminator once a kind of
    image. Backward: once through the discriminator for all of L_GAN, once from its layer l to x_hat, once through the
    decoder to z without its weights, once to its weights, once through the encoder. The graph is cut at z and at the
    images: across a cut passes only what is handed over below.
    """
    players = {"encoder": vae.encoder, "decoder": vae.decoder, "discriminator": discriminator}
    parameters = {name: list(module.parameters()) for name, module in players.items()}
    grad = torch.autograd.grad
    with devices.autocast(x.device, precision):
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
        contrast = [contrastive.term(vae.encoder, x, mu, u).mean() for u in views]
    kl = kl_to_prior(mu, logvar)  # L_prior
    sigma2 = (features - features_hat).detach().square().mean()
    runs.all_reduce_mean(sigma2)
    feature_nll = gaussian_nll(features.detach(), features_hat, sigma2)  # L_llike
    l_gan = gan_terms(real, hat, p)  # L_GAN

    (like_hat,) = grad(feature_nll.mean(), hat_cut, retain_graph=True)
    *to_discriminator, gan_hat, gan_p = grad(-l_gan.mean(), [*parameters["discriminator"], hat_cut, p_cut])
    # The decoder climbs log Dis(fake), not -log(1 - Dis(fake)). Without batch norm in the discriminator an image's
    # gradient is that of its own logit times a number, so the one loss's is the other's times -(1 - Dis) / Dis, which
    # is -exp(-logit). Beyond 60 float32 could not hold the two factors.
    gan_hat, gan_p = (
        -g * torch.exp(-logit.detach().clamp(min=-60)).view(-1, 1, 1, 1) for g, logit in ((gan_hat, hat), (gan_p, p))
    )
    of_codes = sum((weight * value for value in contrast), kl.mean())  # what of the encoder's loss z does not carry
    (like_z,) = grad(x_hat, z_cut, like_hat, retain_graph=True)
    gradients = {
        "encoder": grad((of_codes, z), parameters["encoder"], (None, like_z)),
        "decoder": grad((x_hat, x_p), parameters["decoder"], (gamma * like_hat + gan_hat, gan_p)),
        "discriminator": to_discriminator,
    }
    numbers = [of_codes + feature_nll.mean(), kl.mean(), feature_nll.mean(), (x - x_hat).square().mean()]
    numbers += [torch.sigmoid(logit).mean() for logit in (real, hat, p)]
    numbers += [x_p.std(0).mean() / x.std(0).mean()]  # of samples over that of images: 0 when all samples are alike
    return gradients, torch.stack([*numbers, *contrast]).detach()


# --- training -----------------------------------------------------------------------------------------------------


def make_step(vae, average, discriminator, optimizers, images, args):
    """One update as a function of what varies; it draws and reads back nothing, so that a CUDA graph can hold it."""
    players = {"encoder": vae.encoder, "decoder": vae.decoder, "discriminator": discriminator}
    parameters = {name: list(module.parameters()) for name, module in players.items()}

    def step(index, flip, eps, z_p, keep, *views):  # views: contrastive.draw's numbers, or none
        x = data.batch(images, index, flip)  # X <- a mini-batch
        weights = args.gamma, args.precision, args.contrastive
        gradients, numbers = routed_gradients(vae, discriminator, x, eps, z_p, *weights, views)
        vae.variance(numbers[STEP.index("mse")])  # only for evaluate(): what these weights are worth as a VAE
        runs.all_reduce_mean(*(g for each in gradients.values() for g in each))
        norms = [nn.utils.get_total_norm(each) for each in gradients.values()]
        for name, each in gradients.items():
            for parameter, gradient in zip(parameters[name], each, strict=True):
                parameter.grad = gradient
        optimizers["encoder"].step()  # theta_Enc <- - grad (L_prior + L_llike)
        optimizers["decoder"].step()  # theta_Dec <- - grad (gamma L_llike + L_GAN)
        optimizers["discriminator"].step()  # theta_Dis <- - grad -L_GAN
        devices.average_weights(average, vae, keep)
        return torch.cat((torch.stack(norms), numbers))

    return devices.Captured(step) if args.capture else step


def trouble(record):
    """What a log record says about a collapse: one sentence with what to change, or None."""
    if record["dis_real"] > 0.99 and max(record["dis_hat"], record["dis_p"]) < 0.01:
        return "the discriminator is certain of every image, so the decoder learns little: raise --gamma or lower --lr"
    if record["spread"] < 0.1:
        return "all samples look alike (mode collapse): raise --gamma or lower --lr, and start anew"
    if record["kl"] < 0.5:
        return "the code says nothing about the image (posterior collapse): lower --lr, or try another --feature-layer"
    return None


def train(args, run, device, images, test):
    """Train to args.epochs, with --resume from the checkpoint. Leaves log.jsonl, checkpoint.pt. -> average, seconds.

    What is measured and sampled is the exponential moving average of encoder and decoder, never a mixture.
    """
    torch.manual_seed(args.seed)  # the initial weights
    vae, discriminator = VAE(args.latent_dim).to(device), Discriminator(args.feature_layer).to(device)
    average = copy.deepcopy(vae)
    players = {"encoder": vae.encoder, "decoder": vae.decoder, "discriminator": discriminator}
    optimizers = {
        name: devices.adam(module.parameters(), args.lr, device, betas=(0.5, 0.999)) for name, module in players.items()
    }
    parts = {"model": vae, "average": average, "discriminator": discriminator}
    parts |= {f"optimizer_{name}": optimizer for name, optimizer in optimizers.items()}
    names = NORMS + STEP + ["contrast"] * bool(args.contrastive)
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
    if first > total:
        raise runs.UserError(f"{run.folder} is at step {first}, past --epochs {args.epochs}: give more, or --eval-only")
    vae.train()
    update = make_step(vae, average, discriminator, optimizers, images, args)
    began = time.perf_counter() - seconds
    lasted = 0  # log lines in a row that told of a collapse

    bar = tqdm(total=total, initial=first, unit="step", disable=not runs.is_main(), dynamic_ncols=True)
    with runs.stop_on_signal() as stop, bar:
        for step in range(first, total):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == first:
                shuffle = devices.generator("cpu", args.seed, "order", epoch)
                order = torch.randperm(len(images), generator=shuffle).to(device)
            noise = devices.generator(device, args.seed, "noise", step)
            flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
            eps, z_p = torch.randn(2, args.batch_size, args.latent_dim, device=device, generator=noise)
            index = order[i * args.batch_size : (i + 1) * args.batch_size]
            lr = devices.learning_rate(step, total, args.lr, args.schedule)
            for optimizer in optimizers.values():
                devices.set_lr(optimizer, lr)
            keep = torch.full((), min(args.ema, (1 + step) / (10 + step)), device=device)  # forgets the start sooner
            views = [contrastive.draw(args.batch_size, device, args.seed, step)] if args.contrastive else []
            recent += update(*map(runs.shard, (index, flip, eps, z_p)), keep, *map(runs.shard, views))
            done = step + 1
            bar.update()
            if done % args.log_every == 0:  # the only time that the host waits for the device
                runs.all_reduce_mean(recent)
                record = dict(zip(names, (recent / args.log_every).tolist(), strict=True))
                recent.zero_()
                runs.check_finite(sum(record.values()), done, ADVICE)
                where = {"step": done, "epoch": done / per_epoch, "lr": lr, "seconds": time.perf_counter() - began}
                run.log(**where, **record)
                dis = " ".join(f"{record[key]:.2f}" for key in ("dis_real", "dis_hat", "dis_p"))
                bar.set_postfix_str(f"Dis {dis}, kl {record['kl']:.1f}, mse {record['mse']:.4f}")
                lasted = lasted + 1 if trouble(record) else 0
                if lasted == PATIENCE and runs.is_main():
                    bar.write(f"step {done}: {trouble(record)}")
            complete = done % (args.save_every * per_epoch) == 0 or done == total
            stopping = stop.now(done) and done < total
            if complete or stopping:
                runs.average_buffers(vae, average)
                if runs.is_main():  # a glimpse: what is saved must be finite
                    glimpse = evaluate(average, test[:1000], args.seed)
                    runs.check_finite(glimpse["elbo_nats"], done, ADVICE)
                run.save(done, time.perf_counter() - began, parts, recent=recent.cpu())
            if complete and runs.is_main():
                run.log(step=done, epoch=epoch + 1, **glimpse)
            if stopping:
                run.stop(done, total)
    return average, time.perf_counter() - began


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
    for key in NORMS:
        axes[1].semilogy(epochs, [record[key] for record in log], lw=0.8, label=key.removeprefix("norm_"))
    axes[1].set(title="norm of the gradient")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    runs.save_figure(figure, path)


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, args.precision, args.capture)
    run = runs.Run(args, "vae_gan.py")
    images, _, test, _ = data.splits(args, device)
    runs.check_batch(args.batch_size, len(images))
    # before training, to say what is missing while it can be helped
    extractor = None if args.sample else fid.wanted_extractor(args.fid, args.features, device)
    other = load(args.compare, device)[0] if args.compare else None
    if args.eval_only or args.sample:
        vae = VAE(args.latent_dim).to(device)
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
    log = run.read_log()
    runs.plot_curves(log, run / "curves.png", CURVES)
    plot_adversaries(log, run / "adversaries.png")
    pictures = ["curves.png", "adversaries.png"]
    if other:
        rows = [test[:48], *(sampling.decode(each, sampling.encode(each, test[:48])) for each in (other, vae))]
        data.plot_rows(rows, run / "comparison.png", "test images, reconstructions of the VAE, and of the VAE-GAN")
        pictures.append("comparison.png")
    metrics = {"step": steps, "seconds": seconds, "images_per_second": steps * args.batch_size / seconds}
    metrics |= evaluate(vae, test, args.seed)
    sampling.report(run, args, vae, images, test, extractor, metrics, pictures)


if __name__ == "__main__":
    runs.cli(main)
