"""Checks of what the models read and write: their tokenizers, and the tokens that end a response."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from genssd.distill.doctor.findings import MAX_LISTED, Finding, Level, list_lines
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.model_files import ModelFiles, name_pair
from genssd.distill.train.config import TrainSettings
from genssd.distill.train.ends import find_learnt_ends
from genssd.distill.train.models import choose_teacher_reader, find_foreign_tokenizer
from genssd.distill.train.on_policy import describe_lead, require_no_lead
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import GenssdError, InputError
from genssd.engine.common.quoting import quote
from genssd.engine.readers.byte_reader import ByteReader, find_reader
from genssd.engine.readers.ends import find_foreign_ends
from genssd.engine.readers.thinking_pair import compare_thinking
from genssd.engine.readers.token_map import TokenMap


def check_tokenizers(inputs: Inputs) -> list[Finding]:
    """Find whether the student reads what the teacher writes, and the training's teacher what is trained on."""
    teacher, student, training = inputs.teacher, inputs.student, inputs.settings.training
    findings: list[Finding] = []
    if student is None:
        return findings
    if teacher is not None:
        read = partial(find_reader, teacher.tokenizer, student.tokenizer, *name_pair(teacher, student))
        findings += _check_reader("tokenizers", read, teacher)
    if training is not None and inputs.training_teacher is not None:
        name = "tokenizers of the training" if findings else "tokenizers"
        read = partial(_read_training, inputs, inputs.training_teacher, student, training)
        findings += _check_reader(name, read, inputs.training_teacher)
    return findings


def _read_training(
    inputs: Inputs, teacher: ModelFiles, student: ModelFiles, training: TrainSettings
) -> TokenMap | ByteReader:
    """Return how the training's teacher reads what the student is trained on. Raises InputError where it cannot."""
    reader = choose_teacher_reader(teacher.tokenizer, student.tokenizer, over_spans=training.is_over_spans)
    foreign = find_foreign_tokenizer(teacher.tokenizer, student.tokenizer, training)
    if foreign is not None and training.lmbda:
        require_no_lead(inputs.rows.examples)
        has_lead = bool(inputs.pairs) and not inputs.rows.examples
        lead = compare_thinking(inputs.pairs[0].encoder).lead if has_lead else ""
        if lead:
            raise InputError(
                f"{describe_lead(quote(lead))}; choose a student whose chat template writes it, or lmbda 0"
            )
    return reader


def _check_reader(name: str, read: Callable[[], TokenMap | ByteReader], teacher: ModelFiles) -> list[Finding]:
    """Return the finding about how one model reads the tokens of another one. read: raises where it cannot."""
    try:
        token_map = read()
    except GenssdError as error:
        return [
            Finding(
                name=name,
                level="error",
                line=str(error),
                fix="choose models of one family, or train on the text of the teacher's responses (genssd generate "
                "without a student, then train)",
            )
        ]
    if not isinstance(token_map, TokenMap):
        return [Finding(name=name, level="ok", line=token_map.describe())]
    if token_map.is_identity:
        return [Finding(name=name, level="ok", line=f"the same in both: {len(teacher.tokenizer.hf):,} tokens")]
    missing = [quoted for i, quoted in token_map.strings.items() if i not in token_map.replaced]
    lines = [
        f"{text} (id {i} of the teacher): "
        + (f"read as id {token_map.replaced[i]}" if i in token_map.replaced else "the student does not have it")
        for i, text in token_map.strings.items()
    ]
    if not missing:
        return [Finding(name=name, level="ok", line=token_map.describe(), detail=list_lines(lines))]
    names = ", ".join(missing[:MAX_LISTED])
    return [
        Finding(
            name=name,
            level="warning",
            line=f"the student lacks {format_count(len(missing), 'added token')} of the teacher: a prompt fails when "
            "the teacher writes one",
            detail=list_lines(lines),
            fix=f"add those that responses need to the student's tokenizer (add_tokens, save_pretrained): {names}",
        )
    ]


