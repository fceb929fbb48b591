"""common/script.py: interpolations of known codes, training.gif of the frames that are there.

pytest tests/test_script.py
"""

import math
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ctrl_c_in, metrics, untrained_vae
from PIL import Image

import vae
from common import devices, pictures, ranks, runs, script, shapes
from common.loop import Loop

QUICK = "--data images --device cpu --latent-dim 4 --batch-size 30".split()  # of 60 images: two steps an epoch


# --- flags --------------------------------------------------------------------------------------------------------


def test_on_a_cpu_fid_auto_is_off_but_for_features_that_are_named():
    args = types.SimpleNamespace(fid="auto", features=None)
    assert script.wanted_extractors(args, torch.device("cpu")) == []
    args.features = ["nowhere.pt2"]
    with pytest.raises(runs.UserError, match="nowhere.pt2"):
        script.wanted_extractors(args, torch.device("cpu"))


def test_features_that_are_missing_stop_a_run_and_inceptions_weights_do_not(monkeypatch, capsys):
    def load(features, device):
        raise runs.UserError("the weights are not here")

    monkeypatch.setattr(script, "load_extractor", load)
    args = types.SimpleNamespace(fid=10, features=None)
    assert script.wanted_extractors(args, torch.device("cpu")) == []
    args = types.SimpleNamespace(fid="auto", features=["inception"])  # named: on a CPU, too
    assert script.wanted_extractors(args, torch.device("cpu")) == []
    assert capsys.readouterr().err.count("there will be no FID: the weights are not here") == 2
    args = types.SimpleNamespace(fid=10, features="net.pt2")  # one word: from the checkpoint of an earlier commit
    with pytest.raises(runs.UserError):
        script.wanted_extractors(args, torch.device("cpu"))
    monkeypatch.setattr(script, "load_extractor", lambda features, device: Ruler(features))
    assert [each.ruler for each in script.wanted_extractors(args, torch.device("cpu"))] == ["net.pt2"]


class Ruler:
    def __init__(self, name):
        self.ruler = name

    def __call__(self, groups):
        if "64" in self.ruler:
            raise runs.UserError("net64.pt2 fails on uint8 images of 32x32")
        return torch.zeros(sum(map(len, groups)), 3)


def test_features_that_take_other_images_stop_a_run_before_it_trains(in_tmp, image_folder, monkeypatch, refused):
    monkeypatch.setattr(script, "load_extractor", lambda features, device: Ruler(features))
    said = refused(vae.main, *QUICK, "--data", image_folder, "--features", "net64.pt2")
    assert "fails on uint8 images of 32x32" in said and not Path("runs/vae").exists()


def test_flags_of_which_one_would_be_ignored_are_refused(in_tmp, image_folder, refused):
    untrained_vae("vae", image_folder)
    assert "--resume and --eval-only: give one of them" in refused(vae.main, "--resume", "--eval-only")
    assert "--eval-only and --sample: give one of them" in refused(vae.main, "--eval-only", "--sample", 3)
    assert "--prior expost is of --sample" in refused(vae.main, "--eval-only", "--prior", "expost")
    assert "made with --epochs 50, not 7" in refused(vae.main, "--eval-only", "--epochs", 7)


def test_a_schedule_that_has_begun_to_fall_keeps_its_epochs(in_tmp, image_folder, refused):
    untrained_vae("vae", image_folder, schedule="cosine")
    assert "falls over the 50 epochs" in refused(vae.main, "--resume", "--epochs", 60)


def test_a_training_does_not_go_on_with_other_images(in_tmp, image_folder, refused):
    """It counts its epochs by the images. Measuring and sampling do no more than say it."""
    untrained_vae("vae", image_folder, data_files="80 images that were there before")
    said = refused(vae.main, "--resume")
    assert "was 80 images that were there before" in said and "this training cannot go on: put the files back" in said


def test_who_measures_needs_no_whole_batch(in_tmp, image_folder, refused):
    """Images may have gone since the training, and the checkpoint's --batch-size cannot be changed."""
    untrained_vae("vae", image_folder, batch_size=1000)
    vae.main(["--eval-only", "--fid", "off"])
    assert metrics("vae")["step"] == 0
    assert "do not fill a batch of 1000" in refused(vae.main, "--resume")


