"""classifier.py: shapes, whitening, augmentation and accuracy against known values; the exported features equal the
eager ones; each part of the recipe, watched in a short training; training separates two classes.

pytest tests/test_classifier.py
"""

import copy
import os
import zipfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import checkpoint, log, metrics, same

import classifier
import fid
from common import data, devices, inception, pictures, runs, shapes

IMAGES = torch.from_numpy(shapes.make(40, seed=5))


@pytest.fixture(scope="module")
def net():
    """A small network with statistics of batch norm that are not those of a fresh one."""
    torch.manual_seed(0)
    net = classifier.ResNet(classes=3, widths=(8, 8, 16, 24))
    net.whiten(IMAGES)
    with torch.no_grad():
        net(IMAGES)
    return net.eval()


def test_shapes_and_parameters():
    net = classifier.ResNet()
    h = net.stem(torch.rand(2, 3, 32, 32))
    assert h.shape == (2, 32, 30, 30)
    sizes = []
    for layer in net.body:
        h = layer(h)
        sizes.append(tuple(h.shape[1:]))
    assert sizes[:6:2] == [(64, 15, 15), (256, 7, 7), (256, 3, 3)] and sizes[-1] == (256,)
    assert net.logits(h).shape == (2, 10)
    pairs = [(32, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)]
    learned = sum(9 * a * b + b for a, b in pairs) + 256 * 10  # kernels and the biases of batch norm; the last layer
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == learned
    assert not any(p.requires_grad for p in net.stem.parameters())


def test_the_stem_whitens():
    random = torch.Generator().manual_seed(0)
    images = F.avg_pool2d(torch.randint(0, 256, (400, 3, 34, 34), generator=random).float(), 3, 1).to(torch.uint8)
    net = classifier.ResNet(widths=(12, 8))
    net.whiten(images)
    responses = net.stem[0](images / 255)[:, :, ::3, ::3].transpose(0, 1).flatten(1)  # of the patches it was made from
    torch.testing.assert_close(responses[:6], -responses[6:])
    torch.testing.assert_close(responses.mean(1), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(responses[:6]), torch.eye(6), atol=0.05, rtol=0)


def test_shifting_reproduces_crops_of_the_reflected_image():
    x = data.batch(IMAGES, torch.arange(25))
    shift = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")).flatten(1)
    moved = classifier.shifted(x, shift)
    assert moved.shape == x.shape and moved.min() >= x.min() and moved.max() <= x.max()
    assert torch.equal(moved, classifier.shifted(x, shift))
    assert torch.equal(moved[12], x[12])  # two rows and two columns in is where it was
    assert torch.equal(moved[0][:, 2:, 2:], x[0][:, :-2, :-2])
    assert torch.equal(moved[0][:, 0, 2:], x[0][:, 2, :-2])  # the edge is a mirror
    assert torch.equal(moved[23][:, :-2, :-1], x[23][:, 2:, 1:])
    assert (
        len({tuple(image.flatten().tolist()) for image in classifier.shifted(x[:1].expand(25, -1, -1, -1), shift)})
        == 25
    )


def test_flipped_accuracy_averages_the_logits_of_image_and_mirror_image():
    class Side(torch.nn.Module):
        """Says class 1 where the left half is brighter, and class 0 with little weight otherwise."""

        def forward(self, images):
            return (images[..., :16].float().mean((1, 2, 3)) > images[..., 16:].float().mean((1, 2, 3))).float()

        def logits(self, left):
            return torch.stack([1 - left, 3 * left], 1)

    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[:2, ..., :16] = 200
    images[2:, ..., 16:] = 200
    found = classifier.evaluate(Side(), images, torch.tensor([1, 1, 1, 0]))
    assert found["accuracy"] == 0.75 and found["accuracy_flip"] == 0.75
    found = classifier.evaluate(Side(), images, torch.tensor([1, 1, 1, 1]))
    assert found["accuracy"] == 0.5 and found["accuracy_flip"] == 1
    for key in ("accuracy_low", "accuracy_high"):  # the limits are where the score test of 0.5 is at 1.96
        assert abs(0.5 - found[key]) == pytest.approx(1.96 * (found[key] * (1 - found[key]) / 4) ** 0.5, rel=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, net):
    path = tmp_path_factory.mktemp("features") / "features.pt2"
    inception.export(net, path)
    return path


