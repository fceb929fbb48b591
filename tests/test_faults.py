"""benchmarks/faults.py: its judges see a loss, a traceback, a wrong exit status; its table counts them.

pytest tests/test_faults.py
"""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import faults
from common import runs
from common.loop import Loop


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The campaign's folder."""
    monkeypatch.setattr(faults, "WORK", tmp_path)
    (tmp_path / "said").mkdir()
    return tmp_path


def write_run(run, weight=1.0, loss=2.0, step=faults.STEPS, seconds=3.0):
    run.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "seconds": seconds, "model": {"w": torch.tensor([weight])}}, run / "checkpoint.pt")
    record = {"step": step, "loss": loss, "seconds": seconds}
    (run / "log.jsonl").write_text(2 * (json.dumps(record) + "\n"))


@pytest.fixture
def whole(work):
    write_run(work / "whole")
    found = faults.Unbroken(work / "whole")
    found.keep()
    return found


def test_an_equal_end_is_survived_though_its_seconds_differ(work, whole):
    write_run(work / "x", seconds=4.0)
    whole.judge_end(work / "x")
    assert faults.finished(work / "x")


@pytest.mark.parametrize("change", [{"weight": 1.0000001}, {"loss": 2.0000001}, {"step": faults.STEPS - 1}])
def test_a_bit_that_differs_is_a_loss(work, whole, change):
    write_run(work / "x", **change)
    with pytest.raises(faults.Fault) as fault:
        whole.judge_end(work / "x")
    assert fault.value.lost


@pytest.mark.parametrize("name", ["checkpoint.pt", "log.jsonl"])
@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"", None])
def test_a_damaged_or_missing_file_is_a_loss(work, whole, name, damage):
    write_run(work / "x")
    file = work / "x" / name
    data = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(data))
    with pytest.raises(faults.Fault) as fault:
        whole.judge_end(work / "x")
    assert fault.value.lost


def test_a_changed_file_changes_the_snapshot(work):
    write_run(work / "x")
    before = faults.snapshot(work / "x")
    (work / "x" / ".x.lock").touch()
    assert faults.snapshot(work / "x") == before
    (work / "x" / "log.jsonl").write_text("other")
    assert faults.snapshot(work / "x") != before


SENTENCE = "import sys; print('say.py: no space', file=sys.stderr)\n"


@pytest.mark.parametrize(
    "code, complaint",
    [
        (SENTENCE + "sys.exit(2)", None),
        (SENTENCE, "exit status 0, not 2"),
        (SENTENCE + "sys.exit(1)", "exit status 1, not 2"),
        (SENTENCE + SENTENCE + "sys.exit(2)", "no single last sentence"),
        (SENTENCE.replace("no", "little") + "sys.exit(2)", "did not say 'no space'"),
        ("raise OSError('no space')", "traceback"),
    ],
)
def test_what_counts_as_a_refusal(work, code, complaint):
    (work / "say.py").write_text(code)
    child = faults.Child(work, work / "say.py")
    if complaint is None:
        child.refuses("no space")
    else:
        with pytest.raises(faults.Fault, match=complaint):
            child.refuses("no space")


def test_what_hangs_is_ended_and_is_a_fault(work, monkeypatch):
    monkeypatch.setattr(faults, "LIMIT", 0.2)
    (work / "say.py").write_text("import time; time.sleep(100)")
    with pytest.raises(faults.Fault, match="did not end"):
        faults.Child(work, work / "say.py").succeeds()
    assert not faults.Child.live


def fails(lost):
    raise faults.Fault("the checkpoint | is gone", lost)


def skips():
    raise faults.Skip("no such user")


@pytest.mark.parametrize(
    "kind, count, fault, row, status",
    [
        ("SIGKILL", 4, lambda: None, "| 4 | 4 | 0 |", 0),
        ("SIGKILL", 4, lambda: fails(True), "| 4 | 0 | 1 |", 1),
        ("full disk", 1, lambda: fails(False), "| 1 | 0 | 0 |", 1),
        ("full disk", 1, lambda: 1 / 0, "| 1 | 0 | 0 |", 1),
        ("read-only folders", 1, skips, "| 0 | 0 | 0 |", 0),
    ],
)
def test_the_table_and_the_exit_status(monkeypatch, capsys, kind, count, fault, row, status):
    monkeypatch.setattr(faults, "campaign", lambda kills, seed: [(kind, "vae.py", count, fault)])
    assert faults.main([]) == status
    printed = capsys.readouterr().out
    assert f"| {kind} {row}" in printed and f"| all {row}" in printed
    assert ("vae.py: " in printed) == bool(status) and ("skipped" in printed) == (fault is skips)


def test_twenty_kills_are_spread_over_five_trainings():
    counts = [count for kind, _, count, _ in faults.campaign(20, 0) if kind == "SIGKILL"]
    assert counts == [4] * 5
    assert {kind for kind, *_ in faults.campaign(1, 0)} == set(faults.NOTES)


# --- what the campaign has found, without a campaign ----------------------------------------------------------------


def test_a_weight_whose_bits_flipped_on_the_disk_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    runs.save_checkpoint(path, {"script": "vae.py", "args": {}, "step": 1, "w": torch.ones(10_000)})
    assert runs.load_checkpoint(path)["step"] == 1
    data = path.read_bytes()
    path.write_bytes(faults.flipped(data, len(data) // 2))
    assert not torch.load(path)["w"].eq(1).all()  # torch itself does not look at the checksums
    with pytest.raises(runs.UserError, match="not a readable checkpoint"):
        runs.load_checkpoint(path)


def test_a_kill_between_log_and_checkpoint_leaves_no_gap_in_the_log():
    done = []
    run = SimpleNamespace(log=lambda **record: done.append("log"), save=lambda *_, **__: done.append("save"))
    loop = Loop(run, SimpleNamespace(), {}, "cpu", total=4, save_every=2, advice="")
    loop.step = 2
    loop.save({"mse": 0.5})
    assert done == ["log", "save"]


@pytest.mark.slow
def test_two_faults_are_tried(capsys):
    assert faults.main(["--only", "damaged CIFAR-10"]) == 0
    assert "| damaged CIFAR-10 | 2 | 2 | 0 |" in capsys.readouterr().out
