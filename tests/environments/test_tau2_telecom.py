"""The telecom world: protocol, errors as answers, determinism, and the two leaks of tau2 that are closed here."""

import pytest

from pivotrl.config import DomainConfig
from pivotrl.environments import build_environment
from pivotrl.environments.tau2_telecom import DONE, TRANSFER, TelecomEnvironment, heldout_task_ids, is_lookup, is_tool, task_ids
from pivotrl.types import Action, ToolCall

DOMAIN = DomainConfig(
    name="tau2_telecom", source="tau2_telecom", verifier="state_equality", environment="tau2_telecom", system_prompt=False
)
AIRPLANE = "[service_issue]airplane_mode_on[PERSONA:None]"
LOCKED_SIM = "[service_issue]lock_sim_card_pin[PERSONA:Hard]"


def make(*faults: str, kind: str = "service_issue") -> TelecomEnvironment:
    """The world of the first task with exactly these faults."""
    task_id = next(t for t in task_ids() if t.partition("[PERSONA")[0] == f"[{kind}]{'|'.join(faults)}")
    return TelecomEnvironment(DOMAIN, {"task_id": task_id})


def act(name: str, **arguments: object) -> Action:
    return Action(tool_calls=(ToolCall(name=name, arguments=arguments, id="call_0"),))


def test_repair_of_airplane_mode_is_rewarded():
    environment = make("airplane_mode_on")
    assert environment.reward() == 0.0
    (answer,), ended = environment.step(act("toggle_airplane_mode"))
    assert (answer.role, answer.tool_call_id, ended) == ("tool", "call_0", False)
    assert answer.content.startswith("Airplane Mode is now OFF.")
    assert environment.reward() == 1.0
    assert environment.step(act(DONE)) == ((), True)


def test_build_environment_and_messages():
    task_id = task_ids()[0]
    with_policy = build_environment(DomainConfig(name="t", environment="tau2_telecom"), {"task_id": task_id}).reset()
    (ticket,) = build_environment(DOMAIN, {"task_id": task_id}).reset()
    assert [message.role for message in with_policy] == ["system", "user"]
    assert with_policy[1] == ticket and "phone number: 555-123-2002" in ticket.content
    assert "# Telecom Agent Policy" in with_policy[0].content and DONE in with_policy[0].content


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="'task_id' must be one of tau2's 2285"):
        TelecomEnvironment(DOMAIN, {"task_id": "nope"})


@pytest.mark.parametrize(
    ("action", "role", "text"),
    [
        (act("open_door"), "tool", "Error: Tool 'open_door' not found."),
        (act("_set_bill_to_paid", bill_id="B1002"), "tool", "not found"),
        (act("turn_airplane_mode_off"), "tool", "not found"),
        (act("check_sim_status", verbose=True), "tool", "takes no argument named verbose"),
        (act("refuel_data", customer_id="C1001"), "tool", "Error: line_id: Field required; gb_amount: Field required"),
        (act("refuel_data", customer_id="C1001", line_id="L1002", gb_amount=True), "tool", "gb_amount: Input should be a valid number"),
        (act("refuel_data", customer_id="C1001", line_id="L1002", gb_amount=10**400), "tool", "Error: gb_amount"),
        (act("set_network_mode_preference", mode=["4g_only"]), "tool", "Error: mode"),
        (act("get_details_by_id", id="X1"), "tool", "Error: Unknown ID format or type: X1"),
        (act("get_details_by_id", requestor="user", id="L1002"), "tool", "takes no argument named requestor"),
        (act(DONE, summary="ok"), "tool", "done takes no argument named summary"),
        (act(TRANSFER), "tool", "summary: Field required"),
        (Action(content="Hello?"), "user", "tool calls only"),
        (Action(malformed="no JSON object"), "user", "no JSON object"),
    ],
)
def test_faulty_actions_are_answered_and_change_nothing(action: Action, role: str, text: str):
    environment = make("airplane_mode_on")
    before = environment.state_hash()
    (answer,), ended = environment.step(action)
    assert (answer.role, ended) == (role, False)
    assert text in answer.content
    assert environment.state_hash() == before


def test_calls_behind_an_ending_call_do_not_run():
    environment = make("airplane_mode_on")
    names = ("check_sim_status", DONE, "toggle_airplane_mode")
    answers, ended = environment.step(Action(tool_calls=tuple(ToolCall(name=name, id=name) for name in names)))
    assert ended and [answer.tool_call_id for answer in answers] == ["check_sim_status"]
    assert environment.reward() == 0.0


def test_only_a_transfer_solves_a_hopeless_task():
    environment = make("lock_sim_card_pin")
    assert environment.fork().reward() == 0.0  # tau2's assertion (still no service) holds from the start
    environment.step(act(DONE))
    assert environment.reward() == 0.0
    environment.reset()
    assert environment.step(act(TRANSFER, summary="locked")) == ((), True)
    assert environment.reward() == 1.0


def test_fork_is_independent_and_reset_restores():
    environment = make("airplane_mode_on")
    before = environment.state_hash()
    twin = environment.fork()
    twin.step(act("toggle_airplane_mode"))
    assert environment.state_hash() == before != twin.state_hash()
    twin.reset()
    assert twin.state_hash() == before


def test_payment_reaches_the_bill():
    environment = make("overdue_bill_suspension")
    for action in (act("send_payment_request", customer_id="C1001", bill_id="B1234321"), act("make_payment")):
        environment.step(action)
    (answer,), _ = environment.step(act("get_details_by_id", id="B1234321"))
    assert '"status": "Paid"' in answer.content


def test_new_bills_have_repeatable_names():
    hashes = set()
    for _ in range(2):
        environment = make("airplane_mode_on")
        (answer,), _ = environment.step(act("refuel_data", customer_id="C1002", line_id="L1004", gb_amount=1))
        assert "Successfully added" in answer.content
        hashes.add(environment.state_hash())
        (answer,), _ = environment.step(act("get_details_by_id", id="C1002"))
        assert '"B000' in answer.content
    assert len(hashes) == 1


def test_a_broken_vpn_does_not_leak_into_the_next_episode():
    def connect() -> str:
        environment = make("airplane_mode_on")
        environment.step(act("connect_vpn"))
        return environment.state_hash()

    before = connect()
    make("bad_vpn", kind="mobile_data_issue")
    assert connect() == before


def test_tools_are_schemas_of_everything_that_can_be_called():
    schemas = make("airplane_mode_on").tools()
    names = [schema["function"]["name"] for schema in schemas]
    assert len(names) == len(set(names)) == 44 and DONE in names
    assert all(schema["type"] == "function" and is_tool(schema["function"]["name"]) for schema in schemas)
    assert is_lookup("check_sim_status") and not any(is_lookup(n) for n in ("reboot_device", DONE, TRANSFER, "unknown"))


def test_tasks_and_heldout_split():
    assert len(task_ids()) == 2285 and len(heldout_task_ids()) == 40
    assert heldout_task_ids() <= set(task_ids())
