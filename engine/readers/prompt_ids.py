"""The token ids of a prompt, as each model of an engine reads it."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.common.model_choices import Role


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptIds:
    """Token ids of one prompt as each model reads it; empty for a model that does not read it.

    Two prompts with the same ids are two keys of a dictionary.
    """

    teacher: tuple[int, ...] = ()
    """Token ids as the teacher reads the prompt."""
    student: tuple[int, ...] = ()
    """Token ids as the student reads the prompt."""
    num_lead: int = 0
    """Number of the last tokens of `student` that are its lead (see `PairPrompt`)."""
    answer: str | None = None
    """Reference answer of the prompt, for criteria that read it."""

    def of(self, role: Role) -> tuple[int, ...]:
        """Return the token ids as one model reads the prompt."""
        return self.teacher if role == "teacher" else self.student
