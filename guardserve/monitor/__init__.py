"""Live activation statistics of every BatchNorm layer, compared with its running statistics or with a reference."""

from guardserve.detection.calibration import RunLength
from guardserve.detection.detector import Detection, Detector, State
from guardserve.detection.diagnosis import MovedChannel
from guardserve.detection.merging import Summary
from guardserve.detection.reference import ReferenceProfile, ReferenceWarning
from guardserve.detection.state_file import load_state, save_state
from guardserve.detection.traffic import TrafficReference
from guardserve.monitor.accumulation import Seen
from guardserve.monitor.effect_size import ChannelShift, EffectSize, LayerShift
from guardserve.monitor.keeper import StateKeeper
from guardserve.monitor.monitor import Monitor
from guardserve.monitor.verdict import Snapshot, Verdict
from guardserve.observation.reading import VALUES

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
