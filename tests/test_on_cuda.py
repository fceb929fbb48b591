"""benchmarks/on_cuda.py on the CPU: which items run, what a failure, a limit and a stop leave, what the tables say.

pytest tests/test_on_cuda.py        # the items are short commands made here; the slow test measures real steps
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import probe
import vae
import vae_gan
from benchmarks import on_cuda
from common import runs

CPU = torch.device("cpu")
HERE = ("--quick", "--device", "cpu", "--out", "out")


def item(name, code, **options):
    """An item that runs Python code, which prints the JSON of its row."""
    return on_cuda.Item(name, "A table", f"row {name}", ((sys.executable, "-c", code),), json.loads, **options)


@pytest.fixture
def call(in_tmp, monkeypatch, capsys):
    """call(items, ...) -> exit status, and the tables, which are printed and written."""

    def run(items, *argv):
        monkeypatch.setattr(on_cuda, "table", lambda args, device: items)
        status = 0
        try:
            on_cuda.main([*HERE, *argv, *(item.name for item in items)])
        except SystemExit as stop:
            status = stop.code
        text = Path("out/tables.md").read_text()
        assert text and text in capsys.readouterr().out
        return status, text

    return run


def record(name):
    return json.loads(Path(f"out/{name}.json").read_text())


# --- running ------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_not_measured_again_and_what_failed_is(call):
    counting = (
        "open('{0}', 'a').write('.'); n = len(open('{0}').read()); assert n > {1}, 'too early'; print('{{\"n\": 7}}')"
    )
    items = [item(name, counting.format(name, least)) for name, least in (("well", 0), ("late", 1))]
    status, text = call(items)
    assert status == 1 and "| row well | 7 |" in text and "too early" in text and "| row late" not in text
    assert record("well")["result"] == {"n": 7} and not record("late")["result"]
    status, text = call(items)
    assert status == 0 and "| row well | 7 |" in text and "| row late | 7 |" in text and "too early" not in text
    assert (Path("well").read_text(), Path("late").read_text()) == (".", "..")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; print('{}'); sys.exit('the disk is full')", "the disk is full"),
        ("raise ValueError('no such layer')", "ValueError: no such layer"),
        ("import os; os._exit(3)", "exit status 3"),
        ("print('no number here')", "without a result"),
        ("print('{\"loss\": NaN}')", "loss is nan"),
    ],
)
def test_a_failure_is_named_and_the_rest_goes_on(call, code, reason):
    status, text = call([item("first", code), item("second", "print('{\"n\": 7}')")])
    assert status == 1 and "| row second | 7 |" in text
    (line,) = [line for line in text.splitlines() if "first" in line]
    assert line.startswith("- row first (first): ") and reason in line and reason in record("first")["failed"]


def test_two_commands_are_one_item_and_a_failure_ends_it(call):
    words = [
        (sys.executable, "-c", code) for code in ("open('one', 'w')", "raise SystemExit('two')", "open('three', 'w')")
    ]
    status, text = call([dataclasses.replace(item("all", ""), commands=tuple(words))])
    assert status == 1 and "two" in text and Path("one").exists() and not Path("three").exists()


def test_no_item_is_begun_after_the_budget(call):
    items = [item("first", "import time; time.sleep(1); print('{\"n\": 7}')"), item("second", "open('second', 'w')")]
    status, text = call(items, "--minutes", "0.01")
    assert status == 1 and "| row first | 7 |" in text
    assert "- row second (second): not done within --minutes 0.01" in text
    assert not Path("second").exists() and not Path("out/second.json").exists()


@pytest.mark.parametrize(("name", "left"), [("GRACE", "not done within --minutes 0.01"), ("LIMIT", "more than 0.5 s")])
def test_what_takes_too_long_is_ended(call, monkeypatch, name, left):
    monkeypatch.setattr(on_cuda, name, 0.5)
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    status, text = call([item("long", code)], "--minutes", "0.01")
    assert status == 1 and left in text
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    assert Path("out/long.json").exists() == (name == "LIMIT")  # the budget is no fault of the item's


def test_a_signal_ends_all_and_leaves_the_tables(in_tmp, monkeypatch):
    stopping = f"import os, time; os.kill(os.getppid(), {int(signal.SIGTERM)}); time.sleep(60)"
    items = [item("well", "print('{\"n\": 7}')"), item("first", stopping), item("second", "print('{\"n\": 7}')")]
    monkeypatch.setattr(on_cuda, "table", lambda args, device: items)
    with pytest.raises(runs.Interrupted, match="the same command goes on"):
        on_cuda.main([*HERE, "well", "first", "second"])
    text = Path("out/tables.md").read_text()
    assert "| row well | 7 |" in text and "- row first (first): stopped" in text and "(second): stopped" in text
    assert not Path("out/first.json").exists()


def test_items_side_by_side_are_those_that_measure_no_time(call):
    waits = "import time; open('{}', 'w'); began = time.time()\nwhile True:\n  try: open('{}'); break\n"
    waits += "  except FileNotFoundError: assert time.time() < began + {}\nprint('{{\"n\": 7}}')"
    pair = [item("a", waits.format("a", "b", 20), beside=True), item("b", waits.format("b", "a", 20), beside=True)]
    assert call(pair, "--jobs", "2")[0] == 0  # each waits for the other
    alone = [item("c", waits.format("c", "d", 0.3)), item("d", waits.format("d", "c", 0.3))]
    status, text = call(alone, "--jobs", "2")
    assert status == 1 and "(c): AssertionError" in text and "| row d | 7 |" in text


# --- what is said -------------------------------------------------------------------------------------------------


def test_what_needs_cuda_is_not_run_on_a_cpu(call):
    status, text = call([item("graph", "open('graph', 'w')", cuda=True), item("well", "print('{\"n\": 7}')")])
    assert status == 0 and "- row graph (graph): not measured: it needs CUDA" in text
    assert not Path("graph").exists() and not Path("out/graph.json").exists()


def test_what_was_not_asked_for_is_said_too(call, in_tmp, monkeypatch):
    items = [item("first", "print('{\"n\": 7}')"), item("second", "print('{\"n\": 7}')")]
    call(items[:1])
    monkeypatch.setattr(on_cuda, "table", lambda args, device: items)
    on_cuda.main([*HERE, "first"])
    assert "- row second (second): not measured" in Path("out/tables.md").read_text()


def test_machines_are_not_mixed(in_tmp):
    items = [item(name, "") for name in ("plain", "ours", "graph")]
    for i, (each, machine) in enumerate(zip(items, ("a CPU", "a CPU", "a GPU"), strict=True)):
        made = {
            "machine": machine,
            "torch": "2.13.0",
            "quick": machine == "a CPU",
            "result": {"images/s": 100 * (i + 1)},
        }
        runs.write_json(Path(f"out/{each.name}.json"), made)
    text = on_cuda.table_text(items, on_cuda.parse_args(HERE), {})
    on_cpu, on_gpu = text.split("a GPU, torch 2.13.0\n")
    assert "a CPU, torch 2.13.0, --quick: the numbers mean nothing" in on_cpu and "quick" not in on_gpu
    assert "| row ours | 200.0 | 2 |" in on_cpu and "| row graph | 300.0 |" in on_gpu and "ratio" not in on_gpu


def test_a_cpu_beside_a_gpu_is_not_called_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert on_cuda.machine(torch.device("cuda")) == "NVIDIA H100"
    assert on_cuda.machine(CPU) == "the CPU beside NVIDIA H100"


def test_another_devices_or_commands_result_is_kept(call, refused):
    items = [item("well", "print('{\"n\": 7}')")]
    call(items)
    for change in ({"device": "cuda"}, {"command": "python other.py"}):
        before = record("well") | change
        runs.write_json(Path("out/well.json"), before)
        said = refused(on_cuda.main, *HERE, "well")
        assert "out/well.json holds the result of" in said and "give another --out" in said
        assert record("well") == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "cpu"], "no CUDA device here: --quick"),
        ([*HERE, "sped"], "no item's name begins with sped"),
        ([*HERE, "--minutes", "-1"], "--minutes"),
        ([*HERE, "--jobs", "0"], "--jobs"),
        ([*HERE, "--epochs", "0"], "--epochs"),
        ([*HERE, "--data", "mnist"], "--data"),
        (["--quick", "--device", "cpu", "--minutes", "0", "--out", "file/out"], "cannot write file/out/tables.md"),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(in_tmp, refused, argv, words):
    Path("file").write_text("")
    assert words in refused(on_cuda.main, *argv)


# --- the real items -----------------------------------------------------------------------------------------------


def real(*argv, device=CPU):
    return on_cuda.table(on_cuda.parse_args(argv), device)


def test_every_command_is_one_that_its_script_takes():
    mains = {"vae.py": vae, "vae_gan.py": vae_gan, "probe.py": probe, "on_cuda.py": on_cuda}
    items = real("--features", "net.pt2", "--capture", "--limit", "9000", device=torch.device("cuda"))
    seen = set()
    for words in (words for each in items for words in each.commands if words[1] != "-m"):
        script = Path(words[1])
        assert script.is_file()
        args = mains[script.name].parse_args(words[2:])
        seen.add(script.name)
        if script.name in ("vae.py", "vae_gan.py"):
            assert (args.holdout, args.epochs, args.fid, args.features) == (5000, 15, 5000, "net.pt2")
    assert seen == set(mains)
    assert len({each.name for each in items}) == len(items)


def test_the_candidates_are_all_there_and_the_defaults_come_early():
    names = [each.name.removeprefix("tune-") for each in real() if each.name.startswith("tune-")]
    schedules = {f"vae-{lr}-{s}" for lr in ("2.5e-4", "5e-4", "1e-3", "2e-3") for s in ("constant", "cosine")}
    gammas = {f"vae_gan-{gamma}-conv2" for gamma in ("3e-3", "1e-2", "3e-2", "1e-1")}
    weights = {f"contrastive-{weight}" for weight in (0, 150, 300, 600, 1200)}
    assert set(names) == schedules | gammas | weights | {"vae_gan-1e-2-conv1", "vae_gan-1e-2-fc"}
    assert {"vae-5e-4-constant", "vae_gan-1e-2-conv2", "contrastive-300"} <= set(names[:4])


def test_only_cuda_can_capture_and_has_tf32():
    items = {each.name: each for each in real()}
    assert {name for name, each in items.items() if each.cuda} == {n for n in items if "graph" in n or "tf32" in n}
    for name in (
        "speed-vae-compile-bf16",
        "speed-vae_gan-loader",
        "speed-quality-vae-graph-bf16-seed-1",
        "fid-pytorch-fid",
    ):
        assert name in items
    assert all(each.cuda for each in real("--capture") if each.name.startswith("tune-"))


def test_a_test_files_failures_are_named(call, tmp_path):
    file = tmp_path / "test_it.py"
    original = next(each for each in real() if each.name == "tests-contrastive")
    each = dataclasses.replace(original, commands=((*original.commands[0][:-1], str(file)),))
    file.write_text("def test_good(): pass\n\ndef test_bad(): assert 2 > 3, 'as expected'\n")
    status, text = call([each])
    assert status == 1 and "1 failed, 1 passed" in text and "test_bad" in text and "test_good" not in text
    file.write_text("import pytest\n\ndef test_good(): pass\n\n@pytest.mark.skip\ndef test_other(): pass\n")
    assert call([each])[0] == 0
    assert record(each.name)["result"] == {"passed": 1, "skipped": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo asks for it, and hides the warning
def test_a_compiled_step_does_what_ours_does(monkeypatch):
    losses, route = {}, vae_gan.routed_gradients

    def otherwise(*given):  # as the compiler lays them out
        gradients, numbers = route(*given)
        layout = {4: torch.channels_last}
        return {
            k: [g.contiguous(memory_format=layout.get(g.ndim, torch.contiguous_format)) for g in v]
            for k, v in gradients.items()
        }, numbers

    for script, module in (("vae", vae), ("vae_gan", vae_gan)):
        for row in ("fp32", "compile-fp32"):
            with monkeypatch.context() as patch:  # a row changes what it measures
                patch.setattr(module, "make_step", module.make_step)
                patch.setattr(on_cuda.timing, "time_steps", on_cuda.timing.time_steps)
                patch.setattr(vae_gan, "routed_gradients", otherwise if row == "compile-fp32" else route)
                losses[row] = on_cuda.speed(script, row, on_cuda.parse_args(HERE), CPU)["loss"]
        assert losses["compile-fp32"] == pytest.approx(losses["fp32"], rel=1e-5)
