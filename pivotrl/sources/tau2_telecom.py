"""Expert trajectories of tau2-bench telecom: a program that looks first and repairs what it found.

It knows the ticket and the answers to its own calls and nothing else, so a policy can learn every decision.
Each check below is a generator: it yields calls and is sent their answers.
"""

import itertools
import json
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from pivotrl.config import DomainConfig
from pivotrl.environments.tau2_telecom import (
    DONE,
    ENDINGS,
    TRANSFER,
    TelecomEnvironment,
    heldout_task_ids,
    is_lookup,
    task_ids,
)
from pivotrl.types import Action, Reject, Split, TaskRef, ToolCall, Trajectory

Check = Generator[ToolCall, str, None]

TODAY = "2025-02-25"  # the policy document fixes the date
BEST_NETWORK_MODE = "4g_5g_preferred"
REFUEL_GB = 2.0  # the most that the policy document allows


class Hopeless(Exception):
    """No tool can repair what was found; a person must take over."""


@dataclass
class Case:
    """What the expert knows so far."""

    ticket: str
    customer: dict[str, Any] = field(default_factory=dict)
    line: dict[str, Any] = field(default_factory=dict)

    @property
    def abroad(self) -> bool:
        return "abroad" in self.ticket

    @property
    def line_key(self) -> dict[str, str]:
        return {"customer_id": self.customer["customer_id"], "line_id": self.line["line_id"]}


