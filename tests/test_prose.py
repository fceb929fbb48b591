"""The comments of REPORT.md's questions 2 and 3 say what results.json says, number by number.

SENTENCES names every number of a comment that has a row in results.json. A number that is neither there nor among the
PLAIN ones fails, so a new run cannot leave a stale sentence behind, nor a new sentence go unchecked.

python -m pytest tests/test_prose.py
"""

import json
import re
from pathlib import Path

import pytest

from common import patches, tables

ROOT = Path(__file__).resolve().parents[1]
RUNS = json.loads((ROOT / "results/results.json").read_text())["runs"]
TEXT = re.sub(r"\s+", " ", (ROOT / "REPORT.md").read_text())
# widths, image sizes, counts and settings, which no training changes
PLAIN = {"0", "1", "2", "3", "4", "5", "8", "10", "15", "20", "60", "64", "128", "1000", "1024", "10,000"}
PLAIN |= {"0.01", "40", "3,072", "8,192", "45,000", "50,000"}
# of runs that are not in results.json, each beside its commit or command, and a linear classifier on patch features
ELSEWHERE = {"60.5", "226", "233", "228", "218", "1,500"}
ELSEWHERE |= {"0.72", "0.15", "0.14", "14"}  # the log of vae_gan_128: its last hundred lines; the epoch of a spike
ELSEWHERE |= {"16", "14.4", "14.3", "13.6", "12.7", "7.9", "7.8", "8.1", "8.0", "9.2"}  # benchmarks/neighbours.py
ELSEWHERE |= {"9", "3230", "3190"}  # the log of vae_patches: 1000 test images after each epoch


def of(model, key, after=""):
    """after: "-epoch5" for the copy at that epoch."""
    return RUNS[f"{model}_seed_0{after}"]["metrics"][key]


def fd(model, kind, after=""):
    """The distance in the features of the classifier."""
    return of(model, f"fd_features_{kind}", after)


def imagenet(model, kind, after=""):
    """The distance in the features of the ImageNet network."""
    return of(model, f"fd_imagenet_{kind}", after)


def accuracy(name, row="mu"):
    return RUNS[name]["metrics"]["rows"][row]["accuracy"]


def probe(model, row="mu"):
    return accuracy(f"probe_{model}_seed_0", row)


def against(model, key):
    return RUNS[f"probe_{model}_seed_0"]["metrics"]["against"][key]


def per_class(name):
    return RUNS["probe_vae_128_seed_0"]["metrics"]["per_class"][name]


def ratios(ruler):
    """How many times farther away than the VAE-GAN's the VAE's images are, of each kind."""
    kinds = ("reconstruction", "generation", "generation_expost")
    return [ruler("vae_128", kind) / ruler("vae_gan_128", kind) for kind in kinds]


def mse(model, after=""):
    return of(model, "mse", after)


def dearer(modified, plain, after=""):
    """How much larger the modified model's squared error is, in per cent."""
    return 100 * (mse(modified, after) / mse(plain, after) - 1)


def weight(model):
    """Of --patches, of a model that has it."""
    return float(re.search(r"--patches (\S+)", tables.MODELS[model].flags)[1])


def gap_closed():
    plain = probe("vae_128")
    return 100 * (probe("vae_patches") - plain) / (accuracy("supervised_128", "supervised") - plain)


@pytest.mark.parametrize(("script", "model"), [("vae.py", "vae_patches"), ("vae_gan.py", "vae_gan_patches")])
def test_a_script_shows_the_weight_that_the_tables_have(script, model):
    assert f"--epochs 50 --patches {weight(model):g} " in (ROOT / script).read_text()


def test_the_readme_names_the_price_of_the_modification():
    vae, vae_gan = dearer("vae_patches", "vae_128"), dearer("vae_gan_patches", "vae_gan_128")
    price = f"for {vae:.0f} % more squared error in a VAE and {vae_gan:.0f} % in a VAE-GAN"
    assert price in " ".join((ROOT / "README.md").read_text().split())


def pairs(model):
    """The distances of reconstructions and samples from N(0, I), by both rulers, as a table at the report's start."""
    return [(ruler(model, kind), 1) for kind in ("reconstruction", "generation") for ruler in (fd, imagenet)]


