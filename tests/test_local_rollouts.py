import sys
from concurrent.futures import Future
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakes import candidate, completion, make_sampler, renderer  # noqa: E402

from pivotrl.config import Config, RolloutConfig  # noqa: E402
from pivotrl.local_rollouts import open_sampler, seed_of  # noqa: E402
from pivotrl.types import Action, Verdict  # noqa: E402

TEXTS = ("right", "wrong", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')


def collect(sampler, candidates, *, num_samples=3, seed=5):
    prompts = [sampler.prompt(c) for c in candidates]
    return list(sampler.collect(candidates, prompts, num_samples=num_samples, seed=seed))


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert seed_of(0, "a") == 172125529, "the same in every process and version"
    seeds = {seed_of(*parts) for parts in ((0, "a"), (1, "a"), (0, "b"), (0,), ("0", "a"), (0, "a", 0))}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for seed in seeds)


def test_rollouts_belong_to_their_candidates(tmp_path):
    sampler, _ = make_sampler(tmp_path, lambda request: [completion(text, version=7) for text in TEXTS])
    candidates = [candidate("a:0"), candidate("b:0", expert="wrong")]
    results = collect(sampler, candidates)
    assert [index for index, _, _ in results] == [1, 0], "in the order of finishing"
    for index, rollouts, actions in results:
        assert [r.candidate_id for r in rollouts] == [candidates[index].id] * 3
        assert [r.index for r in rollouts] == [0, 1, 2]
        assert [r.text for r in rollouts] == list(TEXTS)
        assert [r.verdict.reward for r in rollouts] == ([1.0, 0.0, 0.0] if index == 0 else [0.0, 1.0, 0.0])
        assert [r.num_calls for r in rollouts] == [0, 0, 1] == [len(a.tool_calls) for a in actions]
        assert [r.completion for r in rollouts] == [completion(text, version=7) for text in TEXTS]


def test_requests_say_what_the_config_says(tmp_path):
    rollout = RolloutConfig(temperature=0.7, top_p=0.9, max_new_tokens=33)
    sampler, client = make_sampler(tmp_path, lambda request: [completion("right")] * request.n, rollout)
    collect(sampler, [candidate("t:4", history="hello")], num_samples=2)
    (request,) = client.requests
    assert request.prompt == tuple(renderer().prompt(candidate("t:4", history="hello").history, ()))
    assert (request.n, request.max_tokens, request.temperature, request.top_p) == (2, 33, 0.7, 0.9)
    assert request.stop_token_ids == renderer().stop_ids and request.routing_key == "t"


def test_seeds_of_requests_do_not_depend_on_the_company(tmp_path):
    """A resumed stage asks for the rest only, and must draw what it would have drawn."""
    sampler, client = make_sampler(tmp_path, lambda request: [completion("right")] * request.n)
    collect(sampler, [candidate(name) for name in "abc"])
    together = {request.routing_key: request.seed for request in client.requests}
    client.requests.clear()
    collect(sampler, [candidate("b")])
    assert client.requests[0].seed == together["b"] and len(set(together.values())) == 3
    client.requests.clear()
    collect(sampler, [candidate("b")], seed=6)
    assert client.requests[0].seed != together["b"]


def test_a_completion_that_was_cut_off_is_malformed_whatever_it_says(tmp_path):
    sampler, _ = make_sampler(tmp_path, lambda request: [completion("right", finish_reason="length"), completion("right")])
    ((_, rollouts, actions),) = collect(sampler, [candidate("a", expert="other")], num_samples=2)
    assert [a.malformed for a in actions] == [f"cut off after {len(rollouts[0].completion.token_ids)} tokens", ""]
    assert actions[0].content == "right" and rollouts[0].verdict.reason == actions[0].malformed


def test_a_crash_of_the_verifier_is_no_reward_and_spares_the_others(tmp_path):
    sampler, _ = make_sampler(tmp_path, lambda request: [completion(text) for text in ("right", "crash", "wrong")])
    ((_, rollouts, _),) = collect(sampler, [candidate("a")])
    assert [r.verdict.status for r in rollouts] == ["ok", "error", "ok"]
    assert "the world fell over" in rollouts[1].verdict.reason and rollouts[0].verdict.reward == 1.0


def test_sampling_goes_on_while_verdicts_are_pending(tmp_path):
    sampler, client = make_sampler(tmp_path, lambda request: [completion("right")])
    verdicts: list[Future] = []

    class SlowVerifier:
        def submit(self, candidate, actions):
            verdicts.append(Future())
            if len(verdicts) == 3:  # only now, with everything sampled, does the first verdict arrive
                for future in verdicts:
                    future.set_result([Verdict(reward=1.0, reason="late")])
            return verdicts[-1]

    sampler.verifier = SlowVerifier()
    results = collect(sampler, [candidate(name) for name in "abc"], num_samples=1)
    assert [index for index, _, _ in results] == [2, 1, 0] and len(client.requests) == 3


def test_tools_of_a_candidate_reach_its_prompt(tmp_path):
    sampler, _ = make_sampler(tmp_path, lambda request: [])
    seen = []
    sampler.renderer = type("Spy", (), {"prompt": lambda self, history, tools: seen.append(list(tools)) or [1]})()
    sampler._tools = {"key": [{"name": "f"}]}
    assert sampler.prompt(msgspec.structs.replace(candidate("a"), tools="key")) == (1,)
    sampler.prompt(candidate("b"))
    assert seen == [[{"name": "f"}], []]


def test_parse_of_a_whole_completion_is_the_renderers(tmp_path):
    sampler, _ = make_sampler(tmp_path, lambda request: [])
    assert sampler.parse(completion("hi"), "hi") == Action(content="hi")


def test_a_missing_policy_is_named_with_the_recipe_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Hugging Face policy at .*absent: run recipes/train_sft.py"):
        with open_sampler(Config(), tmp_path / "absent"):
            pass
