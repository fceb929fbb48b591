"""contrastive.py: each part of an augmentation against what it must do to an image, NT-Xent against its closed forms.

pytest tests/test_contrastive.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import checkpoint, log, same
from test_vae import train

import vae
from common import contrastive, devices

NAMES = ("area", "ratio", "left", "top", "flip", "brightness", "contrast", "saturation", "hue", "grey")
STILL = dict(zip(NAMES, (0, 0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 0.5, 1), strict=True))  # numbers that change nothing


def images(n=6, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def numbers(n=6, **changed):
    return torch.tensor([list((STILL | changed).values())]).expand(n, -1).float()


def draw(n, seed, step):
    return contrastive.draw(n, devices.generator("cpu", seed, "views", step))


def grey(x):
    return x.mean(1, keepdim=True).expand_as(x)


# --- the augmentation ---------------------------------------------------------------------------------------------


def test_an_augmentation_keeps_shape_and_range_and_changes_the_image():
    x, u = images(200), torch.rand(200, contrastive.NUMBERS, generator=torch.Generator().manual_seed(1))
    y = contrastive.augment(x, u)
    assert y.shape == x.shape and y.dtype == x.dtype and y.min() >= 0 and y.max() <= 1
    assert ((y - x).abs().amax((1, 2, 3)) > 0.1).all()
    assert not torch.equal(y, contrastive.augment(x, u.flip(0)))


def test_at_strength_zero_the_image_comes_back():
    u = torch.rand(6, contrastive.NUMBERS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(contrastive.augment(images(), u, strength=0), images(), atol=1e-5, rtol=0)


def test_numbers_in_the_middle_change_nothing():
    torch.testing.assert_close(contrastive.augment(images(), numbers()), images(), atol=1e-5, rtol=0)


def test_an_image_is_augmented_by_its_own_row_alone():
    x, u = images(), torch.rand(6, contrastive.NUMBERS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(contrastive.augment(x, u)[3:4], contrastive.augment(x[3:4], u[3:4]))


@pytest.mark.parametrize(("corner", "rows", "columns"), [((0, 0), (0, 16), (0, 16)), ((1, 1), (16, 32), (16, 32))])
def test_a_crop_is_the_part_of_the_image_at_twice_its_size(corner, rows, columns):
    ramp = torch.linspace(0, 1, 32)
    x = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.full((32, 32), 0.5)])[None]
    quarter = 0.75 / 0.7  # beyond the range that is drawn, so that the crop is a quarter: rows and columns 16 wide
    y = contrastive.augment(x, numbers(1, area=quarter, left=corner[0], top=corner[1]))
    part = x[:, :, slice(*rows), slice(*columns)]
    want = F.interpolate(part, size=(32, 32), mode="bilinear")
    inside = (slice(None), slice(None), slice(2, 30), slice(2, 30))  # the crop sees beyond its edge, `part` does not
    torch.testing.assert_close(y[inside], want[inside], atol=1e-5, rtol=0)


def test_a_flip_mirrors_left_and_right():
    torch.testing.assert_close(contrastive.augment(images(), numbers(flip=0)), images().flip(3), atol=1e-5, rtol=0)


def test_brightness_is_a_factor():
    x = images() / 2
    torch.testing.assert_close(contrastive.augment(x, numbers(brightness=0)), 0.6 * x, atol=1e-5, rtol=0)


def test_contrast_shrinks_towards_the_mean():
    mean = images().mean((1, 2, 3), keepdim=True)
    y = contrastive.augment(images(), numbers(contrast=0))
    torch.testing.assert_close(y, 0.6 * images() + 0.4 * mean, atol=1e-5, rtol=0)


def test_grey_and_saturation_blend_with_the_mean_of_the_channels():
    y = contrastive.augment(images(), numbers(grey=0))
    torch.testing.assert_close(y, grey(images()), atol=1e-5, rtol=0)
    y = contrastive.augment(images(), numbers(saturation=0))
    torch.testing.assert_close(y, 0.6 * images() + 0.4 * grey(images()), atol=1e-5, rtol=0)


def test_hue_turns_about_the_grey_axis():
    x = 0.4 + 0.2 * images()  # far enough from the range's ends
    y = contrastive.augment(x, numbers(hue=1))
    torch.testing.assert_close(grey(y), grey(x), atol=1e-5, rtol=0)
    before, after = (v - grey(v) for v in (x, y))
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), atol=1e-5, rtol=0)
    cosine = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(math.radians(36))), atol=1e-3, rtol=0)
    turned = contrastive.augment(grey(x), numbers(hue=1))
    torch.testing.assert_close(turned, grey(x), atol=1e-5, rtol=0)


# --- the loss -----------------------------------------------------------------------------------------------------


def test_nt_xent_of_identical_orthogonal_views():
    codes = torch.eye(8)
    want = math.log(math.exp(2) + 14) - 2  # one partner at cosine 1, fourteen others at 0, temperature 0.5
    torch.testing.assert_close(contrastive.nt_xent(codes, codes, 0.5), torch.full((8,), want))


def test_nt_xent_of_collapsed_codes_is_that_of_guessing():
    codes = torch.ones(8, 5)
    torch.testing.assert_close(contrastive.nt_xent(codes, codes, 0.2), torch.full((8,), math.log(15)))


def test_nt_xent_is_the_papers_sum_term_by_term():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double().unbind()
    z = torch.cat([a, b])

    def pair(i, j):
        similar = [math.exp(F.cosine_similarity(z[i], z[k], dim=0).item() / 0.3) for k in range(10)]
        return -math.log(similar[j] / (sum(similar) - similar[i]))

    want = [(pair(i, i + 5) + pair(i + 5, i)) / 2 for i in range(5)]
    torch.testing.assert_close(contrastive.nt_xent(a, b, 0.3), torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(contrastive.nt_xent(b, a, 0.3), torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(contrastive.nt_xent(3 * a, 7 * b, 0.3), torch.tensor(want, dtype=torch.float64))


def test_views_do_not_move_the_running_statistics():
    encoder = vae.Encoder(4).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    x = images(8)
    with contrastive.untracked(encoder):
        views = encoder(x)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    torch.testing.assert_close(views, encoder(x), atol=0, rtol=0)  # the batch's own statistics, as in training
    assert not torch.equal(encoder.features[3].running_mean, before["features.3.running_mean"])
    with pytest.raises(ZeroDivisionError), contrastive.untracked(encoder):
        raise ZeroDivisionError
    assert all(m.track_running_stats for m in encoder.modules() if hasattr(m, "track_running_stats"))


def test_the_term_compares_half_of_the_plain_images_code_with_its_views_in_float32():
    encoder, x = vae.Encoder(16).train(), images(8)
    u = draw(8, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        mu, _ = encoder(x)
        before = encoder.features[3].running_mean.clone()
        value = contrastive.term(encoder, x, mu, u)
        with contrastive.untracked(encoder):
            other, _ = encoder(contrastive.augment(x.double(), u.double()).float())  # double: no autocast
    assert value.dtype == torch.float32 and torch.equal(encoder.features[3].running_mean, before)
    torch.testing.assert_close(value, contrastive.nt_xent(mu[:, :8].float(), other[:, :8].float()), atol=0.02, rtol=0)


def test_descending_the_term_brings_unseen_views_together():
    torch.manual_seed(0)
    encoder = vae.Encoder(16).train()
    x = F.interpolate(torch.rand(32, 3, 4, 4), size=(32, 32), mode="bilinear")
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-3)
    values = []
    for step in range(12):
        value = contrastive.term(encoder, x, encoder(x)[0], draw(32, 0, step)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-3:]) / 3 < values[0] - 1


def test_numbers_are_a_function_of_seed_and_step():
    u = draw(5, 0, 3)
    assert torch.equal(u, draw(5, 0, 3)) and u.min() >= 0 and u.max() < 1
    assert not torch.equal(u, draw(5, 0, 4)) and not torch.equal(u, draw(5, 1, 3))


# --- in vae.py ----------------------------------------------------------------------------------------------------


def test_without_the_flag_a_run_is_the_plain_run_and_with_it_the_draws_are_the_same(
    in_tmp, image_folder, monkeypatch, no_figures, small_networks
):
    with monkeypatch.context() as patch:
        for name in ("draw", "augment", "term", "nt_xent"):  # nothing of the term is even touched
            patch.delattr(contrastive, name)
        train(image_folder, "--name", "plain", "--epochs", 1)
        train(image_folder, "--name", "off", "--epochs", 1, "--contrastive", 0)
    assert same(checkpoint("plain"), checkpoint("off")) and log("plain") == log("off")
    assert "contrast" not in log("plain")[0]

    train(image_folder, "--name", "on", "--epochs", 1, "--contrastive", 100)
    plain, on = log("plain")[0], log("on")[0]
    assert all(on[key] == plain[key] for key in ("nll", "kl", "mse"))  # the first step's images, flips and eps
    assert on["loss"] == pytest.approx(plain["loss"] + 100 * on["contrast"], rel=1e-6)
    mu = "encoder.mu.weight"
    assert not torch.equal(checkpoint("on")["model"][mu], checkpoint("plain")["model"][mu])
