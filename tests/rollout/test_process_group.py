"""Members are processes, as in life: gloo here; that NCCL takes the same way needs GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pivotrl.rollout import LEFT_ALONE, process_group
from pivotrl.rollout.process_group import BrokenGroup, Meeting, address_towards

MEMBER = """
import json, sys
import torch
from pivotrl.rollout import process_group
print("here", flush=True)
for line in sys.stdin:
    if line.startswith("{"):
        group = process_group.accept(json.loads(line), 0, torch.device("cpu"))
    else:
        flat = torch.zeros(int(line), dtype=torch.uint8)
        try:
            group.broadcast(flat)
            print(int(flat.sum()), flush=True)
        except process_group.BrokenGroup as error:
            print(error, flush=True)
"""


@pytest.fixture
def members():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", MEMBER], env=environment, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["here\n"] * 2
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def tell(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def gather(members, *, timeout_s):
    meeting = Meeting(1 + len(members), timeout_s=timeout_s)
    for rank, member in enumerate(members, start=1):
        tell(member, json.dumps(meeting.invitation("http://127.0.0.1:80", rank)))
    return meeting.join("127.0.0.1", lambda: False)


def test_everybody_gets_what_rank_0_sends_and_a_new_group_goes_on_without_the_dead(members):
    group = gather(members, timeout_s=60.0)
    for size in (1, 3_000_000):
        for member in members:
            tell(member, size)
        group.broadcast(torch.full((size,), 2, dtype=torch.uint8))
        assert [int(member.stdout.readline()) for member in members] == [2 * size] * 2
    members[0].kill()
    tell(members[1], 5_000_000)
    with pytest.raises(BrokenGroup, match=LEFT_ALONE):
        group.broadcast(torch.ones(5_000_000, dtype=torch.uint8))
    answer = members[1].stdout.readline()  # where gloo served it first, it has all
    assert LEFT_ALONE in answer or int(answer) == 5_000_000
    group = gather(members[1:], timeout_s=60.0)
    tell(members[1], 7)
    group.broadcast(torch.ones(7, dtype=torch.uint8))
    assert members[1].stdout.readline() == "7\n"


def test_a_member_that_hangs_ends_the_others_wait_at_the_timeout(members):
    group = gather(members, timeout_s=3.0)
    os.kill(members[0].pid, signal.SIGSTOP)
    tell(members[1], 20_000_000)
    started = time.monotonic()
    with pytest.raises(BrokenGroup, match=LEFT_ALONE):
        group.broadcast(torch.ones(20_000_000, dtype=torch.uint8))
    assert 1.0 < time.monotonic() - started < 3.0 + process_group.GRACE_S + 5.0


def test_a_rendezvous_ends_without_those_who_do_not_come(members):
    meeting = Meeting(3, timeout_s=1.0)
    tell(members[0], json.dumps(meeting.invitation("http://127.0.0.1:80", 1)))
    with pytest.raises(BrokenGroup, match="not all members came"):
        meeting.join("127.0.0.1", lambda: False)
    started = time.monotonic()
    with pytest.raises(BrokenGroup, match="not all members came"):
        Meeting(2, timeout_s=60.0).join("127.0.0.1", lambda: True)
    assert time.monotonic() - started < 10.0


def test_nobody_is_waited_for_at_a_meeting_that_is_over():
    meeting = Meeting(2, timeout_s=1.0)
    invitation = meeting.invitation("http://127.0.0.1:80", 1)
    del meeting
    with pytest.raises(BrokenGroup, match=LEFT_ALONE):
        process_group.accept(invitation, 0, torch.device("cpu"))


def test_servers_on_this_machine_reach_us_on_it():
    assert address_towards("http://127.0.0.1:8000") == address_towards("http://localhost") == "127.0.0.1"
