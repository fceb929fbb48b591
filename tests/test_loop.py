"""common/loop.py: what a step is given and what the log says of it. What trainings promise: test_promises.py.

pytest tests/test_loop.py
"""

import types

import pytest
import torch
from helpers import log

from common import devices, inception, loop, runs


def training(per_epoch=3, epochs=2, **changed):
    """A loop over `epochs` epochs of per_epoch batches of 4 images, and the images: numbered, one too many."""
    defaults = {"name": "run", "seed": 0, "resume": False, "log_every": 2, "batch_size": 4, "epochs": epochs}
    args = types.SimpleNamespace(**defaults | changed)
    images = torch.arange(4 * per_epoch + 1)
    return loop.Loop.of_epochs(runs.Run(args, "script.py"), args, {}, images, "change something"), images


def test_each_epoch_has_every_image_at_most_once_in_an_order_of_its_own(in_tmp):
    steps, images = training()
    epochs = {0: [], 1: []}
    with steps:
        for step in steps:
            rows = steps.rows(images)
            assert rows.shape == (4,) and steps.epoch() == (step - 1) // 3
            epochs[steps.epoch()] += rows.tolist()
    for rows in epochs.values():
        assert len(rows) == len(set(rows)) == 12 and set(rows) <= set(range(13))
    assert epochs[0] != epochs[1]


def test_draws_are_functions_of_seed_purpose_and_step(in_tmp):
    drawn = {}
    for seed in (0, 1):
        steps, _ = training(seed=seed)
        with steps:
            for step in steps:
                for purpose in ("noise", "order"):
                    drawn[seed, purpose, step] = torch.rand(3, generator=steps.generator(purpose)).tolist()
    assert len(drawn) == len({tuple(numbers) for numbers in drawn.values()}) == 2 * 2 * 6
    again = torch.rand(3, generator=devices.generator("cpu", 1, "noise", 4)).tolist()  # keys count steps from 0
    assert drawn[1, "noise", 5] == again


def test_the_log_has_the_means_since_its_last_line_and_what_was_measured_at_the_end_of_an_epoch(in_tmp):
    steps, _ = training()
    with steps:
        for step in steps:
            steps.add({"loss": torch.tensor(float(step)), "kl": torch.tensor(10.0 * step)})
            if steps.logs():
                steps.log(**steps.means())
            if steps.saves():
                steps.save({"mse": 0.5})
    batches = [record for record in log("run") if "loss" in record]
    assert [(r["step"], r["loss"], r["kl"]) for r in batches] == [(2, 1.5, 15.0), (4, 3.5, 35.0), (6, 5.5, 55.0)]
    measured = [record for record in log("run") if "mse" in record]
    assert [(r["step"], r["epoch"]) for r in measured] == [(3, 1), (6, 2)]
    assert batches[0]["epoch"] == pytest.approx(2 / 3)


def test_what_follows_a_training_is_not_rounded_to_tf32(in_tmp):
    steps, _ = training()
    with inception.precision(None):  # puts back what is changed in it
        devices.allow_tf32(True)
        with steps:
            assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_ends_the_training_before_it_is_written(in_tmp, bad):
    steps, _ = training()
    with pytest.raises(runs.UserError, match=f"^loss became {bad} at step 1: change something, and start anew;"), steps:
        for _ in steps:
            steps.log(kl=1.0, loss=bad)
    steps, _ = training()
    with pytest.raises(runs.UserError, match=f"^mse became {bad} at step 1: change something, and start anew;"), steps:
        for _ in steps:
            steps.save({"mse": bad})
    weights = torch.nn.Linear(1, 1)
    weights.bias.data += bad
    steps, _ = training()
    steps.parts = {"model": weights}
    with pytest.raises(runs.UserError, match="the weights became infinite or nan at step 1: change something"), steps:
        for _ in steps:
            steps.save({"mse": 0.5})
    assert not (runs.ROOT / "run" / "log.jsonl").exists() and not (runs.ROOT / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(("batch_size", "images", "fits"), [(4, 4, True), (4, 3, False), (1, 9, False), (5, 9, True)])
def test_a_batch_is_filled_by_the_images_and_has_two(batch_size, images, fits):
    if fits:
        loop.check_batch(batch_size, images)
    else:
        with pytest.raises(runs.UserError, match="--batch-size"):
            loop.check_batch(batch_size, images)
