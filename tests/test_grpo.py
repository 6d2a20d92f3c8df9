"""The loop around the loss, with a scripted sampler and a policy that only takes notes."""

import sys
import threading
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fakes import candidate, completion, make_sampler, renderer  # noqa: E402

from pivotrl import engines, grpo, preemption  # noqa: E402
from pivotrl.config import AdvantageKind, AlgorithmConfig, BatchingConfig, Config, LossLevel, RolloutConfig  # noqa: E402
from pivotrl.groups import PivotGroups, check_sharing, group_items, step_pivots  # noqa: E402
from pivotrl.grpo import Trainer, check  # noqa: E402
from pivotrl.records import read_jsonl  # noqa: E402
from pivotrl.types import Completion, Group, LocalRollout, Pivot, Verdict  # noqa: E402


def pivots_of(*names: str) -> list[Pivot]:
    return [Pivot(candidate=candidate(name, history=f"question {name}"), mean=0.5, variance=0.25) for name in names]


def group(name: str, *rewards: float | None, lengths=(2, 3, 4, 5), version: int = 0) -> Group:
    """One rollout per reward, of different lengths; None is a failed verifier."""
    rollouts = tuple(
        LocalRollout(
            candidate_id=name,
            index=i,
            completion=Completion(
                token_ids=tuple(range(50 + 10 * i, 50 + 10 * i + lengths[i])),
                logprobs=tuple(-0.1 * (t + 1) for t in range(lengths[i])),
                finish_reason="stop",
                policy_version=version,
            ),
            text="",
            verdict=Verdict(reward=reward or 0.0, reason="", status="timeout" if reward is None else "ok"),
        )
        for i, reward in enumerate(rewards)
    )
    return Group(candidate_id=name, trajectory_id=f"trajectory {name}", expert_calls=0, prompt=(1, 2, 3), rollouts=rollouts)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Config(rollout=RolloutConfig(top_p=0.9)), "rollout.top_p=0.9"),
        (Config(rollout=RolloutConfig(temperature=0.0)), "rollout.temperature=0.0.*temperature above 0"),
        (Config(algorithm=AlgorithmConfig(group_size=1)), "algorithm.group_size=1: a group needs two"),
        (Config(algorithm=AlgorithmConfig(max_staleness=-1)), "algorithm.max_staleness=-1: 0 samples"),
        (Config(algorithm=AlgorithmConfig(max_staleness=1, importance_cap=None)), "max_staleness=1 needs algorithm.importance_cap"),
        (
            Config(algorithm=AlgorithmConfig(max_staleness=1), rollout=RolloutConfig(colocated=True)),
            "max_staleness=1 with rollout.colocated=true",
        ),
    ],
)
def test_settings_that_would_break_the_loss_are_refused(config, text):
    check(Config(rollout=RolloutConfig(temperature=0.7), algorithm=AlgorithmConfig(group_size=2)))
    check(Config(rollout=RolloutConfig(colocated=True), algorithm=AlgorithmConfig(importance_cap=None)))
    check(Config(algorithm=AlgorithmConfig(max_staleness=3)))
    with pytest.raises(ValueError, match=text):
        check(config)


def names(pivots) -> list[str]:
    return [pivot.candidate.id for pivot in pivots]


def test_steps_go_through_all_pivots_before_any_comes_again():
    pivots = pivots_of(*"abcdefgh")
    steps = [names(step_pivots(pivots, 4, step=step, seed=0)) for step in range(6)]
    for epoch in range(3):
        assert sorted(steps[2 * epoch] + steps[2 * epoch + 1]) == list("abcdefgh")
    assert len({tuple(step) for step in steps}) == 6, "every epoch has an order of its own"
    assert steps[3] == names(step_pivots(pivots, 4, step=3, seed=0)) != names(step_pivots(pivots, 4, step=3, seed=1))


