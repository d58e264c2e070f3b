import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.html_page import read
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports import HtmlReport, LayerChange, ResultsTable, plot_reliability

pytest.importorskip("matplotlib")


def test_all_parts_are_on_the_page(tmp_path):
    figure = tmp_path / "figure.svg"
    figure.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    table = ResultsTable()
    table.add(method="woodfisher", accuracy_mean=0.5, accuracy_std=0.25)
    report = HtmlReport(
        "A run",
        ["It went well."],
        tables={"Metrics": table},
        layers=[LayerChange("fc.weight", "weights", 1000, 250), LayerChange("none", "heads", 0, 0)],
        figures={"A curve": figure},
        settings={"amount": 0.75},
        command="torchprune-bayes prune",
    )
    page = read(report.write(tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.headings == [
        "A run", "Metrics", "What was pruned where", "A curve", "Settings", "Versions", "Command",
    ]  # fmt: skip
    assert "It went well." in page.text
    assert "torchprune-bayes prune" in page.text
    assert ["woodfisher", "0.50 ± 0.25"] in page.rows
    assert ["fc.weight", "weights", "1,000", "250", "75.0%", ""] in page.rows
    assert ["none", "heads", "0", "0", "0.0%", ""] in page.rows
    assert ["amount", "0.75"] in page.rows
    assert any(row[0] == "torch" for row in page.rows)
    [address] = page.loaded
    assert base64.b64decode(address.partition(",")[2]) == figure.read_bytes()


def test_parts_that_are_empty_are_left_out():
    assert read(HtmlReport("A run").render()).headings == ["A run", "Versions"]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_whatever_it_holds_is_escaped(text):
    table = ResultsTable()
    table.add(column=text)
    layers = [LayerChange(text, text, 2, 1)]
    report = HtmlReport(
        text, [text], tables={text: table}, layers=layers, settings={text: text}, command=text
    )
    page = read(report.render())
    assert page.headings[0] == text
    assert [text, text] in page.rows


def test_other_figures_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"ends in \.svg or \.png, got '.*figure\.pdf'"):
        HtmlReport("A run", figures={"A curve": tmp_path / "figure.pdf"}).write(tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_reliability_diagram_needs_a_model(tmp_path):
    with pytest.raises(ArgumentError, match="at least one model"):
        plot_reliability({}, tmp_path / "reliability.svg")
