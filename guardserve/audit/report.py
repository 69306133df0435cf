"""What an audit found, what it checked, and what it could not check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""All severities, the worst first."""


@dataclass(frozen=True)
class Finding:
    """One hazard in one place.

    Attributes:
        code: Code of the rule, such as ``BN005``.
        severity: ``"error"``, ``"warning"`` or ``"info"``.
        module: Qualified name of the module; ``''`` is the model itself.
        message: The value seen, and why it matters.
        remedy: What to do about it.
        modules: All modules that it is about, where those are many and ``module`` is the one that holds them.
    """

    code: str
    severity: Severity
    module: str
    message: str
    remedy: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A rule that was not checked, wholly or in some places.

    Attributes:
        code: Code of the rule.
        reason: Why, and where if only in some places.
    """

    code: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The outcome of an audit.

    Attributes:
        subject: What was audited, in a few words.
        findings: All findings, in the order of their rules.
        ran: Codes of the rules that were checked.
        skipped: What was not checked, and why; a rule that was checked in some places only is also in ``ran``.
        refusal: Why the model could not be run on the example; None when it was, or when there was none.
    """

    subject: str
    findings: tuple[Finding, ...]
    ran: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    refusal: str | None = None

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def reaches(self, level: Severity) -> bool:
        """Tell whether there is a finding of this severity or a worse one."""
        serious = SEVERITIES[: SEVERITIES.index(level) + 1]
        return any(finding.severity in serious for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        counts = [
            (self.count(severity), word)
            for severity, word in zip(SEVERITIES, ("error", "warning", "note"), strict=True)
        ]
        found = join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts if count)
        unchecked = len({skip.code for skip in self.skipped} - set(self.ran))
        limits = f" ({unchecked} rule{'s' * (unchecked > 1)} could not be checked)" if unchecked else ""
        if self.reaches("error"):
            return f"{found}: do not serve it like this{limits}"
        if self.refusal is not None:
            return f"{found + ', and ' * bool(found)}not known to be safe: the example was not run{limits}"
        if self.reaches("warning"):
            return f"{found}: look at the warnings before serving it{limits}"
        return f"no hazard found{f', {found}' if found else ''}{limits}"


def join(words: Iterable[str], limit: int | None = None) -> str:
    """Write a list as a person would: ``a, b and c``; with a limit, ``a, b and 7 more``."""
    items = list(words)
    if limit is not None and len(items) > limit:
        items[limit:] = [f"{len(items) - limit} more"]
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
