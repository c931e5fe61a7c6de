"""The tokenizers of a student and its teachers, and the tokens that they do not share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from genssd.distill.diagnose.forcing import Question
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.readers.token_map import TokenMap, match_tokenizers
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderTokenizers:
    """The tokenizers of all models, which match."""

    by_model: Mapping[str, Tokenizer]
    student_to_teacher: Sequence[TokenMap]
    """How every teacher reads the student's tokens."""
    excluded_ids: frozenset[int]
    """Tokens that the student and one of the teachers do not share."""

    @staticmethod
    def load(student: str, teachers: Sequence[str], options: ChatOptions) -> ReaderTokenizers:
        """Load the tokenizers of models by their names. options: how they render chats.

        Raises InputError when a teacher's does not match the student's, or an id that both have is not one token.
        """
        by_model = {model: Tokenizer(locate(model)).with_chat(options) for model in (student, *teachers)}
        forward: list[TokenMap] = []
        excluded: set[int] = set()
        for model in teachers:
            forward.append(
                match_tokenizers(by_model[student], by_model[model], f"student {student}", f"teacher {model}")
            )
            forward[-1].check_no_conflict()
            backward = match_tokenizers(by_model[model], by_model[student], f"teacher {model}", f"student {student}")
            excluded |= {*forward[-1].strings, *backward.strings}
        return ReaderTokenizers(by_model=by_model, student_to_teacher=forward, excluded_ids=frozenset(excluded))

    def find_fault(self, question: Question) -> str | None:
        """Return why a teacher cannot read a rollout of a question, with the question's label; None if all can."""
        for rollout in question.rollouts:
            for token_map in self.student_to_teacher:
                if (fault := token_map.find_fault(rollout.token_ids)) is not None:
                    return f"{question.label}: {fault}"
        return None
