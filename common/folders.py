"""A person's own folder of images: what is understood of it, and what is refused.

    flat                 class folders                splits, in either form
    photos/a.jpg ...     pets/cat/1.jpg ...           pets/train/cat/1.jpg ...   pets/test/cat/1.jpg ...
                         pets/dog/1.jpg ...           (or val/, valid/, validation/ in place of test/)

A folder without splits holds out about a sixth for testing. Which, and the order of the images, goes by a hash of each
file's path within the folder: so an order never goes by class, and no other image moves when one is added or deleted.
The classes are those of the training images; without splits, of all images. How files are found and decoded: images.py.
"""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import images, ranks
from common.runs import UserError

TRAIN, HELD_OUT = "train", ("test", "val", "valid", "validation")
SPLIT_WORDS = {TRAIN, *HELD_OUT, "training", "testing", "dev", "eval", "evaluation", "holdout"}
NO_CLASS = -1  # the label of an image that lies in no class folder


class Item(NamedTuple):
    """An image: its file, its path within the folder, and its class folder's name or None."""

    file: Path
    path: str
    kind: str | None


@dataclass(frozen=True)
class Folder:
    """What is understood of a folder: the items of each split in their order, the classes, what was left out."""

    text: str
    items: dict[str, list[Item]]
    classes: tuple[str, ...]
    left_out: Counter

    def labels(self, split):
        """-> (N,) int64: indices into `classes`, NO_CLASS for images of no class or of one that training lacks."""
        index = {kind: i for i, kind in enumerate(self.classes)}
        return np.array([index.get(item.kind, NO_CLASS) for item in self.items[split]], np.int64)

    def check_labels(self):
        """Raises UserError unless each image lies in a class folder, and training has every class of the test."""
        if not self.classes:
            raise UserError(f"--data {self.text} has one class, for it has no folders: put each class into one")
        for split, items in self.items.items():
            without = [item for item in items if item.kind is None]
            if without:
                raise UserError(
                    f"--data {self.text}: {len(without)} {split} images lie in no class folder, such as "
                    f"{without[0].file}: move each into the folder of its class, or remove them"
                )
            unknown = sorted({item.kind for item in items} - set(self.classes))
            if unknown:
                raise UserError(
                    f"--data {self.text}: no training image is of class {', '.join(unknown)}, but {split} images are: "
                    "add training images of it, or remove those"
                )

    def fingerprint(self):
        """The list of files with their sizes, in short: "240 images, 1f0c5a2b9e7d4c38"."""
        every = sorted((item.path, item.file.stat().st_size) for items in self.items.values() for item in items)
        digest = hashlib.sha256()
        for path, size in every:
            digest.update(os.fsencode(f"{path}\0{size}\n"))
        return f"{len(every)} images, {digest.hexdigest()[:16]}"


def find(text):
    """A folder's name -> Folder. Raises UserError."""
    root = Path(text)
    if not root.is_dir():
        raise UserError(f"--data {text} is neither cifar10, shapes nor a folder that is there: check the path")
    files, left_out = images.find(root, images.SUFFIXES)
    paths = [file.relative_to(root) for file in files]
    tops = {path.parts[0] for path in paths if len(path.parts) > 1}
    train, test = split_folders(text, tops)
    items = {"train": [], "test": []}
    for file, path in zip(files, paths, strict=True):
        inside = path.parts
        if train is None:
            split = "test" if images.path_hash(path) % 6 == 0 else "train"
        elif inside[0] in (train, test) and len(inside) > 1:
            split = "train" if inside[0] == train else "test"
            inside = inside[1:]
        else:
            left_out[f"beside {train}/ and {test}/"] += 1
            continue
        items[split].append(Item(file, path.as_posix(), inside[0] if len(inside) > 1 else None))
    for split, found in items.items():
        found.sort(key=lambda item: images.path_hash(item.path))
        if len(found) < 2:
            advice = "" if train else f"; add some, or make {TRAIN}/ and test/ of them"
            raise UserError(
                f"--data {text}: found {len(found)} {split} images (.png, .jpg, ...): it takes at least 2{advice}"
            )
    known = items["train"] if train else items["train"] + items["test"]
    classes = tuple(sorted({item.kind for item in known} - {None}))
    return Folder(str(text), items, classes, left_out)


def split_folders(text, tops):
    """The names of top folders -> those of the training and of the test images, or None twice where there are none.

    Raises UserError for a name that says split where its partner is missing.
    """
    named = {name.lower(): name for name in sorted(tops) if name.lower() in SPLIT_WORDS}
    held = [named[word] for word in HELD_OUT if word in named]
    if TRAIN in named and held:
        return named[TRAIN], held[0]
    if named:
        known = ", ".join(f"{name}/" for name in HELD_OUT)
        raise UserError(
            f"--data {text} has images in {', '.join(f'{name}/' for name in named.values())}: a split takes both "
            f"{TRAIN}/ and one of {known}; if it is a class, rename its folder"
        )
    return None, None


def read(folder, split):
    """-> images (N, 3, 32, 32) uint8, labels (N,) int64, a Counter of what was done to images. Raises UserError."""
    items, done, broken = folder.items[split], Counter(), []
    pixels = np.empty((len(items), 3, 32, 32), np.uint8)
    files = [item.file for item in items]
    pictures = images.decode(files, images.for_learner)
    with images.quiet_pillow():
        bar = tqdm(pictures, "reading", len(files), leave=False, disable=not ranks.is_main())
        for i, picture in enumerate(bar):
            done.update(picture.done)
            if picture.problem:
                broken.append(picture.problem)
            else:
                pixels[i] = picture.pixels
    if broken:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError(f"{'; '.join(broken[:5])}{more}")
    return pixels, folder.labels(split), done
