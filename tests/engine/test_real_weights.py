"""Real weights: the greedy text and the log-probabilities of transformers, on real problems.

    GENSSD_MODELS=DIRECTORY:DIRECTORY pytest tests/engine/test_real_weights.py

Directories of models in the format of Hugging Face, of a few hundred million parameters. Problems come from the shared
data beside the repository where they are, else from the lines below.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from genssd import Engine, Sampling

MODELS = [Path(name) for name in os.environ.get("GENSSD_MODELS", "").split(os.pathsep) if name]
PROBLEMS = Path(__file__).parents[3] / "shared/data/gsm8k/test.jsonl"
QUESTIONS = ["Tom has 3 apples and buys 5 more. How many apples does he have?", "What is 12 times 12?"]
NUM_PROMPTS, NUM_TOKENS = 20, 32
TIE = 1e-3
"""Difference of two logits below which two implementations may choose either token."""

pytestmark = pytest.mark.skipif(not MODELS, reason="GENSSD_MODELS names no directories of models")


def read_questions() -> list[str]:
    if not PROBLEMS.is_file():
        return QUESTIONS
    lines = PROBLEMS.read_text().splitlines()[:NUM_PROMPTS]
    return [json.loads(line)["question"] for line in lines]


@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
@torch.inference_mode()
def test_greedy_text_is_that_of_transformers(directory: Path) -> None:
    engine = Engine.from_pretrained(student=directory, dtype="float32", memory_bytes=1 << 29)
    tokenizer = engine.tokenizer("student")
    prompts: list[list[int]] = []
    for question in read_questions():
        if tokenizer.hf.chat_template:
            prompts.append(tokenizer.encode_prompt([{"role": "user", "content": question}]))
        else:
            prompts.append(tokenizer.encode_prompt(f"Question: {question}\nAnswer:"))
    greedy = Sampling(temperature=0.0)
    texts = engine.generate(prompts, model="student", sampling=greedy, max_tokens=NUM_TOKENS)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt, (completion,) in zip(prompts, texts, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        # every token is the likeliest after those before it, so the whole text is what transformers writes
        assert bool((logits.amax(1) - chosen < TIE).all()), tokenizer.hf.decode(completion.token_ids)
        assert len(completion.token_ids) == NUM_TOKENS or completion.token_ids[-1] in tokenizer.end_token_ids
        (scored,) = engine.score([prompt], [list(completion.token_ids)], model="student")
        expected = logits.log_softmax(1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.as_tensor(scored.logprob).float(), expected, atol=1e-3, rtol=0)
