"""The rules' documentation, made from the rules themselves.

``python -m guardserve.audit.pages docs/audit.md`` brings that file up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from guardserve.audit.registry import RULES, find_rules

BEGIN, END = "<!-- rules -->", "<!-- end of rules -->"
"""Between these two lines stands what :func:`reference` gives."""


def explain(code: str) -> str:
    """Return the page of a rule in Markdown.

    Raises:
        SettingsError: There is no such rule.
    """
    return "\n".join(rule.markdown for rule in find_rules([code]))


def reference() -> str:
    """Return a table of all rules and the page of each, in Markdown."""
    rules = [RULES[code] for code in sorted(RULES)]
    rows = [
        f"| [{rule.code}](#{rule.code.lower()}-{rule.name}) | {rule.severity} | {rule.page.title} |" for rule in rules
    ]
    table = "\n".join(["| Rule | Severity | What it finds |", "|---|---|---|", *rows])
    return table + "\n\n" + "\n".join(rule.markdown for rule in rules)


def updated(document: str) -> str:
    """Return a document with the rules in it brought up to date.

    Raises:
        ValueError: The document does not mark where the rules stand.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
