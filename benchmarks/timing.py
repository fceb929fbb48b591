"""Timing for the benchmarks beside: seconds of a training step, and a table with a process for each row."""

import subprocess
import sys
import time

import torch

from common import runs


def time_steps(step, steps, device):
    """-> seconds of `steps` calls, after five untimed ones."""
    for i in range(5 + steps):
        if i == 5:
            began = synchronised(device)
        step(i)
    return synchronised(device) - began


def synchronised(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(rows, file, args, title):
    """Print a table: `python file --row ROW` gives images per second for each of `rows`, {row: words}, first the peer.

    Every row is a process of its own: memory settings and graphs outlive a measurement.
    """
    found = {}
    for row in rows:
        words = [sys.executable, file, "--row", row, "--device", args.device]
        words += ["--batch-size", str(args.batch_size), "--steps", str(args.steps)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise runs.UserError(f"the row '{row}' failed: {done.stderr.strip().splitlines()[-1]}")
        found[row] = float(done.stdout)
    print(f"{runs.machine()}, torch {torch.__version__}, batch size {args.batch_size}\n")
    print(f"| {title} | images/s | ratio |\n|---|---:|---:|")
    for row, value in found.items():
        print(f"| {rows[row]} | {value:.0f} | {value / next(iter(found.values())):.2f} |")
