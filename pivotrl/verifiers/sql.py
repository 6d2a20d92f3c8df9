"""Functional verifier for SQL turns: an action is as good as the expert's when its query finds the same rows."""

import re
from collections.abc import Sequence
from contextlib import closing

from pivotrl.config import DomainConfig
from pivotrl.environments.sql import Database, QueryFailed, Result, call_fault, database_folder, mismatch
from pivotrl.types import Action, Candidate, ToolCall, Verdict


class SqlVerifier:
    """Runs the expert's query and every sampled one on the candidate's own database (state["db"]).

    Half of `domain.verifier_timeout_s` is shared equally by the queries of one `verify`, so that the whole never outlasts it.

    Raises:
        ValueError: domain.data_path is not set.
        FileNotFoundError: it holds no databases.
    """

    def __init__(self, domain: DomainConfig):
        database_folder(domain)  # a wrong path must fail here, not as a dropped sample each time
        self._domain = domain

    def verify(self, candidate: Candidate, actions: Sequence[Action]) -> list[Verdict]:
        """One verdict per action; errors, forbidden statements and exceeded limits are the policy's fault: reward 0.

        Raises:
            ValueError: the expert's own query does not run here, so nothing can be compared with it.
        """
        num_queries = (len(actions) + 1) * max(len(candidate.expert.tool_calls), 1)
        limit_s = self._domain.verifier_timeout_s / 2 / num_queries
        with closing(Database(self._domain, candidate.state["db"], time_limit_s=limit_s)) as database:
            try:
                expected = [None if call_fault(call) else database.run(call.arguments["query"]) for call in candidate.expert.tool_calls]
            except QueryFailed as error:
                raise ValueError(f"candidate {candidate.id}: the expert's own query does not run here: {error.reason}: {error}") from error
            return [self._score(database, candidate.expert, expected=expected, action=action) for action in actions]

    def _score(self, database: Database, expert: Action, *, expected: list[Result | None], action: Action) -> Verdict:
        if action.malformed:
            return Verdict(reward=0.0, reason=f"malformed: {action.malformed}")
        if len(action.tool_calls) != len(expert.tool_calls):
            return Verdict(reward=0.0, reason=f"{len(action.tool_calls)} tool calls, the expert made {len(expert.tool_calls)}")
        if not expert.tool_calls:
            same = _plain(action.content) == _plain(expert.content)
            return Verdict(reward=float(same), reason="same message" if same else "different message")
        for call, wanted, sampled in zip(expert.tool_calls, expected, action.tool_calls, strict=True):
            if fault := _fault(database, call, wanted=wanted, sampled=sampled):
                return Verdict(reward=0.0, reason=fault)
        return Verdict(reward=1.0, reason="same result")


def _fault(database: Database, call: ToolCall, *, wanted: Result | None, sampled: ToolCall) -> str:
    """Why the sampled call does not do what the expert's call does; empty when it does."""
    if wanted is None:  # not a query, for example a final submission: compared as it stands
        return "" if (sampled.name, sampled.arguments) == (call.name, call.arguments) else f"not the expert's call of {call.name}"
    if fault := call_fault(sampled):
        return fault
    try:
        return mismatch(wanted, database.run(sampled.arguments["query"]))
    except QueryFailed as error:
        return f"{error.reason}: {error}"


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()
