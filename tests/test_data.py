"""common/data.py, folders.py and images.py: known bytes, known pixels, what is understood of a person's own folder, and
one sentence for each way in which data can be missing or broken.

pytest tests/test_data.py
"""

import argparse
import errno
import functools
import hashlib
import http.server
import os
import pickle
import shutil
import tarfile
import threading
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import read_image
from PIL import Image

from common import data, folders, images, pictures, runs, shapes
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
    found = split("shapes", data_dir=shapes_dir, holdout=100, limit=300)
    whole, _ = data.load("shapes", shapes_dir, "train")
    assert torch.equal(found.images, whole[:300]) and torch.equal(found.test, whole[-100:])
    assert found.classes == shapes.CLASSES and found.fingerprint == "shapes"


def test_cifar10_is_the_official_one(cifar_dir):
    images, labels = data.load("cifar10", cifar_dir, "train")
    assert images.shape == (50_000, 3, 32, 32) and labels.bincount().tolist() == [5000] * 10
    mean = images.double().mean((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    test, labels = data.load("cifar10", cifar_dir, "test")
    assert test.shape == (10_000, 3, 32, 32) and labels[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane


# --- a person's own folder ----------------------------------------------------------------------------------------

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30), "white": (220, 220, 220)}


def split(folder, labelled=False, holdout=0, limit=None, data_dir="unused"):
    args = argparse.Namespace(data=str(folder), data_dir=data_dir, holdout=holdout, limit=limit)
    return data.splits(args, "cpu", labelled)


def paint(folder, colour, n):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (32, 32), COLOURS[colour]).save(folder / f"{i:03d}.png")


def paint_classes(root, n=8, colours=COLOURS):
    for colour in colours:
        paint(root / colour, colour, n)


def named(found, images, labels):
    """The class that each image was given, and the colour that it has."""
    colour = {value: name for name, value in COLOURS.items()}
    return [
        (found.classes[label], colour[tuple(image[:, 0, 0].tolist())])
        for image, label in zip(images, labels.tolist(), strict=True)
    ]


def all_right(found):
    """Whether every image has the class of its colour."""
    pairs = named(found, found.images, found.labels) + named(found, found.test, found.test_labels)
    return all(given == seen for given, seen in pairs)


def test_a_folder_with_classes_is_split_and_labelled(image_folder, capsys):
    found = split(image_folder, labelled=True)
    assert len(found.images) == 60 and len(found.test) == 12 and found.classes == ("class0", "class1")
    for pixels, labels in ((found.images, found.labels), (found.test, found.test_labels)):
        assert torch.equal((pixels.float().mean((1, 2, 3)) > 127).long(), labels)
    assert len({image.numpy().tobytes() for image in torch.cat([found.images, found.test])}) == 72
    line = "60 training and 12 test images, 2 classes: class0 30 + 6, class1 30 + 6"
    assert capsys.readouterr().out == f"data: {image_folder}, {line}\n"


def test_a_class_that_the_test_lacks_keeps_its_label(tmp_path):
    paint_classes(tmp_path / "train")
    paint_classes(tmp_path / "test", 3, ["green", "red", "white"])
    found = split(tmp_path, labelled=True)
    assert found.classes == tuple(COLOURS) and all_right(found) and len(found.test) == 9


def test_a_class_that_training_lacks_is_refused_where_labels_matter(tmp_path, capsys):
    paint_classes(tmp_path / "train", 8, ["green", "red"])
    paint_classes(tmp_path / "test", 3)
    with pytest.raises(UserError, match="no training image is of class blue, white, but test images are"):
        split(tmp_path, labelled=True)
    found = split(tmp_path)
    assert len(found.test) == 12 and (found.test_labels == folders.NO_CLASS).sum() == 6
    assert "without a class of these: 6" in capsys.readouterr().out


def test_hidden_parts_and_macs_copies_are_passed_over_and_counted(tmp_path, capsys):
    paint_classes(tmp_path / "train")
    paint_classes(tmp_path / "test")
    paint(tmp_path / "train/.ipynb_checkpoints", "blue", 2)
    paint(tmp_path / "train/__MACOSX/blue", "blue", 2)
    (tmp_path / "train/blue/._000.png").write_bytes(b"\x00\x05\x16\x07 no image")
    (tmp_path / "train/blue/notes.txt").write_text("beside images")
    (tmp_path / "train/blue/clip.mp4").write_text("beside images")
    found = split(tmp_path, labelled=True)
    assert found.classes == tuple(COLOURS) and all_right(found) and len(found.images) == 32
    assert "left out: 1 .mp4, 1 .txt, 1 __MACOSX, 2 hidden" in capsys.readouterr().out


