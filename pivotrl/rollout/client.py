"""Samples actions from the rollout service: token ids in, token ids and rollout logprobs out."""

import asyncio
import concurrent.futures
import hashlib
import queue
import threading
import time
import zlib
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from pivotrl import preemption
from pivotrl.rollout.server import Server, error_message, parse_version
from pivotrl.rollout.service import RolloutService
from pivotrl.types import Completion, Record

MAX_ATTEMPTS = 5
# vLLM closes idle connections after 5 s; leaving first avoids writing into a closing one
KEEPALIVE_S = 3.0
POLL_S = 0.2
NO_LOGPROB = -9999.0


class SampleRequest(Record):
    """`n` actions from one history. `routing_key` (the trajectory id) picks the server, so that prefixes are cached there.

    Equal requests give equal actions on equal weights; different seeds share nothing. Generation ends with a token of
    `stop_token_ids` or the model's end-of-sequence token, which is part of the completion, or after `max_tokens`.
    """

    prompt: tuple[int, ...]
    n: int
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    routing_key: str = ""


@dataclass
class RolloutMetrics:
    """Counters since the client was made. `busy_s`: seconds with at least one request in flight."""

    requests: int = 0
    completions: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    restarts: int = 0
    busy_s: float = 0.0


class _Logprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Logprob]


class _Span(msgspec.Struct):
    version: str


class _Choice(msgspec.Struct):
    index: int
    finish_reason: str
    token_ids: list[int]
    logprobs: _Logprobs
    weight_versions: list[_Span] | None = None

    def policy_version(self) -> int:
        """The oldest of the versions that its tokens come from."""
        return min((parse_version(span.version) for span in self.weight_versions or ()), default=0)


class _Generated(msgspec.Struct):
    choices: list[_Choice]


class _Scored(msgspec.Struct):
    prompt_logprobs: list[dict[str, _Logprob] | None]


class _Connections:
    """An HTTP client for each request in flight: httpx's pool looks at all of its connections whenever a request comes or goes, which at
    64 of them took 4.5 ms of processor time a request instead of 0.9."""

    def __init__(self, timeout_s: float):
        self._timeout_s, self._idle, self._ssl = timeout_s, list[httpx.AsyncClient](), httpx.create_ssl_context()

    async def post(self, url: str, content: bytes) -> httpx.Response:
        http = self._idle.pop() if self._idle else self._open()
        try:
            return await http.post(url, content=content, headers={"content-type": "application/json"})
        finally:
            self._idle.append(http)

    def _open(self) -> httpx.AsyncClient:
        limits = httpx.Limits(keepalive_expiry=KEEPALIVE_S)
        return httpx.AsyncClient(limits=limits, timeout=self._timeout_s, trust_env=False, verify=self._ssl)

    async def aclose(self) -> None:
        for http in self._idle:
            await http.aclose()


