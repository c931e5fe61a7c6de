"""Make the small pair: a trained teacher and a cold-started student that share a tokenizer.

The teacher learns written solutions of mixed style until its samples are mostly right in every style, mental arithmetic
included. The student sees the same mixture only briefly: long enough for written-out digit operations to become
predictable to it, too short for it to solve problems reliably.

Run as `python -m genssd.distill.small_pair.make --output DIRECTORY`.
"""

import argparse
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from genssd.distill.small_pair.problems import (
    DETOUR,
    JUMP,
    MIXTURE,
    SPELLED,
    Problem,
    is_correct,
    make_problems,
    style_of,
    write_solution,
)

Example: TypeAlias = tuple[list[int], int]  # token ids, and how many of them are the prompt (not trained on)
WriteExample: TypeAlias = Callable[[random.Random], Example]

log = logging.getLogger(__name__)

START: Final = "<|im_start|>"
END: Final = "<|im_end|>"
PAD: Final = "<|pad|>"
VOCABULARY: Final = 448
CONTEXT: Final = 2048
IGNORED: Final = -100
POOL: Final = 200_000
REPORT_EVERY: Final = 100
REPORT_PROBLEMS: Final = 100
BUCKETS: Final = 8  # batches drawn together and sorted by length

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Digits and newlines stand alone; punctuation may take one following space.
_PIECES: Final = r"\n|[0-9]| ?\p{L}+|[^\p{L}0-9\s]+ ?|\s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of training: how many optimizer steps, on solutions of which styles, at which learning rates.

    The cosine runs over `horizon` steps, or over the phase when it is zero; a phase may end before its cosine does.
    `stream` names the random numbers that its batches are drawn with.
    """

    name: str
    stream: str
    steps: int
    batch: int
    peak_lr: float
    final_lr_share: float
    warmup: int
    styles: tuple[str, ...] = MIXTURE
    horizon: int = 0


# Written-out steps teach the digit operations; then mostly mental arithmetic, which is short and by far the slowest to
# learn; then the mixture again, to settle how often each style is written.
MOSTLY_MENTAL: Final = (JUMP,) * 6 + (SPELLED,) * 2 + (DETOUR,)
TEACHER_PHASES: Final = (
    Phase(
        name="teacher-basics",
        stream="drill",
        steps=800,
        batch=32,
        peak_lr=3e-3,
        final_lr_share=0.5,
        warmup=100,
        horizon=1500,
    ),
    Phase(
        name="teacher-mental",
        stream="drill",
        steps=500,
        batch=48,
        peak_lr=3e-3,
        final_lr_share=0.5,
        warmup=20,
        styles=MOSTLY_MENTAL,
        horizon=1500,
    ),
    Phase(
        name="teacher-mental-anneal",
        stream="teacher-mental",
        steps=600,
        batch=48,
        peak_lr=2.5e-3,
        final_lr_share=0.2,
        warmup=20,
        styles=MOSTLY_MENTAL,
    ),
    Phase(
        name="teacher-mixture",
        stream="teacher-mixture",
        steps=800,
        batch=48,
        peak_lr=1.2e-3,
        final_lr_share=0.02,
        warmup=20,
    ),
)
STUDENT_PHASES: Final = (
    Phase(
        name="student-cold-start",
        stream="student-cold-start",
        steps=600,
        batch=48,
        peak_lr=3e-3,
        final_lr_share=0.3,
        warmup=100,
    ),
)
TEACHER_PROBLEMS: Final = 1  # seeds of the problem sets, so that nobody trains on the demo's
STUDENT_PROBLEMS: Final = 3
HELD_OUT_PROBLEMS: Final = 2


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from `texts`, with single-digit tokens, a newline token and a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_corpus(count: int = 4000) -> list[str]:
    """Chat texts of the task, role names included, from which the merges are learnt."""
    rng = random.Random(0)
    return [
        f"user\n{problem.question}\nassistant\n{write_solution(problem, rng)}\nsystem\n"
        for problem in make_problems(count, seed=0)
    ]


def build_teacher(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained Qwen3-class model of about a million parameters."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            initializer_range=0.05,
        )
    )


def build_student(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained Llama-class model of about a quarter of a million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            initializer_range=0.05,
        )
    )


def render_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The chat text up to where the assistant starts to write."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(rendered, str)
    return rendered


def chat_example(tokenizer: PreTrainedTokenizerFast, question: str, solution: str) -> Example:
    """Token ids of a prompt and its solution, closed by the end-of-turn token."""
    prompt = tokenizer.encode(render_prompt(tokenizer, question), add_special_tokens=False)
    return prompt + tokenizer.encode(solution + END, add_special_tokens=False), len(prompt)


def solution_writer(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], phase: Phase) -> WriteExample:
    """Chat examples of random problems, whose solutions are written anew each time in the styles of a phase."""

    def write(rng: random.Random) -> Example:
        problem = rng.choice(problems)
        return chat_example(tokenizer, problem.question, write_solution(problem, rng, phase.styles))

    return write


def collate(examples: Sequence[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels; causal attention never looks at the padding, so no mask is needed."""
    longest = max(len(ids) for ids, _ in examples)
    inputs = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, (ids, prompt) in enumerate(examples):
        tokens = torch.tensor(ids)
        inputs[row, : len(ids)] = tokens
        labels[row, prompt : len(ids)] = tokens[prompt:]
    return inputs, labels


