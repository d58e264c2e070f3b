"""The pages are whole: every method, option and public name has its place."""

import re

import pytest

from tests.docs.pages import ROOT
from torchprune_bayes.methods import registered_methods

pytest.importorskip("latex2mathml")
pytest.importorskip("griffe")

from site_tools import docstrings, layers, method_tables, pages

DOCS = ROOT / "docs"
FOR_TESTS = ("output",)  # see tests/docs/pages.py
SECTIONS = ["## Idea", "## Equation", "## Options", "## Cost", "## When not to use it"]


def page_of(name):
    found = [
        p for p in (DOCS / "methods").glob("*.md") if f"<!-- options: {name} -->" in p.read_text()
    ]
    assert len(found) == 1, f"{name} needs one page in docs/methods with its options"
    return found[0]


@pytest.mark.parametrize("name", registered_methods())
def test_every_method_has_a_page_with_all_parts(name):
    text = page_of(name).read_text()
    assert f"<!-- method: {name} -->" in text
    places = [text.index(section) for section in SECTIONS]
    assert places == sorted(places)


@pytest.mark.parametrize("name", registered_methods())
def test_every_option_is_explained(name):
    for option, _, meaning in method_tables.described_options(name):
        assert meaning, f"the docstring of {name} does not explain {option!r}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f"{page.relative_to(DOCS).as_posix()}\n" in navigation


def test_every_directive_is_known():
    for page in DOCS.rglob("*.md"):
        for word, argument in re.findall(pages._DIRECTIVE, page.read_text()):
            assert word in {*pages._MAKERS, *FOR_TESTS}
            if argument and word not in FOR_TESTS:
                assert pages._MAKERS[word](argument)


def test_public_names_are_on_the_reference_pages():
    import torchprune_bayes
    from torchprune_bayes import structured

    for module in (torchprune_bayes, structured):
        names = pages.public_names(module.__name__)
        assert {name.rpartition(".")[2] for name in names} == set(module.__all__)
    assert "torchprune_bayes.errors.ArgumentError" in pages.public_names("torchprune_bayes.errors")


def test_the_layers_are_those_of_the_contract():
    drawing = layers.drawn()
    assert [layer for layer in layers.contract() if "methods" in layer] == [["methods"]]
    assert all(f"<code>{name}</code>" in drawing for layer in layers.contract() for name in layer)


def test_equations_become_mathml():
    page = pages.on_page_markdown("$$\na_i = \\frac{1}{2}\n$$\n")
    assert page.startswith('<div class="equation"><math')
    assert "<mfrac>" in page


def test_docstrings_become_markdown():
    text = "See :func:`~torch.nn.relu`, ``x`` and `a\npaper <https://a.b/c>`_::"
    assert docstrings.as_markdown(text) == "See `relu`, `x` and [a paper](https://a.b/c):"


def test_the_citation_has_the_version_of_the_package():
    text = (ROOT / "CITATION.cff").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    [version] = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert f"version: {version}\n" in text


def test_every_page_of_the_navigation_exists():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages_named = re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)
    assert len(pages_named) > 40
    assert [page for page in pages_named if not (DOCS / page).is_file()] == []
