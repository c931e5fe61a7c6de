"""What `genssd select` refuses before it reads anything, and what it says of its models before the search."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from genssd.distill.runs.model_sampling import ModelSampling
from genssd.distill.select.unfit import ReadableProblems
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.policies import make_policy
from genssd.engine.search_options import SearchOptions
from genssd.engine.team_loading import check_teachers
from genssd.engine.thinking_pair import compare_thinking

logger = logging.getLogger("genssd.select")


def check_search(options: SearchOptions, teachers: Sequence[str], student: str, sampling: ModelSampling) -> None:
    """Raise InputError on teachers and options of the search that cannot be used together.

    teachers, student: names of the models. sampling: the config's choice of the sampling.
    """
    check_teachers(teachers, student)
    make_policy(options, len(teachers))
    if len(teachers) > 1 and sampling.generation_config:
        raise InputError(
            "generation_config is one model's own sampling, and several teachers write with one: give options of "
            "sampling instead"
        )


def report_thinking(engine: Engine, problems: ReadableProblems) -> None:
    """Log a line about what the chat templates do about thoughts; a warning where their switches differ.

    Of several teachers, a line for each.
    """
    if all(isinstance(problem.prompt, str) for problem in problems.data.problems):
        return  # no chat template is used
    for one in engine.teachers:
        pair = compare_thinking(one.tokenizer("teacher"), one.tokenizer("student"))
        if (line := pair.describe()) is not None:
            logger.log(logging.WARNING if pair.has_other_switch else logging.INFO, "%s", line)
