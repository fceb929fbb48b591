"""Files of images: which files a folder has, and their pixels. One reader for fid.py and for --data FOLDER.

    found = images.find("photos/", images.SUFFIXES)
    for picture in images.decode(found.files, images.for_learner): ...

Both uses find files alike: folders are searched through, links are followed (each folder is read once, so that a link
cannot lead in a circle), hidden files and folders and __MACOSX are passed over, and so is what is no file (a pipe).
Both refuse files of more than 8 bits a channel, but for AVIF, of which Pillow does not tell. They differ where
pytorch-fid's rule and a learner's need differ:

                       fid.py (`as_pytorch_fid`)      --data FOLDER (`for_learner`)
    suffixes           pytorch-fid's nine             also .avif, .gif, .jfif
    EXIF orientation   pixels as they are stored      turned upright
    transparency       dropped: hidden colours show   laid on white
    size               kept                           the largest centred square, resized to 32x32
"""

import errno
import hashlib
import logging
import os
import re
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from common.runs import UserError, is_out_of_memory
from common.streams import first_line

PYTORCH_FID_SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SUFFIXES = PYTORCH_FID_SUFFIXES | {".avif", ".gif", ".jfif"}
BYTES = 128 * 2**20  # of decoded pixels that wait at a time, and at most half of it in a batch
WAITING = 64  # images that wait at a time: each may hold its file open
ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# --- which files --------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The images under a folder, and a count of what was left out, by kind."""

    files: list[Path]
    left_out: Counter


def find(root, suffixes):
    """Search a folder through -> Found, the files sorted. Raises UserError when a folder cannot be read."""
    files, left_out, seen = [], Counter(), set()
    links = deque([Path(root)])  # they come after the folders, so that a folder is read under its own name
    try:
        while links:
            folders = [links.popleft()]
            while folders:
                folder = folders.pop()
                status = folder.stat()
                if (status.st_dev, status.st_ino) in seen:
                    left_out["link(s) to a folder that is read already"] += 1
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    entries = sorted(entries, key=lambda entry: entry.name)
                for entry in entries:
                    path, kind = Path(entry.path), kind_of(entry)
                    if kind == "folder" and entry.is_symlink():
                        links.append(path)
                    elif kind == "folder":
                        folders.append(path)
                    elif kind == "file" and path.suffix.lower() in suffixes:
                        files.append(path)
                    elif kind == "file":
                        left_out[path.suffix.lower() or path.name] += 1
                    else:
                        left_out[kind] += 1
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}; check its permissions") from error
    return Found(sorted(files), left_out)


def path_hash(path):
    """A path -> a number that depends on nothing else and looks random: an order that does not go by class."""
    name = path.as_posix() if isinstance(path, Path) else path
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")


def kind_of(entry):
    """An os.DirEntry -> "folder", "file", or in words why it is passed over."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.name == "__MACOSX":
        return "__MACOSX"
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    return "broken link(s)" if entry.is_symlink() else "no regular file"


def in_words(counts):
    """A Counter -> "2 .gif, 1 hidden"."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


# --- their pixels -------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A decoded file: pixels (3, H, W) uint8, and what was done to it, in words. Or the problem, a sentence."""

    file: Path
    pixels: np.ndarray | None = None
    done: tuple = ()
    problem: str | None = None


def decode(files, convert):
    """Decode ahead in threads -> an iterator of a Picture a file, in the files' order.

    convert: `as_pytorch_fid` or `for_learner`. What waits is bounded by BYTES (a larger image waits alone).
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # Pillow decodes outside Python's lock
        waiting, held = deque(), 0
        for file in files:
            image, problem = attempt(file, Image.open)  # reads the size and no pixels
            size = 4 * image.width * image.height if image else 0
            while waiting and (held + size > BYTES or len(waiting) == WAITING):
                freed, job = waiting.popleft()
                held -= freed
                yield job.result()
            waiting.append((size, pool.submit(finish, file, image, problem, convert)))
            held += size
        for _, job in waiting:
            yield job.result()


def batches(files, batch_size, done):
    """Decode files for fid.py -> lists of batch_size uint8 tensors (3, H, W), in the files' order; of fewer where they
    are large. done: a Counter of what was done to images. Raises UserError.
    """
    batch, held = [], 0
    for picture in decode(files, as_pytorch_fid):
        if picture.problem:
            raise UserError(picture.problem)
        done.update(picture.done)
        batch.append(torch.from_numpy(picture.pixels))
        held += picture.pixels.size
        if len(batch) == batch_size or 2 * held > BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def finish(file, image, problem, convert):
    """The pixels of an image that is open, or a problem -> Picture."""
    if problem:
        return Picture(file, problem=problem)

    def pixels(file):
        with image:
            if is_deep(image):
                raise UserError(f"{file} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
            return convert(image)

    made, problem = attempt(file, pixels)
    return Picture(file, problem=problem) if problem else Picture(file, *made)


def is_deep(image):
    """Whether an opened image has more than 8 bits a channel. Of an AVIF Pillow does not tell."""
    if image.mode.startswith(("I", "F")):
        return True
    # Pillow cuts deeper colours down to 8 bits while it decodes; only the decoder's arguments tell
    for codec, _, _, arguments in image.tile:
        if codec in ("ppm", "ppm_plain") and image.mode != "1" and arguments[1] > 255:  # mode, largest value
            return True
    return bool(re.search(r";16[BLN]", str(image.tile)))


def attempt(file, action):
    """-> action(file) and None, or None and in a sentence why this file is no image that can be read."""
    try:
        return action(file), None
    except UserError as error:
        return None, str(error)
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        out_of_memory = getattr(error, "errno", None) == errno.ENOMEM or "out of memory" in str(error).lower()
        if out_of_memory or is_out_of_memory(error):
            raise MemoryError from error
        reason = getattr(error, "strerror", None) or first_line(error)
        return None, f"cannot read the image {file} ({reason}): repair or remove it"


def as_pytorch_fid(image):
    """-> pixels as pytorch-fid has them, and in words what a person may not expect of them."""
    done = [] if image.mode == "RGB" else [f"of mode {image.mode}"]
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)
    if orientation(image) in TURNS:
        done.append("with an EXIF orientation")
    return pixels, tuple(done)


def for_learner(image, size=32):
    """-> pixels (3, size, size) as a person sees the image: its largest centred square; and what was done."""
    image.load()  # first: of a TIFF this turns the image and takes the orientation away
    turn, done = orientation(image), []
    if image.has_transparency_data:
        done.append("transparent, laid on white")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if turn in TURNS:
        done.append("turned upright as their EXIF says")
        image = image.transpose(TURNS[turn])
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1), tuple(done)


def orientation(image):
    """EXIF's orientation of a loaded image, 1 where there is none."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF fails in as many ways as it has parts, and says nothing about the pixels
        return 1


@contextmanager
def quiet_pillow():
    """Keep Pillow's warnings out of the progress bar. Around whole loops: the setting is the process's."""
    log = logging.getLogger("PIL")
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
