"""The comments of REPORT.md's questions 2 and 3 say what results.json says, number by number.

SENTENCES names every number of a comment that has a row in results.json. A number that is neither there nor among the
PLAIN ones fails, so a new run cannot leave a stale sentence behind, nor a new sentence go unchecked.

python -m pytest tests/test_prose.py
"""

import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNS = json.loads((ROOT / "results/results.json").read_text())["runs"]
TEXT = re.sub(r"\s+", " ", (ROOT / "REPORT.md").read_text())
MODELS = ("vae_128", "vae_64", "vae_contrastive", "vae_gan_128", "vae_gan_64", "vae_gan_contrastive")
# widths, image sizes, counts and settings, which no training changes
PLAIN = {"2", "3", "4", "8", "10", "20", "64", "128", "300", "1024", "10,000", "50,000", "1,500"}
# of runs that are not in results.json, each beside its command; then: read off a picture; batch norm at the start
ELSEWHERE = {"36.9", "13", "16", "425", "438", "377", "152", "187", "226", "233", "228", "218"}
ELSEWHERE |= {"0.7", "0.1", "0.2", "0", "1"}
ELSEWHERE |= {"89.0", "2,000", "81.6", "5,000", "6.1"}  # benchmarks/imagenet_features.py --check


def of(model, key):
    return RUNS[f"{model}_seed_0"]["metrics"][key]


def fd(model, kind):
    """The distance in the classifier's features."""
    return of(model, f"fd_features_{kind}")


def accuracy(name, row="mu"):
    return RUNS[name]["metrics"]["rows"][row]["accuracy"]


def probe(model, row="mu"):
    return accuracy(f"probe_{model}_seed_0", row)


def against(model, key):
    return RUNS[f"probe_{model}_seed_0"]["metrics"]["against"][key]


def more(model, other, key):
    """By how many per cent one model's number is above another's."""
    return 100 * (of(model, key) / of(other, key) - 1)


def per_class(name):
    return RUNS["probe_vae_128_seed_0"]["metrics"]["per_class"][name]


def gap_closed():
    plain, modified, reference = probe("vae_128"), probe("vae_contrastive"), accuracy("supervised_128", "supervised")
    return 100 * (modified - plain) / (reference - plain)


def decay(model):
    step = of(model, "step")
    return min(0.999, step / (step + 9))


