"""The models of a training, which are transformers' own classes: the frozen teacher, and what a model returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssd.distill.data.examples import Example
from genssd.distill.data.teacher_text import TeacherText, divide_anew
from genssd.distill.train.batches import TokenBatch
from genssd.distill.train.key_attention import AttentionCollector
from genssd.distill.train.loss_options import LossOptions
from genssd.engine.cache.path_cache import has_states
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.models.transformers_loading import base_of, load_model, scale_states
from genssd.engine.readers.byte_reader import ByteReader, find_reader
from genssd.engine.readers.token_map import TokenMap, match_tokenizers
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherReader:
    """How a model to distil from reads the student's tokens."""

    token_map: TokenMap | ByteReader
    """By ids, or by the bytes of the text where the tokenizers differ."""
    largest_id: int
    """Largest token id of its tokenizer."""
    positions: int
    """Maximum number of tokens that it can read after each other."""

    @staticmethod
    def of(teacher: Tokenizer, student: Tokenizer, positions: int, *, over_spans: bool) -> TeacherReader:
        """Return how a teacher of this tokenizer reads. Raises InputError as `choose_teacher_reader` does."""
        token_map = choose_teacher_reader(teacher, student, over_spans=over_spans)
        return TeacherReader(token_map=token_map, largest_id=teacher.largest_id, positions=positions)

    @property
    def reads_bytes(self) -> bool:
        """Whether the teacher divides the text into tokens of its own."""
        return self.token_map.reads_bytes

    def check_example(self, example: Example) -> None:
        """Check that the teacher can read an example.

        Raises InputError naming its row on a token that it cannot read, CapacityError on more tokens than it has
        positions.
        """
        prompt = example.teacher_prompt_ids or example.input_ids[: example.num_prompt]
        if not self.reads_bytes:
            self.check_reads(prompt, example.completion_ids, example.where)
            return
        length = len(prompt) + len(self.read_text(example).ids)
        if length > self.positions:
            raise CapacityError(
                f"{example.where}: {format_count(length, 'token')} for the teacher, which has {self.positions} "
                "positions; lower max_length"
            )

    def read_text(self, example: Example) -> TeacherText:
        """Return the completion of an example, its lead left out, as a teacher that reads bytes divides it.

        Raises InputError as `check_example` does.
        """
        written = example.completion_ids[example.num_lead :]  # the lead is in the teacher's own prompt, if anywhere
        return example.teacher_text or divide_anew(written, self.token_map, example.where)

    def check_reads(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], label: str) -> None:
        """Check that the teacher has all tokens of a prompt of its own, and of the student's completion.

        Raises InputError, with the label in its message, on one that it lacks.
        """
        assert isinstance(self.token_map, TokenMap)
        self.token_map.check_same(completion_ids, label)
        wrong = next((i for i in prompt_ids if i > self.largest_id), None)
        if wrong is not None:
            raise InputError(f"{label}: token id {wrong} of the prompt is not in the teacher's vocabulary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher(TeacherReader):
    """A model to distil from, frozen, and how it reads the student's tokens."""

    model: Any


def load_teacher(
    directory: Path, student: Tokenizer, device: torch.device, dtype: torch.dtype, *, over_spans: bool = False
) -> Teacher:
    """Load a model to distil from. Raises InputError when its tokenizer does not match the student's.

    An id that both have must be the same token in both; a token that the student alone has is refused when the teacher
    would have to read it. over_spans: whether the loss runs over spans of text, for which a teacher with another
    tokenizer reads the student's bytes.
    """
    tokenizer = Tokenizer(directory)
    token_map = choose_teacher_reader(tokenizer, student, over_spans=over_spans)
    model = load_model(directory, tokenizer, device, dtype=dtype).eval().requires_grad_(False)
    positions = int(model.config.max_position_embeddings)
    return Teacher(model=model, token_map=token_map, largest_id=tokenizer.largest_id, positions=positions)


def match_teacher(teacher: Tokenizer, student: Tokenizer) -> TokenMap:
    """Return how a teacher to distil from reads the student's tokens. Raises InputError as `load_teacher` does."""
    try:
        token_map = match_tokenizers(student, teacher, *_name_models(student, teacher))
        token_map.check_no_conflict()
    except InputError as error:
        raise InputError(
            f"{error}. Take a loss over spans of text (kd_loss span_kl or uld; on-policy sampled_reverse_kl), or train "
            "on the teacher's text instead: kd_ratio 0"
        ) from None
    return token_map


def choose_teacher_reader(teacher: Tokenizer, student: Tokenizer, *, over_spans: bool) -> TokenMap | ByteReader:
    """Return how a teacher reads the student's tokens: by ids where they match, else, for a loss over spans, by bytes.

    Raises InputError where it cannot.
    """
    if not over_spans:
        return match_teacher(teacher, student)
    reader = find_reader(student, teacher, *_name_models(student, teacher))
    if isinstance(reader, TokenMap):
        reader.check_no_conflict()
    return reader


def find_foreign_tokenizer(teacher: Tokenizer, student: Tokenizer, options: LossOptions) -> Tokenizer | None:
    """Return the tokenizer of a teacher that reads the student's text in tokens of its own; None if it reads its ids.

    Raises InputError where it can do neither, and where a loss that is asked for needs the same tokens.
    """
    if not choose_teacher_reader(teacher, student, over_spans=options.is_over_spans).reads_bytes:
        return None
    if options.key_attention.weight:
        raise InputError(
            f"key_attention compares the two models word by word, and the teacher {teacher.directory} has another "
            "tokenizer than the student; leave it out"
        )
    if options.token_weights.entropy_of == "teacher":
        raise InputError(
            f"token_weights.entropy_of: the teacher {teacher.directory} has other tokens than the student, so it has "
            "no entropy at each of the student's; take the entropy of the student"
        )
    return teacher


def _name_models(student: Tokenizer, teacher: Tokenizer) -> tuple[str, str]:
    return f"student {student.directory}", f"teacher {teacher.directory}"


def check_layout(model: Any, layout: str) -> None:
    """Check that a model's attention takes the mask of a layout. Raises InputError if it does not."""
    if layout == "pad":
        return
    config, attention = model.config, model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise InputError(f"layout {layout} needs a mask of its own, which {attention} does not take: use sdpa or eager")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise InputError(f"layout {layout} cannot mask the sliding windows of {config.model_type}: use layout pad")
    if has_states(config):
        raise InputError(f"layout {layout} cannot separate the recurrent states of {config.model_type}: use layout pad")


def compute_completion_states(model: Any, batch: TokenBatch, attention: AttentionCollector | None = None) -> Tensor:
    """Run a model and return the hidden states that predict the completion tokens, [M, D], as `scale_states` does.

    attention: takes the attention to key words of every layer; the model's attention implementation must be that of
    key_attention.py. Raises InputError when the model does not pass it on to its attention.
    """
    mask = batch.attention_mask
    if mask.ndim == 4 and model.config._attn_implementation == "eager":
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    options = {} if attention is None else {"attention_collector": attention}
    out = base_of(model)(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False, **options
    )
    if attention is not None and not attention.is_filled:
        raise InputError(f"key_attention cannot read the attention of {model.config.model_type}: leave it out")
    # only positions that predict a completion token go through the head
    hidden: Tensor = out.last_hidden_state.flatten(0, 1)[batch.source]
    return scale_states(model, hidden)
