# ruff: noqa
"""Search for the modification of Task III: the probe's accuracy on 5,000 held-out training images, at equal processor time.

    OMP_NUM_THREADS=1 python prototype/modification.py --method head --minutes 8 --data-dir DIR      # the encoder alone
    OMP_NUM_THREADS=1 python prototype/modification.py --method now --decoder --weight 300 --epochs 1 --data-dir DIR
    OMP_NUM_THREADS=1 python prototype/teacher.py 300 2 DIR targets.pt                               # then
    OMP_NUM_THREADS=1 python prototype/modification.py --method joint --targets targets.pt --minutes 3 --data-dir DIR

A prototype, kept in this commit alone: what won is in the scripts, what lost in REPORT.md's appendix.
"""
import argparse, copy, json, math, sys, time
from pathlib import Path
import torch, torch.nn.functional as F
from torch import nn
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import vae, probe
from common import contrastive, data, devices

p = argparse.ArgumentParser()
p.add_argument("--method", default="now")
p.add_argument("--minutes", type=float, default=0)
p.add_argument("--epochs", type=float, default=0)
p.add_argument("--decoder", action="store_true")
p.add_argument("--weight", type=float, default=300)
p.add_argument("--temperature", type=float, default=0.1)
p.add_argument("--dims", type=int, default=64, help="first dimensions of mu that the term acts on")
p.add_argument("--strength", type=float, default=1.0)
p.add_argument("--batch", type=int, default=128)
p.add_argument("--lr", type=float, default=5e-4)
p.add_argument("--latent", type=int, default=128)
p.add_argument("--queue", type=int, default=4096)
p.add_argument("--hidden", type=int, default=512)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--data-dir", default="data")
p.add_argument("--tag", default="")
p.add_argument("--targets", default="targets.pt")
p.add_argument("--tdims", type=int, default=128)
p.add_argument("--reads", default="mu")
p.add_argument("--mlp", action="store_true")
a = p.parse_args()
torch.set_num_threads(1)
devices.keep_memory()
cpu = torch.device("cpu")

x_all, y_all = data.load("cifar10", a.data_dir, "train")[:2]
x_all, y_all = torch.as_tensor(x_all), torch.as_tensor(y_all)
images, labels, held, held_labels = x_all[:-5000], y_all[:-5000], x_all[-5000:], y_all[-5000:]


def mlp(n_in, n_hidden, n_out):
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.BatchNorm1d(n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_out))


torch.manual_seed(a.seed)
model = vae.VAE(a.latent)
heads = nn.ModuleDict({
    "mu": mlp(a.dims, a.hidden, 128), "trunk": mlp(1024, a.hidden, 128), "predictor": mlp(128, a.hidden, 128),
})
if a.method == "joint":
    targets = torch.load(a.targets)[:, : a.tdims].float()
    heads["joint"] = mlp(a.dims, a.hidden, a.tdims) if a.mlp else nn.Linear(a.dims, a.tdims)
average, average_heads = copy.deepcopy(model), copy.deepcopy(heads)
parameters = [*(model if a.decoder else model.encoder).parameters(), *heads.parameters()]
optimizer = torch.optim.Adam(parameters, lr=a.lr, fused=True)
queue = F.normalize(torch.randn(a.queue, 128), dim=1)


def codes(x, encoder=model.encoder):
    h = encoder.features(x)
    return h, encoder.mu(h)


def nce(q, k, negatives):
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / a.temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none")


def barlow(p, q, off=0.005):
    p, q = ((v - v.mean(0)) / (v.std(0) + 1e-5) for v in (p, q))
    c = p.T @ q / len(p)
    d = c.diagonal()
    return (d - 1).square().sum() + off * (c.square().sum() - d.square().sum())


def vicreg(p, q):
    def spread(v):
        v = v - v.mean(0)
        c = v.T @ v / (len(v) - 1)
        return F.relu(1 - (v.var(0) + 1e-4).sqrt()).mean(), (c.square().sum() - c.diagonal().square().sum()) / v.shape[1]
    (vp, cp), (vq, cq) = spread(p), spread(q)
    return 25 * F.mse_loss(p, q) + 25 * (vp + vq) / 2 + (cp + cq) / 2


