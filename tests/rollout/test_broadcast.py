"""Faults of a broadcast among stand-ins for vLLM that receive and check as the real one does; real engines: tests/test_weight_sync.py."""

import os
import signal
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import FakeService, write_config  # noqa: E402

from pivotrl.config import RolloutConfig, WeightTransport  # noqa: E402
from pivotrl.rollout import server, tensor_checksum  # noqa: E402

OPTIONS = {"max_prompt_tokens": 100, "max_new_tokens": 50, "startup_timeout_s": 120.0, "request_timeout_s": 8.0, "bucket_mib": 0.01}


def start(folder, **options):
    config = RolloutConfig(**OPTIONS | {"weight_transport": WeightTransport.broadcast} | options)
    service = FakeService(config, write_config(folder / "model"), folder / "logs", seed=0)
    service.extra = ("--receives",)
    service.start()
    service.wait_ready()
    return service


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    service = start(tmp_path_factory.mktemp("fleet"), num_servers=3, max_restarts=20)
    yield service
    service.close()


@pytest.fixture
def service(fleet):
    """Three servers that hold version 1, the first push of a transport's life."""
    fleet.ensure_alive()
    fleet.transport.close()
    fleet.on_event = lambda event, values: None
    assert fleet.load_weights(weights(1), version=1).problems == {}
    return fleet


def weights(seed, size=1000):
    generator = torch.Generator().manual_seed(seed)
    return [(f"w{i}", torch.randn(size, generator=generator)) for i in range(8)]


def checksums(pairs):
    return {name: tensor_checksum(tensor) for name, tensor in pairs}


def ask(one, route):
    return httpx.get(f"{one.url}{route}").json()


def hold(service, pairs, version):
    """Whether all servers serve these weights, once those that are away have come back."""
    service.ensure_alive()
    received = [ask(each, "/received") for each in service._servers]
    return service.reported_versions() == [version] * len(received) and all(found == checksums(pairs) for found in received)


def at(index, happens, pairs):
    """The pairs; before the one of this index is gathered, something happens."""
    for i, pair in enumerate(pairs):
        if i == index:
            happens()
        yield pair


def damage(service, one):
    path = service.log_dir / "damage"
    path.write_text(one.url.rpartition(":")[2])
    return path


def test_all_get_all_names_and_shapes_before_any_bytes_and_the_group_stays(service):
    calls = ask(service._servers[0], "/calls")
    service.load_weights(weights(2), version=2)
    assert hold(service, weights(2), 2) and len(service.transport._kept) == 4
    one_push = ["/start_weight_update", "/update_weights", "/update_weight_version", *["/update_weights"] * 4, "/finish_weight_update"]
    assert calls == ["/collective_rpc", "/init_weight_transfer_engine", *one_push, "/reset_prefix_cache"]
    assert ask(service._servers[0], "/calls")[len(calls) :] == [*one_push, "/reset_prefix_cache"]


def test_the_next_bucket_is_gathered_while_the_last_one_travels(service, monkeypatch):
    send, gathered = service.transport._send, threading.Event()

    def slow(number, bucket, servers):
        if number == 0:
            assert gathered.wait(20), "nothing was gathered meanwhile"
        send(number, bucket, servers)

    monkeypatch.setattr(service.transport, "_send", slow)
    assert service.load_weights(at(3, gathered.set, weights(2)), version=2).problems == {}  # two tensors a bucket
    assert service.reported_versions() == [2, 2, 2]


def test_a_server_that_hangs_is_named_dropped_and_restarted_and_the_others_get_everything(service, monkeypatch):
    monkeypatch.setattr(server, "HEALTH_TIMEOUT_S", 2.0)
    service.transport.close()
    pairs = [(name, tensor.repeat(4000)) for name, tensor in weights(2)]  # more than the sockets on the way take in
    service.load_weights(pairs, version=2)
    hung, url, restarts = service._servers[2], service._servers[2].url, service.num_restarts
    pushed = service.load_weights(at(4, lambda: os.kill(hung.process.pid, signal.SIGSTOP), pairs), version=3)
    assert list(pushed.problems) == [2] and pushed.problems[2].startswith(url) and "Timeout" in pushed.problems[2]
    assert service.reported_versions()[:2] == [3, 3] and ask(service._servers[1], "/received").items() >= checksums(pairs).items()
    assert hold(service, pairs, 3) and service.num_restarts == restarts + 1


def test_a_server_whose_bytes_are_always_damaged_never_serves_and_the_run_is_told_the_tensor(tmp_path):
    service = start(tmp_path, max_restarts=0)
    try:
        service.load_weights(weights(1), version=1)
        (only,) = service._servers
        damage(service, only)
        with pytest.raises(RuntimeError, match="weights refused: checksum of w0 differs from what the sender sent"):
            service.load_weights(weights(2), version=2)
        assert not only.ready and only.version() == -1
    finally:
        service.close()


def test_one_damaged_server_leaves_the_rotation_until_it_has_everything(service, monkeypatch):
    told, load, restarts = [], service.transport.load, service.num_restarts
    service.on_event = lambda event, values: told.append((event, values["server"], values["why"]))
    path = damage(service, service._servers[1])

    def mend_then_load(servers):
        path.unlink()
        assert not servers[0].ready and servers[0].version() == -1
        return load(servers)

    monkeypatch.setattr(service.transport, "load", mend_then_load)
    pushed = service.load_weights(weights(2), version=2)
    assert list(pushed.problems) == [1] and "checksum of w0" in pushed.problems[1]
    assert hold(service, weights(2), 2) and service.num_restarts == restarts
    assert [(event, index) for event, index, _ in told] == [("server_down", 1), ("server_up", 1)] and told[0][2] == pushed.problems[1]
    assert service.load_weights(weights(3), version=3).problems == {} and hold(service, weights(3), 3)


def test_attached_servers_take_the_same_way_also_after_a_trainer_that_died(service, tmp_path):
    first = start(tmp_path, urls=service.urls)
    first.load_weights(weights(1), version=1)
    first._servers[0].request("POST", "/update_weight_version", {"new_version": "updating"})
    first.close()
    second = start(tmp_path, urls=service.urls)
    assert second.reported_versions() == [-1, 1, 1]
    assert second.load_weights(weights(2), version=5).problems == {} and hold(second, weights(2), 5)
    second.close()
    service.load_weights(weights(3), version=6)


def test_a_server_that_dies_between_pushes_gets_the_weights_from_the_senders_copy(service):
    restarts = service.num_restarts
    os.kill(service._servers[0].process.pid, signal.SIGKILL)
    assert hold(service, weights(1), 1) and service.num_restarts == restarts + 1
    assert service.load_weights(weights(2), version=2).problems == {} and hold(service, weights(2), 2)


def test_gathering_goes_on_to_its_end_when_all_servers_are_gone(service):
    read = []

    def kill_all():
        for each in service._servers:
            os.kill(each.process.pid, signal.SIGKILL)

    pairs = ((read.append(name), (name, tensor))[1] for name, tensor in at(3, kill_all, weights(2)))
    pushed = service.load_weights(pairs, version=2)
    assert len(read) == 8 and sorted(pushed.problems) == [0, 1, 2] and hold(service, weights(2), 2)
