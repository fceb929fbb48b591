"""patches.py: filters that find planted patterns, targets by their definition, the likelihood by its formula.

pytest tests/test_patches.py
"""

import math

import pytest
import torch
from helpers import checkpoint, log, same
from test_vae import train

from common import devices, patches, ranks


def noise(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)


def learned(images, seed=0):
    return patches.learn_filters(images, devices.generator("cpu", seed, "patches"))


def test_patches_are_the_images_squares_without_brightness_and_contrast():
    x = noise(2)
    found = patches.extract(x, stride=2)
    assert found.shape == (2, 14 * 14, 108)
    square = x[1, :, 2:8, 4:10].flatten().double()  # row 1 of 14, column 2
    wanted = (square - square.mean()) / square.std()
    torch.testing.assert_close(found[1, 14 + 2].double(), wanted, rtol=1e-2, atol=1e-2)
    darker = patches.extract(x // 2, stride=2)  # half the contrast, up to rounding
    torch.testing.assert_close(darker, found, rtol=0, atol=0.05)
    assert patches.extract(torch.full((1, 3, 32, 32), 7, dtype=torch.uint8), 2).abs().max() == 0


def test_planted_patterns_become_filters():
    """Images are tiled with twenty patterns: each has a filter to which the others say little."""
    g = torch.Generator().manual_seed(1)
    patterns = noise(20, seed=2)[:, :, :6, :6]
    tiles = patterns[torch.randint(20, (100, 5, 5), generator=g)]  # (100, 5, 5, 3, 6, 6)
    x = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    x[:, :, :30, :30] = tiles.permute(0, 3, 1, 4, 2, 5).reshape(100, 3, 30, 30)
    weight, bias = learned(x)
    alone = torch.nn.functional.pad(patterns, (0, 26, 0, 26))  # in the corner of an image
    strengths = (patches.extract(alone, stride=6)[:, 0] @ weight + bias).abs()  # (20, FILTERS)
    own = strengths.argmax(1)
    assert len(own.unique()) == 20
    others = strengths.index_select(1, own).fill_diagonal_(0).amax(0)
    assert (strengths.amax(1) > 2 * others).all()


def test_an_encoding_is_the_mean_in_each_quarter():
    x = noise(3)
    weight, bias = learned(x)
    found = patches.encode(x, weight, bias).view(3, 2, patches.FILTERS, 2, 2)
    z = (patches.extract(x, 2) @ weight + bias).view(3, 14, 14, patches.FILTERS)
    for sign in (0, 1):
        present = ((1 - 2 * sign) * z - patches.THRESHOLD).clamp(min=0)
        for i in (0, 1):
            for j in (0, 1):
                wanted = present[:, 7 * i : 7 * i + 7, 7 * j : 7 * j + 7].mean((1, 2))
                torch.testing.assert_close(found[:, sign, :, i, j], wanted, rtol=1e-4, atol=1e-5)


def test_targets_are_uncorrelated_and_the_same_for_mirror_images(few_filters):
    x = torch.nn.functional.interpolate(noise(400)[:, :, :8, :8].float(), scale_factor=4, mode="bilinear").byte()
    found = patches.targets(x, devices.generator("cpu", 0, "patches"))
    assert found.shape == (400, patches.DIMS) and found.dtype == torch.float32
    torch.testing.assert_close(found.T @ found / 400, torch.eye(patches.DIMS), rtol=0, atol=0.02)
    both = patches.targets(torch.cat([x, x.flip(3)]), devices.generator("cpu", 0, "patches"))
    torch.testing.assert_close(both[:400], both[400:])
    assert torch.equal(found, patches.targets(x, devices.generator("cpu", 0, "patches")))


def test_few_images_leave_components_without_variance_at_zero(few_filters):
    found = patches.targets(noise(20), devices.generator("cpu", 0, "patches"))
    assert found.isfinite().all() and (found.var(0) > 0.5).sum() < 20
    assert (found[:, 20:] == 0).all()
    grey = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    assert (patches.targets(grey, devices.generator("cpu", 0, "patches")) == 0).all()


def test_the_likelihood_is_its_formula_and_takes_the_right_images(few_filters):
    head = patches.Head(5, noise(50), seed=0)
    mu, rows = torch.randn(7, 5), torch.tensor([3, 1, 4, 1, 5, 9, 2])
    error = head.t[rows] - head.linear(mu)
    sigma2 = error.square().mean()
    wanted = error.square().sum(1) / (2 * sigma2) + patches.DIMS / 2 * torch.log(2 * math.pi * sigma2)
    torch.testing.assert_close(head.nll(mu, rows), wanted, rtol=1e-5, atol=1e-3)
    # The derivative by sigma2 vanishes, so its gradient may be left out: that of the mean is D / 2 of log(sigma2)'s
    (left_out,) = torch.autograd.grad(head.nll(mu, rows).mean(), head.linear.weight)
    (whole,) = torch.autograd.grad(patches.DIMS / 2 * torch.log(sigma2), head.linear.weight)
    torch.testing.assert_close(left_out, whole, rtol=1e-4, atol=1e-5)


def test_another_rank_takes_the_first_ones_targets_and_the_variance_is_that_of_all_ranks(few_filters, monkeypatch):
    first = patches.Head(5, noise(30), seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "is_main", lambda: False)
        patch.setattr(ranks, "broadcast", lambda tensor: tensor.copy_(first.t))
        patch.delattr(patches, "targets")
        assert torch.equal(patches.Head(5, noise(30, seed=1), seed=0).t, first.t)
    mu, rows = torch.randn(7, 5), torch.arange(7)
    error = first.t[rows] - first.linear(mu)
    monkeypatch.setattr(ranks, "all_reduce_mean", lambda sigma2: sigma2.fill_(2.0))
    wanted = error.square().sum(1) / 4 + patches.DIMS / 2 * math.log(4 * math.pi)
    torch.testing.assert_close(first.nll(mu, rows), wanted, rtol=1e-5, atol=1e-3)


def test_the_targets_come_back_with_the_state(few_filters):
    first = patches.Head(5, noise(30), seed=0)
    again = patches.Head(5, noise(30), seed=0, learn=False)
    assert not again.t.any()
    again.load_state_dict(first.state_dict())
    assert torch.equal(again.t, first.t)


def test_without_the_flag_a_run_is_the_plain_run_and_with_it_the_draws_are_the_same(
    in_tmp, image_folder, monkeypatch, no_figures, small_networks, few_filters
):
    with monkeypatch.context() as patch:
        for name in ("Head", "targets"):  # nothing of it is even touched
            patch.delattr(patches, name)
        train(image_folder, "--name", "plain", "--epochs", 1)
        train(image_folder, "--name", "off", "--epochs", 1, "--patches", 0)
    assert same(checkpoint("plain"), checkpoint("off")) and log("plain") == log("off")
    assert "patch_nll" not in log("plain")[0] and "head" not in checkpoint("plain")

    train(image_folder, "--name", "on", "--epochs", 1, "--patches", 10)
    plain, on = log("plain")[0], log("on")[0]
    assert all(on[key] == plain[key] for key in ("nll", "kl", "mse"))  # the first step's images, flips and eps
    assert on["loss"] == pytest.approx(plain["loss"] + 10 * on["patch_nll"], rel=1e-6)
    mu = "encoder.mu.weight"
    assert not torch.equal(checkpoint("on")["model"][mu], checkpoint("plain")["model"][mu])
