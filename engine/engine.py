"""The engine: a teacher and a student over paged caches, and the searches that run on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Unpack

from torch import Tensor

from genssd.engine.branch import Branch, PromptIds
from genssd.engine.candidate import Window
from genssd.engine.chat_options import ChatOptions
from genssd.engine.checkpoint import fingerprint
from genssd.engine.errors import CapacityError, InputError
from genssd.engine.generation import Completion, Generation
from genssd.engine.judging import Judge
from genssd.engine.launches import LaunchRecord, describe_launches
from genssd.engine.loading import LoadedModels, load_models
from genssd.engine.memory import cache_budget, choose_device
from genssd.engine.model import Decoder
from genssd.engine.nodes import Forcing, Fork, NodeReader, iter_force
from genssd.engine.planning import GenerationRequest, SearchPlan, iter_generations, plan_search
from genssd.engine.requests import check_answers, check_ids, check_positions, check_sizes, check_windows, labels_of
from genssd.engine.resources import Resources
from genssd.engine.reverse_speculation import ReverseSpeculation
from genssd.engine.runner import Role
from genssd.engine.sampling import Sampling, prompt_stream
from genssd.engine.scoring import score
from genssd.engine.search_options import SearchChanges, SearchOptions
from genssd.engine.selection import Selection
from genssd.engine.session import Session
from genssd.engine.text import Prompt, Tokenizer
from genssd.engine.token_map import TokenMap
from genssd.engine.usage import Usage
from genssd.kernels.logprob import TokenStats

BOTH: tuple[Role, Role] = ("teacher", "student")


class Engine:
    """A teacher, a student or both, with the caches that their searches run in.

    Made by `Engine.from_pretrained`. Not thread-safe. A prompt is raw text, chat messages or token ids everywhere.
    """

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    @staticmethod
    def from_pretrained(
        teacher: str | Path | None = None,
        student: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        memory_utilization: float = 0.9,
        memory_bytes: int | None = None,
        max_batch: int = 256,
        deterministic: bool = True,
    ) -> Engine:
        """Load one or both models and return an engine over them.

        teacher, student: hub id or local directory; with one of them only `generate`, `score` and `branch` of that
        model work. device: None takes CUDA where a device is found, else the CPU. dtype: "auto" is the checkpoint's
        own, float32 on a CPU that has no bf16 arithmetic. memory_utilization: the fraction of the memory free after
        loading that the two caches get together; memory_bytes sets that budget in bytes instead. max_batch: maximum
        number of candidates decoded at once. deterministic: on a GPU, a token's bits do not depend on how many are
        scored or drawn with it; False takes the fastest kernels for every number of tokens (docs/tuning.md).
        Raises CheckpointError on a directory that cannot be used, InputError on models whose tokenizers do not match.
        """
        if teacher is None and student is None:
            raise InputError("from_pretrained needs a teacher, a student or both")
        check_sizes(memory_utilization, max_batch)
        target = choose_device(device)
        models = load_models(teacher, student, dtype, target, deterministic=deterministic)
        return Engine(models.open_resources(cache_budget(target, memory_bytes, memory_utilization), max_batch))

    @staticmethod
    def from_decoder(
        role: Role, decoder: Decoder, tokenizer: Tokenizer, *, memory_bytes: int | None = None, max_batch: int = 256
    ) -> Engine:
        """Return an engine over one decoder that is in memory already.

        memory_bytes: size of its cache in bytes; None takes a third of the free memory.
        """
        budget = cache_budget(decoder.device, memory_bytes, 1 / 3)
        return Engine(LoadedModels.of_one(role, decoder, tokenizer).open_resources(budget, max_batch))

    def with_chat(self, options: ChatOptions) -> Engine:
        """Return this engine, its caches and counts shared, with other options of rendering chats.

        Raises InputError naming a variable of the options that a chat template does not read.
        """
        other = copy.copy(self)
        other._resources = self._resources.with_chat(options)
        return other

    def select_expand(
        self,
        prompts: Sequence[Prompt],
        options: SearchOptions = SearchOptions(),
        *,
        answers: Sequence[str | None] | None = None,
        labels: Sequence[str] | None = None,
        **changes: Unpack[SearchChanges],
    ) -> list[Selection]:
        """Let the student choose what the teacher writes; return one Selection per prompt, in order.

        changes: fields of `SearchOptions` by name (`candidates=8`), in place of those of `options`. answers: the
        prompts' reference answers, for criteria that read them. labels: names of the prompts in messages; None names
        each "prompt" and its index.
        Raises InputError on an unusable prompt or option (naming the prompt's index), CapacityError on a prompt that is
        longer than the models' positions or the cache, NumericsError on NaN or infinite logits.
        """
        plan = self._plan_search(prompts, options.with_changes(**changes), answers, labels, frozenset())
        plan.require_all()
        return sorted(plan.run(), key=lambda selection: selection.index)

    def iter_select_expand(
        self,
        prompts: Sequence[Prompt],
        options: SearchOptions = SearchOptions(),
        *,
        answers: Sequence[str | None] | None = None,
        labels: Sequence[str] | None = None,
        skip: frozenset[int] = frozenset(),
        **changes: Unpack[SearchChanges],
    ) -> Iterator[Selection]:
        """Run the search of `select_expand` and yield each Selection as soon as its prompt ends.

        A prompt that is longer than a model's positions or than the cache yields a Selection with `error` set, before
        all others. skip: indices of prompts that are not run, because they were done before; the others get what they
        would have got without it. Arguments are checked at once, and raise the errors of `select_expand`.
        """
        return self._plan_search(prompts, options.with_changes(**changes), answers, labels, skip).run()

    def _plan_search(
        self,
        prompts: Sequence[Prompt],
        options: SearchOptions,
        answers: Sequence[str | None] | None,
        labels: Sequence[str] | None,
        skip: frozenset[int],
    ) -> SearchPlan:
        judge = Judge.from_options(options)
        vocabulary = self._resources.runner("teacher").decoder.config.vocab_size
        if options.teacher_topk > vocabulary:
            raise InputError(f"teacher_topk must be in 0..{vocabulary}, not {options.teacher_topk}")
        names = labels_of(prompts, labels)
        check_answers(answers, judge.criterion, names)
        session = Session(self._resources, options.sampling, "teacher", num_topk=options.teacher_topk)
        encoded = self._resources.encode_all(prompts, names, BOTH, answers)
        return plan_search(self._resources, session, judge, (p for p in encoded if p.index not in skip))

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
    ) -> list[list[Completion]]:
        """Sample n responses per prompt from one model, without scoring; return the completions of each prompt.

        max_tokens: maximum number of tokens in a response. rsd: rules by which the student judges every token of the
        teacher, and writes those that it refuses itself; None lets the model write alone. Errors as in
        `select_expand`.
        """
        outcomes = self.iter_generate(
            prompts, model=model, n=n, sampling=sampling, max_tokens=max_tokens, seed=seed, rsd=rsd
        )
        completions = {outcome.index: outcome.completions for outcome in outcomes}
        return [completions[i] for i in range(len(prompts))]

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
        greedy_first: bool = False,
        skip: frozenset[int] = frozenset(),
        labels: Sequence[str] | None = None,
    ) -> Iterator[Generation]:
        """Sample as `generate` does and yield each prompt's Generation as soon as its last completion ends.

        A prompt that is longer than the model's positions or than the cache yields a Generation with `error` set,
        before all others. greedy_first: the first of the n completions takes the most likely tokens, whatever the
        sampling. skip and labels: as in `iter_select_expand`. Arguments are checked at once.
        """
        if n < 1 or max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, not {n} and {max_tokens}")
        if rsd is not None and model != "teacher":
            raise InputError("rsd is the student's say in what the teacher writes: it needs model='teacher'")
        if rsd is not None and greedy_first:
            raise InputError("greedy_first is for a model that writes alone: leave rsd out")
        roles: Sequence[Role] = [model] if rsd is None else BOTH
        session = Session(self._resources, sampling, model, scored=False, rsd=rsd, greedy_first=greedy_first)
        encoded = self._resources.encode_all(prompts, labels_of(prompts, labels), roles)
        request = GenerationRequest(roles=roles, n=n, max_tokens=max_tokens, seed=seed)
        return iter_generations(self._resources, session, request, (p for p in encoded if p.index not in skip))

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
        if n < 1 or max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, not {n} and {max_tokens}")
        if len(responses) != len(forks):
            raise InputError(f"{len(responses)} responses but forks of {len(forks)}")
        runner = self._resources.runner(model)
        ids = tuple(self._resources.encode(prompt, model, label))
        for response, forks_here in zip(responses, forks, strict=True):
            check_ids([*response, *(fork.token for fork in forks_here)], runner, label)
            if not all(0 <= fork.position <= min(len(response), max_tokens - 1) for fork in forks_here):
                raise InputError(f"{label}: a fork lies outside its response of {len(response)} tokens or max_tokens")
        rendered = PromptIds(teacher=ids) if model == "teacher" else PromptIds(student=ids)
        request = Forcing(
            prompt=rendered,
            prompt_ids=ids,
            responses=responses,
            forks=forks,
            stream=prompt_stream(seed, ids, occurrence),
            n=n,
            max_tokens=self._resources.response_limit(rendered, max_tokens, [model]),
            end_token_ids=self._resources.tokenizer(model).end_token_ids,
            label=label,
        )
        session = Session(self._resources, sampling, model, scored=False)
        return iter_force(request, session, runner, self.usage)

    def node_reader(self, model: Role = "student") -> NodeReader:
        """Return a reader of one model's predictions at single positions of given responses."""
        return NodeReader(self._resources.runner(model), self.tokenizer(model).largest_id + 1, self.usage)

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
        check_ids(response, runner, "the response")
        check_windows(windows, len(response))
        longest = max((end - context - 1 for context, _, end in windows), default=0)
        check_positions(len(prompt_ids) + longest, runner, "the prompt with a window")
        return self._resources.local_logprob(model, prompt_ids, response, windows)

    def branch(
        self, prompt: Prompt, *, sampling: Sampling = Sampling(top_p=0.95), seed: int = 0, answer: str | None = None
    ) -> Branch:
        """Return the root of a tree for searches of your own; see `Branch`.

        answer: reference answer of the prompt, for criteria that read it. Raises the errors of `select_expand`.
        """
        roles: Sequence[Role] = BOTH if "student" in self._resources.runners else ["teacher"]
        session = Session(self._resources, sampling, "teacher", scored=len(roles) == 2)
        (encoded,) = self._resources.encode_all([prompt], ["the prompt"], roles, [answer])
        if encoded.misfit is not None:
            raise CapacityError(encoded.misfit)
        return Branch.root(session, encoded.ids, prompt_stream(seed, encoded.ids.teacher, encoded.occurrence))

    @property
    def usage(self) -> Usage:
        """Numbers of tokens that the engine has processed so far."""
        return self._resources.usage

    @property
    def pages_in_use(self) -> tuple[int, int]:
        """Number of held pages and of all pages, over both caches."""
        pools = [runner.tree.pool for runner in self._resources.runners.values()]
        return sum(p.num_pages - p.num_free for p in pools), sum(p.num_pages for p in pools)

    @cached_property
    def fingerprints(self) -> dict[Role, str]:
        """Identification of each loaded checkpoint: 16 hex digits."""
        return {role: fingerprint(runner.directory) for role, runner in self._resources.runners.items()}

    @cached_property
    def launches(self) -> LaunchRecord | None:
        """Configurations of the GPU kernels that the engine takes, and where they come from; None on a CPU."""
        return describe_launches([runner.decoder for runner in self._resources.runners.values()])

    def positions(self, model: Role) -> int:
        """Return the number of positions of a model: the maximum number of tokens that it can read after each other."""
        return self._resources.runner(model).decoder.config.max_position_embeddings

    def max_sequence_length(self, model: Role) -> int:
        """Return the maximum number of tokens in prompt and response: a model's positions, or what its cache holds."""
        runner = self._resources.runner(model)
        num_cached = (runner.tree.pool.num_pages - 2) * runner.tree.pool.page_size
        return min(runner.decoder.config.max_position_embeddings, num_cached)

    @property
    def token_map(self) -> TokenMap:
        """The ids by which the student reads the teacher's tokens."""
        return self._resources.token_map

    def tokenizer(self, model: Role) -> Tokenizer:
        """Return the tokenizer of a loaded model. Raises InputError when the engine was made without the model."""
        return self._resources.tokenizer(model)
