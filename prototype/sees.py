import sys; sys.path.insert(0, "..")
import torch, math, time, copy, devices
from proto import *
d=torch.load("base10.pt",weights_only=False); G=d["avgs"][9]; C0=d["C"]
S2=math.sqrt(2)
U=torch.tensor([1.,1.])/S2; V=torch.tensor([1.,-1.])/S2
def push(C,G,n=20000):
    """what the generator would feel: mean over core fake samples of  df/du * u (u from the mode's own mean, sigma units): >0 widens"""
    g=torch.Generator().manual_seed(5)
    with torch.no_grad(): x=G(sample_latent(n,6,g))
    mode,dist=nearest_mode(x)
    x=x.requires_grad_(); gr,=torch.autograd.grad(C(x).sum(),x)
    out=[]
    for k in range(2):
        s=(mode==k)&(dist<.4)
        c=(x.detach()[s]-x.detach()[s].mean(0))/.1; q=gr[s]
        for d_ in (U,V):
            t=c@d_; t=(t*t>0)*t
            out.append(round(((q@d_)*t).mean().item()/ (t.square().mean().item()),4))
    return out  # mode0 u, mode0 v, mode1 u, mode1 v
print("averaged generator: ", shape(G(sample_latent(40000,6)).detach(),.1))
print("critic at the end", push(C0,G), "on raw G", push(C0,d["G"]))
def fresh(cb,sym=0,steps=600,B=512,lr=2e-3,seed=0,drift=.3,start=None):
    torch.manual_seed(seed)
    C=Network(2,1,128,2,10.) if start is None else copy.deepcopy(start)
    if start is None:
        with torch.no_grad(): C.layers[0].bias.mul_(cb)
    o=devices.adam(C.parameters(),lr,torch.device("cpu"),betas=(0.,.99)); g=torch.Generator().manual_seed(9+seed)
    for i in range(steps):
        devices.set_lr(o,lr*(1-i/steps))
        r=sample_real(B,.1,g)
        with torch.no_grad(): f=G(sample_latent(B,6,g))
        a,b=C(torch.cat((r,f))).chunk(2)
        gp=gradient_penalty(C,r,f,generator=g,one_sided=True).mean()
        dr=a.square().mean() if not sym else (a.square().mean()+b.square().mean())/2
        set_gradients(C,b.mean()-a.mean()+.1*gp+drift*dr); o.step()
    g=torch.Generator().manual_seed(77)
    with torch.no_grad():
        w=(C(sample_real(40000,.1,g)).mean()-C(G(sample_latent(40000,6,g))).mean()).item()
    return push(C,G),round(w,4)
t=time.process_time()
print("end critic, 600 more", fresh(0,start=C0))
for seed in (0,1):
    for cb in (1,10): print("fresh cb",cb,"seed",seed,fresh(cb,seed=seed),flush=True)
print("sym cb 10",fresh(10,sym=1)); print("sym cb 1",fresh(1,sym=1))
print(time.process_time()-t)
