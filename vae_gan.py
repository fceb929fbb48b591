"""A VAE-GAN on CIFAR-10: a VAE whose likelihood compares features of a discriminator, not pixels."""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import devices
import fid
import runs
import sampling
from vae import VAE, evaluate, kl_to_prior

CURVES = {"feature_nll": "-log p(Dis_l(x)|z), nats", "kl": "KL, nats per image", "mse": "squared error per pixel"}
PLAYERS = ("encoder", "decoder", "discriminator")
LAYERS = ("conv1", "conv2", "fc")


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_run_flags(parser, name="vae_gan")
    parser.add_argument("--eval-only", action="store_true", help="measure and draw again from the checkpoint")
    parser.add_argument(
        "--sample", type=runs.number(int, 1), help="write SAMPLE images from the checkpoint, do no more"
    )
    parser.add_argument("--prior", choices=["normal", "expost"], default="normal", help="what --sample draws z from")
    parser.add_argument("--compare", metavar="CHECKPOINT", help="a run of vae.py, for comparison.png and sharpness")
    data.add_flags(parser)
    # model
    parser.add_argument("--latent-dim", type=runs.number(int, 1), default=128, help="dimensions of z")
    parser.add_argument("--feature-layer", choices=LAYERS, default="conv2", help="the likelihood's layer l")
    parser.add_argument("--gamma", type=runs.number(float, 0), default=1e-4, help="weight of likelihood against GAN")
    # optimisation
    parser.add_argument("--epochs", type=runs.number(int, 1), default=50, help="passes over the training images")
    parser.add_argument("--batch-size", type=runs.number(int, 2), default=128, help="images a step, over all ranks")
    parser.add_argument("--lr", type=runs.number(float, above=0), default=3e-4, help="learning rate")
    parser.add_argument("--lr-discriminator", type=runs.number(float, above=0), default=3e-4, help="learning rate")
    parser.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate")
    parser.add_argument("--ema", type=runs.number(float, 0, 1), default=0.999, help="decay of the averaged weights")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of convolutions, matmuls"
    )
    parser.add_argument(
        "--capture", action=argparse.BooleanOptionalAction, default=False, help="CUDA graph of the step"
    )
    # candidates
    parser.add_argument("--generator-loss", choices=["minimax", "nonsaturating"], default="nonsaturating", help="loss")
    parser.add_argument("--optimizer", choices=["adam", "rmsprop"], default="adam", help="optimiser")
    parser.add_argument("--beta1", type=float, default=0.5, help="Adam's")
    parser.add_argument("--mixed", action="store_true", help="decoder sees both kinds of z in one batch")
    parser.add_argument("--balance", action="store_true", help="the original code's equilibrium")
    parser.add_argument("--feature-sigma", default="1", help="std of the feature likelihood, or auto")
    parser.add_argument("--center", action="store_true", help="discriminator sees x - 1/2")
    # evaluation
    count = runs.number(int, 2, words=("auto", "off"))
    parser.add_argument("--fid", type=count, default="auto", help="images: auto (10,000, but off on a CPU), off, or N")
    parser.add_argument("--features", help="a torch.export program for the distances, in place of Inception")
    # run
    parser.add_argument("--save-every", type=runs.number(int, 1), default=1, help="epochs between checkpoints")
    parser.add_argument("--log-every", type=runs.number(int, 1), default=20, help="steps between lines of log.jsonl")
    free = ("prior", "compare", "epochs", "data_dir", "save_every", "fid", "features")
    return runs.parse(parser, argv, reuse=("resume", "eval_only", "sample"), may_differ=free)


# --- model --------------------------------------------------------------------------------------------------------


class Discriminator(nn.Module):
    """Dis.  x (B, 3, 32, 32) in [0, 1] -> logit (B,), features of layer l (B, D), taken before their ReLU.

    feature_layer: conv1 (D = 16,384), conv2 (8,192) or fc (1,024).
    """

    def __init__(self, feature_layer="conv2", center=False):
        super().__init__()
        self.feature_layer = feature_layer
        self.center = center
        self.conv1 = nn.Conv2d(3, 64, kernel_size=4, stride=2, padding=1)  # (B, 64, 16, 16)
        self.conv2 = nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1)  # (B, 128, 8, 8)
        self.fc = nn.Linear(128 * 8 * 8, 1024)
        self.out = nn.Linear(1024, 1)

    def forward(self, x):
        if self.center:
            x = 2 * x - 1
        layers = {"conv1": self.conv1(x)}
        layers["conv2"] = self.conv2(F.relu(layers["conv1"]))
        layers["fc"] = self.fc(F.relu(layers["conv2"]).flatten(1))
        logit = self.out(F.relu(layers["fc"])).squeeze(1)
        return logit.float(), layers[self.feature_layer].flatten(1).float()