def test_no_step_holds_a_pivot_twice():
    pivots = pivots_of(*"abcdefg")
    steps = [names(step_pivots(pivots, 5, step=step, seed=3)) for step in range(70)]
    assert all(len(set(step)) == 5 for step in steps)
    counts = Counter(name for step in steps for name in step)
    assert set(counts) == set("abcdefg") and max(counts.values()) - min(counts.values()) <= 30
    assert sorted(names(step_pivots(pivots, 50, step=9, seed=3))) == list("abcdefg"), "few pivots make a smaller step"


def test_items_carry_advantages_weights_and_rollout_logprobs():
    items = group_items([group("p", 1, 0)], AlgorithmConfig(advantage=AdvantageKind.leave_one_out))
    assert [list(item.token_ids) for item in items] == [[1, 2, 3, 50, 51], [1, 2, 3, 60, 61, 62]]
    assert [list(item.scored) for item in items] == [[3, 4], [3, 4, 5]]
    assert items[0].fields == {"weights": [0.2, 0.2], "advantages": [1.0, 1.0], "rollout_logprobs": [-0.1, -0.2]}
    assert items[1].fields["advantages"] == [-1.0] * 3 and {item.unit for item in items} == {"trajectory p"}


def test_sequence_level_weights_every_action_equally():
    items = group_items([group("p", 1, 0), group("q", 0, 1)], AlgorithmConfig(loss_level=LossLevel.sequence))
    assert [sum(item.fields["weights"]) for item in items] == pytest.approx([0.25] * 4)
    assert [len(set(item.fields["weights"])) for item in items] == [1] * 4


@pytest.mark.parametrize("level", LossLevel)
def test_groups_without_signal_have_no_items_but_count(level):
    """Proposition 3.1: they change nothing, so they cost nothing; the average is still over all sampled actions."""
    algorithm = AlgorithmConfig(loss_level=level)
    alone, beside = (
        group_items([group("p", 1, 0)], algorithm),
        group_items([group("d", 1, 1), group("p", 1, 0), group("e", 0, 0)], algorithm),
    )
    assert [item.unit for item in beside] == ["trajectory p"] * 2
    for a, b in zip(alone, beside, strict=True):
        assert a.fields["advantages"] == b.fields["advantages"]
        assert b.fields["weights"] == pytest.approx([w / 3 for w in a.fields["weights"]])
    assert group_items([group("d", 1, 1)], algorithm) == group_items([], algorithm) == []


def test_samples_whose_verifier_failed_are_left_out_of_everything():
    items = group_items([group("p", 1, None, 0)], AlgorithmConfig())
    assert [len(item.scored) for item in items] == [2, 4]
    assert items[0].fields["advantages"][0] == pytest.approx(1, abs=1e-4) and items[0].fields["weights"] == [1 / 6] * 2
    assert group_items([group("p", 1, None, None)], AlgorithmConfig()) == [], "one sample is no group"


class NotingPolicy:
    """Logprobs are the number of updates so far (reference: -1); updates and questions are written down."""

    def __init__(self):
        self.notes: list[tuple] = []
        self.updates = 0

    def logprobs(self, rows, *, temperature, reference=False):
        self.notes.append(("reference" if reference else "old", temperature, self.updates))
        return [torch.full((len(row.positions_S),), -1.0 if reference else float(self.updates)) for row in rows]

    def train_step(self, rows, loss, *, temperature, step):
        self.notes.append(("update", temperature, step))
        self.updates += 1
        self.rows = rows
        return {"weight": 1.0, "logprob_gap": 0.0, "entropy": 0.5}

    def hf_weights(self):
        return iter(())


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(
        run_dir=str(tmp_path / "run"),
        rollout=RolloutConfig(temperature=0.5),
        algorithm=AlgorithmConfig(num_steps=2, pivots_per_step=2, group_size=4, checkpoint_every=50),
        batching=BatchingConfig(max_row_tokens=200),
    )


