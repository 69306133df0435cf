"""Reports as text, JSON, SARIF and workflow commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from guardserve import __version__
from guardserve.audit import Finding, Report, Skipped
from guardserve.audit.formats import FORMATS, github, sarif, text
from guardserve.audit.registry import RULES
from guardserve.audit.sources import Source
from guardserve.audit.subject import Subject

REPORT = Report(
    "ResNet with 20 BatchNorm layers",
    (
        Finding("BN007", "info", "layer1.bn", "3 of 64 channels: so what", "nothing has to be done"),
        Finding("BN001", "error", "", "training is True: `eval()` was forgotten", "call `model.eval()`"),
        Finding("BN005", "error", "layer1.bn", "NaN: 100 % bad,\nin two lines", "load: another, file", ("layer1.bn",)),
        Finding("BN004", "warning", "layer2", "4 modules", "train it", ("layer2.0", "layer2.1")),
    ),
    ("BN001", "BN004", "BN005", "BN007"),
    (
        *(Skipped(f"BN10{n}", "an example input is needed") for n in (1, 2, 3, 5)),
        Skipped("BN010", "an example input is needed"),
        Skipped("BN005", "1 was not checked: it is lazy"),
    ),
)
CLEAN = Report("ResNet with 20 BatchNorm layers", (), ("BN001",), ())

FILE = Source("shop.models:resnet", Subject("x", ()), Path("shop/models.py"), 7)
ABSOLUTE = Source("/weights/resnet.pt", Subject("x", ()), Path("/weights/resnet.pt"))
NOWHERE = Source("demo", Subject("x", ()), None)

# what a consumer of SARIF 2.1.0 relies on, in the words of section 3 of its specification
SARIF_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "$schema": {"type": "string", "format": "uri"},
        "version": {"const": "2.1.0"},
        "runs": {"type": "array", "items": {"$ref": "#/$defs/run"}},
    },
    "additionalProperties": False,
    "$defs": {
        "message": {
            "type": "object",
            "anyOf": [{"required": ["text"]}, {"required": ["id"]}],
            "properties": {"text": {"type": "string", "minLength": 1}, "markdown": {"type": "string"}},
            "additionalProperties": False,
        },
        "level": {"enum": ["none", "note", "warning", "error"]},
        "rule": {
            "type": "object",
            "required": ["id"],
            "properties": {
                "id": {"type": "string"},
                "name": {"type": "string", "pattern": "^[A-Z][A-Za-z0-9]*$"},
                "shortDescription": {"$ref": "#/$defs/message"},
                "fullDescription": {"$ref": "#/$defs/message"},
                "help": {"$ref": "#/$defs/message"},
                "defaultConfiguration": {
                    "type": "object",
                    "properties": {"level": {"$ref": "#/$defs/level"}},
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
        "location": {
            "type": "object",
            "properties": {
                "physicalLocation": {
                    "type": "object",
                    "required": ["artifactLocation"],
                    "properties": {
                        "artifactLocation": {
                            "type": "object",
                            "properties": {"uri": {"type": "string", "format": "uri-reference"}},
                            "additionalProperties": False,
                        },
                        "region": {
                            "type": "object",
                            "properties": {"startLine": {"type": "integer", "minimum": 1}},
                            "additionalProperties": False,
                        },
                    },
                    "additionalProperties": False,
                },
                "logicalLocations": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "fullyQualifiedName": {"type": "string"},
                            "kind": {"type": "string"},
                        },
                        "additionalProperties": False,
                    },
                },
            },
            "additionalProperties": False,
        },
        "result": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "ruleId": {"type": "string"},
                "ruleIndex": {"type": "integer", "minimum": 0},
                "level": {"$ref": "#/$defs/level"},
                "message": {"$ref": "#/$defs/message"},
                "locations": {"type": "array", "items": {"$ref": "#/$defs/location"}},
            },
            "additionalProperties": False,
        },
        "notification": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "message": {"$ref": "#/$defs/message"},
                "level": {"$ref": "#/$defs/level"},
                "associatedRule": {
                    "type": "object",
                    "properties": {"id": {"type": "string"}, "index": {"type": "integer", "minimum": 0}},
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
        "run": {
            "type": "object",
            "required": ["tool"],
            "properties": {
                "tool": {
                    "type": "object",
                    "required": ["driver"],
                    "properties": {
                        "driver": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {
                                "name": {"type": "string"},
                                "version": {"type": "string"},
                                "rules": {"type": "array", "items": {"$ref": "#/$defs/rule"}, "uniqueItems": True},
                            },
                            "additionalProperties": False,
                        }
                    },
                    "additionalProperties": False,
                },
                "invocations": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["executionSuccessful"],
                        "properties": {
                            "executionSuccessful": {"type": "boolean"},
                            "toolExecutionNotifications": {"type": "array", "items": {"$ref": "#/$defs/notification"}},
                        },
                        "additionalProperties": False,
                    },
                },
                "results": {"type": "array", "items": {"$ref": "#/$defs/result"}},
            },
            "additionalProperties": False,
        },
    },
}

TEXT = """\
shop.models:resnet: ResNet with 20 BatchNorm layers

the model itself
  error    BN001  training is True: eval() was forgotten
                  -> call model.eval()

layer1.bn
  error    BN005  NaN: 100 % bad, in two lines
                  -> load: another, file
  info     BN007  3 of 64 channels: so what
                  -> nothing has to be done

layer2
  warning  BN004  4 modules
                  -> train it

Not checked
  BN010, BN101-BN103, BN105  an example input is needed
  BN005  1 was not checked: it is lazy

