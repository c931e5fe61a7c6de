"""The engine: a teacher and a student over paged caches, and the searches that run on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

from torch import Tensor

from genssd.engine.calls.branching_engine import BranchingEngine
from genssd.engine.calls.generation import Completion, Generation
from genssd.engine.calls.nodes import Forcing, Fork, iter_force
from genssd.engine.calls.scoring import score
from genssd.engine.calls.session import Session
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import BOTH, Role
from genssd.engine.common.options_check import check_arguments, check_count
from genssd.engine.criteria.candidate import ActivationMeans, Window
from genssd.engine.decoding.feed import Feed
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.models.sampling import Sampling, prompt_stream
from genssd.engine.readers.prompt_ids import PromptIds
from genssd.engine.search.judging import Judge
from genssd.engine.search.planning import GenerationRequest, SearchPlan, iter_generations, plan_search
from genssd.engine.search.search_options import SearchChanges, SearchOptions
from genssd.engine.search.selection import Selection, Watch
from genssd.engine.search.team import Team
from genssd.engine.setup.requests import check_answers, check_ids, check_positions, check_windows, labels_of
from genssd.engine.texts.stops import StopStrings
from genssd.engine.texts.text import Prompt
from genssd.kernels.logprob import TokenStats


class Engine(BranchingEngine):
    """A teacher, a student or both, with the caches that their searches run in.

    Made by `Engine.from_pretrained`. Not thread-safe. A prompt is raw text, chat messages or token ids everywhere.
    """

    @check_arguments(but=("prompts", "answers", "labels"))
    def select_expand(
        self,
        prompts: Sequence[Prompt],
        options: SearchOptions = SearchOptions(),
        *,
        answers: Sequence[str | None] | None = None,
        labels: Sequence[str] | None = None,
        **changes: Unpack[SearchChanges],
    ) -> list[Selection]:
        """Let the student choose what the teachers write; return one Selection per prompt, in order.

        changes: fields of `SearchOptions` by name (`candidates=8`), in place of those of `options`. answers: the
        prompts' reference answers, for criteria that read them. labels: names of the prompts in messages; None names
        each "prompt" and its index.
        A prompt for which the teacher writes a token that the student does not have gets a Selection with `error` set.
        Raises InputError on an unusable prompt or option (naming the prompt's index), CapacityError on a prompt that is
        longer than the models' positions or the cache, NumericsError on NaN or infinite logits.
        """
        plan = self._plan_search(prompts, options.with_changes(**changes), answers, labels, frozenset())
        plan.require_all()
        return sorted(plan.run(), key=lambda selection: selection.index)

    @check_arguments(but=("prompts", "answers", "labels", "feed", "watch"))
    def iter_select_expand(
        self,
        prompts: Sequence[Prompt],
        options: SearchOptions = SearchOptions(),
        *,
        answers: Sequence[str | None] | None = None,
        labels: Sequence[str] | None = None,
        skip: frozenset[int] = frozenset(),
        feed: Feed | None = None,
        watch: Watch | None = None,
        **changes: Unpack[SearchChanges],
    ) -> Iterator[Selection]:
        """Run the search of `select_expand` and yield each Selection as soon as its prompt ends.

        A prompt that is longer than a model's positions or than the cache yields a Selection with `error` set, before
        all others; one for which the teacher writes a token that the student does not have, as soon as that is known;
        one that a budget ends yields what it has, with `ended_by` set. skip: indices of prompts that are not run,
        because they were done before; the others get what they would have got without it. feed: hands out the indices
        of the prompts to run, one after the other, where several engines divide them; the others have no outcome here.
        watch: a function that is told of every round as it is decided (`Watch` in search.py).
        Arguments are checked at once, and raise the errors of `select_expand`.
        """
        return self._plan_search(prompts, options.with_changes(**changes), answers, labels, skip, watch).run(feed)

    def _plan_search(
        self,
        prompts: Sequence[Prompt],
        options: SearchOptions,
        answers: Sequence[str | None] | None,
        labels: Sequence[str] | None,
        skip: frozenset[int],
        watch: Watch | None = None,
    ) -> SearchPlan:
        judge = Judge.from_options(options)
        vocabulary = min(one.vocab_size("teacher") for one in self._resources.list_teachers())
        if options.teacher_topk > vocabulary:
            raise InputError(f"teacher_topk must be in 0..{vocabulary}, not {options.teacher_topk}")
        names = labels_of(prompts, labels)
        check_answers(answers, judge.criterion, names)
        stops = StopStrings(texts=options.stop, is_included=options.include_stop)
        team = Team.open(self._resources, options.sampling, num_topk=options.teacher_topk, stops=stops)
        encoded = team.encode_all(prompts, names, answers)
        return plan_search(team, judge, (views for views in encoded if views[0].index not in skip), watch)

    @check_arguments(but=("prompts", "labels"))
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        model: Role = "teacher",
        n: int = 1,
        sampling: Sampling = Sampling(top_p=0.95),
        max_tokens: int = 4096,
        seed: int = 0,
        rsd: ReverseSpeculation | None = None,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
    ) -> list[list[Completion]]:
        """Sample n responses per prompt from one model, without scoring; return the completions of each prompt.

        max_tokens: maximum number of tokens in a response. rsd: rules by which the student judges every token of the
        teacher, and writes those that it refuses itself; None lets the model write alone. stop, include_stop: texts at
        which a response ends, and whether it keeps them (see `SearchOptions`). Errors as in `select_expand`.
        """
        outcomes = self.iter_generate(
            prompts,
            model=model,
            n=n,
            sampling=sampling,
            max_tokens=max_tokens,
            seed=seed,
            rsd=rsd,
            stop=stop,
            include_stop=include_stop,
        )
        completions = {outcome.index: outcome.completions for outcome in outcomes}
        return [completions[i] for i in range(len(prompts))]

    @check_arguments(but=("prompts", "labels", "feed"))
    def iter_generate(
        self,
        prompts: Sequence[Prompt],
        *,
        model: Role = "teacher",
        n: int = 1,
        sampling: Sampling = Sampling(top_p=0.95),
        max_tokens: int = 4096,
        seed: int = 0,
        rsd: ReverseSpeculation | None = None,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        greedy_first: bool = False,
        skip: frozenset[int] = frozenset(),
        labels: Sequence[str] | None = None,
        feed: Feed | None = None,
    ) -> Iterator[Generation]:
        """Sample as `generate` does and yield each prompt's Generation as soon as its last completion ends.

        A prompt that is longer than the model's positions or than the cache yields a Generation with `error` set,
        before all others. greedy_first: the first of the n completions takes the most likely tokens, whatever the
        sampling. skip, labels and feed: as in `iter_select_expand`. Arguments are checked at once.
        """
        check_count("n", n)
        check_count("max_tokens", max_tokens)
        if rsd is not None and model != "teacher":
            raise InputError("rsd is the student's say in what the teacher writes: it needs model='teacher'")
        if rsd is not None and greedy_first:
            raise InputError("greedy_first is for a model that writes alone: leave rsd out")
        self._require_one_writer(model)
        roles: Sequence[Role] = [model] if rsd is None else BOTH
        stops = StopStrings(texts=stop, is_included=include_stop)
        session = Session(
            self._resources, sampling, model, scored=False, rsd=rsd, greedy_first=greedy_first, stops=stops
        )
        encoded = self._resources.encode_all(prompts, labels_of(prompts, labels), roles)
        request = GenerationRequest(roles=roles, n=n, max_tokens=max_tokens, seed=seed)
        return iter_generations(self._resources, session, request, (p for p in encoded if p.index not in skip), feed)

    @check_arguments(but=("prompt", "responses"))
    def iter_force(
        self,
        prompt: Prompt,
        responses: Sequence[Sequence[int]],
        forks: Sequence[Sequence[Fork]],
        *,
        model: Role = "student",
        n: int = 1,
        sampling: Sampling = Sampling(),
        max_tokens: int = 4096,
        seed: int = 0,
        occurrence: int = 0,
        label: str = "the prompt",
    ) -> Iterator[tuple[int, Fork, list[Completion]]]:
        """Put tokens into given responses and sample n completions after each (see nodes.py).

        Yields the response's index, the fork and its completions, as soon as they end. responses: token ids. forks: of
        each response, by position and token; the tokens before them are computed once. max_tokens: maximum number of
        tokens in the whole response. occurrence: number of equal prompts before this one, as for `generate`; the
        completions depend on it, the seed, the prompt, the response's index, position and token alone.
        Raises InputError on a fork outside its response or max_tokens, else the errors of `generate`.
        """
        check_count("n", n)
        check_count("max_tokens", max_tokens)
        self._require_one_writer(model)
        ids = tuple(self._resources.encode(prompt, model, label))
        request = Forcing(
            prompt=PromptIds(teacher=ids) if model == "teacher" else PromptIds(student=ids),
            prompt_ids=ids,
            responses=responses,
            forks=forks,
            stream=prompt_stream(seed, ids, occurrence),
            n=n,
            max_tokens=max_tokens,
            end_token_ids=self._resources.tokenizer(model).end_token_ids,
            label=label,
        )
        session = Session(self._resources, sampling, model, scored=False)
        return iter_force(request, session, self._resources, model)

    @check_arguments(but=("prompts", "responses"))
    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str | Sequence[int]], *, model: Role = "student"
    ) -> list[TokenStats]:
        """Return the statistics of every token of each response given its prompt, under one model.

        One TokenStats of [tokens] per response. responses: token ids, or text (encoded as it is, nothing added). No
        [tokens, vocabulary] tensor is built. Raises InputError on an empty response or unequal counts, else the errors
        of `select_expand`.
        """
        labels_of(prompts, None)
        return score(self._resources.runner(model), self._resources.encode_pairs(prompts, responses, model))

    @check_arguments(but=("prompt", "response", "windows"))
    def local_logprob(
        self, prompt: Prompt, response: Sequence[int], windows: Sequence[Window], *, model: Role = "student"
    ) -> list[Tensor]:
        """Return log p(response[start:end] | prompt, response[context:start]) for windows (context, start, end).

        One float32 tensor [end - start] per window. Every window is a sequence of its own after the prompt, positions
        included; the prompt is computed once. Raises InputError on a window outside the response, CapacityError on one
        that does not fit, NumericsError on NaN or infinite logits.
        """
        runner = self._resources.runner(model)
        prompt_ids = self._resources.encode(prompt, model, "the prompt")
        ids = check_ids(response, runner, "the response")
        check_windows(windows, len(ids))
        longest = max((end - context - 1 for context, _, end in windows), default=0)
        check_positions(len(prompt_ids) + longest, runner, "the prompt with a window")
        return self._resources.local_logprob(model, prompt_ids, ids, windows)

    @check_arguments(but=("prompt", "response"))
    def mean_activations(
        self, prompt: Prompt, response: Sequence[int], start: int = 0, *, model: Role = "student"
    ) -> ActivationMeans:
        """Return means of the last up projection's normalised outputs over the prompt and over response[start:].

        Raises InputError on a start outside of the response, on a model whose last layer has no single up projection,
        and on more tokens than the model has positions; CapacityError on more than the cache holds, NumericsError on
        NaN or infinite logits.
        """
        runner = self._resources.runner(model)
        prompt_ids = self._resources.encode(prompt, model, "the prompt")
        ids = check_ids(response, runner, "the response")
        if not 0 <= start < len(ids):
            raise InputError(f"start must lie in the response of {format_count(len(ids), 'token')}, not {start}")
        return self._resources.mean_activations(model, prompt_ids, ids, start)
