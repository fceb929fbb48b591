"""An unsupervised term for an encoder: an image and an augmented view of it should have similar codes.

Paper: SimCLR, Chen et al. 2020 (arXiv 2002.05709), whose loss is called NT-Xent. Here it compares mu of the plain
image, which the ELBO computes anyway, with mu of one view, without a projection head: what a classifier reads is what
the term shapes. It acts on the first half of mu: the other half is free to hold what views do not share and the decoder
needs, such as colour and position. In a script's step, under autocast or not:

    u = contrastive.draw(batch_size, generator)                      # outside: the step itself draws nothing
    value = contrastive.term(encoder, x, mu, u)                      # (B,) in nats, to be weighted and averaged

Under several ranks an image is told apart from those of its own rank, not of the global batch.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

NUMBERS = 10  # uniform numbers that one augmentation of one image takes


def draw(n, generator):
    """u (n, NUMBERS) uniform on [0, 1), on the generator's device."""
    return torch.rand(n, NUMBERS, device=generator.device, generator=generator)


def augment(x, u, strength=1.0):
    """A random crop, resized back, a flip, and a change of brightness, contrast, saturation and hue, or to grey.

    strength scales ranges and probabilities; at 0 the image comes back. Ranges at 1: 30 to 100 % of the area with
    aspect ratios 3:4 to 4:3; flip 0.5; brightness, contrast and saturation 60 to 140 %; hue +- 36 degrees; grey 0.2.

    x: (B, 3, H, W) in [0, 1], u: (B, NUMBERS) uniform on [0, 1) -> (B, 3, H, W) in [0, 1]
    """
    area, ratio, left, top, flip, *jitter, grey = u.unbind(1)

    def around(number):  # uniform on [-strength, strength)
        return strength * (2 * number - 1)

    area = 1 - 0.7 * strength * area
    ratio = torch.exp(around(ratio) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0] = torch.where(flip < 0.5 * strength, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * left - 1), (1 - height) * (2 * top - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    # A colour is a grey, the mean of its channels, and a chroma, which hue turns and saturation scales.
    brightness, contrast, saturation, hue = (around(number)[:, None, None] for number in jitter)
    saturation = torch.where(grey[:, None, None] < 0.2 * strength, 0.0, 1 + 0.4 * saturation)
    angle = hue * math.radians(36)
    eye, to_grey = torch.eye(3, device=x.device), x.new_full((3, 3), 1 / 3)
    quarter = (eye.roll(1, 0) - eye.roll(1, 1)) / math.sqrt(3)  # of a turn of the chroma about the grey axis
    matrix = to_grey + saturation * (angle.cos() * (eye - to_grey) + angle.sin() * quarter)
    contrast, pixels = 1 + 0.4 * contrast, x.flatten(2)
    mean = pixels.mean((1, 2))[:, None, None]
    return ((1 + 0.4 * brightness) * (contrast * (matrix @ pixels) + (1 - contrast) * mean)).clamp(0, 1).view_as(x)


def nt_xent(a, b, temperature=0.1):
    """-log of the softmax probability of an image's other view among all other views.  Chen et al. 2020, eq. 1.

    Similarity is the cosine over the temperature. Each image's value is the mean over its two views.

    a, b: (B, Z) -> (B,) in nats, from 0 to about 2 / temperature + log(2B - 1); collapsed codes give log(2B - 1)
    """
    z = F.normalize(torch.cat([a, b]), dim=1)  # (2B, Z)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-math.inf)
    other = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similarity, other, reduction="none").view(2, -1).mean(0)


@contextlib.contextmanager
def untracked(module):
    """Inside, batch norm normalises by the batch, as in training, but does not move its running statistics.

    They are to be those of plain images, which is what evaluation shows the encoder.
    """
    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def term(encoder, x, mu, u):
    """NT-Xent between mu (B, Z) = encoder(x)[0] and that of the views of x which u (B, NUMBERS) says -> (B,) in nats.

    Of the first half of their dimensions.
    Views and similarities are computed in the precision of x also where the encoder runs under autocast.
    """
    half = (mu.shape[1] + 1) // 2
    full = torch.autocast(x.device.type, enabled=False)
    with full:
        view = augment(x, u)
    with untracked(encoder):
        mu_view, _ = encoder(view)
    with full:
        return nt_xent(mu[:, :half].to(x.dtype), mu_view[:, :half].to(x.dtype))
