"""wgan_gp.py, two_gaussians.py: losses against closed forms and finite differences, metrics on known faults.

pytest tests/test_wgan_gp.py                   (add -m "not slow" to leave the training runs out)
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import wgan_gp
from common import devices, runs, two_gaussians
from common.two_gaussians import MEANS, correlation, goals, measure, mode_axes, sample_real, statistics, w2, w2_modes

SIGMA = 0.1
TINY = ["--width", 8, "--critic-width", 8, "--batch-size", 8, "--device", "cpu"]


def stream(*key):
    return devices.generator("cpu", *key)


def real(n, *key):
    return sample_real(n, SIGMA, stream("test", *key))


def options(*argv):
    return wgan_gp.parse_args([str(a) for a in argv])


def run(*argv):
    wgan_gp.main([str(a) for a in argv])


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- the penalty


@pytest.mark.parametrize("weight", [[3.0, 4.0], [0.3, 0.4]])
def test_penalty_of_a_linear_critic(weight):
    critic = nn.Linear(2, 1)
    critic.weight.data = torch.tensor([weight])
    norm = math.hypot(*weight)
    penalty = wgan_gp.gradient_penalty(critic, real(64, 1), real(64, 2), torch.rand(64))
    assert penalty.shape == (64,)
    torch.testing.assert_close(penalty, torch.full((64,), (norm - 1) ** 2))
    one_sided = wgan_gp.gradient_penalty(critic, real(64, 1), real(64, 2), torch.rand(64), one_sided=True)
    torch.testing.assert_close(one_sided, torch.full((64,), max(norm - 1, 0.0) ** 2))


def test_penalty_takes_the_norm_over_the_whole_sample():
    """On images the norm per pixel or per channel is a known mistake."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    critic[1].weight.data.fill_(1.0)
    images = torch.zeros(5, 3, 2, 2)
    torch.testing.assert_close(
        wgan_gp.gradient_penalty(critic, images, images + 1, torch.rand(5)), torch.full((5,), (math.sqrt(12) - 1) ** 2)
    )


def test_penalty_is_taken_at_the_interpolates():
    """For critic |x|^2 / 2 the gradient is x itself, so the penalty reads off where it was taken."""
    x_real, x_fake, mix = real(32, 3), real(32, 4), torch.rand(32, generator=stream(5))
    penalty = wgan_gp.gradient_penalty(lambda x: x.square().sum(1) / 2, x_real, x_fake, mix)
    at = x_real + mix[:, None] * (x_fake - x_real)
    torch.testing.assert_close(penalty, (at.norm(dim=1) - 1) ** 2)


