import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakes import renderer  # noqa: E402

from pivotrl import sft  # noqa: E402
from pivotrl.batching import pack  # noqa: E402
from pivotrl.candidates import tools_key  # noqa: E402
from pivotrl.config import Config, DomainConfig, ModelConfig, SftConfig  # noqa: E402
from pivotrl.evaluation import skills  # noqa: E402
from pivotrl.records import write_json, write_jsonl  # noqa: E402
from pivotrl.render import Renderer  # noqa: E402
from pivotrl.types import Message, ToolCall, Trajectory  # noqa: E402

CALL = ToolCall(name="look", arguments={"x": 1}, id="c")
EPISODE = (
    Message(role="user", content="the question, long enough to be shared by what follows"),
    Message(role="assistant", tool_calls=(CALL,)),
    Message(role="tool", content="the answer of the tool", tool_call_id="c"),
    Message(role="assistant", content="the right answer"),
)


@pytest.fixture(autouse=True)
def few_skills(monkeypatch):
    monkeypatch.setattr(sft, "SKILL_EXAMPLES", 40)


@pytest.fixture
def config(tmp_path) -> Config:
    trajectories = [
        Trajectory(
            id=f"{split}{i}", task_id=f"{split}{i}", domain="d", messages=(Message(role="user", content=f"{i}"), *EPISODE[1:]), split=split
        )
        for split in ("warmup", "train")
        for i in range(6)
    ]
    write_jsonl(tmp_path / "trajectories.jsonl", trajectories)
    write_json(tmp_path / "tools.json", {tools_key(()): []})
    return Config(candidates_path=str(tmp_path), sft=SftConfig(tokens_per_step=400), domain=DomainConfig(name="d"))


def steps(config: Config, count: int, *, skip: int = 0):
    return list(itertools.islice(sft.batches(config, renderer()), skip, skip + count))


def texts(items) -> list[str]:
    return [renderer().tokenizer.decode(item.token_ids) for item in items]


def test_every_assistant_turn_is_an_item_with_its_completion_scored():
    items = sft.conversation_items(renderer(), EPISODE, ())
    assert len(items) == 2
    for item, position in zip(items, (1, 3), strict=True):
        start = item.scored[0]
        assert list(item.token_ids[:start]) == renderer().prompt(EPISODE[:position], ())
        action = renderer().parse(renderer().decode(item.token_ids[start:]))
        assert action.content == EPISODE[position].content
        assert [(call.name, call.arguments) for call in action.tool_calls] == [(c.name, c.arguments) for c in EPISODE[position].tool_calls]
        assert item.token_ids[-1] == renderer().end_id and item.scored[-1] == len(item.token_ids) - 1


def test_growing_turns_fold_into_one_segment():
    items = sft.conversation_items(renderer(), EPISODE, ())
    (row,) = pack(items, max_row_tokens=1000, shared_prefix=True)
    assert row.segments_N3.tolist() == [[0, len(items[1].token_ids), -1]]


def test_an_assistant_turn_without_a_history_is_no_item():
    assert sft.conversation_items(renderer(), [Message(role="assistant", content="hello"), *EPISODE[:2]], ())[0].scored[0] > 0
    assert len(sft.conversation_items(renderer(), [Message(role="assistant", content="hello"), *EPISODE[:2]], ())) == 1


def test_only_the_seed_decides_the_steps(config):
    first = steps(config, 4)
    assert first == steps(config, 4) and first[2:] == steps(config, 2, skip=2), "a resumed run goes on with the same data"
    config.seed = 1
    assert first != steps(config, 4)


def test_steps_are_of_the_wanted_size_and_mixture(config):
    for items in steps(config, 5):
        longest = {item.unit: max(len(i.token_ids) for i in items if i.unit == item.unit) for item in items}
        skill_units = {item.unit for item, text in zip(items, texts(items), strict=True) if '"look"' not in text}
        skill_tokens = sum(longest[unit] for unit in skill_units)
        assert 300 <= sum(longest.values()) - skill_tokens < 300 + max(longest.values())
        assert 100 <= skill_tokens < 100 + max(longest.values())
        assert sum(sum(item.fields["weights"]) for item in items) == pytest.approx(1)
        assert len({weight for item in items for weight in item.fields["weights"]}) == 1, "every scored token counts the same"


def test_an_epoch_is_over_before_a_trajectory_comes_again(config):
    config.sft.skill_share = 0.0
    drawn = [text.partition("user\n")[2].partition("<")[0] for items in steps(config, 12) for text in texts(items[::2])]
    for start in range(0, len(drawn) - 5, 6):
        assert sorted(drawn[start : start + 6]) == list("012345")
    assert len(drawn) > 12


def test_skills_are_asked_once_and_answered_once():
    for messages in sft.skill_messages(0):
        assert [m.role for m in messages] == ["user", "assistant"]
    assert len(sft.skill_messages(0)) == 40
    (question, answer), *_ = sft.skill_messages(0)
    assert (question.content.partition(":")[0], bool(answer.content)) == (next(iter(skills.FAMILIES)), True)


def test_without_trajectories_the_error_says_which_settings_give_some(config):
    config.sft.split = "heldout"
    with pytest.raises(ValueError, match="no 'heldout' trajectories; set domain.num_warmup_tasks, or sft.split=train"):
        steps(config, 1)


def test_a_tokenizer_is_trained_on_what_may_be_trained_on_and_kept(config, tmp_path):
    config.sft.train_tokenizer, config.model = True, ModelConfig(name="m", vocab_size=300)
    folder = tmp_path / "tokenizer"
    sft.prepare_tokenizer(config, folder)
    assert Renderer.from_pretrained(folder).prompt(EPISODE[:1], ())
    before = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "trajectories.jsonl").unlink()
    sft.prepare_tokenizer(config, folder)
    assert (folder / "tokenizer.json").read_bytes() == before


def test_without_a_tokenizer_the_error_says_how_to_get_one(config, tmp_path):
    with pytest.raises(ValueError, match="set model.hf_path .* or sft.train_tokenizer=true"):
        sft.prepare_tokenizer(config, tmp_path / "tokenizer")
    config.sft.train_tokenizer, config.model.hf_path = True, "policy"
    with pytest.raises(ValueError, match="sft.train_tokenizer=true with model.hf_path=policy"):
        sft.prepare_tokenizer(config, tmp_path / "tokenizer")


def test_the_last_step_and_every_nth_are_saved_with_their_loss(config, monkeypatch, tmp_path):
    saved, checks = [], []

    class Saver:
        def __init__(self, policy, folder, options):
            assert folder == tmp_path / "run" / "checkpoints" / "sft" and options is config.checkpoint

        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            saved.append(kind)

        def check(self):
            checks.append(len(saved))

        def save(self, step, *, score):
            saved.append((step, score))

    class Policy:
        def train_step(self, rows, loss, *, temperature, step):
            return {"loss": 3.0 - step}

    config.sft.num_steps, config.sft.checkpoint_every, config.run_dir = 5, 2, str(tmp_path / "run")
    monkeypatch.setattr(sft.checkpoint, "Saver", Saver)
    sft.train(config, Policy(), renderer(), None, 1)
    assert saved == [(2, -2.0), (4, 0.0), (5, 1.0), None], "a lower loss is a better score"
    assert len(checks) == 4
