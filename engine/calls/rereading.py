"""The end of a response that a student reads by bytes: what was held back is read, and all tokens are checked.

The tokens that the student read chunk by chunk must be those of the whole text, or the drift is counted, reported, and
the response scored again as a whole.
"""

from __future__ import annotations

import logging

from genssd.engine.calls.scoring import score
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.candidate_scoring import describe_too_long
from genssd.engine.readers.reading import Reader, Reading
from genssd.engine.setup.resources import Resources

logger = logging.getLogger(__name__)


def finish_reading(resources: Resources, reader: Reader, branch: Branch) -> None:
    """Set the student's tokens of an ended response to those of the whole text.

    Nothing changes where they are these already. A response that was pruned or cut by a budget has bytes that were held
    back, and is scored again as a whole, as after a drift. Raises InputError where the student has no positions for it,
    CapacityError without room for it.
    """
    if not reader.reads_bytes or not branch.history_readings:
        return
    whole = reader.read(branch.history, held=b"", begins=True, ends=True)
    read = branch.student_ids
    if whole.ids == read:
        return
    student = resources.runner("student")
    longest, positions = len(branch.prompt.student) + len(whole.ids), student.decoder.config.max_position_embeddings
    if longest > positions:
        raise InputError(describe_too_long(longest, positions))
    (stats,) = score(student, [(list(branch.prompt.student), list(whole.ids))])
    if whole.ids[: len(read)] != read:
        branch.is_drifted = True
        resources.usage.drifted_responses += 1
        logger.warning(
            "the student's tokens of a whole response are others than those that it read chunk by chunk (%d and %d); "
            "the response was scored again",
            len(whole.ids),
            len(read),
        )
    branch.history_stats = (stats,)
    branch.history_readings = _divide(whole, branch.history_readings)


def _divide(whole: Reading, readings: tuple[Reading, ...]) -> tuple[Reading, ...]:
    """Return the tokens of a whole response as chunks of as many tokens as before; the last one has all others."""
    assert whole.lengths is not None
    divided, start = [], 0
    for i, reading in enumerate(readings):
        end = len(whole.ids) if i == len(readings) - 1 else min(start + len(reading.ids), len(whole.ids))
        divided.append(
            Reading(ids=whole.ids[start:end], lengths=whole.lengths[start:end], writer_lengths=reading.writer_lengths)
        )
        start = end
    return tuple(divided)
