"""The beginning of a response as a branch of its own, from which the response can be written anew."""

from __future__ import annotations

import torch

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_arguments
from genssd.engine.decoding.branch import Branch
from genssd.engine.readers.reading import Reading
from genssd.kernels.logprob import TokenStats, TopK


@check_arguments()
def rewind(branch: Branch, length: int) -> Branch:
    """Return a new committed branch of the first `length` tokens of a branch's committed response.

    The branch itself does not change, and may have ended or been dropped. The new one draws what the branch would have
    drawn there without candidates of its own. It holds no cache pages until it is expanded; prompt and response are
    computed again then. Raises InputError on a length outside of the committed response, and where the student reads
    the response in tokens of its own, which cannot be cut at any token of the teacher.
    """
    if not 0 <= length <= len(branch.history):
        raise InputError(
            f"length must lie in the committed response of {format_count(len(branch.history), 'token')}, not {length}"
        )
    if any(reading.lengths is not None for reading in branch.history_readings):
        raise InputError("a branch whose student has another tokenizer cannot be rewound: its tokens end elsewhere")
    rewound = Branch.root(branch.session, branch.prompt, branch.stream, branch.max_tokens)
    if length:
        rewound.history, rewound.history_lengths = branch.history[:length], (length,)
        rewound.history_stats = (TokenStats.concatenate(branch.history_stats)[:length],)
        rewound.history_writer_logprob = (torch.cat(branch.history_writer_logprob)[:length],)
        if branch.history_readings:
            rewound.history_readings = (Reading(ids=branch.student_ids[:length]),)
        if branch.history_topk:
            topk = TopK.concatenate(branch.history_topk)
            rewound.history_topk = (TopK(topk.ids[:length], topk.logprob[:length]),)
    rewound.suspend()
    return rewound
