"""PivotRL on Megatron-Core: expert trajectories -> pivots -> turn-level GRPO."""

__version__ = "0.1.0"
