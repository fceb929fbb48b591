"""fid.py and common/inception.py against pytorch-fid itself, known answers, and every kind of bad input.

pytest tests/test_fid.py

The official weights are not needed: the network has seeded random weights whose batch norm is calibrated on images
(benchmarks/fid.py), and pytorch-fid gets the same. What needs no Inception uses a tiny exported network.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.error
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import read_image, torchrun
from PIL import Image, ImageFilter

import fid
from benchmarks.fid import calibrated_weights, pytorch_fid
from common import data, images, inception, moments, shapes, streams
from common.runs import UserError

ROOT = Path(fid.__file__).parent
SCIPY = pytest.mark.filterwarnings("ignore:.*disp:DeprecationWarning")  # of sqrtm, which pytorch-fid calls
IMAGES = torch.from_numpy(shapes.make(96, seed=3))


class Tiny(torch.nn.Module):
    """uint8 (B, 3, H, W) -> (B, 12)."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 12, kernel_size=5, stride=2)

    def forward(self, x):
        return torch.relu(self.conv(x.float() / 255)).mean((2, 3))


class Thumbnail(torch.nn.Module):
    """uint8 (B, 3, H, W) of any size -> (B, 48)."""

    def forward(self, x):
        return torch.nn.functional.interpolate(x.float() / 255, size=(4, 4), mode="bilinear").flatten(1)


def export(path, module, batch=None):
    dynamic = None if batch else ({0: torch.export.Dim("B")},)
    example = torch.zeros(batch or 4, 3, 32, 32, dtype=torch.uint8)
    torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=dynamic), path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return export(tmp_path_factory.mktemp("features") / "tiny.pt2", Tiny())


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    calibrated_weights(path, IMAGES[:16].float() / 255)
    return path


@pytest.fixture(scope="session")
def random_inception(weights):
    return fid.load_extractor(weights)


@pytest.fixture(scope="session")
def theirs(weights):
    return pytorch_fid(weights)


def write(folder, pictures, blur=0.0, mixed=False):
    """uint8 images -> files; mixed: PNG and JPEG of four sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur))
        if mixed:
            image = image.resize([(32, 32), (48, 40), (311, 300), (64, 64)][i % 4], Image.Resampling.BICUBIC)
        image.save(folder / f"{i:03d}.{'jpg' if mixed and i % 3 == 0 else 'png'}")
    return folder


@pytest.fixture
def two(tmp_path):
    return write(tmp_path / "real", IMAGES[:20]), write(tmp_path / "fake", IMAGES[20:45], blur=1.0)


def turned(image, orientation):
    """EXIF that says how an image lies."""
    exif = image.getexif()
    exif[images.ORIENTATION] = orientation
    return exif


def run(capsys, *argv):
    """fid.py's own JSON, and what it said beside."""
    fid.main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return json.loads(out), err


def gaussians(dims, n, seed=0):
    """Two sets of n correlated feature vectors, not negative and not centred, as Inception's are."""
    g = np.random.default_rng(seed)
    mix = g.normal(size=(dims, dims)) * np.logspace(0, -2, dims) / math.sqrt(dims)
    return [np.maximum(g.normal(size=(n, dims)) @ mix + 0.3 + 0.05 * i, 0) * (1 + 0.1 * i) for i in range(2)]


def mean_and_covariance(x):
    return x.mean(0), np.cov(x, rowvar=False)


# --- against pytorch-fid ------------------------------------------------------------------------------------------


def test_features_of_mixed_files_are_pytorch_fids(tmp_path, random_inception, theirs):
    """Mean, covariance and distance on PNG and JPEG of four sizes: measured 1e-6, stated 1e-4."""
    folders = [write(tmp_path / name, part, mixed=True) for name, part in (("a", IMAGES[:8]), ("b", IMAGES[20:28]))]
    want = [theirs.statistics(folder, batch_size=1) for folder in folders]
    got = []
    for folder, (mu, sigma) in zip(folders, want, strict=True):
        files = fid.find_side(str(folder)).files
        got.append(fid.statistics(fid.batches(files, 5, fid.Counter()), random_inception))
        assert np.abs(got[-1][0].numpy() - mu).max() < 1e-4 * np.abs(mu).max()
        assert np.abs(got[-1][1].numpy() - sigma).max() < 1e-4 * np.abs(sigma).max()
    ours = fid.frechet_distance(*got[0][:2], *got[1][:2])
    assert ours > 1 and ours == pytest.approx(fid.frechet_distance(*want[0], *want[1]), rel=1e-4)


@SCIPY
@pytest.mark.slow
def test_the_whole_number_is_pytorch_fids(tmp_path, weights, theirs, capsys):
    folders = write(tmp_path / "a", IMAGES[:10]), write(tmp_path / "b", IMAGES[40:50], blur=1.0)
    result, _ = run(capsys, *folders, "--weights", weights)
    assert result["fd"] == pytest.approx(theirs.distance(*folders), rel=1e-4)


