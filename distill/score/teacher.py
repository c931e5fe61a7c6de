"""The teacher's log-probabilities of finished traces: those that the rows record, or those of a teacher in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genssd.distill.data.traces import Trace
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.engine import Engine
from genssd.engine.readers.token_map import match_tokenizers
from genssd.engine.setup.model_facts import ModelFacts

NO_LOGPROBS = "no log-probabilities of the teacher, which {criterion} reads: give --teacher MODEL"


class TeacherReader:
    """A teacher as a reader of traces in the student's token ids.

    A prompt is read as the teacher's own chat template renders it. Where the row was written by this very model, it is
    read by the ids that the row records, so that values equal those of the search.
    """

    def __init__(self, models: ModelFacts) -> None:
        """Compare the two tokenizers. Raises InputError where they differ in more than added tokens."""
        self._models = models
        self._tokenizer = models.tokenizer("teacher")
        self._map = match_tokenizers(
            models.tokenizer("student"), self._tokenizer, "student", f"teacher {self._tokenizer.directory}"
        )
        self._fingerprint = models.fingerprints["teacher"]

    def find_fault(self, trace: Trace) -> str | None:
        """Return why the teacher cannot read a trace; None if it can."""
        try:
            prompt_ids, response_ids = self._encode(trace)
        except InputError as error:
            return str(error)
        longest = self._models.max_sequence_length("teacher")
        if len(prompt_ids) + len(response_ids) > longest:
            tokens = format_count(len(prompt_ids) + len(response_ids), "token")
            return f"{tokens}, more than the {longest} that the teacher takes"
        return None

    def read(self, engine: Engine, traces: Sequence[Trace]) -> list[Tensor]:
        """Return the teacher's log-probabilities of every response's tokens, float32 [tokens] each.

        engine: one that has the teacher.
        """
        pairs = [self._encode(trace) for trace in traces]
        stats = engine.score([prompt for prompt, _ in pairs], [response for _, response in pairs], model="teacher")
        return [of_trace.logprob for of_trace in stats]

    def _encode(self, trace: Trace) -> tuple[list[int], list[int]]:
        """Return prompt and response as the teacher reads them. Raises InputError on what it cannot read."""
        response_ids = self._map.translate(trace.response_ids, "the response")
        record = trace.writer
        if record is not None and record.prompt_ids and record.fingerprint == self._fingerprint:
            return list(record.prompt_ids), response_ids
        if trace.prompt is None:
            return self._map.translate(trace.prompt_ids, "the prompt"), response_ids
        if isinstance(trace.prompt.text, str):
            return self._tokenizer.encode_prompt(trace.prompt.text), response_ids
        rendered = self._tokenizer.chat.render(trace.prompt.text, tools=trace.prompt.tools)
        return self._tokenizer.encode_rendered(rendered), response_ids


def has_recorded(trace: Trace) -> bool:
    """Return whether a trace's row records the log-probabilities of its tokens."""
    return trace.writer is not None and trace.writer.logprobs is not None


def read_recorded(trace: Trace) -> Tensor | None:
    """Return the log-probabilities that a trace's row records, float32 [tokens]; None where it has none."""
    if trace.writer is None or trace.writer.logprobs is None:
        return None
    return torch.tensor(trace.writer.logprobs, dtype=torch.float32)
