import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import FakeService, hf_weights, real_service, write_config, write_tiny_model  # noqa: E402

from pivotrl import preemption  # noqa: E402
from pivotrl.config import RolloutConfig  # noqa: E402
from pivotrl.rollout.client import RolloutClient, SampleRequest  # noqa: E402
from pivotrl.weight_sync import push  # noqa: E402


@pytest.fixture
def connect(tmp_path):
    opened = []

    def connect(**options):
        config = RolloutConfig(**{"max_prompt_tokens": 100, "max_new_tokens": 50, "startup_timeout_s": 20.0} | options)
        service = FakeService(config, write_config(tmp_path / "model"), tmp_path / "logs", seed=0)
        service.start()
        opened.extend([RolloutClient(service), service])
        return opened[-2]

    yield connect
    for thing in opened:
        thing.close()


@pytest.fixture
def serve(tmp_path):
    """Starts a server that is not the service's own; returns its process and address."""
    started = []

    def serve(port=None):
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        script = str(Path(__file__).with_name("fake_server.py"))
        started.append(subprocess.Popen([sys.executable, script, "--port", str(port), "--die-marker", str(tmp_path / "died")]))
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: healthy(url))
        return started[-1], url

    yield serve
    for process in started:
        process.kill()
        process.wait()


def healthy(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(ripe, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not ripe():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def load(service, version):
    """A weight sync as far as a fake server goes."""
    service.load_weights([("w", torch.zeros(3))], version=version)


def request(*prompt, key="", n=2, seed=0, max_tokens=3):
    return SampleRequest(prompt=prompt, n=n, seed=seed, max_tokens=max_tokens, routing_key=key)


def test_answers_come_in_order_and_are_counted(connect):
    client = connect()
    requests = [request(1, 2, i, n=3) for i in range(20)]
    results = client.sample(requests)
    assert [len(completions) for completions in results] == [3] * 20
    assert results == client.sample(requests)
    alone = client.sample([requests[7]])[0]
    assert alone == results[7] and len({completion.token_ids for completion in alone}) == 3
    metrics = client.metrics
    assert (metrics.requests, metrics.completions, metrics.prompt_tokens, metrics.completion_tokens) == (41, 123, 123, 369)
    assert metrics.retries == metrics.restarts == 0 and 0.1 < metrics.busy_s < 20


def test_neighbouring_seeds_share_no_sample(connect):
    client = connect()
    first, second = client.sample([request(1, seed=0, n=8), request(1, seed=1, n=8)])
    assert not {completion.token_ids for completion in first} & {completion.token_ids for completion in second}


def test_requests_in_flight_are_bounded_and_spread_by_routing_key(connect):
    client = connect(num_servers=2, max_inflight=3)
    client.sample([request(i, key="one trajectory") for i in range(8)])
    seen = [httpx.get(f"{url}/seen").json()["max_in_flight"] for url in client.service.urls]
    assert sorted(seen) == [0, 3]
    client.sample([request(i, key=f"trajectory {i}") for i in range(16)])
    assert all(httpx.get(f"{url}/seen").json()["max_in_flight"] for url in client.service.urls)


def test_results_keep_arriving_while_the_caller_works(connect):
    client = connect(max_inflight=1)
    results = client.as_completed([request(i) for i in range(10)])
    next(results)
    time.sleep(1.0)  # ten requests of 0.05 s
    assert client.metrics.requests == 10
    assert len(list(results)) == 9


def test_leaving_early_cancels_the_rest(connect):
    client = connect(max_inflight=1)
    results = client.as_completed([request(i) for i in range(100)])
    next(results)
    results.close()
    assert client.sample([request(1000)]) and client.metrics.requests < 10


def test_a_caller_may_ask_one_by_one(connect):
    client = connect(max_inflight=2)
    client.wait_ready()
    requests = [request(1, i, n=1) for i in range(5)]
    futures = [client.submit(one) for one in requests]
    assert [future.result(timeout=20) for future in futures] == client.sample(requests)
    with pytest.raises(ValueError, match="max_tokens 51"):
        client.submit(request(1, max_tokens=51))
    waiting = client.submit(request(2, n=1))
    waiting.cancel()
    assert waiting.cancelled() and client.submit(requests[0]).result(timeout=20) == futures[0].result()


def test_refused_requests_raise_the_servers_message(connect):
    client = connect()
    with pytest.raises(RuntimeError, match="status 400: prompt of 3 tokens not served"):
        client.sample([request(1), request(400, 1, 1)])
    assert client.metrics.retries == 0


def test_a_server_that_keeps_failing_is_given_up(connect):
    client = connect()
    with pytest.raises(RuntimeError, match="no answer in 5 attempts.* status 500"):
        client.sample([request(500)])


def test_too_long_requests_are_refused_before_anything_is_sent(connect):
    client = connect()
    with pytest.raises(ValueError, match=r"request 1 \('t'\) has 101 prompt tokens, rollout.max_prompt_tokens is 100"):
        client.as_completed([request(1), request(*range(101), key="t")])
    with pytest.raises(ValueError, match="max_tokens 51"):
        client.sample([request(1, max_tokens=51)])
    assert client.metrics.requests == 0


def test_a_server_killed_midway_costs_only_its_unfinished_requests(connect):
    client = connect(num_servers=2)
    requests = [request(i, key=str(i)) for i in range(40)]
    requests[30] = request(99, key="30")
    indices = [index for index, _ in client.as_completed(requests)]
    assert sorted(indices) == list(range(40))
    wait_until(lambda: client.metrics.restarts == 1)
    assert client.metrics.requests == 40 and client.metrics.retries >= 1


def test_a_request_that_fails_once_is_answered_by_another_server_and_nobody_is_restarted(connect):
    client = connect(num_servers=2)
    client.wait_ready()
    first = client.service.route(zlib.crc32(b"t"))
    assert len(client.sample([request(503, key="t"), request(1, key="t")])) == 2
    loads = {server.index: server.total for server in client.service._servers}
    wait_until(lambda: loads[first.index].failures == 1)
    assert [load.requests for load in loads.values()] == [1, 1] and client.metrics.retries == 1 and client.metrics.restarts == 0
    assert all(server.ready for server in client.service._servers)
    tokens = [row["tokens"] for row in client.service.take_metrics()]
    assert tokens == [6, 6] and [row["requests"] for row in client.service.take_metrics()] == [0, 0]


def test_the_others_go_on_while_a_server_is_away_and_get_none_of_its_old_weights(connect):
    client = connect(num_servers=3, startup_timeout_s=60.0)
    events = []
    client.service.on_event = lambda event, values: events.append((event, values["server"]))
    load(client.service, 1)
    keys = [str(i) for i in range(30)]
    at_home = [client.service.route(zlib.crc32(key.encode())).index for key in keys]
    victim = client.service._servers[0]
    launch, gate = client.service._launch, threading.Event()
    client.service._launch = lambda server: (gate.wait(30), launch(server))
    os.kill(victim.process.pid, signal.SIGKILL)
    results = client.sample([request(i, key=key) for i, key in enumerate(keys)])
    assert {completion.policy_version for completions in results for completion in completions} == {1}
    wait_until(lambda: events == [("server_down", 0)])
    assert victim.total.requests == 0 and victim.total.failures >= 1
    away = [client.service.route(zlib.crc32(key.encode())).index for key in keys]
    assert all(now == before for now, before in zip(away, at_home, strict=True) if before != 0), "others keep their trajectories"
    assert {now for now, before in zip(away, at_home, strict=True) if before == 0} == {1, 2}, "and share those of the dead one"
    load(client.service, 2)  # a weight sync without it
    assert client.service.reported_versions() == [2, 2]
    gate.set()
    wait_until(lambda: victim.ready)
    assert client.service.reported_versions() == [2, 2, 2] and events[1:] == [("server_up", 0)]
    assert [client.service.route(zlib.crc32(key.encode())).index for key in keys] == at_home
    assert [row["restarts"] for row in client.service.take_metrics()] == [1, 0, 0]


def test_an_attached_server_that_came_back_with_old_weights_is_noticed_by_its_answers(connect, serve, tmp_path):
    """A Slurm step restarts it behind our back, so fast that no request ever failed."""
    (old, url), address = serve(), tmp_path / "0.url"
    address.write_text(url)
    client = connect(urls=[str(address)], startup_timeout_s=30.0)
    events = []
    client.service.on_event = lambda event, values: events.append((event, values["url"]))
    load(client.service, 5)
    old.kill()
    old.wait()
    serve(port=int(url.rpartition(":")[2]))
    ((completion, *_),) = client.sample([request(1)])
    assert completion.policy_version == 5 and events == [("server_down", url), ("server_up", url)]


def test_an_attached_server_may_come_back_elsewhere(connect, serve, tmp_path):
    (old, url), address = serve(), tmp_path / "0.url"
    address.write_text(url)
    client = connect(urls=[str(address)], startup_timeout_s=30.0)
    load(client.service, 5)
    old.kill()
    old.wait()
    results = client.as_completed([request(1)])
    new, other = serve()
    address.write_text(f"{other}\n")
    ((_, (completion, *_)),) = list(results)
    assert completion.policy_version == 5 and client.service.urls == [other] != [url]


def test_a_server_without_restarts_left_is_given_up_and_the_run_goes_on(connect):
    client = connect(num_servers=2, max_restarts=0)
    events = []
    client.service.on_event = lambda event, values: events.append(event)
    client.wait_ready()
    os.kill(client.service._servers[1].process.pid, signal.SIGKILL)
    assert len(client.sample([request(i, key=str(i)) for i in range(10)])) == 10
    wait_until(lambda: events == ["server_down", "server_lost"])
    load(client.service, 3)
    assert client.service.reported_versions() == [3]
    os.kill(client.service._servers[0].process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="died 1 times"):
        client.sample([request(1)])


def test_asked_to_leave_the_batch_ends_with_what_is_there(connect, monkeypatch):
    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    client = connect(max_inflight=1)
    results = client.as_completed([request(i) for i in range(100)])
    next(results)
    received.append(signal.SIGUSR1)
    started = time.monotonic()
    assert len(list(results)) <= 1 and time.monotonic() - started < 2
    for ask in (lambda: client.sample([request(1), request(2)]), lambda: client.score([[1, 2], [3, 4]])):
        with pytest.raises(preemption.Preempted):
            ask()
    received.clear()
    assert len(client.sample([request(1), request(2)])) == 2


def test_restarts_end(connect):
    client = connect(max_restarts=0)
    with pytest.raises(RuntimeError, match="died 1 times"):
        client.sample([request(99)])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("model"), 5)
    service = real_service(tmp_path_factory)
    push(hf_weights(model), service, version=100)
    with RolloutClient(service) as client:
        yield client, model


PROMPT = tuple(random.Random(0).choices(range(256), k=150))


def sampling_logprobs(model, completion, temperature):
    row = torch.tensor([*PROMPT, *completion.token_ids])
    with torch.no_grad():
        logits = model(row[None]).logits[0, len(PROMPT) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, row[len(PROMPT) :, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_logprobs_are_those_of_the_sampling_distribution(real, temperature):
    client, model = real
    (completions,) = client.sample([SampleRequest(prompt=PROMPT, n=8, seed=1, max_tokens=40, temperature=temperature)])
    assert len({completion.token_ids for completion in completions}) == 8
    for completion in completions:
        assert completion.policy_version == 100
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 257 else "length")
        expected = sampling_logprobs(model, completion, temperature)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


def test_temperature_zero_is_greedy(real):
    client, model = real
    ((completion,),) = client.sample([SampleRequest(prompt=PROMPT, n=1, seed=1, max_tokens=20, temperature=0.0)])
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *completion.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    assert list(completion.token_ids) == logits.argmax(-1).tolist()


def test_the_stop_token_and_its_logprob_are_part_of_the_completion(real):
    client, model = real
    stops = tuple(range(0, 256, 4))
    (completions,) = client.sample([SampleRequest(prompt=PROMPT, n=8, seed=2, max_tokens=100, stop_token_ids=stops)])
    for completion in completions:
        assert completion.finish_reason == "stop" and completion.token_ids[-1] in (*stops, 257)
        assert not set(completion.token_ids[:-1]) & set(stops)
        assert torch.allclose(torch.tensor(completion.logprobs), sampling_logprobs(model, completion, 1.0), atol=1e-4)


def test_a_seed_gives_the_same_actions_in_any_company(real):
    client, _ = real
    wanted = SampleRequest(prompt=PROMPT, n=4, seed=3, max_tokens=20)
    (alone,) = client.sample([wanted])
    client.reset_prefix_cache()
    others = [SampleRequest(prompt=PROMPT[i:], n=4, seed=i, max_tokens=20) for i in range(10)]
    together = client.sample([*others, wanted])[-1]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]


def test_more_prompts_than_one_engine_step_takes(real):
    client, _ = real
    prompts = [tuple(random.Random(i).choices(range(256), k=190)) for i in range(60)]
    results = client.sample([SampleRequest(prompt=prompt, n=2, seed=i, max_tokens=4) for i, prompt in enumerate(prompts)])
    assert len(results) == 60 and client.metrics.restarts == client.metrics.retries == 0


def test_the_engine_refuses_what_it_cannot_do(real):
    client, _ = real
    with pytest.raises(RuntimeError, match="status 400"):
        client.sample([SampleRequest(prompt=PROMPT, n=1, seed=0, max_tokens=10, temperature=-1.0)])
