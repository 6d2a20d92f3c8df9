"""NeMo Gym "responses" rows, both ways: pivot data sets that NVIDIA published, and our pivots for their tools.

A row was cut before: `responses_create_params.input` is the history (Responses API items) and `expected_action` (or, in
terminal rows, `expected_answer`, a JSON object as text) is the expert's action. Public sets: the Nemotron-RL-*-Pivot-v1 data
sets of the nvidia organisation on Hugging Face; a few rows of each kind are in the github repository NVIDIA-NeMo/Gym.
"""

import json
from collections.abc import Sequence
from typing import Any

from pivotrl.config import DomainConfig
from pivotrl.sources.openai_chat import Malformed, decode_object, jsonl_lines, parse_messages, parse_text, parse_tools, prompt_task_id
from pivotrl.types import Action, Candidate, Message, Reject, TaskRef, Trajectory

_OWN_KEYS = ("responses_create_params", "expected_action", "expected_answer", "response")


def from_row(row: dict[str, Any], where: str = "row", *, domain: str = "nemo_gym") -> Trajectory | Reject:
    """A pivot row as a trajectory whose last turn is the expected action; only that turn becomes a candidate.

    What messages cannot hold (item ids, statuses, other request parameters) stays under state["nemo_gym"] for `to_row`.
    """
    try:
        params, expected = _params(row), _expected(row)
        chat = _chat(params)
        if chat and chat[-1]["role"] == "assistant" and _has_only_reasoning(chat[-1]):
            expected |= {"reasoning_content": chat.pop()["reasoning_content"]}
        if any(_has_only_reasoning(message) for message in chat):
            raise Malformed("dangling_reasoning", "a reasoning item that no assistant action follows")
        messages = parse_messages([*chat, expected])
        tools = parse_tools(params.get("tools"))
    except Malformed as fault:
        return fault.reject(where)
    original = {key: params[key] for key in ("input", "tools") if key in params}
    original |= {key: row[key] for key in ("expected_action", "expected_answer") if row.get(key)}
    rebuilt = _rebuild(messages[:-1], Action.from_message(messages[-1]), tools)
    kept = {
        "row": {key: value for key, value in row.items() if key not in _OWN_KEYS},
        "params": {key: value for key, value in params.items() if key not in ("input", "tools")},
        "verbatim": {key: value for key, value in original.items() if key not in rebuilt or rebuilt[key] != value},
    }
    return Trajectory(
        id=str(row.get("trajectory_id") or row.get("uuid") or where),
        task_id=_task_id(row),
        domain=domain,
        messages=messages,
        tools=tools,
        state={"only_last_turn": True, "nemo_gym": kept},
    )


def to_row(candidate: Candidate, tools: Sequence[dict[str, Any]], mean: float | None = None) -> dict[str, Any]:
    """A candidate of any domain as a pivot row; `tools` are its chat-form schemas, `mean` its profile's reward mean.

    A candidate that came from such a row keeps the row's other fields. `agent_ref`, which names a Gym agent, is not invented.
    """
    kept = candidate.state.get("nemo_gym", {})
    parts = _rebuild(candidate.history, candidate.expert, tools) | kept.get("verbatim", {})
    if "expected_answer" in parts:
        del parts["expected_action"]
    params = kept.get("params", {"parallel_tool_calls": len(candidate.expert.tool_calls) > 1, "tool_choice": "auto"})
    row = {
        "responses_create_params": {**params, **{key: parts.pop(key) for key in ("input", "tools") if key in parts}},
        **parts,
        "trajectory_id": candidate.trajectory_id,
        "meta_info": _meta_info(candidate.history),
        **kept.get("row", {}),
    }
    return row if mean is None else row | {"pass_rate": mean}


class NemoGymSource:
    """Reads `domain.data_path` (.jsonl, .jsonl.gz or a folder of them) once; keys are "file:line"."""

    def __init__(self, domain: DomainConfig):
        self._domain = domain.name
        self._lines = dict(jsonl_lines(domain))

    def refs(self) -> list[TaskRef | Reject]:
        """One ref per pivot row; rows of other kinds are rejects already here."""
        answers: list[TaskRef | Reject] = []
        for key, line in self._lines.items():
            try:
                row = decode_object(line)
                _params(row), _expected(row)
                answers.append(TaskRef(key=key, task_id=_task_id(row)))
            except Malformed as fault:
                answers.append(fault.reject(key))
        return answers

    def read(self, key: str) -> Trajectory | Reject:
        """The row as a trajectory, or why it is left out."""
        try:
            return from_row(decode_object(self._lines[key]), key, domain=self._domain)
        except Malformed as fault:
            return fault.reject(key)


