"""The audit: every known hazard of a model with BatchNorm, found before it is served.

``audit`` looks at modules, graphs, statistics and a few forwards on an example, and never alters the model.
"""

from guardserve.audit.engine import audit
from guardserve.audit.report import Finding, Report, Severity, Skipped

__all__ = ["Finding", "Report", "Severity", "Skipped", "audit"]