def use(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def identify_customer(case: Case) -> Check:
    phone_number = case.ticket.partition("phone number: ")[2][: len("555-000-0000")]
    case.customer = json.loads((yield use("get_customer_by_phone", phone_number=phone_number)))
    for line_id in case.customer["line_ids"]:
        case.line = json.loads((yield use("get_details_by_id", id=line_id)))
        if case.line["phone_number"] == phone_number:
            return
    raise Hopeless("the customer has no line with this number")


def line_roaming(case: Case) -> Check:
    if case.abroad and not case.line["roaming_enabled"]:
        yield use("enable_roaming", **case.line_key)


def airplane_mode(case: Case) -> Check:
    if "Airplane Mode" in (yield use("check_status_bar")):
        yield use("toggle_airplane_mode")


def sim_card(case: Case) -> Check:
    status = yield use("check_sim_status")
    if "No SIM card" in status:
        yield use("reseat_sim_card")
        status = yield use("check_sim_status")
    if "locked" in status:
        raise Hopeless("the SIM card is locked")


def suspended_line(case: Case) -> Check:
    if case.line["status"] != "Suspended":
        return
    if case.line["contract_end_date"] < TODAY:
        raise Hopeless("the contract of the line has ended")
    bills = json.loads((yield use("get_bills_for_customer", customer_id=case.customer["customer_id"])))
    for bill in bills:
        if bill["status"] == "Overdue":
            yield from overdue_bill(case, bill["bill_id"])
    yield use("resume_line", **case.line_key)
    yield use("reboot_device")


def overdue_bill(case: Case, bill_id: str) -> Check:
    if "permission to pay" not in case.ticket:
        raise Hopeless("a bill is overdue, and nobody may pay it")
    yield use("send_payment_request", customer_id=case.customer["customer_id"], bill_id=bill_id)
    yield use("check_payment_request")
    yield use("make_payment")
    if json.loads((yield use("get_details_by_id", id=bill_id)))["status"] != "Paid":
        raise Hopeless("the overdue bill could not be paid")


def access_point(case: Case) -> Check:
    settings = yield use("check_apn_settings")
    if "APN Name: broken" in settings or "Not Set" in settings:
        yield use("reset_apn_settings")
        yield use("reboot_device")


def mobile_data(case: Case) -> Check:
    status = yield use("check_network_status")
    if "Mobile Data Enabled: No" in status:
        yield use("toggle_data")
    if case.abroad and "Data Roaming Enabled: No" in status:
        yield use("toggle_roaming")


def network_mode(case: Case) -> Check:
    if BEST_NETWORK_MODE not in (yield use("check_network_mode_preference")):
        yield use("set_network_mode_preference", mode=BEST_NETWORK_MODE)


def data_allowance(case: Case) -> Check:
    usage = json.loads((yield use("get_data_usage", **case.line_key)))
    if float(usage["data_used_gb"]) >= float(usage["data_limit_gb"]) + float(usage["data_refueling_gb"]):
        yield use("refuel_data", **case.line_key, gb_amount=REFUEL_GB)


def data_saver(case: Case) -> Check:
    if "is ON" in (yield use("check_data_restriction_status")):
        yield use("toggle_data_saver_mode")


def vpn(case: Case) -> Check:
    if "ON and connected" in (yield use("check_vpn_status")):
        yield use("disconnect_vpn")


def wifi_calling(case: Case) -> Check:
    if "turned ON" in (yield use("check_wifi_calling_status")):
        yield use("toggle_wifi_calling")


def messaging_permissions(case: Case) -> Check:
    granted = yield use("check_app_permissions", app_name="messaging")
    for permission in ("sms", "storage"):
        if permission not in granted:
            yield use("grant_app_permission", app_name="messaging", permission=permission)


def confirm_signal(case: Case) -> Check:
    if "No Signal" in (yield use("check_status_bar")):
        raise Hopeless("there is still no signal")


def confirm_speed(case: Case) -> Check:
    if "Excellent" not in (yield use("run_speed_test")):
        raise Hopeless("the connection is still not excellent")


def confirm_mms(case: Case) -> Check:
    if "cannot" in (yield use("can_send_mms")):
        raise Hopeless("MMS messages still cannot be sent")


# The account first, while its details are on the table, then the device.
CONNECTION = (identify_customer, line_roaming, airplane_mode, sim_card, suspended_line)
DATA = (mobile_data, network_mode, data_allowance)
CHECKS: dict[str, tuple[Callable[[Case], Check], ...]] = {  # by a phrase of the ticket
    "phone service": (*CONNECTION, access_point, confirm_signal),
    "mobile data": (*CONNECTION, *DATA, data_saver, vpn, confirm_speed),
    "MMS": (*CONNECTION, *DATA, wifi_calling, messaging_permissions, access_point, confirm_mms),
}


def expert_calls(ticket: str) -> Check:
    """All the calls of one episode, the ending call last."""
    case = Case(ticket)
    checks = next((checks for phrase, checks in CHECKS.items() if phrase in ticket), CONNECTION)
    try:
        for check in checks:
            yield from check(case)
    except Hopeless as reason:
        yield use(TRANSFER, summary=f"I cannot fix the issue: {reason}.")
    else:
        yield use(DONE)


class TelecomExpertSource:
    """One trajectory per tau2 task, made when it is read; the benchmark's test split is held out."""

    def __init__(self, domain: DomainConfig):
        self._domain = domain

    def refs(self) -> list[TaskRef]:
        """All tasks in tau2's order; key and task id are tau2's task id."""
        return [TaskRef(key=task_id, task_id=task_id, split=_split(task_id)) for task_id in task_ids()]

    def read(self, key: str) -> Trajectory | Reject:
        """Let the expert work on task `key`; an episode that tau2 does not reward is rejected.

        Raises:
            ValueError: `key` is no task id.
        """
        trajectory = self._work(key, overlooked=0.0)
        if trajectory.reward != 1.0:
            ending = trajectory.messages[-1].tool_calls[0].name
            turns = sum(message.role == "assistant" for message in trajectory.messages)
            return Reject(where=key, reason="episode_failed", detail=f"ended with {ending} after {turns} calls")
        return trajectory

    def read_warmup(self, key: str) -> Trajectory | Reject:
        """The same by someone who leaves out domain.warmup_overlooked of all repairs and then takes the ticket for solved.

        Most of those episodes fail, and are kept.
        """
        overlooked = self._domain.warmup_overlooked
        return self._work(key, overlooked=overlooked) if overlooked else self.read(key)

    def _work(self, key: str, *, overlooked: float) -> Trajectory:
        state = {"task_id": key}
        environment = TelecomEnvironment(self._domain, state)
        messages = list(environment.reset())
        calls = expert_calls(ticket=messages[-1].content)
        chance, unaware = random.Random(key), False
        call = next(calls)
        for turn in itertools.count():
            while is_repair(call.name) and chance.random() < overlooked:
                unaware, call = True, calls.send("")  # no repair's answer is read
            if unaware and call.name == TRANSFER:
                call = use(DONE)
            action = Action(tool_calls=(ToolCall(name=call.name, arguments=call.arguments, id=f"call_{turn}"),))
            answers, ended = environment.step(action)
            messages += [action.to_message(), *answers]
            if ended:
                break
            call = calls.send(answers[0].content)
        return Trajectory(
            id=key,
            task_id=key,
            domain=self._domain.name,
            messages=tuple(messages),
            tools=tuple(environment.tools()),
            state=state,
            split=_split(key),
            reward=environment.reward(),
        )


def is_repair(name: str) -> bool:
    """Whether the call changes the world, for better or worse."""
    return not is_lookup(name) and name not in ENDINGS


def _split(task_id: str) -> Split:
    return "heldout" if task_id in heldout_task_ids() else ""
