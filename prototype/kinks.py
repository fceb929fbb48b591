import sys; sys.path.insert(0, "..")
import torch, math
def rep(W,b,s,name):
    # first layer: s*W x + b ; W (n,2)
    n=W.norm(dim=1); unit=W/n[:,None]
    for k,m in enumerate(((.5,.5),(-.5,-.5))):
        m=torch.tensor(m)
        dist=((s*(W@m)+b)/(s*n)).abs()
        near=dist<0.3
        u=torch.tensor([1.,1.])/math.sqrt(2)
        cos2=(unit@u)**2
        print(name,"mode",k,"kinks within 3 sigma:",int(near.sum()),"share whose normal is nearer to the line than to its perpendicular:",round((cos2[near]>.5).float().mean().item(),2),"mean cos2",round(cos2[near].mean().item(),3), "all through |b|/(s|W|) median", round((b.abs()/(s*n)).median().item(),3))
torch.manual_seed(10)
import wgan_gp
G=wgan_gp.Generator(); C=wgan_gp.Critic()
rep(C.layers[0].weight.data,C.layers[0].bias.data,10,"init")
d=torch.load("base10.pt",weights_only=False)
C=d["C"]
rep(C.layers[0].weight.data,C.layers[0].bias.data,10,"trained")
torch.manual_seed(10); C=wgan_gp.Critic(); rep(C.layers[0].weight.data,C.layers[0].bias.data*10,10,"init cb=10")
