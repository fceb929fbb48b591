"""A script as a process of its own, small and without drawings: python tests/quick.py vae --epochs 1 ..."""

import importlib
import sys

import helpers
import pytest

from common import runs

if __name__ == "__main__":
    name = sys.argv[1]
    script = importlib.import_module(name)
    helpers.quickly(pytest.MonkeyPatch())
    sys.argv = [f"{name}.py", *sys.argv[2:]]
    runs.cli(script.main)
