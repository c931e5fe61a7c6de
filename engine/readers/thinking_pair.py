"""What the chat templates of a teacher and a student do about thoughts, compared, and what a search makes of it."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote
from genssd.engine.readers.pair_prompts import PairEncoder
from genssd.engine.texts.thinking import QUESTION, ThinkingMode


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingPair:
    """What two chat templates do about thoughts."""

    teacher: ThinkingMode
    """What the teacher's chat template does."""
    student: ThinkingMode
    """What the student's chat template does."""
    lead: str = ""
    """What a question's rows train before the response, because the student's chat template does not write it."""
    conflict: str | None = None
    """Why the student cannot read the same thought as the teacher; None where it can."""

    @property
    def has_other_switch(self) -> bool:
        """Whether both templates have a switch, and its name or its default differs."""
        switches = self.teacher.switch, self.student.switch
        if None in switches:
            return False
        return switches[0] != switches[1] or self.teacher.default != self.student.default

    def describe(self) -> str | None:
        """Return one line about both templates; None where neither knows thoughts."""
        if not self.teacher.knows_thoughts and not self.student.knows_thoughts:
            return None
        parts = [describe_mode(mode) for mode in (self.teacher, self.student)]
        if parts[0] == parts[1]:
            line = f"thinking: the chat template of teacher and student {parts[0]}"
        else:
            line = f"thinking: the teacher's chat template {parts[0]}; the student's {parts[1]}"
        if self.lead:
            line += f"; the student reads and is trained to write {quote(self.lead)} before the response"
        if self.has_other_switch:
            line += (
                f". The switches differ: teacher_template_kwargs {self.teacher.switch}=... sets the teacher's, "
                f"student_template_kwargs {self.student.switch}=... the student's"
            )
        return line


def compare_thinking(pairs: PairEncoder) -> ThinkingPair:
    """Return what the chat templates of two models do about thoughts, under the options of their rendering.

    pairs: encodes prompts for both. Raises InputError on a template that cannot be parsed, CheckpointError on one that
    computes for too long.
    """
    modes = pairs.mode("teacher"), pairs.mode("student")
    pair = ThinkingPair(teacher=modes[0], student=modes[1])
    if not (modes[0].has_template and modes[1].has_template):
        return pair
    try:
        prompt = pairs.encode(QUESTION)
    except InputError as error:
        return ThinkingPair(teacher=modes[0], student=modes[1], conflict=str(error))
    lead = prompt.student[len(prompt.student) - prompt.num_lead :]
    return ThinkingPair(teacher=modes[0], student=modes[1], lead=str(pairs.student.hf.decode(list(lead))))


def describe_mode(mode: ThinkingMode) -> str:
    """Return what a template does about thoughts, as the end of a sentence that begins with it."""
    parts = _describe(mode)
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _describe(mode: ThinkingMode) -> list[str]:
    """Return what a template does, as the ends of sentences that begin with it."""
    if not mode.has_template:
        return ["does not exist"]
    if not mode.knows_thoughts:
        return ["knows no thoughts"]
    parts = []
    if mode.switch is not None:
        state = {True: "on", False: "off", None: "neither on nor off"}[mode.is_on]
        parts.append(f"has the switch {mode.switch}, {state}{' by default' if mode.is_on is mode.default else ''}")
    if mode.prompt_end == "open":
        parts.append(f"opens a thought ({mode.tags.opening}) in the prompt")
    elif mode.prompt_end == "closed":
        parts.append("writes an empty thought into the prompt")
    elif mode.switch is None:
        parts.append("leaves the thought to the model")
    if mode.system_words:
        parts.append(f"reads {' and '.join(mode.system_words)} in the system message")
    if mode.empty_thought:
        parts.append("writes an empty thought before answers that have none")
    if mode.strips_history:
        parts.append("strips thoughts from earlier turns")
    return parts
