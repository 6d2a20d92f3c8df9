import re

import pytest

from pivotrl.evaluation.skills import FAMILIES, WORDS, SkillExample, generate, score, to_messages
from pivotrl.render import Renderer
from pivotrl.tokenizer import compact_text, train_tokenizer

SOLVERS = {
    "add": lambda body: str(sum(map(int, body.split()))),
    "compare": lambda body: max(body.split(), key=int),
    "copy": lambda body: body,
    "last": lambda body: body.rsplit(" ", 1)[-1],
    "lookup": lambda body: re.search(rf"{body[-1]}=(\d)", body)[1],
    "next": lambda body: str(2 * int(body.split()[2]) - int(body.split()[1])),
    "reverse": lambda body: "".join(reversed(body)),
    "sort": lambda body: "".join(sorted(body)),
    "upper": lambda body: body.upper(),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family):
    for example in generate(family, 50, seed=3, split="train"):
        task, _, body = example.prompt.partition(": ")
        expected = str(body.count(task[-1])) if family == "count" else SOLVERS[family](body)
        assert example.answer == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_heldout_never_meet(family):
    train = {example.prompt for seed in range(3) for example in generate(family, 400, seed=seed, split="train")}
    heldout = {example.prompt for seed in range(3) for example in generate(family, 400, seed=seed, split="heldout")}
    assert len(heldout) > 100 and len(train) > 300, "families are large enough to need generalisation"
    assert not train & heldout


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_short(family, renderer):
    for example in generate(family, 50, seed=5, split="heldout"):
        question, answer = to_messages(example)
        assert (question.role, answer.role) == ("user", "assistant")
        assert len(renderer.prompt([question], ())) <= 25


@pytest.fixture(scope="module")
def renderer():
    texts = [compact_text(to_messages(example)) for family in FAMILIES for example in generate(family, 40, seed=0, split="train")]
    return Renderer(train_tokenizer(texts, 400))


def test_equal_arguments_give_equal_examples():
    assert generate("add", 20, seed=1, split="train") == generate("add", 20, seed=1, split="train")
    assert generate("add", 20, seed=1, split="train") != generate("add", 20, seed=2, split="train")
    assert generate("add", 5, seed=1, split="train") == generate("add", 20, seed=1, split="train")[:5]
    assert len(FAMILIES) >= 8 and len(set(WORDS)) == len(WORDS)


def test_score_is_exact_but_for_surrounding_space():
    example = SkillExample(family="add", prompt="add: 14 26", answer="40")
    assert [score(example, text) for text in ("40", " 40\n", "4 0", "040", "", "40.")] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown skill family 'ad'; known: add, compare"):
        generate("ad", 1, seed=0, split="train")
    with pytest.raises(ValueError, match="known: train, heldout"):
        generate("add", 1, seed=0, split="test")
