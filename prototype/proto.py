"""python proto.py SEED key=value ... -> one line. Knobs over wgan_gp.py's own functions."""
import sys, time, json, math, copy
sys.path.insert(0, "..")
import torch, numpy as np
import devices, wgan_gp
from wgan_gp import Network, gradient_penalty, set_gradients, sample_latent
from two_gaussians import *
from two_gaussians import w2_modes, statistics, MEANS, nearest_mode
torch.set_num_threads(1)
devices.keep_memory()
D = dict(it=5000, batch=256, late=1.0, late_batch=256, late_k=5, k=5, width=128, depth=4, cw=128, cd=2, scale=10.0, cscale=10.0, pen=0.1, two=0, drift=0.3,
         sym=0, dim=6, lr=2e-3, clr=2e-3, b2=0.99, sigma=0.1, cb=0, drift_late=-1.0, pen_late=-1.0, decay=1.0, end=0.0, save="")
def main(seed, **kw):
    c = D | {k: type(D[k])(v) for k, v in kw.items()}
    dev = torch.device("cpu")
    torch.manual_seed(seed)
    G = Network(c["dim"], 2, c["width"], c["depth"], c["scale"]); C = Network(2, 1, c["cw"], c["cd"], c["cscale"])
    avgs = {w: copy.deepcopy(G).requires_grad_(False) for w in (3, 9, 24)}
    go = devices.adam(G.parameters(), c["lr"], dev, betas=(0.0, c["b2"])); co = devices.adam(C.parameters(), c["clr"], dev, betas=(0.0, c["b2"]))
    gen = torch.Generator().manual_seed(seed + 7919)
    t0 = time.process_time()
    norms = []
    raw = []
    for step in range(1, c["it"] + 1):
        p = (step - 1) / c["it"]
        d = (1 - p) ** c["decay"]
        devices.set_lr(go, c["lr"] * d); devices.set_lr(co, c["clr"] * d)
        late = p >= c["late"]
        B, K = (c["late_batch"], c["late_k"]) if late else (c["batch"], c["k"])
        drift = c["drift_late"] if late and c["drift_late"] >= 0 else c["drift"]
        pen = c["pen_late"] if late and c["pen_late"] >= 0 else c["pen"]
        xr = sample_real(K * B, c["sigma"], gen).view(K, B, 2)
        z = sample_latent(K * B + B, c["dim"], gen)
        mix = torch.rand(K, B, generator=gen)
        with torch.no_grad(): xf = G(z[:K * B]).view(K, B, 2)
        for r, f, m in zip(xr, xf, mix):
            a, b = C(torch.cat((r, f))).chunk(2)
            loss = b.mean() - a.mean()
            gp = gradient_penalty(C, r, f, mix=m, one_sided=not c["two"]).mean()
            dr = a.square().mean() if not c["sym"] else (a.square().mean() + b.square().mean()) / 2
            loss = loss + pen * gp + drift * dr
            set_gradients(C, loss); co.step()
        set_gradients(G, -C(G(z[K * B:])).mean()); go.step()
        for w, A in avgs.items(): devices.average_weights(A, G, torch.tensor(step / (step + w)))
        if step > 0.9 * c["it"] and step % 25 == 0:
            with torch.no_grad():
                x = G(sample_latent(5000, c["dim"], gen))
                raw.append(shape(x, c["sigma"]))
    cpu = time.process_time() - t0
    tr = torch.Generator().manual_seed(123)
    floor = float(np.mean([w2_modes(sample_real(2000, c["sigma"], tr), c["sigma"], tr) for _ in range(6)]))
    print(json.dumps({"seed": seed, **kw, "cpu": round(cpu)}))
    for name, A in [("raw", G), *avgs.items()]:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            x = A(sample_latent(40000, c["dim"], g))
            s = statistics(x, c["sigma"])
            w = []; wc = []
            if name in ("raw", 9) or name == 24:
                for _ in range(5):
                    y = A(sample_latent(2000, c["dim"], g))
                    w.append(w2_modes(y, c["sigma"], g)); wc.append(w2_modes(y, c["sigma"], g, reach=4))
        sh = shape(x, c["sigma"])
        wm = (np.mean(w, 0).max() / floor, np.mean(wc, 0).max() / floor) if w else (0, 0)
        print(f"   {name!s:>4} W {wm[0]:.2f} core {wm[1]:.2f}  eig% {np.round(100 * (sh['eig'] - 1), 1).tolist()} corr {np.round(sh['corr'], 3).tolist()} "
              f"w1 {s['mode_weights'][0]:.3f} 3s {s['within_3_sigma']:.4f} br% {100 * s['bridge']:.2f}  in/out along {np.round(sh['inner'], 2).tolist()} {np.round(sh['outer'], 2).tolist()} mean {np.abs(np.array(s['mode_means']) - MEANS).max():.4f}")
    print("   raw over last tenth: eig", np.round(100 * (np.mean([r['eig'] for r in raw], 0) - 1), 1).tolist(), "corr", np.round(np.mean([r['corr'] for r in raw], 0), 3).tolist(),
          "std of corr", np.round(np.std([r['corr'] for r in raw], 0), 3).tolist(), flush=True)
    if c["save"]: torch.save({"G": G, "C": C, "avgs": avgs, "c": c}, c["save"])

def shape(x, sigma):
    """relative std in worst directions, correlation, inner and outer std along the line about the true mean"""
    mode, dist = nearest_mode(x)
    eig, corr, inner, outer = [], [], [], []
    for k in range(2):
        c = x[(mode == k) & (dist < 4 * sigma)]
        cov = torch.cov(c.T)
        e = torch.linalg.eigvalsh(cov).clamp(min=0).sqrt() / sigma
        eig.append(e.tolist()); corr.append((cov[0, 1] / (cov[0, 0] * cov[1, 1]).sqrt()).item())
        u = ((c - torch.tensor(MEANS[k])) * (1 if k else -1)).sum(1) / math.sqrt(2) / sigma  # positive: toward the other mode
        inner.append(u[u > 0].square().mean().sqrt().item()); outer.append(u[u < 0].square().mean().sqrt().item())
    return {"eig": np.array(eig), "corr": np.array(corr), "inner": np.array(inner), "outer": np.array(outer)}
if __name__ == "__main__":
    main(int(sys.argv[1]), **dict(a.split("=") for a in sys.argv[2:]))
