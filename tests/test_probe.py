"""probe.py: the fit against closed cases and another solver, what labels may touch, the statistics, whole runs.

pytest tests/test_probe.py
"""

import dataclasses
import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import log, metrics, untrained_vae
from scipy.optimize import minimize

import probe
import vae
from common import data, devices, folders, pictures, runs, scores

RANDOM = torch.Generator()


def gaussians(n, dims, classes, apart, seed=0):
    """Features (n, dims) float64 of `classes` clouds whose centres lie about `apart` from the origin; labels."""
    RANDOM.manual_seed(seed)
    y = torch.arange(n) % classes
    centres = normal(classes, dims) * apart / math.sqrt(dims)
    return normal(n, dims) + centres[y], y


def normal(*shape):
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


def fit(x, y, weight_decay, classes, **options):
    return probe.fit(x, y, weight_decay, classes, probe.second_moments(x), **options)


def choose(x, y, classes, seed):
    return probe.choose_weight_decay(x, y, classes, probe.second_moments(x), seed)


# --- the classifier -----------------------------------------------------------------------------------------------


def test_separable_classes_are_told_apart_without_an_error():
    x, y = gaussians(1000, 20, 4, apart=40)
    predicted, _ = probe.classify(x[:500], y[:500], x[500:], 4, seed=0)
    assert torch.equal(predicted, y[500:])


def test_random_labels_are_guessed():
    x, _ = gaussians(4000, 20, 10, apart=0)
    y = torch.randint(0, 10, (4000,), generator=RANDOM)
    predicted, facts = probe.classify(x[:2000], y[:2000], x[2000:], 10, seed=0)
    low, high = scores.score(predicted, y[2000:])["interval"]
    assert low < 10 < high
    assert facts["weight_decay"] == probe.GRID[0]  # nothing to learn: the strongest


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-4])
def test_the_optimum_has_no_gradient_and_another_solver_finds_the_same(weight_decay):
    x, y = gaussians(300, 6, 3, apart=2)
    x = x @ torch.diag(torch.logspace(-2, 1, 6, dtype=torch.float64)) @ normal(6, 6)  # badly conditioned
    (x,) = probe.standardise(x)
    w, b = (part.requires_grad_() for part in fit(x, y, weight_decay, 3))
    loss = probe.objective(x, y, w, b, weight_decay)
    assert max(g.abs().max() for g in torch.autograd.grad(loss, (w, b))) < 1e-6

    def plainly(flat):
        v = torch.tensor(flat, requires_grad=True)
        value = probe.objective(x, y, v[:18].view(6, 3), v[18:], weight_decay)
        return value.item(), torch.autograd.grad(value, v)[0].numpy()

    reference = minimize(plainly, torch.zeros(21).double().numpy(), jac=True, method="BFGS", options={"gtol": 1e-8})
    assert loss.item() == pytest.approx(reference.fun, abs=1e-9)
    torch.testing.assert_close(w.detach(), torch.tensor(reference.x[:18]).view(6, 3), atol=1e-3, rtol=1e-3)


def test_a_fit_may_begin_anywhere():
    (x,), y = probe.standardise(gaussians(300, 6, 3, apart=2)[0]), torch.arange(300) % 3
    start = 5 * normal(6, 3), normal(3)
    for got, want in zip(fit(x, y, 1e-2, 3, start=start), fit(x, y, 1e-2, 3), strict=True):
        torch.testing.assert_close(
            got - got.mean(-1, keepdim=True), want - want.mean(-1, keepdim=True), atol=1e-5, rtol=0
        )


def test_units_and_constant_features_do_not_matter():
    x, y = gaussians(600, 5, 3, apart=2)
    other = torch.cat([x * torch.tensor([1e-3, 1, 10, 1e3, 7]) + 100, torch.full((600, 1), 3.0)], 1)
    plain, _ = probe.classify(x[:400], y[:400], x[400:], 3, seed=0)
    scaled, _ = probe.classify(other[:400], y[:400], other[400:], 3, seed=0)
    assert torch.equal(plain, scaled)