@SCIPY
@pytest.mark.parametrize("n", [400, 40])
def test_distance_is_pytorch_fids(n, theirs):
    """n = 400 vectors of 96 dimensions have covariances of full rank, n = 40 have not."""
    x, y = gaussians(96, n)
    want = theirs.frechet(*mean_and_covariance(x), *mean_and_covariance(y))
    assert fid.frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y)) == pytest.approx(
        want, rel=1e-8 if n > 96 else 1e-5
    )
    one_sided = theirs.frechet(*mean_and_covariance(x), *mean_and_covariance(gaussians(96, 400)[1]))
    assert fid.frechet_distance(*mean_and_covariance(x), *mean_and_covariance(gaussians(96, 400)[1])) == pytest.approx(
        one_sided, rel=1e-5
    )


def test_statistics_files_serve_both_ways(tmp_path, tiny, theirs, two, capsys):
    assert theirs.suffixes == {suffix[1:] for suffix in images.PYTORCH_FID_SUFFIXES}
    ours, other = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    fid.main(["--save-stats", str(two[0]), str(ours), "--features", str(tiny)])
    assert "Frechet distance (features" in capsys.readouterr().out
    mu, sigma = theirs.statistics(ours)
    np.savez_compressed(other, mu=mu, sigma=sigma)
    want, _ = run(capsys, *two, "--features", tiny)
    for file in (ours, other):
        result, err = run(capsys, file, two[1], "--features", tiny)
        assert result["fd"] == want["fd"] and ("does not say" in err) == (file is other)
    result, _ = run(capsys, ours, other)  # no network, no weights
    assert result["fd"] == pytest.approx(0, abs=1e-12) and result["n"] == [20, None]
    another = shutil.copy(other, tmp_path / "another.npz")
    result, err = run(capsys, other, another)  # perhaps Inception's, perhaps not
    assert "fd" in result and result["name"] == "Frechet distance (of unnamed statistics)"
    assert err.count("does not say of which network it is, and is taken to be of the other's") == 2


def test_alpha_gray_and_palette_are_converted_as_pytorch_fid_does_with_a_word(tmp_path, tiny, theirs, capsys):
    folder, image = tmp_path / "images", Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy())
    folder.mkdir()
    for mode in ("RGB", "L", "LA", "RGBA", "P", "1", "CMYK"):
        changed = image.convert(mode)
        if mode in ("RGBA", "LA"):
            changed.putalpha(image.convert("L"))
        changed.save(folder / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    image.convert("RGBA").save(folder / "turned.webp", exif=turned(image, 6), lossless=True)
    image.save(folder / "turned.jpg", exif=turned(image, 6))
    (folder / "bits.ppm").write_bytes(b"P1 32 32\n" + b"0 1 " * 512)
    files = fid.find_side(str(folder)).files
    want = theirs.read(files)
    got = [read_image(file, images.as_pytorch_fid).pixels for file in files]
    assert all((pixels == w.numpy()).all() for pixels, w in zip(got, want, strict=True))
    _, err = run(capsys, folder, folder, "--features", tiny)
    assert "converted to RGB" in err and "1 of mode RGBA" in err and "1 of mode L," in err
    assert "2 with an EXIF orientation" in err


# --- known answers ------------------------------------------------------------------------------------------------


def test_two_gaussians_have_the_closed_form():
    mu1, mu2, s1, s2 = (torch.tensor(v, dtype=torch.float64) for v in ([0, 1, 2], [1, 1, 0], [1, 4, 9], [4, 4, 1]))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    got = fid.frechet_distance(mu1, turn @ s1.diag() @ turn.T, mu2, turn @ s2.diag() @ turn.T)
    assert got == pytest.approx(5 + 1 + 0 + 4, rel=1e-12)  # |mu1 - mu2|^2 + sum (sqrt s1 - sqrt s2)^2
    assert fid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1, rel=1e-12)


@pytest.mark.parametrize("n", [300, 97, 96, 50, 2])
def test_equal_sets_are_at_zero(n):
    x, y = gaussians(96, n)
    mu, sigma = mean_and_covariance(x)
    assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-9 * np.trace(sigma)
    mu2, sigma2 = mean_and_covariance(y)
    shifted = fid.frechet_distance(mu, sigma, mu + 2, sigma)
    assert shifted == pytest.approx(4 * 96, rel=1e-9)
    there, back = fid.frechet_distance(mu, sigma, mu2, sigma2), fid.frechet_distance(mu2, sigma2, mu, sigma)
    assert there == pytest.approx(back, rel=1e-9)


def test_constant_features_have_a_distance():
    zero = np.zeros((5, 5))
    assert fid.frechet_distance(np.zeros(5), zero, np.ones(5), zero) == 5
    assert fid.frechet_distance(np.zeros(5), zero, np.ones(5), np.eye(5)) == pytest.approx(10)


