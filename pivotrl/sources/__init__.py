"""Trajectory sources: one file per format, all answering the same two questions."""

import importlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from pivotrl.config import DomainConfig
from pivotrl.types import Reject, TaskRef, Trajectory

SOURCES = {
    "tau2_telecom": "pivotrl.sources.tau2_telecom:TelecomExpertSource",
    "intercode_sql": "pivotrl.sources.intercode_sql:InterCodeSqlSource",
    "openai_chat": "pivotrl.sources.openai_chat:OpenAIChatSource",
    "nemo_gym": "pivotrl.sources.nemo_gym:NemoGymSource",
    "tau_bench": "pivotrl.sources.tau_bench:TauBenchSource",
    "swe_agent": "pivotrl.sources.swe_agent:SweAgentSource",
    "openhands": "pivotrl.sources.openhands:OpenHandsSource",
    "terminus": "pivotrl.sources.terminus:TerminusSource",
    "atif": "pivotrl.sources.atif:AtifSource",
    "intercode_bash": "pivotrl.sources.intercode_bash:InterCodeBashSource",
    "react_search": "pivotrl.sources.react_search:ReactSearchSource",
}


class Source(Protocol):
    """Where expert trajectories come from."""

    def refs(self) -> Sequence[TaskRef | Reject]:
        """Every trajectory's key and task id, cheaply, in a fixed order; unreadable ones as rejects."""
        ...

    def read(self, key: str) -> Trajectory | Reject:
        """One trajectory in full, or the reason why it is left out (failed episode, malformed message...)."""
        ...


@runtime_checkable
class WarmupSource(Source, Protocol):
    """One that makes its trajectories, and can make those of the warm-up by someone less careful (domain.warmup_overlooked)."""

    def read_warmup(self, key: str) -> Trajectory | Reject:
        """As `read`; with domain.warmup_overlooked = 0 the same."""
        ...


def build_source(domain: DomainConfig) -> Source:
    """The source that a domain names.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if domain.source not in SOURCES:
        raise ValueError(f"unknown source {domain.source!r}; known: {', '.join(sorted(SOURCES))}")
    module, _, attribute = SOURCES[domain.source].partition(":")
    return getattr(importlib.import_module(module), attribute)(domain)