# (a sentence with a group for each number, the numbers as results.json gives them)
SENTENCES = [
    (r"these four epochs it had come to ([\d.]+)", [(decay("vae_128"), 3)]),
    (r"its decay had come to ([\d.]+) after four epochs", [(decay("vae_gan_128"), 3)]),
    (r"features notice: (\d+), where as many training images are at ([\d.]+)",
     [(fd("vae_128", "reconstruction"), 0), (fd("vae_128", "floor"), 1)]),
    (r"fine detail is left \(sharpness ([\d.]+)\)", [(of("vae_128", "sharpness_reconstruction"), 2)]),
    (r"farther away than reconstructions\*\*, (\d+) against (\d+):",
     [(fd("vae_128", "generation"), 0), (fd("vae_128", "reconstruction"), 0)]),
    (r"third of what is added \((\d+)\)", [(fd("vae_128", "generation_expost"), 0)]),
    (r"cost (\d+) nats of ELBO and (\d+) % more squared error, and (\d+) in the distance of reconstructions \((\d+)\)",
     [(of("vae_128", "elbo_nats") - of("vae_64", "elbo_nats"), 0), (more("vae_64", "vae_128", "mse"), 0),
      (fd("vae_64", "reconstruction") - fd("vae_128", "reconstruction"), 0),
      (fd("vae_64", "reconstruction"), 0)]),
    (r"Samples suffer less \((\d+) and ex-post (\d+)\)",
     [(fd("vae_64", "generation"), 0), (fd("vae_64", "generation_expost"), 0)]),
    (r"reference of 10 epochs with flips and no limit of what is possible, has (\d+) %",
     [(accuracy("supervised_128", "supervised"), 0)]),
    (r"on its frozen mean reads as much \(([\d.]+) %\)", [(accuracy("probe_supervised_128"), 1)]),
    (r"below the mean read ten points better \((\d+) %\)", [(probe("vae_128", "layer below mu"), 0)]),
    (r"read ([\d.]+) points less \(([\d.]+) %\), as 64 principal components do \(([\d.]+) %\)",
     [(probe("vae_128") - probe("vae_64"), 1), (probe("vae_64"), 1), (probe("vae_64", "principal components"), 1)]),
    (r"With labels 64 are as good as 128 \(([\d.]+) %\)", [(accuracy("supervised_64", "supervised"), 1)]),
    (r"are read best \((\d+) %\), birds and cats worst \((\d+) and (\d+) %\)",
     [(per_class("frog"), 0), (per_class("bird"), 0), (per_class("cat"), 0)]),
    (r"\*\*Classification:\*\* ([\d.]+) points more than the VAE \(95 % interval ([\d.]+) to ([\d.]+);",
     [(against("vae_contrastive", "difference"), 1), (against("vae_contrastive", "interval")[0], 1),
      (against("vae_contrastive", "interval")[1], 1)]),
    (r"features below the mean read ([\d.]+) %, seven", [(probe("vae_contrastive", "layer below mu"), 1)]),
    (r"pays: ([\d.]+) % more squared error after as many epochs, (\d+) nats of ELBO, and the features agree \((\d+) "
     r"against (\d+)\)",
     [(more("vae_contrastive", "vae_128", "mse"), 1),
      (of("vae_128", "elbo_nats") - of("vae_contrastive", "elbo_nats"), 0),
      (fd("vae_contrastive", "reconstruction"), 0), (fd("vae_128", "reconstruction"), 0)]),
    (r"come a little nearer \((\d+) against (\d+)\), ex-post ones go away by (\d+) % \((\d+) against (\d+)\)",
     [(fd("vae_contrastive", "generation"), 0), (fd("vae_128", "generation"), 0),
      (100 * (fd("vae_contrastive", "generation_expost") / fd("vae_128", "generation_expost") - 1), 0),
      (fd("vae_contrastive", "generation_expost"), 0), (fd("vae_128", "generation_expost"), 0)]),
    (r"they are (\d+) farther away than those in both",
     [(fd("vae_128", "generation_expost") - fd("vae_128", "reconstruction"), 0)]),
    (r"they are (\d+) farther away than those in both",
     [(fd("vae_contrastive", "generation_expost") - fd("vae_contrastive", "reconstruction"), 0)]),
    (r"(\d+) % of (\d+) %, where guessing has 10 %: the term closes (\d+) %",
     [(probe("vae_contrastive"), 0), (accuracy("supervised_128", "supervised"), 0), (gap_closed(), 0)]),
    (r"Ex-post sampling helps here too \((\d+) against (\d+)\)",
     [(fd("vae_gan_128", "generation_expost"), 0), (fd("vae_gan_128", "generation"), 0)]),
    (r"are farther away \((\d+)\) with half as much squared error again \(([\d.]+)\), samples about as near \((\d+), "
     r"ex-post (\d+)\), with a KL of (\d+) nats",
     [(fd("vae_gan_64", "reconstruction"), 0), (of("vae_gan_64", "mse"), 4), (fd("vae_gan_64", "generation"), 0),
      (fd("vae_gan_64", "generation_expost"), 0), (of("vae_gan_64", "kl"), 0)]),
    (r"Reconstructions are at (\d+) where the VAE's are at (\d+), with ([\d.]+) times the fine detail \(sharpness "
     r"([\d.]+) against ([\d.]+)\) and a squared error of ([\d.]+) against ([\d.]+); samples are at (\d+) against "
     r"(\d+) from N\(0, I\), at (\d+) against (\d+) ex-post",
     [(fd("vae_gan_128", "reconstruction"), 0), (fd("vae_128", "reconstruction"), 0),
      (of("vae_gan_128", "sharpness_reconstruction") / of("vae_128", "sharpness_reconstruction"), 1),
      (of("vae_gan_128", "sharpness_reconstruction"), 2), (of("vae_128", "sharpness_reconstruction"), 2),
      (of("vae_gan_128", "mse"), 4), (of("vae_128", "mse"), 4),
      (fd("vae_gan_128", "generation"), 0), (fd("vae_128", "generation"), 0),
      (fd("vae_gan_128", "generation_expost"), 0), (fd("vae_128", "generation_expost"), 0)]),
    (r"The KL is (\d+) nats against (\d+)\.", [(of("vae_gan_128", "kl"), 0), (of("vae_128", "kl"), 0)]),
    (r"at most log 50,000 = ([\d.]+) nats", [(math.log(50_000), 1)]),
    (r"took ([\d,]+) steps of 64 images, the VAE ([\d,]+) of 128",
     [(of("vae_gan_128", "step"), 0), (of("vae_128", "step"), 0)]),
    (r"linear classifier reads ([\d.]+) %, ([\d.]+) points less than from the VAE's \(95 % interval ([\d.]+) to "
     r"([\d.]+);",
     [(probe("vae_gan_128"), 1), (-against("vae_gan_128", "difference"), 1),
      (-against("vae_gan_128", "interval")[1], 1), (-against("vae_gan_128", "interval")[0], 1)]),
    (r"dimensions it is ([\d.]+) against ([\d.]+) %", [(probe("vae_gan_64"), 1), (probe("vae_64"), 1)]),
    (r"about as well as the VAE's \(([\d.]+) against ([\d.]+) %\)",
     [(probe("vae_gan_128", "layer below mu"), 1), (probe("vae_128", "layer below mu"), 1)]),
    (r"\*\*Classification:\*\* ([\d.]+) %, ([\d.]+) points more than the plain VAE-GAN \(95 % interval ([\d.]+) to "
     r"([\d.]+); one seed each\), and ([\d.]+) more than the plain VAE",
     [(probe("vae_gan_contrastive"), 1), (against("vae_gan_contrastive", "difference"), 1),
      (against("vae_gan_contrastive", "interval")[0], 1), (against("vae_gan_contrastive", "interval")[1], 1),
      (probe("vae_gan_contrastive") - probe("vae_128"), 1)]),
    (r"without by features \((\d+) against (\d+)\), with (\d+) % more squared error",
     [(fd("vae_gan_contrastive", "reconstruction"), 0), (fd("vae_gan_128", "reconstruction"), 0),
      (more("vae_gan_contrastive", "vae_gan_128", "mse"), 0)]),
    (r"samples go away \((\d+) against (\d+)\), ex-post they come nearer \((\d+) against (\d+)\)",
     [(fd("vae_gan_contrastive", "generation"), 0), (fd("vae_gan_128", "generation"), 0),
      (fd("vae_gan_contrastive", "generation_expost"), 0), (fd("vae_gan_128", "generation_expost"), 0)]),
    (r"to classify with \(([\d.]+) %\), at the price of ([\d.]+) % more squared error",
     [(probe("vae_contrastive"), 1), (more("vae_contrastive", "vae_128", "mse"), 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "numbers"), SENTENCES, ids=[sentence[:40] for sentence, _ in SENTENCES])
def test_a_sentence_says_what_the_results_say(sentence, numbers):
    found = re.findall(sentence, TEXT)
    assert len(found) == 1, f"the report has {len(found)} sentences like this one"
    said = re.search(sentence, TEXT).groups()
    for text, (value, digits) in zip(said, numbers, strict=True):
        number = float(text.replace(",", "").rstrip("."))
        assert abs(number - value) < 0.5001 * 10**-digits, f"{text} where results.json has {value:.{digits + 2}f}"


def comments():
    """What questions 2 and 3 say beside their tables: list items and paragraphs, without code, tables and links."""
    text = (ROOT / "REPORT.md").read_text()
    text = text[text.index("## Question 2") : text.index("## Limits")]
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


def test_the_models_of_the_sentences_are_there():
    assert all(f"{model}_seed_0" in RUNS for model in MODELS)
