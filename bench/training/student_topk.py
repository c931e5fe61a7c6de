"""Bias of reverse KL over the student's k most likely tokens, against the whole vocabulary, on the student's own text.

    python -m bench.training.student_topk [--model DIRECTORY --problems FILE] [--prompts 24] [--json FILE]

By default the small pair: its student writes answers to its problems. With --model one model is student and teacher
(self-distillation): it writes without, and is read as a teacher with, the reference solution in its prompt; FILE has
rows with `question` and `answer`, such as GSM8K's.

For every k and every rule for the tokens outside (`kd_tail`): the mean loss per token as a fraction of the full reverse
KL, and the gradient in the hidden states that the head reads: its error |g - g_full| / |g_full| over all tokens, and
its cosine with the full one. `mass` is the student's mean probability of its k tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssd.distill import small_pair
from genssd.distill.small_pair.problems import make_problems
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.losses import CompletionTokens, Head, compute_loss
from genssd.kernels.logprob import linear_logprob

PAIR = Path(next(iter(small_pair.__path__)))
TAILS = ("drop", "policy_gradient", "renormalize", "bucket")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = 96


def read_pair(directories: tuple[Path, Path], count: int) -> tuple[Head, Head, Tensor]:
    """The student's text on problems of the small pair: its head, the teacher's, and the ids of the tokens."""
    prompts = [[{"role": "user", "content": p.question}] for p in make_problems(count, seed=7, split="eval")]
    return read_text(directories, prompts, prompts)


def read_oneself(directory: Path, problems: Path, count: int) -> tuple[Head, Head, Tensor]:
    """The model's text on problems, read by itself with and without the reference solution."""
    rows = [json.loads(line) for line in problems.read_text().splitlines()[:count]]
    plain = [[{"role": "user", "content": row["question"]}] for row in rows]
    hinted = [
        [
            {
                "role": "user",
                "content": f"{row['question']}\n\nA correct solution:\n{row['answer']}\n\nSolve it yourself.",
            }
        ]
        for row in rows
    ]
    return read_text((directory, directory), plain, hinted)


def read_text(
    directories: tuple[Path, Path], prompts: list[Any], teacher_prompts: list[Any]
) -> tuple[Head, Head, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, teacher = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in directories)
    tokenizer = AutoTokenizer.from_pretrained(directories[0])
    torch.manual_seed(0)
    states: list[list[Tensor]] = [[], []]
    targets = []
    with torch.no_grad():
        for prompt, teacher_prompt in zip(prompts, teacher_prompts, strict=True):
            ids = render(tokenizer, prompt)
            out = student.generate(ids, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=TOKENS)
            completion = out[:, ids.shape[1] :]
            targets.append(completion[0])
            for model, start, kept in (
                (student, ids, states[0]),
                (teacher, render(tokenizer, teacher_prompt), states[1]),
            ):
                hidden = model.model(torch.cat((start, completion), 1)).last_hidden_state
                kept.append(hidden[0, start.shape[1] - 1 : -1])
    heads = [
        Head(torch.cat(kept), model.get_output_embeddings().weight.detach())
        for model, kept in ((student, states[0]), (teacher, states[1]))
    ]
    return heads[0], heads[1], torch.cat(targets)


def render(tokenizer: Any, messages: Any) -> Tensor:
    ids: Tensor = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    return ids


def differentiate(student: Head, teacher: Head, target_M: Tensor, **options: Any) -> tuple[float, Tensor]:
    """The mean loss per token, and the gradient of the sum in the student's hidden states."""
    hidden = student.hidden_MD.detach().requires_grad_()
    settings = LossOptions(kd_ratio=1.0, teacher_model_name_or_path="t", kd_loss="reverse_kl", **options)
    tokens = CompletionTokens(target_M=target_M, weight_M=torch.ones(len(target_M)))
    total = compute_loss(settings, student._replace(hidden_MD=hidden), tokens, teacher).total
    (gradient,) = torch.autograd.grad(total, [hidden])
    return float(total.detach()) / len(target_M), gradient.double()


def measure(student: Head, teacher: Head, target_M: Tensor) -> dict[str, Any]:
    full, exact = differentiate(student, teacher, target_M)
    rows = []
    for k in SIZES:
        top = linear_logprob(student.hidden_MD, student.weight_VD, target_M, topk=k).topk
        assert top is not None
        row: dict[str, Any] = {"k": k, "mass": float(top.logprob.exp().sum(1).mean())}
        for tail in TAILS:
            loss, gradient = differentiate(student, teacher, target_M, kd_topk=k, kd_topk_of="student", kd_tail=tail)
            row[tail] = {
                "loss": loss / full,
                "error": float((gradient - exact).norm() / exact.norm()),
                "cosine": float((gradient * exact).sum() / gradient.norm().clamp_min(1e-30) / exact.norm()),
            }
        rows.append(row)
    return {"tokens": len(target_M), "vocabulary": len(student.weight_VD), "reverse_kl": full, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--problems", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.problems is None):
        parser.error("--model and --problems go together")
    torch.set_num_threads(1)
    if arguments.model is None:
        heads = read_pair((PAIR / "student", PAIR / "teacher"), arguments.prompts)
    else:
        heads = read_oneself(arguments.model, arguments.problems, arguments.prompts)
    result = measure(*heads)
    print(
        f"{result['tokens']} tokens, vocabulary {result['vocabulary']}, full reverse KL {result['reverse_kl']:.4f} nats"
    )
    print("| k | mass | " + " | ".join(f"{tail}: loss, error, cosine" for tail in TAILS) + " |")
    for row in result["rows"]:
        cells = [f"{row[t]['loss']:.3f}, {row[t]['error']:.3f}, {row[t]['cosine']:.4f}" for t in TAILS]
        print(f"| {row['k']} | {row['mass']:.4f} | " + " | ".join(cells) + " |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