@pytest.mark.parametrize("smooth", [False, True])  # the critic's own activation; one with a second derivative
def test_double_backward_against_finite_differences(smooth):
    critic = wgan_gp.Critic(width=5).double()
    if smooth:
        critic.layers = nn.Sequential(*(nn.SiLU() if isinstance(m, nn.LeakyReLU) else m for m in critic.layers))
        assert sum(isinstance(m, nn.SiLU) for m in critic.layers) == 2
    x_real, x_fake = real(8, 6).double(), real(8, 7).double()
    mix = torch.rand(8, generator=stream(8)).double()

    def loss():
        penalty = wgan_gp.gradient_penalty(critic, x_real, x_fake, mix)
        return critic(x_fake).mean() + penalty.mean()  # the penalty alone does not depend on every bias

    parameters = list(critic.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        flat, step = parameter.data.view(-1), 1e-6
        for i in range(0, flat.numel(), 4):
            kept = flat[i].item()
            flat[i] = kept + step
            high = loss().item()
            flat[i] = kept - step
            low = loss().item()
            flat[i] = kept
            assert gradient.reshape(-1)[i].item() == pytest.approx((high - low) / (2 * step), rel=1e-5, abs=1e-7)


# --- who moves in which step


@pytest.mark.parametrize("loss", ["gp", "clip"])
def test_each_step_moves_its_own_player(loss):
    args = options("--loss", loss, "--latent-dim", 2, *TINY, "--clip", 0.05)
    models = wgan_gp.build(args, torch.device("cpu"))
    generator, critic, averaged = (models[name] for name in ("generator", "critic", "averaged"))
    critic_steps, generator_step = wgan_gp.make_steps(args, **models)

    def weights(module):
        return [p.detach().clone() for p in module.parameters()]

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    g, c, a = weights(generator), weights(critic), weights(averaged)
    critic_steps(real(32, 1).view(2, 16, 2), torch.rand(2, 16, 2), torch.rand(2, 16))
    assert same(g, weights(generator)) and same(a, weights(averaged)) and not same(c, weights(critic))
    assert all(p.grad is None for p in generator.parameters())
    if loss == "clip":
        assert max(p.abs().max().item() for p in critic.parameters()) <= 0.0500001
    c = weights(critic)
    generator_step(torch.rand(16, 2), torch.tensor(0.5))
    assert same(c, weights(critic)) and not same(g, weights(generator))
    for mean, old, new in zip(weights(averaged), g, weights(generator), strict=True):
        torch.testing.assert_close(mean, (old + new) / 2)


# --- the metrics


def test_w2_against_closed_forms():
    x = torch.randn(50, 2, generator=stream(1))
    assert w2(x, x.flip(0)) == pytest.approx(0, abs=1e-7)
    assert w2(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5, rel=1e-5)  # a shift moves every point by it
    line, other = torch.randn(2, 40, generator=stream(2))  # on a line the best assignment keeps the order
    expected = (line.sort().values - other.sort().values).square().mean().sqrt().item()
    zero = torch.zeros(40)
    assert w2(torch.stack((line, zero), 1), torch.stack((other, zero), 1)) == pytest.approx(expected, rel=1e-5)
    near = 3 + line / 1000  # points that all but coincide, far away
    expected = (near.sort().values - other.sort().values).square().mean().sqrt().item()
    assert w2(torch.stack((near, zero), 1), torch.stack((other, zero), 1)) == pytest.approx(expected, rel=1e-5)
    assert w2(torch.ones(50, 2), x) == pytest.approx((x - 1).square().sum(1).mean().sqrt().item(), rel=1e-5)


def test_the_truth_hits_its_floors():
    found = statistics(real(20_000, 1), SIGMA)
    assert found["mode_weights"][0] == pytest.approx(0.5, abs=0.012)
    np.testing.assert_allclose(found["mode_means"], MEANS, atol=0.004)
    for covariance in found["mode_covariances"]:
        np.testing.assert_allclose(mode_axes(covariance), SIGMA, rtol=0.03)
        assert abs(correlation(covariance)) < 0.03
    assert found["within_3_sigma"] == pytest.approx(1 - math.exp(-4.5), abs=0.003)
    assert found["bridge"] < 0.001
    entropy = math.log(2) + 1 + math.log(2 * math.pi * SIGMA**2)  # the modes do not overlap
    assert found["log_likelihood"] == pytest.approx(-entropy, abs=0.03)
    assert -entropy == pytest.approx(1.074, abs=1e-3)
    for value in w2_modes(real(2000, 2), SIGMA, stream(3)):
        assert value == pytest.approx(0.019, abs=0.006)


def test_the_metrics_tell_the_faults_apart():
    truth = real(4000, 4)
    collapsed = truth[truth[:, 0] > 0]
    shrunk = torch.sign(truth) * 0.5 + 0.3 * (truth - torch.sign(truth) * 0.5)
    shifted = truth + torch.tensor([0.05, 0.0])
    bridged = truth.clone()
    bridged[:400] = torch.linspace(-0.2, 0.2, 400)[:, None]
    found = {
        name: statistics(x, SIGMA) | {"w2_mode": w2_modes(x[::10], SIGMA, stream(5))}
        for name, x in (("truth", truth), ("collapsed", collapsed), ("shrunk", shrunk), ("shifted", shifted))
    } | {"bridged": statistics(bridged, SIGMA) | {"w2_mode": w2_modes(bridged[::10], SIGMA, stream(5))}}
    assert found["collapsed"]["mode_weights"] == [1.0, 0.0]
    assert found["collapsed"]["w2_mode"][1] > 1
    assert max(mode_axes(found["shrunk"]["mode_covariances"][0])) < 0.04
    assert found["shrunk"]["log_likelihood"] > found["truth"]["log_likelihood"] + 0.5  # why it is not a score
    assert found["shifted"]["mode_means"][0][0] == pytest.approx(0.55, abs=0.01)
    assert min(found["shifted"]["w2_mode"]) == pytest.approx(math.hypot(0.05, 0.035), abs=0.015)
    assert found["bridged"]["bridge"] == pytest.approx(0.1, abs=0.002)
    assert found["bridged"]["within_3_sigma"] < 0.91
    for name in ("collapsed", "shrunk", "shifted", "truth"):
        assert found[name]["bridge"] < 0.002
        if name != "truth":
            assert max(found[name]["w2_mode"]) > 1.5 * max(found["truth"]["w2_mode"])


def test_measure_takes_the_mean_of_its_draws_and_the_core_within_4_sigma(monkeypatch):
    monkeypatch.setattr(two_gaussians, "N_W2", 60)
    x = real(60, 9)
    center = torch.sign(x) * 0.5
    draws = [center + stretch * (x - center) for stretch in (1.0, 1.5, 2.0)]  # the last two reach past 4 sigma
    looks = real(100, 10)
    samples = iter([*draws, looks])
    found = measure(lambda n, stream: next(samples), SIGMA, 3, "here")

    def by_hand(x, limit, random):
        values = []
        for mean in torch.tensor(MEANS):
            own = x[(x.sum(1) > 0) == (mean.sum() > 0)]  # the line between the modes is x_1 + x_2 = 0
            own = own[(own - mean).norm(dim=1) < limit]
            values.append(w2(own, mean + SIGMA * torch.randn(own.shape, generator=random)))
        return values

    modes, cores, both = [], [], []
    for i, x in enumerate(draws):
        random = stream("here", i)
        modes.append(by_hand(x, math.inf, random))
        cores.append(by_hand(x, 4 * SIGMA, random))
        both.append(w2(x, sample_real(60, SIGMA, random)))
    assert found["w2"] == pytest.approx(np.mean(both))
    assert found["w2_mode"] == pytest.approx(np.mean(modes, 0))
    assert found["w2_mode_core"] == pytest.approx(np.mean(cores, 0))
    assert {key: found[key] for key in found if not key.startswith("w2")} == statistics(looks, SIGMA)


def test_the_floors_are_what_the_truth_measures(monkeypatch):
    monkeypatch.setattr(two_gaussians, "N_W2", 60)
    monkeypatch.setattr(two_gaussians, "N_STATISTICS", 100)
    found = two_gaussians.measure_truth(SIGMA, 2, 0)
    first, second = found["truth"]["w2_mode"]
    assert first != second and found["w2_mode_floor"] == pytest.approx((first + second) / 2)
    assert found["w2_floor"] == found["truth"]["w2"] > max(first, second)


def test_goals_name_the_one_that_is_missed(capsys):
    truth = statistics(real(20_000, 6), SIGMA) | {"w2_mode": [0.02, 0.02], "w2_mode_floor": 0.02}
    assert all(goal.met for goal in goals(truth, SIGMA).values())
    worse = goals(truth | {"w2_mode": [0.02, 0.028]}, SIGMA)
    assert [name for name, goal in worse.items() if not goal.met] == ["w2"]
    assert worse["w2"].value == pytest.approx(1.4)

    def printed(x):
        two_gaussians.print_goals(truth | x | {"sigma": SIGMA, "truth": truth})
        return [line.split()[-4:] for line in capsys.readouterr().out.splitlines()[2:]]

    assert [verdict for *_, verdict in printed(truth)] == ["met"] * 6
    *others, last = printed({"w2_mode": [0.02, 0.028]})
    assert [verdict for *_, verdict in others] == ["met"] * 5
    assert last == ["1.350", "1.4000", "1.0000", "missed"]  # at most, here, truth


def test_a_mode_that_is_flat_along_the_diagonal_is_seen():
    """Along x_1 and x_2 its standard deviations are 0.92 of the true ones, along the diagonal 0.83."""
    x = real(20_000, 7)
    center = torch.sign(x) * 0.5
    unit = torch.tensor([1.0, 1.0]) / math.sqrt(2)
    flat = x - 0.17 * ((x - center) @ unit)[:, None] * unit
    found = statistics(flat, SIGMA) | {"w2_mode": [0.02, 0.02], "w2_mode_floor": 0.02}
    for covariance in found["mode_covariances"]:
        assert np.sqrt(np.diagonal(covariance)).min() / SIGMA > 0.9  # the axes alone would let it pass
        np.testing.assert_allclose(mode_axes(covariance) / SIGMA, [0.83, 1.0], atol=0.02)
    given = goals(found, SIGMA)
    assert given["stds"].value == pytest.approx(0.17, abs=0.02) and not given["stds"].met
    assert given["correlation"].value == pytest.approx(0.184, abs=0.02) and not given["correlation"].met


def test_axes_and_correlation_against_closed_forms():
    assert mode_axes([[5.0, 4.0], [4.0, 5.0]]) == pytest.approx([1.0, 3.0])
    assert correlation([[5.0, 4.0], [4.0, 5.0]]) == pytest.approx(0.8)
    assert correlation([[4.0, -1.0], [-1.0, 1.0]]) == pytest.approx(-0.5)
    assert mode_axes([[0.0, 0.0], [0.0, 0.0]]) == pytest.approx([0.0, 0.0])  # an empty mode
    assert correlation([[0.0, 0.0], [0.0, 0.0]]) == 0.0


def test_the_critics_lines_cross_the_modes_in_all_directions():
    """With PyTorch's biases no line of the first layer that meets a mode runs across the line through the means."""
    for seed in range(3):
        torch.manual_seed(seed)
        critic = wgan_gp.Critic()
        weight, bias = wgan_gp.SCALE * critic.layers[0].weight.detach(), critic.layers[0].bias.detach()
        length = weight.norm(dim=1)
        met = ((torch.tensor(MEANS) @ weight.T + bias).abs() / length < 3 * SIGMA).sum(0)  # once for each mode
        across = (weight.sum(1) / length).square() > 1  # the normal is nearer to (1, 1) than to (1, -1)
        assert met.sum() > 30 and met[across].sum() / met.sum() > 0.3


def test_a_critic_whose_units_are_all_off_still_has_a_slope():
    """A ReLU critic is constant there: its gradient is zero on the whole mode, and its units never come back."""
    critic = wgan_gp.Critic()
    for layer in critic.layers:
        if isinstance(layer, nn.Linear):
            layer.bias.data.fill_(-100.0)
    assert wgan_gp.gradient_norm(critic, real(64, 8)).min() > 0


# --- the report


def test_the_report_gives_the_defaults():
    args = options()
    report = " ".join((Path(__file__).resolve().parents[1] / "REPORT.md").read_text().split())
    end = f"the critic's to {args.critic_end:g} of its start"
    for words in (
        f"z in [-1, 1]^{args.latent_dim}, times {wgan_gp.SCALE:g}; {args.depth} hidden layers of {args.width}, ReLU",
        f"x, times {wgan_gp.SCALE:g}; 2 hidden layers of {args.critic_width}, LeakyReLU (0.2)",
        f"gradient penalty, weight {args.penalty:g}, one-sided",
        f"a drift term with weight {args.drift:g}",
        f"Adam, betas (0, {wgan_gp.BETAS[1]:g}); learning rates {args.lr:.0e}".replace("e-0", "e-"),
        f"falling linearly: the generator's to 0, {end}",
        f"{args.iterations} generator iterations, {args.critic_steps} critic steps before each",
        f"batch {args.batch_size}",
    ):
        assert words in report
    assert args.lr == args.critic_lr and args.one_sided and wgan_gp.BETAS[0] == 0


# --- runs


def small(monkeypatch):
    """Measurements too small to mean anything, for tests of what is written."""
    monkeypatch.setattr(wgan_gp, "N_PLOT", 40)
    monkeypatch.setattr(two_gaussians, "N_W2", 40)
    monkeypatch.setattr(two_gaussians, "N_STATISTICS", 100)
    monkeypatch.setattr(wgan_gp, "DRAWS", 2)


def test_a_run_leaves_what_it_promises(monkeypatch):
    small(monkeypatch)
    run("--iterations", 4, "--plot-every", 2, *TINY)
    folder = runs.ROOT / "wgan_gp"
    names = {path.name for path in folder.iterdir()}
    pictures = {"density_000002.png", "density_000004.png", "final.png", "densities.png", "training.gif", "curves.png"}
    assert names == pictures | {"args.json", "log.jsonl", "metrics.json", "checkpoint.pt"}
    metrics = json.loads((folder / "metrics.json").read_text())
    promised = {"w2", "w2_floor", "w2_mode", "w2_mode_floor", "mode_weights", "mode_means", "mode_covariances"}
    promised |= {"within_3_sigma", "bridge", "log_likelihood", "sigma", "seconds"}
    assert promised <= set(metrics)
    run("--sample", 7, "--device", "cpu")
    samples = np.load(folder / "samples.npy")
    assert samples.shape == (7, 2) and samples.dtype == np.float32 and (folder / "samples.png").exists()
    for file in [*folder.glob("density_*.png"), folder / "densities.png", folder / "training.gif"]:
        file.unlink()
    run("--resume", "--device", "cpu")  # of a finished run whose pictures a person has cleared
    assert (folder / "densities.png").exists() and (folder / "training.gif").exists()


def test_flags_that_leave_no_numbers_are_refused(refused):
    assert "--sigma: 1e-09 is out of range" in refused(wgan_gp.main, "--sigma", 1e-9)
    assert "--threads: 3000000000 is out of range" in refused(wgan_gp.main, "--threads", 3_000_000_000)
    assert "--resume and --sample: give one of them" in refused(wgan_gp.main, "--resume", "--sample", 5)


@pytest.mark.slow
def test_a_short_run_covers_both_modes(monkeypatch):
    monkeypatch.setattr(two_gaussians, "N_W2", 400)  # the assignment costs N^3, and shares need no 2000 points
    monkeypatch.setattr(wgan_gp, "DRAWS", 1)
    run(*"--iterations 600 --plot-every 600 --width 64 --critic-width 64 --device cpu".split())
    metrics = json.loads((runs.ROOT / "wgan_gp" / "metrics.json").read_text())
    assert metrics["mode_weights"][0] == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(metrics["mode_means"], MEANS, atol=0.05)
    assert metrics["within_3_sigma"] > 0.95
    assert metrics["bridge"] < 0.03
