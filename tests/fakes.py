"""Stand-ins around the real Sampler, Renderer and VerifierPool: a client that answers from a script and a toy verifier."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from pivotrl import preemption
from pivotrl.config import DomainConfig, RolloutConfig
from pivotrl.local_rollouts import Sampler
from pivotrl.records import write_json
from pivotrl.render import Renderer
from pivotrl.rollout.client import RolloutMetrics, SampleRequest
from pivotrl.tokenizer import train_tokenizer
from pivotrl.types import Action, Candidate, Completion, Message, Verdict
from pivotrl.verifiers.pool import VerifierPool


@functools.cache
def renderer() -> Renderer:
    """The compact template on a tokenizer of little more than bytes."""
    return Renderer(train_tokenizer(["the right answer"], 300))


def completion(text: str, *, version: int = 0, finish_reason: str = "stop") -> Completion:
    tokens = tuple(renderer().tokenizer.encode(text, add_special_tokens=False))
    if finish_reason == "stop":
        tokens += (renderer().end_id,)
    logprobs = tuple(-(i + 1) / 100 for i in range(len(tokens)))
    return Completion(token_ids=tokens, logprobs=logprobs, finish_reason=finish_reason, policy_version=version)


class ScriptedClient:
    """`answer(request)` gives the completions of a request. The last request is answered first, as may well happen."""

    service = None

    def __init__(self, answer: Callable[[SampleRequest], Sequence[Completion]]):
        self.answer = answer
        self.requests: list[SampleRequest] = []
        self.metrics = RolloutMetrics()

    def wait_ready(self) -> None:
        pass

    def as_completed(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, list[Completion]]]:
        for index in reversed(range(len(requests))):
            if preemption.requested():
                return
            self.requests.append(requests[index])
            yield index, list(self.answer(requests[index]))

    def submit(self, request: SampleRequest) -> Future[list[Completion]]:
        """Answered at once."""
        self.requests.append(request)
        future: Future[list[Completion]] = Future()
        future.set_result(list(self.answer(request)))
        return future

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        found = dict(self.as_completed(requests))
        return [found[index] for index in range(len(requests))]


class ToyVerifier:
    """1.0 for the expert's content, 0.0 for other, a crash for "crash"."""

    def verify(self, candidate: Candidate, actions: Sequence[Action]) -> list[Verdict]:
        if any(action.content == "crash" for action in actions):
            raise RuntimeError("the world fell over")
        return [Verdict(reward=float(a.content == candidate.expert.content), reason=a.malformed or "judged") for a in actions]


def candidate(name: str, *, history: str = "what?", expert: str = "right", turn: int = 0) -> Candidate:
    """`<trajectory>:<turn>` style ids keep their trajectory."""
    return Candidate(
        id=name,
        trajectory_id=name.partition(":")[0],
        task_id=name.partition(":")[0],
        domain="toy",
        turn=turn,
        history=(Message(role="user", content=history),),
        expert=Action(content=expert),
    )


def make_sampler(
    folder: Path, answer: Callable[[SampleRequest], Sequence[Completion]], rollout: RolloutConfig | None = None
) -> tuple[Sampler, ScriptedClient]:
    """A sampler over the toy domain and the client that it asks; writes tools.json into `folder`."""
    write_json(folder / "tools.json", {"": []})
    client = ScriptedClient(answer)
    verifier = VerifierPool("toy", DomainConfig(name="toy"), workers=0, build=lambda name, domain, tools: ToyVerifier())
    return Sampler(renderer(), folder, rollout or RolloutConfig(), client, verifier), client
