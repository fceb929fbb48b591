"""vae_gan.py: who receives which gradient, checked against hand-built sums; the losses' closed forms; whole runs.

pytest tests/test_vae_gan.py
"""

import math
import os
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import checkpoint, log, metrics, untrained_vae
from torch import nn
from torch.distributions import Independent, Normal

import vae
import vae_gan
from common import data, devices, patches, pictures, ranks

PLAYERS = ("encoder", "decoder", "discriminator")


# --- the discriminator and the losses -----------------------------------------------------------------------------


def test_the_discriminator_is_the_assignments():
    dis = vae_gan.Discriminator()
    found = [(type(m).__name__, *m.weight.shape) for m in dis.modules() if hasattr(m, "weight")]
    expected = [("Conv2d", 64, 3, 4, 4), ("Conv2d", 128, 64, 4, 4), ("Linear", 1024, 8192), ("Linear", 1, 1024)]
    assert found == expected
    assert [dis.conv1.stride, dis.conv2.stride] == [(2, 2), (2, 2)]
    logit, _ = dis(torch.rand(3, 3, 32, 32))
    assert logit.shape == (3,) and logit.dtype == torch.float32


@pytest.mark.parametrize(("layer", "size"), [("conv1", 16_384), ("conv2", 8_192), ("fc", 1_024)])
def test_features_are_those_of_the_layer_before_its_relu(layer, size):
    dis = vae_gan.Discriminator(layer)
    seen = {}
    getattr(dis, layer).register_forward_hook(lambda module, args, output: seen.update(output=output))
    x = torch.rand(2, 3, 32, 32)
    logit, features = dis(x)
    assert features.shape == (2, size) and (features < 0).any()
    torch.testing.assert_close(features, seen["output"].flatten(1))
    torch.testing.assert_close(vae_gan.Discriminator.forward(dis, x.flip(0))[0], logit.flip(0))  # images do not mix


def test_gan_terms_are_the_papers():
    real, hat, p = (torch.tensor([-2.0, 0.0, 3.0]) + shift for shift in (0, 0.5, -1))
    expected = torch.log(torch.sigmoid(real)) + torch.log(1 - torch.sigmoid(hat)) + torch.log(1 - torch.sigmoid(p))
    torch.testing.assert_close(vae_gan.gan_terms(real, hat, p), expected)
    certain = vae_gan.gan_terms(*(torch.tensor([v]) for v in (-200.0, 200.0, 200.0)))
    assert certain.item() == pytest.approx(-600)  # no infinities where the discriminator is wrong and certain


# --- the routing --------------------------------------------------------------------------------------------------


@pytest.fixture
def game(device, small_networks):
    """A VAE and a discriminator in double precision, in training mode, and one batch."""
    torch.manual_seed(0)
    model, dis = vae.VAE(3).double().train(), vae_gan.Discriminator().double()
    x, (eps, z_p) = torch.rand(4, 3, 32, 32).double(), torch.randn(2, 4, 3).double()
    return model.to(device), dis.to(device), x.to(device), eps.to(device), z_p.to(device)


def assert_same(a, b):
    """Bit for bit on a CPU; on CUDA, where sums may change their order from call to call, up to 1e-4 of the largest."""
    exact = a.device.type == "cpu"
    torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else 1e-4 * b.abs().max().item())


def routed(game, head=None, rows=None, **changed):
    """routed_gradients of a game. changed: gamma, and patches, the weight of the likelihood by `head`."""
    args = types.SimpleNamespace(**{"gamma": 0.5, "patches": 0.0, "precision": "fp32"} | changed)
    model, dis, *batch = game
    return vae_gan.routed_gradients(model, dis, head or nn.Module(), *batch, rows, args)


