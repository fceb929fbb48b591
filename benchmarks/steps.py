"""Speed of a training step of vae.py, vae_gan.py and wgan_gp.py, each beside the plain loop of most tutorials.

    python benchmarks/steps.py                       # all three tables: minutes on two idle CPU cores
    python benchmarks/steps.py vae --steps 20        # one of them
    python benchmarks/steps.py --device cuda         # there also TF32, bf16 and CUDA graphs

Plain is, of vae.py, a DataLoader with two workers, ToTensor per image, Adam as it comes and loss.item() in
every step; of vae_gan.py, for each player in turn all networks forward, and its loss backward through all
that it touches; of wgan_gp.py, for each critic step a batch and fakes of its own, three passes, backward()
and loss.item(). A step of wgan_gp.py is a generator iteration: five critic steps and one of the generator.

Each row is a process of its own, for memory settings and graphs outlive a measurement; its number is the
median of several rounds. The last column is how much of the rate of a large matrix product, measured in the
same process and precision, the step's own products and convolutions reach (counted by the formulas of
torch.utils.flop_counter).
"""

import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, which has a fid.py, too

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

import vae  # noqa: E402
import vae_gan  # noqa: E402
import wgan_gp  # noqa: E402
from common import data, devices, patches, runs  # noqa: E402
from common.two_gaussians import sample_real  # noqa: E402

ROWS = {
    "plain": "plain loop",
    "returned": "ours, memory returned to the system",
    "fp32": "ours",
    "tf32": "ours, TF32",
    "bf16": "ours, bf16",
    "graph-fp32": "ours, CUDA graph",
    "graph-tf32": "ours, CUDA graph, TF32",
    "graph-bf16": "ours, CUDA graph, bf16",
}
UNTIMED = 5  # steps before the first round: a CUDA graph is recorded in the fourth
IMAGES = 50_000


def parse_args(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"of {', '.join(STEPS)}; default: all")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    parser.add_argument("--batch-size", type=runs.number(int, 2), help="samples a step; default: the script's")
    parser.add_argument("--steps", type=runs.number(int, 1), default=10, help="timed steps of a round")
    parser.add_argument("--rounds", type=runs.number(int, 1), default=3, help="of which the median counts")
    parser.add_argument("--row", choices=ROWS, help="measure this row alone, and print it as JSON")
    args = parser.parse_args(argv)
    unknown = [script for script in args.scripts if script not in STEPS]
    if unknown or (args.row and len(args.scripts) != 1):
        raise runs.UserError(f"say which of {', '.join(STEPS)}; with --row just one (--help lists the flags)")
    return args


# --- one step of each script, plain and ours: a function of the step's number, from 1 -------------------------------


def random_images(device):
    return torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, device=device)


