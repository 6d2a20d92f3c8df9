"""tau2-bench's telecom world in solo mode: the policy holds both the carrier's tools and the customer's phone.

Everything that tau2 knows of a task lives here; sources and verifiers see calls, answers, hashes and a reward.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

from loguru import logger

logger.disable("tau2")  # before the imports below: tau2 warns when imported and logs every answer

from pydantic import BaseModel, ValidationError  # noqa: E402
from tau2.data_model.message import ToolCall as Tau2Call  # noqa: E402
from tau2.data_model.tasks import RewardType, Task  # noqa: E402
from tau2.domains.telecom import environment as tau2_telecom  # noqa: E402
from tau2.environment.tool import Tool, as_tool  # noqa: E402
from tau2.environment.toolkit import ToolType  # noqa: E402

from pivotrl.config import DomainConfig  # noqa: E402
from pivotrl.types import Action, Message, ToolCall  # noqa: E402

DONE = "done"
TRANSFER = "transfer_to_human_agents"
ENDINGS = (DONE, TRANSFER)
ONLY_CALLS = f"There is nobody to talk to here: answer with tool calls only, and call `{DONE}` when the ticket is solved."


class TelecomEnvironment:
    """One ticket, worked on by tool calls until `done` or `transfer_to_human_agents`.

    Deterministic: the same calls give the same answers and the same `state_hash` in every process.
    """

    def __init__(self, domain: DomainConfig, state: dict[str, Any]):
        """`state` is {"task_id": tau2's task id}.

        Raises:
            ValueError: the state names no known task.
        """
        task = _tasks().get(state.get("task_id", ""))
        if task is None:
            raise ValueError(f"telecom state {state!r}: 'task_id' must be one of tau2's {len(_tasks())} telecom task ids")
        self._task = task
        self._system_prompt = domain.system_prompt
        self.reset()

    def reset(self) -> tuple[Message, ...]:
        """Break what the task wants broken; the policy (where the domain asks for it) and the ticket."""
        self._world = copy.deepcopy(_pristine_world())
        self._calls: list[Tau2Call] = []
        initial = self._task.initial_state
        self._world.set_state(
            initialization_data=initial.initialization_data,
            initialization_actions=initial.initialization_actions,
            message_history=initial.message_history or [],
        )
        ticket = Message(role="user", content=self._task.ticket)
        if not self._system_prompt:
            return (ticket,)
        return (Message(role="system", content=f"{ONLY_CALLS}\n\n{self._world.get_policy()}"), ticket)

    def step(self, action: Action) -> tuple[tuple[Message, ...], bool]:
        """Run the calls in order; an ending call gets no answer, and calls behind it are not run."""
        if action.malformed:
            return (Message(role="user", content=f"That message could not be read: {action.malformed}. {ONLY_CALLS}"),), False
        if not action.tool_calls:
            return (Message(role="user", content=ONLY_CALLS),), False
        answers = []
        for call in action.tool_calls:
            answer, failed = self.call(call)
            if call.name in ENDINGS and not failed:
                return tuple(answers), True
            answers.append(Message(role="tool", content=answer, tool_call_id=call.id))
        return tuple(answers), False

    def call(self, call: ToolCall) -> tuple[str, bool]:
        """Run one call: its answer, and whether it failed.

        Arguments are held against the tool's schema first: tau2 itself would write values of wrong types into the world.
        """
        fault = _call_fault(call)
        if fault:
            return f"Error: {fault}", True
        fields = _tools()[call.name].params.model_fields
        # JSON has one kind of number, but tau2 writes "2 GB" or "2.0 GB" on the bill: make 2 and 2.0 the same call.
        arguments = {key: float(value) if fields[key].annotation is float else value for key, value in call.arguments.items()}
        tau2_call = Tau2Call(id=call.id, name=call.name, arguments=arguments, requestor="assistant")
        self._calls.append(tau2_call)
        if call.name == DONE:
            return "", False
        num_bills = len(self._world.tools.db.bills)
        response = self._world.get_response(tau2_call)
        self._name_new_bills(num_bills)
        return response.content or "", bool(response.error)

    def _name_new_bills(self, num_known: int) -> None:
        """tau2 names new bills by uuid4; count them instead, so that states repeat."""
        database = self._world.tools.db
        for number, bill in enumerate(database.bills[num_known:], start=num_known):
            owner = next(customer for customer in database.customers if bill.bill_id in customer.bill_ids)
            owner.bill_ids[owner.bill_ids.index(bill.bill_id)] = bill.bill_id = f"B{number:08d}"

    def reward(self) -> float:
        """1.0 when tau2 would: all of the task's assertions hold, and the calls were made that its reward basis demands.

        (The basis demands calls of 32 tasks that only a transfer solves; their assertions hold from the start.)
        """
        criteria = self._task.evaluation_criteria
        passed = all(self._world.run_env_assertion(check, raise_assertion_error=False) for check in criteria.env_assertions or [])
        if RewardType.ACTION in criteria.reward_basis:
            passed = passed and all(any(gold.compare_with_tool_call(made) for made in self._calls) for gold in criteria.actions or [])
        return float(passed)

    def tools(self) -> list[dict[str, Any]]:
        """The OpenAI-style schemas of all tools, `done` included."""
        return [tool.openai_schema for tool in _tools().values()]

    def fork(self) -> "TelecomEnvironment":
        """An independent copy of the episode as it stands (about 1 ms)."""
        twin = copy.copy(self)
        twin._world = copy.deepcopy(self._world)
        twin._calls = list(self._calls)
        return twin

    def state_hash(self) -> str:
        """A digest of both databases: equal exactly when carrier and phone are in the same state."""
        return f"{self._world.get_db_hash()}{self._world.get_user_db_hash()}"


def is_lookup(name: str) -> bool:
    """Whether tau2 declares the tool as one that only reads."""
    world = _pristine_world()
    return any(kit.has_tool(name) and kit.tool_type(name) == ToolType.READ for kit in (world.tools, world.user_tools))


def is_tool(name: str) -> bool:
    """Whether a tool of this name exists, `done` included."""
    return name in _tools()


def task_ids() -> Sequence[str]:
    """All 2,285 task ids, in tau2's order."""
    return tuple(_tasks())


@functools.cache
def heldout_task_ids() -> frozenset[str]:
    """The 40 tasks of the benchmark's test split."""
    return frozenset(tau2_telecom.get_tasks_split()["test"])


def _call_fault(call: ToolCall) -> str:
    """What is wrong with a call before it runs, or ""."""
    if not is_tool(call.name):
        return f"Tool '{call.name}' not found."
    parameters: type[BaseModel] = _tools()[call.name].params
    unknown = call.arguments.keys() - parameters.model_fields.keys()
    if unknown:
        return f"{call.name} takes no argument named {', '.join(sorted(unknown))}."
    try:
        parameters.model_validate(call.arguments, strict=True)
    except ValidationError as error:
        return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return ""


@functools.cache
def _tasks() -> dict[str, Task]:
    return {task.id: task for task in tau2_telecom.get_tasks_full()}


@functools.cache
def _pristine_world() -> tau2_telecom.TelecomEnvironment:
    world = tau2_telecom.get_environment(solo_mode=True)
    # tau2 keeps one VPN record per process and lets tasks break it: without a copy, one episode would leak into the next.
    world.user_tools.default_vpn_details = copy.deepcopy(world.user_tools.default_vpn_details)
    return world


@functools.cache
def _tools() -> dict[str, Tool]:
    def done() -> str:
        """Call this function when the ticket is solved. It ends your work on it."""

    world = _pristine_world()
    return {tool.name: tool for tool in (*world.get_tools(), *world.get_user_tools(), as_tool(done))}
