# ruff: noqa
"""Label-free features of images: k-means on whitened patches (Coates & Ng 2011/2012), averaged over both mirror images; PCA-whitened.

    python prototype/teacher.py FILTERS STRIDE DATA_DIR OUT
"""
import sys, time
from pathlib import Path
import torch, torch.nn.functional as F
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import probe
from common import data
torch.set_num_threads(1)
K=int(sys.argv[1]); stride=int(sys.argv[2])
x_all, y_all = (torch.as_tensor(t) for t in data.load("cifar10", sys.argv[3], "train")[:2])
g=torch.Generator().manual_seed(0)
began=time.process_time()
def patches(x, stride):
    p=F.unfold(x.float()/255,6,stride=stride).transpose(1,2)  # (B,L,108)
    p=p-p.mean(-1,keepdim=True)
    return p/(p.var(-1,keepdim=True)+1.5e-4).sqrt()
some=torch.randperm(45000,generator=g)[:4000]
p=patches(x_all[some],4).reshape(-1,108); p=p[torch.randperm(len(p),generator=g)[:100000]]
mean=p.mean(0); s,u=torch.linalg.eigh(torch.cov(p.T)); W=u@torch.diag((s+0.1).rsqrt())@u.T
p=(p-mean)@W
d=F.normalize(torch.randn(K,108,generator=g),dim=1)
for it in range(12):
    sim=p@d.T; k=sim.abs().argmax(1); v=torch.gather(sim,1,k[:,None])
    d=F.normalize(torch.zeros_like(d).index_add_(0,k,p*v)+1e-6*d,dim=1)
print("kmeans",time.process_time()-began,flush=True)
D=W@d.T; b=mean@D
side=(32-6)//stride+1
def feats(x):
    z=patches(x,stride)@D-b  # (B,L,K)
    z=z.view(len(x),side,side,K)
    h=(side+1)//2
    out=[]
    for q in (z[:,:h,:h],z[:,:h,side-h:],z[:,side-h:,:h],z[:,side-h:,side-h:]):
        out+= [F.relu(q-0.25).mean((1,2)), F.relu(-q-0.25).mean((1,2))]
    return torch.cat(out,1)
out=torch.empty(len(x_all),8*K)
for i in range(0,len(x_all),100):
    x=x_all[i:i+100]; out[i:i+100]=(feats(x)+feats(x.flip(3)))/2
print("features",out.shape,time.process_time()-began,flush=True)
m,sd=out[:45000].mean(0),out[:45000].std(0)
out=(out-m)/sd
s,u=torch.linalg.eigh(out[:45000].T@out[:45000]/45000)
t=(out@u[:,-512:]/s[-512:].sqrt()).flip(1)
torch.save(t.half(),sys.argv[4])
print("pca",time.process_time()-began, "share of variance", [(k,round((s[-k:].sum()/s.sum()).item(),3)) for k in (32,64,128,256,512)],flush=True)
y,yh=y_all[:45000],y_all[45000:]
for k in (32,64,128,256):
    w=probe.classify(t[:20000,:k],y[:20000],t[45000:,:k],10,0)[0]; print("pca",k,round(100*(w==yh).double().mean().item(),2),time.process_time()-began,flush=True)