def by_hand(model, dis, x, eps, z_p):
    """-> the losses as means over the batch, each as a function of all parameters, nothing detached."""
    mu, logvar = model.encoder(x)
    x_hat, x_p = model.decoder(mu + eps * torch.exp(0.5 * logvar)), model.decoder(z_p)
    (real, features), (hat, features_hat), (p, _) = dis(x), dis(x_hat), dis(x_p)
    sigma2 = (features - features_hat).detach().square().mean()
    like = Independent(Normal(features_hat, sigma2.sqrt()), 1)
    return {
        "kl": (0.5 * (mu**2 + logvar.exp() - 1 - logvar)).sum(1).mean(),
        "like": -like.log_prob(features.detach()).mean(),
        "fool": (F.softplus(-hat) + F.softplus(-p)).mean(),  # -log Dis, exact where Dis is 1 to all digits
        "gan": (real.sigmoid().log() + (1 - hat.sigmoid()).log() + (1 - p.sigmoid()).log()).mean(),
    }


def test_each_player_receives_its_own_gradient_and_no_other(game):
    model, dis, x, eps, z_p = game
    gamma = 0.25
    found, numbers = routed(game, gamma=gamma)
    loss = by_hand(model, dis, x, eps, z_p)
    expected = {
        "encoder": (loss["kl"] + loss["like"], model.encoder),
        "decoder": (gamma * loss["like"] + loss["fool"], model.decoder),
        "discriminator": (-loss["gan"], dis),
    }
    for player, (value, module) in expected.items():
        wanted = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
        assert len(found[player]) == len(wanted)
        for (name, _), f, w in zip(module.named_parameters(), found[player], wanted, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-7, atol=1e-12, msg=lambda m, n=name, p=player: f"{p} {n}: {m}")
            if not (name.endswith("bias") and f.abs().max() < 1e-9):  # a bias before batch norm moves nothing
                assert f.abs().max() > 0
    assert numbers["kl"].item() == pytest.approx(loss["kl"].item())
    assert numbers["feature_nll"].item() == pytest.approx(loss["like"].item())
    assert numbers["loss"].item() == pytest.approx((loss["kl"] + loss["like"]).item())


@pytest.mark.parametrize("shift", [-40.0, 40.0, -500.0])
def test_a_certain_discriminator_leaves_the_decoder_a_finite_gradient(shift):
    """In float32 as in training; the gradient of softplus(-logit) neither vanishes at -40 nor overflows at -500."""
    torch.manual_seed(0)
    model, dis = vae.VAE(3).train(), vae_gan.Discriminator()
    dis.out.bias.data += shift
    x, (eps, z_p) = torch.rand(4, 3, 32, 32), torch.randn(2, 4, 3)
    found = routed((model, dis, x, eps, z_p), gamma=0.0)[0]["decoder"]
    assert all(f.isfinite().all() for f in found)
    if abs(shift) < 60:
        fool = by_hand(model.double(), dis.double(), x.double(), eps.double(), z_p.double())["fool"]
        wanted = torch.autograd.grad(fool, list(model.decoder.parameters()))
        for f, w in zip(found, wanted, strict=True):
            scale = max(g.abs().max().item() for g in wanted)
            torch.testing.assert_close(f.double(), w, rtol=2e-3, atol=1e-4 * scale)


def test_gamma_moves_the_decoder_alone(game):
    low, _ = routed(game, gamma=0.0)
    high, _ = routed(game, gamma=5.0)
    for player in ("encoder", "discriminator"):
        for a, b in zip(low[player], high[player], strict=True):
            assert_same(a, b)
    assert not torch.equal(low["decoder"][0], high["decoder"][0])
    assert all(p.grad is None for m in game[:2] for p in m.parameters())  # nothing is left behind


