import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "rollout"))
from fake_server import hf_weights, new_service, token_logprobs, write_tiny_model  # noqa: E402

from pivotrl.rollout.broadcast import BroadcastTransport  # noqa: E402
from pivotrl.rollout.client import RolloutClient, SampleRequest  # noqa: E402
from pivotrl.rollout.transport import FileTransport  # noqa: E402
from pivotrl.weight_sync import check_logprobs, push  # noqa: E402

ROWS = [[(7 * i + 3 * j * j) % 256 for j in range(40 + i)] for i in range(6)]
DAMAGED = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_tiny_model(folder / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Two real servers. Buckets are small, so that the tiny model fills many."""
    options = {"num_servers": 2, "bucket_mib": 0.05, "max_restarts": 4, "request_timeout_s": 60.0}
    with new_service(tmp_path_factory.mktemp("fleet"), **options) as service:
        service.wait_ready()
        assert service.reported_versions() == [0, 0]
        yield service


@pytest.fixture(scope="module")
def client(fleet):
    with RolloutClient(fleet) as client:
        yield client


def use(fleet, transport):
    """Either transport, as at the start of a run; the servers take both."""
    fleet.ensure_alive()
    fleet.transport.close()
    fleet.transport = FileTransport(fleet.config, fleet.log_dir) if transport == "file" else BroadcastTransport(fleet.config)
    return fleet


@pytest.fixture(params=["file", "broadcast"])
def service(request, fleet):
    return use(fleet, request.param)


@pytest.fixture
def broadcast(fleet):
    return use(fleet, "broadcast")


def expect_policy(client, model, *, tolerance=1e-4):
    gap = check_logprobs(client, ROWS, [token_logprobs(model, row) for row in ROWS], max_mean_gap=tolerance)
    assert gap.max < tolerance
    return gap


def tell_workers(service, method, value, servers=(0, 1)):
    for index in servers:
        service._servers[index].request("POST", "/collective_rpc", {"method": method, "args": [value]})


def test_engines_follow_the_pushed_weights(service, client, models):
    first, second, _ = models
    push(hf_weights(first), service, version=1)
    expect_policy(client, first)
    with pytest.raises(RuntimeError, match="Probable causes: the engine serves older or other weights"):
        expect_policy(client, second)
    weights = hf_weights(second)
    report = push(weights, service, version=2)
    expect_policy(client, second)
    assert report.verified and report.version == 2 and service.reported_versions() == [2, 2] and not report.problems
    assert report.num_tensors == len(weights) and report.num_bytes == sum(t.nbytes for _, t in weights)
    again = push(weights, service, version=3)
    changed = push([(n, t + 1e-3 if n == "model.norm.weight" else t) for n, t in weights], service, version=4)
    assert again.checksum == report.checksum != changed.checksum


def test_both_ways_end_with_the_same_weights(fleet, client, models):
    weights, checksums = hf_weights(models[0]), []
    for version, transport in enumerate(["file", "broadcast"], start=1):
        checksums.append(push(weights, use(fleet, transport), version=version).checksum)
        expect_policy(client, models[0])
    assert checksums[0] == checksums[1] and len(fleet.transport._kept) > 5


def test_without_the_repair_the_check_catches_the_corruption(service, client, models):
    _, _, third = models
    tell_workers(service, "use_repair", False)
    try:
        push(hf_weights(third), service, version=4)
        with pytest.raises(RuntimeError, match="corrupted the experts"):
            expect_policy(client, third)
    finally:
        tell_workers(service, "use_repair", True)
    push(hf_weights(third), service, version=5)
    expect_policy(client, third)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], r"missing names \['lm_head.weight'\]"),
        (lambda w: [*w, ("model.extra.weight", torch.zeros(2))], r"unexpected names \['model.extra.weight'\]"),
        (lambda w: [*w[:-1], ("lm_head.weight", torch.zeros(260, 32))], r"lm_head.weight has shape \(260, 32\)"),
    ],
)
@pytest.mark.parametrize("transport", ["file", "broadcast"])
def test_incomplete_weights_are_refused_and_the_old_ones_stay(fleet, client, models, change, message, transport):
    first, second, _ = models
    service = use(fleet, "file")
    push(hf_weights(second), service, version=6)
    if transport == "broadcast":  # its first push, of which it knows nothing yet
        use(fleet, "broadcast")
    with pytest.raises(RuntimeError, match=message):
        push(change(hf_weights(first)), service, version=7)
    assert [server.version() for server in service._servers] == [6, 6]
    expect_policy(client, second)


def test_a_stream_that_turns_out_wrong_is_refused_and_the_servers_get_the_old_weights_again(broadcast, client, models):
    first, second, _ = models
    push(hf_weights(second), broadcast, version=6)
    restarts, weights = broadcast.num_restarts, hf_weights(first)
    with pytest.raises(RuntimeError, match="weights refused: missing names .'lm_head.weight'."):
        push(weights[:-1], broadcast, version=7)
    broadcast.ensure_alive()
    with pytest.raises(RuntimeError, match="lm_head.weight is float32 .1, 2. and was float32 .260, 64. in the push before"):
        push([*weights[:-1], ("lm_head.weight", torch.zeros(1, 2))], broadcast, version=7)
    broadcast.ensure_alive()
    assert broadcast.reported_versions() == [6, 6] and broadcast.version == 6 and broadcast.num_restarts == restarts
    expect_policy(client, second)


def test_corrupted_file_is_refused_with_the_tensors_name(fleet, client, models):
    first, second, _ = models
    push(hf_weights(second), use(fleet, "file"), version=8)
    tensors = {name: tensor.clone() for name, tensor in hf_weights(first)}
    file = fleet.transport.write(tensors, 9)
    tensors[DAMAGED].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, file.path)
    with pytest.raises(RuntimeError, match=f"checksum of {DAMAGED}"):
        fleet.transport.push_file(file, fleet._servers)
    expect_policy(client, second)
    assert not file.path.exists() and fleet.reported_versions() == [8, 8]


def test_a_server_that_gets_damaged_bytes_is_refused_by_name_and_gets_all_again_before_it_serves(broadcast, client, models):
    first, second, _ = models
    push(hf_weights(first), broadcast, version=8)
    events, restarts = [], broadcast.num_restarts
    broadcast.on_event = lambda event, values: events.append((event, values["server"], values["why"]))
    tell_workers(broadcast, "damage", 3, servers=[0])
    weights = [(name, tensor.detach()) for name, tensor in hf_weights(second)]
    report = push(weights, broadcast, version=9)
    (problem,) = report.problems
    broadcast.ensure_alive()
    assert events[0][:2] == ("server_down", 0) and events[0][2] == problem and events[1][:2] == ("server_up", 0)
    (info,) = (t for bucket in broadcast.transport._kept[3:4] for t in bucket.tensors[:1])
    assert f"checksum of {info.name} differs" in problem and report.verified and len(events) == 2
    assert broadcast.reported_versions() == [9, 9] and broadcast.num_restarts == restarts
    expect_policy(client, second)
    push(hf_weights(first), broadcast, version=10)
    expect_policy(client, first)
    broadcast.on_event = lambda event, values: None


def test_a_server_killed_in_the_middle_of_a_broadcast_is_dropped_and_comes_back_with_the_right_weights(broadcast, client, models):
    first, second, _ = models
    push(hf_weights(first), broadcast, version=11)
    victim, restarts = broadcast._servers[1], broadcast.num_restarts
    url, started = victim.url, time.monotonic()

    def weights():
        for i, pair in enumerate(hf_weights(second)):
            if i == 20:
                os.kill(victim.process.pid, signal.SIGKILL)
            yield pair

    report = push(weights(), broadcast, version=12)
    assert report.verified and report.problems[0].startswith(url)
    assert time.monotonic() - started < broadcast.config.request_timeout_s, "the survivor waited for the dead one's timeout"
    assert broadcast.reported_versions()[0] == 12
    broadcast.ensure_alive()
    assert broadcast.reported_versions() == [12, 12] and broadcast.num_restarts == restarts + 1
    expect_policy(client, second)
    report = push(hf_weights(first), broadcast, version=13)
    assert report.verified and not report.problems and broadcast.reported_versions() == [13, 13]
    expect_policy(client, first)


def test_names_that_come_twice_are_an_error(service, models):
    weights = hf_weights(models[0])
    with pytest.raises(ValueError, match="came twice"):
        push([*weights, weights[0]], service, version=10)


def test_ranks_without_a_service_only_read():
    read = []
    assert push(((read.append(n), (n, torch.zeros(1)))[1] for n in "ab"), None, version=1) is None
    assert read == ["a", "b"]


def test_only_the_newest_file_is_kept(fleet, models):
    service = use(fleet, "file")
    for version in (11, 12):
        push(hf_weights(models[version % 2]), service, version=version)
    (path,) = service.transport.path(12).parent.glob("*.safetensors")
    assert path.name.startswith("version_12_") and len(load_file(path)) == len(hf_weights(models[0]))


def test_killed_server_comes_back_with_the_newest_weights(fleet, client, models):
    _, _, third = models
    service = use(fleet, "file")
    push(hf_weights(third), service, version=13)
    requests = [SampleRequest(prompt=tuple(row), n=4, seed=i, max_tokens=250) for i, row in enumerate(ROWS)]
    requests[0] = SampleRequest(prompt=tuple(ROWS[0]), n=1, seed=0, max_tokens=1)
    before = client.metrics
    results = {}
    for index, completions in client.as_completed(requests):
        if not results:  # the one of a single token: all others are in flight
            os.kill(service._servers[0].process.pid, signal.SIGKILL)
        assert index not in results
        results[index] = completions
    assert len(results) == len(requests)
    service.ensure_alive()
    assert client.metrics.requests - before.requests == len(requests)
    assert client.metrics.restarts == before.restarts + 1 and client.metrics.retries > before.retries
    assert {completion.policy_version for completions in results.values() for completion in completions} == {13}
    assert service.reported_versions() == [13, 13]
    expect_policy(client, third)
