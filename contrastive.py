"""An unsupervised term for an encoder: two views of an image should have similar codes, unlike those of other images.

Paper: SimCLR, Chen et al. 2020 (arXiv 2002.05709), whose loss is called NT-Xent. Augmentations are drawn as uniform
numbers outside, one row an image, so that a training step itself draws nothing; they run batched on the device.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

NUMBERS = 10  # uniform numbers that one augmentation of one image takes
LUMA = (0.299, 0.587, 0.114)


def augment(x, u, strength=1.0):
    """A random crop, resized back, a flip, a change of brightness, contrast, saturation and hue, or to grey.

    strength scales ranges and probabilities; at 0 the image comes back. Ranges at 1: 30 to 100 % of the area with
    aspect ratios 3:4 to 4:3; flip 0.5; brightness, contrast and saturation 60 to 140 %; hue +- 36 degrees; grey 0.2.

    x: (B, 3, H, W) in [0, 1], u: (B, NUMBERS) uniform on [0, 1) -> (B, 3, H, W) in [0, 1]
    """
    area, ratio, left, top, flip, brightness, contrast, saturation, hue, grey = u.unbind(1)

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

    # One 3x3 matrix an image: a rotation about the grey axis (hue), a blend with the luma (saturation), a factor.
    luma = x.new_tensor(LUMA)
    angle = around(hue) * math.radians(36)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    ones = x.new_full((3, 3), 1 / 3)
    cross = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    rotation = cos * torch.eye(3, device=x.device) + (1 - cos) * ones + sin * cross
    blend = torch.where(grey < 0.2 * strength, 0.0, 1 + 0.4 * around(saturation))[:, None, None]
    matrix = (blend * torch.eye(3, device=x.device) + (1 - blend) * luma) @ rotation
    contrast, brightness = (1 + 0.4 * around(contrast))[:, None, None], (1 + 0.4 * around(brightness))[:, None, None]
    pixels = x.flatten(2)
    mean = (luma @ pixels).mean(1)[:, None, None]
    return (brightness * (contrast * (matrix @ pixels) + (1 - contrast) * mean)).clamp(0, 1).view_as(x)


def nt_xent(a, b, temperature=0.5):
    """-log of the softmax probability of an image's other view among all other views.  Chen et al. 2020, eq. 1.

    Similarity is the cosine over the temperature. Each image's value is the mean over its two views.

    a, b: (B, Z) -> (B,) in nats, from 0 to about 2 / temperature + log(2B - 1); collapsed codes give log(2B - 1)
    """
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
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
