"""reproduce.py with tiny scripts in place of the real ones, and the tables from results written by hand.

python -m pytest tests/test_reproduce.py
"""

import hashlib
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import reproduce
import vae
from common import jobs, runs, tables
from common.loop import Loop
from common.runs import read_json
from reproduce import Part

ROOT = Path(__file__).resolve().parents[1]
FAKE = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
folder = pathlib.Path("runs", words[words.index("--name") + 1])
with open("ran.txt", "a") as file:
    print(*words, "gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
if pathlib.Path("broken").exists() and folder.name in pathlib.Path("broken").read_text():
    print("a progress bar\\rfake.py: the disk is full", file=sys.stderr)
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
given = ["python", sys.argv[0], *words[:words.index("--device")]]
made = {"script": sys.argv[0], "command": " ".join(given), "size": 3.0, "machine": "a machine"}
(folder / "args.json").write_text(json.dumps(made))
(folder / "checkpoint.pt").write_text("")
if pathlib.Path("wait").exists():
    hangs = pathlib.Path("wait").read_text()
    pathlib.Path("wait").unlink()
    signal.signal(signal.SIGINT, lambda *_: pathlib.Path("asked").write_text("") if hangs else sys.exit(130))
    pathlib.Path("waiting").write_text("")
    time.sleep(60)
(folder / "metrics.json").write_text('{"seconds": 1.5}')
"""

PAGES = ("summary", "compare", "models", "distances", "kernel", "training", "classification")
PAGES += ("wgan_gp", "wgan_gp_sigma", "wgan_gp_variants", "proofs")


def fake_part(name, **options):
    command = f"python {Path('fake.py').resolve()} --name {name} --size 3"
    return Part(name, command, name, 1, ("--device", "cpu"), **options)


@pytest.fixture
def fakes(in_tmp, monkeypatch):
    """A table of a, b (which needs a) and c: -> the words of each process that ran so far, as lines."""
    (in_tmp / "fake.py").write_text(FAKE)
    parts = {"a": fake_part("a"), "b": fake_part("b", needs=("a",)), "c": fake_part("c")}
    monkeypatch.setattr(reproduce, "experiments", lambda args, rulers: parts)
    monkeypatch.setattr(reproduce, "find_rulers", lambda args: {})
    monkeypatch.setattr(jobs, "WAIT", 0.01)
    monkeypatch.setattr(runs, "versions", lambda device=None: {"commit": None})  # asks git each time
    log = in_tmp / "ran.txt"
    return lambda: log.read_text().splitlines() if log.exists() else []


def names(lines):
    return [line.split()[1] for line in lines]


def main(*argv):
    reproduce.main(["--device", "cpu", *argv])


def test_finished_parts_are_skipped(fakes, capsys):
    main()
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"3 parts, 3 to run, about 0\.1 h on two CPU cores", said[0])
    assert re.fullmatch(r"\[3/3\] c: \d+ s", said[3])
    assert re.fullmatch(r"\[1/3\] a: \d+ s, about \d+\.\d min left", said[1])
    assert names(fakes()) == ["a", "b", "c"]
    assert all("--resume" not in line for line in fakes())
    main()
    assert len(fakes()) == 3
    record = json.loads(Path("results/results.json").read_text())["runs"]["a"]
    assert record["machine"] == "a machine" and record["metrics"] == {"seconds": 1.5} and record["seconds"] == 1.5
    assert "--size 3" in record["command"] and "--device" not in record["command"]


def fake_command(name, *flags):
    return {"command": " ".join((f"python {Path('fake.py').resolve()} --name {name}", *flags))}


def set_args(folder, made):
    Path("runs", folder, "args.json").write_text(json.dumps(made))


def test_other_flags_and_later_needs_make_a_part_run_again(fakes):
    main()
    set_args("c", fake_command("c", "--size 4"))
    main()
    assert names(fakes())[3:] == ["c"] and "--resume" not in fakes()[3]  # another run's checkpoint is not gone on from
    os.utime("runs/b/metrics.json", (0, 0))  # as if a had been trained again since
    main()
    assert names(fakes())[4:] == ["b"]


def test_an_interrupted_part_is_resumed(fakes):
    main()
    Path("runs/c/metrics.json").unlink()
    note = Path("runs/reproduce/c.json")
    runs.write_json(note, {"seconds": 1000})  # what it took so far
    main()
    assert names(fakes())[3:] == ["c"] and "--resume" in fakes()[3]
    assert read_json(note)["seconds"] > 1000


def test_how_long_a_part_took_is_noted_down_where_its_metrics_do_not_say(fakes):
    main()
    Path("runs/c/metrics.json").write_text('{"size": 3}')
    main()
    found = read_json("results/results.json")["runs"]
    assert found["a"]["seconds"] == 1.5  # by its metrics
    assert found["c"]["seconds"] == read_json("runs/reproduce/c.json")["seconds"]


def test_a_failed_part_is_named_and_the_others_go_on(fakes, capsys):
    Path("broken").write_text("a")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert names(fakes()) == ["a", "c"]
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said == ["failed: a: fake.py: the disk is full", "failed: b: not run: it needs a, which failed"]
    assert list(json.loads(Path("results/results.json").read_text())["runs"]) == ["c"]


def test_what_a_killed_reproduce_left_running_does_not_write_into_what_is_shown(fakes):
    errors = Path("runs/reproduce/c.err")
    errors.parent.mkdir(parents=True)
    Path("broken").write_text("c")
    with open(errors, "wb", buffering=0) as left:
        left.write(100 * b"its progress bar\r")
        with pytest.raises(SystemExit):
            main("--only", "c")
        left.write(b"its progress bar")
    assert errors.read_text().splitlines()[-1] == "fake.py: the disk is full"


def test_only(fakes, refused, capsys):
    main("--only", "c")
    assert names(fakes()) == ["c"]
    with pytest.raises(SystemExit) as stop:
        main("--only", "b")
    assert stop.value.code == 1 and names(fakes()) == ["c"]
    assert "failed: b: not run: it needs a, which is not finished" in capsys.readouterr().err
    assert (
        refused(reproduce.main, "--device", "cpu", "--only", "d")
        == f"{Path(sys.argv[0]).name}: --only d fits no part: the parts are a, b, c"
    )


def test_a_part_that_leaves_nothing_has_failed(fakes, capsys):
    Path("fake.py").write_text("")
    with pytest.raises(SystemExit) as stop:
        main("--only", "c")
    assert stop.value.code == 1
    assert "failed: c: it ended well but left no such metrics.json" in capsys.readouterr().err


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_reaches_the_process_and_says_how_to_go_on(fakes, capsys, times):
    """Once: it saves itself. Twice: it is ended."""
    Path("wait").write_text("hangs" if times == 2 else "")
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]

    waiting, asked, until = Path("waiting").resolve(), Path("asked").resolve(), time.monotonic() + 60

    def appears(file):
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.02)
        return file.exists()

    def press():
        if appears(waiting):
            os.kill(os.getpid(), signal.SIGINT)
        if times == 2 and appears(asked):
            os.kill(os.getpid(), signal.SIGTERM)

    presser = threading.Thread(target=press, daemon=True)
    presser.start()
    with pytest.raises(SystemExit) as stop:
        runs.cli(lambda: main("--only", "a"))
    presser.join(timeout=30)
    said = capsys.readouterr().err
    assert stop.value.code == 130, said
    assert "the same command goes on" in said and "Traceback" not in said
    assert json.loads(Path("results/results.json").read_text())["runs"] == {}
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == handlers
    main("--only", "a")
    assert "--resume" in fakes()[-1] and Path("runs/a/metrics.json").exists()


def test_the_typed_command_is_kept_less_what_differs_between_machines():
    argv = ["runs/a b", "--name", "x", "--data-dir", "my data", "--seed=0", "--device=cpu", "--resume", "--layer"]
    assert runs.typed("probe.py", argv) == "python probe.py 'runs/a b' --name x --seed=0 --layer"


def test_a_run_that_goes_on_to_more_epochs_says_so_and_keeps_what_was_measured(in_tmp):
    flags = ["--name", "x", "--device", "cpu", "--batch-size", "30"]
    metrics, kept = Path("runs/x/metrics.json"), Path("runs/x/metrics-epoch1.json")

    def train(*argv):
        args = vae.parse_args(argv)
        run, images = runs.Run(args, "vae.py", argv), torch.zeros(60, 1)
        with Loop.of_epochs(run, args, {"average": torch.nn.Linear(1, 1)}, images, "") as loop:
            for _ in loop:
                if loop.saves():
                    loop.save({})
        runs.write_json(metrics, {"step": loop.step})
        return read_json("runs/x/args.json")

    begun = train(*flags, "--epochs", "1")
    assert begun["command"] == "python vae.py --name x --batch-size 30 --epochs 1"
    assert train("--name", "x", "--resume") == begun  # no more epochs: nothing to note
    assert not kept.exists()
    later = train(*flags, "--epochs", "2", "--resume")
    assert read_json(kept) == {"step": 2} and read_json(metrics) == {"step": 4}
    assert later["command"] == "python vae.py --name x --batch-size 30 --epochs 2" and later["epochs"] == 2
    assert later["commit"] == begun["commit"]  # the same one is not said twice


def test_the_order_of_the_flags_does_not_matter(fakes):
    main("--only", "c")
    set_args("c", fake_command("c", "--size 3"))
    main("--only", "c")
    set_args("c", {"command": f"python {Path('fake.py').resolve()} --size 3 --name c"})
    main("--only", "c")
    assert len(fakes()) == 1


OLD = {"script": "vae.py", "name": "vae_128_seed_0", "seed": 0, "latent_dim": 128, "patches": 0.0, "epochs": 20}
OLD |= {"precision": "fp32", "fid": "off", "data_dir": "elsewhere", "device": "auto", "lr": 0.0005}


@pytest.mark.parametrize(
    "change, epochs, is_finished, goes_on",
    [
        ({}, 20, True, True),
        ({"epochs": 10}, 20, False, True),
        ({"epochs": 50}, 20, False, False),
        ({"precision": "bf16"}, 20, False, False),
        ({"precision": "bf16", "epochs": 10}, 20, False, False),
        ({"script": "vae_gan.py"}, 20, False, False),
    ],
)
def test_which_run_is_finished_and_which_goes_on(in_tmp, change, epochs, is_finished, goes_on):
    made = OLD | change
    flags = ("name", "seed", "fid", "latent_dim", "epochs", "precision")
    words = " ".join(f"--{flag.replace('_', '-')} {made[flag]}" for flag in flags)
    made |= {"command": f"python {made['script']} {words}"}
    runs.write_json(Path("runs/vae_128_seed_0/args.json"), made)
    Path("runs/vae_128_seed_0/checkpoint.pt").touch()
    Path("runs/vae_128_seed_0/metrics.json").write_text('{"seconds": 1}')
    args = reproduce.parse_args(["--epochs", str(epochs), "--seeds", "1"])
    parts = reproduce.experiments(args, {})
    part = parts["vae_128_seed_0"]
    assert part.finished(parts) is is_finished
    assert part.resumable() is goes_on
    os.utime("runs/vae_128_seed_0/metrics.json", (0, 0))  # of before the run was begun anew, or extended
    assert not part.finished(parts)


def test_a_measuring_part_is_finished_when_all_rulers_have_measured(in_tmp):
    rulers = {"fd_features": "runs/classifier/features.pt2", "fd_imagenet": "runs/imagenet_features/imagenet.pt2"}
    args = reproduce.parse_args(["--seeds", "1"])
    parts = reproduce.experiments(args, rulers)
    part = parts["measure_vae_gan_64_seed_0"]
    assert part.where[-5:] == ("--features", *rulers.values(), "--compare", "runs/vae_64_seed_0")
    runs.write_json(Path("runs/vae_gan_64_seed_0/metrics.json"), {"fd_features_generation_expost": 1.0})
    assert not part.finished(parts)
    both = {"fd_features_generation_expost": 1.0, "fd_imagenet_generation_expost": 2.0}
    runs.write_json(Path("runs/vae_gan_64_seed_0/metrics.json"), both)
    assert part.finished(parts)
    Path("runs/imagenet_features").mkdir()
    Path(rulers["fd_imagenet"]).touch()
    os.utime("runs/vae_gan_64_seed_0/metrics.json", (0, 0))  # as if the network had been made anew since
    assert not part.finished(parts)


def test_pictures_are_those_that_the_pages_show_of_the_runs_that_gave_the_numbers(fakes):
    main()
    Path("runs/c/c.png").write_text("of another training")
    set_args("c", fake_command("c", "--size 4"))
    Path("runs/a/a.png").write_text("of this one")
    Path("runs/a/unseen.png").write_text("in no page")
    Path("REPORT.md").write_text("![c](results/c/c.png)")
    Path("prior_proofs").mkdir()
    Path("prior_proofs/README.md").write_text("![a](../results/a/a.png)")
    main("--only", "a")
    assert [str(path) for path in Path("results").rglob("*.png")] == ["results/a/a.png"]


def test_gpus_take_a_part_each(fakes, monkeypatch):
    monkeypatch.setattr(jobs, "slots", lambda device: ["0", "1", ""])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    table = reproduce.experiments(None, {})
    table["d"] = fake_part("d", cpu=True)
    read = []
    monkeypatch.setattr(reproduce.data, "load", lambda *of: read.append((of, Path("ran.txt").exists())))
    main()
    assert read == [(("cifar10", "data", "test"), False)]  # once, before the first part
    gpus = {line.split()[1]: line.split()[-1] for line in fakes()}
    assert {gpus["a"], gpus["c"]} == {"0", "1"} and gpus["b"] in ("0", "1")
    assert gpus["d"] == "None"  # on the CPU
    assert names(fakes()).index("a") < names(fakes()).index("b")


def test_the_slots_are_the_gpus_and_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert jobs.slots("auto") == ["0", "1", ""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert jobs.slots("cuda") == ["5", "7", ""]
    assert jobs.slots("cpu") == jobs.slots("cuda:1") == [""]


TRAINED = "python vae.py --name vae_64_seed_0 --latent-dim 64 --seed 0 --epochs 20 --precision fp32 --fid off"


def test_copies_of_a_run_are_measured_and_shown_beside_it(in_tmp, no_figures):
    rulers = {"fd_features": "runs/classifier/features.pt2"}
    for name, bits in {"vae_64_seed_0": 6.0, "vae_64_seed_0-epoch5": 6.5, "vae_64_seed_0-epoch10": 6.2}.items():
        made = OLD | {"name": name, "latent_dim": 64, "machine": "an abacus", "commit": "abc"}
        made["command"] = TRAINED
        runs.write_json(Path("runs", name, "args.json"), made)
        Path("runs", name, "checkpoint.pt").touch()
        numbers = vae_run(bits)["metrics"] | {"fd_features_generation_expost": 10 * bits}
        numbers |= {"fd_features_generation_kid": 0.0123456, "fd_features_generation_kid_stderr": 0.000789}
        numbers |= {"fd_features_floor_kid": -1e-5, "fd_features_floor_kid_stderr": 2e-5}
        runs.write_json(Path("runs", name, "metrics.json"), numbers)
    begun = OLD | {"command": TRAINED.replace("--epochs 20", "--epochs 10").replace(" --fid off", "")}
    runs.write_json(Path("runs/vae_64_seed_0-epoch10/args.json"), begun)  # and gone on with since
    others = [TRAINED.replace("64 --", "32 --"), TRAINED.replace("fp32", "bf16"), f"{TRAINED} --beta 4"]
    others += [TRAINED.replace("--seed 0", "--seed 1"), TRAINED.replace("vae.py", "vae_gan.py"), ""]
    for epoch, command in enumerate(others, start=11):
        runs.write_json(Path(f"runs/vae_64_seed_0-epoch{epoch}/args.json"), {"command": command})
    runs.write_json(Path("runs/vae_64_seed_0-epoch5.1/args.json"), {"command": TRAINED})  # was moved aside
    probe = "probe_vae_64_seed_0-epoch5"
    runs.write_json(Path("runs", probe, "args.json"), {"epochs": 3})  # those of its classifier
    runs.write_json(Path("runs", probe, "metrics.json"), {"rows": {"mu": {"accuracy": 40.0, "interval": [39.0, 41.0]}}})
    args = reproduce.parse_args(["--epochs", "20", "--seeds", "1"])
    parts = reproduce.experiments(args, rulers)
    assert parts[probe].needs == ("measure_vae_64_seed_0-epoch5",)
    copies = [f"measure_vae_64_seed_0-epoch{n}" for n in (5, 10)]
    assert {name for name in parts if name.startswith("measure_") and "-epoch" in name} == set(copies)
    done = {name: parts[name] for name in ("vae_64_seed_0", "measure_vae_64_seed_0", *copies)}
    assert all(part.finished(parts) for part in done.values())
    settings = {"quick": False, "epochs": 20, "precision": "fp32"}
    done[probe] = parts[probe]
    found = reproduce.collect(parts, done, {}, Path("runs/reproduce"), settings, {})
    assert list(found["runs"]) == ["vae_64_seed_0", probe, "vae_64_seed_0-epoch5", "vae_64_seed_0-epoch10"]
    assert [one["epochs"] for one in found["runs"].values()] == [20, None, 5, 10]
    made = tables.tables(found)
    assert row(made["models"], "VAE, 64")[1:4:2] == ["1", "6.000"]  # the copies are not other seeds
    assert row(made["kernel"], "VAE, 64")[1:] == ["not measured", "0.01235 ± 0.0008", "not measured"]
    assert row(made["kernel"], "floor: training images")[1] == "-1e-05 ± 2e-05"
    assert "kernel distance, classifier features: samples" in made["kernel"] and "Frechet" not in made["kernel"]
    quick = tables.tables(found | {"settings": settings | {"quick": True, "images": 800}})
    assert made["kernel"].startswith("CIFAR-10.") and quick["kernel"].startswith("Built-in shapes, 800 images")
    for epochs, bits, far, read in (
        (5, "6.500", "65.0", "40.00"),
        (10, "6.200", "62.0", None),
        (20, "6.000", "60.0", None),
    ):
        shown = row(made["training"], f"VAE, 64: {epochs} epochs")
        assert (shown[3], shown[-2], shown[-1]) == (bits, far, read or "not measured")
    titles = [line.split(" | ")[0] for line in made["training"].splitlines() if "epochs |" in line]
    assert titles == [f"| VAE, 64: {n} epochs" for n in (5, 10, 20)]
    runs.write_json(Path("results/results.json"), found | {"settings": settings})
    text = reproduce.write_results(parts, args)
    assert "## training" in text and Path("results/training.png").exists()


def test_a_new_ruler_leaves_the_distances_by_the_others(in_tmp):
    """imagenet.pt2 appears beside a model that is measured already, or is made anew."""
    args = reproduce.parse_args(["--epochs", "20", "--seeds", "1"])
    runs.write_json(Path("runs/vae_64_seed_0/args.json"), {"command": TRAINED, "seed": 0})
    Path("runs/vae_64_seed_0/checkpoint.pt").touch()
    distances = dict.fromkeys(("fd_features_generation", "fd_imagenet_generation", "fid_generation"), 1.0)
    program = reproduce.IMAGENET
    program.parent.mkdir()
    program.touch()

    def shown(**more):
        """What the end writes of the distances."""
        runs.write_json(Path("runs/vae_64_seed_0/metrics.json"), vae_run(6.0)["metrics"] | more)
        os.utime("runs/vae_64_seed_0/checkpoint.pt", (0, 0))
        os.utime("runs/vae_64_seed_0/metrics.json", (2, 2))
        parts = reproduce.experiments(args, {"fd_features": "features.pt2", "fd_imagenet": str(program)})
        assert not parts["measure_vae_64_seed_0"].finished(parts)
        reproduce.write_results(parts, args)
        metrics = read_json("results/results.json")["runs"]["vae_64_seed_0"]["metrics"]
        return {key for key in metrics if key in distances}

    os.utime(program, (1, 1))
    assert shown(fd_features_generation=1.0) == {"fd_features_generation"}
    assert shown(**distances) == set(distances)
    os.utime(program, (3, 3))
    assert shown(**distances) == {"fd_features_generation", "fid_generation"}


def test_rulers_that_cannot_be_had_are_left_out_and_named(in_tmp, monkeypatch, capsys):
    def lacking():
        raise runs.UserError("the weights are not here")

    classifier = {"fd_features": "runs/classifier/features.pt2"}
    args = reproduce.parse_args([])
    with monkeypatch.context() as offline:
        offline.setattr(reproduce.inception, "find_weights", lacking)
        assert reproduce.find_rulers(args) == classifier
    said = capsys.readouterr().err
    assert "Inception FID will be not measured: the weights are not here" in said
    assert "distances in ImageNet features will be not measured: benchmarks/imagenet_features.py makes" in said
    reproduce.IMAGENET.parent.mkdir(parents=True)
    reproduce.IMAGENET.touch()
    monkeypatch.setenv("FID_WEIGHTS", "weights.pth")
    monkeypatch.setattr(reproduce.inception, "WEIGHTS_SHA256", hashlib.sha256(b"official").hexdigest())
    Path("weights.pth").write_bytes(b"official")
    more = {"fd_imagenet": "runs/imagenet_features/imagenet.pt2", "fid": "inception"}
    assert reproduce.find_rulers(args) == classifier | more and capsys.readouterr().err == ""
    quick = reproduce.find_rulers(reproduce.parse_args(["--quick"]))
    assert quick == {"fd_features": "runs/quick-classifier/features.pt2"}
    Path("weights.pth").write_bytes(b"damaged")
    assert "fid" not in reproduce.find_rulers(args)
    assert "not measured: weights.pth does not hold the official Inception weights" in capsys.readouterr().err
    Path("weights.pth").unlink()
    assert "fid" not in reproduce.find_rulers(args)
    assert "not measured: cannot read the weights weights.pth: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("only, looks", [([], True), (["meas"], True), (["measure_vae"], True), (["wgan_gp"], False)])
def test_weights_are_looked_for_only_where_a_part_measures(in_tmp, monkeypatch, only, looks):
    """For they may be downloaded then."""
    asked = []
    monkeypatch.setattr(reproduce, "find_rulers", lambda args: asked.append(args) or {"fd_features": "features.pt2"})
    monkeypatch.setattr(jobs.Queue, "run", lambda queue: {})
    main(*(word for name in only for word in ("--only", name)))
    assert bool(asked) is looks


def given(args, flag, value):
    """Whether a script's parsed flags have the value that its command gives."""
    if flag == "python":  # the script and its arguments, which have no flag
        return True
    key = flag[2:].replace("-", "_")
    if key.startswith("no_") and key not in args:
        return args[key[3:]] is False
    return str(args[key]) in (value or "True", f"{value}.0")  # 300 on the command line is 300.0 there


@pytest.mark.parametrize("flags", [[], ["--quick"], ["--device", "cpu", "--precision", "bf16", "--data-dir", "x y"]])
def test_every_command_is_one_that_its_script_parses(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rulers = {"fd_features": "a.pt2", "fd_imagenet": "b.pt2", "fid": "inception"}
    parts = reproduce.experiments(reproduce.parse_args(flags), rulers)
    before = set()
    for part in parts.values():
        saved = {"script": part.script, "args": {}}
        monkeypatch.setattr(runs, "load_checkpoint", lambda path, saved=saved: saved)
        assert set(part.needs) <= before
        before.add(part.name)
        module = importlib.import_module(part.script.removesuffix(".py").replace("/", "."))
        words = [*part.command.split()[2:], *part.where]
        assert runs.typed(part.script, words).startswith(part.command)  # what args.json will say
        if hasattr(module, "parse_args"):
            args = vars(module.parse_args(words))
            assert all(given(args, flag, value) for flag, value in jobs.flags(part.command).items())
            assert args["name"] == part.folder
            assert not part.rulers or args["features"] == list(rulers.values())
        else:
            module.sweep.parse_args("x", "name", (), words)


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--epochs", "x"], ["--precision", "fp8"], ["--what"]])
def test_bad_flags(refused, argv):
    assert argv[0].lstrip("-") in refused(reproduce.main, *argv)


# --- tables -------------------------------------------------------------------------------------------------------


def run(metrics, **more):
    return {"command": "", "seed": 0, "machine": "an abacus", "versions": {}, "seconds": 60, "metrics": metrics, **more}


def vae_run(bits, **more):
    keys = "elbo_nats mse kl active_units sharpness_reconstruction sharpness_generation sharpness_generation_expost"
    return run(dict.fromkeys(keys.split(), 1.0) | {"seconds": 60.0, "bits_per_dim": bits} | more)


def results(**found):
    return {"settings": {"quick": False, "epochs": 50, "precision": "fp32"}, "runs": found}


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_and_spread_and_what_was_not_measured():
    made = tables.tables(results(vae_128_seed_0=vae_run(6.0), vae_128_seed_1=vae_run(6.2), vae_128_seed_2=vae_run(6.4)))
    assert row(made["models"], "VAE, 128 dimensions")[1:4] == ["3", "1.0 ± 0.0", "6.200 ± 0.200"]
    assert row(made["models"], "VAE, 64")[1:4] == ["0", "not measured", "not measured"]
    assert "--epochs 50 --precision fp32 --seeds 1`" in made["models"] and "an abacus" in made["models"]


def test_how_long_the_networks_with_labels_trained_is_read_from_their_runs():
    shown = {"interval": [60.0, 70.0], "accuracy": 65.0}
    labelled = run({"rows": {"supervised": shown}})
    made = [tables.tables(results(supervised_128=labelled | more))["classification"] for more in ({}, {"epochs": 3})]
    assert ["networks trained with labels had" in text for text in made] == [False, True]
    assert "networks trained with labels had 3 epochs." in made[1]


def test_each_ruler_has_columns_and_a_floor_of_its_own():
    names = ("fd_features", "fd_imagenet", "fid")
    found = {
        f"{name}_{key}": 10.0 * i + j
        for i, name in enumerate(names, 1)
        for j, key in enumerate(("reconstruction", "generation", "generation_expost", "floor"))
    }
    made = tables.tables(results(vae_64_seed_0=vae_run(6.0, **found, fd_imagenet_images=5000)))
    assert row(made["distances"], "VAE, 64")[2:] == "30.00 31.00 32.00 10.00 11.00 12.00 20.00 21.00 22.00".split()
    assert row(made["distances"], "floor: training images")[2:] == ["33.00"] * 3 + ["13.00"] * 3 + ["23.00"] * 3
    assert "Frechet distance, ImageNet features: 5000 images a set" in made["distances"]
    assert row(made["summary"], "VAE, 64")[4:-1] == "10.0 11.0 12.0 20.0 21.0 22.0 30.0 31.0 32.0".split()
    head = next(line for line in made["summary"].splitlines() if line.startswith("| model"))
    assert [title.partition(":")[0] for title in head.split(" | ")[4:-1]] == (
        ["Frechet distance*"] * 3 + ["Frechet distance†"] * 3 + ["FID"] * 3
    )
    assert row(made["summary"], "VAE, 64")[-1] == "not measured"  # by a probe


def test_distances_by_two_programs_of_one_name_are_told_by_their_floors():
    rounded = [vae_run(6.0, fd_features_generation=30.0, fd_features_floor=floor) for floor in (3.0, 3.0001)]
    floors = row(
        tables.tables(results(vae_128_seed_0=rounded[0], vae_64_seed_0=rounded[1]))["distances"],
        "floor: training images",
    )
    assert floors[2:] == ["3.00"] * 3
    other = vae_run(6.0, fd_features_generation=90.0, fd_features_floor=9.0)
    made = tables.tables(results(vae_128_seed_0=rounded[0], vae_64_seed_0=other))
    for name, title in (("distances", "floor: training images"), ("summary", "as many training images")):
        assert "| 3.0" in made[name] and "do not compare" in " ".join(row(made[name], title))


def test_a_caption_names_commits_that_do_not_hold_what_ran():
    dirty = {"versions": {"torch": "2", "commit": "abc-dirty"}}
    clean = {"versions": {"torch": "2", "commit": "def, 0ad"}}  # begun by one commit, gone on with by another
    mu = run({"rows": {"mu": {"accuracy": 40.0, "interval": [39.0, 41.0]}}}) | dirty
    made = tables.tables(results(vae_64_seed_0=vae_run(6.0) | clean, probe_vae_64_seed_0=mu))
    for name in ("summary", "classification"):
        assert "commit 0ad, abc-dirty, def (-dirty: and changes that are in no commit)." in made[name]
    assert "commit 0ad, def." in made["models"] and "dirty" not in made["distances"]


def test_distances_stand_under_their_own_name():
    fid = {"fid_reconstruction": 100.0, "fid_generation": 150.0, "fid_floor": 3.0, "fid_images": 10000}
    ours = {"fd_features_reconstruction": 7.0, "fd_features_floor": 1.0}
    theirs = {
        "fd_name": "Frechet distance (Inception, weights 0123, float32)",
        "fd_reconstruction": 7.0,
        "fd_floor": 2.0,
    }
    found = {
        "vae_128_seed_0": vae_run(6, **fid, **ours),
        "vae_128_seed_1": vae_run(6, **ours | {"fd_features_reconstruction": 9.0}),
        "vae_64_seed_0": vae_run(6, **theirs),
    }
    text = tables.tables(results(**found))["distances"]
    no = "not measured"
    assert row(text, "VAE, 128 dimensions")[2:] == ["100.00 (n = 1)", "150.00 (n = 1)", no, "8.00 ± 1.41", no, no]
    assert row(text, "VAE, 64")[2:] == [no] * 6  # neither Inception's FID nor of the classifier's features
    assert row(text, "floor: training images")[2:] == ["3.00"] * 3 + ["1.00"] * 3
    assert "Inception FID: 10000 images a set" in text


def test_summary():
    ours = {"fd_features_reconstruction": 7.0, "fd_features_floor": 1.0}
    mu = run({"rows": {"mu": {"accuracy": 40.0, "interval": [39.0, 41.0]}}})
    found = {"vae_64_seed_0": vae_run(6.0, **ours), "probe_vae_64_seed_0": mu}
    text, no = tables.tables(results(**found))["summary"], "not measured"
    assert row(text, "VAE, 64")[1:] == ["1", "6.000", "1.00000", "7.0", no, no, "40.00"]
    assert row(text, "as many training images")[2:] == ["", "", "1.0", "1.0", "1.0", ""]
    assert "Inception FID: not measured" in text
    found["vae_64_seed_0"]["metrics"] |= {"fid_reconstruction": 90.0, "fid_floor": 5.0}
    text = tables.tables(results(**found))["summary"]
    assert row(text, "VAE, 64")[4:] == ["7.0", no, no, "90.0", no, no, "40.00"]
    assert row(text, "as many training images")[4:] == ["1.0"] * 3 + ["5.0"] * 3 + [""]
    assert "Inception FID: not measured" not in text
    found["vae_64_seed_1"] = vae_run(6.0)
    assert row(tables.tables(results(**found))["summary"], "VAE, 64")[-1] == "40.00 (n = 1)"
    compared = tables.tables(results(**found))["compare"]
    assert row(compared, "VAE, 64") == row(tables.tables(results(**found))["summary"], "VAE, 64")
    titles = [line.split(" |")[0] for line in compared.splitlines() if line.startswith("| VAE")]
    assert titles[:3] == ["| VAE, 128 dimensions", "| VAE-GAN, 128", "| VAE, 64"]
    assert titles[3].startswith("| VAE-GAN, 64")
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_two_modes():
    perfect = {"mode_weights": [0.5, 0.5], "mode_means": [[0.5, 0.5], [-0.5, -0.5]], "sigma": 0.1}
    perfect |= {"within_3_sigma": 0.99, "bridge": 0.0, "w2_mode": [0.02, 0.02], "w2_mode_core": [0.02, 0.02]}
    perfect |= {"w2": 0.1, "log_likelihood": 1.0, "mode_covariances": [[[0.01, 0.0], [0.0, 0.01]]] * 2}
    worse = perfect | {"mode_weights": [0.53, 0.47], "w2_mode": [0.02, 0.04], "w2_mode_floor": 0.02, "truth": perfect}
    found = {"wgan_gp_seed_0": run(worse), "wgan_gp_clip_seed_0": run(worse), "wgan_gp_clip_seed_1": run(worse)}
    made = tables.tables(results(**found))
    assert row(made["wgan_gp"], "goal")[1:7] == ["48% to 52%", "0.02", "10%", "0.08", "98%", ""]
    assert row(made["wgan_gp"], "real samples")[1:7] == ["50.0%", "0.0000", "0.0%", "0.000", "99.00%", "0.00%"]
    assert row(made["wgan_gp"], "goal")[7] == "1.35" and row(made["wgan_gp"], "real samples")[7] == "1.00"
    assert row(made["wgan_gp"], "6-D latent, penalty (default), seed 0")[7] == "2.00"
    assert row(made["wgan_gp"], "6-D latent, penalty (default), seed 0")[-1] == "4 of 6"  # weights and W2 are missed
    assert row(made["wgan_gp"], "real samples")[-1] == "6 of 6"
    assert "**Missed:** seed 0, mode weights: off 0.5 by 0.03 (at most 0.02); seed 0, W2" in made["wgan_gp"]
    met = tables.two_modes(
        {"wgan_gp_seed_0": run(worse | {"mode_weights": [0.5, 0.5], "w2_mode": [0.02, 0.02]})}, ["wgan_gp"]
    )
    assert met.endswith("**Every goal is met by every run.**")
    assert "clip" not in made["wgan_gp"] and "default" not in made["wgan_gp_variants"]
    mean = row(made["wgan_gp_variants"], "clipping at 0.1: mean ± standard deviation, n = 2")
    assert mean[1] == "53.0% ± 0.0%" and mean[7] == "2.00 ± 0.00"


def test_the_variants_are_those_of_reproduce():
    parts = reproduce.experiments(reproduce.parse_args([]), {})
    made = {name.rpartition("_seed_")[0] for name in parts if name.startswith("wgan_gp_")}
    assert made == set(tables.WGAN_GP)


def test_classification():
    def score(accuracy):
        return {"accuracy": accuracy, "interval": [accuracy - 1, accuracy + 1]}

    rows = {"mu": score(40.0), "raw pixels": score(38.0), "principal components": score(39.0)}
    test = {"checkpoint": "runs/vae_128_seed_0", "difference": 3.0, "interval": [2.0, 4.0], "p_value": 0.001}
    found = {
        "probe_vae_128_seed_0": run({"rows": rows}),
        "probe_vae_128_seed_1": run({"rows": {"mu": score(42.0)}}),
        "probe_vae_gan_128_seed_0": run({"rows": {"mu": score(43.0)}, "against": test}),
        "supervised_128": run({"rows": {"supervised": score(75.0)}}),
        "classifier": run({"accuracy": 0.93, "accuracy_low": 0.925, "accuracy_high": 0.935}),
    }
    text = tables.tables(results(**found))["classification"]
    assert row(text, "VAE, 128 dimensions")[1:4] == ["2", "41.00 ± 1.41", "39.00 to 41.00"]
    gan = row(text, "VAE-GAN, 128")
    assert gan[2] == "43.00" and gan[-1] == "+3.00 (+2.00 to +4.00) to VAE, 128 dimensions, p = 0.001"
    assert row(text, "reference: trained with labels, 128 dimensions")[2:4] == ["75.00", "74.00 to 76.00"]
    assert row(text, "reference: trained with labels, 64 dimensions")[2] == "not measured"
    assert row(text, "baseline: raw pixels")[2] == "38.00"
    assert row(text, "baseline: untrained encoder, 128")[2] == "not measured"
    assert row(text, "classifier.py's ResNet, on 5,000 held-out training images")[2:4] == ["93.00", "92.50 to 93.50"]


def test_proofs():
    affine = {"gap": 0.5, "error": 2e-8, "entropy": 1.25, "ridge": [{"likelihood_gap": 0.0}, {"likelihood_gap": 0.3}]}
    gaps = {"affine": {"laplace | normal": affine}, "checks": {"lemma": True, "slip": False}}
    free = [{"floor": 0.5, "gap": 0.25, "error": 1e-9}, {"floor": 0.1, "gap": 0.125, "error": 2e-9}]
    for at, exact in zip(free, (True, False), strict=True):
        at |= {"likelihood_gap": 0.0625, "likelihood_error": 3e-9, "knots": 81, "moved": 0.004}
        at["decoder_alone"] = {"gap": 0.02, "least": 0.01, "error": 1e-9, "exact": exact}
    gaps["free"] = {"laplace | normal": free}
    claim = {"claim A": {"gap": 1e-15, "error": 1e-9, "entropy": 2.0, "elbo": -2.0}}
    text = tables.tables(results(prior_gaussian=run(gaps), prior_counterexample=run(claim)))["proofs"]
    assert row(text, "laplace, prior normal")[1:] == [
        "-1.250000",
        "0.50000000 (2e-08)",
        "0.25 (1e-09)",
        "0.125 (2e-09)",
    ]
    same = row(text, "the likelihood's gap, the same maps")
    assert same[2:] == ["0 to 0.5, not reached", "0.0625 (3e-09)", "0.0625 (3e-09)"]
    affine["ridge"][1]["likelihood_gap"] = 0.0
    text = tables.tables(results(prior_gaussian=run(gaps), prior_counterexample=run(claim)))["proofs"]
    assert row(text, "the likelihood's gap, the same maps")[2] == "0"
    assert row(text, "the likelihood's gap, a decoder alone")[2:] == ["", "0 exactly", "0.01 to 0.02"]
    assert row(text, "counterexample in 2-D, claim A")[1:3] == ["-2.000000", "1e-15 (1e-09)"]
    assert (
        "1 of 2 steps" in text and "Up to 81 knots a spline; their last doubling moved a gap by at most 0.4 %." in text
    )


def test_a_refresh_is_what_the_results_give_and_touches_nothing_else(tmp_path):
    made = tables.tables(results(vae_128_seed_0=vae_run(6.5)))
    before = "# A\n<!-- table: models -->\nold\n\n| old |\n<!-- end -->\nB\n<!-- table: proofs -->\n<!-- end -->\nC\n"
    after = tables.refresh(before, made)
    want = f"# A\n<!-- table: models -->\n{made['models']}\n<!-- end -->\nB\n<!-- table: proofs -->\n{made['proofs']}\n"
    assert after == want + "<!-- end -->\nC\n"
    assert tables.refresh(after, made) == after
    with pytest.raises(runs.UserError, match="no table nonsense"):
        tables.refresh("<!-- table: nonsense -->\n<!-- end -->", made)


@pytest.mark.parametrize("page, shown", [("REPORT.md", set(PAGES) - {"summary"}), ("README.md", {"summary"})])
def test_the_pages_tables_are_those_of_the_results(page, shown):
    """What stands between the markers is what results.json gives, and every table stands somewhere."""
    made = tables.tables(json.loads((ROOT / "results" / "results.json").read_text()))
    text = (ROOT / page).read_text()
    assert tables.refresh(text, made) == text
    assert set(re.findall("<!-- table: (\\S+) -->", text)) == shown and set(made) == set(PAGES)


def test_earlier_runs_stay_while_settings_and_command_are_the_same(fakes, capsys):
    main("--only", "a")
    old = json.loads(Path("results/results.json").read_text())
    old["runs"] |= {"z_seed_4": run({}), "c": run({}, command="python another.py")}
    old["runs"] |= {"probe_c": run({}), "c-epoch5": run({}), "probe_z_seed_4": run({})}  # of these runs
    Path("results/results.json").write_text(json.dumps(old))
    main("--only", "a")
    assert list(json.loads(Path("results/results.json").read_text())["runs"]) == ["a", "z_seed_4", "probe_z_seed_4"]
    said = capsys.readouterr().err
    assert "dropped from results/results.json, for their commands are others now: c, c-epoch5, probe_c\n" in said


def test_a_probe_with_another_command_leaves_though_its_model_stays(in_tmp):
    parts = {name: Part(name, f"python {name}.py --name {name}", name, 1) for name in ("vae_64", "probe_vae_64")}
    old = {"vae_64": run({}, command=parts["vae_64"].command), "probe_vae_64": run({}, command="python probe.py")}
    results = reproduce.collect(parts, {}, {}, Path("runs"), {}, {"settings": {}, "runs": old})
    assert list(results["runs"]) == ["vae_64"] and len(old) == 2


def test_results_made_with_other_settings_are_not_touched(fakes, capsys):
    main("--only", "a")
    before = Path("results/results.json").read_bytes()
    Path("REPORT.md").write_text("<!-- table: wgan_gp -->\n?\n<!-- end -->\n")
    main("--only", "b", "--epochs", "3")
    assert Path("results/results.json").read_bytes() == before and "?" in Path("REPORT.md").read_text()
    assert list(json.loads(Path("runs/reproduce/results.json").read_text())["runs"]) == ["a", "b"]
    assert "made with --epochs 50 --precision fp32: these tables are in runs/reproduce" in capsys.readouterr().err
    Path("results/results.json").unlink()
    main("--only", "b", "--epochs", "3")
    assert list(json.loads(Path("results/results.json").read_text())["runs"]) == ["a", "b"]


def test_report_md_is_refreshed(fakes):
    Path("REPORT.md").write_text("x\n<!-- table: wgan_gp -->\n?\n<!-- end -->\ny\n")
    main()
    assert Path("REPORT.md").read_text() == "x\n<!-- table: wgan_gp -->\nnot measured\n<!-- end -->\ny\n"


def test_quick_leaves_results_alone(fakes, capsys):
    main("--quick")
    assert f"Built-in shapes, {reproduce.QUICK_IMAGES} images: these numbers mean nothing" in capsys.readouterr().out
    assert Path("runs/quick/results.json").exists() and not Path("results").exists()
