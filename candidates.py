"""Candidates for an unsupervised term on top of the VAE, measured under one budget. Not meant to stay.

    python candidates.py --kind plain --data-dir DIR                    # 2 epochs of 25,000 images in bfloat16
    python candidates.py --kind nt_xent --weight 100 --views 1 --data-dir DIR

kinds: plain; nt_xent (SimCLR), barlow (Barlow Twins) and vicreg on mu, between the clean image and one augmented view
(--views 1) or two augmented views (--views 2), over the first --dims latents; rotation (four-way, linear in mu);
infomax (Deep InfoMax's local InfoNCE between the 8x8x128 feature map and mu).
All is measured on 5,000 held-out training images; the test images are never read.
"""

import argparse
import copy
import json
import time

import torch
import torch.nn.functional as F
from torch import nn

import contrastive
import data
import devices
import probe
import sampling
import vae


def parse_args(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    kinds = ["plain", "nt_xent", "barlow", "vicreg", "rotation", "infomax"]
    parser.add_argument("--kind", choices=kinds, default="plain")
    parser.add_argument("--weight", type=float, default=100.0)
    parser.add_argument("--views", type=int, choices=[1, 2], default=1)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--head", action="store_true", help="a projection head of 128 hidden units over mu")
    parser.add_argument("--cross", action="store_true", help="infomax: the feature map is that of an augmented view")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=25_000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", help="write the averaged weights there")
    return parser.parse_args(argv)


def off_diagonal(m):
    return m - torch.diag(torch.diag(m))


def barlow(a, b):
    """Barlow Twins, Zbontar et al. 2021, eq. 1, lambda 0.005."""
    a, b = ((c - c.mean(0)) / (c.std(0) + 1e-5) for c in (a, b))
    c = a.T @ b / len(a)
    return (torch.diag(c) - 1).square().sum() + 0.005 * off_diagonal(c).square().sum()


def vicreg(a, b):
    """VICReg, Bardes et al. 2022, weights 25, 25, 1."""
    invariance = (a - b).square().mean()
    variance = sum(F.relu(1 - (c.var(0) + 1e-4).sqrt()).mean() for c in (a, b)) / 2
    covariance = sum(off_diagonal(torch.cov(c.T)).square().sum() / c.shape[1] for c in (a, b))
    return 25 * invariance + 25 * variance + covariance


class Term(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        if args.kind == "rotation":
            self.head = nn.Linear(args.dims, 4)
        if args.kind == "infomax":
            self.local, self.globl = nn.Conv2d(128, 128, 1), nn.Linear(args.dims, 128)
        if args.head:
            self.head = nn.Sequential(nn.Linear(args.dims, 128), nn.ReLU(), nn.Linear(128, 128))

    def forward(self, encoder, x, u, seen):
        """seen: what the encoder's clean pass left, {"mu", "map"} -> scalar"""
        kind, dims = self.args.kind, self.args.dims
        mu = seen["mu"][:, :dims]
        if kind == "infomax":
            maps = seen["map"]
            if self.args.cross:
                with contrastive.untracked(encoder):
                    maps = encoder.features[:5](contrastive.augment(x, u, self.args.strength))
            local, g = self.local(maps).float(), self.globl(mu).float()  # (B, 128, 8, 8), (B, 128)
            scores = torch.einsum("id,jdp->ijp", g, local.flatten(2)) / 128**0.5  # image i's code, image j's place p
            mine = scores.diagonal().T  # (B, 64)
            others = scores.masked_fill(torch.eye(len(g), dtype=torch.bool)[..., None], -1e9).flatten(1).logsumexp(1)
            return (torch.logaddexp(mine, others[:, None]) - mine).mean()
        with contrastive.untracked(encoder):
            if kind == "rotation":
                turns = (4 * u[:, 0]).long()
                turned = torch.stack([x.rot90(k, (2, 3)) for k in range(4)], 1)[torch.arange(len(x)), turns]
                return F.cross_entropy(self.head(encoder(turned)[0][:, :dims]).float(), turns)
            views = [contrastive.augment(x, part, self.args.strength) for part in u.split(contrastive.NUMBERS, 1)]
            codes = encoder(torch.cat(views))[0][:, :dims]
        a, b = (mu, codes) if self.args.views == 1 else codes.chunk(2)
        if self.args.head:
            a, b = self.head(torch.cat([a, b])).chunk(2)
        a, b = a.float(), b.float()
        if kind == "nt_xent":
            return contrastive.nt_xent(a, b, self.args.temperature).mean()
        return {"barlow": barlow, "vicreg": vicreg}[kind](a, b)


def main():
    args = parse_args()
    device = devices.start(args.device, "bf16")
    images, labels = data.load("cifar10", args.data_dir, "train", device)
    held, held_labels = images[-5000:], labels[-5000:]
    images, labels = images[:-5000], labels[:-5000]
    subset = images[: args.limit]
    torch.manual_seed(args.seed)
    model = vae.VAE(128).to(device)
    average, term = copy.deepcopy(model), Term(args).to(device)
    parameters = [*model.parameters(), *term.parameters()]
    optimizer = devices.adam(parameters, args.lr, device)
    seen = {}

    def remember(name, pick):
        def hook(module, inputs, output):  # the first pass of a step is the clean one
            seen.setdefault(name, pick(output))

        return hook

    model.encoder.features[4].register_forward_hook(remember("map", lambda o: o))
    model.encoder.register_forward_hook(remember("mu", lambda o: o[0]))
    per_epoch, recent = len(subset) // 128, []
    total = args.epochs * per_epoch
    model.train()
    began = time.process_time()
    for step in range(total):
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            order = torch.randperm(len(subset), generator=devices.generator("cpu", args.seed, "order", epoch))
        noise = devices.generator(device, args.seed, "noise", step)
        flip = torch.rand(128, generator=noise) < 0.5
        eps = torch.randn(128, 128, generator=noise)
        u = torch.rand(
            128, args.views * contrastive.NUMBERS, generator=devices.generator(device, args.seed, "views", step)
        )
        devices.set_lr(optimizer, devices.learning_rate(step, total, args.lr, "constant"))
        optimizer.zero_grad(set_to_none=True)
        x = data.batch(subset, order[i * 128 : (i + 1) * 128], flip)
        seen.clear()
        with devices.autocast(device, "bf16"):
            nll, kl, mse = vae.elbo_terms(model, x, eps)
            value = torch.zeros(()) if args.kind == "plain" else term(model.encoder, x, u, seen)
        ((nll + kl).mean() + args.weight * value).backward()
        optimizer.step()
        devices.average_weights(average, model, torch.tensor(min(0.999, (1 + step) / (10 + step))))
        recent.append(value.item())
    seconds = time.process_time() - began
    codes, held_codes = sampling.encode(average, images), sampling.encode(average, held)
    predicted, _ = probe.classify(codes, labels, held_codes, 10, args.seed)
    accuracy = 100 * (predicted == held_labels).double().mean().item()
    found = vae.evaluate(average, held, 0)
    if args.save:
        torch.save(average.state_dict(), args.save)
    print(json.dumps({"accuracy": accuracy, **found, "term": sum(recent[-50:]) / 50, "cpu_s": seconds, **vars(args)}))


if __name__ == "__main__":
    main()
