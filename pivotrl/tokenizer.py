"""A byte-level BPE for tiny policies: short histories, because a CPU pays for every token."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pivotrl.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Not "special" in Hugging Face's sense, as in Qwen3: a server that skips special tokens must still show them.
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
MIN_VOCAB_SIZE = 256 + len(CONTROL_TOKENS) + len(MARKUP_TOKENS)
COMPACT_TEMPLATE = Path(__file__).parent / "templates" / "compact.jinja"

# Merges stay inside these pieces, tried in order. Words are no boundary, so a frequent phrase becomes one token; quotes and
# braces are, so that a value (a tool's name) is never glued to its key and unseen combinations stay cheap. The digits of a
# number stand alone, for arithmetic; identifiers, dates and phone numbers are names rather than numbers and may merge.
PIECES = "|".join(
    (
        r"[A-Z]\d+|\d\d+(?:[-:]\d\d+)+",
        r"\d",
        r'[\s\[\]{},"]{0,8}"[A-Za-z_]\w*":[ \n]?(?:\[?"|\[?\{|\[)?',  # a JSON key with the punctuation around it
        r'(?:(?![A-Z]\d)[^"{}\[\]\d\n.,:;|])+[.,:;|]* ?\n?',  # a phrase up to its punctuation
        r'["{}\[\]]+[,\s]*|[.,:;|]+ ?\n?|\n+',
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a tokenizer whose chat template is templates/compact.jinja; equal texts give equal tokenizers.

    Plain BPE spends most of a small vocabulary on the steps towards its long tokens. Here the pieces that save most become
    tokens at once, without merges leading to them, and half of the vocabulary is left to ordinary merges for everything else.

    Args:
        texts: what the policy will read and write, best rendered by `compact_text`; special tokens in them are known already.
        vocab_size: tokens, all special ones included. With few texts the vocabulary stays smaller.

    Raises:
        ValueError: vocab_size does not hold the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size {vocab_size} is too small: bytes and special tokens alone need {MIN_VOCAB_SIZE}")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    pieces = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    special = re.compile("|".join(map(re.escape, CONTROL_TOKENS + MARKUP_TOKENS)))
    counts = Counter(piece for text in texts for part in special.split(text) for piece, _ in pieces.pre_tokenize_str(part))
    by_saving = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: ((1 - len(piece)) * counts[piece], piece))
    whole = by_saving[: (vocab_size - MIN_VOCAB_SIZE) // 2]
    vocab, merges = _train_merges(counts, whole, vocab_size - len(whole) - len(CONTROL_TOKENS) - len(MARKUP_TOKENS))
    for piece in whole:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=COMPACT_TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def _train_merges(counts: Counter[str], whole: Sequence[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """BPE over byte-level pieces; a piece that is a token already counts once, for its likes among unseen pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    known = set(whole)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # byte-level pieces contain no whitespace
    tokenizer.train_from_iterator((" ".join([piece] * (1 if piece in known else counts[piece])) for piece in sorted(counts)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def compact_text(messages: Sequence[Message]) -> str:
    """A conversation as templates/compact.jinja writes it: training text for a tokenizer that does not exist yet."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from pivotrl.render import template_message

    template = COMPACT_TEMPLATE.read_text(encoding="utf-8")
    texts, _ = render_jinja_template([[template_message(message) for message in messages]], chat_template=template)
    return texts[0]