def test_the_program_does_not_say_where_its_source_lay(exported):
    with zipfile.ZipFile(exported) as file:
        assert not [name for name in file.namelist() if b"classifier.py" in file.read(name)]


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (7, 3, 32, 32), (2, 3, 64, 50), (3, 3, 33, 200)])
def test_exported_features_equal_the_eager_ones(exported, net, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = net(images)
        if shape[2:] == (32, 32):  # no resize: the features of the pixels as they are
            torch.testing.assert_close(want, net.body(net.stem(images / 255)), atol=1e-5, rtol=1e-5)
    found = inception.load_extractor(features=exported)([images])
    assert found.shape == (shape[0], 24) and found.dtype == torch.float32
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_the_program_has_plain_operators_only(exported):
    """What another version of torch might not know: submodules of autocast, checks of devices."""
    nodes = torch.export.load(exported).graph.nodes
    names = {str(node.target) for node in nodes if node.op not in ("placeholder", "output")}
    assert names == {
        "aten.div.Tensor",
        "aten._upsample_bilinear2d_aa.vec",
        "aten.conv2d.default",
        "aten.gelu.default",
        "aten.max_pool2d.default",
        "aten.batch_norm.default",
        "aten.add.Tensor",
        "aten.adaptive_max_pool2d.default",
        "<built-in function getitem>",
        "aten.flatten.using_ints",
    }


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_biases_learn_64_times_as_fast_and_do_not_decay(net):
    weights, biases = classifier.make_optimizer(net, lr=0.5).param_groups
    kinds = {id(p): name.split(".")[-1] for name, p in net.named_parameters() if p.requires_grad}
    assert {kinds.pop(id(p)) for p in weights["params"]} == {"weight"}
    assert {kinds.pop(id(p)) for p in biases["params"]} == {"bias"}
    assert not kinds  # all that learns is in one of the groups
    assert (weights["factor"], weights["weight_decay"]) == (1, 1.3e-3)
    assert (biases["factor"], biases["weight_decay"]) == (64, 0)
    for group in (weights, biases):
        assert group["momentum"] == 0.85 and group["nesterov"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Three epochs of two steps on 40 images of three classes, and what was seen meanwhile.

    labels; batches: rows and flips; logits: of each step; rates: of the weights and the biases in each step;
    lookaheads: slow and fast weights, decay, slow weights afterwards; start, end: the network; average; log.
    """
    seen = SimpleNamespace(labels=torch.arange(40) % 3, batches=[], logits=[], rates=[], lookaheads=[])
    batch, make_optimizer, average_weights = data.batch, classifier.make_optimizer, devices.average_weights

    class Watched(classifier.ResNet):
        def logits(self, features):
            found = super().logits(features)
            if self.training:
                seen.logits.append(found.detach().clone())
            return found

    def watched_batch(images, rows, flip):
        seen.batches.append((rows, flip))
        return batch(images, rows, flip)

    def watched_optimizer(net, lr):
        optimizer = make_optimizer(net, lr)
        optimizer.register_step_pre_hook(lambda *_: seen.rates.append([g["lr"] for g in optimizer.param_groups]))
        return optimizer

    def watched_average(average, net, decay):
        slow, fast = copy.deepcopy(average.state_dict()), copy.deepcopy(net.state_dict())
        average_weights(average, net, decay)
        seen.lookaheads.append((slow, fast, decay.item(), copy.deepcopy(average.state_dict())))

    torch.manual_seed(0)
    net = Watched(classes=3, widths=(8, 8, 16, 24))
    seen.start = copy.deepcopy(net.state_dict())
    flags = "--data shapes --device cpu --epochs 3 --batch-size 20 --lr 0.1 --log-every 1".split()
    args = classifier.parse_args(flags)
    dataset = data.Data(IMAGES, seen.labels, IMAGES[:4], seen.labels[:4], ("a", "b", "c"), "", 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("watched"))
        patch.setattr(data, "batch", watched_batch)
        patch.setattr(classifier, "make_optimizer", watched_optimizer)
        patch.setattr(devices, "average_weights", watched_average)
        average, _ = classifier.train(args, runs.Run(args, "classifier.py", flags), net, dataset)
        seen.log = [record for record in log("classifier") if "lr" in record]
    seen.end, seen.average = net.state_dict(), average.state_dict()
    return seen


def test_an_image_is_mirrored_in_every_second_epoch(watched):
    flips = torch.zeros(3, 40, dtype=torch.bool)
    for i, (rows, flip) in enumerate(watched.batches):
        flips[i // 2, rows] = flip
    assert 10 < flips[0].sum() < 30  # about half of the images begin with it
    assert torch.equal(flips[1], ~flips[0]) and torch.equal(flips[2], flips[0])


def test_the_rate_rises_for_a_fifth_of_the_steps_and_then_falls(watched):
    shares = [1 / 2.2, 2 / 2.2, 4 / 4.8, 3 / 4.8, 2 / 4.8, 1 / 4.8]  # of six steps; the first is above 0, the last too
    assert [record["lr"] for record in watched.log] == pytest.approx([0.1 * share for share in shares])
    for (weights, biases), share in zip(watched.rates, shares, strict=True):
        assert weights == pytest.approx(0.1 * share) and biases == pytest.approx(6.4 * share)


def test_a_fifth_of_a_label_is_spread_over_all_classes(watched):
    for (rows, _), logits, record in zip(watched.batches, watched.logits, watched.log, strict=True):
        surprise = -logits.log_softmax(1)  # nats of each class
        of_label = surprise[torch.arange(20), watched.labels[rows]].mean().item()
        assert record["cross_entropy"] == pytest.approx(of_label)
        assert record["loss"] == pytest.approx(0.8 * of_label + 0.2 * surprise.mean().item())


def test_slow_weights_follow_in_every_fifth_and_the_last_step_and_the_fast_go_on_there(watched):
    assert [decay for _, _, decay, _ in watched.lookaheads] == pytest.approx([0.77 * (5 / 6) ** 3, 0.77])
    for slow, fast, decay, after in watched.lookaheads:
        assert not torch.equal(slow["head.weight"], fast["head.weight"])
        for key in ("head.weight", "body.0.0.weight", "body.0.2.bias", "body.0.2.running_mean"):
            torch.testing.assert_close(after[key], decay * slow[key] + (1 - decay) * fast[key])
    (first, _, _, after_first), (second, _, _, after_second) = watched.lookaheads
    for a, b in ((watched.start, first), (after_first, second), (after_second, watched.average)):
        assert same(a, b)  # nothing else moves the slow weights
    assert same(watched.average, watched.end)


# --- a whole run on 60 small images -------------------------------------------------------------------------------


def test_two_classes_separate_and_a_run_leaves_what_it_promises(in_tmp, image_folder, capsys):
    flags = "--device cpu --batch-size 30 --log-every 1 --epochs 4 --name whole".split()
    flags += ["--lr", "0.1"]  # the default is for 1,000 steps, and leaves 8 to chance
    classifier.main(["--data", str(image_folder), *flags])
    files = {"args.json", "log.jsonl", "metrics.json", "checkpoint.pt", "curves.png", "features.pt2"}
    assert set(os.listdir("runs/whole")) == files
    found = metrics("whole")
    assert found["accuracy"] == found["accuracy_flip"] == 1 > found["accuracy_low"] > 0.7
    assert found["cpu_seconds"] > 0 and "accuracy_flip" in capsys.readouterr().out

    before = checkpoint("whole")
    os.remove("runs/whole/metrics.json")
    classifier.main(["--name", "whole", "--resume"])  # a finished run is measured again
    assert metrics("whole")["cross_entropy"] == found["cross_entropy"] and same(before, checkpoint("whole"))

    pictures.write_images(IMAGES[:30], in_tmp / "two")
    words = [f"{image_folder}/class0", "two", "--features", "runs/whole/features.pt2", "--device", "cpu"]
    capsys.readouterr()
    fid.main(words)
    assert "Frechet distance (features of features.pt2)" in capsys.readouterr().out