class NotingSaver:
    """Takes the place of checkpoint.Saver; remembers the scores, how often it was asked to check, and how the loop was left."""

    def __init__(self, events: list[tuple]):
        self.events, self.scores, self.checks, self.ends = events, [], 0, []

    def __call__(self, policy, folder, options) -> "NotingSaver":
        self.folder, self.options = folder, options
        return self

    def __enter__(self) -> "NotingSaver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.ends.append(kind)

    def check(self) -> None:
        self.checks += 1

    def save(self, step, *, version, score) -> None:
        self.events.append(("save", step, version))
        self.scores.append(score)


@pytest.fixture
def alone(monkeypatch) -> list[tuple]:
    """No other processes, no files of checkpoints, no engines; what would have gone there."""
    events: list[tuple] = []
    monkeypatch.setattr(engines.parallel, "broadcast", lambda value: value)
    monkeypatch.setattr(grpo.checkpoint, "Saver", NotingSaver(events))
    monkeypatch.setattr(engines.weight_sync, "push", lambda weights, service, version: events.append(("push", version)))
    return events


def make_trainer(config: Config, folder: Path, texts=("right", "wrong", "right", "a longer wrong one"), *, version: int = 0):
    """A trainer whose policy and engines are at `version`; the engines sample with the version that was pushed last."""

    def answer(request):
        return [completion(text, version=trainer.engines.version) for text in texts]

    sampler, client = make_sampler(folder, answer, config.rollout)
    source = PivotGroups(config, sampler, pivots_of("a:0", "b:0", "c:0"))
    trainer = Trainer(config, NotingPolicy(), source, None)
    trainer.version = trainer.engines.version = version
    return trainer, client


def test_sample_makes_one_group_per_pivot_in_order(config, tmp_path):
    trainer, client = make_trainer(config, tmp_path)
    groups = trainer.source.sample(0)
    chosen = step_pivots(trainer.source.pivots, 2, step=0, seed=0)
    assert [g.candidate_id for g in groups] == names(chosen)
    for g, pivot in zip(groups, chosen, strict=True):
        assert g.prompt == tuple(renderer().prompt(pivot.candidate.history, ())) and g.trajectory_id == pivot.candidate.trajectory_id
        assert [r.verdict.reward for r in g.rollouts] == [1, 0, 1, 0]
    assert {request.n for request in client.requests} == {4} and {request.temperature for request in client.requests} == {0.5}


def test_sample_of_a_restarted_step_is_read_not_drawn_again(config, tmp_path):
    trainer, client = make_trainer(config, tmp_path)
    groups = trainer.source.sample(1)
    assert read_jsonl(tmp_path / "run" / "rollouts" / "step_000001.jsonl", Group) == groups
    client.requests.clear()
    assert trainer.source.sample(1) == groups and not client.requests
    trainer.source.sample(0)
    assert {request.seed for request in client.requests}, "another step draws afresh"


def test_steps_draw_with_seeds_of_their_own(config, tmp_path):
    config.algorithm.pivots_per_step = 3
    trainer, client = make_trainer(config, tmp_path)
    trainer.source.sample(0)
    trainer.source.sample(1)
    assert len({request.seed for request in client.requests}) == 6


def test_other_processes_neither_sample_nor_evaluate(config, alone, monkeypatch):
    config.evaluation.every_steps = 1
    trainer = Trainer(config, NotingPolicy(), None, None)
    monkeypatch.setattr(engines.parallel, "broadcast", lambda value: [value, "from the main process"][value is None])
    with trainer.engines.sampling(0, None):
        assert trainer.batch(0) == "from the main process" == trainer.engines.probes()
    trainer.evaluate(0)


def test_evaluates_on_the_way_every_so_many_steps(config, tmp_path, alone, monkeypatch):
    config.evaluation.every_steps, config.algorithm.num_steps = 2, 5
    folders: list[Path] = []
    monkeypatch.setattr(grpo.benchmark, "evaluate", lambda config, sampler, folder: folders.append(folder) or {})
    trainer, _ = make_trainer(config, tmp_path)
    trainer.train(0)
    assert folders == [tmp_path / "run/rollouts" / f"evaluation_{step:06d}" for step in (2, 4)]
    assert alone[1] == ("push", 2), "behind the push, so of the policy as it is"