def term(x, h, mu):
    """One value; h, mu: the plain images' or None."""
    global queue
    d, t, ntx = a.dims, a.temperature, lambda p, q: contrastive.nt_xent(p, q, a.temperature).mean()
    n = len(x)
    method = a.method
    def view():
        return contrastive.augment(x, torch.rand(n, contrastive.NUMBERS), a.strength)
    if method == "now":
        if mu is None:
            h, mu = codes(x)
        with contrastive.untracked(model.encoder):
            return ntx(mu[:, :d], codes(view())[1][:, :d])
    if method == "nowhead":
        if mu is None:
            h, mu = codes(x)
        with contrastive.untracked(model.encoder):
            return ntx(heads["mu"](mu[:, :d]), heads["mu"](codes(view())[1][:, :d]))
    if method in ("moco", "byol"):
        with torch.no_grad():
            average.train()
            with contrastive.untracked(average.encoder):
                k = codes(view(), average.encoder)[1][:, :d]
            average_heads.train()
            k = average_heads["mu"](k)
        with contrastive.untracked(model.encoder):
            q = heads["mu"](codes(view())[1][:, :d])
        if method == "byol":
            return 2 - 2 * F.cosine_similarity(heads["predictor"](q), k).mean()
        value = nce(q, k, queue).mean()
        queue = torch.cat([F.normalize(k, dim=1), queue])[: a.queue]
        return value
    with contrastive.untracked(model.encoder):
        hv, muv = codes(torch.cat([view(), view()]))  # one batch: half the calls, and one set of statistics
    (h1, h2), (m1, m2) = hv.chunk(2), muv[:, :d].chunk(2)
    if method == "views":
        return ntx(m1, m2)
    if method == "three":
        if mu is None:
            _, mu = codes(x)
        m0 = mu[:, :d]
        return (ntx(m0, m1) + ntx(m0, m2) + ntx(m1, m2)) / 3
    both = lambda name, v: heads[name](v).chunk(2)
    if method == "head":
        return ntx(*both("mu", muv[:, :d]))
    if method == "trunk":
        return ntx(*both("trunk", hv))
    if method == "trunkmu":  # head on the features and no head on mu
        return (ntx(*both("trunk", hv)) + ntx(m1, m2)) / 2
    if method == "trunkhead":
        return (ntx(*both("trunk", hv)) + ntx(*both("mu", muv[:, :d]))) / 2
    if method == "barlow":
        return barlow(m1, m2)
    if method == "barlowhead":
        return barlow(*both("mu", muv[:, :d]))
    if method == "vicreg":
        return vicreg(m1, m2)
    if method == "vicreghead":
        return vicreg(*both("mu", muv[:, :d]))
    if method == "control":  # nothing but the images
        return muv.sum() * 0
    raise SystemExit(method)


began, step, per_epoch, sums = time.process_time(), 0, len(images) // a.batch, {}
model.train()
report = max(1, per_epoch // 4)
while True:
    if step % per_epoch == 0:
        order = torch.randperm(len(images))
    spent = (time.process_time() - began) / 60
    if (a.minutes and spent > a.minutes) or (a.epochs and step >= a.epochs * per_epoch):
        break
    rows = order[step % per_epoch * a.batch:][: a.batch]
    step += 1
    for g in optimizer.param_groups:
        g["lr"] = a.lr * min(1, step / 100)
    x = data.batch(images, rows, torch.rand(a.batch) < 0.5)
    optimizer.zero_grad()
    h = mu = None
    loss = 0
    if a.decoder:
        if a.method == "controlaug":
            x = contrastive.augment(x, torch.rand(len(x), contrastive.NUMBERS), a.strength)
        h = model.encoder.features(x)
        mu, logvar = model.encoder.mu(h), model.encoder.logvar(h)
        nll, kl, mse = vae.elbo_terms(model, x, torch.randn(mu.shape), (mu, logvar))
        loss = (nll + kl).mean()
        sums["mse"] = sums.get("mse", 0) + mse.item()
    if a.method == "joint":
        if h is None:
            h, mu = codes(x)
        z = mu
        if a.reads == "z":
            logvar = model.encoder.logvar(h) if not a.decoder else logvar
            z = mu + torch.randn(mu.shape) * torch.exp(0.5 * logvar)
        t = targets[rows]
        error = (t - heads["joint"](z[:, : a.dims])).square()
        s2 = error.detach().mean()
        sums["t_mse"] = sums.get("t_mse", 0) + s2.item()
        value = (error.sum(1) / (2 * s2)).mean() + a.tdims / 2 * torch.log(2 * math.pi * s2)
        loss = loss + (a.weight if a.decoder else 1) * value
    elif a.method not in ("none", "controlaug"):
        value = term(x, h, mu)
        sums["term"] = sums.get("term", 0) + value.item()
        loss = loss + (a.weight if a.decoder else 1) * value
    loss.backward()
    optimizer.step()
    decay = devices.average_decay(step, 0.999, cpu)
    devices.average_weights(average, model, decay)
    devices.average_weights(average_heads, heads, decay)
    if step % report == 0:
        print(step, f"{spent:.1f} min", {k: round(v / report, 4) for k, v in sums.items()}, file=sys.stderr, flush=True)
        sums = {}

minutes = (time.process_time() - began) / 60
result = vars(a) | {"steps": step, "cpu_minutes": round(minutes, 2), "images_per_second": round(step * a.batch / minutes / 60, 1)}
if a.decoder:
    found = vae.evaluate(average, held, 0)
    result |= {k: round(found[k], 5) for k in ("elbo_nats", "mse", "kl", "active_units")}
else:  # statistics of plain images
    norms = [m for m in average.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.reset_running_stats(); m.momentum = None
    average.train()
    with torch.no_grad():
        for part in images[:10000].split(500):
            average.encoder(part.float() / 255)
average.eval()
def accuracy(f):
    predicted, _ = probe.classify(f(images), labels, f(held), 10, 0)
    return round(100 * (predicted == held_labels).double().mean().item(), 2)
result["mu"] = accuracy(lambda v: vae.encode(average, v))
result["first_half"] = accuracy(lambda v: vae.encode(average, v)[:, : a.dims])
print(json.dumps(result), flush=True)
