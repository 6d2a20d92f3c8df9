"""Re-profiling in a scripted world: an engine whose skill is a function of the step, killed at every request."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakes import candidate, completion, make_sampler  # noqa: E402

from pivotrl import preemption  # noqa: E402
from pivotrl.config import AlgorithmConfig, Config, DomainConfig, ProfileConfig, RolloutConfig, SelectionRule  # noqa: E402
from pivotrl.diagnostics import rollout_statistics  # noqa: E402
from pivotrl.groups import PivotGroups, step_pivots  # noqa: E402
from pivotrl.profiling import CountedProfile, profile  # noqa: E402
from pivotrl.records import read_jsonl, write_jsonl  # noqa: E402
from pivotrl.refresh import Deviations, check, deviations  # noqa: E402
from pivotrl.selection import run as select_pivots  # noqa: E402
from pivotrl.types import Pivot, Profile  # noqa: E402

WINDOW, STEPS, FIRST = 2, 12, 6
EASY, HARD = [f"easy{i}:0" for i in range(5)], [f"hard{i}:0" for i in range(4)]


class Killed(BaseException):
    """Takes the place of kill -9."""


class World:
    """Easy turns are mixed before step 3 and solved after it; hard ones are failed before it and then mixed (or also solved)."""

    def __init__(self, folder: Path, *, hard_ends: float = 0.5, run_dir: str = "run"):
        self.folder, self.hard_ends, self.step = folder, hard_ends, 0
        self.answered, self.kill_at, self.events = 0, None, []
        candidates = [candidate(name, history=f"question {name}") for name in EASY + HARD] + [candidate("long:0", history="long " * 200)]
        write_jsonl(folder / "candidates" / "candidates.jsonl", candidates)
        self.config = Config(
            run_dir=str(folder / run_dir),
            candidates_path=str(folder / "candidates"),
            profiles_path=str(folder / "profiles"),
            pivots_path=str(folder / "pivots"),
            domain=DomainConfig(name="toy"),
            rollout=RolloutConfig(max_prompt_tokens=100),
            profile=ProfileConfig(num_samples=8, max_mean=1.0, refresh=True, refresh_fraction=0.5, refresh_window=WINDOW),
            algorithm=AlgorithmConfig(num_steps=STEPS, pivots_per_step=2, group_size=8),
        )
        self.names = {self.sampler().prompt(c): c.id for c in candidates}
        if not (folder / "pivots").exists():
            profile(self.config, self.sampler())
            select_pivots(self.config)

    def answer(self, request):
        if self.answered == self.kill_at:
            raise Killed
        self.answered += 1
        learnt = self.step >= 3
        share = {"easy": (0.5, 1.0), "hard": (0.0, self.hard_ends)}[self.names[request.prompt][:4]][learnt]
        draw = random.Random(request.seed)
        return [completion("right" if draw.random() < share else "a wrong one") for _ in range(request.n)]

    def sampler(self):
        sampler, self.client = make_sampler(self.folder / "candidates", self.answer, self.config.rollout)
        self.client.service = SimpleNamespace(on_event=lambda event, values: self.events.append((event, values)))
        return sampler

    def source(self) -> PivotGroups:
        return PivotGroups(self.config, self.sampler(), read_jsonl(self.folder / "pivots" / "pivots.jsonl", Pivot))

    def train(self, *, start: int = 0, end: int = STEPS) -> list[dict[str, Any]]:
        """The rows that a trainer would log; a resumed run has the policy of its step in the engines."""
        source, rows = self.source(), []
        for self.step in range(start, end):
            groups = source.sample(self.step)
            assert groups is not None
            rows.append(source.statistics(groups))
        return rows

    def files(self) -> dict[str, bytes]:
        run = Path(self.config.run_dir)
        return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}

    def drawn(self, step: int) -> set[str]:
        return {group.candidate_id for group in self.source().sample(step)}


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def test_windows_do_not_overlap_and_one_step_moves_nothing():
    values = [4, 2, 2, 2, 9, 0, 1, 1]
    assert deviations(values.__getitem__, since=0, step=3, window=2) is None
    assert deviations(values.__getitem__, since=0, step=4, window=2) == Deviations(3, 2)
    assert deviations(values.__getitem__, since=0, step=6, window=2) == Deviations(3, 4.5), "the 0 alone is not what counts"
    assert deviations(values.__getitem__, since=4, step=7, window=2) is None
    assert deviations(values.__getitem__, since=4, step=8, window=2) == Deviations(4.5, 1)
    with pytest.raises(IndexError):
        deviations(values.__getitem__, since=0, step=9, window=2)


@pytest.mark.parametrize(("field", "value"), [("refresh_fraction", 0.0), ("refresh_fraction", 1.0), ("refresh_window", 0)])
def test_settings_that_refresh_never_or_always_are_refused(world, field, value):
    setattr(world.config.profile, field, value)
    with pytest.raises(ValueError, match=f"profile.{field}={value} must"):
        world.source()
    check(ProfileConfig())


def test_pivots_are_chosen_anew_when_the_deviation_has_collapsed(world):
    rows = world.train()
    assert rows[0]["reward_std"] > 0.3 and [row["reward_std"] for row in rows[3:5]] == [0, 0]
    assert [i for i, row in enumerate(rows) if "profiling_turns" in row] == [5], "the window of steps 3 and 4 is the first to fall"
    assert all(world.drawn(step) <= set(EASY) for step in range(5)) and all(world.drawn(step) <= set(HARD) for step in range(5, STEPS))
    assert min(row["reward_std"] for row in rows[5:]) > 0.3
    assert [world.source().refresher.pivots_at(step).since for step in (4, 5, 6)] == [0, 5, 5], "also seen from an older checkpoint"
    folder = Path(world.config.run_dir) / "refreshes" / "step_000005"
    profiles, pivots = read_jsonl(folder / "profiles.jsonl", CountedProfile), read_jsonl(folder / "pivots.jsonl", Pivot)
    assert sorted(path.name for path in folder.iterdir()) == ["pivots.jsonl", "profiles.jsonl"]
    assert [p.candidate_id for p in profiles] == [*EASY, *HARD, "long:0"] and [p.candidate.id for p in pivots] == HARD
    by_id = {p.candidate_id: p for p in profiles}
    assert all((p.mean, p.variance) == (by_id[p.candidate.id].mean, by_id[p.candidate.id].variance) for p in pivots)


def test_the_step_that_pays_for_a_refresh_says_what_it_cost(world):
    before = world.answered
    rows = world.train()
    assert world.answered - before == 2 * STEPS + len(EASY + HARD)
    folder = Path(world.config.run_dir) / "refreshes" / "step_000005"
    texts = [sample.text for p in read_jsonl(folder / "profiles.jsonl", Profile) for sample in p.samples]
    assert rows[5]["profiling_turns"] == len(texts) == 8 * len(EASY + HARD)
    assert rows[5]["profiling_tokens"] == sum(len(completion("right" if "right" in t else "a wrong one").token_ids) for t in texts)
    assert rows[5]["refreshed_pivots"] == 4 and rows[5]["rollout_turns"] == 16, "the step's own turns are counted apart"
    ((event, values),) = world.events
    assert event == "refresh" and (values["step"], values["profiling_turns"], values["kept_old_pivots"]) == (5, 72, False)
    assert values["deviation_last"] == 0 < values["deviation_first"] == pytest.approx((rows[0]["reward_std"] + rows[1]["reward_std"]) / 2)


def test_new_pivots_begin_an_epoch_of_their_own_with_new_samples(world):
    world.train()
    pivots = read_jsonl(Path(world.config.run_dir) / "refreshes/step_000005/pivots.jsonl", Pivot)
    for step in range(5, STEPS):
        assert world.drawn(step) == {p.candidate.id for p in step_pivots(pivots, 2, step=step - 5, seed=0)}
    assert world.drawn(5) | world.drawn(6) == set(HARD)
    world.step = 0
    world.config.run_dir += "_of_another_time"
    first = read_jsonl(world.folder / "profiles" / "profiles.jsonl", Profile)
    world.source().refresher._refresh(5, Deviations(1, 0))
    again = read_jsonl(Path(world.config.run_dir) / "refreshes/step_000005/profiles.jsonl", Profile)
    assert [p.mean for p in again[:5]] != [p.mean for p in first[:5]], "the same policy, other seeds"


def test_a_single_noisy_step_refreshes_nothing(world):
    world.train(end=1)
    world.step = 3  # one dead step
    world.source().sample(1)
    world.step = 0
    rows = []
    source = world.source()
    for step in range(2, STEPS):
        rows.append(source.statistics(source.sample(step)))
    assert not world.events and all("profiling_turns" not in row for row in rows)


def test_off_by_default_and_then_nothing_changes(world):
    assert not Config().profile.refresh
    world.config.profile.refresh = False
    rows = world.train()
    assert not world.events and not (Path(world.config.run_dir) / "refreshes").exists()
    pivots = read_jsonl(world.folder / "pivots" / "pivots.jsonl", Pivot)
    for step in range(STEPS):
        assert world.drawn(step) == {p.candidate.id for p in step_pivots(pivots, 2, step=step, seed=0)}
        assert rows[step] == rollout_statistics(list(world.source().sample(step))), "no column more than before"


def test_without_new_pivots_the_old_ones_stay_and_the_bill_comes_once(tmp_path, capsys):
    world = World(tmp_path, hard_ends=1.0)
    rows = world.train()
    assert [i for i, row in enumerate(rows) if "profiling_turns" in row] == [5] and rows[5]["refreshed_pivots"] == 0
    assert "no pivots are left, training goes on with the old ones" in capsys.readouterr().out
    assert world.events[0][1]["kept_old_pivots"] and (tmp_path / "run/refreshes/step_000005/pivots.jsonl").read_bytes() == b""
    pivots = read_jsonl(tmp_path / "pivots" / "pivots.jsonl", Pivot)
    for step in range(STEPS):
        assert world.drawn(step) == {p.candidate.id for p in step_pivots(pivots, 2, step=step, seed=0)}, "their epochs go on too"


def test_refreshes_keep_two_windows_apart(tmp_path):
    """However fast the deviation falls, and whatever the new pivots are worth."""
    world = World(tmp_path)
    world.config.profile.rule = SelectionRule.keep_all_zero
    source = world.source()
    source.refresher.deviation = lambda step: 0.1**step
    for step in range(24):
        source.sample(step)
    assert [values["step"] for _, values in world.events] == list(range(2 * WINDOW, 24, 2 * WINDOW))


def test_a_lost_rollout_file_is_named(world):
    world.train(end=4)
    path = Path(world.config.run_dir) / "rollouts" / "step_000001.jsonl"
    path.unlink()
    with pytest.raises(FileNotFoundError, match="rollouts/step_000001.jsonl"):
        world.train(start=4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[World, list[dict[str, Any]], int]:
    world = World(tmp_path_factory.mktemp("undisturbed"))
    before = world.answered
    return world, world.train(), world.answered - before


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_killed_at_any_request_it_ends_with_the_same_files(undisturbed, tmp_path, from_checkpoint):
    """Resumed at the step that was killed, or from an older checkpoint: same pivots, rollouts, refreshes and costs."""
    whole, expected, count = undisturbed
    resumed = World(tmp_path)
    for kill_at in range(8 + from_checkpoint, count, 2):
        resumed.config.run_dir = str(tmp_path / f"run{kill_at}")
        resumed.answered, resumed.kill_at = 0, kill_at
        with pytest.raises(Killed):
            resumed.train()
        start = 3 if from_checkpoint and resumed.step > 3 else resumed.step
        resumed.kill_at = None
        assert resumed.train(start=start) == expected[start:] and resumed.files() == whole.files(), kill_at
        assert resumed.answered == count, "no finished candidate or pivot is sampled again"


@pytest.mark.parametrize("left", [("profiles.jsonl",), ("profiles.jsonl", "torn journal"), ("torn journal",), ()])
def test_killed_between_its_files_a_refresh_goes_on(undisturbed, tmp_path, left):
    whole, expected, _ = undisturbed
    world = World(tmp_path)
    world.train(end=5)
    folder, files = tmp_path / "run/refreshes/step_000005", whole.files()
    folder.mkdir(parents=True)
    lines = files["refreshes/step_000005/profiles.jsonl"].splitlines(keepends=True)
    if "profiles.jsonl" in left:
        (folder / "profiles.jsonl").write_bytes(b"".join(lines))
    if "torn journal" in left:
        (folder / "profiles.journal.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (folder / "pivots.jsonl.tmp1").write_bytes(b"{")
    before = world.answered
    assert world.train(start=5) == expected[5:]
    assert world.answered - before - 2 * (STEPS - 5) == {True: 0, False: 6 if left else 9}["profiles.jsonl" in left]
    (folder / "pivots.jsonl.tmp1").unlink()
    assert world.files() == files


def test_asked_to_leave_while_profiling_it_stops_and_goes_on_there(undisturbed, tmp_path, monkeypatch):
    whole, expected, count = undisturbed
    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    world = World(tmp_path)
    world.answered = 0
    answer = world.answer
    world.answer = lambda request: (world.answered == 14 and received.append(10), answer(request))[1]
    source = world.source()
    for world.step in range(5):
        assert source.sample(world.step) is not None
    world.step = 5
    assert source.sample(5) is None and (tmp_path / "run/refreshes/step_000005/profiles.journal.jsonl").exists()
    received.clear()
    world.answer = answer
    assert world.train(start=5) == expected[5:] and world.files() == whole.files() and world.answered == count