def test_the_likelihood_of_patches_moves_the_encoder_and_its_head_alone(game, few_filters):
    model, _, x, _, _ = game
    images = torch.randint(0, 256, (30, 3, 32, 32), device=x.device, dtype=torch.uint8)
    head, rows = patches.Head(3, images, seed=0).double(), torch.tensor([4, 1, 20, 7], device=x.device)
    without, plain = routed(game)
    found, numbers = routed(game, head, rows, patches=7.0)
    term = head.nll(model.encoder(x)[0], rows).mean()
    own = [*model.encoder.parameters(), *head.parameters()]
    wanted = torch.autograd.grad(term, own, allow_unused=True)  # not by logvar
    plainly = [*without["encoder"], *(torch.zeros_like(p) for p in head.parameters())]
    for before, after, extra in zip(plainly, found["encoder"], wanted, strict=True):
        torch.testing.assert_close(after, before if extra is None else before + 7 * extra, rtol=1e-5, atol=1e-6)
    for player in ("decoder", "discriminator"):
        for a, b in zip(without[player], found[player], strict=True):
            assert_same(a, b)
    assert set(numbers) == {*plain, "patch_nll"} and numbers["patch_nll"].item() == pytest.approx(term.item())


def test_each_players_step_leaves_the_others_untouched(device):
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8).to(device)
    args = vae_gan.parse_args(["--device", device.type, "--latent-dim", "3"])
    eps, z_p = torch.randn(2, 8, 3).to(device)
    rows, flip = torch.arange(8, device=device), torch.zeros(8, dtype=torch.bool, device=device)
    decay = torch.tensor(0.9, device=device)

    def after_a_step(*movers):
        torch.manual_seed(0)
        model, dis = vae.VAE(3).to(device).train(), vae_gan.Discriminator().to(device)
        modules = {"encoder": model.encoder, "decoder": model.decoder, "discriminator": dis}
        rates = {name: 1e-3 if name in movers else 0.0 for name in modules}
        optimizers = {n: devices.adam(m.parameters(), rates[n], device) for n, m in modules.items()}
        update = vae_gan.make_update(model, vae.VAE(3).to(device), dis, nn.Module(), optimizers, images, args)
        update(rows, flip, eps, z_p, decay)
        return {n: [p.detach().clone() for p in m.parameters()] for n, m in modules.items()}

    start, everyone = after_a_step(), after_a_step(*PLAYERS)
    for player in PLAYERS:
        alone = after_a_step(player)
        for other in PLAYERS:
            if other == player and device.type != "cpu":  # Adam's first step of a gradient near 0 may change its sign
                continue
            wanted = everyone if other == player else start  # all gradients come from the weights before the step
            assert all(torch.equal(a, b) for a, b in zip(alone[other], wanted[other], strict=True))
        assert not torch.equal(alone[player][0], start[player][0])


def test_the_two_ranks_gradients_are_those_of_the_whole_batch(game, monkeypatch):
    """Without batch norm, the mean over two half batches is the whole: also with the likelihood's shared variance."""
    model, dis, x, eps, z_p = game
    for module in list(model.modules()):
        for child, inner in list(module.named_children()):
            if isinstance(inner, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, child, nn.Identity())
    halves = [(x[i::2], eps[i::2], z_p[i::2]) for i in (0, 1)]
    shared = []
    monkeypatch.setattr(ranks, "all_reduce_mean", lambda t: shared.append(t.clone()))
    for half in halves:
        routed((model, dis, *half))
    mean = sum(shared) / 2
    monkeypatch.setattr(ranks, "all_reduce_mean", lambda t: t.copy_(mean))
    parts = [routed((model, dis, *half))[0] for half in halves]
    monkeypatch.setattr(ranks, "all_reduce_mean", lambda t: None)
    whole, _ = routed(game)
    for player in PLAYERS:
        for a, b, w in zip(parts[0][player], parts[1][player], whole[player], strict=True):
            torch.testing.assert_close((a + b) / 2, w, rtol=1e-7, atol=1e-12)


# --- collapses ----------------------------------------------------------------------------------------------------

HEALTHY = {"dis_real": 0.6, "dis_hat": 0.3, "dis_p": 0.2, "spread": 0.9, "kl": 50.0}


def test_a_batch_of_one_image_again_and_again_has_a_finite_spread(game):
    model, dis, x, *latents = game
    _, numbers = routed((model, dis, x[:1].expand_as(x), *latents))
    assert numbers["spread"].isfinite()


