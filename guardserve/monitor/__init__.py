"""Live activation statistics of every BatchNorm layer, compared with its running statistics."""

from guardserve.monitor.effect_size import ChannelShift, EffectSize, LayerShift
from guardserve.monitor.monitor import Monitor, Snapshot, Verdict

__all__ = ["ChannelShift", "EffectSize", "LayerShift", "Monitor", "Snapshot", "Verdict"]
