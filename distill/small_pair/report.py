"""Measurement of the small pair: accuracy of its solutions, and how often each style is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genssd.distill.small_pair.chat import render_prompt
from genssd.distill.small_pair.problems import Problem, detect_style, solves


@torch.inference_mode()
def generate_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    sample: bool,
    batch: int = 256,
) -> list[str]:
    """Generate one solution to every problem, sampled at temperature 1 or greedily. batch: problems per pass."""
    texts: list[str] = []
    for start in range(0, len(problems), batch):
        prompts = [render_prompt(tokenizer, problem.question) for problem in problems[start : start + batch]]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=128,
            do_sample=sample,
            top_k=0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        completions = output[:, encoded["input_ids"].shape[1] :]
        texts.extend(tokenizer.batch_decode(completions, skip_special_tokens=True))
    return texts


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> str:
    """Generate greedy and sampled solutions, and describe both in one line."""
    return "; ".join(
        describe(problems, generate_solutions(model, tokenizer, problems, sample), sample) for sample in (False, True)
    )


def describe(problems: Sequence[Problem], texts: Sequence[str], sampled: bool) -> str:
    """Describe solutions in one line: their accuracy, and the fraction of each style among the steps."""
    correct = sum(solves(problem, text) for problem, text in zip(problems, texts, strict=True))
    lines = [line for text in texts for line in text.splitlines() if not line.startswith("\\boxed")]
    styles = Counter(detect_style(line) or "other" for line in lines)
    fractions = " ".join(f"{style}={count / styles.total():.2f}" for style, count in styles.most_common())
    return f"{'sampled' if sampled else 'greedy'} {correct / len(problems):.3f} ({fractions})"