def test_statistics_are_numpys_also_far_from_zero():
    """Features with a mean 1e6 times their spread: 1e-9 of the covariance, where sums about zero lose all of it."""

    class Far:
        device, fast, name, recipe = torch.device("cpu"), None, "far", "far"

        def __call__(self, groups):
            return torch.cat(groups).double()[:, :, 0, :4].mean(1) / 255 + 1e6

    pixels = torch.randint(0, 256, (300, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mu, sigma, n = fid.statistics(pixels, Far(), batch_size=7)
    x = (pixels.double()[:, :, 0].mean(1) / 255).numpy()
    assert n == 300 and mu.numpy() == pytest.approx(x.mean(0) + 1e6, rel=1e-15)
    assert sigma.numpy() == pytest.approx(np.cov(x, rowvar=False), rel=1e-7, abs=1e-9)


def test_the_number_depends_on_neither_batch_size_nor_order_nor_form(tiny, tmp_path):
    """1e-6 of the number, since float32 sums in another order; folders, tensors and iterators of batches agree."""
    extractor = fid.load_extractor(features=tiny)
    other = fid.statistics(IMAGES[60:], extractor)
    folder = write(tmp_path / "images", IMAGES[:60])
    pixels, shuffled = IMAGES[:60], IMAGES[:60][torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    files = fid.find_side(str(folder)).files
    forms = [fid.statistics(pixels, extractor, size) for size in (1, 7, 60, 100)]
    forms += [fid.statistics(shuffled, extractor), fid.statistics(iter(pixels.split(11)), extractor)]
    for workers in (1, 2, 5):
        with mock.patch("os.cpu_count", lambda workers=workers: workers):
            forms.append(fid.statistics(fid.batches(files, 13, fid.Counter()), extractor))
    values = [fid.frechet_distance(*form[:2], *other[:2]) for form in forms]
    assert all(form[2] == 60 for form in forms) and values[0] > 1e-4
    assert values == pytest.approx([values[0]] * len(values), rel=1e-6)


def test_inception_does_not_depend_on_batch_size(random_inception):
    values = []
    for size in (3, 8):
        a, b = (fid.statistics(part, random_inception, size) for part in (IMAGES[:8], IMAGES[20:28]))
        values.append(fid.frechet_distance(*a[:2], *b[:2]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_kernel_distance_does_not_depend_on_batch_size(tmp_path, capsys):
    """Its subsets go by the images' places, and in a batch those of one size are computed together."""
    inception.export(Thumbnail(), tmp_path / "any.pt2")
    folders = [write(tmp_path / name, part, mixed=True) for name, part in (("a", IMAGES[:48]), ("b", IMAGES[48:]))]
    flags = ("--kid", "--features", tmp_path / "any.pt2", "--batch-size")
    found = [run(capsys, *folders, *flags, size)[0] for size in (5, 25, 128)]
    for key in ("kid", "kid_stderr"):
        assert [result[key] for result in found] == pytest.approx([found[0][key]] * 3, rel=1e-4)


TORCHRUN = """
import sys

import torch

import fid
from common import ranks, runs, shapes

real, damaged, *others, tiny = sys.argv[1:]
flags = [*others, "--features", tiny]
fid.main([real, *flags])
images, extractor = torch.from_numpy(shapes.make(20, seed=3)), fid.load_extractor(features=tiny)
for _ in range(2):  # the second time the first process has them in its folder, and the others have not
    fid.cached_statistics(images, extractor, f"cache{ranks.rank()}", "x", keep=[])
runs.cli(lambda: fid.main([damaged, *flags]))
"""


@pytest.mark.slow
def test_torchrun_gives_the_same_numbers_and_the_same_sentence(tiny, two, tmp_path, capsys):
    grey = two[0] / "001.png"  # read by the second process alone, but the first one speaks
    Image.open(grey).convert("L").save(grey)
    want, said = run(capsys, *two, "--features", tiny, "--kid")
    damaged = shutil.copytree(two[0], tmp_path / "damaged")
    (damaged / "004.png").write_text("read by the second process alone")
    (tmp_path / "distances.py").write_text(TORCHRUN)
    done = torchrun(tmp_path, "distances.py", two[0], damaged, two[1], "--kid", "--json", "--device", "cpu", tiny, n=3)
    got = json.loads(done.stdout)
    assert got["fd"] == pytest.approx(want["fd"], rel=1e-6) and got["n"] == want["n"]
    assert (got["kid"], got["kid_stderr"]) == pytest.approx((want["kid"], want["kid_stderr"]), rel=1e-4)
    assert "1 of mode L" in said and "1 of mode L" in done.stderr
    assert done.returncode != 0 and "cannot read the image" in done.stderr and "004.png" in done.stderr
    assert done.stderr.count("distances.py: cannot read") == 1
    (cache,) = tmp_path.glob("cache*/fid_stats/*")
    features = fid.load_extractor(features=tiny)([torch.from_numpy(shapes.make(20, seed=3))])
    assert torch.allclose(moments.read_features(cache, 20), features, rtol=1e-5)


def test_parts_merge_to_the_whole():
    """What ranks hand in: unequal counts, each relative to its own shift, far from zero."""
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e5
    parts = []
    for part in x.split([20, 29, 1]):
        parts.append(moments.Sums())
        for batch in part.split(7):
            parts[-1].add(batch)
    mu, sigma, n = moments.merge(parts)
    assert n == 50 and torch.allclose(mu, x.mean(0), rtol=1e-14)
    assert torch.allclose(sigma, torch.cov(x.T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "size"), [(4, 2), (60, 6), (11_000, 1000)])
def test_kernel_distance_is_its_definition(n, size):
    """Two subsets of two images, ten or more of a tenth of them, but of no more than 1000."""
    x, y = (torch.randn(n, 3, generator=torch.Generator().manual_seed(i)) + i for i in range(2))
    other = ~np.eye(size, dtype=bool)  # pairs of two images

    def k(a, b):
        return (a.double().numpy() @ b.double().numpy().T / 3 + 1) ** 3

    with mock.patch.object(torch, "randperm", side_effect=lambda n, generator: torch.arange(n)) as shuffled:
        got, error = fid.kernel_distance(x, y)
    assert shuffled.call_count == 2
    subsets = list(zip(x.split(size), y.split(size), strict=True))
    want = [k(a, a)[other].mean() + k(b, b)[other].mean() - 2 * k(a, b).mean() for a, b in subsets]
    assert got == pytest.approx(np.mean(want))
    assert error == pytest.approx(np.std(want, ddof=1) / math.sqrt(len(want)))


def test_kernel_distance_is_unbiased_and_its_error_is_honest():
    """Equal distributions: the mean over 200 pairs of sets is 0 within its error, and the reported error fits."""
    results = []
    for i in range(200):
        g = torch.Generator().manual_seed(i)
        results.append(fid.kernel_distance(torch.rand(200, 8, generator=g), torch.rand(200, 8, generator=g), seed=i))
    values, errors = torch.tensor(results).T
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)
    assert errors.square().mean().sqrt() == pytest.approx(values.std(), rel=0.25)
    g = torch.Generator().manual_seed(0)
    value, error = fid.kernel_distance(torch.rand(2000, 8, generator=g), torch.rand(2000, 8, generator=g) + 0.1)
    assert value > 10 * error


def test_a_models_distances_are_both_kinds_and_the_test_images_features_are_computed_once(tmp_path, tiny, monkeypatch):
    extractor = fid.load_extractor(features=tiny)
    sets, test = {"made": IMAGES[:24], "floor": IMAGES[24:48]}, IMAGES[48:90]
    folder = tmp_path / "data"
    fid.cached_statistics(test, extractor, folder, "x-test")  # as an earlier version left it: without features
    found = fid.model_distances(sets, test, extractor, folder, "x-test")
    of_a_set = [f"fd_tiny_{name}{end}" for name in sets for end in ("", "_kid", "_kid_stderr")]
    assert set(found) == {*of_a_set, "fd_tiny_images", "fd_tiny_name"}
    for name, made in sets.items():
        kid, error = fid.kernel_distance(extractor([made]), extractor([test]))
        assert found[f"fd_tiny_{name}_kid"] == pytest.approx(kid, abs=1e-7)
        assert found[f"fd_tiny_{name}_kid_stderr"] == pytest.approx(error, abs=1e-7) and error > 0
        (mu, sigma, _), (real_mu, real_sigma, _) = (fid.statistics(x, extractor) for x in (made, test))
        distance = fid.frechet_distance(mu, sigma, real_mu, real_sigma)
        assert found[f"fd_tiny_{name}"] == pytest.approx(distance, rel=1e-9)

    seen, call = [], inception.Exported.__call__

    def spy(self, groups):
        seen.extend(len(group) for group in groups)
        return call(self, groups)

    monkeypatch.setattr(inception.Exported, "__call__", spy)
    assert fid.model_distances(sets, test, extractor, folder, "x-test") == found
    assert sum(seen) == 24  # those of the test images and of the floor come from the cache
    (path,) = (folder / "fid_stats").glob("x-test-[!f]*")
    assert moments.read(path)[0].n == 42 and moments.read_features(path, 42).shape == (42, 12)

    stats, recipe = moments.read(path)
    for features in ([torch.full((42, 12), math.inf)], [torch.zeros(41, 12)], [torch.zeros(42)], None):
        moments.write(path, stats, recipe, features)  # unfit ones are computed anew
        assert fid.model_distances(sets, test, extractor, folder, "x-test") == pytest.approx(found)
    path.write_bytes(path.read_bytes()[:-100])
    assert fid.model_distances(sets, test, extractor, folder, "x-test") == pytest.approx(found)


def test_three_images_have_a_frechet_distance_alone(tmp_path, tiny):
    extractor = fid.load_extractor(features=tiny)
    found = fid.model_distances({"made": IMAGES[:3]}, IMAGES[3:40], extractor, tmp_path, "x-test")
    assert set(found) == {"fd_tiny_made", "fd_tiny_images", "fd_tiny_name"}


def test_a_kernel_distance_of_three_images_is_refused_before_the_work(tmp_path, two, refused, monkeypatch):
    monkeypatch.setattr(fid, "load_extractor", mock.Mock(side_effect=AssertionError("the work has begun")))
    few = write(tmp_path / "few", IMAGES[:3])
    for sides in ((few, two[0]), (two[0], few), ("cifar10:test", few)):
        assert "at least 4 images on each side, and" in refused(fid.main, *sides, "--kid")
    write(few, IMAGES[:4])
    with pytest.raises(AssertionError, match="the work has begun"):
        fid.main([str(few), str(two[0]), "--kid"])


def test_kernel_distances_tell_a_shift_from_noise(tmp_path, tiny):
    extractor = fid.load_extractor(features=tiny)
    darker = (IMAGES[:48].float() * 0.2).to(torch.uint8)
    found = fid.model_distances({"same": IMAGES[:48], "dark": darker}, IMAGES[48:], extractor, tmp_path, "x-test")
    assert abs(found["fd_tiny_same_kid"]) < 3 * found["fd_tiny_same_kid_stderr"]
    assert found["fd_tiny_dark_kid"] > 5 * found["fd_tiny_dark_kid_stderr"]


# --- the network and its weights ----------------------------------------------------------------------------------


def test_official_weights_are_found_in_order_and_verified(weights, tmp_path, monkeypatch, capsys):
    """--weights, then $FID_WEIGHTS, then torch hub's cache; the name FID belongs to the official bytes alone."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("FID_WEIGHTS", "from-env.pth")
    assert inception.find_weights("given.pth") == Path("given.pth")
    assert inception.find_weights() == Path("from-env.pth")
    monkeypatch.delenv("FID_WEIGHTS")
    cached = tmp_path / "hub" / "checkpoints" / inception.WEIGHTS
    cached.parent.mkdir(parents=True)
    cached.write_bytes(weights.read_bytes())
    assert inception.find_weights() == cached
    with pytest.raises(UserError, match=f"{inception.WEIGHTS} is damaged.*95,628,359"):
        fid.load_extractor()
    sha256 = inception.read_file(weights, "")[1]
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", sha256)
    extractor = fid.load_extractor()
    assert extractor.name == "FID (pytorch-fid Inception, float32)" and extractor.key == "fid"
    assert "not an FID" not in capsys.readouterr().err


def test_other_weights_are_no_fid(random_inception, weights, capsys):
    found = random_inception
    assert "FID" not in found.name and found.key == "fd" and found.dims == 2048
    inception.Inception(weights, torch.device("cpu"))
    assert "does not hold the official weights: the number is not an FID" in capsys.readouterr().err


def test_torch_fidelitys_copy_of_the_weights_serves_when_its_bytes_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(b"the official bytes").hexdigest())
    fetched = mock.Mock(side_effect=urllib.error.URLError("no route"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetched)
    copy = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"the official bytes")
    assert inception.find_weights() == copy and not fetched.called
    copy.write_bytes(b"other bytes")
    with pytest.raises(UserError, match="could not be downloaded"):
        inception.find_weights()
    assert f"{copy} does not hold the official weights" in capsys.readouterr().err and fetched.called


def test_weights_that_cannot_be_had_are_explained(tmp_path, monkeypatch, refused, two):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("FID_WEIGHTS", raising=False)

    def offline(url, path, sha256):
        assert url.endswith(inception.WEIGHTS) and sha256 == inception.WEIGHTS_SHA256
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = refused(fid.main, *two)
    assert inception.WEIGHTS in message and "95,628,359" in message and str(tmp_path) in message


def test_wrong_weights_are_refused(tmp_path, two, refused, monkeypatch):
    for name, content in (("text.pth", b"no weights"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.pth", "empty.pth", "other.pth", "list.pth"):
        with pytest.raises(UserError, match=f"{name} does not hold weights"):
            fid.load_extractor(tmp_path / name)
    assert "missing.pth" in refused(fid.main, *two, "--weights", tmp_path / "missing.pth")
    monkeypatch.setattr(Path, "read_bytes", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert "other.pth: Permission denied" in refused(fid.main, *two, "--weights", tmp_path / "other.pth")


@pytest.mark.slow
def test_fast_mode_says_what_it_costs(tmp_path, weights, capsys):
    folders = write(tmp_path / "a", IMAGES[:3]), write(tmp_path / "b", IMAGES[20:23], blur=1.0)
    result, err = run(capsys, *folders, "--weights", weights, "--fast", "bf16")
    assert (
        "bf16" in result["name"] and "over 3 images against 3 --fast bf16 gives" in err and result["checked"] == [3, 3]
    )
    assert result["checked_fast"] != result["checked_reference"]
    assert result["checked_fast"] == pytest.approx(result["checked_reference"], rel=0.1)


def test_statistics_by_the_fast_mode_come_with_a_word(tmp_path, tiny, two, monkeypatch, capsys):
    monkeypatch.setattr(fid, "load_extractor", lambda *_: inception.Exported(tiny, torch.device("cpu")))
    for name, flags, words in (("exact", (), 0), ("fast", ("--fast", "bf16"), 1)):
        fid.main(["--save-stats", str(two[0]), str(tmp_path / f"{name}.npz"), *flags])
        assert capsys.readouterr().err.count("what --fast bf16 changes was not measured") == words


def test_precision_is_set_for_the_network_and_put_back():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    with fid.precision("tf32"):
        assert cudnn.allow_tf32
        with fid.precision(None):
            assert not cudnn.allow_tf32
    assert cudnn.allow_tf32 == before


def test_exported_programs_of_any_and_of_fixed_batch_agree(tmp_path, tiny):
    torch.manual_seed(0)
    fixed = fid.load_extractor(features=export(tmp_path / "fixed.pt2", Tiny(), batch=8))
    values = [
        fid.statistics(IMAGES[:21], e, size)[1] for e in (fid.load_extractor(features=tiny), fixed) for size in (5, 20)
    ]
    assert all(torch.allclose(value, values[0], rtol=1e-5, atol=1e-9) for value in values)
    assert "fixed.pt2" in fixed.name and "FID" not in fixed.name + fixed.recipe


def test_unfit_programs_are_refused(tmp_path, tiny, two, refused):
    (tmp_path / "text.pt2").write_text("no program")
    assert "text.pt2 is no program of torch.export" in refused(fid.main, *two, "--features", tmp_path / "text.pt2")
    assert "gone.pt2" in refused(fid.main, *two, "--features", tmp_path / "gone.pt2")
    flat = export(tmp_path / "flat.pt2", torch.nn.Sequential(torch.nn.Identity()))
    assert "4-dimensional" in refused(fid.main, *two, "--features", flat)
    write(two[0], torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
    assert "40x40" in refused(fid.main, *two, "--features", tiny)
    assert "omit --weights and --fast" in refused(fid.main, *two, "--features", tiny, "--fast", "bf16")
    assert "CUDA" in refused(fid.main, *two, "--fast", "tf32", "--device", "cpu")


class Poisoned(torch.nn.Module):
    def forward(self, x):
        return torch.log(x.float().mean((2, 3)) - 300)


def test_features_that_are_not_finite_are_refused(tmp_path, two, refused):
    message = refused(fid.main, *two, "--features", export(tmp_path / "nan.pt2", Poisoned()))
    assert "nan.pt2" in message and "not finite" in message and str(two[0]) in message


# --- what is compared ---------------------------------------------------------------------------------------------

DEEP = ("16-bit gray", "16-bit colour", "16-bit ppm", "10-bit plain ppm", "float")


def png16(path):
    """A 16-bit RGB image, which Pillow reads but cannot write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(range(48)) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def bad_image(kind, folder):
    path = folder / "500.png"
    if kind == "truncated":
        path.write_bytes((folder / "000.png").read_bytes()[:-400])
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "16-bit gray":
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(path)
    elif kind == "16-bit colour":
        png16(path)
    elif kind == "16-bit ppm":
        path = folder / "500.ppm"
        path.write_bytes(b"P6 8 8 65535\n" + bytes(8 * 8 * 6))
    elif kind == "10-bit plain ppm":
        path = folder / "500.ppm"
        path.write_bytes(b"P3 8 8 1023\n" + b"1000 " * (8 * 8 * 3))
    elif kind == "float":
        path = folder / "500.tif"
        Image.fromarray(np.ones((8, 8), np.float32)).save(path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", *DEEP])
def test_a_bad_image_is_named(kind, two, tiny, refused):
    path = bad_image(kind, two[0])
    message = refused(fid.main, *two, "--features", tiny)
    assert str(path) in message
    assert ("8 bits" in message) == (kind in DEEP)


def test_an_unreadable_image_or_folder_is_named(two, tiny, refused, monkeypatch):
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied", "secret"))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", denied)
        message = refused(fid.main, *two, "--features", tiny)
        assert "000.png" in message and "Permission denied" in message
    (two[0] / "inner").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        assert "cannot read secret: Permission denied" in refused(fid.main, *two, "--features", tiny)


def test_folders_without_two_images_are_refused(tmp_path, two, tiny, refused):
    empty, others, single = tmp_path / "empty", tmp_path / "others", tmp_path / "single"
    for folder in (empty, others, single):
        folder.mkdir()
    (others / "notes.txt").write_text("hello")
    (others / "a.npy").write_text("hello")
    write(single, IMAGES[:1])
    assert "it is empty" in refused(fid.main, empty, two[0], "--features", tiny)
    assert "only .npy, .txt" in refused(fid.main, two[0], others, "--features", tiny)
    assert "only one image" in refused(fid.main, two[0], single, "--features", tiny)
    assert "gone does not exist" in refused(fid.main, tmp_path / "gone", two[0], "--features", tiny)
    assert "notes.txt is a file" in refused(fid.main, others / "notes.txt", two[0], "--features", tiny)
    assert "cifar10:test" in refused(fid.main, "cifar10:valid", two[0], "--features", tiny)
    with pytest.raises(UserError, match="fewer than 2 images"):
        fid.statistics(IMAGES[:1], fid.load_extractor(features=tiny))
    with pytest.raises(ValueError, match="uint8"):
        fid.statistics(IMAGES[:2].float(), fid.load_extractor(features=tiny))


def test_unfit_statistics_are_refused(tmp_path, two, tiny, refused, capsys):
    good = dict(mu=np.zeros(12), sigma=np.eye(12))
    files = {
        "keys": dict(mean=np.zeros(12)),
        "shape": dict(mu=np.zeros(12), sigma=np.eye(11)),
        "nan": good | dict(mu=np.full(12, np.nan)),
        "dims": dict(mu=np.zeros(7), sigma=np.eye(7)),
        "recipe": good | dict(n=10, recipe="something else"),
        "words": dict(mu=np.array(["a"] * 12), sigma=np.eye(12)),
    }
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "text.npz").write_text("not a zip")
    (tmp_path / "short.npz").write_bytes((tmp_path / "dims.npz").read_bytes()[:200])
    reasons = dict(keys="has no 'mu'", shape="not a finite vector", nan="not a finite vector", text="not a readable")
    for name, reason in (reasons | dict(recipe="another recipe", short="not a readable", words="not a")).items():
        message = refused(fid.main, tmp_path / f"{name}.npz", two[1], "--features", tiny)
        assert f"{name}.npz" in message and reason in message
    with pytest.raises(UserError, match="7 dimensions and .*12"):
        fid.main([str(tmp_path / "dims.npz"), str(two[1]), "--features", str(tiny)])
    capsys.readouterr()
    assert "give the folder" in refused(fid.main, tmp_path / "dims.npz", two[1], "--kid", "--features", tiny)
    assert "not there yet" in refused(fid.main, "--save-stats", two[1], tmp_path / "dims.npz", "--features", tiny)
    assert "ends in .npz" in refused(fid.main, "--save-stats", two[1], tmp_path / "stats", "--features", tiny)
    assert "no distance" in refused(fid.main, "--save-stats", two[1], tmp_path / "new.npz", "--json")
    assert "need no network" in refused(fid.main, tmp_path / "dims.npz", tmp_path / "nan.npz", "--features", tiny)


def test_statistics_of_other_dimensions_are_refused_before_images_are_read(tmp_path, weights, two):
    np.savez(tmp_path / "dims.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(UserError, match="dims.npz has 7 dimensions, not 2048"):
        fid.main([str(two[0]), str(tmp_path / "dims.npz"), "--weights", str(weights)])


def test_folders_are_searched_through_in_any_case_of_suffix(tmp_path, two, tiny, capsys):
    deep = tmp_path / "tree" / "a" / "b"
    deep.mkdir(parents=True)
    for i, file in enumerate(sorted(two[0].iterdir())):
        file.rename((deep if i % 2 else tmp_path / "tree") / f"{i:03d}.{['PNG', 'png', 'Png'][i % 3]}")
    (deep / "notes.txt").write_text("beside images, other files are passed over")
    result, _ = run(capsys, tmp_path / "tree", two[1], "--features", tiny)
    assert result["n"] == [20, 25]


def test_some_images_of_a_folder_are_of_every_class(in_tmp, tiny):
    """For --fast's check: by name the first images would all be of one."""
    for name, colour in (("black", 0), ("white", 255)):
        write(in_tmp / "classes" / name, torch.full((20, 3, 32, 32), colour, dtype=torch.uint8))
    side, kept = fid.find_side("classes"), []
    found = fid.measure(side, fid.load_extractor(features=tiny), in_tmp, keep=kept, limit=10)
    assert found.n == 10 and torch.cat(kept).std(0).max() > 0.01


def test_the_same_path_twice_gives_zero_with_a_word(two, tiny, capsys):
    result, err = run(capsys, two[0], f"{two[0]}/", "--features", tiny, "--kid")
    assert "same" in err and result["fd"] == pytest.approx(0, abs=1e-12) and result["kid"] == 0


def test_few_images_are_warned_about(two, tiny, capsys, tmp_path):
    few = write(tmp_path / "few", IMAGES[:12])
    _, err = run(capsys, few, two[0], "--features", tiny)
    assert "few has 12 images" in err and "real has" not in err


def test_named_sets_are_cached_by_images_and_recipe(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, *_: (IMAGES[:40] if name == "shapes" else IMAGES[40:], None))
    argv = ("shapes:test", "cifar10:test", "--data-dir", tmp_path / "data", "--features", tiny)
    first, _ = run(capsys, *argv)
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "data" / "fid_stats").iterdir())
    assert names == ["cifar10-test", "shapes-test"]
    with mock.patch.object(inception.Exported, "__call__", side_effect=AssertionError("not from the cache")):
        assert run(capsys, *argv)[0]["fd"] == first["fd"]
        torch.manual_seed(1)
        other = export(tmp_path / "other.pt2", Tiny())
        with pytest.raises(AssertionError, match="not from the cache"):
            run(capsys, *argv[:-1], other)
    for path in (tmp_path / "data" / "fid_stats").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert run(capsys, *argv)[0]["fd"] == pytest.approx(first["fd"], rel=1e-12)


def test_statistics_with_a_flipped_byte_are_refused_or_read_as_they_were(tmp_path):
    """Wherever in the file: the archive's directory, an array's header, or its compressed numbers."""
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).double()
    path, damaged = tmp_path / "whole.npz", tmp_path / "damaged.npz"
    moments.write(path, moments.Statistics(x.mean(0), torch.cov(x.T), 9), "a recipe", [x.float()])
    whole = path.read_bytes()

    def statistics(file):
        (mu, sigma, n), recipe = moments.read(file)
        return mu.tolist(), sigma.tolist(), n, recipe

    def features(file):
        return moments.read_features(file, 9).tolist()

    for read in (statistics, features):
        want = read(path)
        for place in range(0, len(whole), 7):
            damaged.write_bytes(whole[:place] + bytes([255 - whole[place]]) + whole[place + 1 :])
            with contextlib.suppress(UserError):
                assert read(damaged) == want, place


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, *_: (IMAGES[:40] if name == "shapes" else IMAGES[40:], None))
    (tmp_path / "file").write_text("no folder")
    argv = ("shapes:test", "cifar10:test", "--features", tiny, "--data-dir")
    want, _ = run(capsys, *argv, tmp_path / "data")
    got, err = run(capsys, *argv, tmp_path / "file")
    assert got["fd"] == want["fd"] and err.count("will be measured again next time: cannot write") == 2


