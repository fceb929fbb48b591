"""What REPORT.md, prior_proofs/README.md and the scripts' docstrings say in numbers is what results.json says.

python -m pytest tests/test_report_question_4.py
"""

import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNS = json.loads((ROOT / "results" / "results.json").read_text())["runs"]
FIRST, SECOND = (RUNS[name]["metrics"] for name in ("prior_non_gaussian", "prior_gaussian"))
NUMBER = r"(-?\d+\.?\d*(?:e-?\d+)?)"


def free(case, floor):
    rows = (FIRST if case in FIRST["free"] else SECOND)["free"][case]
    return next(row for row in rows if row["floor"] == floor)


def constructions(epsilon):
    """The gaps of Theorem D's maps, all pairs of data and prior."""
    every = [*FIRST["construction"].values(), *SECOND["construction"].values()]
    return [gap for one in every for at, gap, _ in one["rows"] if at == epsilon]


def steps():
    return FIRST["checks"] | SECOND["checks"] | RUNS["prior_counterexample"]["metrics"]["checks"]


def identity():
    rows = [row for metrics in (FIRST, SECOND) for some in metrics["free"].values() for row in some]
    return max(row["identity"] for row in (*rows, *FIRST["affine"].values(), *SECOND["affine"].values()))


SIGN = FIRST["sign decoder"]
AFFINE = FIRST["affine"] | SECOND["affine"]
CONSTANT = {epsilon: gap for epsilon, gap, _ in FIRST["construction"]["mixture | normal"]["constant variance"]}
SAID = {  # page, a sentence with {} for each number: the numbers by results.json
    ("REPORT.md", "its best encoder leaves {} nats"): [SIGN["gap"]],
    ("REPORT.md", "the smallest ELBO gap found is {}, and those maps miss {} nats"): [
        SIGN["smallest"],
        SIGN["likelihood_gap_of_smallest"],
    ],
    ("REPORT.md", "At floor 0.3 it is {}, of which {} are the likelihood's"): [
        free("mixture | normal", 0.3)["gap"],
        free("mixture | normal", 0.3)["likelihood_gap"],
    ],
    ("REPORT.md", "these maps have gaps from {} to {} in the seven pairs"): [
        min(constructions(0.01)),
        max(constructions(0.01)),
    ],
    ("REPORT.md", "and the error of the prior's mass were at most {}."): [identity()],
    ("REPORT.md", "Sympy checks {} steps"): [len(steps())],
    ("REPORT.md", "non_gaussian_case.py # {} s; {} s of processor time"): [
        FIRST["seconds"],
        FIRST["cpu_seconds"],
    ],
    ("REPORT.md", "/gaussian_case.py # {} s; {} s of processor time"): [
        SECOND["seconds"],
        SECOND["cpu_seconds"],
    ],
    ("REPORT.md", "counterexample_2d.py # {} s"): [RUNS["prior_counterexample"]["seconds"]],
    ("prior_proofs/README.md", "the best encoder leaves a gap of {} nats"): [SIGN["gap"]],
    ("prior_proofs/README.md", "over all maps is {}, of which {} are the likelihood's"): [
        SIGN["smallest"],
        SIGN["likelihood_gap_of_smallest"],
    ],
    ("prior_proofs/README.md", "Sympy checks {} steps"): [len(steps())],
    ("prior_proofs/README.md", "$\\epsilon = 0.1$ the mixture's gap is {}, the best found {}."): [
        CONSTANT[0.1],
        free("mixture | normal", 0.1)["gap"],
    ],
    ("prior_proofs/non_gaussian_case.py", "one core's {} s): the smallest gap over affine maps is {}"): [
        FIRST["cpu_seconds"],
        AFFINE["mixture | normal"]["gap"],
    ],
    ("prior_proofs/non_gaussian_case.py", "{} for uniform data, {} for Laplace, {} for Student-t"): [
        AFFINE[f"{data} | normal"]["gap"] for data in ("uniform", "laplace", "student_t")
    ],
    ("prior_proofs/non_gaussian_case.py", "the mixture has {} / {} / {}, of which {} / {} / {} are the likelihood's"): [
        free("mixture | normal", floor)[key] for key in ("gap", "likelihood_gap") for floor in (0.5, 0.1, 0.02)
    ],
    ("prior_proofs/gaussian_case.py", "one core's {} s): the smallest gap over affine maps is {}"): [
        SECOND["cpu_seconds"],
        AFFINE["normal | mixture"]["gap"],
    ],
    ("prior_proofs/gaussian_case.py", "as prior, {} for Laplace, {} for Student-t"): [
        AFFINE[f"normal | {prior}"]["gap"] for prior in ("laplace", "student_t")
    ],
    ("prior_proofs/gaussian_case.py", "the mixture has {} / {} / {}, of which {} / {} / {} are the likelihood's"): [
        free("normal | mixture", floor)[key] for key in ("gap", "likelihood_gap") for floor in (0.5, 0.1, 0.02)
    ],
}


