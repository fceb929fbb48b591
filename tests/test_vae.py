"""vae.py: the table's layers, the ELBO against closed forms and torch.distributions, what a run leaves.

pytest tests/test_vae.py
"""

import math
import os
from pathlib import Path

import pytest
import torch
from helpers import checkpoint, metrics, untrained_vae
from PIL import Image
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import vae
from common import data, runs


def spell(module):
    """A layer as the assignment's table writes it."""
    match module:
        case nn.ConvTranspose2d():
            return f"TConv {module.out_channels},{module.kernel_size[0]},{module.stride[0]}"
        case nn.Conv2d():
            return f"Conv {module.out_channels},{module.kernel_size[0]},{module.stride[0]}"
        case nn.Linear():
            return f"FC {module.out_features}"
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            return "BN"
        case nn.Unflatten():
            return "Reshape {}x{}x{}".format(*module.unflattened_size[1:], module.unflattened_size[0])
        case _:
            return type(module).__name__


@pytest.mark.parametrize("z", [128, 64])
def test_layers_are_the_tables(z):
    encoder, decoder = vae.Encoder(latent_dim=z), vae.Decoder(latent_dim=z)
    assert [spell(m) for m in encoder.features] == (
        "Conv 64,4,2|ReLU|Conv 128,4,2|BN|ReLU|Flatten|FC 1024|BN|ReLU".split("|")
    )
    assert spell(encoder.mu) == spell(encoder.logvar) == f"FC {z}"
    assert [spell(m) for m in decoder.net] == (
        "FC 1024|BN|ReLU|FC 8192|BN|ReLU|Reshape 8x8x128|TConv 128,4,2|BN|ReLU|"
        "TConv 64,4,2|BN|ELU|ZeroPad2d|Conv 3,4,1|Sigmoid".split("|")
    )
    assert decoder.net[0].in_features == z
    x = torch.rand(2, 3, 32, 32)
    shapes = []
    for layer in encoder.features:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes[0] == (64, 16, 16) and shapes[2] == (128, 8, 8)
    mu, logvar = encoder(torch.rand(2, 3, 32, 32))
    x_hat = decoder(mu)
    assert mu.shape == logvar.shape == (2, z)
    assert x_hat.shape == (2, 3, 32, 32) and x_hat.min() > 0 and x_hat.max() < 1


def test_kl_is_that_of_torch_distributions():
    mu, logvar = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    q = Independent(Normal(mu, (logvar / 2).exp()), 1)
    p = Independent(Normal(torch.zeros(5).double(), torch.ones(5).double()), 1)
    torch.testing.assert_close(vae.kl_to_prior(mu, logvar), kl_divergence(q, p))
    assert vae.kl_to_prior(torch.zeros(1, 5), torch.zeros(1, 5)).item() == 0


def test_nll_is_that_of_torch_distributions():
    x, x_hat = torch.rand(4, 3, 6, 6).double(), torch.rand(4, 3, 6, 6).double()
    want = -Independent(Normal(x_hat, 0.3), 3).log_prob(x)
    torch.testing.assert_close(vae.gaussian_nll(x, x_hat, torch.tensor(0.09).double()), want)


def test_the_optimal_variance_is_the_best_on_a_grid_and_its_gradient_may_ignore_it():
    x, x_hat = torch.rand(4, 3, 6, 6).double(), torch.rand(4, 3, 6, 6).double().requires_grad_()
    mse = (x - x_hat).square().mean()
    grid = torch.linspace(0.5, 2, 301).double() * mse.detach()
    losses = torch.stack([vae.gaussian_nll(x, x_hat, s).mean() for s in grid])
    best = vae.gaussian_nll(x, x_hat, mse.detach()).mean()
    assert best <= losses.min() + 1e-12 and abs(grid[losses.argmin()] / mse - 1) < 0.01
    (through,) = torch.autograd.grad(vae.gaussian_nll(x, x_hat, mse).mean(), x_hat, retain_graph=True)
    (ignored,) = torch.autograd.grad(best, x_hat)
    torch.testing.assert_close(through, ignored)


def test_the_stored_variance_is_the_trainings_and_is_not_refitted():
    model = vae.VAE(4)
    model.train()
    for mse in (0.5, 0.3, 0.1):
        assert model.variance(torch.tensor(mse)).item() == pytest.approx(mse)
    assert model.sigma2.item() == pytest.approx(0.3)  # their mean
    model.eval()
    assert model.variance(torch.tensor(9.0)).item() == pytest.approx(0.3)
    fixed = vae.VAE(4, sigma=0.2).train()
    assert fixed.variance(torch.tensor(9.0)).item() == pytest.approx(0.04)


