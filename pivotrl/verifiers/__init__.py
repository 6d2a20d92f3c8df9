"""Functional and strict verifiers: (candidate, sampled actions) -> verdicts.

A verifier is deterministic and never executes anything outside its own copy of the world. It may raise: the pool in
`verifiers.pool` turns a crash or a timeout into a dropped, counted sample, never into reward 0.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol

from pivotrl.config import DomainConfig
from pivotrl.types import Action, Candidate, Verdict

VERIFIERS = {
    "strict": "pivotrl.verifiers.strict:StrictVerifier",
    "state_equality": "pivotrl.verifiers.state_equality:StateEqualityVerifier",
    "sql": "pivotrl.verifiers.sql:SqlVerifier",
}


class Verifier(Protocol):
    """Scores actions sampled from one candidate's history."""

    def verify(self, candidate: Candidate, actions: Sequence[Action]) -> list[Verdict]:
        """One verdict per action, in order; reward in [0, 1] and a reason a person can read."""
        ...


def build_verifier(name: str, domain: DomainConfig) -> Verifier:
    """The verifier registered under `name`, made for a domain.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in VERIFIERS:
        raise ValueError(f"unknown verifier {name!r}; known: {', '.join(sorted(VERIFIERS))}")
    module, _, attribute = VERIFIERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(domain)