def test_features_that_are_mostly_noise_get_more_weight_decay():
    x, y = gaussians(1000, 10, 4, apart=4)
    noisy = torch.cat([x, normal(1000, 600)], 1)
    clean, noise = (choose(*probe.standardise(f), y, 4, seed=0) for f in (x, noisy))
    assert noise > clean


def test_the_weight_decay_is_the_best_of_the_grid_on_the_held_out_tenth():
    (x,), y = probe.standardise(gaussians(400, 60, 4, apart=1.5)[0]), torch.arange(400) % 4
    order = torch.randperm(400, generator=devices.generator("cpu", 5, "probe"))
    held, rest = order[:40], order[40:]
    found = {d: probe.objective(x[held], y[held], *fit(x[rest], y[rest], d, 4), 0).item() for d in probe.GRID}
    assert choose(x, y, 4, seed=5) == min(found, key=found.get)


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 10), (8, 10), (4321, 10_000), (10, 10)])
def test_a_score_has_wilsons_interval(right, n):
    found = scores.score(torch.arange(n) < right, torch.ones(n, dtype=torch.bool))
    p, z = right / n, 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    want = [100 * (centre + side * half) / (1 + z * z / n) for side in (-1, 1)]
    assert found["accuracy"] == 100 * p and found["interval"] == pytest.approx(want, abs=1e-4)


