"""Live activation statistics of every BatchNorm layer, compared with its running statistics or with a reference."""

from guardserve.monitor.accumulation import Seen
from guardserve.monitor.calibration import RunLength
from guardserve.monitor.detector import Detection, Detector, State
from guardserve.monitor.diagnosis import MovedChannel
from guardserve.monitor.effect_size import ChannelShift, EffectSize, LayerShift
from guardserve.monitor.keeper import StateKeeper
from guardserve.monitor.merging import Summary
from guardserve.monitor.monitor import Monitor
from guardserve.monitor.reading import VALUES
from guardserve.monitor.reference import ReferenceProfile, ReferenceWarning
from guardserve.monitor.state_file import load_state, save_state
from guardserve.monitor.traffic import TrafficReference
from guardserve.monitor.verdict import Snapshot, Verdict

__all__ = [
    "VALUES",
    "ChannelShift",
    "Detection",
    "Detector",
    "EffectSize",
    "LayerShift",
    "Monitor",
    "MovedChannel",
    "ReferenceProfile",
    "ReferenceWarning",
    "RunLength",
    "Seen",
    "Snapshot",
    "State",
    "StateKeeper",
    "Summary",
    "TrafficReference",
    "Verdict",
    "load_state",
    "save_state",
]
