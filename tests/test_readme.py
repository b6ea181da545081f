"""The README and the documents: snippets run, tables are those of the results, links lead somewhere."""

import re
from pathlib import Path

import pytest

from resnet_kernels.analysis.report import readme_tables
from resnet_kernels.analysis.results import load
from resnet_kernels.analysis.rows import comparisons

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted([README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
VARIABLE = re.compile(r"RESNET_KERNELS_(?:BUILD|BACKEND|CACHE|DEBUG|TUNING)\b")


def snippets(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


@pytest.mark.filterwarnings("ignore")
def test_the_readmes_snippets_run(capsys):
    """In order, in one namespace that holds nothing at first."""
    blocks = snippets(README)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["logits"].shape == (8, 1000)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["index.md", "training-recipe.md"])
def test_a_pages_snippets_run(name):
    namespace = {}
    exec("import torch, torchvision\nimport resnet_kernels as rk", namespace)
    for block in snippets(ROOT / "docs" / name):
        exec(compile(block, name, "exec"), namespace)


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 170 and len(text.split()) <= 1500
    plot = re.search(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert plot and (ROOT / plot[1]).is_file() and text[: plot.start()].count("\n") < 40
    assert text.index("```python") < text.index("## What runs where")


def test_every_environment_variable_is_documented():
    files = [ROOT / "setup.py", ROOT / "Makefile", *ROOT.glob("resnet_kernels/**/*.py"), *ROOT.glob("csrc/**/*")]
    used = {name for file in files if file.is_file() for name in VARIABLE.findall(file.read_text())}
    assert used == set(VARIABLE.findall(README.read_text()))


@pytest.mark.parametrize("name, least", [("performance.md", 7), ("accuracy.md", 1)])
def test_the_tables_are_what_the_results_say(name, least):
    """`make readme` makes them."""
    path = ROOT / "docs" / name
    text = path.read_text()
    assert text.count("<!-- results ") >= least
    assert readme_tables(text, path.parent) == text


def test_the_plots_numbers_are_what_the_results_say():
    """`make readme` draws the plot and writes its numbers."""
    headline = pytest.importorskip("benchmarks.headline", reason="the plot needs matplotlib")
    found = comparisons(ROOT / "benchmarks" / "results")
    assert (ROOT / "docs/figures/headline.csv").read_text() == headline.table(found)


def test_no_two_columns_of_a_table_have_the_same_title():
    for path in DOCUMENTS:
        for header in re.findall(r"^(\|[^\n]*\|)\n\| ?:?-", path.read_text(), re.M):
            titles = [title.strip() for title in header.strip("|").split("|") if title.strip()]
            assert len(titles) == len(set(titles)), f"{path.name}: {header}"


def test_every_committed_results_file_is_one():
    paths = sorted((ROOT / "benchmarks" / "results").glob("*"))
    assert paths and all(load(path).rows for path in paths)


def anchors(path):
    """The anchors of a page's headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h)).strip().lower() for h in headings)
    return {h.replace(" ", "-") for h in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target}: no such file"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{target}: no such heading"


def test_every_page_is_in_the_sites_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name not in navigation] == []
