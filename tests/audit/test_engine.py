"""The audit as a whole: choosing rules, reports, and what can be audited at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from audit.models import codes, convolutional, norms, reasons, residual
from torch import nn

import guardserve.audit
from guardserve import EvalGuard
from guardserve.audit import Finding, Report, Skipped, audit
from guardserve.audit.registry import RULES, Gap, Hit, Page, Rule, common_ancestor, rule
from guardserve.audit.report import join
from guardserve.audit.subject import Subject
from guardserve.exceptions import SettingsError

PAGE = Page("Title", "what", "it matters", "looking", "mend it", "code()")


def report(*severities: Any, skipped: tuple[Skipped, ...] = (), ran: tuple[str, ...] = ("BN001",)) -> Report:
    """Make a report with findings of these severities."""
    findings = tuple(Finding("BN001", severity, "", "", "") for severity in severities)
    return Report("Net", findings, ran, skipped)


def test_the_public_names_of_the_package() -> None:
    """The function does not shadow the package at the root."""
    assert sorted(guardserve.audit.__all__) == ["Finding", "Report", "Severity", "Skipped", "audit"]
    assert guardserve.audit.audit is audit
    assert not callable(guardserve.audit)


def test_every_rule_has_its_own_code_and_name_and_a_test() -> None:
    """Codes are those promised, names are in kebab case, and each code is in the name of a test."""
    assert sorted(RULES) == [f"BN{n:03}" for n in (*range(1, 16), *range(101, 107))]
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", one.name) for one in RULES.values())
    assert len({one.name for one in RULES.values()}) == len(RULES)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*_rules.py"))
    for code in RULES:
        assert re.search(rf"def test_{code.lower()}_", tests), code


def test_rules_are_chosen_by_code_or_by_its_beginning() -> None:
    """In any case of letters; what is left out wins."""
    model, example = convolutional()
    assert audit(model, example, select=["BN003", "bn1"], ignore=["BN105"]).ran == (
        "BN003", "BN101", "BN102", "BN103", "BN104", "BN106",
    )  # fmt: skip
    assert audit(model, ignore=["BN0"]).ran == ()
    with pytest.raises(SettingsError, match="no rule is left"):
        audit(model, select=["BN001"], ignore=["BN0"])
    for wrong in ("BN999", "", "training-mode"):
        with pytest.raises(SettingsError, match=r"there is no rule .*BN001, BN002"):
            audit(model, select=[wrong])
        with pytest.raises(SettingsError, match="there is no rule"):
            audit(model, ignore=[wrong])


def test_no_forward_is_run_for_rules_that_need_none() -> None:
    """Selecting static rules keeps an expensive model from running."""

    class Dear(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            raise AssertionError("was run")

    assert audit(Dear().eval(), torch.ones(1, 1), select=["BN001", "BN004"]).ran == ("BN001", "BN004")


def test_a_check_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as unchecked, and not as passed."""

    def broken(_: Subject) -> Iterator[Hit | Gap]:
        raise ZeroDivisionError("odd model")

    model, _ = convolutional()
    norms(model)[0].train()
    monkeypatch.setitem(RULES, "BN004", Rule("BN004", "x", "info", PAGE, broken))
    found = audit(model)
    assert codes(found) == {"BN001"}
    assert "BN004" not in found.ran
    assert reasons(found, "BN004") == ["the check itself failed: ZeroDivisionError: odd model"]


@pytest.mark.parametrize("model", [lambda: None, "resnet", {1: torch.ones(1)}, None])
def test_other_things_cannot_be_audited(model: Any) -> None:
    """The type is named."""
    with pytest.raises(TypeError, match=f"got {type(model).__name__}"):
        audit(model)


def test_a_guard_is_told_to_hand_over_its_model() -> None:
    """The remedy is in the message."""
    model, _ = residual()
    with pytest.raises(TypeError, match=r"got EvalGuard: pass its \.module"):
        audit(EvalGuard(model))  # type: ignore[arg-type]


def test_an_audit_does_not_mind_a_guard_or_the_callers_modes() -> None:
    """Inside a guarded block, in inference mode and under autocast the findings are the same."""
    model, example = convolutional()
    norms(model)[0].running_var.fill_(-1)  # type: ignore[union-attr]
    want = codes(audit(model, example))
    assert want == {"BN006", "BN105"}
    with EvalGuard(model):
        assert codes(audit(model, example)) == want
    with torch.inference_mode():
        assert codes(audit(model, example)) == want
    with torch.no_grad():
        assert codes(audit(model, example)) == want