2 errors, 1 warning and 1 note: do not serve it like this (5 rules could not be checked)
"""


def test_text_groups_by_module_the_worst_first() -> None:
    """Stable, plain, with the remedy under each finding and the verdict in the last line."""
    assert text(REPORT, FILE, color=False) == TEXT
    assert text(CLEAN, NOWHERE, color=False) == "demo: ResNet with 20 BatchNorm layers\n\nno hazard found\n"


def test_text_has_colours_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its escapes it is the same text."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = text(REPORT, FILE)
    assert "\x1b[1;31merror" in coloured
    import click  # noqa: PLC0415 - what the command line strips them with

    assert click.unstyle(coloured) == TEXT


def test_long_words_and_marks_are_written_as_they_are() -> None:
    """Brackets are no markup, and a long name is not torn."""
    name = "blocks[0]." * 20
    written = text(
        Report("Net", (Finding("BN001", "error", name, f"[bold]{name}", "x"),), (), ()), NOWHERE, color=False
    )
    assert f"\n{name}\n" in written
    assert f"[bold]{name}" in written


def test_json_is_stable_and_documented() -> None:
    """Every field is there, and in the documentation."""
    document = json.loads(FORMATS["json"](REPORT, FILE))
    assert document["findings"][3] == {
        "code": "BN004",
        "name": "running-stats-never-updated",
        "severity": "warning",
        "module": "layer2",
        "modules": ["layer2.0", "layer2.1"],
        "message": "4 modules",
        "remedy": "train it",
    }
    assert document["findings"][1]["modules"] == [""]
    assert document["counts"] == {"error": 2, "warning": 1, "info": 1}
    assert (document["version"], document["guardserve"], document["source"]) == (1, __version__, "shop.models:resnet")
    assert document["skipped"][0] == {"code": "BN101", "reason": "an example input is needed"}
    documented = (Path(__file__).parents[2] / "docs/audit.md").read_text()
    for field in (*document, *document["findings"][0], *document["skipped"][0]):
        assert f"`{field}`" in documented, field


@pytest.mark.parametrize("source", [FILE, ABSOLUTE, NOWHERE])
@pytest.mark.parametrize("report", [REPORT, CLEAN])
def test_sarif_is_valid_and_complete(report: Report, source: Source) -> None:
    """Results point at their rules, modules are logical locations, what was not checked is a notification."""
    document = json.loads(sarif(report, source))
    jsonschema.validate(document, SARIF_SCHEMA, cls=jsonschema.Draft202012Validator)
    (run,) = document["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len(run["results"]) == len(report.findings)
    for result, finding in zip(run["results"], report.findings, strict=True):
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == finding.code
        assert result["level"] == {"error": "error", "warning": "warning", "info": "note"}[finding.severity]
        assert finding.remedy.replace("`", "") in result["message"]["text"]
        (location,) = result["locations"]
        assert location["logicalLocations"][0]["fullyQualifiedName"] == finding.module or "the model itself"
        if source is FILE:
            assert location["physicalLocation"] == {
                "artifactLocation": {"uri": "shop/models.py"},
                "region": {"startLine": 7},
            }
        elif source is ABSOLUTE:
            assert location["physicalLocation"] == {"artifactLocation": {"uri": "file:///weights/resnet.pt"}}
    for rule in rules:
        assert rule["help"]["markdown"] == RULES[rule["id"]].markdown
    notes = run["invocations"][0]["toolExecutionNotifications"]
    assert [note["associatedRule"]["id"] for note in notes] == [skip.code for skip in report.skipped]


def test_workflow_commands_are_escaped() -> None:
    """Properties and messages each as their syntax asks, a line each, and the verdict as plain output."""
    lines = github(REPORT, FILE).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("::notice file=shop/models.py,line=7,title=BN007 near-dead-channels::layer1.bn: 3 of")
    assert lines[2] == (
        "::error file=shop/models.py,line=7,title=BN005 non-finite-statistics::"
        "layer1.bn: NaN: 100 %25 bad,%0Ain two lines%0Aload: another, file"
    )
    assert lines[4].startswith("shop.models:resnet: 2 errors")
    odd = Source("m", Subject("x", ()), Path("a,b:c%.py"), 1)
    assert "file=a%2Cb%3Ac%25.py," in github(REPORT, odd)
    assert github(REPORT, NOWHERE).startswith("::notice title=BN007 near-dead-channels::")


def test_an_example_that_was_not_run_is_no_success() -> None:
    """SARIF says that the tool failed and why, JSON has the reason, and no verdict calls the model sound."""
    why = "it does not run on the example: RuntimeError: shapes"
    refused = Report("ResNet", (), ("BN001",), (Skipped("BN101", why), Skipped("BN004", "lazy")), why)
    invocation = json.loads(sarif(refused, FILE))["runs"][0]["invocations"][0]
    assert invocation["executionSuccessful"] is False
    assert [note["level"] for note in invocation["toolExecutionNotifications"]] == ["error", "note"]
    assert json.loads(FORMATS["json"](refused, FILE))["refusal"] == why
    assert refused.verdict == "not known to be safe: the example was not run (2 rules could not be checked)"
    assert refused.verdict in text(refused, FILE, color=False)
    warned = Report("ResNet", REPORT.findings[3:], ("BN001",), (Skipped("BN101", why),), why)
    assert warned.verdict.startswith("1 warning, and not known to be safe")
    assert json.loads(sarif(CLEAN, FILE))["runs"][0]["invocations"][0]["executionSuccessful"] is True
