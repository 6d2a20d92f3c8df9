"""Executable worlds: evaluation and end-to-end RL act in them, state-based verifiers look into copies of them."""

import importlib
from typing import Protocol

from pivotrl.config import DomainConfig
from pivotrl.types import Action, Message

ENVIRONMENTS = {
    "tau2_telecom": "pivotrl.environments.tau2_telecom:TelecomEnvironment",
    "sql": "pivotrl.environments.sql:SqlEnvironment",
}


class Environment(Protocol):
    """One episode of one task. Made by `build_environment(domain, state)` with a trajectory's `state`."""

    def reset(self) -> tuple[Message, ...]:
        """Put the world into the task's initial state; the messages that the policy sees first."""
        ...

    def step(self, action: Action) -> tuple[tuple[Message, ...], bool]:
        """Carry out an action: the messages that answer it, and whether the episode is over.

        An action that is malformed or names no known tool is answered by an error message, as a server would.
        """
        ...

    def reward(self) -> float:
        """The task's own judgement of the present state, 1.0 for success."""
        ...


def build_environment(domain: DomainConfig, state: dict) -> Environment:
    """The domain's environment for one task.

    Raises:
        ValueError: the domain names no environment or an unknown one.
    """
    if domain.environment not in ENVIRONMENTS:
        raise ValueError(f"domain {domain.name!r}: environment {domain.environment!r} is not one of {', '.join(sorted(ENVIRONMENTS))}")
    module, _, attribute = ENVIRONMENTS[domain.environment].partition(":")
    return getattr(importlib.import_module(module), attribute)(domain, state)