def test_images_outside_class_folders_are_refused_by_name_where_labels_matter(tmp_path):
    paint_classes(tmp_path / "flat_test/train")
    paint(tmp_path / "flat_test/test", "white", 8)
    paint_classes(tmp_path / "beside")
    Image.new("RGB", (32, 32), COLOURS["white"]).save(tmp_path / "beside/stray.png")
    with pytest.raises(UserError, match=r"8 test images lie in no class folder, such as .*flat_test/test/00\d.png"):
        split(tmp_path / "flat_test", labelled=True)
    with pytest.raises(UserError, match=r"1 (train|test) images lie in no class folder, such as .*beside/stray.png"):
        split(tmp_path / "beside", labelled=True)
    assert len(split(tmp_path / "flat_test").test) == 8
    found = split(tmp_path / "beside")
    assert len(found.images) + len(found.test) == 33


@pytest.mark.parametrize("held", ["test", "val", "valid", "validation", "Val"])
def test_train_and_its_partner_are_splits(tmp_path, held, capsys):
    paint_classes(tmp_path / "train")
    paint_classes(tmp_path / held, 3)
    paint(tmp_path / "more", "blue", 2)
    found = split(tmp_path, labelled=True)
    assert found.classes == tuple(COLOURS) and all_right(found)
    assert len(found.images) == 32 and len(found.test) == 12
    assert f"left out: 2 beside train/ and {held}/" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["train"], ["train", "rest"], ["test"], ["training", "testing"], ["val", "cats"]])
def test_a_split_without_its_partner_is_refused(tmp_path, names):
    for name in names:
        paint_classes(tmp_path / name)
    with pytest.raises(UserError, match="a split takes both train/ and one of test/, val/"):
        split(tmp_path)


def test_the_order_of_a_folder_does_not_go_by_class(tmp_path):
    paint_classes(tmp_path, 60)
    for found in (split(tmp_path, holdout=50), split(tmp_path, limit=50)):
        assert len(found.labels.bincount()) == 4 and found.labels.bincount().min() > 5
        assert len(found.test_labels.bincount()) == 4 and found.test_labels.bincount().min() > 2
    assert split(tmp_path, holdout=50).labels[:50].bincount().min() > 5


def test_a_deleted_image_moves_no_other_between_training_and_test(image_folder, capsys):
    before = folders.find(image_folder)
    where = {item.path: split for split, items in before.items.items() for item in items}
    (image_folder / "class0/u10.png").unlink()
    (image_folder / "class1/u01.png").unlink()
    after = folders.find(image_folder)
    assert sum(map(len, after.items.values())) == 70
    assert all(where[item.path] == split for split, items in after.items.items() for item in items)
    order = [item.path for item in before.items["train"] if item.path != "class0/u10.png"]
    assert order == [item.path for item in after.items["train"]]


def test_a_checkpoint_knows_its_data(image_folder, capsys):
    def look(then):
        args = argparse.Namespace(data=str(image_folder), data_files=then, limit=None, holdout=0, data_dir="data")
        args.resume = False
        data.note_files(args, data.splits(args, "cpu"))
        err = capsys.readouterr().err.split("\r")[-1].strip()  # what stays on a terminal after the progress bar
        return args.data_files, err

    first, said = look(None)  # of a training that begins, or a checkpoint of an earlier version, which does not say
    assert first.startswith("72 images, ") and said == ""
    assert look(first) == (first, "")
    (image_folder / "class0/u10.png").unlink()
    second, said = look(first)
    assert "was 72 images" in said and "is 71 images" in said
    Image.new("RGB", (99, 99)).save(image_folder / "class0/u10.png")
    third, said = look(second)
    assert third not in (first, second) and "is 72 images" in said


def test_a_class_without_training_images_is_named(tmp_path):
    paint(tmp_path / "train/blue", "blue", 30)
    paint(tmp_path / "train/red", "red", 30)
    paint(tmp_path / "train/white", "white", 1)
    paint(tmp_path / "test/blue", "blue", 3)
    with pytest.raises(UserError, match="of the 4 training images none is of class white"):
        split(tmp_path, labelled=True, limit=4)
    with pytest.raises(UserError, match="has one class"):
        split(tmp_path / "train/blue", labelled=True)


