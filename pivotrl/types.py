"""The records that flow between stages. Every arrow of the pipeline is a JSONL file of one of these.

Shape suffixes used in tensor names all over the project:
P pivots, G group, K profile samples, R rows, T tokens, S scored (action) tokens, V vocabulary, H hidden.
"""

from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["", "warmup", "train", "heldout"]


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Base of all records: frozen, JSON in and out, wrong types raise msgspec.ValidationError."""


class ToolCall(Record):
    """One call of one tool; `arguments` is the decoded JSON object."""

    name: str
    arguments: dict[str, Any] = {}
    id: str = ""


class Message(Record):
    """One chat message in the OpenAI sense, with tool calls already decoded."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


class Action(Record):
    """One whole assistant completion, parsed. `malformed` says why parsing failed, "" when it did not."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: str = ""

    def to_message(self) -> Message:
        """The assistant message that puts this action into a history."""
        return Message(role="assistant", content=self.content, reasoning=self.reasoning, tool_calls=self.tool_calls)

    @classmethod
    def from_message(cls, message: Message) -> "Action":
        """The action that an assistant message took."""
        return cls(content=message.content, reasoning=message.reasoning, tool_calls=message.tool_calls)


class TaskRef(Record):
    """What a source knows of a trajectory before reading it: enough to split by task."""

    key: str
    task_id: str
    split: Split = ""


class Trajectory(Record):
    """A recorded expert episode. `state` is what the domain needs to rebuild the world (task id, database...)."""

    id: str
    task_id: str
    domain: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    state: dict[str, Any] = {}
    split: Split = ""
    reward: float | None = None


class Candidate(Record):
    """One assistant turn of a trajectory: the history before it, the expert's action, and the expert's later actions.

    `tools` is a key into the tools.json file beside the candidates, so that schemas are stored once.
    """

    id: str
    trajectory_id: str
    task_id: str
    domain: str
    turn: int
    history: tuple[Message, ...]
    expert: Action
    future: tuple[Action, ...] = ()
    tools: str = ""
    state: dict[str, Any] = {}


class Reject(Record):
    """An input that was left out, where it stood and why."""

    where: str
    reason: str
    detail: str = ""


class Verdict(Record):
    """A verifier's answer. status "error" or "timeout": the sample is dropped and counted, `reward` means nothing."""

    reward: float
    reason: str
    status: Literal["ok", "error", "timeout"] = "ok"


class Completion(Record):
    """One sampled action as the engine returned it: its token ids and its rollout logprobs (sampling distribution)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    policy_version: int


class LocalRollout(Record):
    """One sampled action from one history, with its verdict. Training uses `completion.token_ids`, never the text."""

    candidate_id: str
    index: int
    completion: Completion
    text: str
    verdict: Verdict
    num_calls: int = 0


class Group(Record):
    """The G local rollouts of one pivot in one step, with the prompt tokens they continue."""

    candidate_id: str
    trajectory_id: str
    expert_calls: int
    prompt: tuple[int, ...]
    rollouts: tuple[LocalRollout, ...]


class Sample(Record):
    """One profiled action as a person wants to read it."""

    text: str
    reward: float
    reason: str
    status: str = "ok"
    strict_reward: float = 0.0


class Profile(Record):
    """Reward mean and population variance of K local rollouts of the frozen policy (design: mu and var of the paper).

    `excluded` is "" or the reason why no statistics exist ("over_long", "verifier_failed").
    """

    candidate_id: str
    samples: tuple[Sample, ...] = ()
    mean: float = 0.0
    variance: float = 0.0
    num_dropped: int = 0
    prompt_tokens: int = 0
    excluded: str = ""


class Pivot(Record):
    """A candidate worth training on, with the profile numbers that selected it."""

    candidate: Candidate
    mean: float
    variance: float
    prompt_tokens: int = 0


class Episode(Record):
    """One evaluated episode. `end` says how it ended: "done", "max_turns" or "over_long" ("error": the environment crashed, no reward)."""

    task_id: str
    reward: float
    turns: int
    end: str
    actions: tuple[str, ...] = ()


class Turn(Record):
    """One sampled action of an episode. Its whole prompt is the first `shared` tokens of the turn before it (prompt and completion),
    then `prompt`."""

    prompt: tuple[int, ...]
    completion: Completion
    text: str
    shared: int = 0
    num_calls: int = 0


class EpisodeRollout(Record):
    """Episode `index` of a task in one step of end-to-end RL. `end` is as in Episode, or "error": the environment crashed, as
    `error` says; the sample is then dropped and counted, `reward` means nothing. `environment_s`: seconds in the environment."""

    task_id: str
    index: int
    reward: float
    end: str
    turns: tuple[Turn, ...] = ()
    error: str = ""
    environment_s: float = 0.0