# --- losses, per image and in nats --------------------------------------------------------------------------------


def feature_nll(features, features_hat, sigma2):
    """-log N(Dis_l(x); Dis_l(x~), sigma2 I).  Larsen et al. 2016, eq. 7.  Both (B, D) -> (B,)"""
    squares = (features - features_hat).square().sum(1)
    return 0.5 * squares / sigma2 + features.shape[1] / 2 * torch.log(2 * torch.pi * sigma2)


def gan_terms(real, tilde, prior):
    """L_GAN = log Dis(x) + log(1 - Dis(x~)) + log(1 - Dis(x_p)), from logits (B,).  Algorithm 1 -> (B,)"""
    return F.logsigmoid(real) + F.logsigmoid(-tilde) + F.logsigmoid(-prior)


def routed_gradients(vae, discriminator, x, eps, z_prior, gamma, args=None):
    parameters = {
        "encoder": list(vae.encoder.parameters()),
        "decoder": list(vae.decoder.parameters()),
        "discriminator": list(discriminator.parameters()),
    }
    grad = torch.autograd.grad
    with devices.autocast(x.device, args.precision):
        mu, logvar = vae.encoder(x)
        mu, logvar = mu.float(), logvar.float()
        l_prior = kl_to_prior(mu, logvar)
        z = mu + eps * torch.exp(0.5 * logvar)
        code = z.detach().requires_grad_()
        if args.mixed:
            x_tilde, x_prior = vae.decoder(torch.cat((code, z_prior))).float().chunk(2)
        else:
            x_tilde, x_prior = vae.decoder(code).float(), vae.decoder(z_prior).float()
        tilde, prior = x_tilde.detach().requires_grad_(), x_prior.detach().requires_grad_()
        real_logit, real_features = discriminator(x)
        tilde_logit, tilde_features = discriminator(tilde)
        prior_logit, _ = discriminator(prior)
    sigma2 = (real_features - tilde_features).detach().square().mean()
    if args.feature_sigma != "auto":
        sigma2 = torch.tensor(float(args.feature_sigma) ** 2)
    l_llike = feature_nll(real_features.detach(), tilde_features, sigma2)
    l_gan = gan_terms(real_logit, tilde_logit, prior_logit)

    (like_tilde,) = grad(l_llike.mean(), tilde, retain_graph=True)
    *discriminator_grads, gan_tilde, gan_prior = grad(l_gan.mean().neg(), [*parameters["discriminator"], tilde, prior])
    if args.generator_loss == "nonsaturating":
        gan_tilde = gan_tilde * torch.exp(-tilde_logit.detach()).view(-1, 1, 1, 1)
        gan_prior = gan_prior * torch.exp(-prior_logit.detach()).view(-1, 1, 1, 1)
    (like_code,) = grad(x_tilde, code, like_tilde, retain_graph=True)
    encoder_grads = grad((l_prior.mean(), z), parameters["encoder"], (None, like_code))
    decoder_grads = grad((x_tilde, x_prior), parameters["decoder"], (gamma * like_tilde - gan_tilde, -gan_prior))
    grads = dict(zip(PLAYERS, (encoder_grads, decoder_grads, discriminator_grads), strict=True))
    if args.balance:
        real_cost = F.softplus(-real_logit).mean()
        fake_cost = 0.5 * (F.softplus(tilde_logit) + F.softplus(prior_logit)).mean()
        skip_dis = min(real_cost, fake_cost) < 0.68 - 0.35
        skip_dec = max(real_cost, fake_cost) > 0.68 + 0.35
        if skip_dis and skip_dec:
            skip_dis = skip_dec = False
        if skip_dis:
            grads["discriminator"] = None
        if skip_dec:
            grads["decoder"] = None
    mse = (x - tilde.detach()).square().mean()
    spread = prior.detach().std(0).mean() / x.std(0).mean()
    numbers = [l_prior.mean() + l_llike.mean(), l_prior.mean(), l_llike.mean(), mse]
    numbers += [torch.sigmoid(logit).mean() for logit in (real_logit, tilde_logit, prior_logit)]
    numbers += [spread, (gamma * like_tilde).norm() / (gan_tilde.norm() + 1e-30)]
    return grads, mse, torch.stack(numbers).detach()


KEYS = (
    "loss kl feature_nll mse d_real d_tilde d_prior spread ratio grad_encoder grad_decoder grad_discriminator".split()
)


