"""One prompt as teacher and student read it, so that the response which follows is the same thought to both.

The teacher writes the response after its own prompt, and the student reads the same tokens after its own. What the two
prompts end in decides what the student must read between its prompt and the response, or must not read:

    teacher's prompt ends in    student's     the student reads                 rows train, before the response
    an open thought             none          its prompt, the opening           the opening
                                open          its prompt                        what its opening lacks (a line break)
                                closed        refused
    an empty thought            none          its prompt, the empty thought     the empty thought: both only where its
                                              template writes one before answers     template writes one before answers
                                open          its prompt, the closing tag       the closing tag
                                closed        its prompt
    no thought                  none          its prompt
        it thinks by itself     open          its prompt without the opening    nothing: the response opens the thought
                                closed        refused where the teacher's switch is on
        it does not think       open          its prompt, the closing tag       the closing tag

The tokens that are added to the student's prompt are the lead. The prompt of a row without its lead is what the
student's own chat template renders, so that a later chat continues as the row does. Where the opening is left out of
the prompt, the response begins with it, and both together are the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.readers.reading import Reader
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Prompt, Tokenizer, as_messages
from genssd.engine.texts.thinking import ThinkingMode, ThoughtEnd, find_thinking, read_end


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPrompt:
    """Token ids of one prompt as teacher and student read it."""

    teacher: tuple[int, ...]
    """Token ids as the teacher reads the prompt."""
    student: tuple[int, ...]
    """Token ids as the student reads the prompt, its lead included."""
    num_lead: int = 0
    """Number of tokens in the lead: the last ones of `student`, which its own chat template does not write. They open
    or close the thought, and are trained as the beginning of the response."""


def render_with(tokenizers: Mapping[Role, Tokenizer], options: ChatOptions) -> dict[Role, Tokenizer]:
    """Return the tokenizers of one or both models with other options of rendering chats.

    Raises InputError naming a variable of the options that a chat template does not read.
    """
    rendering: dict[Role, Tokenizer] = {}
    for role, tokenizer in tokenizers.items():
        try:
            rendering[role] = tokenizer.with_chat(options.for_model(role))
        except InputError as error:
            if len(tokenizers) == 1:
                raise
            raise InputError(
                f"{error}. teacher_template_kwargs and student_template_kwargs set a variable of one model alone"
            ) from None
    return rendering


class PairEncoder:
    """Encodes prompts for a teacher and a student. Raises InputError on what either cannot read.

    reader: how the student reads the teacher's tokens.
    """

    def __init__(self, teacher: Tokenizer, student: Tokenizer, reader: Reader) -> None:
        self.teacher = teacher
        self.student = student
        self._reader = reader
        self._modes: dict[Role, ThinkingMode] = {}

    def encode(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt as both models read it. Raises InputError where they cannot read the same thought."""
        messages = as_messages(prompt)
        if messages is None:
            teacher_ids = self.teacher.encode_prompt(prompt)
            own: Prompt = prompt if isinstance(prompt, str) else self._translate(teacher_ids)
            return PairPrompt(teacher=tuple(teacher_ids), student=tuple(self.student.encode_prompt(own)))
        texts = [tokenizer.render_prompt(messages) for tokenizer in (self.teacher, self.student)]
        ends = [
            read_end(text, messages, tokenizer.chat.tags)
            for text, tokenizer in zip(texts, (self.teacher, self.student), strict=True)
        ]
        removed, lead = self._match(*ends)
        own_text = texts[1].removesuffix(removed) if removed else texts[1]
        own, further = self.student.encode_rendered(own_text), self.student.encode(lead, special=False)
        teacher_ids = self.teacher.encode_rendered(texts[0])
        if not own or not teacher_ids:
            raise InputError("the prompt is empty")
        return PairPrompt(teacher=tuple(teacher_ids), student=(*own, *further), num_lead=len(further))

    def _translate(self, teacher_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the student's ids of a prompt that was given as the teacher's token ids."""
        if self._reader.reads_bytes:
            raise InputError(
                "the prompt is a list of the teacher's token ids, and the student has another tokenizer: give the "
                "prompt as text or as messages"
            )
        missing = self._reader.find_missing(teacher_ids)
        if missing is not None:
            raise InputError(f"the prompt has {self._reader.describe_missing(missing)}")
        return self._reader.read(teacher_ids, held=b"", begins=True, ends=True).ids

    def _match(self, teacher: ThoughtEnd, student: ThoughtEnd) -> tuple[str, str]:
        """Return what the student's prompt loses at its end, and what it gets there."""
        if teacher.state == "open":
            return "", self._open(teacher, student)
        if student.state == "none":
            return "", self.mode("student").empty_thought if teacher.state == "closed" else ""
        if student.state == "open":
            if teacher.state == "closed" or not self.mode("teacher").thinks:
                assert student.tags is not None
                line_break = "" if student.text.endswith("\n") else "\n"
                return "", f"{line_break}\n{student.tags.closing}\n\n"
            return student.text, ""
        if teacher.state == "none" and self.mode("teacher").is_on:
            raise InputError(
                "the teacher thinks, and the prompt of the student ends in an empty thought: "
                f"{self._name_remedy('teacher', 'off')}, or {self._name_remedy('student', 'on')}"
            )
        return "", ""

    def _open(self, teacher: ThoughtEnd, student: ThoughtEnd) -> str:
        """Return what the student's prompt gets so that it ends in the thought that the teacher's prompt opens."""
        if student.state == "none":
            return teacher.text
        assert teacher.tags is not None
        assert student.tags is not None
        if student.state == "closed":
            raise InputError(
                f"the teacher's chat template opens a thought ({teacher.tags.opening}), and the "
                f"student's prompt ends in an empty one: {self._name_remedy('student', 'on')}, or "
                f"{self._name_remedy('teacher', 'off')}"
            )
        if teacher.tags != student.tags:
            raise InputError(
                f"the teacher's chat template opens a thought by {teacher.tags.opening}, the student's by "
                f"{student.tags.opening}, so that the response closes another thought than the one that the student "
                f"has begun: give {self.student.directory} the chat template of the teacher"
            )
        return teacher.text.removeprefix(student.text) if teacher.text.startswith(student.text) else ""

    def mode(self, role: Role) -> ThinkingMode:
        """Return what the chat template of one model does about thoughts."""
        if role not in self._modes:
            self._modes[role] = find_thinking((self.teacher if role == "teacher" else self.student).chat)
        return self._modes[role]

    def _name_remedy(self, role: Role, value: Literal["on", "off"]) -> str:
        """Return how thinking is turned on or off for one model, as part of a sentence."""
        switch = self.mode(role).switch
        if switch is None:
            return f"choose a {role} whose chat template can turn thinking {value}"
        word = "true" if value == "on" else "false"
        return f"turn thinking {value} for the {role} by {role}_template_kwargs {switch}={word}"