def test_build_packs_live_groups_and_counts_all(config, tmp_path):
    trainer, _ = make_trainer(config, tmp_path)
    trainer.version = 5
    (rows,), stats = trainer.build([group("p", 1, 0, version=5), group("d", 1, 1, version=3), group("q", 0, 1, version=5)])
    assert sum(len(row.positions_S) for row in rows) == 2 * (2 + 3)
    assert stats["train_tokens"] == sum(len(row.token_ids_T) for row in rows) == 3 + 2 + 3 + 3, "q repeats the tokens of p"
    assert (stats["staleness_max"], stats["rollout_turns"], stats["dead_group_share"]) == (2, 6, pytest.approx(1 / 3))
    assert trainer.build([group("d", 1, 1)])[0] == []


def test_minibatches_share_out_the_groups(config, tmp_path):
    config.algorithm.updates_per_step = 2
    trainer, _ = make_trainer(config, tmp_path)
    minibatches, _ = trainer.build([group(name, 1, 0) for name in "abcd"])
    assert [sum(len(row.positions_S) for row in rows) for rows in minibatches] == [10, 10]
    for rows in minibatches:
        assert sum(row.fields["weights"].sum().item() for row in rows) == pytest.approx(1)


def test_one_update_on_fresh_rollouts_needs_no_extra_pass(config, tmp_path, alone):
    trainer, _ = make_trainer(config, tmp_path)
    trainer.train(0)
    assert trainer.policy.notes == [("update", 0.5, 0), ("update", 0.5, 1)]
    assert alone == [("push", 1), ("push", 2), ("save", 2, 2)]
    assert set(trainer.policy.rows[0].fields) == {"weights", "advantages", "rollout_logprobs"}


def test_old_logprobs_are_those_of_the_policy_that_the_step_began_with(config, tmp_path, alone):
    config.algorithm.updates_per_step, config.algorithm.num_steps = 2, 1
    trainer, _ = make_trainer(config, tmp_path)
    trainer.train(0)
    assert [note[0] for note in trainer.policy.notes] == ["old", "old", "update", "update"]
    assert all((row.fields["old_logprobs"] == 0).all() for row in trainer.policy.rows), "asked before the first update"


def test_a_kl_penalty_asks_the_reference_policy(config, tmp_path, alone):
    config.algorithm.kl_beta, config.algorithm.num_steps = 0.1, 1
    trainer, _ = make_trainer(config, tmp_path)
    trainer.train(0)
    assert trainer.policy.notes == [("reference", 0.5, 0), ("update", 0.5, 0)]
    assert all((row.fields["ref_logprobs"] == -1).all() for row in trainer.policy.rows)


def test_a_step_without_signal_updates_and_sends_nothing(config, tmp_path, alone):
    trainer, _ = make_trainer(config, tmp_path, texts=("right",) * 4)
    trainer.train(0)
    assert trainer.policy.notes == [] and alone == [("save", 2, 0)] and trainer.version == 0


def test_a_resumed_loop_starts_at_its_step(config, tmp_path, alone):
    trainer, _ = make_trainer(config, tmp_path, version=1)
    trainer.train(1)
    assert alone == [("push", 2), ("save", 2, 2)] and trainer.policy.notes == [("update", 0.5, 1)]


def test_checkpoints_are_watched_at_each_step_and_scored_by_the_reward(config, tmp_path, alone):
    config.algorithm.checkpoint_every, config.checkpoint.keep_best = 1, 3
    trainer, _ = make_trainer(config, tmp_path)
    trainer.train(0)
    saver = grpo.checkpoint.Saver
    assert (saver.scores, saver.checks, saver.ends) == ([0.5, 0.5], 2, [None])
    assert saver.folder == tmp_path / "run" / "checkpoints" / "grpo" and saver.options.keep_best == 3
    trainer.policy.train_step = lambda *_, **__: {"weight": 1.0, "logprob_gap": 1.0}
    with pytest.raises(RuntimeError):
        trainer.train(0)
    assert saver.ends == [None, RuntimeError], "the saver learns that the loop failed"