def turned(image, orientation):
    exif = image.getexif()
    exif[images.ORIENTATION] = orientation
    return exif


def test_photographs_are_turned_upright_and_transparency_lies_on_white(tmp_path, capsys):
    upright = Image.new("RGB", (64, 64), (0, 0, 200))
    upright.paste((0, 160, 0), (0, 40, 64, 64))  # sky above grass
    upright.paste((250, 0, 0), (0, 0, 16, 16))  # and a sun at the left
    for orientation, turn in images.TURNS.items():
        back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(orientation, turn)
        for suffix, options in (("png", {}), ("jpg", {"quality": 95}), ("tif", {})):
            file = tmp_path / f"{orientation}.{suffix}"
            upright.transpose(back).save(file, exif=turned(upright, orientation), **options)
    upright.save(tmp_path / "upright.png")
    want = read_image(tmp_path / "upright.png", images.for_learner).pixels.astype(int)
    for file in tmp_path.iterdir():
        assert abs(read_image(file, images.for_learner).pixels - want).max() < 40, file
        assert file.stem == "upright" or abs(read_image(file, images.for_learner).pixels - want).mean() < 4, file
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    noise[..., 3] = 0
    noise[16:48, 16:48] = (255, 0, 0, 255)
    sprites = {"rgba.png": "RGBA", "la.png": "LA", "palette.gif": "P"}
    for name, mode in sprites.items():
        Image.fromarray(noise).convert(mode).save(tmp_path / name, **({"transparency": 0} if mode == "P" else {}))
    pixels = read_image(tmp_path / "rgba.png", images.for_learner).pixels
    assert pixels[:, :6].min() > 250  # but for the resize, white
    assert abs(pixels[:, 12:20, 12:20].astype(int) - np.array([255, 0, 0])[:, None, None]).max() < 5
    assert read_image(tmp_path / "la.png", images.for_learner).pixels[:, :6].min() > 250
    for file in tmp_path.iterdir():
        shutil.copy(file, tmp_path / f"again-{file.name}")
    split(tmp_path)
    said = capsys.readouterr().out
    assert "turned upright as their EXIF says" in said and "transparent, laid on white" in said


def test_links_are_followed_and_lead_in_no_circle(tmp_path, capsys):
    paint_classes(tmp_path / "store", 30, ["blue", "green"])
    paint(tmp_path / "some/red", "red", 30)
    for name in ("blue", "green"):
        (tmp_path / "some" / name).symlink_to(f"../store/{name}")
    (tmp_path / "some/red/self").symlink_to(".")
    (tmp_path / "some/red/up").symlink_to("..")
    (tmp_path / "some/red/loop.png").symlink_to("loop.png")
    (tmp_path / "some/red/one.png").symlink_to("000.png")
    found = split(tmp_path / "some", labelled=True)
    assert found.classes == ("blue", "green", "red") and all_right(found)
    assert len(found.images) + len(found.test) == 91
    assert "left out: 1 broken link(s), 2 link(s) to a folder that is read already" in capsys.readouterr().out


def test_a_pipe_is_no_image(tmp_path):
    paint(tmp_path, "red", 30)
    os.mkfifo(tmp_path / "pipe.png")
    found = images.find(tmp_path, images.SUFFIXES)
    assert len(found.files) == 30 and found.left_out == {"no regular file": 1}


