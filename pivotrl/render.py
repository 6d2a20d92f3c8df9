"""The only place where messages become token ids and completions become actions.

Control tokens are the template's alone. Where content (a user's words, a tool's answer, a tool's description, an argument)
spells one, such as "<|im_end|>" or "<tool_call>", the text stays letter for letter but is encoded in two halves, so the model
reads ordinary tokens and nobody can open a turn or forge a call from inside content. An assistant's own content keeps its
action markup (a malformed completion is shown as it was generated), but never the tokens that start or end turns.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pivotrl.types import Action, Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CALL, END_CALL = "<tool_call>", "</tool_call>"
THINK, END_THINK = "<think>", "</think>"
ACTION_MARKUP = (CALL, END_CALL, THINK, END_THINK)
STRAY_MARKUP = re.compile("</tool_call>|</?tool_response>|</?think>")
TOOL_NAME = re.compile(r'[^\s"\\<>]+')  # the names that every template can print between quotes without escaping
MAX_NESTING = 64
MAX_CACHED = 4096  # pieces of text between control tokens, about as many as a batch of episodes holds
# A Unicode noncharacter marks where encoding must break; it reaches neither the tokenizer nor the model.
BREAK, REPLACEMENT = "\ufdd0", "\ufffd"


class Renderer:
    """A Hugging Face fast tokenizer with its chat template, for templates that write tool calls in Hermes style.

    Attributes:
        tokenizer: the tokenizer itself.
        end_id: the token that ends an assistant turn; the last one of `action_ids`.
        stop_ids: tokens at which an engine must stop: `end_id` and the tokenizer's ends of sequence.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        """Raises ValueError when the tokenizer has no chat template, or one that ends no assistant turn by a special token."""
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; add chat_template.jinja to its folder")
        self.tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        controls = {text: token for text, token in added.items() if token.special}
        self._control = _any_of(controls)
        self._guarded = _any_of(added)
        self._guarded_assistant = _any_of(text for text in added if text not in ACTION_MARKUP)
        # A history that grows by a turn is encoded piece by piece, of which only the last ones are new.
        plain = [text for text, token in controls.items() if not (token.lstrip or token.single_word or token.normalized)]
        self._piece = re.compile(f"(?={_any_of(plain).pattern})")
        self._piece_ids = functools.lru_cache(MAX_CACHED)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self._tools: tuple[Sequence[dict[str, Any]], list[dict[str, Any]]] = ((), [])
        probe = [Message(role="user", content="question")]
        self._opens_think = self._template(probe, (), opening=True).rstrip().endswith(THINK)
        turn = self._encode(self._turn_text(Action(content="answer"), probe, ()))
        special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends = [token for token in turn if token in special_ids]
        if not ends:
            raise ValueError("the chat template ends an assistant turn by no special token, so no completion could ever stop")
        self.end_id: int = ends[0]
        sequence_ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|endoftext|>")} - {None}
        self.stop_ids: tuple[int, ...] = tuple(sorted({self.end_id} | sequence_ends))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Renderer":
        """Load from a Hugging Face folder (or hub name).

        Raises:
            ValueError: no chat template, or one that cannot be used; see `Renderer`.
            OSError: no tokenizer there.
        """
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(path)))

    def prompt(self, history: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a history up to the point where the assistant's next completion starts."""
        return self._encode(self._template(history, tools, opening=True))

    def action_ids(self, action: Action, history: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """The completion that a policy would have to generate for this action after `prompt(history, tools)`, `end_id` included.

        A malformed action stands for its raw content. Ids of tool calls are not rendered.

        Raises:
            ValueError: the action would be read back differently (content that spells action markup, a tool name with quotes,
                NaN among the arguments), or the template rewrites the history once an answer follows.
        """
        text = self._turn_text(action, history, tools)
        ids = self._encode(text)
        ids = ids[: ids.index(self.end_id) + 1]
        if not action.malformed:
            read = self.parse(self.decode(ids))
            expected = _calls_and_content(action)
            if read.malformed or _calls_and_content(read) != expected:
                raise ValueError(f"this action would be read back as {read.malformed or read}: {expected}")
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion without the stop token that ended it."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def parse(self, text: str) -> Action:
        """The action that a completion's text takes; never raises.

        Reasoning is split off first, then content, then any number of calls, whitespace around each dropped. What is not exactly
        that comes back with `malformed` set and the text after the reasoning as content.
        """
        reasoning, body = "", text.strip()
        if self._opens_think or body.startswith(THINK):
            reasoning, closed, body = (part.strip() for part in body.removeprefix(THINK).partition(END_THINK))
            if not closed:
                return Action(reasoning=reasoning, malformed="unclosed <think>")
        content, _, calls = body.partition(CALL)
        try:
            if control := self._control.search(content):
                raise ValueError(f"control token {control[0]} inside a completion")
            if stray := STRAY_MARKUP.search(content):
                raise ValueError(f"stray {stray[0]}")
            tool_calls = tuple(_read_calls(CALL + calls)) if CALL in body else ()
        except RecursionError:
            return Action(content=body, reasoning=reasoning, malformed="arguments are nested too deeply")
        except ValueError as error:
            return Action(content=body, reasoning=reasoning, malformed=str(error))
        return Action(content=content.strip(), reasoning=reasoning, tool_calls=tool_calls)

    def _turn_text(self, action: Action, history: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        opening = self._template(history, tools, opening=True)
        whole = self._template([*history, action.to_message()], tools, opening=False)
        if not whole.startswith(opening):
            raise ValueError("the chat template rewrites the history once an answer follows, so a prompt is no prefix of its conversation")
        return whole[len(opening) :]

    def _template(self, history: Sequence[Message], tools: Sequence[dict[str, Any]], *, opening: bool) -> str:
        messages = []
        for message in history:
            guarded = self._guarded_assistant if message.role == "assistant" else self._guarded
            rendered = template_message(message)
            # Arguments are data wherever they stand: what they quote is never markup.
            messages.append({key: _guard(value, self._guarded if key == "tool_calls" else guarded) for key, value in rendered.items()})
        known, schemas = self._tools
        if known is not tools:  # most calls are about the tools of the call before
            schemas = _guard(list(tools), self._guarded)
            self._tools = tools, schemas
        return self.tokenizer.apply_chat_template(messages, tools=schemas or None, add_generation_prompt=opening, tokenize=False)

    def _encode(self, text: str) -> list[int]:
        pieces = (piece for part in text.split(BREAK) for piece in self._piece.split(part))
        return [token for piece in pieces for token in self._piece_ids(piece)]


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: OpenAI's keys, `reasoning_content`, arguments as an object."""
    if message.role != "assistant":
        return {"role": message.role, "content": message.content}
    # Templates strip an answer's edges or do not, parsing always does: stripped here, all agree.
    rendered: dict[str, Any] = {"role": message.role, "content": message.content.strip()}
    if reasoning := message.reasoning.strip():
        rendered["reasoning_content"] = reasoning
    if message.tool_calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        rendered["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return rendered


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    # Single characters are left out: a break inside them is impossible, and no control token is that short.
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1) or r"(?!)")


def _guard(value: Any, tokens: re.Pattern[str]) -> Any:
    """The same JSON value with a break after the first letter of every token that a string in it spells."""
    match value:
        case str():
            return tokens.sub(lambda found: found[0][0] + BREAK + found[0][1:], value.replace(BREAK, REPLACEMENT))
        case dict():
            return {_guard(key, tokens): _guard(item, tokens) for key, item in value.items()}
        case list() | tuple():
            return [_guard(item, tokens) for item in value]
    return value


def _calls_and_content(action: Action) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    return action.content.strip(), [(call.name, call.arguments) for call in action.tool_calls]


def _read_calls(text: str) -> Iterable[ToolCall]:
    """One or more `<tool_call>{...}</tool_call>`, and nothing else but whitespace.

    Raises ValueError with the reason.
    """
    rest = text
    while rest := rest.strip():
        if not rest.startswith(CALL):
            raise ValueError(f"text after a tool call: {rest[:40]!r}")
        rest = rest.removeprefix(CALL).lstrip()
        try:
            value, end = DECODER.raw_decode(rest)  # not a search for the closing tag: arguments may quote it
        except json.JSONDecodeError as error:
            raise ValueError(f"broken JSON in a tool call: {error}") from error
        yield _read_call(value)
        rest = rest[end:].lstrip()
        if not rest.startswith(END_CALL):
            raise ValueError(f"expected {END_CALL}, found {rest[:40]!r}" if rest else f"unclosed {CALL}")
        rest = rest.removeprefix(END_CALL)


def _read_call(value: Any) -> ToolCall:
    if not isinstance(value, dict):
        raise ValueError("a tool call is no JSON object")
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ValueError(f"missing or invalid tool name {_quoted(name)}" if "name" in value else "missing tool name")
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no JSON object" if "arguments" in value else "missing arguments")
    if unknown := value.keys() - {"name", "arguments"}:
        raise ValueError(f"unknown keys in a tool call: {_quoted(sorted(unknown))}")
    if _nesting(arguments) > MAX_NESTING:
        raise ValueError(f"arguments are nested over {MAX_NESTING} levels deep")
    msgspec.json.encode(value)  # raises ValueError on lone surrogates, which no record could hold
    return ToolCall(name=name, arguments=arguments)


def _quoted(value: Any) -> str:
    """A value in a reason: short, and without letters that no record could hold."""
    text = ascii(value[:100] if isinstance(value, str | list) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _nesting(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_nesting, items)) if items else 0


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError(f"duplicate keys among {_quoted([key for key, _ in pairs[:20]])}")
    return read


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