def test_a_resumed_loop_asks_for_the_same_rollouts(config, tmp_path, alone):
    """The order of the data is a function of seed and step alone: nothing of it needs to be stored."""
    config.algorithm.num_steps, asked = 5, {}
    for name, start in (("straight", 0), ("resumed", 3)):
        config.run_dir = str(tmp_path / name)
        trainer, client = make_trainer(config, tmp_path)
        trainer.train(start)
        asked[name] = [(request.prompt, request.seed) for request in client.requests]
    assert asked["resumed"] == asked["straight"][3 * 2 :] and len(asked["straight"]) == 10


@pytest.mark.parametrize(
    ("load_from", "version", "expected"),
    [
        (None, 0, ["check", "push", "check"]),
        (None, 4, ["push", "check"]),
        ("runs/other", 0, ["push", "check"]),
    ],
)
def test_the_engines_are_checked_as_loaded_only_where_they_hold_the_policy(config, tmp_path, monkeypatch, load_from, version, expected):
    config.checkpoint.load_from, config.batching.shared_prefix, events = load_from, False, []
    trainer, _ = make_trainer(config, tmp_path)
    monkeypatch.setattr(trainer.engines, "check", lambda: events.append("check"))
    monkeypatch.setattr(trainer.engines, "push", lambda version: events.append("push"))
    trainer.start(version)
    assert events == expected and trainer.version == version


def test_shared_rows_are_compared_with_dense_rows_at_the_start(config, tmp_path, alone):
    trainer, _ = make_trainer(config, tmp_path)
    check_sharing(trainer.policy, trainer.engines.probes(), config)
    assert config.batching.shared_prefix

    # a policy whose answer depends on how the tokens are packed, as a broken attention would make it
    trainer.policy.logprobs = lambda rows, temperature: [torch.full((len(row.positions_S),), float(len(row.token_ids_T))) for row in rows]
    with pytest.raises(RuntimeError, match="shared-prefix rows differ from dense rows .* batching.shared_prefix=false"):
        check_sharing(trainer.policy, trainer.engines.probes(), config)
    config.batching.fall_back_to_dense = True
    check_sharing(trainer.policy, trainer.engines.probes(), config)
    assert not config.batching.shared_prefix


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The signals that this process has received: the test appends one."""
    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    return received


def test_asked_to_leave_while_sampling_it_saves_and_pays_no_group_twice(config, tmp_path, alone, asked):
    config.algorithm.pivots_per_step = 3
    whole, client = make_trainer(config, tmp_path)
    whole.train(0)
    requests, alone[:] = len(client.requests), []
    rollouts = [tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl" for step in range(2)]
    expected = [path.read_bytes() for path in rollouts]

    config.run_dir = str(tmp_path / "left")
    stopped, client = make_trainer(config, tmp_path)
    client.answer = leaving_at(4 + 1, client, asked)  # in step 1, behind its second group
    with pytest.raises(preemption.Preempted, match="step 2 of 2") as left:
        stopped.train(0)
    assert left.value.code == 85 and alone == [("push", 1), ("save", 1, 1)] and stopped.policy.updates == 1
    folder = tmp_path / "left" / "rollouts"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000000.jsonl", "step_000001.journal.jsonl"]
    assert len(read_jsonl(folder / "step_000001.journal.jsonl", Group)) == 2

    asked.clear()
    resumed, again = make_trainer(config, tmp_path, version=1)
    resumed.train(1)
    assert len(client.requests) + len(again.requests) == requests and len(again.requests) == 1
    assert [(folder / path.name).read_bytes() for path in rollouts] == expected
    assert sorted(path.name for path in folder.iterdir()) == ["step_000000.jsonl", "step_000001.jsonl"]
    assert alone[2:] == [("push", 2), ("save", 2, 2)]


def leaving_at(number, client, asked):
    """The client's answers; the signal comes while request `number` (from 1) is answered."""
    answers = client.answer

    def answer(request):
        if len(client.requests) == number:
            asked.append(10)
        return answers(request)

    return answer


