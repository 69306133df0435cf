"""Running the rules over a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from guardserve.audit.registry import Gap, Hit, find_rules
from guardserve.audit.report import Finding, Report, Skipped
from guardserve.audit.subject import Subject, Unchecked
from guardserve.exceptions import InputError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    Model: TypeAlias = nn.Module | ExportedProgram | Mapping[str, torch.Tensor]

_PROBES = "BN1"
"""What the codes of the rules start with that run the model."""

_log = logging.getLogger(__name__)


def audit(model: Model, example: Any = None, *, select: Iterable[str] = (), ignore: Iterable[str] = ()) -> Report:
    """Look for every known hazard of a model with BatchNorm, without altering it.

    Args:
        model: An ``nn.Module`` (eager, TorchScript or a graph module), a ``torch.export.ExportedProgram``, or a
            state_dict. Its flags are judged as they are.
        example: Tensor, tuple of tensors, or dict of tensors by parameter name, with the batch as first axis; real data
            if there is any. Without one the rules from BN101 on are not checked.
        select: Codes of the rules to check, or what codes start with; all by default.
        ignore: Codes of the rules to leave out, likewise.

    Returns:
        What was found, and what was not checked and why.

    Raises:
        TypeError: The model is none of these.
        InputError: The example has no batch axis, or no rows.
        SettingsError: There is no such rule.
    """
    return audit_subject(_subject(model, example), select=select, ignore=ignore)


def audit_subject(subject: Subject, *, select: Iterable[str] = (), ignore: Iterable[str] = ()) -> Report:
    """Check the rules on a subject; see :func:`audit`."""
    findings: list[Finding] = []
    skipped: list[Skipped] = []
    ran: list[str] = []
    rules = find_rules(select, ignore)
    for rule in rules:
        hits: list[Hit] = []
        try:
            with torch.no_grad():
                for result in rule.check(subject):
                    if isinstance(result, Gap):
                        skipped.append(Skipped(rule.code, result.reason))
                    else:
                        hits.append(result)
            ran.append(rule.code)
        except Unchecked as gap:
            skipped.append(Skipped(rule.code, str(gap)))
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 - a model can be odd in any way, and the other rules still count
            _log.debug("%s", rule.code, exc_info=error)
            skipped.append(Skipped(rule.code, f"the check itself failed: {type(error).__name__}: {error}"))
        findings += rule.findings(hits)
    probed = any(rule.code.startswith(_PROBES) for rule in rules)
    refusal = subject.refusal if probed else None
    return Report(str(subject), tuple(findings), tuple(ran), tuple(skipped), refusal)


def _subject(model: Any, example: Any) -> Subject:
    if isinstance(model, nn.Module):
        return Subject.of_module(model, example)
    if isinstance(model, Mapping) and all(isinstance(key, str) for key in model):
        return Subject.of_state_dict(model, example)
    if type(model).__module__.startswith("torch.export"):
        return Subject.of_program(model, example)
    raise TypeError(
        f"audit takes an nn.Module, an ExportedProgram or a state_dict, got {type(model).__name__}"
        + (": pass its .module" if isinstance(getattr(model, "module", None), nn.Module) else "")
    )
