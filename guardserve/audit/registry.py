"""Audit rules: what one is, and the register of all of them.

A rule is a generator function under :func:`rule`. Its docstring is the rule's page: a title, what it is, then the
paragraphs ``Why:`` (one sentence, shown with each finding), ``Found:``, ``Remedy:`` (shown too) and ``Example::``.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

from guardserve.audit.report import Finding, Severity, join
from guardserve.audit.subject import Subject
from guardserve.exceptions import SettingsError

MOST_FINDINGS = 3
"""More hits of one rule than this become one finding."""


@dataclass(frozen=True)
class Hit:
    """A place where a rule found its hazard.

    Attributes:
        module: Qualified name of the module; ``''`` is the model itself.
        seen: The value seen there.
        severity: Its severity, where that is not the rule's.
        why: Why it matters, where that is not what the rule's page says.
        remedy: What to do, likewise.
    """

    module: str
    seen: str
    severity: Severity | None = None
    why: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class Gap:
    """A part of the model in which a rule could not look for its hazard."""

    reason: str


Check: TypeAlias = Callable[[Subject], Iterator[Hit | Gap]]


@dataclass(frozen=True)
class Page:
    """What the documentation says about a rule, in Markdown."""

    title: str
    what: str
    why: str
    found: str
    remedy: str
    example: str

    @classmethod
    def parse(cls, docstring: str | None) -> Page:
        """Read a page from the docstring of a rule.

        Raises:
            ValueError: It lacks a part.
        """
        text = inspect.cleandoc(docstring or "")
        pattern = r"([^\n]+)\.\n\n(.+)\n\nWhy: (.+)\n\nFound: (.+)\n\nRemedy: (.+)\n\nExample::\n\n(.+)"
        match = re.fullmatch(pattern, text, flags=re.DOTALL)
        if match is None:
            raise ValueError(f"a rule's page has a title, a text, Why, Found, Remedy and Example, not: {text!r:.80}")
        *prose, example = match.groups()
        title, what, why, found, remedy = (re.sub(r"(?<!\n)\n(?!\n)", " ", part).replace("``", "`") for part in prose)
        return cls(title, what, why, found, remedy, textwrap.dedent(example))


@dataclass(frozen=True)
class Rule:
    """One rule of the audit.

    Attributes:
        code: Code by which it is selected; part of the public interface.
        name: Name in kebab case.
        severity: Severity of its findings, unless a finding says otherwise.
        page: Its documentation.
        check: Looks for the hazard; raises :class:`Unchecked` when it cannot look at all.
    """

    code: str
    name: str
    severity: Severity
    page: Page
    check: Check

    @property
    def markdown(self) -> str:
        """The rule's page."""
        page = self.page
        return (
            f"## {self.code} {self.name}\n\n**{page.title}.** [{self.severity}]\n\n{page.what}\n\n**Why.** "
            f"{_sentence(page.why)}\n\n**How it is found.** {_sentence(page.found)}\n\n**Remedy.** "
            f"{_sentence(page.remedy)}\n\n```python\n{page.example}\n```\n"
        )

    def findings(self, hits: Iterable[Hit]) -> Iterator[Finding]:
        """Turn hits into findings, many alike into one that names the module which holds them all."""
        alike: dict[tuple[Severity, str, str], list[Hit]] = {}
        for hit in hits:
            kind = (hit.severity or self.severity, hit.why or self.page.why, hit.remedy or self.page.remedy)
            alike.setdefault(kind, []).append(hit)
        for (severity, why, remedy), group in alike.items():
            if len(group) <= MOST_FINDINGS:
                for hit in group:
                    yield Finding(self.code, severity, hit.module, f"{hit.seen}: {why}", remedy)
                continue
            modules = tuple(hit.module for hit in group)
            places = join((f"{hit.module} ({hit.seen})" for hit in group), MOST_FINDINGS)
            message = f"{len(group)} modules, which are {places}: {why}"
            yield Finding(self.code, severity, common_ancestor(modules), message, remedy, modules)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def common_ancestor(names: Iterable[str]) -> str:
    """Return the innermost module that holds all those named; ``''`` is the model itself."""
    parts = [name.split(".") for name in names]
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in shared)


RULES: dict[str, Rule] = {}
"""Every rule by its code; complete once ``guardserve.audit`` is imported."""


def rule(code: str, name: str, severity: Severity) -> Callable[[Check], Check]:
    """Register a function as the check of a rule, and its docstring as the rule's page."""

    def register(check: Check) -> Check:
        if code in RULES:
            raise ValueError(f"there are two rules {code}: {RULES[code].name} and {name}")
        RULES[code] = Rule(code, name, severity, Page.parse(check.__doc__), check)
        return check

    return register


def find_rules(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Rule]:
    """Choose rules by their codes, or by what codes start with: ``BN1`` is all probes.

    Args:
        select: The ones wanted; empty is all.
        ignore: The ones not wanted.

    Raises:
        SettingsError: No code starts like one of these.
    """
    wanted = _codes(select) or set(RULES)
    chosen = [RULES[code] for code in sorted(wanted - _codes(ignore))]
    if not chosen:
        raise SettingsError("no rule is left to check: select more, or ignore less")
    return chosen


def _codes(prefixes: Iterable[str]) -> set[str]:
    codes: set[str] = set()
    for prefix in prefixes:
        matching = {code for code in RULES if prefix and code.startswith(prefix.upper())}
        if not matching:
            raise SettingsError(f"there is no rule {prefix!r}: the rules are {', '.join(sorted(RULES))}")
        codes |= matching
    return codes