def test_mcnemar_of_known_counts():
    first = torch.tensor([True] * 10 + [False] * 2 + [True] * 88)
    second = torch.tensor([False] * 10 + [True] * 2 + [True] * 88)
    found = scores.mcnemar(first, second)
    assert (found["only_first_right"], found["only_second_right"]) == (10, 2)
    assert found["difference"] == pytest.approx(8) and found["interval"][0] < 8 < found["interval"][1]
    assert found["p_value"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    same = scores.mcnemar(first, first)
    assert same["difference"] == 0 and same["p_value"] == 1


def test_principal_components_keep_the_most_variance():
    RANDOM.manual_seed(0)
    x = (normal(500, 8) @ torch.diag(torch.tensor([9, 1, 1, 5, 1, 1, 1, 1.0]).double())).float()
    directions = probe.principal_directions(x[:400], 2, seed=0)
    train_part, test_part = x[:400] @ directions, x[400:] @ directions
    assert train_part.shape == (400, 2) and test_part.shape == (100, 2)
    kept = train_part.var(0).sum() / x[:400].var(0).sum()
    assert kept > 0.9 and abs(torch.corrcoef(torch.cat([test_part, x[400:, [0, 3]]], 1).T)[0, 2]) > 0.95


def test_discriminants_find_the_plane_of_the_classes():
    RANDOM.manual_seed(0)
    y = torch.arange(600) % 3
    x = normal(600, 5) * torch.tensor([1, 1, 30, 1, 1])  # the most variance says nothing
    x[:, 0] += 6 * (y == 1)
    x[:, 4] += 6 * (y == 2)
    plane = pictures.discriminants(*probe.standardise(x), y, 3)
    share = plane[[0, 4]].square().sum() / plane.square().sum()
    assert share > 0.98


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_a_probe_leaves_what_it_promises(in_tmp, image_folder, capsys):
    untrained_vae("one", image_folder)
    untrained_vae("two", image_folder, seed=1)
    probe.main(["runs/one", "--device", "cpu", "--latent", "sample", "--layer", "--against", "runs/two/checkpoint.pt"])
    folder = Path("runs/one-probe")
    assert {"args.json", "metrics.json", "confusion.png", "latents.png"} == {file.name for file in folder.iterdir()}
    found = metrics("one-probe")
    own = ["mu", "z ~ q(z|x)", "layer below mu"]
    assert list(found["rows"]) == [*own, "raw pixels", "principal components", "untrained encoder", "mu of two"]
    assert [row["dims"] for row in found["rows"].values()] == [4, 4, 1024, 3072, 4, 4, 4]
    assert found["rows"]["raw pixels"]["accuracy"] == 100  # one class is bright
    one, two = (found["rows"][name]["accuracy"] for name in ("mu", "mu of two"))
    assert found["against"]["difference"] == pytest.approx(one - two)
    table = capsys.readouterr().out
    assert f"{one:.2f}" in table and "McNemar" in table and "raw pixels" in table
    assert found["images"] == 60 and found["test_images"] == 12


def test_baselines_are_measured_once_for_the_same_images(in_tmp, image_folder, monkeypatch):
    untrained_vae("vae", image_folder)
    count, original = [], probe.classify
    monkeypatch.setattr(probe, "classify", lambda *args: count.append(1) or original(*args))
    probe.main(["runs/vae", "--device", "cpu"])
    first = metrics("vae-probe")["rows"]
    assert len(count) == 4
    probe.main(["runs/vae", "--device", "cpu"])
    assert len(count) == 5 and metrics("vae-probe")["rows"]["raw pixels"] == first["raw pixels"]
    probe.main(["runs/vae", "--device", "cpu", "--holdout", "10"])
    assert len(count) == 9


def test_a_code_of_one_dimension_can_be_probed(in_tmp, image_folder):
    untrained_vae("vae", image_folder, latent_dim=1)
    probe.main(["runs/vae", "--device", "cpu"])
    assert metrics("vae-probe")["rows"]["mu"]["accuracy"] >= 0
    assert not Path("runs/vae-probe/latents.png").exists()  # one dimension spans no plane


def test_rows_that_another_probe_added_meanwhile_are_kept(in_tmp, image_folder, monkeypatch):
    untrained_vae("vae", image_folder)
    cache, original = Path("runs/probe-baselines.json"), probe.classify

    def beside_another(*args):
        cache.write_text('{"another": {}}')
        return original(*args)

    monkeypatch.setattr(probe, "classify", beside_another)
    probe.main(["runs/vae", "--device", "cpu"])
    assert len(json.loads(cache.read_text())) == 2


def test_a_probe_that_is_stopped_does_not_leave_an_earlier_ones_numbers(in_tmp, image_folder, monkeypatch):
    untrained_vae("vae", image_folder)
    probe.main(["runs/vae", "--device", "cpu"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe, "classify", Mock(side_effect=KeyboardInterrupt))
        probe.main(["runs/vae", "--device", "cpu", "--layer"])
    assert "--layer" in Path("runs/vae-probe/args.json").read_text()
    assert not Path("runs/vae-probe/metrics.json").exists()


def test_test_labels_reach_the_score_alone(in_tmp, image_folder, monkeypatch):
    untrained_vae("vae", image_folder)
    seen, original, splits = [], probe.classify, data.splits

    def classify(*args):
        predicted, facts = original(*args)
        seen.append((predicted, facts["weight_decay"]))
        return predicted, facts

    def wrong(*args, **options):
        found = splits(*args, **options)
        return dataclasses.replace(found, test_labels=1 - found.test_labels)

    monkeypatch.setattr(probe, "classify", classify)
    probe.main(["runs/vae", "--device", "cpu", "--layer"])
    right = metrics("vae-probe")["rows"]
    monkeypatch.setattr(data, "splits", wrong)
    probe.main(["runs/vae", "--device", "cpu", "--layer"])
    reversed_rows = metrics("vae-probe")["rows"]
    half = len(seen) // 2
    for (predicted, decay), (again, decay_again) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(predicted, again) and decay == decay_again
    for name, row in right.items():
        assert reversed_rows[name]["accuracy"] == pytest.approx(100 - row["accuracy"])


def test_the_reference_is_trained_and_can_be_probed(in_tmp, image_folder, capsys):
    flags = [
        "--supervised",
        "--data",
        str(image_folder),
        "--device",
        "cpu",
        "--latent-dim",
        "4",
        "--batch-size",
        "20",
        "--log-every",
        "3",
    ]
    probe.main([*flags, "--epochs", "4"])
    assert metrics("supervised")["rows"]["supervised"]["accuracy"] == 100
    assert {"args.json", "log.jsonl", "checkpoint.pt", "metrics.json"} <= {
        f.name for f in Path("runs/supervised").iterdir()
    }
    epochs = [record for record in log("supervised") if "loss" not in record]
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4]
    losses = [record["loss"] for record in log("supervised") if "loss" in record]
    assert len(losses) == 4 and losses[-1] < losses[0]
    probe.main(["runs/supervised", "--device", "cpu"])
    assert metrics("supervised-probe")["rows"]["mu"]["accuracy"] == 100


@pytest.mark.slow
def test_on_real_images_a_linear_classifier_reads_the_class_from_random_features(cifar_dir):
    train_images, labels = data.load("cifar10", cifar_dir, "train")
    test, test_labels = data.load("cifar10", cifar_dir, "test")
    torch.manual_seed(0)
    model = vae.VAE(128)
    codes, test_codes = (vae.encode(model, part) for part in (train_images[:10_000], test[:2000]))
    predicted, facts = probe.classify(codes, labels[:10_000], test_codes, 10, seed=0)
    assert 30 < scores.score(predicted, test_labels[:2000])["accuracy"] < 42 and facts["largest_gradient"] < 1e-6


def test_a_typo_in_against_leaves_the_earlier_probe(in_tmp, image_folder, refused):
    untrained_vae("vae", image_folder)
    runs.write_json(Path("runs/vae-probe/metrics.json"), {"rows": {}})
    assert "there is no checkpoint at typo" in refused(probe.main, "runs/vae", "--device", "cpu", "--against", "typo")
    assert metrics("vae-probe") == {"rows": {}}


def test_an_encoder_is_not_tested_on_images_whose_labels_it_knows(in_tmp, image_folder, refused, capsys, no_figures):
    files = folder_fingerprint(image_folder)
    untrained_vae("labels", image_folder, data_files=files, supervised=True)
    untrained_vae("pixels", image_folder, data_files=files)
    untrained_vae("neither", image_folder, data_files=files, holdout=20)
    total = len(folders.find(str(image_folder)).items["train"])
    untrained_vae("some", image_folder, data_files=files, supervised=True, limit=total - 5)
    said = refused(probe.main, "runs/labels", "--device", "cpu", "--holdout", 20)
    assert "trained on 20 of the 20 held-out images, with their labels" in said
    said = refused(probe.main, "runs/some", "--device", "cpu", "--holdout", 20)
    assert "trained on 15 of the 20 held-out images, with their labels" in said
    probed = ["runs/neither", "--device", "cpu"]  # which has 20 images held out as well
    assert "with their labels" in refused(probe.main, *probed, "--against", "runs/labels")
    probe.main([*probed, "--against", "runs/pixels"])
    err = capsys.readouterr().err
    assert "runs/pixels was trained on 20 of the 20 held-out images, without their labels" in err
    assert "runs/neither was" not in err


def folder_fingerprint(image_folder):
    return folders.find(str(image_folder)).fingerprint()


def test_bad_input_gets_one_sentence(in_tmp, image_folder, refused):
    def says(*argv):
        return refused(probe.main, *argv)

    assert "give either a checkpoint" in says()
    assert "--resume continues a training" in says("runs/vae", "--resume")
    assert "--epochs is of a training" in says("runs/vae", "--epochs", 3)
    assert "--precision is of a training" in says("runs/vae", "--precision", "bf16")
    assert "there is no checkpoint at runs/vae" in says("runs/vae")
    runs.save_checkpoint("runs/gan/checkpoint.pt", {"script": "wgan_gp.py", "args": {}, "step": 1})
    assert "holds no encoder" in says("runs/gan", "--device", "cpu", "--data", image_folder)
    untrained_vae("vae", image_folder)
    assert "there is no checkpoint at nowhere" in says("runs/vae", "--device", "cpu", "--against", "nowhere")
    assert "neither cifar10" in says("runs/vae", "--device", "cpu", "--data", "gone")
    flat = in_tmp / "flat"
    flat.mkdir()
    for file in image_folder.rglob("*.png"):
        file.rename(flat / f"{file.parent.name}-{file.name}")
    assert "has one class" in says("runs/vae", "--device", "cpu", "--data", flat)
