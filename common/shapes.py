"""A generated data set that needs nothing: 50,000 + 10,000 images, ten classes of shapes and textures."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from common import ranks, runs
from common.streams import note

CLASSES = ("disc", "ring", "square", "triangle", "cross", "crescent", "stripes", "checks", "dots", "zigzag")
SHA256 = {
    "train": "eaeeb585adbaf0b117f0da1f0ca1f2186f426e65c17103997091a30f7040d3cd",
    "test": "2ba4c8f99cec35e050961575b27e55a184d93c82c685d4422e15af7498bd0963",
}


def load(data_dir, split):
    """The generated set, from its cache when that is intact.

    A linear classifier on the pixels (L-BFGS to convergence on all 50,000) reaches 16.6 % on the test images.
    """
    path = data_dir / f"shapes-{split}.npy"
    n = {"train": 50_000, "test": 10_000}[split]
    try:
        images = np.load(path)
        intact = hashlib.sha256(images).hexdigest() == SHA256[split]
    except (OSError, ValueError, EOFError):
        intact = False
    if not intact:
        images = make(n, seed={"train": 0, "test": 1}[split])
        try:
            with runs.writing(path) as part:
                np.save(part, images)
        except runs.UserError as error:
            note(f"the shapes will be drawn again next time: {error}")
    return images, np.arange(n) % 10


def make(n, seed):
    """-> (n, 3, 32, 32) uint8; image i shows class CLASSES[i % 10].

    Same seed, same bytes on every machine: NumPy's PCG64 words are guaranteed stable, and all that follows is integer
    arithmetic (float noise in sin and cos differs between processors). Lengths are in 1/16 pixel.
    """
    raw = np.random.PCG64(seed)
    words = raw.random_raw((n, 24)).astype(np.int64) & 0x7FFFFFFF
    noise = raw.random_raw((n, 3 * 32 * 32 // 8)).astype("<u8").view(np.uint8).reshape(n, 3, 32, 32)
    images = np.empty((n, 3, 32, 32), np.uint8)
    jobs = [range(c + 10 * i, n, 10)[:400] for c in range(10) for i in range(0, (n + 9 - c) // 10, 400)]

    def work(rows):
        index = np.fromiter(rows, np.int64)
        images[index] = draw(CLASSES[rows[0] % 10], words[index], noise[index])

    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(work, jobs), "drawing shapes", len(jobs), leave=False, disable=not ranks.is_main()))
    return images


# cos and sin of 64 angles in units of 1/1024, as integers: rounding hides the last bit in which processors differ
ANGLES = np.rint(1024 * np.exp(2j * np.pi * np.arange(64) / 64)).view(np.float64).reshape(64, 2).astype(np.int32)


def draw(kind, words, noise):
    """One class. kind: a name in CLASSES; words (n, 24) random ints; noise (n, 3, 32, 32) uint8 -> uint8 images."""

    def pick(column, low, high):  # uniform in low..high-1, shaped to broadcast over (n, y, x)
        return (low + words[:, column] % (high - low)).astype(np.int32)[:, None, None]

    grid = 8 * np.arange(64, dtype=np.int32) + 4 - 256  # 2 x 2 sub-pixels a pixel, origin in the centre
    x, y = grid[None, None, :] - pick(0, -80, 81), grid[None, :, None] - pick(1, -80, 81)
    cos, sin = (ANGLES[words[:, 2] % 64][:, i, None, None] for i in (0, 1))
    u, v = (x * cos - y * sin) >> 10, (x * sin + y * cos) >> 10
    r = pick(3, 96, 208)  # radius of a shape, 6 to 13 pixels
    p = pick(4, 64, 160)  # period of a texture, 4 to 10 pixels
    match kind:
        case "disc":
            inside = u * u + v * v < r * r
        case "ring":
            d = u * u + v * v
            inside = (d < r * r) & (16 * d > 5 * r * r)
        case "square":
            inside = np.maximum(abs(u), abs(v)) < r * 13 // 16
        case "triangle":
            inside = (2 * v < r) & ((1774 * abs(u) >> 10) - v < r)  # 1774 / 1024 = sqrt(3)
        case "cross":
            inside = (np.minimum(abs(u), abs(v)) < r * 5 // 16) & (np.maximum(abs(u), abs(v)) < r)
        case "crescent":
            inside = (u * u + v * v < r * r) & ((u - r // 2) ** 2 + v * v > r * r)
        case "stripes":
            inside = u % p < p // 2
        case "checks":
            inside = (u % p < p // 2) ^ (v % p < p // 2)
        case "dots":
            inside = (u % p - p // 2) ** 2 + (v % p - p // 2) ** 2 < p * p // 10
        case "zigzag":
            inside = (v + abs(u % p - p // 2)) % p < p // 2
    cover = inside.reshape(len(words), 32, 2, 32, 2).sum((2, 4), dtype=np.int32)[:, None]  # 0..4 of 4 sub-pixels

    # The background runs from one colour to another, and where it passes 255 it starts again at 0: an edge that
    # belongs to no class. The foreground is far from the middle of that range in every channel.
    def colour(column):
        return (words[:, column : column + 3] % 256).astype(np.int32)[:, :, None, None]

    cos, sin = (ANGLES[words[:, 5] % 64][:, i, None, None] for i in (0, 1))
    ramp = 512 + ((x[:, :, ::2] * cos + y[:, ::2] * sin) >> 10).clip(-512, 512)[:, None]  # 0..1024
    low, high = colour(6), colour(9) // 3
    ground = (low + (high * ramp >> 10)) % 256
    paint = (low + 64 + colour(12) // 2 + high // 2) % 256
    mixed = (cover * paint + (4 - cover) * ground) // 4 + noise % 17 - 8
    return mixed.clip(0, 255).astype(np.uint8)
