"""The tokenizer of the small pair, and its chat template."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, TypeAlias

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from genssd.distill.small_pair.problems import make_problems, write_solution

ChatExample: TypeAlias = tuple[list[int], int]
"""Token ids of a prompt with its solution, and how many of them are the prompt's, which are not trained."""

START: Final = "<|im_start|>"
END: Final = "<|im_end|>"
PAD: Final = "<|pad|>"
VOCABULARY: Final = 448
"""Maximum number of tokens in the vocabulary."""
CONTEXT: Final = 2048
"""Maximum number of tokens in a sequence."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# a digit and a newline are pieces of their own; punctuation may include one following space
_PIECES: Final = r"\n|[0-9]| ?\p{L}+|[^\p{L}0-9\s]+ ?|\s"


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`, with single-digit tokens, a newline token and a ChatML template."""
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


def write_corpus(count: int = 4000) -> list[str]:
    """Write chat texts of the task, role names included, that the tokenizer is trained on."""
    rng = random.Random(0)
    return [
        f"user\n{problem.question}\nassistant\n{write_solution(problem, rng)}\nsystem\n"
        for problem in make_problems(count, seed=0)
    ]


def render_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """Return the chat text of a question up to the beginning of the assistant's turn."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(rendered, str)
    return rendered


def encode_example(tokenizer: PreTrainedTokenizerFast, question: str, solution: str) -> ChatExample:
    """Encode a prompt with its solution and the end-of-turn token."""
    prompt = tokenizer.encode(render_prompt(tokenizer, question), add_special_tokens=False)
    return prompt + tokenizer.encode(solution + END, add_special_tokens=False), len(prompt)


def find_token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of a special token."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id
