"""The rollout server dies in the middle of a stage: it is restarted, and no finished rollout is lost or made twice."""

import os
import signal

import pytest

from pivotrl.records import read_jsonl
from pivotrl.run_folder import RunFolder
from pivotrl.types import Profile

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.timeout(1800)]


def test_profiling_survives_the_death_of_its_server(recipes, selected, inputs, tmp_path):
    run = tmp_path / "run"
    journal = run / "profiles" / "profiles.journal.jsonl"
    # One request at a time and verdicts at once, so that the journal follows the server closely.
    slow = ("rollout.max_inflight=1", "domain.verifier=strict", "domain.verifier_workers=0")
    process = recipes.start("profile_candidates", run, *inputs, *slow, f"profiles_path={run / 'profiles'}")
    recipes.wait_until(process, lambda: recipes.server_pids(process))
    (server,) = recipes.server_pids(process)
    recipes.wait_until(process, lambda: journal.exists() and journal.read_bytes().count(b'"samples"') >= 2)
    os.kill(server, signal.SIGKILL)
    finished_before = read_jsonl(journal, Profile)

    finished = recipes.wait(process)
    assert finished.code == 0, finished.errors[-4000:]
    assert "rollout: restarting" in finished.errors
    assert (run / "logs" / "server_0.log").read_text(errors="replace").count("--- starting on port") == 2
    profiles = read_jsonl(run / "profiles/profiles.jsonl", Profile)
    assert len(finished_before) < len(profiles) and all(profile in profiles for profile in finished_before)
    assert texts(profiles) == texts(read_jsonl(selected / "profiles/profiles.jsonl", Profile)), "seeds decide, whoever samples"
    tokens, expected = (RunFolder(folder).manifest()["profile_candidates"]["counts"]["rollout_tokens"] for folder in (run, selected))
    assert tokens == expected, "every candidate was sampled exactly once"


def texts(profiles):
    return {profile.candidate_id: [sample.text for sample in profile.samples] for profile in profiles}
