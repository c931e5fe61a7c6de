"""What `genssd select` refuses before it reads anything, and what it says of its models before the search."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from genssd.distill.select.calibration import check_calibration
from genssd.distill.select.config import SelectSettings
from genssd.distill.select.unfit import ReadableProblems
from genssd.engine.common.errors import InputError
from genssd.engine.search.policies import make_policy
from genssd.engine.setup.model_facts import ModelFacts
from genssd.engine.setup.team_loading import check_teachers

logger = logging.getLogger("genssd.select")


def check_search(settings: SelectSettings, teachers: Sequence[str], student: str) -> None:
    """Raise InputError on teachers and options of the search that cannot be used together, or not at all.

    teachers, student: names of the models.
    """
    check_teachers(teachers, student)
    make_policy(settings.with_changes(), len(teachers))
    check_calibration(settings)
    if len(teachers) > 1 and settings.generation_config:
        raise InputError(
            "generation_config is one model's own sampling, and several teachers write with one: give options of "
            "sampling instead"
        )


def report_thinking(models: ModelFacts, problems: ReadableProblems) -> None:
    """Log a line about what the chat templates do about thoughts; a warning where their switches differ.

    Of several teachers, a line for each.
    """
    if all(isinstance(problem.prompt, str) for problem in problems.data.problems):
        return  # no chat template is used
    for one in models.teachers:
        pair = one.thinking
        if (line := pair.describe()) is not None:
            logger.log(logging.WARNING if pair.has_other_switch else logging.INFO, "%s", line)