def batches(write: WriteExample, phase: Phase, pad: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As many training batches as a phase has steps, each of examples of similar length to spare padding."""
    rng = random.Random(f"{phase.stream}-{seed}")
    made = 0
    while made < phase.steps:
        pool = sorted((write(rng) for _ in range(phase.batch * BUCKETS)), key=lambda example: len(example[0]))
        starts = [index * phase.batch for index in range(BUCKETS)]
        rng.shuffle(starts)
        for start in starts[: phase.steps - made]:
            yield collate(pool[start : start + phase.batch], pad)
            made += 1


def schedule(step: int, phase: Phase) -> float:
    """Linear warm-up, then a cosine down to a share of the peak learning rate."""
    if step < phase.warmup:
        return (step + 1) / phase.warmup
    progress = (step - phase.warmup) / max(1, (phase.horizon or phase.steps) - phase.warmup)
    cosine = 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * progress)).item())
    return phase.final_lr_share + (1.0 - phase.final_lr_share) * cosine


def train(
    model: PreTrainedModel,
    phase: Phase,
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]],
    report: Callable[[int], str],
    every: int,
) -> None:
    """AdamW over a stream of batches, with a report of loss, time and `report(step)` at intervals."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.peak_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, phase))
    started, tokens, losses = time.monotonic(), 0, 0.0
    model.train()
    for step, (inputs, labels) in enumerate(stream, start=1):
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        tokens += inputs.numel()
        losses += loss.item()
        if step % every == 0 or step == phase.steps:
            window = (step - 1) % every + 1
            model.train(False)
            log.info(
                "%s step %d tokens %.2fM loss %.4f %s time %.0fs",
                *(phase.name, step, tokens / 1e6, losses / window, report(step), time.monotonic() - started),
            )
            model.train()
            losses = 0.0
    model.train(False)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    sample: bool,
    batch: int = 256,
) -> list[str]:
    """Solutions a model writes to problems, greedily or sampled at temperature one."""
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
    """Describe greedy and sampled answers: accuracy, and the share of each style among the steps."""
    return "; ".join(describe(problems, answer(model, tokenizer, problems, sample), sample) for sample in (False, True))


def describe(problems: Sequence[Problem], texts: Sequence[str], sampled: bool) -> str:
    """One line on the answers to some problems."""
    right = sum(is_correct(problem, text) for problem, text in zip(problems, texts, strict=True))
    lines = [line for text in texts for line in text.splitlines() if not line.startswith("\\boxed")]
    styles = Counter(style_of(line) or "other" for line in lines)
    shares = " ".join(f"{style}={count / styles.total():.2f}" for style, count in styles.most_common())
    return f"{'sampled' if sampled else 'greedy'} {right / len(problems):.3f} ({shares})"


def train_phases(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, phases: Sequence[Phase], problem_seed: int, seed: int
) -> None:
    """Train a fresh model through its phases, logging greedy and sampled accuracy on held-out problems."""
    log.info("%s parameters %d", type(model).__name__, model.num_parameters())
    problems = make_problems(POOL, problem_seed)
    held_out = make_problems(REPORT_PROBLEMS, HELD_OUT_PROBLEMS, split="eval")
    for phase in phases:
        stream = batches(solution_writer(tokenizer, problems, phase), phase, token_id(tokenizer, PAD), seed)
        train(model, phase, stream, lambda step: measure(model, tokenizer, held_out), every=REPORT_EVERY)


def make_teacher(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Train a teacher until its sampled answers are mostly right."""
    torch.manual_seed(seed)
    model = build_teacher(tokenizer)
    train_phases(model, tokenizer, TEACHER_PHASES, TEACHER_PROBLEMS, seed)
    return model


def make_student(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Cold-start a student on a little of the mixture."""
    torch.manual_seed(seed)
    model = build_student(tokenizer)
    train_phases(model, tokenizer, STUDENT_PHASES, STUDENT_PROBLEMS, seed)
    return model


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Look up the id of one special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write weights, tokenizer and generation settings as a directory that transformers can load."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    tokenizer.backend_tokenizer.no_padding()  # left on by whoever padded a batch last
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = directory / "tokenizer_config.json"
    portable = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(portable, indent=2) + "\n")


def main() -> None:
    """Make both models and leave a log beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for teacher/, student/ and make.log")
    parser.add_argument("--only", choices=("teacher", "student"), help="make one of the two models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="results repeat exactly only at the same number")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(),
        logging.FileHandler(arguments.output / "make.log", mode="a"),
    ]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer(tokenizer_corpus())
    makers = {"student": make_student, "teacher": make_teacher}
    for name in [arguments.only] if arguments.only else makers:
        save(makers[name](tokenizer, arguments.seed), tokenizer, arguments.output / name)


if __name__ == "__main__":
    main()