def test_asked_to_leave_in_an_update_it_finishes_the_step_and_leaves_the_engines_alone(config, tmp_path, alone, asked):
    config.algorithm.num_steps = 3
    trainer, _ = make_trainer(config, tmp_path)
    step = trainer.policy.train_step
    trainer.policy.train_step = lambda *a, **k: (asked.append(15), step(*a, **k))[1]
    with pytest.raises(preemption.Preempted):
        trainer.train(0)
    assert trainer.policy.updates == 1 and alone == [("save", 1, 1)] and grpo.checkpoint.Saver.scores == [0.5]
    assert grpo.checkpoint.Saver.ends == [None], "the saver waits for its writer"


def test_asked_to_leave_in_the_last_step_it_is_done(config, tmp_path, alone, asked):
    config.algorithm.num_steps = 1
    trainer, _ = make_trainer(config, tmp_path)
    trainer.policy.train_step = lambda *a, **k: (asked.append(15), {"weight": 1.0, "logprob_gap": 0.0})[1]
    trainer.train(0)
    assert alone == [("push", 1), ("save", 1, 1)]


def test_what_a_checkpoint_holds_already_is_not_saved_again(config, tmp_path, alone, asked):
    trainer, client = make_trainer(config, tmp_path)
    asked.append(10)
    for start in (0, 1):
        with pytest.raises(preemption.Preempted):
            trainer.train(start)
    assert alone == [] and not client.requests

    asked.clear()
    config.algorithm.checkpoint_every, config.run_dir = 1, str(tmp_path / "every")
    trainer, client = make_trainer(config, tmp_path)
    client.answer = leaving_at(3, client, asked)  # in step 1, behind its first group
    with pytest.raises(preemption.Preempted):
        trainer.train(0)
    assert alone == [("push", 1), ("save", 1, 1)]


def test_asked_to_leave_before_the_servers_answer_nothing_is_sent(config, tmp_path, alone, asked):
    trainer, _ = make_trainer(config, tmp_path)
    asked.append(10)
    with pytest.raises(preemption.Preempted, match="nothing new"):
        trainer.start(3)
    assert alone == []


def test_groups_whose_verifier_the_same_signal_may_have_ended_are_sampled_again(config, tmp_path, asked):
    trainer, client = make_trainer(config, tmp_path, texts=("crash",) * 4)
    client.answer = leaving_at(2, client, asked)
    assert trainer.source.sample(0) is None
    kept = read_jsonl(tmp_path / "run/rollouts/step_000000.journal.jsonl", Group)
    assert len(kept) == 1, "the first failed before anybody was asked to leave: that is its own failure"


def test_asked_to_leave_while_the_engines_are_checked_all_leave_behind_the_check(config, tmp_path, alone, asked, monkeypatch):
    def check_logprobs(*_, **__):
        asked.append(15)
        raise preemption.Preempted("of one rank alone")

    monkeypatch.setattr(engines.weight_sync, "check_logprobs", check_logprobs)
    trainer, _ = make_trainer(config, tmp_path)
    trainer.policy.score = lambda rows: [torch.zeros(len(row) - 1) for row in rows]
    monkeypatch.setattr(preemption, "agreed", lambda: bool(alone.append("agreed") or asked))
    with pytest.raises(preemption.Preempted, match="nothing new"):
        trainer.start(0)
    assert alone == ["agreed", "agreed"], "the ranks agree behind the wait for the servers and behind the check, and push nothing"


