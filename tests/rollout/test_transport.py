"""The way through a file; that engines then hold the weights is tested with real ones in tests/test_weight_sync.py."""

import json

import httpx
import pytest
import torch
from safetensors.torch import load_file

from pivotrl.config import RolloutConfig, WeightTransport
from pivotrl.rollout import tensor_checksum
from pivotrl.rollout.broadcast import BroadcastTransport
from pivotrl.rollout.server import Server
from pivotrl.rollout.transport import FileTransport, make_transport

WEIGHTS = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(3))]


@pytest.fixture
def transport(tmp_path):
    transport = FileTransport(RolloutConfig(weights_dir=str(tmp_path / "weights")), tmp_path)
    yield transport
    transport.close()
    assert list((tmp_path / "weights").glob("*")) == []


def serving(answer=lambda path: httpx.Response(200, json={}), index=0):
    calls = []

    def handle(request):
        calls.append((request.url.path, json.loads(request.content or b"{}")))
        return answer(request.url.path)

    return Server(index, httpx.Client(transport=httpx.MockTransport(handle)), "http://server"), calls


def test_the_config_chooses():
    assert isinstance(make_transport(RolloutConfig(), None), FileTransport)
    assert isinstance(make_transport(RolloutConfig(weight_transport=WeightTransport.broadcast), None), BroadcastTransport)


def test_a_server_is_told_the_file_and_every_checksum_and_an_old_update_is_forgotten_first(transport):
    server, calls = serving()
    assert transport.version is None
    pushed = transport.push(iter(WEIGHTS), 3, [server])
    paths = [path for path, _ in calls]
    assert paths == ["/collective_rpc", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert calls[0][1] == {"method": "abandon_weight_update"} and calls[3][1] == {"weight_version": "3"}
    update = calls[2][1]["update_info"]
    assert update["checksums"] == {name: tensor_checksum(tensor) for name, tensor in WEIGHTS}
    assert all(torch.equal(load_file(update["path"])[name], tensor) for name, tensor in WEIGHTS)
    assert transport.version == 3 and pushed.problems == {} and [info.name for info in pushed.tensors] == ["a", "b"]


def test_a_refused_file_goes_and_the_one_before_stays(transport):
    server, calls = serving()
    transport.push(iter(WEIGHTS), 3, [server])
    refusing, _ = serving(lambda path: httpx.Response(500 if path == "/update_weights" else 200, json={"error": {"message": "refused"}}))
    with pytest.raises(RuntimeError, match="refused"):
        transport.push(iter(WEIGHTS), 4, [refusing])
    assert transport.version == 3 and transport.load([server]) == {}
    assert calls[-1][1] == {"weight_version": "3"}
    (left,) = transport.path(5).parent.glob("*.safetensors")
    assert left.name.startswith("version_3_")


def test_a_silent_server_is_a_problem_of_its_own(transport):
    def gone(path):
        raise httpx.ConnectError("nobody there")

    silent, (server, _) = serving(gone, index=1)[0], serving()
    pushed = transport.push(iter(WEIGHTS), 3, [server, silent])
    assert pushed.problems == {1: "http://server: ConnectError nobody there"} and transport.version == 3


def test_a_name_that_comes_twice_is_refused(transport):
    with pytest.raises(ValueError, match="'a' came twice"):
        transport.push([*WEIGHTS, WEIGHTS[0]], 1, [])
    transport.path(1)