def test_a_place_for_statistics_is_tried_before_the_work(tmp_path, two, refused, monkeypatch):
    monkeypatch.setattr(fid, "load_extractor", mock.Mock(side_effect=AssertionError("the work has begun")))
    (tmp_path / "file").write_text("no folder")
    message = refused(fid.main, "--save-stats", two[0], tmp_path / "file" / "stats.npz")
    assert "cannot write" in message and "a file stands where a folder is needed" in message
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(tempfile, "TemporaryFile", mock.Mock(side_effect=denied))
    message = refused(fid.main, "--save-stats", two[0], tmp_path / "stats.npz")
    assert "Permission denied; choose a place that you may write to" in message


def test_links_are_followed_pipes_and_hidden_files_passed_over(tmp_path, two, tiny, capsys):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "real").symlink_to("../real")
    (tmp_path / "links" / "fake").symlink_to("../fake")
    (tmp_path / "links" / "loop").symlink_to(".")
    (tmp_path / "links" / "__MACOSX").mkdir()
    os.mkfifo(tmp_path / "links" / "pipe.png")
    (two[0] / "._000.png").write_bytes(b"no image")
    (two[0] / "000.gif").write_bytes(b"pytorch-fid reads none")
    result, err = run(capsys, tmp_path / "links", two[1], "--features", tiny)
    assert result["n"] == [45, 25]
    words = "1 .gif, 1 __MACOSX, 1 hidden, 1 link(s) to a folder that is read already, 1 no regular file"
    assert f"links: passed over: {words}" in err


