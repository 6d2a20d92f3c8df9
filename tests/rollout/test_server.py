"""One server alone; what a fleet makes of it is tested with the service and the client."""

import threading

import httpx
import pytest

from pivotrl.rollout.server import Load, Server, address, each, error_message, parse_version


def answering(handler, **options) -> Server:
    return Server(0, httpx.Client(transport=httpx.MockTransport(handler)), "http://server", **options)


def test_a_load_is_handed_out_once():
    server = answering(lambda request: httpx.Response(200))
    server.total.requests, server.total.seconds = 3, 1.5
    assert server.take_load() == Load(requests=3, seconds=1.5)
    server.total.requests += 1
    assert server.take_load() == Load(requests=1) and server.take_load() == Load() and server.total.requests == 4


@pytest.mark.parametrize(("text", "expected"), [("default", 0), ("0", 0), ("17", 17), ("updating", -1)])
def test_versions(text, expected):
    assert parse_version(text) == expected


def test_an_address_stands_in_the_entry_or_in_the_file_that_it_names(tmp_path):
    file = tmp_path / "server.url"
    assert address("http://node1:8000/") == "http://node1:8000" and address(str(file)) == ""
    file.write_text("http://node2:8000/\n")
    assert address(str(file)) == "http://node2:8000"


def test_no_answer_is_no_health_and_a_refusal_says_why():
    def refuse(request):
        raise httpx.ConnectError("nobody there")

    assert not answering(refuse).healthy() and not answering(lambda request: httpx.Response(503)).healthy()
    server = answering(lambda request: httpx.Response(400, json={"error": {"message": "no such route"}}))
    with pytest.raises(RuntimeError, match="GET http://server/weight_info failed with status 400: no such route"):
        server.version()
    assert error_message(httpx.Response(500, text="plain")) == "plain"


def test_a_server_that_took_the_weights_but_reports_others_is_refused():
    version = {"weight_version": "3", "success": True}
    server = answering(lambda request: httpx.Response(200, json=version))
    server.confirm(3)
    with pytest.raises(RuntimeError, match="reports policy version 3 after it was given 4"):
        server.confirm(4)
    version["success"] = False
    with pytest.raises(RuntimeError, match="has requests in flight"):
        server.confirm(3)


def test_all_servers_are_asked_at_once_and_the_silent_ones_named():
    together = threading.Barrier(2, timeout=5)

    def answer(request):
        together.wait()
        if request.url.host == "gone":
            raise httpx.ReadTimeout("timed out")
        return httpx.Response(200, json={})

    http = httpx.Client(transport=httpx.MockTransport(answer))
    servers = [Server(0, http, "http://here"), Server(1, http, "http://gone")]
    assert each(servers, lambda server: server.finish_update(1, timeout_s=1.0)) == {1: "http://gone: ReadTimeout timed out"}
    assert each([], lambda server: server.confirm(1)) == {}
    refusing = answering(lambda request: httpx.Response(500, json={"error": {"message": "no"}}))
    with pytest.raises(RuntimeError, match="status 500: no"):
        each([refusing], lambda server: server.wake("weights", timeout_s=1.0))
