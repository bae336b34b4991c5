"""Losses that train few-step students."""

from fewstep.distillation.consistency import (
    ConsistencyTerms,
    adaptive_loss,
    consistency_loss,
    ema_decay,
    ema_update,
    flow_derivative,
    flow_matching_loss,
    interpolate,
    sample_times,
)

__all__ = [
    "ConsistencyTerms",
    "adaptive_loss",
    "consistency_loss",
    "ema_decay",
    "ema_update",
    "flow_derivative",
    "flow_matching_loss",
    "interpolate",
    "sample_times",
]