class LinearGaussian(nn.Module):
    """x = W z + b + sigma e with orthogonal columns in W, and its exact posterior (or one that is off by an error)."""

    def __init__(self, posterior_error=0.0):
        super().__init__()
        self.W = torch.linalg.qr(torch.randn(12, 3).double())[0] * torch.tensor([2.0, 1.0, 0.5])
        self.b, self.sigma2 = torch.randn(12).double(), torch.tensor(0.3).double()
        self.error = posterior_error

    def encoder(self, x):
        precision = (self.W.square().sum(0) + self.sigma2) / self.sigma2
        mu = (x.flatten(1) - self.b) @ self.W / self.sigma2 / precision
        return mu + self.error, (-precision.log()).expand_as(mu)

    def decoder(self, z):
        return (z @ self.W.T + self.b).view(-1, 3, 2, 2)

    def variance(self, mse):
        return self.sigma2


@pytest.mark.parametrize("error", [0.0, 0.2])
def test_the_elbo_is_at_most_the_log_likelihood_and_equal_at_the_posterior(error):
    model = LinearGaussian(error)
    x = torch.randn(5, 3, 2, 2).double()
    covariance = model.W @ model.W.T + model.sigma2 * torch.eye(12)
    log_likelihood = MultivariateNormal(model.b, covariance).log_prob(x.flatten(1))
    # In a linear model the terms are quadratic in eps: these six points, of mean 0 and covariance I, give their mean.
    points = math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    nll = torch.zeros(5).double()
    for eps in points:
        terms, kl, _ = vae.elbo_terms(model, x, eps.expand(5, 3))
        nll += terms / len(points)
    _, logvar = model.encoder(x)
    gap = 0.5 * (error**2 * torch.exp(-logvar)).sum(1)  # KL(q(z|x) || p(z|x)), which the ELBO loses
    torch.testing.assert_close(log_likelihood - (-nll - kl), gap, atol=1e-9, rtol=0)
    if error > 0:
        assert (-nll - kl < log_likelihood - 0.05).all()


def test_bits_per_dim_of_known_densities():
    assert vae.bits_per_dim(0.0, 3072) == 8  # uniform on [0, 1]: any of 256 levels
    assert vae.bits_per_dim(3072 * math.log(256), 3072) == pytest.approx(0)  # all mass in one level
    assert vae.bits_per_dim(10 * math.log(2), 10) == 7  # uniform on half of the levels


def test_evaluate_knows_a_known_density(monkeypatch):
    """A decoder that ignores z around mid-grey, on uniform noise: every number has a closed form."""
    model = vae.VAE(4, sigma=0.5)
    monkeypatch.setattr(model.encoder, "forward", lambda x: torch.zeros(2, len(x), 4))
    monkeypatch.setattr(model.decoder, "forward", lambda z: torch.full((len(z), 3, 32, 32), 0.5))
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = vae.evaluate(model, images, seed=0)
    elbo = -3072 * (0.5 * math.log(2 * math.pi * 0.25) + (1 / 12) / (2 * 0.25))  # E (u - 1/2)^2 = 1/12
    assert found["elbo_nats"] == pytest.approx(elbo, rel=1e-3)
    assert found["bits_per_dim"] == pytest.approx(8 - elbo / 3072 / math.log(2), rel=1e-3)
    assert found["mse"] == pytest.approx((images.double() / 255 - 0.5).square().mean().item(), rel=1e-5)
    assert found["kl"] == 0 and found["active_units"] == 0


def test_active_units_are_those_whose_mean_varies(monkeypatch):
    model = vae.VAE(4)
    monkeypatch.setattr(
        model.encoder, "forward", lambda x: (x[:, 0, 0, :4] * torch.tensor([1.0, 0.5, 0.01, 0]), x[:, 0, 0, :4])
    )
    monkeypatch.setattr(model.decoder, "forward", lambda z: torch.zeros(len(z), 3, 32, 32))
    images = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8)
    assert vae.evaluate(model, images, seed=0)["active_units"] == 2


