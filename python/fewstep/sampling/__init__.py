"""Schedulers and step grids for 1-8 steps."""

from fewstep.sampling.consistency import FlowConsistencyScheduler, FlowConsistencySchedulerOutput

__all__ = ["FlowConsistencyScheduler", "FlowConsistencySchedulerOutput"]