def make_step(vae, average, discriminator, optimizers, images, args):
    modules = {"encoder": vae.encoder, "decoder": vae.decoder, "discriminator": discriminator}

    def step(index, flip, eps, z_prior, keep):
        x = data.batch(images, index, flip)
        grads, mse, numbers = routed_gradients(vae, discriminator, x, eps, z_prior, args.gamma, args)
        vae.variance(mse)
        norms = []
        for player, module in modules.items():
            if grads[player] is None:
                norms.append(torch.tensor(0.0))
                continue
            for parameter, grad in zip(module.parameters(), grads[player], strict=True):
                parameter.grad = grad
            norms.append(nn.utils.get_total_norm(grads[player]))
        runs.average_gradients([p for m in modules.values() for p in m.parameters()])
        for player in PLAYERS:
            if grads[player] is not None:
                optimizers[player].step()
        devices.average_weights(average, vae, keep)
        return torch.cat((numbers, torch.stack(norms)))

    return devices.Captured(step) if args.capture else step


def train(args, run, device, images, test):
    torch.manual_seed(args.seed)  # the initial weights
    vae = VAE(args.latent_dim).to(device)
    discriminator = Discriminator(args.feature_layer, args.center).to(device)
    average = copy.deepcopy(vae)
    modules = {"encoder": vae.encoder, "decoder": vae.decoder, "discriminator": discriminator}
    rates = {"encoder": args.lr, "decoder": args.lr, "discriminator": args.lr_discriminator}
    if args.optimizer == "adam":
        optimizers = {
            p: devices.adam(m.parameters(), rates[p], device, betas=(args.beta1, 0.999)) for p, m in modules.items()
        }
    else:
        optimizers = {p: torch.optim.RMSprop(m.parameters(), lr=rates[p], alpha=0.9) for p, m in modules.items()}
    parts = {"model": vae, "average": average, "discriminator": discriminator}
    parts |= {f"optimizer_{p}": o for p, o in optimizers.items()}
    recent = torch.zeros(len(KEYS), device=device)
    first, seconds = 0, 0.0
    run.begin()
    per_epoch = len(images) // args.batch_size
    total = args.epochs * per_epoch
    vae.train()
    update = make_step(vae, average, discriminator, optimizers, images, args)
    began = time.perf_counter() - seconds
    bar = tqdm(total=total, initial=first, unit="step", disable=not runs.is_main(), dynamic_ncols=True)
    with runs.stop_on_signal() as stop, bar:
        for step in range(first, total):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == first:
                shuffle = devices.generator("cpu", args.seed, "order", epoch)
                order = torch.randperm(len(images), generator=shuffle).to(device)
            noise = devices.generator(device, args.seed, "noise", step)
            flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
            eps, z_prior = torch.randn(2, args.batch_size, args.latent_dim, device=device, generator=noise)
            index = order[i * args.batch_size : (i + 1) * args.batch_size]
            for p, o in optimizers.items():
                devices.set_lr(o, devices.learning_rate(step, total, rates[p], args.schedule))
            keep = torch.full((), min(args.ema, (1 + step) / (10 + step)), device=device)
            recent += update(*map(runs.shard, (index, flip, eps, z_prior)), keep)
            done = step + 1
            bar.update()
            if done % args.log_every == 0:
                values = dict(zip(KEYS, (recent / args.log_every).tolist(), strict=True))
                recent.zero_()
                runs.check_finite(values["loss"], done, "lower --lr")
                run.log(step=done, epoch=done / per_epoch, seconds=time.perf_counter() - began, **values)
            complete = done % (args.save_every * per_epoch) == 0 or done == total
            stopping = stop.now(done) and done < total
            if complete or stopping:
                glimpse = evaluate(average, test[:1000], args.seed)
                run.save(done, time.perf_counter() - began, parts, recent=recent.cpu())
            if complete:
                run.log(step=done, epoch=epoch + 1, **glimpse)
            if stopping:
                run.stop(done, total)
    return average, time.perf_counter() - began


def main(argv=None):
    args = parse_args(argv)
    device = devices.start(args.device, args.precision, args.capture)
    run = runs.Run(args, "vae_gan.py")
    images, _, test, _ = data.splits(args, device)
    extractor = fid.wanted_extractor(args.fid, args.features, device)
    vae, seconds = train(args, run, device, images, test)
    steps = args.epochs * (len(images) // args.batch_size)
    runs.plot_curves(run.read_log(), run / "curves.png", CURVES)
    metrics = {"step": steps, "seconds": seconds, "images_per_second": steps * args.batch_size / seconds}
    metrics |= evaluate(vae, test, args.seed)
    sampling.report(run, args, vae, images, test, extractor, metrics, ["curves.png"])


if __name__ == "__main__":
    runs.cli(main)
