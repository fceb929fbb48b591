"""reproduce.py with tiny scripts in place of the real ones, and the tables from results written by hand.

python -m pytest tests/test_reproduce.py
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reproduce
import runs
import tables
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
(folder / "args.json").write_text(json.dumps({"script": sys.argv[0], "size": 3.0, "machine": "a machine"}))
(folder / "checkpoint.pt").write_text("")
if pathlib.Path("wait").exists():
    pathlib.Path("wait").unlink()
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    pathlib.Path("waiting").write_text("")
    time.sleep(60)
(folder / "metrics.json").write_text('{"seconds": 1.5}')
"""

PAGES = ("summary", "models", "distances", "classification", "wgan_gp", "wgan_gp_sigma", "wgan_gp_variants", "proofs")


@pytest.fixture
def fakes(in_tmp, monkeypatch):
    """A table of a, b (which needs a) and c: -> the words of each process that ran so far, as lines."""
    (in_tmp / "fake.py").write_text(FAKE)

    def part(name, **options):
        words = ("--name", name, "--size", "3", "--device", "cpu")
        return Part(name, str(in_tmp / "fake.py"), words, name, 1, resumes=True, **options)

    parts = {"a": part("a"), "b": part("b", needs=("a",)), "c": part("c")}
    monkeypatch.setattr(reproduce, "table", lambda args: parts)
    log = in_tmp / "ran.txt"
    return lambda: log.read_text().splitlines() if log.exists() else []


def names(lines):
    return [line.split()[1] for line in lines]


def main(*argv):
    reproduce.main(["--device", "cpu", *argv])


def test_finished_parts_are_skipped(fakes):
    main()
    assert names(fakes()) == ["a", "b", "c"]
    assert all("--resume" not in line for line in fakes())
    main()
    assert len(fakes()) == 3
    record = json.loads(Path("results/results.json").read_text())["runs"]["a"]
    assert record["machine"] == "a machine" and record["metrics"] == {"seconds": 1.5} and record["seconds"] == 1.5
    assert "--size 3" in record["command"] and "--device" not in record["command"]


def test_other_flags_and_later_needs_make_a_part_run_again(fakes):
    main()
    Path("runs/c/args.json").write_text(json.dumps({"script": str(Path("fake.py").resolve()), "size": 4.0}))
    main()
    assert names(fakes())[3:] == ["c"] and "--resume" not in fakes()[3]  # another run's checkpoint is not gone on from
    os.utime("runs/b/metrics.json", (0, 0))  # as if a had been trained again since
    main()
    assert names(fakes())[4:] == ["b"]


def test_an_interrupted_part_is_resumed(fakes):
    main()
    Path("runs/c/metrics.json").unlink()
    main()
    assert names(fakes())[3:] == ["c"] and "--resume" in fakes()[3]


def test_a_failed_part_is_named_and_the_others_go_on(fakes, capsys):
    Path("broken").write_text("a")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert names(fakes()) == ["a", "c"]
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said == ["failed: a: fake.py: the disk is full", "failed: b: not run: it needs a, which failed"]
    assert list(json.loads(Path("results/results.json").read_text())["runs"]) == ["c"]


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


