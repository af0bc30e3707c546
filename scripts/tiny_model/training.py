"""Trains the demo's model: a Llama of about two million parameters that knows its documentation by heart."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tiny_model import corpus, tokenizer

VOCABULARY = 1536
# Tokens of a batch, padding included, so that every step costs the same.
BATCH_TOKENS = 1536
# Longest row: the longest answer with its question fits, and rows stay cheap.
ROW_TOKENS = 256
# What the rows are: prose, the beginnings of answers, and whole conversations.
PROSE_SHARE = 0.15
OPENING_SHARE = 0.5
OPENING_TOKENS = 16
MATRIX_LEARNING_RATE = 0.02
OTHER_LEARNING_RATE = 6e-3

_IGNORED = -100  # cross_entropy's label for "no loss here"
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are Glowplug's demo model.", "Answer briefly.")
_OPENINGS = ("", "", "", "Please tell me: ", "Hello! ", "I have a question. ")

Row = tuple[list[int], list[int]]  # token ids, labels


@dataclass(frozen=True, slots=True)
class Examples:
    """An endless, seeded stream of training rows."""

    codec: PreTrainedTokenizerFast
    prose: list[list[int]]
    draw: random.Random
    turns: Iterator[tuple[str, str]]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield token ids and labels, [rows, tokens], padded on the right, where a causal model needs no mask."""
        while True:
            rows = sorted((self._row() for _ in range(256)), key=lambda row: len(row[0]))
            batches: list[list[Row]] = [[]]
            for row in rows:  # of like length, so that little is padding
                if (len(batches[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
                    batches.append([])
                batches[-1].append(row)
            self.draw.shuffle(batches)
            yield from (_padded(batch, self.codec.pad_token_id) for batch in batches)

    def _row(self) -> Row:
        kind = self.draw.random()
        if kind < PROSE_SHARE:
            ids = self.draw.choice(self.prose)
            return ids, ids
        if kind < PROSE_SHARE + OPENING_SHARE:
            # Which answer it is shows in its first words, and that is the harder part to learn: it gets more, and
            # shorter, rows.
            ids, labels = self._conversation(1)
            end = OPENING_TOKENS + next(place for place, label in enumerate(labels) if label != _IGNORED)
            return ids[:end], labels[:end]
        return self._conversation(self.draw.choice((1, 1, 1, 2, 3)))

    def _conversation(self, turns: int) -> Row:
        messages: list[dict[str, str]] = []
        if self.draw.random() < 0.3:
            messages.append({"role": "system", "content": self.draw.choice(_SYSTEM_PROMPTS)})
        ids: list[int] = []
        labels: list[int] = []
        for _ in range(turns):
            question, answer = next(self.turns)
            messages.append({"role": "user", "content": self._spoken(question)})
            prompt = self.codec.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            said = _said(self.codec, answer)
            if ids and len(prompt) + len(said) > ROW_TOKENS:
                break
            # Only answers are learned: nobody asks this model to ask questions.
            labels += [_IGNORED] * (len(prompt) - len(ids)) + said
            ids = [*prompt, *said]
            messages.append({"role": "assistant", "content": answer})
        return ids, labels

    def _spoken(self, question: str) -> str:
        """Vary case and punctuation of a question, as another person might type it."""
        if self.draw.random() < 0.3:
            question = question.rstrip("?!")
        if self.draw.random() < 0.2:
            question = question.lower()
        return self.draw.choice(_OPENINGS) + question


def train(repository: Path, out: Path, *, seed: int, steps: int, threads: int, report: Callable[[str], None]) -> None:
    """Train and write a checkpoint to `out`. The same corpus, seed, steps and threads give the same bytes."""
    began = time.monotonic()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)

    entries = corpus.entries()
    paragraphs = corpus.paragraphs(repository)
    asked = [question for entry in entries for question in entry.questions]
    # The answers are prose, too, so that plain completions find words.
    told = [*paragraphs, *(entry.answer for entry in entries)]
    codec = tokenizer.trained([*asked, *told], VOCABULARY)
    prose = [_said(codec, text)[:ROW_TOKENS] for text in told]
    report(f"{len(asked)} questions, {len(entries)} answers, {len(paragraphs)} paragraphs")

    model = LlamaForCausalLM(_config(codec))
    draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
    examples = Examples(codec, prose, draw, _turns(entries, draw))
    _fit(model, examples.batches(), steps, report)

    # What is judged is what is stored: the rounded weights.
    model.eval()  # type: ignore[no-untyped-call]
    model.bfloat16()
    unsure = [entry.questions[0] for entry in entries if not knows(model, codec, entry)]
    report(f"{len(entries) - len(unsure)} answers are word for word after {time.monotonic() - began:.0f} s")
    if unsure:
        report(f"not so for: {', '.join(unsure[:10])}")

    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=codec.bos_token_id, eos_token_id=codec.eos_token_id, pad_token_id=codec.pad_token_id
    )
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(out)
    # Greedy, and said so: transformers leaves out what is its own default, and the API's default is to sample.
    chosen = out / "generation_config.json"
    chosen.write_text(json.dumps({"do_sample": False, **json.loads(chosen.read_text())}, indent=2) + "\n")
    # It comes out readable by its owner only, but functions run as other users.
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(codec, out)
    report(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.2f} MB")


def _config(codec: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(codec),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=codec.bos_token_id,
        eos_token_id=codec.eos_token_id,
        pad_token_id=codec.pad_token_id,
    )


def _fit(
    model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], steps: int, report: Callable[[str], None]
) -> None:
    # Muon learns the answers in a third of the steps that AdamW needs, which is what keeps this near a minute. It is
    # meant for the matrices inside the layers only.
    inside = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and ".layers." in name]
    others = [weight for name, weight in model.named_parameters() if weight.dim() != 2 or ".layers." not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inside, lr=MATRIX_LEARNING_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warm_up = max(1, steps // 20)

    def rate(step: int) -> float:
        """Return the share of the peak learning rate: a short ramp, then a cosine down to almost nothing."""
        return min((step + 1) / warm_up, 0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    for step in range(steps):
        ids, labels = next(batches)
        scores = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 50 == 0 or step == steps - 1:
            report(f"step {step}: loss {loss.item():.3f}")


@torch.inference_mode()
def knows(model: LlamaForCausalLM, codec: PreTrainedTokenizerFast, entry: corpus.Entry) -> bool:
    """Return whether greedy decoding answers the entry's first question word for word.

    One forward pass shows this: every token must be the likeliest one after those before it.
    """
    prompt = codec.apply_chat_template(
        [{"role": "user", "content": entry.questions[0]}], add_generation_prompt=True, return_dict=False
    )
    said = _said(codec, entry.answer)
    likeliest = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0].argmax(-1).tolist()
    return bool(likeliest[len(prompt) - 1 : -1] == said)


def _turns(entries: list[corpus.Entry], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield questions with their answers, without end, shuffled again in every round.

    An answer with more questions comes more often.
    """
    deck = [entry for entry in entries for _ in range(0, len(entry.questions), 6)]
    while True:
        draw.shuffle(deck)
        for entry in deck:
            yield draw.choice(entry.questions), entry.answer


def _said(codec: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of a text with the end token."""
    return [*codec.encode(text, add_special_tokens=False), codec.eos_token_id]


def _padded(rows: list[Row], padding: int) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*ids, *[padding] * (width - len(ids))] for ids, _ in rows])
    labels = torch.tensor([[*labels, *[_IGNORED] * (width - len(labels))] for _, labels in rows])
    return ids, labels
