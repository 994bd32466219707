"""Estimate before training what memory and time block-sparse layers would save for a model."""

from sparse_lightning.planning.costs import Check, Cost, Setting
from sparse_lightning.planning.planner import plan
from sparse_lightning.planning.result import Plan, PlannedLayer

__all__ = ["Check", "Cost", "Plan", "PlannedLayer", "Setting", "plan"]
