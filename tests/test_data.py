"""data.py: known bytes, known pixels, and one sentence for each way in which data can be missing or broken.

pytest tests/test_data.py
"""

import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

import vae
from common import data, pictures, shapes
from common.runs import UserError


def test_shapes_have_the_published_bytes(shapes_dir):
    for split, n in (("train", 50_000), ("test", 10_000)):
        images, labels = data.load("shapes", shapes_dir, split)
        assert images.shape == (n, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == [n // 10] * 10
        assert hashlib.sha256(images.numpy()).hexdigest() == shapes.SHA256[split]


def test_shapes_depend_on_the_seed_and_the_class():
    a, b, c = shapes.make(20, seed=0), shapes.make(20, seed=0), shapes.make(20, seed=5)
    assert (a == b).all() and not (a == c).all()
    assert len({image.tobytes() for image in a}) == 20


def test_a_damaged_cache_of_shapes_is_made_anew(shapes_dir, tmp_path):
    good = (shapes_dir / "shapes-test.npy").read_bytes()
    for broken in (good[:1000], good[:-1] + bytes([good[-1] ^ 1]), b""):
        (tmp_path / "shapes-test.npy").write_bytes(broken)
        data.load("shapes", tmp_path, "test")
        assert (tmp_path / "shapes-test.npy").read_bytes() == good


@pytest.mark.slow
def test_shapes_are_hard_for_a_linear_classifier_on_pixels(shapes_dir):
    (x, y), (x_test, y_test) = [data.load("shapes", shapes_dir, split) for split in ("train", "test")]
    x, y, x_test = x[:20_000].flatten(1) / 255 - 0.5, y[:20_000], x_test.flatten(1) / 255 - 0.5
    target = torch.nn.functional.one_hot(y).float() - 0.1
    weight = torch.linalg.solve(x.T @ x + 100 * torch.eye(3072), x.T @ target)  # ridge regression on the classes
    accuracy = ((x_test @ weight).argmax(1) == y_test).float().mean().item()
    assert 0.12 < accuracy < 0.60  # above chance, so the labels mean something


def test_batch_converts_and_flips():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    x = data.batch(images, torch.tensor([1, 0, 1]), torch.tensor([False, True, True]))
    assert x.dtype == torch.float32
    assert torch.equal(x[0] * 255, images[1].float())
    assert torch.equal(x[1] * 255, images[0].flip(2).float())
    assert torch.equal(x[2] * 255, images[1].flip(2).float())
    assert data.batch(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.tensor([0])).max() == 1


def test_holdout_and_limit_take_disjoint_training_images(shapes_dir):
    args = vae.parse_args(["--data", "shapes", "--data-dir", str(shapes_dir), "--holdout", "100", "--limit", "300"])
    train, _, held, _ = data.splits(args, "cpu")
    whole, _ = data.load("shapes", shapes_dir, "train")
    assert torch.equal(train, whole[:300]) and torch.equal(held, whole[-100:])


def test_cifar10_is_the_official_one(cifar_dir):
    images, labels = data.load("cifar10", cifar_dir, "train")
    assert images.shape == (50_000, 3, 32, 32) and labels.bincount().tolist() == [5000] * 10
    mean = images.double().mean((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    test, labels = data.load("cifar10", cifar_dir, "test")
    assert test.shape == (10_000, 3, 32, 32) and labels[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane


def test_folder_with_classes_is_split_and_labelled(image_folder):
    train, labels = data.load(str(image_folder), "unused", "train")
    test, _ = data.load(str(image_folder), "unused", "test")
    assert len(train) == 60 and len(test) == 12
    assert set(labels.tolist()) == {0, 1}
    bright = train.float().mean((1, 2, 3)) > 127
    assert torch.equal(bright.long(), labels)
    both = {bytes(image.numpy().tobytes()) for image in torch.cat([train, test])}
    assert len(both) == 72  # no image in both


def test_folder_with_train_and_test_keeps_them(tmp_path):
    for split, n in (("train", 3), ("test", 2)):
        for i in range(n):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.new("RGB", (50, 40), (i, 0, 0)).save(tmp_path / split / f"{i}.JPG", "JPEG")
    assert len(data.load(str(tmp_path), "unused", "train")[0]) == 3
    assert len(data.load(str(tmp_path), "unused", "test")[0]) == 2


def test_read_image_takes_the_centred_square(tmp_path):
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = (200, 100, 50)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = data.read_image(tmp_path / "wide.png")
    assert image.shape == (3, 32, 32)
    assert (image[:, :, 1:-1] == np.array([200, 100, 50])[:, None, None]).all()


def test_unreadable_files_are_named(image_folder):
    (image_folder / "class0" / "00.png").write_text("not an image")
    whole = (image_folder / "class1" / "01.png").read_bytes()
    (image_folder / "class1" / "01.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(image_folder / "class1" / "03.png")
    with pytest.raises(UserError) as error:
        data.load(str(image_folder), "unused", "train")
    assert all(name in str(error.value) for name in ("00.png", "01.png", "03.png"))


def test_missing_or_empty_folders(tmp_path):
    with pytest.raises(UserError, match="neither cifar10, shapes nor a folder"):
        data.load(str(tmp_path / "nowhere"), "unused", "train")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="found 0 train images"):
        data.load(str(tmp_path), "unused", "train")


def test_cifar10_that_cannot_be_had_says_where_to_put_it(tmp_path, monkeypatch):
    CIFAR10 = data.import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"cut short")  # an archive of another MD5 does not help
    with pytest.raises(UserError) as error:
        data.load("cifar10", tmp_path, "train")
    for word in (str(tmp_path / "cifar-10-python.tar.gz"), "c58f30108f718f92721af3b95e74349a", "--data shapes"):
        assert word in str(error.value)


def test_a_truncated_or_missing_cifar_batch_is_named(tmp_path, monkeypatch):
    CIFAR10 = data.import_torchvision().datasets.CIFAR10
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    content = b"a batch"
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", hashlib.md5(content).hexdigest()]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashlib.md5(content).hexdigest()]])
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError, match="test_batch is missing"):
        data.load("cifar10", tmp_path, "train")
    (folder / "test_batch").write_bytes(content[:-1])
    with pytest.raises(UserError, match="test_batch is damaged"):
        data.load("cifar10", tmp_path, "train")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match="batches.meta is missing"):
        data.load("cifar10", tmp_path, "train")


def test_written_images_come_back_and_replace_older_ones(tmp_path):
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    pictures.write_images(torch.zeros(9, 3, 32, 32, dtype=torch.uint8), tmp_path / "out")
    pictures.write_images(images, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [f"{i:05d}.png" for i in range(5)]
    assert os.listdir(tmp_path) == ["out"]
    back = [data.read_image(tmp_path / "out" / f"{i:05d}.png") for i in range(5)]
    assert torch.equal(torch.from_numpy(np.stack(back)), images)


def test_writing_images_to_a_full_disk_keeps_the_old_ones(tmp_path, monkeypatch):
    old = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pictures.write_images(old, tmp_path / "out")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        pictures.write_images(old + 1, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"] and len(os.listdir(tmp_path / "out")) == 2


def test_rows_of_sets_alternate_and_a_rest_is_left_out(monkeypatch):
    seen = {}
    monkeypatch.setattr(data, "plot_grid", lambda images, path, title, columns: seen.update(x=images, columns=columns))
    first = torch.arange(35, dtype=torch.uint8).view(35, 1, 1, 1).expand(35, 3, 32, 32)
    pictures.plot_rows([first, first + 100], "unused.png", "unused")
    values = seen["x"][:, 0, 0, 0].tolist()
    assert values == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)] and seen["columns"] == 16
    pictures.plot_rows([first[:12], first[:12] + 100], "unused.png", "unused")
    assert seen["x"][:, 0, 0, 0].tolist() == [*range(12), *range(100, 112)] and seen["columns"] == 12


@pytest.mark.parametrize("size", [32, 31])
def test_high_frequency_energy_of_known_images(size):
    noise = torch.randint(0, 256, (300, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # white noise has as much energy at every frequency: by Parseval, the share of frequencies above the cut
    frequency = torch.fft.fftfreq(size)
    share = (torch.hypot(frequency[:, None], frequency[None, :]) > 0.25).float().mean().item()
    expected = share * (noise.float() / 255).var().item()
    assert data.high_frequency_energy(noise) == pytest.approx(expected, rel=0.01)
    assert data.high_frequency_energy(torch.full((2, 3, size, size), 200, dtype=torch.uint8)) < 1e-9
    slow = 128 + 100 * torch.sin(2 * torch.pi * 4 * torch.arange(32) / 32)  # 0.125 cycles per pixel
    assert data.high_frequency_energy(slow.round().to(torch.uint8).expand(1, 3, 32, 32)) < 1e-5
    checks = 255 * (torch.arange(32)[:, None] + torch.arange(32)[None, :]).remainder(2)
    assert data.high_frequency_energy(checks.to(torch.uint8).expand(1, 3, 32, 32)) == pytest.approx(0.25)
