"""benchmarks/neighbours.py: a planted copy is found, in pixels and in features, and told from an unseen image.

pytest tests/test_neighbours.py
"""

import re

import pytest
import torch
from helpers import untrained_vae
from PIL import Image

import vae
from benchmarks import neighbours
from common import folders, runs


class Means(torch.nn.Module):
    """uint8 (B, 3, H, W) -> (B, 12): mean colours of the four quarters."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)


@pytest.fixture(scope="session")
def means(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "means.pt2"
    example = (torch.zeros(4, 3, 32, 32, dtype=torch.uint8),)
    shapes = ({0: torch.export.Dim("B")},)
    torch.export.save(torch.export.export(Means().eval(), example, dynamic_shapes=shapes), path)
    return path


def test_the_nearest_are_those_of_all_distances_and_a_copy_is_at_0():
    torch.manual_seed(0)
    train, x = torch.rand(301, 40), torch.rand(250, 40)
    x[7] = train[300]
    distances, rows = neighbours.nearest(x, train)
    every = torch.cdist(x.double(), train.double())
    assert torch.equal(rows, every.argmin(1)) and rows[7] == 300 and distances[7] == 0
    torch.testing.assert_close(distances, every.min(1).values)


def lines(text):
    """What is printed -> {title: (mean distance in pixels, in features)}."""
    found = re.findall(r"^(.+?) {2,}(\S+) ± \S+ +(\S+) ± \S+$", text, re.MULTILINE)
    return {title: (float(in_pixels), float(in_features)) for title, in_pixels, in_features in found}


def test_a_model_that_copies_is_found_out(in_tmp, image_folder, means, monkeypatch, capsys):
    untrained_vae("copies", image_folder)
    untrained_vae("honest", image_folder)
    pixels, _, _ = folders.read(folders.find(str(image_folder)), "train")
    train = torch.from_numpy(pixels)
    decode, drawn = vae.decode, {}
    models = []

    def copying(model, z):
        models.append(model)
        return train[10 : 10 + len(z)] if len(models) == 1 else decode(model, z)

    monkeypatch.setattr(vae, "decode", copying)
    monkeypatch.setattr(neighbours, "draw", lambda blocks, path: drawn.update(blocks))
    argv = ["runs/copies", "runs/honest", "--features", str(means), "--device", "cpu"]
    neighbours.main(argv)
    found = lines(capsys.readouterr().out)
    copies, *others = found.values()
    assert list(found)[2] == "test images" and len(others) == 4 and copies == (0, 0)
    assert min(min(each) for each in others) > 0.01
    assert [title for title in found if title.endswith("reconstructed test images")] == list(found)[3:]
    assert list(drawn) == list(found)[:3]
    for i, title in enumerate(drawn):
        samples, by_pixels, by_features = drawn[title]
        assert len(samples) == len(by_pixels) == len(by_features) == 12  # as many as there are test images
        assert (torch.equal(samples, by_pixels) and torch.equal(samples, by_features)) == (i == 0)

    models.clear()
    neighbours.main([*argv, "--limit", "10", "--count", "5"])  # the copied images are not among the first ten
    said = capsys.readouterr().out
    assert "of 10 training images, 5 images a line" in said and min(*next(iter(lines(said).values()))) > 0.01


def test_the_picture_has_three_rows_a_block(in_tmp):
    black = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    neighbours.draw({"a": [black, black + 255, black], "b $x": [black] * 3}, "out.png")
    with Image.open("out.png") as picture:
        assert picture.width > 16 * 60 and picture.height > 6 * 60
        grey = picture.convert("L")
        dark = [grey.getpixel((picture.width * 2 // 3, y)) < 10 for y in range(picture.height)]
    changes = sum(a != b for a, b in zip(dark, dark[1:], strict=False))
    assert changes == 2 * 5  # five black rows of images, each apart from the next


def test_bad_input_is_refused_before_the_search(in_tmp, image_folder, means, refused):
    untrained_vae("a", image_folder)
    untrained_vae("b", image_folder)
    state = runs.load_checkpoint("runs/b/checkpoint.pt")
    state["args"]["limit"] = 7
    runs.save_checkpoint("runs/b/checkpoint.pt", state)
    flags = ("--features", means, "--device", "cpu")
    assert "were trained on different images" in refused(neighbours.main, "runs/a", "runs/b", *flags)
    assert "there is no checkpoint" in refused(neighbours.main, "runs/none", *flags)
    assert "cannot read --features" in refused(neighbours.main, "runs/a", "--features", "no.pt2", "--device", "cpu")
    (in_tmp / "file").write_text("")
    assert "cannot write" in refused(neighbours.main, "runs/a", *flags, "--out", "file/x.png")
    assert not list(in_tmp.glob("*.png"))
