"""Shared fixtures: the generated data set, the real CIFAR-10 where there is one, and commands run as a person would."""

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from helpers import DEVICES, ROOT, write_images

from common import data, runs

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: a thread for each, also in processes they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unlocked():
    """A test is to runs/ what a process is: it leaves no folder locked."""
    yield
    for descriptor in runs.LOCKS.values():
        os.close(descriptor)
    runs.LOCKS.clear()


@pytest.fixture(params=DEVICES)
def device(request):
    """The CPU, and CUDA where there is one."""
    return torch.device(request.param)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures are files without a drawing: to draw them takes longer than a training of a few steps."""
    helpers.no_figures(monkeypatch)


@pytest.fixture
def few_filters(monkeypatch):
    helpers.few_filters(monkeypatch)


@pytest.fixture
def small_networks(monkeypatch):
    """Encoder, decoder and discriminator with next to no arithmetic."""
    helpers.small_networks(monkeypatch)


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """A --data-dir in which --data shapes is cached."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        data.load("shapes", folder, split)
    return folder


@pytest.fixture(scope="session")
def cifar_dir():
    """A --data-dir with the real CIFAR-10, or a skip."""
    folder = os.environ.get("CIFAR10_DIR")
    if not folder:
        pytest.skip("CIFAR10_DIR names no folder with CIFAR-10")
    return Path(folder)


@pytest.fixture
def image_folder(tmp_path):
    """72 PNG images of two classes, which an encoder can tell apart."""
    write_images(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run inside an empty folder: runs/ appears there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(capsys):
    """refused(main, *argv) -> the one sentence with which the command was refused (exit status 2)."""

    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runs.cli(lambda: main([str(word) for word in argv]))
        message = capsys.readouterr().err.split("\r")[-1].strip()  # what stays on a terminal after a progress bar
        assert stop.value.code == 2, message
        assert message.count("\n") == 0 and "Traceback" not in message, message
        return message

    return call


@pytest.fixture
def command(tmp_path):
    """command("vae.py", "--epochs", 1) -> the finished process, run in an empty folder."""

    def call(script, *argv, **options):
        words = [sys.executable, str(ROOT / script), *map(str, argv)]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, **options)

    return call