def check_ends(inputs: Inputs) -> list[Finding]:
    """Find the tokens that end the responses of each model, and whether the student can learn to stop."""
    findings = [_check_own_end(model) for model in inputs.models.values()]
    student = inputs.student
    for pair in () if inputs.settings.reads_examples else inputs.pairs:
        if not isinstance(pair.known_reader, TokenMap):
            continue
        foreign = find_foreign_ends(pair.teacher.tokenizer, pair.student.tokenizer, pair.known_reader)
        if foreign:
            findings.append(
                Finding(
                    name="ends of both" if pair is inputs.pairs[0] else f"ends of {pair.teacher.title} and the student",
                    level="warning",
                    line=f"responses of {pair.teacher.phrase} end with {_name(pair.student, foreign)}, where the "
                    "student does not stop yet",
                    fix="nothing, if genssd trains it: the token is added to the eos_token_id of the trained student's "
                    "generation_config.json. Elsewhere add it yourself",
                )
            )
    if inputs.settings.reads_examples and student is not None and inputs.rows.examples:
        findings.append(_check_learnt_end(inputs, student))
    return findings


def _check_own_end(model: ModelFiles) -> Finding:
    """Find the end tokens of a model, and whether the turn of its chat template ends with one."""
    tokenizer, name = model.tokenizer, f"ends of {model.phrase}"
    ends = sorted(tokenizer.end_token_ids)
    level: Level = "ok"
    if not ends:
        return Finding(
            name=name,
            level="error" if model.role == "student" else "warning",
            line="no token ends a response: the tokenizer has no eos_token, and no config lists an eos_token_id",
            fix="set eos_token in tokenizer_config.json and eos_token_id in generation_config.json",
        )
    line, fix = f"it stops at {_name(model, ends)}", None
    after = tokenizer.chat.write_after([{"role": "user", "content": "a"}]) if tokenizer.chat.exists else None
    written = [] if after is None else tokenizer.encode(after, special=False)
    if after is not None and not set(written) & set(ends):
        level = "warning"
        text = after.strip() or "nothing"
        line += f", but its chat template ends the assistant's turn with {text!r}"
        fix = f"add that token to the eos_token_id of {model.directory / 'generation_config.json'}, if it is one"
        if not after.strip():
            fix = "nothing, if genssd trains it: the end of sequence is added to every response"
    return Finding(name=name, level=level, line=line, fix=fix)


def _check_learnt_end(inputs: Inputs, student: ModelFiles) -> Finding:
    """Find how many examples end with a token at which the student stops."""
    examples, tokenizer = inputs.rows.examples, student.tokenizer
    learnt = find_learnt_ends(examples, tokenizer)
    ends = tokenizer.end_token_ids | set(learnt)
    count = sum(example.input_ids[-1] in ends for example in examples)
    name = "learning to stop"
    if not count:
        return Finding(
            name=name,
            level="error",
            line=f"no example {inputs.rows.describe()} ends with an end token: the student would never stop",
            fix="train on finished responses (statuses finished), or add the end of sequence to the completions",
        )
    added = f"; {_name(student, list(learnt))} becomes an end of the trained student" if learnt else ""
    line = f"{count:,} of {format_count(len(examples), 'example')} end with an end token, which is trained on{added}"
    if 2 * count < len(examples):
        return Finding(
            name=name,
            level="warning",
            line=line,
            fix="most responses are cut off: leave them out (statuses finished), or raise max_tokens where they are "
            "written",
        )
    return Finding(name=name, level="ok", line=line)


def _name(model: ModelFiles, ids: list[int]) -> str:
    """Return the names of some tokens of a model, with their ids."""
    return " or ".join(f"{model.tokenizer.hf.convert_ids_to_tokens(i)} (id {i})" for i in ids)