def said(page, sentence):
    """The numbers of a sentence as they are written."""
    text = " ".join((ROOT / page).read_text().split())
    found = re.search(re.escape(sentence).replace(re.escape("{}"), NUMBER), text)
    assert found, f"{page} does not say: {sentence}"
    return found.groups()


@pytest.mark.parametrize("page, sentence", SAID)
def test_sentence_has_the_numbers_of_the_results(page, sentence):
    for written, measured in zip(said(page, sentence), SAID[page, sentence], strict=True):
        mantissa, _, power = written.partition("e")
        last_digit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
        assert abs(float(written) - measured) <= 0.5001 * last_digit, f"{sentence}: {written}, measured {measured}"


def test_every_step_passed_and_each_counts_once():
    assert all(steps().values())
    shared = FIRST["checks"].keys() & SECOND["checks"].keys()
    assert len(steps()) == sum(
        len(run["checks"]) for run in (FIRST, SECOND, RUNS["prior_counterexample"]["metrics"])
    ) - (len(shared))


def test_gaps_settled_and_what_the_pages_say_of_the_table():
    for metrics in (FIRST, SECOND):
        for case, rows in metrics["free"].items():
            for row in rows:
                alone = row["decoder_alone"]
                assert alone["least"] - alone["error"] <= alone["gap"]
                assert alone["gap"] <= row["likelihood_gap"] + row["likelihood_error"]
                assert row["likelihood_gap"] <= row["gap"] + row["error"] + row["likelihood_error"]
                if case == "normal | normal":
                    assert abs(row["gap"]) < 1e-10
                else:  # the ELBO's best maps miss likelihood that the decoder could have
                    if row["likelihood_gap"] > 1e-9:
                        assert row["likelihood_gap"] - row["likelihood_error"] > alone["gap"]
                    assert row["moved"] < 0.01 or row["knots"] == 641 or row["moved"] * row["gap"] < row["error"]
                    assert row["moved"] < 0.05


def test_the_search_is_least_settled_where_the_page_says():
    moved = {}
    for metrics in (FIRST, SECOND):
        for case, rows in metrics["free"].items():
            moved[case] = max(row["moved"] for row in rows)
    del moved["normal | normal"]  # whose gaps are rounding
    assert max(moved, key=moved.get) == "normal | mixture"
    assert said("REPORT.md", "still moved them most, by up to {} %") == (f"{100 * moved['normal | mixture']:.2f}",)


def test_gaps_of_the_construction_fall_as_the_page_says():
    exponents = {}
    for case, one in (FIRST["construction"] | SECOND["construction"]).items():
        (e0, first, _), (e1, second, _), (e2, third, _) = one["rows"]
        exponents[case] = [math.log(first / second) / math.log(e0 / e1), math.log(second / third) / math.log(e1 / e2)]
        assert all(error < 0.025 * gap for _, gap, error in one["rows"])
    assert len(exponents) == 7
    of_mixture = [round(exponent, 2) for exponent in exponents.pop("mixture | normal")]
    rest = [round(exponent, 2) for some in exponents.values() for exponent in some]
    sentence = "quadrature to about 2 %, fall like $\\epsilon^{{}}$ to $\\epsilon^{{}}$ in six pairs"
    assert [float(number) for number in said("prior_proofs/README.md", sentence)] == [min(rest), max(rest)]
    sentence = "down to $\\epsilon = 0.01$ (exponents {}, then {}),"
    assert [float(number) for number in said("prior_proofs/README.md", sentence)] == of_mixture