def test_severity_levels_and_the_verdict() -> None:
    """The verdict counts, says what to do, and what was not checked."""
    assert report("warning", "info").reaches("warning")
    assert not report("warning", "info").reaches("error")
    assert report("info").reaches("info")
    assert not report().reaches("info")
    assert report().verdict == "no hazard found"
    assert report("info", "info").verdict == "no hazard found, 2 notes"
    assert report("warning").verdict == "1 warning: look at the warnings before serving it"
    unchecked = (Skipped("BN102", "x"), Skipped("BN102", "y"), Skipped("BN001", "in places"))
    assert (
        report("error", "error", "warning", skipped=unchecked).verdict
        == "2 errors and 1 warning: do not serve it like this (1 rule could not be checked)"
    )


def test_findings_name_module_value_reason_and_remedy() -> None:
    """Up to three hits are findings of their own; the rule's page gives what a hit leaves out."""
    one = Rule("BN999", "x", "warning", PAGE, lambda _: iter(()))
    hits = [Hit("a.b", "7 seen"), Hit("a.c", "8 seen", "info", "because", "do that")]
    first, second = one.findings(hits)
    assert first == Finding("BN999", "warning", "a.b", "7 seen: it matters", "mend it")
    assert second == Finding("BN999", "info", "a.c", "8 seen: because", "do that")
    (merged,) = one.findings([Hit(f"a.{letter}", f"{letter} seen") for letter in "bcde"])
    assert merged.module == "a"
    assert merged.modules == ("a.b", "a.c", "a.d", "a.e")
    assert merged.message == "4 modules, which are a.b (b seen), a.c (c seen), a.d (d seen) and 1 more: it matters"


def test_common_ancestor_goes_by_whole_names() -> None:
    """A shared beginning of two names is no module."""
    assert common_ancestor(["layer1.bn", "layer10.bn"]) == ""
    assert common_ancestor(["a.b.c", "a.b.d"]) == "a.b"
    assert common_ancestor(["a", ""]) == ""


def test_join_writes_as_a_person_would() -> None:
    """With commas, an "and", and a count of what is left out."""
    assert (join([]), join(["a"]), join(["a", "b"]), join("abc")) == ("", "a", "a and b", "a, b and c")
    assert join("abcde", 2) == "a, b and 3 more"


def test_a_rule_without_a_whole_page_or_with_a_taken_code_is_refused() -> None:
    """A rule is documented from its first day."""

    def incomplete(subject: Subject) -> Iterator[Hit | Gap]:
        """Do nothing."""
        del subject
        yield Gap("")

    with pytest.raises(ValueError, match="a rule's page has a title"):
        rule("BN998", "incomplete", "info")(incomplete)
    incomplete.__doc__ = "T.\n\nText.\n\nWhy: w.\n\nFound: f.\n\nRemedy: r.\n\nExample::\n\n    x = 1\n"
    with pytest.raises(ValueError, match="there are two rules BN001"):
        rule("BN001", "taken", "info")(incomplete)
    assert "BN998" not in RULES


def test_a_new_rule_is_one_function() -> None:
    """Its findings, gaps and page come with it."""

    @rule("BN997", "has-a-linear-layer", "info")
    def has_linear(subject: Subject) -> Iterator[Hit | Gap]:
        """A linear layer is there.

        For the sake of a test.

        Why: tests need rules.

        Found: by class.

        Remedy: none.

        Example::

            nn.Linear(1, 1)
        """
        for name, module in subject.root.named_modules():
            if isinstance(module, nn.Linear):
                yield Hit(name, "a Linear")
        yield Gap("only linear layers were looked at")

    assert has_linear.__doc__
    try:
        found = audit(nn.Sequential(nn.Linear(1, 1)).eval(), select=["BN997"])
        assert found.findings == (Finding("BN997", "info", "0", "a Linear: tests need rules.", "none."),)
        assert reasons(found, "BN997") == ["only linear layers were looked at"]
        assert audit({}, select=["BN997"]).ran == ()
    finally:
        del RULES["BN997"]