class Images(torch.utils.data.Dataset):
    """uint8 images (N, 32, 32, 3) as most tutorials read them. Not inside a function: macOS pickles it for a worker."""

    def __init__(self, images):
        transforms = data.import_torchvision().transforms
        steps = [transforms.ToPILImage(), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.images, self.augment = images, transforms.Compose(steps)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.augment(self.images[i])


def vae_plain(args, device):
    """The same model and loss, written the usual way."""
    images = Images(random_images("cpu").permute(0, 2, 3, 1).numpy())

    def endless():
        while True:
            yield from torch.utils.data.DataLoader(images, args.batch_size, shuffle=True, num_workers=2, drop_last=True)

    batches = endless()
    model = vae.VAE(args.latent_dim).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    def step(_):
        x = next(batches).to(device)
        nll, kl, _ = vae.elbo_terms(model, x, torch.randn(len(x), args.latent_dim, device=device))
        loss = (nll + kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def vae_ours(args, device):
    images, model = random_images(device), vae.VAE(args.latent_dim).to(device)
    optimizer = devices.adam(model.parameters(), args.lr, device)
    update = vae.make_update(model, copy.deepcopy(model), patches.head(args, images), optimizer, images, args)

    def step(i):
        noise = devices.generator(device, 0, "noise", i)
        rows = torch.randint(0, IMAGES, (args.batch_size,), device=device, generator=noise)
        flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
        eps = torch.randn(args.batch_size, args.latent_dim, device=device, generator=noise)
        update(rows, flip, eps, devices.average_decay(i, args.ema, device))

    return step


def plain_players(model, average, discriminator, head, optimizers, images, args):
    """As vae_gan.make_update, but each player for itself, with zero_grad() and backward()."""

    def losses(x, eps, z_p):
        mu, logvar = model.encoder(x)
        z = mu + eps * torch.exp(0.5 * logvar)
        x_hat, x_p = model.decoder(z), model.decoder(z_p)
        (real, features), (hat, features_hat), (p, _) = discriminator(x), discriminator(x_hat), discriminator(x_p)
        sigma2 = (features - features_hat).detach().square().mean()
        like = vae.gaussian_nll(features.detach(), features_hat, sigma2).mean()
        fool = -(F.logsigmoid(hat) + F.logsigmoid(p)).mean()
        return {
            "encoder": vae.kl_to_prior(mu, logvar).mean() + like,
            "decoder": args.gamma * like + fool,
            "discriminator": -vae_gan.gan_terms(real, hat, p).mean(),
        }

    def update(rows, flip, eps, z_p, decay):
        x = data.batch(images, rows, flip)
        for name, optimizer in optimizers.items():
            for other in optimizers.values():
                other.zero_grad()
            losses(x, eps, z_p)[name].backward()
            optimizer.step()
        devices.average_weights(average, model, decay)

    return update


def vae_gan_step(make_update, args, device):
    images, model = random_images(device), vae.VAE(args.latent_dim).to(device)
    discriminator = vae_gan.Discriminator(args.feature_layer).to(device)
    head = patches.head(args, images)
    players = vae_gan.players(model, discriminator, head)
    optimizers = {name: devices.adam(parameters, args.lr, device) for name, parameters in players.items()}
    update = make_update(model, copy.deepcopy(model), discriminator, head, optimizers, images, args)

    def step(i):
        noise = devices.generator(device, 0, "noise", i)
        rows = torch.randint(0, IMAGES, (args.batch_size,), device=device, generator=noise)
        flip = torch.rand(args.batch_size, device=device, generator=noise) < 0.5
        eps, z_p = torch.randn(2, args.batch_size, args.latent_dim, device=device, generator=noise)
        update(rows, flip, eps, z_p, devices.average_decay(i, args.ema, device))

    return step


def vae_gan_plain(args, device):
    return vae_gan_step(plain_players, args, device)


def vae_gan_ours(args, device):
    return vae_gan_step(vae_gan.make_update, args, device)


def wgan_gp_plain(args, device):
    models = wgan_gp.build(args, device)
    generator, critic = models["generator"], models["critic"]
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=wgan_gp.BETAS)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr, betas=wgan_gp.BETAS)

    def fakes():
        return generator(wgan_gp.sample_latent(args.batch_size, args.latent_dim, device=device))

    def step(_):
        for _ in range(args.critic_steps):
            real, fake = sample_real(args.batch_size, args.sigma, device=device), fakes().detach()
            mix = torch.rand(args.batch_size, 1, device=device)
            between = (mix * fake + (1 - mix) * real).requires_grad_(True)
            scores = critic(between)
            (gradient,) = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)
            penalty = ((gradient.norm(2, dim=1) - 1).clamp(min=0) ** 2).mean()
            on_real = critic(real)
            loss = critic(fake).mean() - on_real.mean() + args.penalty * penalty + args.drift * (on_real**2).mean()
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            loss.item()
        loss = -critic(fakes()).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
        loss.item()

    return step


def wgan_gp_ours(args, device):
    critic_steps, generator_step = wgan_gp.make_steps(args, **wgan_gp.build(args, device))
    if args.capture:
        critic_steps, generator_step = devices.Captured(critic_steps), devices.Captured(generator_step)

    def step(i):
        batches, z = wgan_gp.draw_batches(args, device, i)
        critic_steps(*batches)
        generator_step(z, devices.average_decay(i, args.ema, device))

    return step