def _params(row: dict[str, Any]) -> dict[str, Any]:
    params = row.get("responses_create_params")
    if not isinstance(params, dict) or not params.get("input"):
        raise Malformed("missing_input", "no responses_create_params.input")
    if not isinstance(params["input"], str | list):
        raise Malformed("malformed_item", f"input is of type {type(params['input']).__name__}")
    return params


def _task_id(row: dict[str, Any]) -> str:
    given = row.get("task_id") or row.get("trajectory_id")  # rows cut from one trajectory must share a split
    items = row["responses_create_params"]["input"]
    return str(given or prompt_task_id([{"role": "user", "content": items}] if isinstance(items, str) else items))


def _expected(row: dict[str, Any]) -> dict[str, Any]:
    """The expected action as an OpenAI assistant message."""
    action, answer = row.get("expected_action"), row.get("expected_answer")
    if isinstance(action, dict):
        kind = action.get("type")
        if kind == "message":
            return {"role": "assistant", "content": action.get("content")}
        calls = {"function_call": [action], "function_call_batch": action.get("calls")}.get(str(kind))
        if not isinstance(calls, list) or not calls:
            raise Malformed("unknown_action", f"expected_action of type {kind!r}")
        return {"role": "assistant", "tool_calls": calls}
    if isinstance(answer, str) and answer.lstrip().startswith("{"):
        decode_object(answer, "no_expected_action")
        return {"role": "assistant", "content": answer}
    raise Malformed("no_expected_action", "a whole task, not one turn")


def _has_only_reasoning(message: dict[str, Any]) -> bool:
    return message.keys() == {"role", "reasoning_content"}


def _chat(params: dict[str, Any]) -> list[dict[str, Any]]:
    """Responses items as OpenAI messages: reasoning, message and calls of one assistant turn become one message."""
    items = params["input"]
    chat: list[dict[str, Any]] = [{"role": "system", "content": params["instructions"]}] if params.get("instructions") else []
    for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
        if not isinstance(item, dict):
            raise Malformed("malformed_item", f"an item is of type {type(item).__name__}")
        kind = item.get("type") or "message"
        turn = chat[-1] if chat and chat[-1]["role"] == "assistant" else None
        if kind == "message" and item.get("role") != "assistant":
            chat.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call_output":
            chat.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind not in ("message", "reasoning", "function_call"):
            raise Malformed("unknown_item", f"item of type {kind!r}")
        else:
            if turn is None or (kind != "function_call" and not _has_only_reasoning(turn)):
                turn = {"role": "assistant"}
                chat.append(turn)
            _add_to_turn(turn, kind, item)
    return chat


def _add_to_turn(turn: dict[str, Any], kind: str, item: dict[str, Any]) -> None:
    if kind == "message":
        turn["content"] = item.get("content")
    elif kind == "function_call":
        call = {"id": item.get("call_id"), "function": {"name": item.get("name"), "arguments": item.get("arguments")}}
        turn.setdefault("tool_calls", []).append(call)
    else:
        text = parse_text(item.get("summary") or item.get("content"))
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text


def _rebuild(history: Sequence[Message], expert: Action, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a row that follow from messages alone."""
    calls = [{"type": "function_call", "name": call.name, "arguments": _text(call.arguments)} for call in expert.tool_calls]
    expected: dict[str, Any] = {"type": "message", "content": expert.content}
    if calls:
        expected = calls[0] if len(calls) == 1 else {"type": "function_call_batch", "calls": calls}
    items: list[dict[str, Any]] = []
    for message in history:
        items += _items(message, number=len(items))
    parts = {"input": items, "expected_action": expected}
    if tools:
        parts["tools"] = [{"type": "function", "strict": False, **schema.get("function", schema)} for schema in tools]
    return parts


def _items(message: Message, *, number: int) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [{"type": "function_call_output", "call_id": message.tool_call_id, "output": message.content}]
    items: list[dict[str, Any]] = []
    if message.reasoning:
        items.append({"type": "reasoning", "id": f"rs_{number}", "summary": [{"type": "summary_text", "text": message.reasoning}]})
    if message.content or message.role != "assistant":
        items.append({"type": "message", "role": message.role, "content": message.content})
    for call in message.tool_calls:
        items.append({"type": "function_call", "name": call.name, "arguments": _text(call.arguments), "call_id": call.id})
    return items


def _text(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _meta_info(history: Sequence[Message]) -> dict[str, int]:
    """turn: user messages so far; step: assistant actions since the last one; assistant_depth: assistant actions so far."""
    roles = [message.role for message in history]
    last_user = len(roles) - 1 - roles[::-1].index("user") if "user" in roles else 0
    return {"turn": roles.count("user"), "step": roles[last_user:].count("assistant"), "assistant_depth": roles.count("assistant")}
