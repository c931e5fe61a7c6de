"""Checks of what the models see: both chat templates on a row of the data, and what of an example is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from genssd.distill.data.examples import Example, encode_example
from genssd.distill.doctor.findings import Finding, Mark, Piece, join_pieces
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.model_files import ModelFiles
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import GenssdError
from genssd.engine.texts.text import Prompt, Tokenizer

SHOWN = 600
"""Number of characters of a text that are shown; the middle of a longer one is left out."""


def check_templates(inputs: Inputs) -> list[Finding]:
    """Render the first prompt of the data, or a question, by the chat template of every model."""
    where, prompt = _choose_prompt(inputs)
    if isinstance(prompt, str):
        line = f"{where}: the prompt is text, which goes to the models as it is, without a chat template"
        detail = tuple(_mark_raw(inputs, prompt))
        return [Finding(name="templates", level="ok", line=line, detail=detail)]
    findings: list[Finding] = []
    texts: dict[str, str] = {}
    for model in inputs.list_chat_models():
        name = f"template of {model.phrase}"
        if inputs.settings.reads_examples and not model.tokenizer.chat.exists:
            # rows of messages are faults of the rows, and others need no template
            findings.append(Finding(name=name, level="ok", line="there is none: the rows must be text, not messages"))
            continue
        try:
            rendered = model.tokenizer.chat.render(prompt)  # type: ignore[arg-type]
        except GenssdError as error:
            findings.append(Finding(name=name, level="error", line=str(error), fix=_fix_template(model)))
            continue
        pieces = tuple(cut_middle(mark_control_tokens(rendered, model.tokenizer)))
        text = model.tokenizer.chat.control_tokens.restore_names(rendered)
        line = f"{where}, {format_count(len(model.tokenizer.encode_rendered(rendered)), 'token')}"
        if (same := texts.get(text)) is not None:
            line, pieces = f"{line}: the same text as {same}'s", ()
        texts.setdefault(text, model.phrase)
        findings.append(Finding(name=name, level="ok", line=line, detail=pieces))
    return findings


def check_masks(inputs: Inputs) -> list[Finding]:
    """Show the first example of a training: which tokens are trained on, and which are not."""
    student = inputs.student
    if student is None or inputs.settings.training is None:
        return []
    example = inputs.rows.examples[0] if inputs.rows.examples else _make_example(inputs, student)
    if example is None:
        return []
    trained = sum(weight > 0 for weight in example.token_weights())
    line = (
        f"{example.where}: {trained} of {format_count(len(example.input_ids), 'token')} are trained on, from the "
        f"beginning of the response to {_name_last(example, student.tokenizer)}"
    )
    finding = Finding(name="what is trained on", level="ok", line=line, detail=tuple(mark_trained(example, student)))
    if not trained:
        return [
            Finding(
                name=finding.name,
                level="error",
                line=f"{example.where}: no token is trained on: all weights are 0",
                detail=finding.detail,
                fix="give the row, or its chunks, a weight above 0",
            )
        ]
    return [finding]


def mark_control_tokens(rendered: str, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield the pieces of a text that `chat.render` returned: control tokens, and the text between them."""
    tokens = tokenizer.chat.control_tokens
    names = sorted(tokens.names, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)")
    for number, part in enumerate(pattern.split(rendered)):
        if part:
            is_control = number % 2 == 1
            yield Piece(tokens.restore_names(part), "control" if is_control else "text", is_control)


def mark_trained(example: Example, model: ModelFiles) -> Iterator[Piece]:
    """Yield an example's text in pieces that are trained on, or not; lines of their own say which they are."""
    weights = [0.0] * example.num_prompt + example.token_weights()
    control = set(model.tokenizer.chat.control_tokens.names.values())
    tokens = list(zip(model.tokenizer.pieces(example.input_ids), example.input_ids, weights, strict=True))
    for number, (trained, group) in enumerate(groupby(tokens, key=lambda token: token[2] > 0)):
        members = list(group)
        mark: Mark = "trained" if trained else "untrained"
        count = format_count(len(members), "token")
        yield Piece(f"{'' if number == 0 else chr(10)}-- {count} {'' if trained else 'not '}trained on:\n")
        runs = groupby(members, key=lambda token: token[1] in control)
        yield from cut_middle([Piece("".join(t[0] for t in run), mark, is_control) for is_control, run in runs])


def cut_middle(pieces: Iterator[Piece] | Sequence[Piece]) -> list[Piece]:
    """Return pieces without the middle of their text, where it is longer than SHOWN characters."""
    whole = list(pieces)
    total = len(join_pieces(whole))
    if total <= SHOWN:
        return whole
    head, tail, position = [], [], 0
    for piece in whole:
        start, end = position, position + len(piece.text)
        position = end
        if start < SHOWN // 2:
            head.append(Piece(piece.text[: SHOWN // 2 - start], piece.mark, piece.is_control))
        if end > total - SHOWN // 2:
            first = max(0, total - SHOWN // 2 - start)
            tail.append(Piece(piece.text[first:], piece.mark, piece.is_control))
    return [*head, Piece(f" [... {total - SHOWN:,} characters ...] "), *tail]


def _choose_prompt(inputs: Inputs) -> tuple[str, Prompt]:
    """Return the first prompt of the data and where it stands; a question of our own where the data has none."""
    if inputs.rows.problems:
        problem = inputs.rows.problems[0]
        return problem.where, problem.prompt
    if inputs.rows.examples and inputs.rows.examples[0].question:
        example = inputs.rows.examples[0]
        return f"{example.where}, its last question", [{"role": "user", "content": example.question}]
    return "a made-up question", [{"role": "user", "content": "What is 2 + 2?"}]


def _make_example(inputs: Inputs, student: ModelFiles) -> Example | None:
    """Return the example that the first problem with an answer would become, if its response were the answer."""
    problem = next((p for p in inputs.rows.problems if p.answer is not None), None)
    if problem is None:
        return None
    row = {"prompt": problem.prompt, "completion": problem.answer}
    where = f"{problem.where}, with its answer in place of a response"
    try:
        return encode_example(row, student.tokenizer, where, student.directory)
    except GenssdError:  # the templates' check names it
        return None


def _mark_raw(inputs: Inputs, prompt: str) -> Iterator[Piece]:
    """Yield a raw prompt, after the tokens that each tokenizer puts before it."""
    for model in inputs.list_chat_models():
        ids = model.tokenizer.encode_raw(prompt)
        before = len(ids) - len(model.tokenizer.encode(prompt, special=False))
        names = "".join(map(str, model.tokenizer.hf.convert_ids_to_tokens(ids[:before])))
        yield Piece(f"{model.title}: ")
        yield Piece(names, "control", True)
        yield from cut_middle([Piece(prompt)])
        yield Piece("\n")


def _name_last(example: Example, tokenizer: Tokenizer) -> str:
    last = example.input_ids[-1]
    name = tokenizer.hf.convert_ids_to_tokens(last)
    return f"{name} (id {last})" if last in tokenizer.end_token_ids else f"its last token {name!r}, which is no end"


def _fix_template(model: ModelFiles) -> str:
    if not model.tokenizer.chat.exists:
        return f"copy chat_template.jinja of the instruct model of its family to {model.directory}, or give raw prompts"
    return "give messages that the template takes, or another template"