DISTANCES = r"reconstructions ([\d.]+) and ([\d.]+), samples (?:from N\(0, I\) )?([\d.]+) and ([\d.]+)"
# (a sentence with a group for each number, the numbers as results.json gives them and their digits)
SENTENCES = [
    (r"VAE, 128 dimensions: " + DISTANCES, lambda: pairs("vae_128")),
    (r"([\d.]+) % from the 64-dimensional code, ([\d.]+) % from that of 128 dimensions",
     lambda: [(probe("vae_64"), 1), (probe("vae_128"), 1)]),
    (r"features of small patches: ([\d.]+) % with 64 dimensions, ([\d.]+) % with 128\. With 128: " + DISTANCES +
     r", for (\d+) % more squared error \|",
     lambda: [(probe("vae_patches_64"), 1), (probe("vae_patches"), 1), *pairs("vae_patches"),
              (dearer("vae_patches", "vae_128"), 0)]),
    (r"VAE-GAN, 128 dimensions: " + DISTANCES + ": nearer to the test images", lambda: pairs("vae_gan_128")),
    (r"([\d.]+) % with 64 dimensions, ([\d.]+) % with 128, which is ([\d.]+) points more than the VAE \|",
     lambda: [(probe("vae_gan_64"), 1), (probe("vae_gan_128"), 1), (against("vae_gan_128", "difference"), 1)]),
    (r"The same modification: ([\d.]+) % with 128 dimensions; " + DISTANCES,
     lambda: [(probe("vae_gan_patches"), 1), *pairs("vae_gan_patches")]),
    (r"as many training images are ([\d.]+) and ([\d.]+) away\.",
     lambda: [(fd("vae_128", "floor"), 1), (imagenet("vae_128", "floor"), 1)]),
    (r"both networks notice: (\d+) and ([\d.]+), where as many training images are at ([\d.]+) and ([\d.]+)\.",
     lambda: [(fd("vae_128", "reconstruction"), 0), (imagenet("vae_128", "reconstruction"), 1),
              (fd("vae_128", "floor"), 1), (imagenet("vae_128", "floor"), 1)]),
    (r"three tenths of the test images' energy \(sharpness ([\d.]+)\)",
     lambda: [(of("vae_128", "sharpness_reconstruction"), 2)]),
    (r"farther away than reconstructions\*\*, (\d+) and ([\d.]+):",
     lambda: [(fd("vae_128", "generation"), 0), (imagenet("vae_128", "generation"), 1)]),
    (r"a twelfth by the second \((\d+) and ([\d.]+)\)",
     lambda: [(fd("vae_128", "generation_expost"), 0), (imagenet("vae_128", "generation_expost"), 1)]),
    (r"trained with labels \(10 epochs with flips; more is possible\) has (\d+) %",
     lambda: [(accuracy("supervised_128", "supervised"), 0)]),
    (r"on its frozen mean reads as much \(([\d.]+) %\)", lambda: [(accuracy("probe_supervised_128"), 1)]),
    (r"below the mean read ten points better \(([\d.]+) %\)", lambda: [(probe("vae_128", "layer below mu"), 1)]),
    (r"the classifier is right for ([\d.]+) %\*\*; with 128 for ([\d.]+) %",
     lambda: [(probe("vae_64"), 1), (probe("vae_128"), 1)]),
    (r"after 5 epochs it reads ([\d.]+) %, after 20 epochs ([\d.]+) %; with 64 dimensions ([\d.]+) and ([\d.]+) %",
     lambda: [(accuracy("probe_vae_128_seed_0-epoch5"), 1), (probe("vae_128"), 1),
              (accuracy("probe_vae_64_seed_0-epoch5"), 1), (probe("vae_64"), 1)]),
    (r"reconstructions ([\d.]+) and ([\d.]+), samples from N\(0, I\) ([\d.]+) and ([\d.]+) \(",
     lambda: [(ruler("vae_patches", kind), 1) for kind in ("reconstruction", "generation")
              for ruler in (fd, imagenet)]),
    (r"its samples are nearer \(([\d.]+) against ([\d.]+), ex-post ([\d.]+) against ([\d.]+)\)",
     lambda: [(fd(model, kind), 1) for kind in ("generation_kid", "generation_expost_kid")
              for model in ("vae_64", "vae_128")]),
    (r"With labels 64 are as good as 128 \(([\d.]+) %\)", lambda: [(accuracy("supervised_64", "supervised"), 1)]),
    (r"reads as well as its mean \(([\d.]+) %\)", lambda: [(probe("vae_128", "z ~ q(z|x)"), 1)]),
    (r"are read best \((\d+) and (\d+) %\), birds and cats worst \((\d+) and (\d+) %\)",
     lambda: [(per_class("ship"), 0), (per_class("frog"), 0), (per_class("bird"), 0), (per_class("cat"), 0)]),
    (r"Their first (\d+) principal components are the target", lambda: [(patches.DIMS, 0)]),
    (r"-\\text{ELBO} - (\d+) \\log", lambda: [(weight("vae_patches"), 0)]),
    (r"mu reads ([\d.]+) % of the test images where the plain VAE's reads ([\d.]+) %: ([\d.]+) points more "
     r"\(95 % interval ([\d.]+) to ([\d.]+); one seed each\)\. That closes (\d+) % of the gap to the encoder trained "
     r"with labels \(([\d.]+) %\)\. The 1024 features below the mean read ([\d.]+) % instead of ([\d.]+) %",
     lambda: [(probe("vae_patches"), 1), (probe("vae_128"), 1), (against("vae_patches", "difference"), 1),
              *((end, 1) for end in against("vae_patches", "interval")), (gap_closed(), 0),
              (accuracy("supervised_128", "supervised"), 1),
              (probe("vae_patches", "layer below mu"), 1), (probe("vae_128", "layer below mu"), 1)]),
    (r"squared error is (\d+) % larger than the plain VAE's \(([\d.]+) against ([\d.]+)\); after 5 epochs it "
     r"was (\d+) %, after 10 epochs (\d+) % larger",
     lambda: [(dearer("vae_patches", "vae_128"), 0), (mse("vae_patches"), 4), (mse("vae_128"), 4),
              *((dearer("vae_patches", "vae_128", after), 0) for after in ("-epoch5", "-epoch10"))]),
    (r"farther away by both rulers \((\d+) against (\d+), ([\d.]+) against ([\d.]+)\)",
     lambda: [(fd("vae_patches", "reconstruction"), 0), (fd("vae_128", "reconstruction"), 0),
              (imagenet("vae_patches", "reconstruction"), 1), (imagenet("vae_128", "reconstruction"), 1)]),
    (r"N\(0, I\) are nearer \((\d+) against (\d+); kernel distance ([\d.]+) against ([\d.]+)\), and of ex-post "
     r"samples the kernel distance says so, too \(([\d.]+) against ([\d.]+)\), while the Frechet distance hardly "
     r"changes \((\d+) against (\d+)\)\. By ImageNet's features both are farther \(([\d.]+) against ([\d.]+), "
     r"and ([\d.]+) against ([\d.]+)\)",
     lambda: [(fd(model, kind), digits)
              for kind, digits in (("generation", 0), ("generation_kid", 1), ("generation_expost_kid", 1),
                                   ("generation_expost", 0))
              for model in ("vae_patches", "vae_128")]
     + [(imagenet(model, kind), 1) for kind in ("generation", "generation_expost")
        for model in ("vae_patches", "vae_128")]),
    (r"\*\*With 64 dimensions\*\* the same weight changes both less: mu reads ([\d.]+) % instead of ([\d.]+) % "
     r"\(([\d.]+) points more; 95 % interval ([\d.]+) to ([\d.]+)\), for (\d+) % more squared error \(([\d.]+) against "
     r"([\d.]+)\), and its 1024 features ([\d.]+) % instead of ([\d.]+) %\. All its samples are nearer, by both rulers "
     r"\(from N\(0, I\) (\d+) against (\d+) and ([\d.]+) against ([\d.]+), ex-post (\d+) against (\d+) and ([\d.]+) "
     r"against ([\d.]+)\)",
     lambda: [(probe("vae_patches_64"), 1), (probe("vae_64"), 1), (against("vae_patches_64", "difference"), 1),
              *((end, 1) for end in against("vae_patches_64", "interval")),
              (dearer("vae_patches_64", "vae_64"), 0), (mse("vae_patches_64"), 4), (mse("vae_64"), 4),
              (probe("vae_patches_64", "layer below mu"), 1), (probe("vae_64", "layer below mu"), 1)]
     + [(ruler(model, kind), digits) for kind in ("generation", "generation_expost")
        for ruler, digits in ((fd, 0), (imagenet, 1)) for model in ("vae_patches_64", "vae_64")]),
    (r"two points more than random features \(([\d.]+) %\)",
     lambda: [(accuracy("probe_vae_128_seed_0", "untrained encoder"), 1)]),
    (r"too \((\d+) against (\d+) by the classifier's features, ([\d.]+) against ([\d.]+) by ImageNet's\)",
     lambda: [(fd("vae_gan_128", "generation_expost"), 0), (fd("vae_gan_128", "generation"), 0),
              (imagenet("vae_gan_128", "generation_expost"), 1), (imagenet("vae_gan_128", "generation"), 1)]),
    (r"Reconstructions have ([\d.]+) times the energy in the finest details \(sharpness ([\d.]+) against ([\d.]+)\) "
     r"and a squared error of ([\d.]+) against ([\d.]+)\.",
     lambda: [(of("vae_gan_128", "sharpness_reconstruction") / of("vae_128", "sharpness_reconstruction"), 1),
              (of("vae_gan_128", "sharpness_reconstruction"), 2), (of("vae_128", "sharpness_reconstruction"), 2),
              (of("vae_gan_128", "mse"), 4), (of("vae_128", "mse"), 4)]),
    (r"Its KL is (\d+) nats against (\d+)\.", lambda: [(of("vae_gan_128", "kl"), 0), (of("vae_128", "kl"), 0)]),
    (r"took ([\d,]+) steps of 64 images, the VAE ([\d,]+) of 128, and ([\d.]+) times as much processor time",
     lambda: [(of("vae_gan_128", "step"), 0), (of("vae_128", "step"), 0),
              (of("vae_gan_128", "cpu_seconds") / of("vae_128", "cpu_seconds"), 1)]),
    (r"linear classifier reads ([\d.]+) %, ([\d.]+) points more than from the VAE's \(95 % interval ([\d.]+) "
     r"to ([\d.]+);",
     lambda: [(probe("vae_gan_128"), 1), (against("vae_gan_128", "difference"), 1),
              *((end, 1) for end in against("vae_gan_128", "interval"))]),
    (r"below the mean read ([\d.]+) % where the VAE's read ([\d.]+) %",
     lambda: [(probe("vae_gan_128", "layer below mu"), 1), (probe("vae_128", "layer below mu"), 1)]),
    (r"Reconstructions are at (\d+) where the VAE's are at (\d+) by the classifier's features, and at ([\d.]+) against "
     r"([\d.]+) by ImageNet's, which have never seen CIFAR-10; samples from N\(0, I\) at (\d+) against (\d+) "
     r"and ([\d.]+) against ([\d.]+); ex-post samples at (\d+) against (\d+) and ([\d.]+) against ([\d.]+)\.",
     lambda: [(ruler(model, kind), digits) for kind in ("reconstruction", "generation", "generation_expost")
              for ruler, digits in ((fd, 0), (imagenet, 1)) for model in ("vae_gan_128", "vae_128")]),
    (r"From 64 dimensions it reads ([\d.]+) %, ([\d.]+) points more than from the VAE's 64 \(95 % interval ([\d.]+) to "
     r"([\d.]+)\)",
     lambda: [(probe("vae_gan_64"), 1), (against("vae_gan_64", "difference"), 1),
              *((end, 1) for end in against("vae_gan_64", "interval"))]),
    (r"its reconstructions are farther away \((\d+) against (\d+), ([\d.]+) against ([\d.]+)\) and its ex-post samples "
     r"nearer \((\d+) against (\d+), ([\d.]+) against ([\d.]+)\); about samples from N\(0, I\) the rulers disagree "
     r"\((\d+) against (\d+), ([\d.]+) against ([\d.]+)\)",
     lambda: [(ruler(model, kind), digits) for kind in ("reconstruction", "generation_expost", "generation")
              for ruler, digits in ((fd, 0), (imagenet, 1)) for model in ("vae_gan_64", "vae_gan_128")]),
    (r"read about as much as 64 principal components do \(([\d.]+) %\), and more than 64 random features "
     r"\(([\d.]+) %\)",
     lambda: [(probe("vae_64", "principal components"), 1), (probe("vae_64", "untrained encoder"), 1)]),
    (r"with weight (\d+), gives the encoder", lambda: [(weight("vae_gan_patches"), 0)]),
    (r"mu reads ([\d.]+) % where the plain VAE-GAN's reads ([\d.]+) %: ([\d.]+) points more \(95 % interval ([\d.]+) "
     r"to ([\d.]+); one seed each\)\. The modified VAE's reads more \(([\d.]+) %\)",
     lambda: [(probe("vae_gan_patches"), 1), (probe("vae_gan_128"), 1), (against("vae_gan_patches", "difference"), 1),
              *((end, 1) for end in against("vae_gan_patches", "interval")), (probe("vae_patches"), 1)]),
    (r"its reconstructions are far nearer \((\d+) against (\d+) and ([\d.]+) against ([\d.]+)\), and its accuracy is "
     r"([\d.]+) points lower",
     lambda: [(ruler(model, "reconstruction"), digits) for ruler, digits in ((fd, 0), (imagenet, 1))
              for model in ("vae_gan_patches", "vae_patches")]
     + [(probe("vae_patches") - probe("vae_gan_patches"), 1)]),
    (r"the VAE's KL grows from (\d+) to (\d+) nats, and its accuracy by ([\d.]+) points; the VAE-GAN with 64 "
     r"dimensions has (\d+) nats, fewer than that, and reads ([\d.]+) %",
     lambda: [(of("vae_64", "kl"), 0), (of("vae_128", "kl"), 0), (probe("vae_128") - probe("vae_64"), 1),
              (of("vae_gan_64", "kl"), 0), (probe("vae_gan_64"), 1)]),
    (r"price in squared error\*\* is (\d+) % \(([\d.]+) against ([\d.]+)\)",
     lambda: [(dearer("vae_gan_patches", "vae_gan_128"), 0), (mse("vae_gan_patches"), 4), (mse("vae_gan_128"), 4)]),
    (r"are nearer by both rulers\*\* \((\d+) against (\d+), ([\d.]+) against ([\d.]+)\); about ex-post samples they "
     r"disagree \((\d+) against (\d+), ([\d.]+) against ([\d.]+)\), and reconstructions are about as near as the plain "
     r"VAE-GAN's \((\d+) against (\d+), ([\d.]+) against ([\d.]+)\)",
     lambda: [(ruler(model, kind), digits) for kind in ("generation", "generation_expost", "reconstruction")
              for ruler, digits in ((fd, 0), (imagenet, 1)) for model in ("vae_gan_patches", "vae_gan_128")]),
    (r"factors of ([\d.]+) to ([\d.]+), ImageNet's network by ([\d.]+) to ([\d.]+)\.",
     lambda: [(end(ratios(ruler)), 1) for ruler in (fd, imagenet) for end in (min, max)]),
    (r"were at ([\d.]+) \(the VAE's ([\d.]+)\) after five epochs, and at ([\d.]+) \(([\d.]+)\) after ten",
     lambda: [(imagenet(model, "generation", after), 1) for after in ("-epoch5", "-epoch10")
              for model in ("vae_gan_128", "vae_128")]),
    # what training buys
    (r"samples from N\(0, I\) from ([\d.]+) to ([\d.]+) by ImageNet's features, and from (\d+) to (\d+) by",
     lambda: [(ruler("vae_gan_64", "generation", after), digits) for ruler, digits in ((imagenet, 1), (fd, 0))
              for after in ("-epoch10", "")]),
    (r"after 5 epochs \(128 dimensions, from N\(0, I\): (\d+) against (\d+)\)\. By ImageNet's they begin at ([\d.]+) "
     r"against ([\d.]+) and end at ([\d.]+) against ([\d.]+),",
     lambda: [(ruler(model, "generation", after), digits)
              for ruler, after, digits in ((fd, "-epoch5", 0), (imagenet, "-epoch5", 1), (imagenet, "", 1))
              for model in ("vae_gan_128", "vae_128")]),
    (r"about as near as the plain one after 5 epochs \(reconstructions ([\d.]+) against ([\d.]+), samples from "
     r"N\(0, I\) ([\d.]+) against ([\d.]+), ex-post ([\d.]+) against ([\d.]+)\)",
     lambda: [(imagenet(model, kind, "-epoch5"), 1) for kind in ("reconstruction", "generation", "generation_expost")
              for model in ("vae_patches", "vae_128")]),
    (r"farther away than the plain one's after 5 epochs \(([\d.]+) against ([\d.]+)\) and as near after 20 \(([\d.]+) "
     r"against ([\d.]+)\)",
     lambda: [(imagenet(model, "reconstruction", after), 1) for after in ("-epoch5", "")
              for model in ("vae_gan_patches", "vae_gan_128")]),
]  # fmt: skip


