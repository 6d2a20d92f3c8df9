"""What a step trains on. Steps and items are tested with the loop, in test_grpo.py."""

import pytest

from pivotrl.groups import usable
from pivotrl.types import Action, Candidate, Message, Pivot


def pivot(prompt_tokens: int) -> Pivot:
    history = (Message(role="user", content="question"),)
    name = f"t{prompt_tokens}"
    candidate = Candidate(
        id=f"{name}:0", trajectory_id=name, task_id=name, domain="toy", turn=0, history=history, expert=Action(content="answer")
    )
    return Pivot(candidate=candidate, mean=0.5, variance=0.25, prompt_tokens=prompt_tokens)


def test_pivots_with_over_long_histories_are_left_out():
    assert [p.prompt_tokens for p in usable([pivot(10), pivot(11), pivot(12)], 11)] == [10, 11]


@pytest.mark.parametrize("pivots", [[], [pivot(12)]])
def test_nothing_to_train_on_is_one_sentence(pivots):
    with pytest.raises(ValueError, match=f"none of {len(pivots)} pivots .* rollout.max_prompt_tokens=11"):
        usable(pivots, 11)