class Service:
    """One server of which only its address is asked for."""

    urls = ("one",)

    def on_event(self, *_) -> None:
        pass


@pytest.fixture
def ahead(config, alone, tmp_path, monkeypatch):
    """A trainer with max_staleness=1 over four steps, its client, and what was done in order: pushes, checks and saves."""

    def check_logprobs(client, rows, scored, *, max_mean_gap):
        assert [len(row) for row in rows] == [len(logprobs) + 1 for logprobs in scored] and len(rows[0]) <= engines.PROBE_TOKENS
        alone.append("check")
        return engines.weight_sync.LogprobGap(mean=1e-7, max=1e-6, num_tokens=10)

    monkeypatch.setattr(engines.weight_sync, "check_logprobs", check_logprobs)
    config.algorithm.max_staleness, config.algorithm.num_steps = 1, 4
    trainer, client = make_trainer(config, tmp_path)
    client.close = lambda: None
    trainer.engines.service = Service()
    trainer.policy.score = lambda rows: [torch.zeros(len(row) - 1) for row in rows]
    return trainer, client


def versions_of(run: Path) -> list[set[int]]:
    paths = sorted((run / "rollouts").glob("step_*.jsonl"))
    return [{r.completion.policy_version for g in read_jsonl(path, Group) for r in g.rollouts} for path in paths]


def kept_rows(trainer: Trainer) -> list[dict]:
    """The statistics of each step, as `report` gets them."""
    rows: list[dict] = []
    trainer.log, trainer.report = object(), lambda step, stats: rows.append(stats)
    return rows


def test_one_step_ahead_each_batch_is_one_version_old_and_every_push_is_proven(config, ahead, alone, tmp_path):
    trainer, _ = ahead
    rows = kept_rows(trainer)
    trainer.log = type("Log", (), {"event": staticmethod(lambda *_: pytest.fail("nothing is stale"))})()
    trainer.train(0)
    assert versions_of(tmp_path / "run") == [{0}, {0}, {1}, {2}]
    assert [(row["staleness_max"], row["staleness_mean"]) for row in rows] == [(0, 0), (1, 1), (1, 1), (1, 1)]
    assert [row.get("staleness_count_1", 0) for row in rows] == [0, 8, 8, 8] and rows[0]["staleness_count_0"] == 8
    assert all(row["engine_gap"] == 1e-7 and row["weight_syncs"] == 1 and row["sampling_s"] > 0 for row in rows)
    assert alone == [("push", 1), "check", ("push", 2), "check", ("push", 3), "check", ("push", 4), "check", ("save", 4, 4)]


def test_the_movement_of_the_policy_is_no_gap_between_engine_and_trainer(config, ahead):
    """Rollouts of the present policy are still held to the tolerance; stale ones differ because the policy has moved."""
    trainer, _ = ahead
    trainer.policy.train_step = lambda rows, loss, *, temperature, step: {"weight": 1.0, "logprob_gap": 0.0 if step == 0 else 0.5}
    trainer.train(0)
    config.run_dir += "_again"
    trainer.policy.train_step = lambda *_, **__: {"weight": 1.0, "logprob_gap": 0.5}
    with pytest.raises(RuntimeError, match="step 0: mean .rollout - policy logprob."):
        trainer.train(0)


def test_a_broken_push_is_found_before_anything_is_sampled_from_it(config, ahead, tmp_path, monkeypatch):
    trainer, _ = ahead

    def check_logprobs(*_, **__):
        raise RuntimeError("rollout engine and trainer disagree")

    monkeypatch.setattr(engines.weight_sync, "check_logprobs", check_logprobs)
    with pytest.raises(RuntimeError, match="disagree"):
        trainer.train(0)
    assert versions_of(tmp_path / "run") == [{0}, {0}], "what ran beside the update is of the weights before"


