"""Advice before training: what block-sparse layers would save a model, in memory and time."""

from sparse_lightning.planning.costs import Check, Choice, Cost
from sparse_lightning.planning.planner import plan
from sparse_lightning.planning.result import Plan, PlannedLayer

__all__ = ["Check", "Choice", "Cost", "Plan", "PlannedLayer", "plan"]
