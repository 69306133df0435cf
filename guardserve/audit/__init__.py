"""The audit: every known hazard of a model with BatchNorm, found before it is served.

``audit`` looks at modules, graphs, statistics and a few forwards on an example, and never alters the model.
"""

import guardserve.audit.mode_rules  # importing them fills the register of rules
import guardserve.audit.probe_rules
import guardserve.audit.statistics_rules
import guardserve.audit.structure_rules  # noqa: F401
from guardserve.audit.engine import audit
from guardserve.audit.report import Finding, Report, Severity, Skipped

__all__ = ["Finding", "Report", "Severity", "Skipped", "audit"]