def test_decoded_images_are_bounded_by_bytes(tmp_path):
    """Of 20 images of 1 MB with room for 3, no more wait than fit."""
    for i in range(20):
        Image.new("RGB", (512, 512), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    files, started = images.find(tmp_path, images.SUFFIXES).files, []

    def convert(image):
        started.append(image)
        return images.for_learner(image)

    with mock.patch.object(images, "BYTES", 3 * 4 * 512 * 512):
        for taken, picture in enumerate(images.decode(files, convert)):
            assert picture.pixels[0, 0, 0] == taken and len(started) <= taken + 4
    with mock.patch.object(images, "BYTES", 1):
        done = images.Counter()
        sizes = [[tuple(image.shape) for image in batch] for batch in images.batches(files, 25, done)]
    assert sizes == [[(3, 512, 512)]] * 20


def test_too_little_memory_is_no_fault_of_the_image(tmp_path, refused):
    paint(tmp_path, "red", 30)
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")):
        with mock.patch.object(Image, "open", side_effect=error), pytest.raises(MemoryError):
            split(tmp_path)
        with mock.patch.object(Image, "open", side_effect=error):
            assert "too little free memory" in refused(lambda argv: split(tmp_path))


def test_pillows_warnings_stay_inside(tmp_path):
    paint(tmp_path, "red", 30)
    with warnings.catch_warnings(), mock.patch.object(Image, "MAX_IMAGE_PIXELS", 600):
        warnings.simplefilter("error")
        split(tmp_path)


def test_read_image_takes_the_centred_square(tmp_path):
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = (200, 100, 50)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels = read_image(tmp_path / "wide.png", images.for_learner).pixels
    assert pixels.shape == (3, 32, 32)
    assert (pixels[:, :, 1:-1] == np.array([200, 100, 50])[:, None, None]).all()


def test_unreadable_files_are_named(image_folder):
    names = ["class0/u00.png", "class1/u17.png", "class1/u03.png"]  # training images, all three
    whole = (image_folder / names[1]).read_bytes()
    (image_folder / names[0]).write_text("not an image")
    (image_folder / names[1]).write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(image_folder / names[2])
    with pytest.raises(UserError) as error:
        folders.read(folders.find(str(image_folder)), "train")
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "ppm", "avif"])
def test_a_damaged_file_is_an_image_or_a_sentence(tmp_path, suffix):
    """60 damaged files of each format, cut short or with other bytes: whatever Pillow raises, one sentence comes."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    image.save(tmp_path / f"whole.{suffix}", **({} if suffix in ("gif", "bmp", "ppm") else {"exif": turned(image, 6)}))
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    for i in range(60):
        damaged = bytearray(whole[: random.integers(len(whole))] if i % 2 else whole)
        for _ in range(random.integers(0 if i % 2 else 1, 9)):
            if damaged:
                damaged[random.integers(min(len(damaged), 400))] = random.integers(256)
        (tmp_path / f"damaged.{suffix}").write_bytes(damaged)
        for convert in (images.for_learner, images.as_pytorch_fid):
            with images.quiet_pillow():
                picture = read_image(tmp_path / f"damaged.{suffix}", convert)
            assert picture.pixels is not None or f"damaged.{suffix}" in picture.problem


def test_missing_or_empty_folders(tmp_path):
    with pytest.raises(UserError, match="neither cifar10, shapes nor a folder"):
        folders.read(folders.find(str(tmp_path / "nowhere")), "train")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="found 0 train images"):
        folders.read(folders.find(str(tmp_path)), "train")
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied", "secret"))
    with mock.patch.object(os, "scandir", denied), pytest.raises(UserError, match="cannot read secret: Permission"):
        folders.read(folders.find(str(tmp_path)), "train")


# --- CIFAR-10 that is not there, caches and pictures that cannot be written -----------------------------------------


def test_a_cache_that_cannot_be_written_is_a_note(shapes_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "make", lambda n, seed: np.load(shapes_dir / "shapes-test.npy"))
    (tmp_path / "file").write_text("no folder")
    images, _ = data.load("shapes", tmp_path / "file", "test")
    assert len(images) == 10_000
    err = capsys.readouterr().err
    assert "note: the shapes will be drawn again" in err and "a file stands where a folder is needed" in err


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "that you may write to"), (errno.EROFS, "may write to")],
)
def test_a_write_that_fails_says_why(tmp_path, monkeypatch, number, advice):
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(UserError) as error:
        runs.write_bytes(tmp_path / "x", b"x")
    assert advice in str(error.value) and os.strerror(number) in str(error.value)
    assert ("space" in str(error.value)) == (number == errno.ENOSPC)
    with pytest.raises(UserError, match=advice):
        pictures.write_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_image_is_too_few_to_be_held_out(image_folder):
    args = argparse.Namespace(data=str(image_folder), limit=None, holdout=1, data_dir="data")
    with pytest.raises(UserError, match="--holdout 1: one image is too few"):
        data.splits(args, "cpu")


def test_one_level_too_deep_is_recognised(tmp_path):
    deep = tmp_path / "cifar-10-batches-py"
    deep.mkdir()
    (deep / "batches.meta").write_bytes(b"x")
    with pytest.raises(UserError, match=f"one level too deep: give --data-dir {tmp_path}$"):
        data.load("cifar10", deep, "train")


def test_an_archive_that_is_there_is_called_damaged_or_not_unpacked(tmp_path, monkeypatch):
    CIFAR10 = data.import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
    (tmp_path / CIFAR10.filename).write_bytes(b"whole")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(b"whole").hexdigest())
    with pytest.raises(UserError, match="is there but could not be unpacked"):
        data.load("cifar10", tmp_path, "train")
    monkeypatch.setattr(CIFAR10, "__init__", mock.Mock(side_effect=MemoryError))  # not the network's fault
    with pytest.raises(MemoryError):
        data.load("cifar10", tmp_path, "train")


def test_cifar10_that_is_not_there_says_where_to_put_it(tmp_path, monkeypatch):
    CIFAR10 = data.import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError) as error:
        data.load("cifar10", tmp_path, "train")
    for word in ("is not in", str(tmp_path / CIFAR10.filename), CIFAR10.tgz_md5, "--data shapes"):
        assert word in str(error.value)


def test_a_damaged_archive_is_called_so(tmp_path, monkeypatch):
    CIFAR10 = data.import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"cut short")
    with pytest.raises(UserError) as error:
        data.load("cifar10", tmp_path, "train")
    archive = str(tmp_path / "cifar-10-python.tar.gz")
    for word in (f"{archive} is damaged", "c58f30108f718f92721af3b95e74349a", "--data shapes"):
        assert word in str(error.value)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The archive of a small CIFAR-10, 2 images a batch, on a server; torchvision is told to expect it."""
    CIFAR10 = data.import_torchvision().datasets.CIFAR10
    official = tmp_path / "official" / CIFAR10.base_folder
    official.mkdir(parents=True)
    sums = {}
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], "")]:
        pixels = np.full((2, 3072), len(sums), np.uint8)
        content = pickle.dumps({"data": pixels, "labels": [0, 1], "label_names": ["cat", "dog"]})
        (official / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    file = official.parent / CIFAR10.filename
    with tarfile.open(file, "w:gz") as tar:
        tar.add(official, CIFAR10.base_folder)
    shutil.rmtree(official)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums[CIFAR10.meta["filename"]]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=file.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{file.name}")
        threading.Thread(target=server.serve_forever).start()
        yield file
        server.shutdown()


@pytest.mark.parametrize("before", ["nothing", "the archive", "a damaged archive"])
def test_cifar10_is_downloaded_or_unpacked(before, archive, tmp_path):
    here = tmp_path / "new" / "data"
    if before != "nothing":
        here.mkdir(parents=True)
        shutil.copy(archive, here)
    if before == "the archive":
        archive.unlink()  # so nothing can be downloaded
    if before == "a damaged archive":
        (here / archive.name).write_bytes(b"cut short")
    images, labels = data.load("cifar10", here, "train")
    assert (images.shape, labels.tolist()) == ((10, 3, 32, 32), [0, 1] * 5)
    assert images[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert sorted(path.name for path in here.iterdir()) == ["cifar-10-batches-py", archive.name]
    assert not (here / archive.name).is_symlink()
    assert data.load("cifar10", here, "test")[0][:, 0, 0, 0].tolist() == [5, 5]


def test_two_scripts_that_download_at_once_both_get_all_of_it(archive, tmp_path, monkeypatch):
    """The second one downloads while the first one does, and is done before it."""
    rename = os.rename
    others = []

    def second_is_first(source, target):
        monkeypatch.setattr(os, "rename", rename)
        assert not target.exists()  # whole or not at all: the first one's files are still elsewhere
        others.append(data.load("cifar10", tmp_path, "train")[0])
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_is_first)
    images, _ = data.load("cifar10", tmp_path, "train")
    assert torch.equal(images, others[0])
    assert not list(tmp_path.glob(".cifar10-*"))


def test_a_download_that_breaks_off_leaves_nothing_behind(archive, tmp_path):
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    here = tmp_path / "data"
    with pytest.raises(UserError, match="is not in"):
        data.load("cifar10", here, "train")
    assert not list(here.iterdir())


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
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    pictures.write_images(torch.zeros(9, 3, 32, 32, dtype=torch.uint8), tmp_path / "out")
    pictures.write_images(pixels, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [f"{i:05d}.png" for i in range(5)]
    assert os.listdir(tmp_path) == ["out"]
    back = [read_image(tmp_path / "out" / f"{i:05d}.png", images.for_learner).pixels for i in range(5)]
    assert torch.equal(torch.from_numpy(np.stack(back)), pixels)


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
    monkeypatch.setattr(
        pictures, "plot_grid", lambda images, path, title, columns: seen.update(x=images, columns=columns)
    )
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