def test_the_first_seed_beside_the_second_is_that_of_the_results():
    after = "-epoch5"
    cells = ["0", f"{of('vae_128', 'elbo_nats', after):.1f}", f"{mse('vae_128', after):.5f}"]
    for ruler in (fd, imagenet):
        for kind in ("reconstruction", "generation", "generation_expost"):
            cells.append(f"{ruler('vae_128', kind, after):.1f}")
    cells.append(f"{accuracy('probe_vae_128_seed_0-epoch5'):.2f}")
    assert f"| {' | '.join(cells)} |" in (ROOT / "REPORT.md").read_text()


def test_the_modified_vae_gans_samples_are_the_nearer_ones_at_every_stage():
    for after in ("-epoch5", "-epoch10", ""):
        modified, plain = (imagenet(model, "generation", after) for model in ("vae_gan_patches", "vae_gan_128"))
        assert modified < plain


def test_with_64_dimensions_the_vae_gan_is_nearer_than_the_vae_and_the_vae_farther_than_with_128():
    for kind in ("reconstruction", "generation", "generation_expost"):
        for ruler in (fd, imagenet):
            assert ruler("vae_gan_64", kind) < ruler("vae_64", kind) > ruler("vae_128", kind)


def test_every_measured_distance_falls_from_one_stage_to_the_next():
    models, columns = tables.stages(RUNS)
    keys = [key for key, _ in columns.values() if key.startswith("fd_")]
    for key in keys:
        for stages in models.values():
            measured = [stage[key] for stage in stages if key in stage]
            assert measured == sorted(measured, reverse=True)
    assert len(keys) == 6