def test_distances_are_kept_for_the_same_weights_and_images_only(in_tmp):
    args = types.SimpleNamespace(name="kept", data_files="a list of files")
    run = runs.Run(args, "vae.py")
    distances = {"fid_floor": 2.5, "fd_net_floor": 1.5, "fd_net_floor_kid": 0.5}
    runs.write_json(run / "metrics.json", {"step": 6, "data_files": "a list of files", "elbo_nats": 1.0} | distances)
    assert script.earlier_distances(run, args, 6, []) == distances
    anew = types.SimpleNamespace(ruler="fd_net")  # with too few images it would leave the old kernel distance
    assert script.earlier_distances(run, args, 6, [anew]) == {"fid_floor": 2.5}
    assert script.earlier_distances(run, args, 7, []) == {}
    args.data_files = "another list"
    assert script.earlier_distances(run, args, 6, []) == {}


def test_fewer_images_than_asked_for_are_compared_and_that_is_said(capsys):
    sets = {"reconstruction": torch.zeros(6), "generation": torch.zeros(9)}
    assert [len(x) for x in script.distance_sets(types.SimpleNamespace(fid=4), **sets).values()] == [4, 4]
    assert [len(x) for x in script.distance_sets(types.SimpleNamespace(fid="auto"), **sets).values()] == [6, 6]
    assert capsys.readouterr().err == ""
    assert [len(x) for x in script.distance_sets(types.SimpleNamespace(fid=50), **sets).values()] == [6, 6]
    assert "--fid 50: the smallest set has 6 images" in capsys.readouterr().err


# --- interpolations -----------------------------------------------------------------------------------------------


def test_a_great_circle_has_equal_steps_and_keeps_the_norm():
    a, b = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 3.0]])
    z = script.great_circle(a, b, 7)
    assert z.shape == (1, 7, 3) and z.dtype == a.dtype
    angle = torch.arange(7) * math.pi / 2 / 6
    expected = 3 * torch.stack([angle.cos(), 0 * angle, angle.sin()], 1)
    torch.testing.assert_close(z[0], expected, atol=1e-6, rtol=0)


def test_a_great_circle_ends_at_its_codes_whatever_they_are():
    torch.manual_seed(0)
    a = torch.randn(5, 16)
    b = torch.stack([torch.randn(16), 2 * a[1], a[2], -a[3], torch.zeros(16)])
    z = script.great_circle(a, b, 8)
    assert z.isfinite().all()
    torch.testing.assert_close(z[:, 0], a, atol=1e-4, rtol=0)
    torch.testing.assert_close(z[:, -1], b, atol=1e-4, rtol=0)
    torch.testing.assert_close(z[2], a[2].expand(8, 16), atol=1e-4, rtol=0)  # between equal codes nothing else


