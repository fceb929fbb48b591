"""common/devices.py: devices that are there, learning rates, averages of weights, draws that are functions of a key.

pytest tests/test_devices.py
"""

import pytest
import torch

from common import devices, inception
from common.runs import UserError


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta", "cpu:1"])
def test_unknown_devices_get_one_sentence(name):
    with pytest.raises(UserError, match="--device"):
        devices.pick_device(name)


def test_torchrun_on_an_apple_gpu_gets_one_sentence(monkeypatch):
    monkeypatch.setattr(devices, "pick_device", lambda name: torch.device("mps"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="give --device cpu"):
        devices.start("auto")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_network_can_be_exported_whatever_tf32_is(allowed):
    """torch.export asks cuDNN's flags, also on a CPU, and raises where they disagree."""
    with inception.precision(None):  # puts back what is changed in it
        devices.allow_tf32(allowed)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
        torch.export.export(torch.nn.Conv2d(3, 4, kernel_size=3), (torch.zeros(2, 3, 8, 8),))


def test_generators_are_functions_of_their_key():
    def draw(*key):
        return torch.rand(4, generator=devices.generator("cpu", *key))

    assert torch.equal(draw(0, "noise", 1), draw(0, "noise", 1))
    others = [draw(0, "noise", 2), draw(1, "noise", 1), draw(0, "order", 1)]
    assert not any(torch.equal(draw(0, "noise", 1), other) for other in others)


def test_the_learning_rate_rises_then_falls():
    rates = [devices.learning_rate(step, 1000, 1.0, "cosine") for step in range(1, 1001)]
    assert rates[0] < 0.06 and max(rates) > 0.99 and rates[-1] < 1e-4
    assert rates.index(max(rates)) == pytest.approx(20, abs=2)
    assert devices.learning_rate(1000, 1000, 0.3, "constant") == 0.3


def test_averaged_weights_and_statistics_follow_the_model():
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    torch.nn.init.constant_(model.weight, 3.0)
    model.running_mean += 10
    model.num_batches_tracked += 7
    devices.average_weights(average, model, torch.tensor(0.75))
    assert average.weight.tolist() == [1.5, 1.5] and average.running_mean.tolist() == [2.5, 2.5]
    assert average.num_batches_tracked == 7 and model.weight.tolist() == [3.0, 3.0]


def test_adam_and_set_lr_move_by_the_learning_rate():
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = devices.adam([w], 1.0, torch.device("cpu"))
    devices.set_lr(optimizer, 0.25)
    w.sum().backward()
    optimizer.step()
    assert w.item() == pytest.approx(-0.25, rel=1e-5)  # Adam's first step is the learning rate
