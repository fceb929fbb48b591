"""common/runs.py: files whole or not at all, flags that continue a run, checkpoints, one-sentence errors.

pytest tests/test_runs.py
"""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from common import runs
from common.runs import UserError


def parser():
    p = runs.Parser("A script.")
    runs.add_run_flags(p, name="try")
    p.add_argument("--width", type=runs.number(int, 1, 64), default=8)
    p.add_argument("--rate", type=runs.number(float, above=0), default=0.5)
    return p


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--width", "0"], "--width: 0 is out of range: it must be at least 1 and at most 64"),
        (["--width", "65"], "at most 64"),
        (["--width", "many"], "'many' is not a whole number"),
        (["--rate", "nan"], "above 0"),
        (["--rate", "inf"], "above 0"),
        (["--seed", "-1"], "at least 0"),
        (["--seed", str(2**64)], "at most 9223372036854775807"),
        (["--name", "../x"], "cannot name a folder"),
        (["--widht", "3"], "unrecognized arguments: --widht"),
        (["--wid", "3"], "unrecognized arguments: --wid"),
    ],
)
def test_bad_flags_get_one_sentence(argv, words, refused):
    assert words in refused(lambda argv: runs.parse(parser(), argv, "script.py"), *argv)


def saved(width):
    run = runs.Run(runs.parse(parser(), ["--width", str(width)], "script.py"), "script.py")
    run.begin()
    run.save(3, {}, model={"w": torch.arange(3.0)})
    return run


def test_resume_takes_the_saved_flags_and_refuses_others(in_tmp):
    saved(width=16)
    resumed = runs.parse(parser(), ["--resume"], "script.py")
    assert resumed.width == 16 and resumed.device == "auto"
    assert runs.parse(parser(), ["--resume", "--width", "16"], "script.py").width == 16
    with pytest.raises(UserError, match="made with --width 16, not 8"):
        runs.parse(parser(), ["--resume", "--width", "8"], "script.py")
    assert runs.parse(parser(), ["--resume", "--width", "8"], "script.py", may_differ=("width",)).width == 8
    assert runs.parse(parser(), ["--resume"], "script.py", may_differ=("width",)).width == 16


def test_help_says_no_default_where_that_says_nothing():
    words = parser()
    words.add_argument("--other", help="of none")
    words.add_argument("--steps", default=0, help="of zero")
    text = " ".join(words.format_help().split())
    assert "of none" in text and "None" not in text and "False" not in text and "of zero (default: 0)" in text


def test_a_run_that_used_a_flag_which_is_gone_is_not_resumed(in_tmp):
    args = {"name": "try", "width": 8, "contrastive": 300.0, "patches": 0.0, "features": None}
    runs.save_checkpoint("runs/try/checkpoint.pt", {"script": "script.py", "args": args, "step": 1})
    with pytest.raises(UserError, match=r"made with --contrastive 300\.0, which script\.py has no more"):
        runs.parse(parser(), ["--resume"], "script.py")
    runs.save_checkpoint(
        "runs/try/checkpoint.pt", {"script": "script.py", "args": args | {"contrastive": 0.0}, "step": 1}
    )
    assert runs.parse(parser(), ["--resume"], "script.py").width == 8


def test_checkpoint_round_trip_and_its_errors(in_tmp):
    run = saved(width=8)
    state = run.restore({})
    assert state["step"] == 3 and torch.equal(state["model"]["w"], torch.arange(3.0))
    with pytest.raises(UserError, match="was made by script.py, not other.py"):
        runs.Run(runs.parse(parser(), [], "script.py"), "other.py").restore({})
    with pytest.raises(UserError, match="another architecture than Linear"):
        runs.load_weights(torch.nn.Linear(2, 2), state["model"], "x.pt")
    path = run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        run.restore({})
    for junk in (b"", b"hello\n", os.urandom(200)):
        path.write_bytes(junk)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            run.restore({})
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="not a checkpoint of these scripts"):
        runs.parse(parser(), ["--resume"], "script.py")
    path.unlink()
    with pytest.raises(UserError, match="there is no checkpoint"):
        run.restore({})