def test_large_images_are_measured_a_few_at_a_time(tiny, tmp_path, monkeypatch):
    """Bounds of a few images change neither order nor number."""
    files = fid.find_side(str(write(tmp_path / "images", IMAGES[:40]))).files
    extractor = fid.load_extractor(features=tiny)
    want = fid.statistics(IMAGES[:40], extractor)
    monkeypatch.setattr(images, "BYTES", 10 * 3 * 32 * 32)
    monkeypatch.setattr(inception, "PIXELS_AT_ONCE", 2 * 3 * 32 * 32)
    sizes = []
    monkeypatch.setattr(extractor, "run", lambda part, run=extractor.run: sizes.append(len(part)) or run(part))
    got = fid.statistics(fid.batches(files, 25, fid.Counter()), extractor)
    assert max(sizes) == 2 and sum(sizes) == 40
    assert torch.allclose(got.mu, want.mu, rtol=1e-6) and torch.allclose(got.sigma, want.sigma, rtol=1e-5, atol=1e-12)


def test_too_little_memory_is_told_from_an_unfit_program(two, tiny, refused, monkeypatch):
    words = (
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    monkeypatch.setattr(torch.nn.functional, "pad", mock.Mock(side_effect=RuntimeError(words)))
    message = refused(fid.main, *two, "--features", tiny)
    assert "too little free memory" in message and "--batch-size" in message


@pytest.mark.slow
def test_streams_that_fail_cost_no_number(two, tiny, tmp_path):
    """An output in cp1252, a closed stderr and python -OO at once: the number, with escapes, and status 0."""
    folder = two[0].rename(tmp_path / "été 图")
    words = [sys.executable, "-OO", str(ROOT / "fid.py"), str(folder), str(two[1]), "--features", str(tiny)]
    line = " ".join(f"'{word}'" for word in words) + " --device cpu 2>&-"
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, env=env, timeout=300)
    assert done.returncode == 0 and "été \\u56fe (20 images)" in done.stdout.decode("cp1252")


