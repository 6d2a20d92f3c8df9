from collections import Counter

import pytest

from pivotrl.config import Config, ProfileConfig, SelectionRule
from pivotrl.records import read_jsonl, write_jsonl
from pivotrl.selection import FATES, fate, run, select, table_line
from pivotrl.types import Action, Candidate, Message, Pivot, Profile


def profile(name: str, mean: float = 0.0, variance: float = 0.0, excluded: str = "") -> Profile:
    return Profile(candidate_id=name, mean=mean, variance=variance, excluded=excluded)


PROFILES = [
    profile("hard", 0.0),
    profile("mixed", 0.25, 0.1875),
    profile("border", 0.6, 0.24),
    profile("easy", 0.75, 0.1875),
    profile("solved", 1.0),
    profile("long", excluded="over_long"),
    profile("broken", excluded="verifier_failed"),
    profile("other", 0.5, 0.25),
]
MIXED_FATES = ["all_zero", "kept", "too_easy", "too_easy", "all_one", "over_long", "verifier_failed", "kept"]


def ids(profiles) -> list[str]:
    return [p.candidate_id for p in profiles]


def test_every_fate_under_the_rule_of_the_paper():
    assert [fate(p, SelectionRule.mixed, 0.6) for p in PROFILES] == MIXED_FATES
    assert set(MIXED_FATES) == set(FATES)
    kept, counts = select(PROFILES, SelectionRule.mixed, max_mean=0.6, seed=0)
    assert ids(kept) == ["mixed", "other"] and counts == Counter(MIXED_FATES)


def test_keep_all_zero_adds_turns_that_never_succeeded():
    kept, counts = select(PROFILES, SelectionRule.keep_all_zero, max_mean=0.6, seed=0)
    assert ids(kept) == ["hard", "mixed", "other"]
    assert counts["all_zero"] == 0 and counts["kept"] == 3


def test_random_is_a_control_of_the_same_size():
    many = [profile(str(i), mean=(i % 5) / 4, variance=(i % 5) / 4 * (1 - (i % 5) / 4)) for i in range(200)]
    many += [profile("x", excluded="over_long"), profile("y", excluded="verifier_failed")]
    mixed, mixed_counts = select(many, SelectionRule.mixed, max_mean=0.6, seed=0)
    control, counts = select(many, SelectionRule.random, max_mean=0.6, seed=0)
    assert len(control) == len(mixed) == 80 and counts == mixed_counts
    assert control == sorted(control, key=many.index) and len(set(ids(control))) == 80 and not {"x", "y"} & set(ids(control))
    assert (
        control
        == select(many, SelectionRule.random, max_mean=0.6, seed=0)[0]
        != select(many, SelectionRule.random, max_mean=0.6, seed=1)[0]
    )
    for mean in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert sum(p.mean == mean for p in control) >= 8, "drawn from all, whatever their numbers"


def test_table_shows_every_fate_with_its_share():
    assert table_line(Counter(MIXED_FATES)) == (
        "kept 2 (25.0 %), all-zero 1 (12.5 %), all-one 1 (12.5 %), too-easy 2 (25.0 %), over-long 1 (12.5 %), verifier-failed 1 (12.5 %)"
    )


@pytest.fixture
def config(tmp_path) -> Config:
    paths = {name: str(tmp_path / name) for name in ("candidates_path", "profiles_path", "pivots_path")}
    user = Message(role="user", content="hello")
    candidates = [
        Candidate(id=p.candidate_id, trajectory_id="t", task_id="t", domain="d", turn=0, history=(user,), expert=Action(content="hi"))
        for p in PROFILES
    ]
    write_jsonl(tmp_path / "candidates_path" / "candidates.jsonl", candidates)
    write_jsonl(tmp_path / "profiles_path" / "profiles.jsonl", PROFILES)
    return Config(profile=ProfileConfig(max_mean=0.6), **paths)


def test_stage_writes_pivots_with_their_numbers(config, tmp_path):
    counts = run(config)
    pivots = read_jsonl(tmp_path / "pivots_path" / "pivots.jsonl", Pivot)
    assert [(p.candidate.id, p.mean, p.variance) for p in pivots] == [("mixed", 0.25, 0.1875), ("other", 0.5, 0.25)]
    assert counts["kept"] == 2


def test_no_pivots_is_an_error_that_says_where_all_went(config, tmp_path):
    config.profile.max_mean = 0.1
    with pytest.raises(ValueError, match=r"no pivots among 8 profiles \(kept 0 .*too-easy 4 .*more warm-up.*verifier"):
        run(config)
    assert not (tmp_path / "pivots_path").exists()