def test_a_checkpoint_that_is_not_the_fault_is_not_blamed(in_tmp, monkeypatch):
    """Where memory or a right is missing, the advice to train anew would be wrong."""
    run = saved(width=8)

    def fail(error):
        def load(*args, **kwargs):
            raise error

        monkeypatch.setattr(torch, "load", load)

    fail(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    with pytest.raises(UserError, match="cannot read runs/try/checkpoint.pt: Permission denied; check"):
        run.restore({})
    fail(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    with pytest.raises(RuntimeError, match="allocate"):
        run.restore({})


@pytest.mark.parametrize(
    "text",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 17.00 GB",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Failed to CUDA calloc async 4 bytes",
    ],
)
def test_memory_that_ran_out_is_known_by_its_words(text):
    assert runs.is_out_of_memory(RuntimeError(text))
    assert not runs.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_rank_without_its_group_is_a_process_like_others(monkeypatch, capsys):
    """RANK alone may stand in an environment; torchrun gives WORLD_SIZE as well."""
    monkeypatch.setenv("RANK", "1")

    def bad():
        raise UserError("give something else")

    with pytest.raises(SystemExit) as end:
        runs.cli(bad)
    assert end.value.code == 2 and "give something else" in capsys.readouterr().err


def test_samples_may_have_a_seed_of_their_own(in_tmp):
    saved(width=8)
    more = parser()
    more.add_argument("--sample", type=int)
    assert runs.parse(more, ["--sample", "3", "--seed", "1"], "script.py", ("resume", "sample")).seed == 1
    with pytest.raises(UserError, match="--seed 0, not 1"):
        runs.parse(more, ["--resume", "--seed", "1"], "script.py", ("resume", "sample"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch, code):
    path = tmp_path / "metrics.json"
    runs.write_json(path, {"a": 1})

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(runs.os, "fsync", fail)
    with pytest.raises(UserError, match=os.strerror(code)):
        runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_run_folder_that_cannot_be_made(in_tmp, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match="Read-only file system"):
        runs.Run(runs.parse(parser(), [], "script.py"), "script.py").begin()


def test_killed_while_writing_a_checkpoint_the_previous_one_is_usable(tmp_path):
    script = textwrap.dedent("""
        import sys, torch
        from common import runs
        state = {"step": 0, "w": torch.zeros(4_000_000)}
        runs.save_checkpoint("c.pt", state)
        print("first", flush=True)
        for step in range(1, 10_000):
            runs.save_checkpoint("c.pt", {"step": step, "w": torch.full((4_000_000,), float(step))})
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.readline()
    for _ in range(3000):  # wait until a second checkpoint is half written
        parts = list(tmp_path.glob(".c.*.part.pt"))
        if parts and parts[0].stat().st_size > 0:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    state = torch.load(tmp_path / "c.pt")
    assert (state["w"] == state["step"]).all()


def test_an_earlier_run_is_moved_aside(in_tmp):
    saved(width=16)
    saved(width=32)
    saved(width=64)
    widths = {
        name: json.loads((in_tmp / "runs" / name / "args.json").read_text())["width"]
        for name in os.listdir("runs")
        if not name.startswith(".")
    }
    assert widths == {"try.1": 16, "try.2": 32, "try": 64}


def test_a_run_that_goes_on_names_every_commit_and_machine_that_it_had(in_tmp):
    run = saved(width=8)
    file = run / "args.json"
    here = json.loads(file.read_text())
    run.go_on()
    assert json.loads(file.read_text()) == here  # the same ones are not said twice
    file.write_text(json.dumps(here | {"commit": "0123abc", "machine": "a GPU"}))
    run.go_on()
    then = json.loads(file.read_text())
    assert then["machine"] == f"a GPU; {here['machine']}"
    assert then["commit"] == (f"0123abc; {here['commit']}" if here["commit"] else "0123abc")
    file.write_text(json.dumps(here | {"torch": f"{here['torch']}0"}))  # one contains the other
    run.go_on()
    assert json.loads(file.read_text())["torch"] == f"{here['torch']}0; {here['torch']}"
    file.unlink()
    run.go_on()
    assert json.loads(file.read_text()) == here


def test_the_log_is_rewound_and_survives_a_cut_line(in_tmp):
    run = saved(width=8)
    for step in (1, 2, 3, 4):
        run.log(step=step)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    run.rewind_log(3)
    assert [record["step"] for record in run.read_log()] == [1, 2, 3]


def test_restore_gives_back_modules_and_optimisers(in_tmp):
    def make(value):
        module = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(module.weight, value)
        optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(value), capturable=False, foreach=False)
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return {"model": module, "optimizer": optimizer}

    run, saved_parts, parts = saved(width=8), make(0.5), make(0.25)
    run.save(3, saved_parts, note="x")
    rate = parts["optimizer"].param_groups[0]["lr"]
    assert run.restore(parts)["note"] == "x"
    assert torch.equal(parts["model"].weight, saved_parts["model"].weight)
    assert parts["optimizer"].param_groups[0]["lr"] is rate and rate.item() == 0.5  # a graph may hold this tensor


def test_a_terminal_that_closes_stops_a_run_as_ctrl_c_does_unless_nohup_protects_it(monkeypatch):
    for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        monkeypatch.setattr(signal, "getsignal", lambda which, handler=handler: handler)
        assert (signal.SIGHUP in runs.stop_signals()) is stops
        assert {signal.SIGINT, signal.SIGTERM} <= set(runs.stop_signals())


def test_versions_name_the_commit_and_the_machine():
    found = runs.versions("cpu")
    assert found["torch"] == torch.__version__ and found["machine"]


def test_a_machine_of_several_processes_says_how_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(runs.ranks, "world_size", lambda: 2)
    assert runs.machine("auto") == "2 x a GPU" and runs.machine("cpu").endswith(", 2 processes")


def test_an_apple_gpu_is_not_recorded_as_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runs.machine("auto").endswith(", GPU") and "thread" in runs.machine("cpu")


def test_what_ran_on_the_cpu_of_a_gpu_machine_says_so(in_tmp, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert runs.machine("auto") == "a GPU" and runs.machine("cuda:0") == "a GPU"
    assert "thread" in runs.machine("cpu")
    args = runs.parse(parser(), [], "script.py")
    del args.device  # a proof has no such flag
    run = runs.Run(args, "script.py")
    run.begin()
    assert "thread" in json.loads((run / "args.json").read_text())["machine"]
