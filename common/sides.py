"""What fid.py's arguments name: a folder of images, a data set, or statistics in a file."""

from pathlib import Path
from typing import NamedTuple

from common import data, images, moments
from common.runs import UserError
from common.streams import note


class Side(NamedTuple):
    """An argument, as typed and as understood: one of an .npz, a data set's name and split, or a folder's images."""

    text: str
    npz: Path | None = None
    data_set: tuple[str, str] | None = None
    files: tuple[Path, ...] = ()

    def same_as(self, other):
        return self[1:] == other[1:]


def find_side(text):
    """An argument -> Side. Raises UserError."""
    name, _, split = text.partition(":")
    if name in data.CLASSES:
        if split not in ("train", "test"):
            raise UserError(f"{text} is no data set: say {name}:test or {name}:train")
        return Side(text, data_set=(name, split))
    path = Path(text)
    try:
        if not path.exists():
            raise UserError(f"{text} does not exist: give a folder, an .npz, or a data set such as cifar10:test")
        if path.is_file() and path.suffix == ".npz":
            return Side(text, npz=path)
        if path.is_file():
            raise UserError(f"{text} is a file but no .npz of statistics: give a folder of images")
    except OSError as error:
        raise UserError(f"cannot read {text}: {error.strerror}; check its permissions") from error
    files, left_out = images.find(path, images.PYTORCH_FID_SUFFIXES)
    if not files:
        seen = ", ".join(sorted(left_out)[:5])
        raise UserError(f"{text} has no images, {f'only {seen}' if seen else 'it is empty'}: .png, .jpg ... are read")
    if len(files) == 1:
        raise UserError(f"{text} has only one image ({files[0]}): a covariance takes at least 2")
    if left_out:
        note(f"{text}: passed over: {images.in_words(left_out)}")
    return Side(text, files=tuple(files))


def load_stats(side, recipe, name, dims=None):
    """A side's .npz -> Statistics. Raises UserError when they are of another recipe or of other dimensions."""
    found, its_recipe = moments.read(side.npz)
    if its_recipe not in (None, recipe):
        raise UserError(f"{side.text} was made with another recipe, {its_recipe}, not {recipe}: write it anew")
    if dims not in (None, len(found.mu)):
        raise UserError(f"{side.text} has {len(found.mu)} dimensions, not {dims}: write it anew with --save-stats")
    if its_recipe is None:
        note(f"{side.text} does not say of which network it is, and is taken to be of {name}")
    return found


def load_both(sides):
    """Two sides' .npz -> Statistics of each; "fid" or "fd", the recipe: the files say of which features they are."""
    recipes = [moments.read(side.npz)[1] for side in sides]
    recipe = next((recipe for recipe in recipes if recipe), None)
    found = [load_stats(side, recipe, recipe or "the other's") for side in sides]
    recipe = recipe or "Frechet distance (of unnamed statistics)"  # whatever network's: no FID
    return found, "fid" if recipe.startswith("FID") else "fd", recipe
