"""Held-out measurements of one policy: pivot reward, end-to-end task success, out-of-domain skills."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pivotrl import episodes, preemption
from pivotrl.config import Config
from pivotrl.diagnostics import mean
from pivotrl.environments import build_environment
from pivotrl.evaluation import skills
from pivotrl.local_rollouts import Sampler, seed_of
from pivotrl.metrics import progress
from pivotrl.profiling import choose
from pivotrl.records import completed, read_jsonl, write_json
from pivotrl.rollout.client import SampleRequest
from pivotrl.types import Candidate, Episode, Trajectory


def evaluate(config: Config, sampler: Sampler, folder: Path) -> dict[str, Any]:
    """Measure the policy that `sampler` serves, into folder/result.json; what is there already is not measured again.

    Raises:
        Preempted: asked to leave; the measurements and episodes that are over are kept.
    """
    whole, partial = folder / "result.json", folder / "measured.json"
    if whole.exists():
        return json.loads(whole.read_bytes())
    result = json.loads(partial.read_bytes()) if partial.exists() else {}
    measures = {"pivot_reward": lambda: pivot_reward(config, sampler), "out_of_domain": lambda: out_of_domain(config, sampler)}
    if config.domain.environment:
        measures["task_success"] = lambda: task_success(config, sampler, folder / "episodes.jsonl")
    for name, measure in measures.items():
        if name not in result:
            result |= measure()
            write_json(partial, result)
    write_json(whole, result)
    partial.unlink()
    return result


def pivot_reward(config: Config, sampler: Sampler) -> dict[str, Any]:
    """Mean verdict on turns of held-out experts, sampled at the rollout temperature; over-long and failed ones are counted."""
    source = Path(config.candidates_path) / "heldout.jsonl"
    candidates = choose(read_jsonl(source, Candidate), config.evaluation.max_pivot_candidates, config.seed)
    prompts = [sampler.prompt(candidate) for candidate in candidates]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= config.rollout.max_prompt_tokens]
    rewards: list[float] = []
    dropped = 0
    results = sampler.collect(
        [candidates[i] for i in fitting], [prompts[i] for i in fitting], num_samples=config.evaluation.pivot_samples, seed=config.seed
    )
    for _, rollouts, _ in progress(results, total=len(fitting), desc="pivot reward"):
        rewards += [r.verdict.reward for r in rollouts if r.verdict.status == "ok"]
        dropped += sum(r.verdict.status != "ok" for r in rollouts)
    preemption.check("the held-out turns are sampled anew")
    return {
        "pivot_reward": sum(rewards) / len(rewards) if rewards else 0.0,
        "pivot_candidates": len(fitting),
        "pivot_over_long": len(candidates) - len(fitting),
        "pivot_dropped_samples": dropped,
    }


def task_success(config: Config, sampler: Sampler, path: Path) -> dict[str, Any]:
    """Share of held-out tasks that the policy solves alone in the environment, by the environment's own judgement.

    Episodes whose environment crashed are no failures of the policy: they are left out, and counted among `episode_ends`.
    """
    trajectories = [t for t in read_jsonl(Path(config.candidates_path) / "trajectories.jsonl", Trajectory) if t.split == "heldout"]
    trajectories = trajectories[: config.evaluation.max_tasks]

    def play(done: set[str]) -> Iterator[Episode]:
        return run_episodes(config, sampler, [t for t in trajectories if t.task_id not in done])

    found = completed(path, Episode, [t.task_id for t in trajectories], key=lambda episode: episode.task_id, make=play)
    if len(found) < len(trajectories):
        preemption.check(f"{len(found)} of {len(trajectories)} episodes are over")
    judged = [episode for episode in found if episode.end != "error"]
    ends = [episode.end for episode in found]
    return {
        "task_success": sum(episode.reward == 1.0 for episode in judged) / max(1, len(judged)),
        "tasks": len(judged),
        "turns_mean": sum(episode.turns for episode in judged) / max(1, len(judged)),
        "episode_ends": {end: ends.count(end) for end in sorted(set(ends))},
    }


def run_episodes(config: Config, sampler: Sampler, trajectories: Sequence[Trajectory]) -> Iterator[Episode]:
    """Act in all tasks side by side and yield each when it has ended; asked to leave, no more are yielded."""
    begun = (
        episodes.Episode(t.task_id, 0, build_environment(config.domain, t.state), t.tools) for t in episodes.with_shared_tools(trajectories)
    )

    def request(episode: episodes.Episode, prompt: tuple[int, ...]) -> SampleRequest:
        return request_for(config, sampler, prompt, episode.task_id, len(episode.turns))

    ended = episodes.run(sampler, begun, request, max_turns=config.evaluation.max_turns)
    for episode in progress(ended, total=len(trajectories), desc="episodes"):
        actions = tuple(turn.text for turn in episode.turns)
        yield Episode(task_id=episode.task_id, reward=episode.reward, turns=len(actions), end=episode.end, actions=actions)


def out_of_domain(config: Config, sampler: Sampler) -> dict[str, Any]:
    """Exact-match accuracy on held-out examples of every skill family, and its mean over families."""
    asked = []
    for family in skills.FAMILIES:
        for example in skills.generate(family, config.evaluation.skill_examples, seed=config.seed, split="heldout"):
            prompt = tuple(sampler.renderer.prompt(skills.to_messages(example)[:1], ()))
            asked.append((example, request_for(config, sampler, prompt, family, 0)))
    answers = sampler.client.sample([request for _, request in asked])
    found: dict[str, list[float]] = {family: [] for family in skills.FAMILIES}
    for (example, request), (completion,) in zip(asked, answers, strict=True):
        text = sampler.parse(completion, sampler.renderer.decode(completion.token_ids)).content
        found[request.routing_key].append(float(skills.score(example, text)))
    scores = {family: mean(values) for family, values in found.items()}
    return {"out_of_domain": mean(list(scores.values())), "skills": scores}


def request_for(config: Config, sampler: Sampler, prompt: tuple[int, ...], key: str, turn: int) -> SampleRequest:
    """One evaluation sample, greedy or at evaluation.temperature."""
    return SampleRequest(
        prompt=prompt,
        n=1,
        seed=seed_of(config.seed, key, turn),
        max_tokens=config.rollout.max_new_tokens,
        temperature=config.evaluation.temperature,
        stop_token_ids=sampler.renderer.stop_ids,
        routing_key=key,
    )
