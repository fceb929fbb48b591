import sys; sys.path.insert(0, "..")
import torch, devices
from two_gaussians import sample_real
from vec import slope
x=sample_real(4000,.1,devices.generator("cpu",3))
def say(n,g): print(n, "share of real samples with zero gradient %.3f  median norm %.2e"%((g==0).float().mean().item(), g.median().item()))
d=torch.load("base10.pt",weights_only=False); C=d["C"]
y=x.clone().requires_grad_(); g,=torch.autograd.grad(C(y).sum(),y); say("base10",g.norm(dim=1))
for f in ("v1.pt","v2.pt"):
    d=torch.load(f,weights_only=False)
    for j,r in enumerate(d["reps"]):
        net=([w.detach()[j:j+1] for w in d["C"][0]],[w.detach()[j:j+1] for w in d["C"][1]])
        say(f+" "+r["_"], slope(net,x[None],torch.tensor(10.).view(1,1,1))[0].norm(dim=1))
s=None
try:
    st=torch.load("/tmp/p18/confirm/runs/wgan_gp_seed_0/checkpoint.pt",weights_only=False)
    import wgan_gp
    C=wgan_gp.Critic(); C.load_state_dict(st["critic"]); y=x.clone().requires_grad_(); g,=torch.autograd.grad(C(y).sum(),y); say("confirm seed 0, step %s"%st["step"],g.norm(dim=1))
except Exception as e: print(e)
