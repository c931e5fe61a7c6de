"""The counts of a finished run of `generate`: summary.json, and what the command prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.answers.accuracy import Accuracy, measure_accuracy
from genssd.distill.data.problems import ProblemSet
from genssd.distill.data.response_limits import count_cuts
from genssd.distill.runs.run import Run
from genssd.distill.select.notes import list_responses
from genssd.distill.select.turns import describe_writers


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """What a finished run has written; all counts are over the whole journal."""

    path: Path
    prompts: int
    statuses: Mapping[str, int]
    """Number of responses by status."""
    accuracy: Accuracy
    """Verdicts on all responses."""
    cuts: Mapping[str, int]
    """Number of responses that were cut off, by what cut them."""
    tokens: int
    """Tokens in all responses."""
    substituted: int
    """Tokens that the student wrote."""
    writers: Mapping[str, Mapping[str, float]] | None
    """Tokens and characters of each writer, and their fractions of all; None where one model wrote alone, or rsd."""
    tokens_sampled: int
    """Tokens that were sampled for the responses, those that two writers did not keep included."""
    failures: tuple[str, ...]
    """Prompts that are too long, or did not fit into the cache, and why. They are in no journal: resuming tries them
    again."""
    bad_rows: tuple[str, ...]
    """Rows of the data that could not be used; the failures are among them."""

    def as_json(self) -> dict[str, Any]:
        """Return the content of self.json."""
        of_writers = (
            {} if self.writers is None else {name: getattr(self, name) for name in ("writers", "tokens_sampled")}
        )
        return {
            "path": self.path.name,
            **{name: getattr(self, name) for name in ("prompts", "statuses", "cuts", "tokens", "substituted")},
            **of_writers,
            **self.accuracy.as_json(),
            "failures": len(self.failures),
            "bad_rows": len(self.bad_rows),
        }


def summarise_responses(
    run: Run, data: ProblemSet, failures: Mapping[int, str], *, has_two_writers: bool
) -> GenerateSummary:
    """Return the counts over the journal. failures: why prompts failed, by the index of the row."""
    statuses: Counter[str] = Counter()
    tokens = substituted = tokens_sampled = 0
    chunks: list[Mapping[str, Any]] = []
    prompts: list[list[dict[str, Any]]] = []
    for row in run.done():
        responses = list_responses(row)
        for response in responses:
            statuses[response["status"]] += 1
            tokens += len(response["completion_ids"])
            substituted += response["substituted"]
            tokens_sampled += response.get("tokens_sampled", len(response["completion_ids"]))
            chunks += response.get("chunks", ())
        prompts.append([{name: r[name] for name in ("correct", "undecided", "cut_by")} for r in responses])
    return GenerateSummary(
        path=run.journal_path,
        prompts=len(prompts),
        statuses=dict(statuses),
        accuracy=measure_accuracy(prompts),
        cuts=count_cuts(response for responses in prompts for response in responses),
        tokens=tokens,
        substituted=substituted,
        writers=describe_writers(chunks) if has_two_writers else None,
        tokens_sampled=tokens_sampled,
        failures=tuple(message for _, message in sorted(failures.items())),
        bad_rows=data.list_bad_rows(failures),
    )