def test_collapses_are_told_with_what_to_change():
    assert vae_gan.trouble(HEALTHY) is None
    assert "certain" in vae_gan.trouble(HEALTHY | {"dis_real": 0.999, "dis_hat": 0.001, "dis_p": 0.002})
    assert vae_gan.trouble(HEALTHY | {"dis_real": 0.999, "dis_hat": 0.2}) is None
    assert "mode collapse" in vae_gan.trouble(HEALTHY | {"spread": 0.01})
    assert "posterior collapse" in vae_gan.trouble(HEALTHY | {"kl": 0.01})
    assert vae_gan.trouble(HEALTHY | {"kl": 0.01}).count("--") >= 1


# --- whole runs on 60 small images --------------------------------------------------------------------------------

QUICK = "--device cpu --latent-dim 4 --batch-size 30 --log-every 1".split()


def train(image_folder, *argv):
    vae_gan.main(["--data", str(image_folder), *QUICK, *map(str, argv)])


def test_a_run_leaves_what_it_promises_and_a_vae_is_drawn_beside_it(
    in_tmp, image_folder, monkeypatch, capsys, small_networks
):
    untrained_vae("vae", image_folder)
    drawn, original = {}, pictures.plot_rows

    def plot_rows(sets, path, title):
        drawn[path.name] = sets
        original(sets, path, title)

    monkeypatch.setattr(pictures, "plot_rows", plot_rows)
    train(image_folder, "--name", "whole", "--epochs", 1, "--compare", "runs/vae")
    plots = {"curves.png", "adversaries.png", "reconstructions.png", "samples-normal.png", "samples-expost.png"}
    plots |= {"interpolations.png", "frames", "training.gif"}
    files = {"args.json", "log.jsonl", "metrics.json", "checkpoint.pt", "comparison.png"}
    assert files | plots == set(os.listdir("runs/whole"))
    found = metrics("whole")
    assert {"elbo_nats", "mse", "kl", "active_units", "sharpness_generation", "seconds"} <= set(found)
    assert "adversaries.png" in capsys.readouterr().out
    record = log("whole")[0]
    of_the_step = {"loss", "kl", "feature_nll", "mse", "dis_real", "dis_hat", "dis_p", "spread"}
    assert of_the_step | {f"norm_{player}" for player in PLAYERS} <= set(record) and record["norm_encoder"] > 0
    assert {"discriminator", *(f"optimizer_{player}" for player in PLAYERS)} <= set(checkpoint("whole"))

    images, of_vae, of_vae_gan = drawn["comparison.png"]
    assert len(images) == len(of_vae) == len(of_vae_gan) == 12
    assert not torch.equal(of_vae, of_vae_gan)
    _, reconstructions = drawn["reconstructions.png"]
    assert torch.equal(of_vae_gan, reconstructions)

    os.remove("runs/whole/comparison.png")
    vae_gan.main(["--name", "whole", "--eval-only"])
    assert metrics("whole")["elbo_nats"] == found["elbo_nats"]
    vae_gan.main(["--name", "whole", "--sample", "3", "--prior", "expost"])
    assert len(os.listdir("runs/whole/samples-expost")) == 3


@pytest.mark.slow
def test_32_images_are_told_from_fakes_and_reconstructed(in_tmp, shapes_dir, no_figures):
    flags = "--data shapes --limit 32 --batch-size 16 --epochs 16 --latent-dim 32 --save-every 16 --log-every 8".split()
    flags += ["--gamma", "0.01"]  # of likelihood more than by default: the training is short
    vae_gan.main([*flags, "--data-dir", str(shapes_dir), "--device", "cpu", "--holdout", "100"])
    records = [r for r in log("vae_gan") if "loss" in r]
    first_images, _ = data.load("shapes", shapes_dir, "train")
    variance = (first_images[:32] / 255).var(0).mean().item()
    assert records[-1]["mse"] < 0.6 * variance < records[0]["mse"]
    assert records[-1]["dis_real"] > records[-1]["dis_hat"] + 0.05
    assert all(math.isfinite(value) for r in records for value in r.values())
