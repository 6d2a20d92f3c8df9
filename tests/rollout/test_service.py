import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import FakeService, write_config  # noqa: E402

from pivotrl.config import RolloutConfig  # noqa: E402
from pivotrl.rollout import command  # noqa: E402
from pivotrl.rollout.service import RolloutService  # noqa: E402

WEIGHTS = [("w", torch.zeros(3))]


@pytest.fixture
def make(tmp_path):
    def make(extra=(), **options):
        config = RolloutConfig(**{"max_prompt_tokens": 100, "max_new_tokens": 50, "startup_timeout_s": 20.0} | options)
        service = FakeService(config, write_config(tmp_path / "model"), tmp_path / "logs", seed=0)
        service.extra = extra
        return service

    return make


def alive(pid):
    """Running, and not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, within_s=5.0):
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_starts_on_free_ports_and_stops_everything(make):
    with make(num_servers=2) as service:
        service.wait_ready()
        assert len(set(service.urls)) == 2
        assert [httpx.get(f"{url}/health").status_code for url in service.urls] == [200, 200]
        pids = [process.pid for server in service._servers for process in (server.process, server.watchdog)]
        assert all(map(alive, pids))
    assert gone(pids, within_s=0.0) and service.urls == []


def test_a_server_that_ends_early_fails_at_once_with_its_log(make):
    started = time.monotonic()
    with make(("--fail", "ValueError: this model is not supported")) as service:
        with pytest.raises(RuntimeError, match="ended with code 1(.|\n)*ValueError: this model is not supported"):
            service.wait_ready()
    assert time.monotonic() - started < 10


def test_a_taken_port_is_retried(make, tmp_path):
    with make(("--fail-once", str(tmp_path / "taken"))) as service:
        service.wait_ready()
        assert service._servers[0].port_retries == 1 and service.num_restarts == 0


def test_a_dead_server_is_restarted_with_the_newest_weights_before_it_serves(make):
    with make(max_restarts=1) as service:
        service.wait_ready()
        assert service.reported_versions() == [0]
        service.load_weights(WEIGHTS, version=7)
        service.ensure_alive()
        assert service.num_restarts == 0
        os.kill(service._servers[0].process.pid, signal.SIGKILL)
        time.sleep(0.2)
        service.ensure_alive()
        assert service.reported_versions() == [7] and service.num_restarts == 1
        os.kill(service._servers[0].process.pid, signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(RuntimeError, match="died 2 times"):
            service.ensure_alive()


def test_attached_servers_are_neither_started_nor_stopped(make):
    with make() as owner:
        owner.wait_ready()
        with make(urls=owner.urls) as attached:
            attached.wait_ready()
            assert attached.reported_versions() == [0] and attached.urls == owner.urls
            attached.load_weights(WEIGHTS, version=1)
            (file,) = attached.log_dir.glob("*/*.safetensors")
            assert file.name.startswith("version_1_") and attached.reported_versions() == [1]
        assert alive(owner._servers[0].process.pid)
        with make(urls=owner.urls) as attached:
            attached.wait_ready()
            owner.close()
            attached.config.startup_timeout_s = 1.0
            with pytest.raises(RuntimeError, match="not ours to restart and did not come back: no answer"):
                attached.ensure_alive()


ORPHAN_MAKER = """
import sys, time, torch
from pathlib import Path
from fake_server import FakeService, write_config
from pivotrl.config import RolloutConfig  # noqa: E402
folder = Path(sys.argv[1])
config = RolloutConfig(max_prompt_tokens=100, max_new_tokens=50, weights_dir=str(folder))
service = FakeService(config, write_config(folder / "model"), folder / "logs", seed=0)
service.start()
service.wait_ready()
service.load_weights([("w", torch.zeros(3))], version=1)
print(service._servers[0].process.pid, service._servers[0].watchdog.pid, flush=True)
time.sleep(60)
"""


def test_no_orphans_and_no_weights_survive_a_killed_parent(make, tmp_path):
    root, here = Path(__file__).parents[2], Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{here}"}
    command = [sys.executable, "-c", ORPHAN_MAKER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        parent.kill()
    assert gone(pids)
    (left,) = tmp_path.glob("pivotrl-weights-*")
    with make(weights_dir=str(tmp_path)) as service:
        service.load_weights(WEIGHTS, version=1)
        (first,) = set(tmp_path.glob("pivotrl-weights-*"))
        assert first != left
        with make(weights_dir=str(tmp_path)) as other:
            other.load_weights(WEIGHTS, version=1)
            assert first.exists() and len(set(tmp_path.glob("pivotrl-weights-*"))) == 2
    assert not list(tmp_path.glob("pivotrl-weights-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 500}, "600, but the model has 512 positions"),
        ({"num_servers": 0}, "give at least 1"),
        ({"gpus": [0, 1, 2], "num_servers": 2}, "needs 2"),
    ],
)
def test_impossible_configurations_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        RolloutService(RolloutConfig(), tmp_path, tmp_path, seed=0)


@pytest.fixture
def colocated(make, monkeypatch):
    """Two colocated servers, on a machine that looks as if it had CUDA."""
    monkeypatch.setattr(command, "on_cuda", lambda: True)
    with make(colocated=True, num_servers=2) as service:
        service.wait_ready()
        yield service


def calls(service):
    return [httpx.get(f"{server.url}/calls").json() for server in service._servers]


LOADING = ["/collective_rpc", "/start_weight_update", "/update_weights", "/finish_weight_update"]


def test_servers_sleep_until_a_push_wakes_the_weights_first_and_the_cache_after_loading(colocated):
    colocated.load_weights(WEIGHTS, version=1)
    before = calls(colocated)
    colocated.sleep()
    colocated.sleep()
    with pytest.raises(RuntimeError, match="the rollout servers sleep: call wake"):
        colocated.wait_ready()
    colocated.load_weights(WEIGHTS, version=2)
    woken = ["/sleep?level=2", "/wake_up?tags=weights", *LOADING, "/wake_up?tags=kv_cache", "/reset_prefix_cache"]
    assert [after[len(was) :] for was, after in zip(before, calls(colocated), strict=True)] == [woken, woken]
    assert colocated.reported_versions() == [2, 2]


def test_without_a_push_they_wake_with_the_weights_that_they_had(colocated):
    colocated.wake()
    assert calls(colocated) == [[], []]
    colocated.sleep()
    colocated.wake()
    light = ["/sleep?level=1", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"]  # nothing was pushed that could be loaded again
    assert calls(colocated) == [light, light]
    colocated.load_weights(WEIGHTS, version=1)
    before = calls(colocated)
    colocated.sleep()
    colocated.wake()
    colocated.wake()
    deep = ["/sleep?level=2", "/wake_up?tags=weights", *LOADING, "/wake_up?tags=kv_cache", "/reset_prefix_cache"]
    assert [after[len(was) :] for was, after in zip(before, calls(colocated), strict=True)] == [deep, deep]
    assert colocated.reported_versions() == [1, 1]


@pytest.mark.parametrize("asleep_when_it_dies", [True, False])
def test_a_server_that_dies_takes_no_memory_while_the_others_sleep(colocated, asleep_when_it_dies):
    colocated.load_weights(WEIGHTS, version=1)
    if asleep_when_it_dies:
        colocated.sleep()
    os.kill(colocated._servers[0].process.pid, signal.SIGKILL)
    colocated._servers[0].process.wait()
    colocated.sleep()
    time.sleep(0.5)
    assert colocated.num_restarts == 0
    assert colocated._servers[0].process is None or not alive(colocated._servers[0].process.pid)
    colocated.load_weights(WEIGHTS, version=2)
    colocated.ensure_alive()
    assert colocated.num_restarts == 1 and colocated.reported_versions() == [2, 2]
    assert calls(colocated)[0] == [*LOADING, "/reset_prefix_cache"]


def test_a_server_on_its_way_back_is_waited_for_before_all_sleep(colocated):
    colocated.load_weights(WEIGHTS, version=1)
    os.kill(colocated._servers[0].process.pid, signal.SIGKILL)
    time.sleep(0.2)
    colocated.failed(colocated._servers[0], time.monotonic(), "killed")
    colocated.sleep()
    assert colocated.num_restarts == 1 and [found[-1] for found in calls(colocated)] == ["/sleep?level=2"] * 2
    colocated.wake()
    assert colocated.reported_versions() == [1, 1]


def test_servers_of_their_own_gpus_never_sleep(make):
    with make() as service:
        service.load_weights(WEIGHTS, version=1)
        before = calls(service)
        service.sleep()
        service.wake()
        service.wait_ready()
        assert calls(service) == before


def test_a_machine_whose_servers_cannot_sleep_says_so_where_they_start(make):
    with pytest.raises(ValueError, match="vLLM's CPU build has no sleep mode"):
        make(colocated=True).start()
    with pytest.raises(ValueError, match="rollout.urls is for servers of others"):
        make(colocated=True, urls=["http://node:1"])
