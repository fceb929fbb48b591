# ruff: noqa
"""What do k dimensions cost that hold patch features instead of pixels? A linear account, with no network.

    python prototype/patch_dimensions.py DATA_DIR        # 3 minutes of one core

For k: the squared error [0, 1] of CIFAR-10's training images from 128 numbers, k of which are patch features' first
principal components and 128 - k the best linear ones beside them; and what a linear classifier, fitted to the labels of
45,000 training images with weight decay 1e-3, reads from the k and from all 128 on the other 5,000.
Then the same with other directions than principal components: those in which images differ most, relative to two crops
of one image (linear discriminants with images as classes).
"""
import pickle, sys
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import probe
from common import devices, patches
torch.set_num_threads(1)
folder = Path(sys.argv[1]) / "cifar-10-batches-py"
batches = [pickle.load(open(folder / f"data_batch_{i}", "rb"), encoding="bytes") for i in range(1, 6)]
x = torch.tensor(np.concatenate([b[b"data"] for b in batches])).view(-1, 3, 32, 32)
y = torch.tensor([label for b in batches for label in b[b"labels"]])
w, b = patches.learn_filters(x, devices.generator("cpu", 0, "patches"))
features = lambda some: (patches.encode(some, w, b) + patches.encode(some.flip(3), w, b)) / 2
whole = torch.cat([features(x[i : i + 100]) for i in range(0, len(x), 100)])
centre, scale = whole.mean(0), whole.std(0) + 1e-6
whole = (whole - centre) / scale
p = x.flatten(1).float() / 255; p -= p.mean(0)
pv, pa = patches.principal_axes(p.T @ p / len(p)); pp = p @ pa[:, :1024]
fitted, held = slice(0, 45000), slice(45000, 50000)

def accuracy(f):
    f = f.double(); f = (f - f[fitted].mean(0)) / f[fitted].std(0)
    W, c = probe.fit(f[fitted], y[fitted], 1e-3, 10, probe.second_moments(f[fitted]), tolerance=1e-4)
    return ((f[held] @ W + c).argmax(1) == y[held]).double().mean().item()

plain = (pv[128:].sum() / 3072).item()
print(f"0: mse {plain:.5f}, accuracy from 128 principal components of pixels {accuracy(pp[:, :128]):.4f}", flush=True)

def account(name, axes, counts):
    for k in counts:
        t = whole @ axes[:, :k].float(); t = (t - t.mean(0)) / t.std(0)
        rest = pp - t @ torch.linalg.lstsq(t, pp).solution
        rv, ra = torch.linalg.eigh(rest.T @ rest / len(rest)); rv, ra = rv.flip(0), ra.flip(1)
        mse = ((rv[128 - k :].sum() + pv[1024:].sum()) / 3072).item()
        both = accuracy(torch.cat([t, rest @ ra[:, : 128 - k]], 1))
        print(f"{name} {k}: mse {mse:.5f} ({100 * (mse / plain - 1):+.0f} %), accuracy of k {accuracy(t):.4f}, of 128 {both:.4f}", flush=True)

St = (whole.T @ whole / len(whole)).double()
account("principal components", torch.linalg.eigh(St).eigenvectors.flip(1), (16, 24, 32, 48, 64, 96, 128))
some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:20000]

def crops(seed):
    g, found = torch.Generator().manual_seed(seed), []
    for i in range(0, len(some), 50):
        size = int(torch.randint(16, 29, (1,), generator=g))
        top, left = (int(torch.randint(0, 33 - size, (1,), generator=g)) for _ in range(2))
        found.append(features(x[some[i : i + 50]][:, :, top : top + size, left : left + size]))
    found = (torch.cat(found) - centre) / scale
    return found - found.mean(0)

one, two = crops(1), crops(2)
Sw = ((one - two).T @ (one - two) / len(one) / 2).double()
Sb = ((one.T @ two + two.T @ one) / 2 / len(one)).double()
for ridge in (0.003, 0.03):
    L = torch.linalg.cholesky(Sw + ridge * torch.trace(Sw) / len(Sw) * torch.eye(len(Sw)))
    M = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, Sb, upper=False).T, upper=False)
    axes = torch.linalg.solve_triangular(L.T, torch.linalg.eigh((M + M.T) / 2).eigenvectors.flip(1), upper=True)
    account(f"discriminants, ridge {ridge}", axes, (8, 16, 24, 32))
