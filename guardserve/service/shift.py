"""What is done about requests with samples unlike the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from guardserve.service.answer import Answer, refusal

Action: TypeAlias = Literal["observe", "flag", "reject"]

# parameters of answers that are not the protocol's
P_VALUES = "guardserve_p_values"
SHIFT = "guardserve_shift"


@dataclass(frozen=True)
class ShiftPolicy:
    """Judges each request by the oddest of its own rows, whatever it was batched with.

    A row that is not judged, as the reference is still being made, is not held against it. One with NaN or infinity in
    a layer, such as of an input whose squares overflow, is odder than any.

    Attributes:
        action: Whether a request with a row unlike the reference is answered as any other (``"observe"``), told so in
            the answer's parameters (``"flag"``) or refused (``"reject"``).
        threshold: The p-value up to which a row is unlike the reference.
    """

    action: Action = "observe"
    threshold: float = 0.001

    def refusal(self, p_values: Sequence[float] | None) -> Answer | None:
        """Return the answer to a request that is refused; None if it is not."""
        if self.action != "reject" or not self._odd(p_values):
            return None
        known = [value for value in p_values or () if not math.isnan(value)]
        odd = sum(value <= self.threshold for value in known)
        what = f"{odd} of {len(p_values or ())} samples are" if len(p_values or ()) > 1 else "the sample is"
        text = (
            f"{what} unlike the reference: p-value {min(known):.3g}, not above the threshold {self.threshold:g}; "
            "the model's answer to such data is not to be relied on"
        )
        return refusal(422, "unlike_reference", text)

    def parameters(self, p_values: Sequence[float] | None, *, asked: bool) -> Mapping[str, object]:
        """Return what an answer's parameters tell of its rows.

        Args:
            p_values: How odd the monitor finds each row; None when it cannot tell.
            asked: Whether the client has asked for them.
        """
        if p_values is None or not (asked or self.action == "flag"):
            return {}
        # the protocol's parameters are scalars
        told = {P_VALUES: " ".join(f"{value:.6g}" for value in p_values)}
        return {**told, SHIFT: self._odd(p_values)} if self.action == "flag" else told

    def _odd(self, p_values: Sequence[float] | None) -> bool:
        return any(value <= self.threshold for value in p_values or ())  # NaN is not
