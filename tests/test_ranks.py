"""common/ranks.py: two processes of torchrun have the gradient of one, agree when to stop, and say an error once.

pytest tests/test_ranks.py
"""

import runpy

import pytest
import torch
from helpers import ROOT, checkpoint, torchrun

import classifier
import probe
import wgan_gp
from common import ranks

RANKS = """
import sys
import types

import torch
from torch import nn

from common import devices, loop, ranks, runs

device = devices.start("cpu")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
x = torch.randn(8, 5, generator=devices.generator("cpu", 0, "x"))
(mine,) = ranks.shard(x)
net(mine).square().mean().backward()
ranks.all_reduce_mean(*(p.grad for p in net.parameters()))
first = ranks.main_first(lambda: torch.tensor(3))
b = torch.tensor([float(ranks.rank())])
ranks.all_reduce_mean(b)
sent = torch.tensor([ranks.rank()])
ranks.broadcast(sent)
sent = torch.cat(ranks.gather(sent))
training = loop.Loop(None, types.SimpleNamespace(), {}, device, total=100, save_every=50, advice="")
training.interrupted = ranks.rank() == 1
answers = []
for training.device in (device, torch.device("cuda")):
    for training.step in (19, 20):
        answers.append(training.stopping())
if ranks.is_main():
    flat = torch.cat([p.grad.flatten() for p in net.parameters()])
    found = {"grad": flat, "rows": len(mine), "b": b, "answers": answers, "first": first, "sent": sent}
    torch.save(found | {"size": ranks.world_size(), "gathered": ranks.gather(ranks.rank())}, "out.pt")
else:
    ranks.gather(ranks.rank())
if sys.argv[1:] == ["fails"]:

    def alone():
        if ranks.rank() == 1:
            raise runs.UserError("the second rank's GPU is full")
        ranks.gather(0)  # waits for it

    runs.cli(alone)
runs.cli(lambda: loop.check_batch(31, 60))
"""


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one_and_agree(in_tmp):
    (in_tmp / "ranks.py").write_text(RANKS)
    done = torchrun(in_tmp, "ranks.py")
    assert done.stderr.count("ranks.py: --batch-size 31 does not divide among 2 processes") == 1, done.stderr
    two = torch.load("out.pt")
    with pytest.raises(SystemExit) as end:
        runpy.run_path("ranks.py")  # here, as the only process
    assert end.value.code == 0  # 31 of 60 images are a batch
    one = torch.load("out.pt")
    assert (two["size"], two["rows"], one["size"], one["rows"]) == (2, 4, 1, 8)
    torch.testing.assert_close(two["grad"], one["grad"], rtol=1e-6, atol=1e-7)
    assert two["b"].item() == 0.5 and two["first"] == 3 and two["sent"].tolist() == [0, 0]
    assert two["gathered"] == [0, 1] and one["gathered"] == [0]
    assert two["answers"] == [True, True, False, True]  # asked for in one rank; on GPUs agreed at the 20th step


@pytest.mark.slow
def test_an_error_of_one_rank_alone_is_said(in_tmp):
    (in_tmp / "ranks.py").write_text(RANKS)
    done = torchrun(in_tmp, "ranks.py", "fails")
    assert done.returncode != 0 and "ranks.py: rank 1: the second rank's GPU is full" in done.stderr


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rows_that_were_divided_come_together_in_their_order(n):
    x = torch.arange(14).view(7, 2)
    assert torch.equal(ranks.unshard([x[i::n] for i in range(n)]), x)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), [("vae", []), ("vae_gan", ["--patches", 10])])
def test_training_under_torchrun_writes_one_run(in_tmp, image_folder, script, flags):
    always = "--device cpu --latent-dim 4 --batch-size 30 --log-every 1 --epochs 1".split()
    done = torchrun(in_tmp, ROOT / "tests" / "quick.py", script, "--data", image_folder, *always, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits_per_dim") == 1
    assert checkpoint(script)["step"] == 2  # 60 images in global batches of 30
    if "--patches" in flags:
        assert checkpoint(script)["head"]["t"].var(0, unbiased=False).max() == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("module", [classifier, probe, wgan_gp])
def test_a_script_that_does_not_divide_its_work_says_so(in_tmp, image_folder, monkeypatch, refused, module):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = {classifier: ["--data", image_folder], probe: ["--supervised", "--data", image_folder], wgan_gp: []}
    assert "start it with python, not with torchrun" in refused(module.main, *flags[module], "--device", "cpu")