def test_steps_without_signal_let_the_sampling_go_on(config, ahead, alone, tmp_path, monkeypatch):
    """Nothing to push, so nothing to wait for: the engines hold the policy of the next step already."""
    trainer, client = ahead
    client.answer = lambda request: [completion("right", version=trainer.engines.version)] * 4
    trainer.train(0)
    assert versions_of(tmp_path / "run") == [{0}] * 4 and alone == [("save", 4, 0)]


def test_asked_to_leave_in_an_update_the_sampling_beside_it_stops_too(config, ahead, alone, asked, tmp_path):
    trainer, client = ahead
    config.algorithm.pivots_per_step = 3
    inside, sampled, step = threading.Event(), threading.Event(), trainer.policy.train_step
    answers = client.answer

    def answer(request):
        if len(client.requests) == 3 + 2:  # the second group of step 1
            sampled.set()
            assert inside.wait(10)
        return answers(request)

    def train_step(*args, **kwargs):
        assert sampled.wait(10)
        asked.append(10)
        inside.set()
        return step(*args, **kwargs)

    client.answer, trainer.policy.train_step = answer, train_step
    with pytest.raises(preemption.Preempted, match="step 1 of 4 was the last"):
        trainer.train(0)
    assert alone == [("save", 1, 1)], "the update was finished, the engines were left alone"
    journal = tmp_path / "run/rollouts/step_000001.journal.jsonl"
    assert len(read_jsonl(journal, Group)) == 2

    asked.clear()
    resumed, again = make_trainer(config, tmp_path, version=1)
    resumed.engines.service, resumed.policy.score = Service(), trainer.policy.score
    resumed.train(1)
    assert len(client.requests) + len(again.requests) == 4 * 3, "no group was paid twice"
    assert versions_of(tmp_path / "run") == [{0}, {0, 1}, {1}, {2}], "the rest of step 1 came from the newest weights"


def test_what_fails_on_the_thread_fails_in_the_loop(config, ahead, alone):
    trainer, client = ahead
    answers = client.answer

    def answer(request):
        if len(client.requests) > 4:
            raise RuntimeError("all servers were given up")
        return answers(request)

    client.answer = answer
    with pytest.raises(RuntimeError, match="all servers were given up") as raised:
        trainer.train(0)
    assert "sample_groups" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert trainer.policy.updates == 2 and grpo.checkpoint.Saver.ends == [RuntimeError]


def test_evaluation_finds_the_engines_up_to_date_and_idle(config, ahead, monkeypatch, tmp_path):
    trainer, _ = ahead
    config.evaluation.every_steps, config.algorithm.max_staleness, found = 2, 3, []
    monkeypatch.setattr(grpo.benchmark, "evaluate", lambda *_: found.append((trainer.version, trainer.engines.version, idle())) or {})

    def idle() -> bool:
        return all(future.done() for future in trainer.engines.ahead._futures.values())

    trainer.train(0)
    assert found == [(2, 2, True), (4, 4, True)]


def test_colocated_policy_and_engines_take_turns(config, tmp_path, alone):
    config.rollout.colocated, config.algorithm.checkpoint_every = True, 1
    trainer, client = make_trainer(config, tmp_path)
    for name in ("offload", "reload"):
        setattr(trainer.policy, name, lambda name=name: alone.append(name))
    trainer.engines.turns.service = type("Service", (), {name: lambda self, name=name: alone.append(name) for name in ("sleep", "wake")})()
    answers, step = client.answer, trainer.policy.train_step
    client.answer = lambda request: alone.append("sample") or answers(request)
    trainer.policy.train_step = lambda *a, **k: alone.append("update") or step(*a, **k)
    trainer.train(0)
    one = ["offload", "sample", "sample", "sleep", "reload", "update", "offload", ("push", 1), "sleep", "reload", ("save", 1, 1)]
    two = ["offload", "wake", "sample", "sample", "sleep", "reload", "update", "offload", ("push", 2), "sleep", "reload", ("save", 2, 2)]
    assert alone == one + two, "a push wakes the engines itself"
