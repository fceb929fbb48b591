"""The pages for readers: what they link to is there, and the scripts know the flags that they tell to give.

python -m pytest tests/test_pages.py
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "REPORT.md", "prior_proofs/README.md")
# of commits that the page names; None: the whole script
EARLIER = {"benchmarks/vae.py": None, "benchmarks/wgan_gp.py": None, "vae_gan.py": {"--center"}}


def commands(text):
    """[(script, its flags)] of the commands `python SCRIPT ...` in a page."""
    text = re.sub(r"(?<!`)`[^`\n]+\n[^`\n]+`(?!`)", lambda m: m[0].replace("\n", " "), text)  # broken across lines
    found = re.findall(r"python (\w+(?:/\w+)?\.py)([^`#|&;\n]*)", text)
    return [(script, re.findall(r"(?<=\s)--[a-z][a-z-]*", words)) for script, words in found]


def links(text):
    """The relative targets of a page's links and pictures, without #anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in targets if not re.match(r"https?:|#", target)]


def anchors(text):
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text, here = (ROOT / page).read_text(), (ROOT / page).parent
    assert links(text)
    assert [target for target in links(text) if not (here / target).exists()] == []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#([^)\s]+)\)", text):
        assert anchor in anchors((here / target).read_text() if target else text), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_flags_that_the_scripts_know(page, capsys, monkeypatch):
    said = commands((ROOT / page).read_text())
    assert said
    known = {}
    for script, flags in said:
        if EARLIER.get(script, ()) is None:
            continue
        if script not in known:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            monkeypatch.setattr("sys.argv", [script, "--help"])
            with pytest.raises(SystemExit):
                module.main()
            known[script] = capsys.readouterr().out
        for flag in set(flags) - EARLIER.get(script, set()):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known[script]), f"{page}: python {script} {flag}"


def test_what_the_tests_look_for():
    assert commands("run `python vae.py --epochs 6 --no-x`, then\n    python a/b.py x --c  # --d") == [
        ("vae.py", ["--epochs", "--no-x"]),
        ("a/b.py", ["--c"]),
    ]
    assert commands("as `python c.py\n--e 1` does") == [("c.py", ["--e"])]
    assert links("[a](b.md#c) ![d](e/f.png) [g](https://h) [i](#j)") == ["b.md", "e/f.png"]
    assert anchors("# A: b?\n## fid.py\n") == {"a-b", "fidpy"}