@pytest.mark.parametrize(("sentence", "numbers"), SENTENCES, ids=[sentence[:40] for sentence, _ in SENTENCES])
def test_a_sentence_says_what_the_results_say(sentence, numbers):
    found = re.findall(sentence, TEXT)
    assert len(found) == 1, f"the report has {len(found)} sentences like this one"
    said = re.search(sentence, TEXT).groups()
    for text, (value, digits) in zip(said, numbers(), strict=True):
        number = float(text.replace(",", "").rstrip("."))
        assert abs(number - value) < 0.5001 * 10**-digits, f"{text} where results.json has {value:.{digits + 2}f}"


def comments():
    """What questions 2 and 3 say beside their tables: list items and paragraphs, without code, tables and links."""
    text = (ROOT / "REPORT.md").read_text()
    text = text[text.index("## Question 2") : text.index("## Question 4")]
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.S)
    parts = re.findall(r"^(?:\*\*Comment\.\*\*|### Compare|### Report and compare).*?(?=^#|\Z)", text, re.M | re.S)
    text = re.sub(r"^\|.*$|!?\[[^\]]*\]\([^)]*\)|`[^`]*`", "", "\n".join(parts), flags=re.M)
    return re.sub(r"\s+", " ", text)


def test_every_number_of_the_comments_is_checked():
    rest = comments()
    for sentence, _ in SENTENCES:
        rest = re.sub(sentence, " ", rest)
    rest = re.sub(r"95 % interval|[Qq]uestions? \d|N\(0, I\)|Task I+|commit \w+|torch \S+|Lite0|fp32|seed 0", " ", rest)
    unknown = set(re.findall(r"\d[\d,.]*\d|\d", rest)) - PLAIN - ELSEWHERE
    assert not unknown, f"nothing checks these numbers of the comments: {sorted(unknown)}"