STEPS = {  # script: its flags, plain, ours, what is counted
    "vae": (vae.parse_args, vae_plain, vae_ours, "images/s"),
    "vae_gan": (vae_gan.parse_args, vae_gan_plain, vae_gan_ours, "images/s"),
    "wgan_gp": (wgan_gp.parse_args, wgan_gp_plain, wgan_gp_ours, "iterations/s"),
}


def rows_of(script, device):
    """The rows that a script has on a device."""
    rows = list(ROWS)
    if device.type != "cuda":
        rows = [row for row in rows if "graph" not in row and row != "tf32"]
    if device.type != "cpu" or script != "vae":  # the other scripts' plain rows keep memory as ours do
        rows.remove("returned")
    if script == "wgan_gp":  # it has no --precision
        rows = [row for row in rows if not row.endswith(("tf32", "bf16"))]
    return rows


# --- measuring ----------------------------------------------------------------------------------------------------


def seconds(call, device):
    began = now(device)
    call()
    return now(device) - began


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Operations(TorchDispatchMode):
    """Within it, `count` adds up the floating point operations of products and convolutions, forward and backward.

    torch's own FlopCounterMode hooks into autograd, which torch.autograd.grad for a penalty does not bear.
    """

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = flop_registry.get(function._overloadpacket)
        if formula:
            self.count += formula(*args, **kwargs, out_val=result)
        return result


def product_rate(device, precision):
    """Floating point operations a second of a large matrix product in this precision: the best of five."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    torch.mm(a, a)
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, a), device) for _ in range(5))


def measure(script, args):
    """-> {"speed": of --row in images or iterations a second, "share": of the rate of a product}"""
    parse, plain, ours, unit = STEPS[script]
    bare = args.row in ("plain", "returned")
    precision = "fp32" if bare else args.row.removeprefix("graph-")
    device, captured = devices.pick_device(args.device), args.row.startswith("graph")
    returns_memory = bare and script == "vae" and device.type == "cpu"
    if not returns_memory:  # `start` keeps it
        device = devices.start(args.device, precision, captured)
    settings = parse([])
    settings.precision, settings.capture = precision, captured
    settings.batch_size = args.batch_size or settings.batch_size
    if script == "wgan_gp":
        torch.set_num_threads(settings.threads)
    step = (plain if args.row == "plain" else ours)(settings, device)
    with Operations() as operations:
        step(1)
    for i in range(2, UNTIMED + 1):
        step(i)

    def steps():
        for i in range(args.steps):
            step(UNTIMED + 1 + i)

    a_step = statistics.median(seconds(steps, device) for _ in range(args.rounds)) / args.steps
    share = operations.count / a_step / product_rate(device, precision)
    return {"speed": (settings.batch_size if unit == "images/s" else 1) / a_step, "share": share}


def table(script, args, device):
    """Print a script's table; each row is a process of its own."""
    size = args.batch_size or STEPS[script][0]([]).batch_size
    print(f"\n{runs.machine(args.device)}, torch {torch.__version__}, batches of {size}\n")
    print(f"| step of {script}.py | {STEPS[script][3]} | ratio | share of a matrix product's rate |")
    print("|---|---:|---:|---:|")
    plain = None
    for row in rows_of(script, device):
        words = [sys.executable, __file__, script, "--row", row, "--device", args.device, "--batch-size", str(size)]
        words += ["--steps", str(args.steps), "--rounds", str(args.rounds)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise runs.UserError(f"the row '{row}' failed: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout)
        plain = plain or found["speed"]
        print(
            f"| {ROWS[row]} | {found['speed']:.4g} | {found['speed'] / plain:.2f} | {found['share']:.0%} |", flush=True
        )


def main(argv=None):
    args = parse_args(argv)
    if args.row:
        print(json.dumps(measure(args.scripts[0], args)))
        return
    device = devices.pick_device(args.device)
    for script in args.scripts or STEPS:
        table(script, args, device)


if __name__ == "__main__":
    runs.cli(main)