def test_expost_latents_have_the_codes_mean_and_covariance(monkeypatch):
    scale = torch.tensor([[1.0, 0.0], [2.0, 0.5]])
    codes = torch.randn(20_000, 2) @ scale.T + torch.tensor([3.0, -1.0])
    monkeypatch.setattr(vae, "encode", lambda *args: codes)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    z = vae.draw_latents(vae.VAE(2), 20_000, "expost", images, seed=0)
    torch.testing.assert_close(z.mean(0), codes.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(torch.cov(z.T), torch.cov(codes.T), atol=0.15, rtol=0)
    z = vae.draw_latents(vae.VAE(2), 20_000, "normal", images, seed=0)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(2), atol=0.05, rtol=0)


# --- whole runs on 60 small images --------------------------------------------------------------------------------

QUICK = "--device cpu --latent-dim 4 --batch-size 30 --log-every 1".split()


def train(image_folder, *argv):
    vae.main(["--data", str(image_folder), *QUICK, *map(str, argv)])


def test_a_run_leaves_what_it_promises_and_is_measured_and_drawn_from_again(
    in_tmp, image_folder, capsys, small_networks
):
    train(image_folder, "--name", "whole", "--epochs", 1)
    expected = {"args.json", "log.jsonl", "metrics.json", "checkpoint.pt", "curves.png", "reconstructions.png"}
    expected |= {"samples-normal.png", "samples-expost.png", "interpolations.png", "frames", "training.gif"}
    assert expected == set(os.listdir("runs/whole"))
    found = metrics("whole")
    assert {"elbo_nats", "bits_per_dim", "mse", "kl", "active_units", "seconds", "images_per_second"} <= set(found)
    table = capsys.readouterr().out
    assert f"{found['elbo_nats']:.6g}" in table and "curves.png" in table

    os.remove("runs/whole/metrics.json")
    vae.main(["--name", "whole", "--eval-only"])
    assert metrics("whole")["elbo_nats"] == found["elbo_nats"]
    file = Path("runs/whole/log.jsonl")
    file.write_text(file.read_text() + '{"step": 99}\n')  # as if the run went on meanwhile
    vae.main(["--name", "whole", "--sample", "3"])
    assert '"step": 99' in file.read_text()
    assert len(os.listdir("runs/whole/samples-normal")) == 3


def test_what_a_gpu_trained_is_sampled_without_one_and_without_the_images(in_tmp):
    untrained_vae("vae", in_tmp / "gone", precision="tf32", capture=True)
    vae.main(["--name", "vae", "--device", "cpu", "--sample", "3"])
    assert len(os.listdir("runs/vae/samples-normal")) == 3


def test_images_of_one_colour_each_have_no_sharpness(in_tmp, no_figures, small_networks):
    for i in range(30):
        file = in_tmp / "colours" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (8 * i, 100, 200)).save(file)
    vae.main("--data colours --batch-size 8 --epochs 1 --latent-dim 2 --device cpu --name colours".split())
    found = metrics("colours")
    assert found["mse"] > 0 and not [key for key in found if key.startswith("sharpness")]


@pytest.mark.slow
def test_overfits_16_images(in_tmp, shapes_dir, no_figures):
    flags = "--data shapes --limit 16 --batch-size 16 --epochs 60 --latent-dim 32 --save-every 60 --lr 2e-3".split()
    vae.main([*flags, "--data-dir", str(shapes_dir), "--device", "cpu", "--holdout", "100"])
    last = [r for r in runs.Run(vae.parse_args(["--resume"]), "vae.py").read_log() if "loss" in r][-1]
    first_images, _ = data.load("shapes", shapes_dir, "train")
    variance = (first_images[:16] / 255).var(0).mean().item()
    assert last["mse"] < 0.35 * variance  # a decoder that ignores z leaves all of the variance


def test_weights_of_another_architecture_are_refused(in_tmp, image_folder, refused):
    untrained_vae("wrong", image_folder)
    state = checkpoint("wrong")
    state["average"]["encoder.mu.weight"] = torch.zeros(2, 2)
    runs.save_checkpoint("runs/wrong/checkpoint.pt", state)
    assert "another architecture" in refused(vae.main, "--name", "wrong", "--eval-only")


def test_a_loss_that_is_finite_while_the_weights_are_too_large_is_not_saved(in_tmp, image_folder, refused):
    """At this rate the first update leaves finite weights that give a test image an infinite ELBO."""
    flags = ["--data", image_folder, *QUICK, "--lr", 100, "--epochs", 1, "--log-every", 1000, "--batch-size", 60]
    assert "lower --lr" in refused(vae.main, *flags)
    assert not Path("runs/vae/checkpoint.pt").exists()
