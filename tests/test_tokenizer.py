import itertools

import pytest

from pivotrl.config import DomainConfig
from pivotrl.evaluation.skills import FAMILIES, generate, to_messages
from pivotrl.render import Renderer
from pivotrl.sources import build_source
from pivotrl.tokenizer import CONTROL_TOKENS, MARKUP_TOKENS, MIN_VOCAB_SIZE, compact_text, train_tokenizer
from pivotrl.types import Action, Message, TaskRef, ToolCall, Trajectory

EVERY_NTH_TASK = 40


def _skill_texts():
    return [compact_text(to_messages(example)) for family in FAMILIES for example in generate(family, 40, seed=0, split="train")]


@pytest.fixture(scope="module")
def trajectories():
    """Real telecom episodes, every other one for training the tokenizer."""
    domain = DomainConfig(name="tau2_telecom", source="tau2_telecom", environment="tau2_telecom", system_prompt=False)
    source = build_source(domain)
    refs = [ref for ref in source.refs() if isinstance(ref, TaskRef)]
    read = (source.read(ref.key) for ref in refs[::EVERY_NTH_TASK])
    return [trajectory for trajectory in read if isinstance(trajectory, Trajectory)]


@pytest.fixture(scope="module")
def renderer(trajectories):
    texts = [compact_text(trajectory.messages) for trajectory in trajectories[::2]]
    return Renderer(train_tokenizer(texts + _skill_texts(), 1024))


def test_unseen_telecom_episodes_are_short(renderer, trajectories):
    unseen = trajectories[1::2]
    episodes = [len(renderer.prompt(trajectory.messages, ())) for trajectory in unseen]
    actions = [
        len(renderer.action_ids(Action.from_message(message), trajectory.messages[:turn], ()))
        for trajectory in unseen
        for turn, message in enumerate(trajectory.messages)
        if message.role == "assistant"
    ]
    per_episode, per_action = sum(episodes) / len(episodes), sum(actions) / len(actions)
    print(f"{len(unseen)} episodes of {len(actions) / len(unseen):.1f} actions: {per_episode:.0f} tokens, {per_action:.1f} an action")
    assert len(actions) / len(unseen) > 12
    assert per_episode <= 700
    assert 5 <= per_action <= 12


def test_tool_name_is_a_token_of_its_own_beside_its_frame(renderer):
    call = ToolCall(name="check_status_bar")
    ids = renderer.action_ids(Action(tool_calls=(call,)), [Message(role="user", content="Hi")], ())
    tokens = [renderer.tokenizer.decode([token]) for token in ids]
    assert tokens == ["<tool_call>", '\n{"name": "', "check_status_bar", '", "arguments": {', "}}\n", "</tool_call>", "<|im_end|>"]


def test_prompts_are_token_prefixes_of_later_prompts(renderer, trajectories):
    for trajectory in trajectories[:3]:
        whole = renderer.prompt(trajectory.messages, ())
        turns = [index for index, message in enumerate(trajectory.messages) if message.role == "assistant"]
        for turn in turns:
            part = renderer.prompt(trajectory.messages[:turn], ())
            action = renderer.action_ids(Action.from_message(trajectory.messages[turn]), trajectory.messages[:turn], ())
            assert whole[: len(part) + len(action)] == part + action


@pytest.mark.parametrize("content", ["\n\nspace first", " ", "", '{"a', "5", "assistant", "\U0001f4f5 é"])
def test_prefixes_hold_for_awkward_content_and_past_reasoning_is_dropped(renderer, content):
    history = [
        Message(role="user", content=content),
        Message(role="assistant", content=content, reasoning="secret"),
        Message(role="tool", content=content),
        Message(role="tool", content=content),
        Message(role="assistant", reasoning="secret", tool_calls=(ToolCall(name="look"),)),
        Message(role="tool", content=content),
    ]
    prompts = [renderer.prompt(history[:length], ()) for length in (1, 4, 6)]
    for shorter, longer in itertools.pairwise(prompts):
        assert longer[: len(shorter)] == shorter
    assert "secret" not in renderer.tokenizer.decode(prompts[-1])
    latest = renderer.action_ids(Action(reasoning="secret", content="x"), history, ())
    assert renderer.decode(latest) == "<think>\nsecret\n</think>\nx"


def test_compact_template_writes_chatml_without_schemas(renderer):
    history = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="Go"),
        Message(role="assistant", content="I look.", tool_calls=(ToolCall(name="look", arguments={"at": 'a "b"'}), ToolCall(name="wait"))),
        Message(role="tool", content="dark"),
        Message(role="tool", content="done"),
    ]
    tools = [{"type": "function", "function": {"name": "look", "description": "nowhere to be seen"}}]
    assert renderer.tokenizer.decode(renderer.prompt(history, tools)) == (
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nGo<|im_end|><|im_start|>assistant\nI look."
        '<tool_call>\n{"name": "look", "arguments": {"at": "a \\"b\\""}}\n</tool_call>'
        '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call><|im_end|>'
        "<|im_start|>user\n<tool_response>dark</tool_response><tool_response>done</tool_response><|im_end|><|im_start|>assistant\n"
    )


def test_every_text_survives_and_digits_of_numbers_stand_alone(renderer):
    encode, decode = renderer.tokenizer.encode, renderer.tokenizer.decode
    texts = (
        "plain",
        " lead  trail ",
        "\x00\t\r\n\n",
        "日本語 \U0001f4f5⁴",
        '{"a": [1, {"b": ""}]}',
        "C1001 2025-01-31 10:30",
        "<tool_call",
    )
    for text in texts:
        assert decode(encode(text)) == text
    assert [decode([token]) for token in encode("1234.5")] == ["1", "2", "3", "4", ".", "5"]
    assert len(encode("C1001")) == 1, "an identifier is a name, not a number"


def test_special_tokens_are_single_and_never_learnt_as_merges(renderer):
    tokenizer = renderer.tokenizer
    for token in CONTROL_TOKENS + MARKUP_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    ids = [tokenizer.convert_tokens_to_ids("<tool_call>"), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>", "servers that skip special tokens must show calls"
    assert not [token for token in tokenizer.get_vocab() if "im_start" in token and token not in CONTROL_TOKENS]
    assert len(tokenizer) <= 1024 and max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_equal_texts_give_equal_tokenizers():
    texts = _skill_texts()
    first, second = (train_tokenizer(iter(texts), 500) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_vocabulary_must_hold_bytes_and_special_tokens():
    assert len(train_tokenizer([], MIN_VOCAB_SIZE)) == MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match=f"need {MIN_VOCAB_SIZE}"):
        train_tokenizer([], MIN_VOCAB_SIZE - 1)
