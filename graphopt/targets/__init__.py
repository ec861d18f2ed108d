"""What a model is to run on: which operators exist there, how far the opset may rise, and what things cost."""

from graphopt.targets.target import CostProfile, Target, load_target, target_names

__all__ = ["CostProfile", "Target", "load_target", "target_names"]
