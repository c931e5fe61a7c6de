"""From the prompts of a call to what runs: which prompts can be run at all, and the outcome of those that cannot.

A prompt is left out before anything runs when it is longer than a model's positions, or when the first candidates after
it would not fit into an empty cache. Its outcome then says why, and the others run as if it were not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from genssd.engine.calls.generation import Generation, generate
from genssd.engine.calls.session import Session
from genssd.engine.common.errors import CapacityError
from genssd.engine.common.model_choices import Role
from genssd.engine.decoding.any_expander import AnyExpander
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.decoding.feed import Feed, Intake
from genssd.engine.models.sampling import prompt_stream
from genssd.engine.search.budget import Budget
from genssd.engine.search.judging import Judge
from genssd.engine.search.policies import make_policy
from genssd.engine.search.prompt_search import PromptSearch
from genssd.engine.search.scheduler import SearchScheduler
from genssd.engine.search.selection import Selection, Watch
from genssd.engine.search.team import Team
from genssd.engine.setup.resources import EncodedPrompt, Resources

NO_ANSWER_ROOM = "prompt and reference answer leave no position for a response"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """The searches of one call, and the prompts that cannot be run."""

    expander: AnyExpander
    searches: Sequence[PromptSearch]
    misfits: Sequence[tuple[PromptSearch, str]]
    """Prompts that cannot be run, and why."""
    budget: Budget
    """Limits of all searches together."""

    def require_all(self) -> None:
        """Raise CapacityError naming the first prompt that cannot be run."""
        for search, misfit in self.misfits:
            raise CapacityError(f"{search.label}: {misfit}")

    def run(self, feed: Feed | None = None) -> Iterator[Selection]:
        """Yield the outcomes of the prompts that cannot be run, then every other one as soon as it is known.

        feed: hands out the prompts to run; the others have no outcome. None runs all of them.
        """
        outcomes = {search.index: search.outcome(error=misfit) for search, misfit in self.misfits}
        if feed is None:
            yield from outcomes.values()
        searches = {search.index: search for search in self.searches}
        waiting = Intake(searches, self.expander.usage, feed, outcomes)
        yield from SearchScheduler(waiting, self.expander, self.budget, outcomes).run()


def plan_search(
    team: Team, judge: Judge, prompts: Iterable[tuple[EncodedPrompt, ...]], watch: Watch | None = None
) -> SearchPlan:
    """Make the search of every prompt, and find those that cannot be run.

    prompts: each as every teacher reads it. watch: is told of every round.
    """
    searches: list[PromptSearch] = []
    misfits: list[tuple[PromptSearch, str]] = []
    policy = make_policy(judge.options, team.size)
    for views in prompts:
        prompt = views[0]
        limit = team.limit_response(views, judge.options.max_tokens, judge.criterion)
        search = PromptSearch(
            index=prompt.index,
            label=prompt.label,
            occurrence=prompt.occurrence,
            team=team,
            root=team.make_root(views, judge.options.seed),
            max_tokens=limit,
            judge=judge,
            policy=policy,
            watch=watch,
        )
        misfit = next((one.misfit for one in views if one.misfit is not None), None)
        misfit = misfit or (NO_ANSWER_ROOM if limit < 1 else None)
        misfit = misfit or team.expander.pages.find_misfit(search.round)
        if misfit is None:
            searches.append(search)
        else:
            misfits.append((search, misfit))
    team.expander.pages.share_prefixes([branch for search in searches for branch in search.root.list_present()])
    return SearchPlan(expander=team.expander, searches=searches, misfits=misfits, budget=judge.options.total_budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """The options of one call of `generate` other than its prompts and sampling."""

    roles: Sequence[Role]
    """Models that read the prompts, the writing one first."""
    n: int
    max_tokens: int
    seed: int


def iter_generations(
    resources: Resources,
    session: Session,
    request: GenerationRequest,
    prompts: Iterable[EncodedPrompt],
    feed: Feed | None = None,
) -> Iterator[Generation]:
    """Check the prompts at once; return an iterator over the outcomes, those that cannot be run first.

    feed: hands out the prompts to run; the others have no outcome. None runs all of them.
    """
    chunk = Chunk(tokens=request.max_tokens, until=None)
    queue: dict[int, Expansion] = {}
    failed: dict[int, Generation] = {}
    for prompt in prompts:
        root = _root(session, prompt, request.seed, request.roles[0])
        limit = resources.response_limit(prompt.ids, request.max_tokens, request.roles)
        expansion = Expansion(root, request.n, chunk, limit, prompt.label)
        misfit = prompt.misfit or session.expander.pages.find_misfit([expansion])
        if misfit is None:
            queue[prompt.index] = expansion
        else:
            failed[prompt.index] = Generation(index=prompt.index, label=prompt.label, error=misfit)
    session.expander.pages.share_prefixes([expansion.parent for expansion in queue.values()])
    return _run_generation(failed, queue, session.expander, feed)


def _run_generation(
    failed: Mapping[int, Generation], queue: dict[int, Expansion], expander: AnyExpander, feed: Feed | None
) -> Iterator[Generation]:
    if feed is None:
        yield from failed.values()
    yield from generate(queue, expander, feed, failed)


def _root(session: Session, prompt: EncodedPrompt, seed: int, writer: Role) -> Branch:
    ids = prompt.ids.teacher if writer == "teacher" else prompt.ids.student
    return Branch.root(session, prompt.ids, prompt_stream(seed, ids, prompt.occurrence))
