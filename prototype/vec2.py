"""Batched prototype: R replicas at once. python vec.py 'settings' ... ; each argument is 'seed=10,cb=10,...' one replica; shared knobs after --"""
import sys, time, json, math
sys.path.insert(0, "..")
import torch, numpy as np
import devices
from two_gaussians import sample_real, w2_modes, statistics, MEANS
from proto import shape
torch.set_num_threads(1)
devices.keep_memory()
torch.set_flush_denormal(True)
SH = dict(it=5000, batch=256, late=2.0, lbatch=256, lk=5, k=5, w=128, d=4, cw=128, cd=2, dim=6, b2=0.99, sigma=0.1, decay=1.0, b1=0.0, wins="9", save="", quick=0, leak=0.0)
PER = dict(seed=10, cb=1.0, gb=1.0, cs=10.0, gs=10.0, pen=0.1, two=0.0, drift=0.3, sym=0.0, lr=2e-3, clr=2e-3, cend=0.0, gend=0.0)

def init(sizes, reps, scale_b):
    W, b = [], []
    for i, (n, m) in enumerate(zip(sizes, sizes[1:])):
        Ws, bs = [], []
        for r in reps:
            g = torch.Generator().manual_seed(r["seed"] * 1000 + i * 10 + len(sizes))
            k = 1 / math.sqrt(n)
            Ws.append((torch.rand(n, m, generator=g) * 2 - 1) * k)
            bs.append((torch.rand(1, m, generator=g) * 2 - 1) * k * (r[scale_b] if i == 0 else 1))
        W.append(torch.stack(Ws).requires_grad_()); b.append(torch.stack(bs).requires_grad_())
    return W, b

def forward(net, x, scale, leak=0.0):
    W, b = net
    h = x * scale
    for i in range(len(W)):
        h = torch.baddbmm(b[i], h, W[i])
        if i < len(W) - 1: h = torch.nn.functional.leaky_relu(h, leak) if leak else h.relu()
    return h

def slope(net, x, scale, leak=0.0):
    W, b = net
    masks = []
    with torch.no_grad():
        h = x * scale
        for i in range(len(W) - 1):
            h = torch.baddbmm(b[i], h, W[i]); masks.append((h > 0).float() * (1 - leak) + leak); h = torch.nn.functional.leaky_relu(h, leak) if leak else h.relu()
    g = W[-1].mT * masks[-1]
    for i in range(len(W) - 2, 0, -1):
        g = torch.bmm(g, W[i].mT) * masks[i - 1]
    return torch.bmm(g, W[0].mT) * scale  # (R, B, 2)

