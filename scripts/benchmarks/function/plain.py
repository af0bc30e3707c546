"""The function that benchmarks compare with, as usually written: Flask, gunicorn, `from_pretrained`.

Only `MARKS` is unusual: (phase, its end in ns of CLOCK_MONOTONIC), which reports the phases of the start.
"""

# ruff: noqa: E402  the imports are what is timed
import time

MARKS = [("python and gunicorn", time.monotonic_ns())]

import os
from typing import Any

from flask import Flask, jsonify, request

MARKS.append(("flask", time.monotonic_ns()))

import torch

MARKS.append(("torch", time.monotonic_ns()))

from transformers import AutoModelForCausalLM, AutoTokenizer

MARKS.append(("transformers", time.monotonic_ns()))

tokenizer = AutoTokenizer.from_pretrained(os.environ["MODEL"])

MARKS.append(("tokenizer", time.monotonic_ns()))

model: Any = AutoModelForCausalLM.from_pretrained(os.environ["MODEL"], dtype="auto")

MARKS.append(("model", time.monotonic_ns()))

app = Flask(__name__)


@app.get("/health")
def health() -> Any:
    return jsonify(status="ok")


@app.get("/marks")
def marks() -> Any:
    return jsonify(MARKS)


@app.post("/")
def generate() -> str:
    count = int(request.args.get("tokens", 1))
    prompt = tokenizer(request.get_data(as_text=True), return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
