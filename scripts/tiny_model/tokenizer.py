"""Tokenizers of the models made here: byte-level BPE, one chat template, one set of special tokens.

A conversation is rendered as `<|user|>question<|end|><|assistant|>answer<|end|>`. `<|end|>` ends a turn, an answer and
a document alike, so it is the only id that stops a generation. No token is added when plain text is encoded.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
# In the order of their ids, which begin at 0.
SPECIAL_TOKENS = (END, PAD, SYSTEM, USER, ASSISTANT)

# A role that is neither the system's nor the assistant's, say a tool's, speaks to the model as a user does.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role in ['system', 'developer'] -%}<|system|>
{%- elif message.role == 'assistant' -%}<|assistant|>
{%- else -%}<|user|>
{%- endif -%}
{{- message.content or '' -}}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def trained(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Learn `vocabulary` tokens from `texts`: the special ones, all 256 bytes, and merges."""
    bpe = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _wrapped(bpe)


def synthetic(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of exactly `vocabulary` tokens, without any text.

    Beside special tokens and bytes it has the shortest strings of lower-case letters, so that every token of a model
    with random weights can be decoded, and streams piece by piece.
    """
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocabulary < len(tokens):
        raise ValueError(f"a byte-level vocabulary has at least {len(tokens)} tokens, not {vocabulary}")
    words = list(itertools.islice(_words(), vocabulary - len(tokens)))
    merges = [(word[:-1], word[-1]) for word in words]
    ids = {token: number for number, token in enumerate([*tokens, *words])}
    bpe = _byte_level(models.BPE(vocab=ids, merges=merges))
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return _wrapped(bpe)


def save(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save_pretrained(out)
    # The files must not depend on the history of the object in this process.
    config_file = out / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _words() -> Iterator[str]:
    # Each word but the first generation extends a shorter one that came before, as a merge must.
    for length in itertools.count(2):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrapped(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        # Never produced, as there is a token for every byte; unnamed, Qwen2's tokenizer class would add its own.
        unk_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