def test_between_codes_of_nearly_opposite_directions_norms_stay_between_theirs():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[-0.99, 0.14]])
    norms = script.great_circle(a, b, 5).norm(dim=-1)[0]
    torch.testing.assert_close(norms, torch.linspace(2, b.norm().item(), 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("count", "pairs"), [(40, 8), (16, 8), (5, 2)])
def test_a_row_is_an_image_its_codes_way_to_another_and_that_image(monkeypatch, count, pairs):
    """Grey images whose code is the grey value, on a line through 0: between them are the values between."""
    drawn = {}
    monkeypatch.setattr(pictures, "plot_grid", lambda images, path, title, columns: drawn.update(x=images, n=columns))
    grey = torch.arange(1, count + 1, dtype=torch.uint8) * 6
    test = grey.view(-1, 1, 1, 1).expand(count, 3, 32, 32)

    def decode(z):
        return z[:, :1, None, None].round().to(torch.uint8).expand(len(z), 3, 32, 32) + 1

    script.draw_interpolations(Path("unused"), test, lambda x: x[:, :1, 0, 0].float(), decode)
    rows = drawn["x"][:, 0, 0, 0].view(pairs, 10).long()
    assert drawn["n"] == 10
    for row, first, last in zip(rows, grey[0::2].long(), grey[1::2].long(), strict=False):
        assert (row[0], row[-1]) == (first, last)  # as they are
        assert (row[1], row[-2]) == (first + 1, last + 1)  # and as they are decoded
        assert (row[1:-1].diff() >= 0).all() and row[4] in range(first + 2, last + 1)


def test_one_image_makes_no_pair(in_tmp):
    script.draw_interpolations(in_tmp, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None, None)
    assert os.listdir(in_tmp) == []


# --- frames and their animation -----------------------------------------------------------------------------------


def frames(name):
    return sorted(os.listdir(Path("runs", name, "frames")))


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def test_frames_show_the_same_z_and_a_resumed_run_has_those_before_its_checkpoint(
    in_tmp, image_folder, monkeypatch, no_figures, small_networks
):
    latents, decode = [], vae.decode

    def spy(model, z):
        before = torch.get_rng_state()
        images = decode(model, z)
        assert torch.equal(torch.get_rng_state(), before)  # nothing that a training draws from
        if len(z) == script.FRAME_SAMPLES:
            latents.append(z)
        return images

    monkeypatch.setattr(vae, "decode", spy)
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        ctrl_c_in(patch, 3)  # in the middle of the second epoch
        vae.main([*QUICK, "--epochs", "2", "--name", "x"])
    assert frames("x") == ["00000002.png"]
    Path("runs/x/frames/00000004.png").write_bytes(b"of a process that was killed before its checkpoint")
    vae.main(["--name", "x", "--resume"])
    assert frames("x") == ["00000002.png", "00000004.png"]
    z = torch.randn(script.FRAME_SAMPLES, 4, generator=devices.generator("cpu", 0, "latents"))  # of the seed alone
    assert len(latents) == 3 and all(torch.equal(seen, z) for seen in latents)  # also where Ctrl-C was pressed
    model, _ = vae.load("runs/x", "cpu")
    last = pixels("runs/x/frames/00000004.png")
    assert np.array_equal(last[16:], pictures.tiled(decode(model, z), 8))
    assert not np.array_equal(last[16:], pixels("runs/x/frames/00000002.png")[16:])  # it has learnt meanwhile
    with Image.open("runs/x/training.gif") as gif:
        assert gif.n_frames == 2 and gif.size == (272, 288)

    os.remove("runs/x/frames/00000002.png")
    vae.main(["--name", "x", "--eval-only"])
    with Image.open("runs/x/training.gif") as gif:
        assert gif.n_frames == 1


@pytest.mark.parametrize("main", [True, False])
def test_a_frame_is_of_the_end_of_an_epoch_and_of_the_main_process(in_tmp, monkeypatch, main):
    args = types.SimpleNamespace(name="run", seed=0, resume=False, log_every=2, batch_size=4, epochs=2)
    made = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    steps = Loop.of_epochs(runs.Run(args, "script.py"), args, {}, torch.arange(12), "")
    with steps:
        monkeypatch.setattr(ranks, "is_main", lambda: main)
        with pytest.raises(runs.Interrupted):
            for step in steps:
                steps.interrupted = step == 5  # in the second epoch
                if steps.saves():
                    steps.save({}, made)
    there = [str(path) for path in Path("runs/run").rglob("*.png")]
    assert there == (["runs/run/frames/00000003.png"] if main else [])


@pytest.mark.parametrize(("count", "most", "kept"), [(3, 30, [0, 1, 2]), (7, 4, [0, 2, 4, 6]), (50, 2, [0, 49])])
def test_of_many_frames_some_are_kept_evenly_with_the_first_and_the_last(count, most, kept):
    assert pictures.spread(list(range(count)), most) == kept


def test_a_sheet_shows_pictures_row_by_row_and_leaves_the_rest_white(in_tmp):
    files = [f"{value}.png" for value in (10, 20, 30)]
    for value, file in zip((10, 20, 30), files, strict=True):
        Image.new("RGB", (4, 2), (value, value, value)).save(file)
    pictures.write_sheet(files, Path("sheet.png"))
    np.testing.assert_array_equal(pixels("sheet.png")[::2, ::4, 0], [[10, 20], [30, 255]])


def test_an_animation_of_photographs_has_the_colours_it_is_given_and_a_pages_size(in_tmp):
    images = torch.from_numpy(shapes.make(3 * script.FRAME_SAMPLES, seed=0))
    for i, part in enumerate(images.split(script.FRAME_SAMPLES)):
        pictures.write_frame(part, Path(f"{i}.png"), f"epoch {i}")
    for colours in (48, 256):
        pictures.write_gif(sorted(Path().glob("*.png")), Path("x.gif"), colours)
        found = len(np.unique(pixels("x.gif").reshape(-1, 3), axis=0))
        assert 0.9 * colours <= found <= colours
    assert os.path.getsize("x.gif") / 3 * script.MAX_FRAMES < 2.5e6
