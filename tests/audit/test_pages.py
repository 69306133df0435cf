"""The documentation of the rules, and that it is up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from guardserve.audit.pages import explain, reference, updated
from guardserve.audit.registry import RULES, Page
from guardserve.exceptions import SettingsError

DOCUMENT = Path(__file__).parents[2] / "docs/audit.md"


def test_the_document_is_up_to_date() -> None:
    """Run ``python -m guardserve.audit.pages docs/audit.md`` when it is not."""
    assert updated(DOCUMENT.read_text()) == DOCUMENT.read_text()


def test_the_document_shows_every_rule() -> None:
    """In a table with a link to its page, and with the page."""
    for code, rule in RULES.items():
        assert f"| [{code}](#{code.lower()}-{rule.name}) | {rule.severity} | {rule.page.title} |" in reference()
        assert f"## {code} {rule.name}\n" in reference()


@pytest.mark.parametrize("code", sorted(RULES))
def test_pages_are_whole(code: str) -> None:
    """Every part is there, a finding's sentence is one sentence, and the example is code."""
    page = RULES[code].page
    assert all(part.strip() for part in vars(page).values())
    assert page.why.endswith(".")
    assert not re.search(r"\.\s+[A-Z]", page.why), "one sentence, shown with each finding"
    assert page.why[0].islower() or page.why.startswith("`")
    compile(page.example, code, "exec")


def test_the_python_blocks_of_the_document_run(tmp_path: Path) -> None:
    """What is shown works, and prints what it says."""
    own = DOCUMENT.read_text().partition("<!-- rules -->")[0]
    for block in re.findall(r"```python\n(.*?)```", own, flags=re.DOTALL):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shown = re.findall(r"^#\s(.*)$", block, flags=re.MULTILINE)
        assert done.stdout.splitlines() == shown


def test_the_page_of_one_rule() -> None:
    """In any case of letters; an unknown one is told."""
    assert explain("bn102") == RULES["BN102"].markdown
    with pytest.raises(SettingsError, match="there is no rule 'BN555'"):
        explain("BN555")


def test_a_document_without_a_place_for_the_rules_is_refused() -> None:
    """The place is marked by two lines."""
    with pytest.raises(ValueError, match="lacks the lines"):
        updated("# Audit\n")


def test_a_docstring_becomes_markdown() -> None:
    """Lines are joined, code keeps its lines, and double backquotes become single."""
    page = Page.parse(
        """A title.

        One ``x``
        line.

        Another.

        Why: because.

        Found: by
        looking.

        Remedy: mend.

        Example::

            for x in y:
                z()
        """
    )
    assert page == Page(
        "A title", "One `x` line.\n\nAnother.", "because.", "by looking.", "mend.", "for x in y:\n    z()"
    )