def main():
    a = sys.argv[1:]; i = a.index("--") if "--" in a else len(a)
    reps = []
    for s in a[:i]:
        kv = dict(p.split("=") for p in s.split(",") if p)
        reps.append(PER | {k: type(PER[k])(float(v)) for k, v in kv.items()}); reps[-1]["_"] = s
    c = SH | {k: type(SH[k])(v) for k, v in (p.split("=") for p in a[i + 1:])}
    R = len(reps)
    col = lambda k: torch.tensor([float(r[k]) for r in reps]).view(R, 1, 1)
    gs, cs, pen, two, drift, sym = map(col, ("gs", "cs", "pen", "two", "drift", "sym"))
    G = init([c["dim"]] + [c["w"]] * c["d"] + [2], reps, "gb"); C = init([2] + [c["cw"]] * c["cd"] + [1], reps, "cb")
    gp_, cp_ = [*G[0], *G[1]], [*C[0], *C[1]]
    wins = [float(w) for w in c["wins"].split("/")]
    A = {w: [p.detach().clone() for p in gp_] for w in wins}
    dev = torch.device("cpu")
    lr, clr, cend, gend = map(col, ("lr", "clr", "cend", "gend"))
    vg, vc = [torch.zeros_like(q) for q in gp_], [torch.zeros_like(q) for q in cp_]
    count = {"g": 0, "c": 0}
    gens = [torch.Generator().manual_seed(r["seed"] + 7919) for r in reps]
    t0 = time.process_time(); trace = []; norms = []
    def set_(ps, vs, rate, which, loss):
        gr = torch.autograd.grad(loss, ps)
        count[which] += 1
        fix = 1 / math.sqrt(1 - c["b2"] ** count[which])
        with torch.no_grad():
            for p, v, g in zip(ps, vs, gr):
                v.mul_(c["b2"]).addcmul_(g, g, value=1 - c["b2"])
                p.sub_(g.mul(rate).div_(v.sqrt().mul_(fix).add_(1e-8)))
    mu = torch.tensor(MEANS)
    for step in range(1, c["it"] + 1):
        p = (step - 1) / c["it"]; d = (1 - p) ** c["decay"]
        lg, lc = lr * (gend + (1 - gend) * d), clr * (cend + (1 - cend) * d)
        late = p >= c["late"]
        B, K = (c["lbatch"], c["lk"]) if late else (c["batch"], c["k"])
        n = K * B
        xr = torch.stack([sample_real(n, c["sigma"], g) for g in gens]); z = torch.stack([torch.rand(n + B, c["dim"], generator=g) * 2 - 1 for g in gens])
        mix = torch.stack([torch.rand(n, 1, generator=g) for g in gens])
        with torch.no_grad(): xf = forward(G, z[:, :n], gs)
        xi = torch.lerp(xr, xf, mix)
        for k in range(K):
            s = slice(k * B, (k + 1) * B)
            out = forward(C, torch.cat((xr[:, s], xf[:, s]), 1), cs, c["leak"])
            on_r, on_f = out[:, :B], out[:, B:]
            nrm = slope(C, xi[:, s], cs, c["leak"]).square().sum(-1, keepdim=True).add(1e-20).sqrt()
            ex = nrm - 1
            ex = torch.where(two > 0, ex, ex.clamp(min=0)).square()
            dr = (on_r.square() * (1 - sym / 2) + sym / 2 * on_f.square()).mean(1, keepdim=True)
            set_(cp_, vc, lc, "c", (on_f.mean(1, keepdim=True) - on_r.mean(1, keepdim=True) + pen * ex.mean(1, keepdim=True) + drift * dr).sum())
        set_(gp_, vg, lg, "g", -forward(C, forward(G, z[:, n:], gs), cs, c["leak"]).mean(1).sum())
        with torch.no_grad():
            for w, ps in A.items():
                torch._foreach_lerp_(ps, gp_, 1 - step / (step + w))
    cpu = time.process_time() - t0
    tr = torch.Generator().manual_seed(123)
    floor = float(np.mean([w2_modes(sample_real(2000, c["sigma"], tr), c["sigma"], tr) for _ in range(4)]))
    print(f"# shared {a[i+1:]} cpu {cpu:.0f} s, {cpu/R:.0f} a replica", flush=True)
    allr = {}
    for j, r in enumerate(reps):
        for w in ["raw", *wins]:
            ps = gp_ if w == "raw" else A[w]
            net = [q.detach()[j:j+1] for q in ps]; net = (net[:len(G[0])], net[len(G[0]):])
            sample = lambda n, g: forward(net, torch.rand(1, n, c["dim"], generator=g) * 2 - 1, gs[j:j+1])[0]
            g = torch.Generator().manual_seed(1)
            x = sample(40000, g); s = statistics(x, c["sigma"]); sh = shape(x, c["sigma"])
            if w == "raw":
                W = Wc = 0
            else:
                ws, wc = zip(*[(w2_modes(y, c["sigma"], g), w2_modes(y, c["sigma"], g, reach=4)) for y in (sample(2000, g) for _ in range(4))])
                W, Wc = np.mean(ws, 0).max() / floor, np.mean(wc, 0).max() / floor
            print(f"{r['_']:28.28s} {w!s:>4} W {W:.2f} core {Wc:.2f} eig% {np.round(100*(sh['eig']-1),1).tolist()} corr {np.round(sh['corr'],3).tolist()} w1 {s['mode_weights'][0]:.3f} "
                  f"3s {s['within_3_sigma']:.4f} br% {100*s['bridge']:.2f} in {np.round(sh['inner'],2).tolist()} out {np.round(sh['outer'],2).tolist()} m {np.abs(np.array(s['mode_means'])-MEANS).max():.4f}", flush=True)
    if c["save"]: torch.save({"G": G, "C": C, "A": A, "reps": reps, "c": c}, c["save"])
if __name__ == "__main__":
    main()
