"""Reports for people, programs and continuous integration."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from guardserve import __version__
from guardserve.audit.registry import RULES, Rule
from guardserve.audit.report import SEVERITIES, Finding, Report, Severity, Skipped
from guardserve.audit.sources import Source

JSON_VERSION = 1
"""Version of the JSON report; it grows when a field changes its meaning or goes."""

_STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_WIDTH = 100
_SARIF_LEVELS: Mapping[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
_GITHUB_COMMANDS: Mapping[Severity, str] = {"error": "error", "warning": "warning", "info": "notice"}
_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def text(report: Report, source: Source, *, color: bool = True) -> str:
    """Write a report for a person: findings by module, the worst first, what was not checked, and the verdict.

    Args:
        report: The report.
        source: What was audited.
        color: Whether to add terminal colours, which click takes off where there is no terminal.
    """
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=color, color_system="standard" if color else None, width=_WIDTH)
    lines = [Text(f"{source.name}: {report.subject}", "bold"), Text()]
    ranked = sorted(report.findings, key=lambda finding: SEVERITIES.index(finding.severity))
    for module in dict.fromkeys(finding.module for finding in ranked):
        lines.append(Text(module or "the model itself", "bold"))
        for finding in ranked:
            if finding.module == module:
                lines += _finding_lines(finding)
        lines.append(Text())
    if report.skipped:
        lines.append(Text("Not checked", "bold"))
        lines += [line for codes, reason in _by_reason(report.skipped) for line in _wrapped(f"  {codes}  ", reason)]
        lines.append(Text())
    unsettled = "yellow" if report.refusal is not None else "green"
    style = next((_STYLES[level] for level in SEVERITIES[:2] if report.reaches(level)), unsettled)
    lines.append(Text(report.verdict, style))
    for line in lines:
        console.print(line, soft_wrap=True)
    return stream.getvalue()


def _finding_lines(finding: Finding) -> list[Text]:
    head = f"  {finding.severity:7}  {finding.code}  "
    lines = _wrapped(head, finding.message) + _wrapped(" " * len(head) + "-> ", _plain(finding.remedy))
    lines[0].stylize(_STYLES[finding.severity], 2, len(head))
    return lines


def _wrapped(head: str, body: str) -> list[Text]:
    indent = " " * len(head)
    wrapped = textwrap.wrap(_plain(body), _WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False)
    return [Text(line) for line in wrapped]


def _plain(markdown: str) -> str:
    return markdown.replace("`", "")


def _by_reason(skipped: tuple[Skipped, ...]) -> list[tuple[str, str]]:
    """Put the rules together that were not checked for the same reason."""
    reasons: dict[str, list[str]] = {}
    for skip in skipped:
        reasons.setdefault(skip.reason, []).append(skip.code)
    return [(_ranges(codes), reason) for reason, codes in reasons.items()]


def _ranges(codes: list[str]) -> str:
    """Write codes shortly: ``BN101-BN106``."""
    numbers = sorted(int(code.removeprefix("BN")) for code in codes)
    runs = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"BN{run[0]:03}" if len(run) == 1 else f"BN{run[0]:03}-BN{run[-1]:03}" for run in runs)


def as_json(report: Report, source: Source) -> str:
    """Write a report as JSON; ``docs/audit.md`` describes its fields."""
    document = {
        "version": JSON_VERSION,
        "guardserve": __version__,
        "source": source.name,
        "subject": report.subject,
        "verdict": report.verdict,
        "counts": {severity: report.count(severity) for severity in SEVERITIES},
        "findings": [
            {
                "code": finding.code,
                "name": RULES[finding.code].name,
                "severity": finding.severity,
                "module": finding.module,
                "modules": list(finding.modules or (finding.module,)),
                "message": finding.message,
                "remedy": finding.remedy,
            }
            for finding in report.findings
        ],
        "ran": list(report.ran),
        "skipped": [{"code": skip.code, "reason": skip.reason} for skip in report.skipped],
        "refusal": report.refusal,
    }
    return json.dumps(document, indent=2) + "\n"


def github(report: Report, source: Source) -> str:
    """Write a report as workflow commands, from which GitHub Actions makes annotations."""
    lines = []
    for finding in report.findings:
        properties = {"title": f"{finding.code} {RULES[finding.code].name}"}
        if source.path is not None and source.line is not None:
            properties = {"file": source.path.as_posix(), "line": str(source.line)} | properties
        written = ",".join(f"{name}={_escaped(value, in_property=True)}" for name, value in properties.items())
        message = f"{finding.module or 'the model itself'}: {finding.message}\n{finding.remedy}"
        lines.append(f"::{_GITHUB_COMMANDS[finding.severity]} {written}::{_escaped(message)}\n")
    return "".join(lines) + _escaped(f"{source.name}: {report.verdict}") + "\n"


def _escaped(value: str, *, in_property: bool = False) -> str:
    escapes = {"%": "%25", "\r": "%0D", "\n": "%0A"} | ({":": "%3A", ",": "%2C"} if in_property else {})
    return "".join(escapes.get(character, character) for character in value)


def sarif(report: Report, source: Source) -> str:
    """Write a report in the Static Analysis Results Interchange Format 2.1.0."""
    rules = [RULES[code] for code in sorted({*report.ran, *(skip.code for skip in report.skipped)})]
    places = {rule.code: index for index, rule in enumerate(rules)}
    run = {
        "tool": {
            "driver": {
                "name": "guardserve",
                "version": __version__,
                "rules": [_sarif_rule(rule) for rule in rules],
            }
        },
        "invocations": [
            {
                "executionSuccessful": report.refusal is None,
                "toolExecutionNotifications": [
                    {
                        "level": "error" if skip.reason == report.refusal else "note",
                        "message": {"text": f"not checked: {skip.reason}"},
                        "associatedRule": {"id": skip.code, "index": places[skip.code]},
                    }
                    for skip in report.skipped
                ],
            }
        ],
        "results": [_sarif_result(finding, places[finding.code], source) for finding in report.findings],
    }
    return json.dumps({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _sarif_rule(rule: Rule) -> dict[str, Any]:
    page = rule.page
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": f"{page.title}."},
        "fullDescription": {"text": _plain(page.what)},
        "help": {"text": _plain(f"{page.what}\n\nWhy: {page.why}\n\nRemedy: {page.remedy}"), "markdown": rule.markdown},
        "defaultConfiguration": {"level": _SARIF_LEVELS[rule.severity]},
    }


def _sarif_result(finding: Finding, index: int, source: Source) -> dict[str, Any]:
    name = finding.module or "the model itself"
    location: dict[str, Any] = {
        "logicalLocations": [{"name": name.rpartition(".")[2], "fullyQualifiedName": name, "kind": "module"}]
    }
    if source.path is not None:
        location["physicalLocation"] = {"artifactLocation": {"uri": _uri(source.path)}}
        if source.line is not None:
            location["physicalLocation"]["region"] = {"startLine": source.line}
    return {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": _SARIF_LEVELS[finding.severity],
        "message": {"text": _plain(f"{name}: {finding.message} {finding.remedy}")},
        "locations": [location],
    }


def _uri(path: Path) -> str:
    return path.as_uri() if path.is_absolute() else path.as_posix()


FORMATS: Mapping[str, Callable[[Report, Source], str]] = {
    "text": text,
    "json": as_json,
    "sarif": sarif,
    "github": github,
}
"""Writers of a report by the name of their format."""