def test_ctrl_c_reaches_the_process_and_says_how_to_go_on(fakes):
    Path("wait").write_text("")
    Path("drive.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport reproduce, runs\nfrom reproduce import Part\n"
        "words = ('--name', 'a', '--size', '3')\n"
        "part = Part('a', reproduce.Path('fake.py').resolve().as_posix(), words, 'a', 1, resumes=True)\n"
        "reproduce.table = lambda args: {'a': part}\nruns.cli(lambda: reproduce.main(['--device', 'cpu']))\n"
    )
    process = subprocess.Popen([sys.executable, "drive.py"], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if Path("waiting").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "the same command goes on" in said and "Traceback" not in said
    assert json.loads(Path("results/results.json").read_text())["runs"] == {}
    subprocess.run([sys.executable, "drive.py"], check=True, capture_output=True)
    assert "--resume" in fakes()[-1] and Path("runs/a/metrics.json").exists()


@pytest.mark.parametrize("made, same", [({"one_sided": False}, True), ({"one_sided": True}, False), ({}, False)])
def test_a_switch_agrees_only_with_its_own_value(made, same):
    assert reproduce.agree(("--no-one-sided",), made) is same


def test_pictures_are_those_of_the_runs_that_gave_the_numbers(fakes):
    main()
    Path("runs/c/c.png").write_text("of another training")
    Path("runs/c/args.json").write_text(json.dumps({"script": str(Path("fake.py").resolve()), "size": 4.0}))
    Path("runs/a/a.png").write_text("of this one")
    main("--only", "a")
    assert Path("results/a/a.png").exists() and not Path("results/c/c.png").exists()


def test_gpus_take_a_part_each(fakes, monkeypatch):
    monkeypatch.setattr(reproduce, "slots", lambda device: {"0": False, "1": False, "": True})
    main()
    gpus = {line.split()[1]: line.split()[-1] for line in fakes()}
    assert {gpus["a"], gpus["c"]} == {"0", "1"} and gpus["b"] in ("0", "1")
    assert names(fakes()).index("a") < names(fakes()).index("b")


def test_the_slots_are_the_gpus_and_the_cpu(monkeypatch):
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert reproduce.slots("auto") == {"0": False, "1": False, "": True}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert reproduce.slots("cuda") == {"5": False, "7": False, "": True}
    assert reproduce.slots("cpu") == reproduce.slots("cuda:1") == {"": True}


def test_fid_without_weights_is_refused_or_left_out(fakes, refused, monkeypatch, capsys):
    def lacking():
        raise runs.UserError("the weights are not here")

    parts = reproduce.table(None)
    parts["fid_a"] = Part("fid_a", parts["a"].script, parts["a"].words, "a", 1, needs=("a",), kind="fid")
    monkeypatch.setattr(reproduce.extractors, "find_weights", lacking)
    main()  # exit status 0
    assert "Inception FID will be not measured: the weights are not here" in capsys.readouterr().err
    assert names(fakes()) == ["a", "b", "c"]
    assert refused(reproduce.main, "--only", "fid").endswith("the weights are not here")


@pytest.mark.parametrize("flags", [[], ["--quick"], ["--device", "cpu", "--precision", "bf16", "--data-dir", "x"]])
def test_every_command_is_one_that_its_script_parses(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = reproduce.table(reproduce.parse_args(flags))
    before = set()
    for part in parts.values():
        assert set(part.needs) <= before
        before.add(part.name)
        module = importlib.import_module(part.script.removesuffix(".py").replace("/", "."))
        if hasattr(module, "parse_args") and "--eval-only" not in part.words:
            args = vars(module.parse_args(list(part.words)))
            assert reproduce.agree(part.words, args)
            assert args["name"] == part.folder
        elif "--eval-only" in part.words:  # parses but for the checkpoint, which it would read
            module.parse_args([word for word in part.words if word != "--eval-only"])
        else:
            parse = {"prior_gaussian": "sweep", "prior_non_gaussian": "sweep"}.get(part.folder.removeprefix("quick-"))
            if parse:
                module.sweep.parse_args("x", "name", (), list(part.words))
            else:
                assert part.kind == "stdout" and part.words == ("--json",)


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--epochs", "x"], ["--precision", "fp8"], ["--what"]])
def test_bad_flags(refused, argv):
    assert argv[0].lstrip("-") in refused(reproduce.main, *argv)


# --- tables -------------------------------------------------------------------------------------------------------


def run(metrics, **more):
    return {"command": "", "seed": 0, "machine": "an abacus", "versions": {}, "seconds": 60, "metrics": metrics, **more}


def vae(bits, **more):
    keys = "elbo_nats mse kl active_units sharpness_reconstruction sharpness_generation sharpness_generation_expost"
    return run(dict.fromkeys(keys.split(), 1.0) | {"seconds": 60.0, "bits_per_dim": bits} | more)


def results(**found):
    return {"settings": {"quick": False, "epochs": 50, "precision": "fp32"}, "runs": found}


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_and_spread_and_what_was_not_measured():
    made = tables.tables(results(vae_128_seed_0=vae(6.0), vae_128_seed_1=vae(6.2), vae_128_seed_2=vae(6.4)))
    assert row(made["models"], "VAE, 128 dimensions")[1:4] == ["3", "1.0 ± 0.0", "6.200 ± 0.200"]
    assert row(made["models"], "VAE, 64")[1:4] == ["0", "not measured", "not measured"]
    assert "--epochs 50 --precision fp32 --seeds 1`" in made["models"] and "an abacus" in made["models"]


def test_how_long_the_networks_with_labels_trained_is_read_from_their_runs():
    shown = {"interval": [60.0, 70.0], "accuracy": 65.0}
    labelled = run({"rows": {"supervised": shown}})
    made = [tables.tables(results(supervised_128=labelled | more))["classification"] for more in ({}, {"epochs": 3})]
    assert ["networks trained with labels had" in text for text in made] == [False, True]
    assert "networks trained with labels had 3 epochs." in made[1]


def test_distances_stand_under_their_own_name():
    fid = {"fid_reconstruction": 100.0, "fid_generation": 150.0, "fid_floor": 3.0, "fid_images": 10000}
    ours = {"fd_features": "Frechet distance (features of features.pt2)", "fd_reconstruction": 7.0, "fd_floor": 1.0}
    theirs = ours | {"fd_features": "Frechet distance (Inception, weights 0123, float32)"}
    found = {
        "vae_128_seed_0": vae(6, **fid, **ours),
        "vae_128_seed_1": vae(6, **ours | {"fd_reconstruction": 9.0}),
        "vae_64_seed_0": vae(6, **theirs),
    }
    text = tables.tables(results(**found))["distances"]
    no = "not measured"
    assert row(text, "VAE, 128 dimensions")[2:] == ["100.00 (n = 1)", "150.00 (n = 1)", no, "8.00 ± 1.41", no, no]
    assert row(text, "VAE, 64")[2:] == [no] * 6  # neither Inception's FID nor of the classifier's features
    assert row(text, "floor: training images")[2:] == ["3.00"] * 3 + ["1.00"] * 3
    assert "Inception FID: 10000 images a set" in text


def test_summary():
    ours = {"fd_features": "Frechet distance (features of features.pt2)", "fd_reconstruction": 7.0, "fd_floor": 1.0}
    mu = run({"rows": {"mu": {"accuracy": 40.0, "interval": [39.0, 41.0]}}})
    found = {"vae_64_seed_0": vae(6.0, **ours), "probe_vae_64_seed_0": mu}
    text, no = tables.tables(results(**found))["summary"], "not measured"
    assert row(text, "VAE, 64")[1:] == ["1", "6.000", "1.00000", "7.0", no, no, "40.00"]
    assert row(text, "as many training images")[2:] == ["", "", "1.0", "1.0", "1.0", ""]
    assert "Inception FID: not measured" in text
    found["vae_64_seed_0"]["metrics"] |= {"fid_reconstruction": 90.0, "fid_floor": 5.0}
    text = tables.tables(results(**found))["summary"]
    assert row(text, "VAE, 64")[4:] == ["7.0", no, no, "90.0", no, no, "40.00"]
    assert row(text, "as many training images")[4:] == ["1.0"] * 3 + ["5.0"] * 3 + [""]
    assert "Inception FID: not measured" not in text
    found["vae_64_seed_1"] = vae(6.0)
    assert row(tables.tables(results(**found))["summary"], "VAE, 64")[-1] == "40.00 (n = 1)"
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
    met = tables.two_modes({"wgan_gp_seed_0": run(worse | {"mode_weights": [0.5, 0.5], "w2_mode": [0.02, 0.02]})}, [""])
    assert met.endswith("**Every goal is met by every run.**")
    assert "clip" not in made["wgan_gp"] and "default" not in made["wgan_gp_variants"]
    mean = row(made["wgan_gp_variants"], "clipping at 0.1: mean ± standard deviation, n = 2")
    assert mean[1] == "53.0% ± 0.0%" and mean[7] == "2.00 ± 0.00"


def test_the_models_are_those_of_reproduce():
    assert list(tables.MODELS) == list(reproduce.MODELS)
    parts = reproduce.table(reproduce.parse_args([]))
    made = {name.removeprefix("wgan_gp_").partition("seed_")[0] for name in parts if name.startswith("wgan_gp_")}
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
    assert row(text, "ceiling: trained with labels, 128 dimensions")[2:4] == ["75.00", "74.00 to 76.00"]
    assert row(text, "ceiling: trained with labels, 64 dimensions")[2] == "not measured"
    assert row(text, "baseline: raw pixels")[2] == "38.00"
    assert row(text, "baseline: untrained encoder, 128")[2] == "not measured"
    assert row(text, "classifier.py's ResNet, end to end")[2:4] == ["93.00", "92.50 to 93.50"]


def test_proofs():
    gaps = {"affine": {"laplace | normal": {"gap": 0.5, "entropy": 1.25}}, "checks": {"lemma": True, "slip": False}}
    free = [{"floor": 0.5, "gap": 0.25, "error": 1e-9}, {"floor": 0.1, "gap": 0.125, "error": 2e-9}]
    gaps["free"] = {"laplace | normal": free}
    claim = {"claim A": {"gap": 1e-15, "error": 1e-9, "entropy": 2.0}}
    text = tables.tables(results(prior_gaussian=run(gaps), prior_counterexample=run(claim)))["proofs"]
    assert row(text, "laplace, prior normal")[1:] == ["-1.250000", "0.5000000000", "0.25 (1e-09)", "0.125 (2e-09)"]
    assert row(text, "counterexample in 2-D, claim A")[1:3] == ["-2.000000", "1e-15 (1e-09)"]
    assert "1 of 2 steps" in text


def test_a_refresh_is_what_the_results_give_and_touches_nothing_else(tmp_path):
    made = tables.tables(results(vae_128_seed_0=vae(6.5)))
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


def test_earlier_runs_stay_while_settings_and_command_are_the_same(fakes):
    main("--only", "a")
    old = json.loads(Path("results/results.json").read_text())
    old["runs"] |= {"z_seed_4": run({}), "c": run({}, command="python another.py")}
    Path("results/results.json").write_text(json.dumps(old))
    main("--only", "a")
    assert list(json.loads(Path("results/results.json").read_text())["runs"]) == ["a", "z_seed_4"]


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


def test_quick_leaves_results_alone(fakes):
    main("--quick")
    assert Path("runs/quick/results.json").exists() and not Path("results").exists()
