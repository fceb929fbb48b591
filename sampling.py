"""What a trained VAE gives, for vae.py and vae_gan.py alike: codes, reconstructions, samples, the final report.

A model here is a module with an `encoder` (x -> mu, logvar) and a `decoder` (z -> x_hat), as vae.VAE is. Images are
uint8 on the model's device; reconstructions are the decoder's mean at the encoder's mean, the same for every model.
"""

import torch

import data
import devices
import fid
import runs


@torch.no_grad()
def encode(vae, images, seed=None, batch_size=500):
    """Codes (N, Z) of uint8 images: the means, or with a seed one sample of q(z|x) each."""
    vae.eval()
    noise = devices.generator(images.device, seed, "encode")
    codes = []
    for part in images.split(batch_size):
        mu, logvar = vae.encoder(part.float() / 255)
        if seed is not None:
            mu += torch.randn(mu.shape, device=mu.device, generator=noise) * torch.exp(0.5 * logvar)
        codes.append(mu)
    return torch.cat(codes)


@torch.no_grad()
def decode(vae, z, batch_size=500):
    """z (N, Z) -> uint8 images (N, 3, 32, 32): decoder means without pixel noise, rounded."""
    vae.eval()
    return torch.cat([vae.decoder(part).mul(255).round().to(torch.uint8) for part in z.split(batch_size)])


def draw_latents(vae, n, prior, images, seed):
    """z (n, Z) from N(0, I), or for prior 'expost' from the full Gaussian fitted to one code of each image."""
    noise = devices.generator(images.device, seed, "latents")
    z = torch.randn(n, vae.encoder.mu.out_features, device=images.device, generator=noise)
    if prior == "normal":
        return z
    codes = encode(vae, images, seed).cpu().double()
    scale = torch.linalg.cholesky(torch.cov(codes.T) + 1e-9 * torch.eye(codes.shape[1]))  # unused units have no spread
    return codes.mean(0).to(z) + z @ scale.T.to(z)


def generate(vae, n, prior, images, seed):
    """-> n samples, uint8 (n, 3, 32, 32), with z as `draw_latents` says."""
    return decode(vae, draw_latents(vae, n, prior, images, seed))


def write_samples(run, args, vae, images):
    folder = run / f"samples-{args.prior}"
    data.write_images(generate(vae, args.sample, args.prior, images, args.seed), folder)
    print(f"{args.sample} samples are in {folder}")


def report(run, args, vae, images, test, extractor, metrics, pictures):
    """What a run ends with: metrics.json, pictures of reconstructions and samples, the table.

    metrics, pictures: what the script has measured and drawn already. images, test: the data's; extractor: fid's, or
    None. Adds the sharpness of the model's images, their high-frequency energy over the test images', and distances.
    """

    def reconstruct(x):
        return decode(vae, encode(vae, x))

    def sample(n, prior):
        return generate(vae, n, prior, images, args.seed)

    n = max(len(test), 128)
    made = {
        "reconstruction": reconstruct(test),
        "generation": sample(n, "normal"),
        "generation_expost": sample(n, "expost"),
    }
    detail = data.high_frequency_energy(test)
    metrics |= {f"sharpness_{name}": data.high_frequency_energy(x) / detail for name, x in made.items()}
    metrics |= run.earlier_distances(metrics["step"])
    if extractor:
        metrics |= fid.model_distances(reconstruct, sample, images, test, args, extractor)
    runs.write_json(run / "metrics.json", metrics)
    rows = [test[:64], made["reconstruction"][:64]]
    data.plot_rows(rows, run / "reconstructions.png", "test images, each row above its reconstructions")
    data.plot_grid(made["generation"][:128], run / "samples-normal.png", "samples, z ~ N(0, I)")
    expost = "samples, z ~ Gaussian fitted to training codes"
    data.plot_grid(made["generation_expost"][:128], run / "samples-expost.png", expost)
    title = f"{args.data}, {len(test)} {'held-out training' if args.holdout else 'test'} images"
    run.summary(title, metrics, [*pictures, "reconstructions.png", "samples-normal.png", "samples-expost.png"])
    if args.fid == "auto" and next(vae.parameters()).device.type == "cpu":
        print("  no FID: 40,000 images through Inception take most of an hour on a CPU. This fills it in:")
        print(f"  python {run.script} --name {args.name} --eval-only --fid 10000")
