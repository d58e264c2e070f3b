import contextlib
import io
import re

import pytest

from tests.docs.pages import ROOT, differs, pages_with_code, steps


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch, restored_registry):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    printed = io.StringIO()
    for step in steps(page):
        if step.code is None:
            assert not differs(printed.getvalue(), step.output, step.tolerance), (
                f"{page}:{step.line} promises\n{step.output}\nbut prints\n{printed.getvalue()}"
            )
            printed = io.StringIO()
        else:
            # Padded, so that a traceback has the page's own line numbers.
            source = "\n" * (step.line - 1) + step.code
            with contextlib.redirect_stdout(printed):
                exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    ("printed", "promised", "tolerance", "different"),
    [
        ("a 1.0 b\n", "a  1.0 b", 0, False),
        ("a 1.0", "a 1.1", 0, True),
        ("a 1.0", "a 1.1", 0.2, False),
        ("a 1,000", "a 1000", 0, False),
        ("a 1.0", "b 1.0", 1, True),
        ("1 2", "1", 1, True),
    ],
)
def test_what_counts_as_the_same_output(printed, promised, tolerance, different):
    assert differs(printed, promised, tolerance) == different


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
