"""benchmarks/steps.py: every row is a step that runs and learns, and the operations that it counts.

pytest tests/test_steps.py
"""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import steps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_operations_of_known_products():
    x, w, image, kernel = torch.zeros(3, 5), torch.zeros(5, 7), torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    with steps.Operations() as operations:
        x @ w
    assert operations.count == 2 * 3 * 5 * 7
    with steps.Operations() as operations:
        F.conv2d(image, kernel, padding=1)
        image + 1
    assert operations.count == 2 * (2 * 8 * 8 * 4) * (3 * 3 * 3)
    w.requires_grad_()
    with steps.Operations() as operations:
        torch.autograd.grad((x @ w).sum(), w)
    assert operations.count == 2 * (2 * 3 * 5 * 7)  # forward, and backward to w


def test_which_rows_a_script_has_where():
    assert steps.rows_of("vae", CPU) == ["plain", "returned", "fp32", "bf16"]
    assert steps.rows_of("vae_gan", CPU) == ["plain", "fp32", "bf16"]
    assert steps.rows_of("wgan_gp", CPU) == ["plain", "fp32"]
    graphs = ["graph-fp32", "graph-tf32", "graph-bf16"]
    assert steps.rows_of("vae", CUDA) == ["plain", "fp32", "tf32", "bf16", *graphs]
    assert steps.rows_of("wgan_gp", CUDA) == ["plain", "fp32", "graph-fp32"]


def test_the_plain_loops_images_may_go_to_another_process():
    images = pickle.loads(pickle.dumps(steps.Images(np.zeros((2, 32, 32, 3), np.uint8))))
    assert len(images) == 2 and images[1].shape == (3, 32, 32)


@pytest.mark.parametrize(
    "script, row", [("vae_gan", "plain"), ("vae", "fp32"), ("wgan_gp", "plain"), ("wgan_gp", "fp32")]
)
def test_a_row_is_measured(script, row, device, monkeypatch, capsys):
    monkeypatch.setattr(steps, "UNTIMED", 1)
    monkeypatch.setattr(steps, "IMAGES", 8)
    monkeypatch.setattr(steps, "product_rate", lambda device, precision: 1e12)
    threads = torch.get_num_threads()
    steps.main([script, "--row", row, "--device", str(device), "--batch-size", "4", "--steps", "1", "--rounds", "1"])
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found["speed"] > 0 and found["share"] > 0


@pytest.mark.parametrize(
    "argv, words",
    [
        (["gan"], "say which of vae, vae_gan, wgan_gp"),
        (["--row", "fp32"], "with --row just one"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_bad_flags(refused, argv, words):
    assert words in refused(steps.main, *argv)