def test_a_pipe_that_nobody_reads_falls_silent(monkeypatch):
    ends = os.pipe()
    os.close(ends[0])
    monkeypatch.setattr(sys, "stdout", open(ends[1], "w"))
    monkeypatch.setattr(sys, "stderr", None)  # closed when the process began
    streams.prepare()
    with sys.stdout.stream, sys.stderr.stream:  # closing would raise if anything were left to write
        for _ in range(3):
            print("word " * 10_000)
            print("note", file=sys.stderr, flush=True)
        sys.stdout.flush()


def test_the_real_cifar10_serves_by_name(cifar_dir, tmp_path, tiny, two, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-batches-py").symlink_to(cifar_dir / "cifar-10-batches-py")
    result, _ = run(capsys, "cifar10:test", two[0], "--features", tiny, "--data-dir", tmp_path / "data")
    assert result["n"] == [10_000, 20] and result["fd"] > 0


def test_the_line_names_the_features_and_never_says_fid(two, tiny, capsys):
    fid.main([*map(str, two), "--features", str(tiny), "--kid"])
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "tiny.pt2" in line and "FID" not in line and "+-" in line and "20 images" in line


def test_a_bad_input_ends_a_process_with_status_2_and_one_sentence(command):
    done = command("fid.py", "gone", "gone")
    assert done.returncode == 2 and done.stdout == ""
    want = "fid.py: gone does not exist: give a folder, an .npz, or a data set such as cifar10:test"
    assert done.stderr.strip() == want