class RolloutClient:
    """Keeps up to config.max_inflight requests in flight over all servers; survives servers that die.

    Requests run on a thread of the client's own, so results keep arriving while the caller works on earlier ones.
    """

    def __init__(self, service: RolloutService):
        self.service, self.config = service, service.config
        self._metrics = RolloutMetrics()
        self._in_flight, self._busy_since = 0, 0.0
        self._looks: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
        self._thread.start()
        self._run(self._open()).result()

    def __enter__(self) -> "RolloutClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connections and the thread; a second call does nothing."""
        if self._thread.is_alive():
            self._run(self._drop()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @property
    def metrics(self) -> RolloutMetrics:
        """A snapshot of the counters."""
        busy_s = self._metrics.busy_s + (time.monotonic() - self._busy_since if self._in_flight else 0.0)
        return RolloutMetrics(**vars(self._metrics) | {"busy_s": busy_s, "restarts": self.service.num_restarts})

    def wait_ready(self) -> None:
        """Block until the servers can be asked; see RolloutService.wait_ready."""
        self.service.wait_ready()

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """`n` completions for each request, in order; errors as in `as_completed`, and Preempted when asked to leave meanwhile."""
        completions: dict[int, list[Completion]] = dict(self.as_completed(requests))
        if len(completions) < len(requests):
            preemption.check("nothing of this batch is kept")
        return [completions[i] for i in range(len(requests))]

    def as_completed(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index of the request, its completions) as they finish. Leaving the iterator early cancels the rest.

        When the process is asked to leave, the iterator ends and cancels the rest itself: compare how many came.

        Raises:
            ValueError: a prompt is longer than config.max_prompt_tokens or max_tokens than config.max_new_tokens; nothing was sent.
            RuntimeError: a server refused a request (its message is shown), or the service could not be kept alive.
        """
        for i, request in enumerate(requests):
            self._check_lengths(i, request)
        self.service.wait_ready()
        return self._gather((self._sample(request) for request in requests), stoppable=True)

    def submit(self, request: SampleRequest) -> concurrent.futures.Future[list[Completion]]:
        """One request whose completions arrive in the returned Future, errors included; for callers whose next request depends on
        an answer. Call `wait_ready` once before the first; cancel the Futures that nobody waits for any more.

        Raises:
            ValueError: as in `as_completed`; nothing was sent.
        """
        self._check_lengths(0, request)
        return self._run(self._sample(request))

    def score(self, token_rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Engine logprobs of given tokens at temperature 1: entry t of a row is log p(row[t + 1] | row[: t + 1]).

        The servers take turns, so that as many rows as servers reach all of them. Raises Preempted when asked to leave meanwhile.
        """
        self.service.wait_ready()
        scores = dict(self._gather((self._score(i, list(row)) for i, row in enumerate(token_rows)), stoppable=True))
        if len(scores) < len(token_rows):
            preemption.check("nothing of this check is kept")
        return [scores[i] for i in range(len(token_rows))]

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes on every server; RuntimeError while requests are in flight."""
        self.service.reset_prefix_cache()

    def _check_lengths(self, index: int, request: SampleRequest) -> None:
        if len(request.prompt) > self.config.max_prompt_tokens:
            raise ValueError(
                f"request {index} ({request.routing_key!r}) has {len(request.prompt)} prompt tokens, rollout.max_prompt_tokens is "
                f"{self.config.max_prompt_tokens}: exclude and count over-long prompts before sampling"
            )
        if request.max_tokens > self.config.max_new_tokens:
            raise ValueError(f"request {index} has max_tokens {request.max_tokens}, rollout.max_new_tokens is {self.config.max_new_tokens}")

    def _run(self, work: Coroutine) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _gather(self, works: Iterable[Coroutine], *, stoppable: bool = False) -> Iterator[tuple[int, Any]]:
        futures = {self._run(work): i for i, work in enumerate(works)}
        finished: queue.SimpleQueue[concurrent.futures.Future] = queue.SimpleQueue()
        for future in list(futures):
            future.add_done_callback(finished.put)
        try:
            while futures and not (stoppable and preemption.requested()):
                try:
                    future = finished.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                yield futures.pop(future), future.result()
        finally:
            for future in futures:
                future.cancel()

    async def _open(self) -> None:
        self._http = _Connections(self.config.request_timeout_s)
        self._slots = asyncio.Semaphore(self.config.max_inflight)

    async def _drop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    async def _sample(self, request: SampleRequest) -> list[Completion]:
        body = {
            "token_ids": request.prompt,
            "sampling_params": {
                "n": request.n,
                # vLLM seeds sample i with seed + i: scrambled, or neighbouring seeds would share samples
                "seed": int.from_bytes(hashlib.blake2b(str(request.seed).encode(), digest_size=8).digest()) >> 1,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_tokens": request.max_tokens,
                "stop_token_ids": request.stop_token_ids,
                "logprobs": 0,
                "detokenize": False,
            },
        }
        generated = await self._post(zlib.crc32(request.routing_key.encode()), body, _Generated)
        completions = [_completion(choice) for choice in sorted(generated.choices, key=lambda choice: choice.index)]
        if len(completions) != request.n:
            raise RuntimeError(f"the rollout server returned {len(completions)} completions for n={request.n}")
        self._metrics.requests += 1
        self._metrics.completions += len(completions)
        self._metrics.prompt_tokens += len(request.prompt)
        self._metrics.completion_tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    async def _score(self, index: int, row: list[int]) -> list[float]:
        body = {"token_ids": row, "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}}
        scored = await self._post(index, body, _Scored)
        return [entry[str(token)].logprob for token, entry in zip(row[1:], scored.prompt_logprobs[1:], strict=True)]

    async def _post[T](self, route: int, body: dict[str, Any], answer: type[T]) -> T:
        """One request until it is answered: the only place that tries again, first on another server."""
        content = msgspec.json.encode(body)
        failed: Server | None = None
        async with self._slots:
            self._count_in_flight(1)
            try:
                for attempt in range(1, MAX_ATTEMPTS + 1):
                    server = await self._server(route, failed)
                    sent_at = time.monotonic()
                    found = await self._ask(server, content, answer)
                    if not isinstance(found, str):
                        self._count_load(server, found, sent_at)
                        return found
                    self._metrics.retries += 1
                    look = asyncio.create_task(self._look(server, sent_at, found, pause_s=0.2 * attempt))
                    self._looks.add(look)  # the loop itself keeps no hold on its tasks
                    look.add_done_callback(self._looks.discard)
                    if failed is not None or self.service.route(route, server) is server:
                        await look
                    failed = server
                raise RuntimeError(f"{server.url}: no answer in {MAX_ATTEMPTS} attempts, although the server is alive; last: {found}")
            finally:
                self._count_in_flight(-1)

    async def _server(self, route: int, avoid: Server | None) -> Server:
        """The server to ask; waits while all are away."""
        while (server := self.service.route(route, avoid)) is None:
            await asyncio.sleep(POLL_S)
        return server

    async def _ask[T](self, server: Server, content: bytes, answer: type[T]) -> T | str:
        """The answer, or what was wrong with it. Raises RuntimeError when the server refuses the request."""
        url = f"{server.url}/inference/v1/generate"
        try:
            response = await self._http.post(url, content)
        except httpx.TransportError as error:
            return f"{type(error).__name__} {error}"
        if response.is_client_error:
            raise RuntimeError(f"{url} refused a request, status {response.status_code}: {error_message(response)}")
        if not response.is_success or b'"finish_reason":"abort"' in response.content:
            return f"status {response.status_code}: {error_message(response)}"
        found = msgspec.json.decode(response.content, type=answer)
        versions = {choice.policy_version() for choice in found.choices} if isinstance(found, _Generated) else set()
        if self.service.version is not None and versions - {self.service.version}:
            return f"sampled by policy version {min(versions)} instead of {self.service.version}"
        return found

    async def _look(self, server: Server, sent_at: float, why: str, *, pause_s: float) -> None:
        """One look at the server serves all requests that failed there before it."""
        await asyncio.sleep(pause_s)  # a dying engine still answers for a moment
        await asyncio.to_thread(self.service.failed, server, sent_at, why)

    def _count_load(self, server: Server, found: Any, sent_at: float) -> None:
        server.total.requests += 1
        server.total.seconds += time.monotonic() - sent_at
        if isinstance(found, _Generated):
            server.total.tokens += sum(len(choice.token_ids) for choice in found.choices)

    def _count_in_flight(self, change: int) -> None:
        now = time.monotonic()
        if self._in_flight:
            self._metrics.busy_s += now - self._busy_since
        self._in_flight += change
        self._busy_since = now


def _completion(choice: _Choice) -> Completion:
    logprobs = tuple(entry.logprob for entry in choice.logprobs.content)
    if len(logprobs) != len(choice.token_ids) or NO_LOGPROB in logprobs:
        raise RuntimeError(f"the rollout server returned {len(choice.token_ids)} tokens with logprobs {logprobs}")
    return Completion(
        token_ids=tuple(choice.token_ids),
        logprobs=logprobs,
        finish_reason=choice.finish_reason,
        policy_version=choice.policy_version(),
    )
