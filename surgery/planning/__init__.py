"""What a conversion will take, from a config alone: memory of each device, disk and time. No weights are loaded."""

from .plan import Plan, Request, StagePlan, plan

__all__ = ["Plan", "Request", "StagePlan", "plan"]
