"""The engine: a teacher and a student over paged caches, and the searches that run on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from genssd.engine.branch import Branch, PromptIds
from genssd.engine.brancher import EngineBrancher, check_fits, counted_logprob, response_limit
from genssd.engine.candidate import AnyCriterion, Window, needs_answer
from genssd.engine.checkpoint import fingerprint, locate
from genssd.engine.chunk import Chunk
from genssd.engine.criterion_names import resolve
from genssd.engine.errors import CapacityError, InputError
from genssd.engine.expander import Expansion, Promises, Usage
from genssd.engine.generation import Completion, generate
from genssd.engine.loops import LoopGuard
from genssd.engine.memory import available_bytes, choose_device, choose_dtype
from genssd.engine.model import Decoder
from genssd.engine.nodes import Forcing, Fork, NodeReader, iter_force
from genssd.engine.pages import PagePool, pages_within
from genssd.engine.requests import check_answers, check_ids, check_positions, check_vocabulary, labels_of
from genssd.engine.reverse_speculation import ReverseSpeculation
from genssd.engine.runner import ModelRunner, Role
from genssd.engine.sampling import Sampling, prompt_stream
from genssd.engine.scoring import score
from genssd.engine.search import PromptSearch, SearchOptions, search
from genssd.engine.selection import Selection
from genssd.engine.text import Prompt, Tokenizer
from genssd.kernels.logprob import TokenStats

ANSWER_ROOM = 32
"""Positions kept free, beside those of the answer itself, where a criterion reads the reference answer: for what it
writes in front of it."""


class Engine:
    """Build with `Engine.from_pretrained`. Not thread-safe."""

    def __init__(self, runners: dict[Role, ModelRunner], tokenizers: dict[Role, Tokenizer], max_batch: int) -> None:
        self._runners = runners
        self._tokenizers = tokenizers
        self._max_batch = max_batch
        self._promises: Promises = {}
        self.usage = Usage()

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
    ) -> Engine:
        """Load one or both models.

        teacher, student: hub id or local directory; with one of them only `generate`, `score` and `branch` of that
        model work. device: None takes CUDA where there is one. dtype: "auto" is the checkpoint's own, float32 on a CPU
        that has no bf16 arithmetic. memory_utilization: the share of the memory free after loading that the two caches
        get together; memory_bytes sets that budget in bytes instead. max_batch: candidates decoded at once.
        Raises CheckpointError on a directory that cannot be used, InputError on models whose tokenizers differ.
        """
        names: dict[Role, str | Path] = {}
        if teacher is not None:
            names["teacher"] = teacher
        if student is not None:
            names["student"] = student
        if not names:
            raise InputError("from_pretrained needs a teacher, a student or both")
        if not 0.0 < memory_utilization <= 1.0:
            raise InputError(f"memory_utilization must be in (0, 1], not {memory_utilization}")
        if max_batch < 1:
            raise InputError(f"max_batch must be at least 1, not {max_batch}")
        target = choose_device(device)
        directories = {role: locate(name) for role, name in names.items()}
        decoders = {
            role: Decoder.load(path, choose_dtype(path, dtype, target), target) for role, path in directories.items()
        }
        tokenizers = {role: Tokenizer(path) for role, path in directories.items()}
        for role, decoder in decoders.items():
            check_vocabulary(tokenizers[role], decoder)
        if len({tokenizer.fingerprint for tokenizer in tokenizers.values()}) > 1:
            raise InputError(
                f"teacher {names['teacher']} and student {names['student']} have different vocabularies; the student "
                "scores the teacher's token ids, so both need the same tokenizer"
            )
        budget = int(memory_utilization * available_bytes(target)) if memory_bytes is None else memory_bytes
        pages = pages_within(budget, list(decoders.values()))
        runners = {
            role: ModelRunner(role, directories[role], decoder, PagePool.for_model(decoder, pages))
            for role, decoder in decoders.items()
        }
        return Engine(runners, tokenizers, max_batch)

    @staticmethod
    def over(
        role: Role, decoder: Decoder, tokenizer: Tokenizer, *, memory_bytes: int | None = None, max_batch: int = 256
    ) -> Engine:
        """An engine over one decoder that is in memory already. memory_bytes: of its cache; None: a third of what is
        free."""
        device = decoder.device
        budget = available_bytes(device) // 3 if memory_bytes is None else memory_bytes
        pool = PagePool.for_model(decoder, pages_within(budget, [decoder]))
        return Engine({role: ModelRunner(role, tokenizer.directory, decoder, pool)}, {role: tokenizer}, max_batch)

    def select_expand(
        self,
        prompts: Sequence[Prompt],
        *,
        candidates: int = 4,
        chunk: Chunk = Chunk(),
        beam: int = 1,
        criterion: str | AnyCriterion = "ppl",
        threshold: float | None = None,
        max_tokens: int = 4096,
        sampling: Sampling = Sampling(top_p=0.95),
        loop_guard: LoopGuard | None = LoopGuard(),
        seed: int = 0,
        answers: Sequence[str | None] | None = None,
        teacher_topk: int = 0,
        labels: Sequence[str] | None = None,
    ) -> list[Selection]:
        """Let the student choose what the teacher writes; one Selection per prompt, in order.

        prompts: raw text, chat messages, or token ids each. candidates: sampled per live branch and round. beam:
        branches kept per prompt after each round. criterion: a name ("rsr", "ppl(norm='byte')", "0.7*rsr + 0.3*lalp",
        "package.module:Name") or an object. threshold: prune a branch
        whose best candidate is worse than this value of the criterion; None never prunes. max_tokens: of the response.
        answers: the prompts' reference answers, for criteria that read them. teacher_topk: keep so many of the
        teacher's most likely tokens at every position of the trajectories, for distillation; the teacher's last hidden
        states of all live candidates are held meanwhile. labels: what messages call each prompt; None: "prompt" and
        its index.
        Raises InputError on an unusable prompt or option (naming the prompt's index), CapacityError on a prompt that is
        longer than the models' positions or the cache, NumericsError on NaN or infinite logits.
        """
        done = self.iter_select_expand(
            prompts,
            candidates=candidates,
            chunk=chunk,
            beam=beam,
            criterion=criterion,
            threshold=threshold,
            max_tokens=max_tokens,
            sampling=sampling,
            loop_guard=loop_guard,
            seed=seed,
            answers=answers,
            teacher_topk=teacher_topk,
            labels=labels,
        )
        return sorted(done, key=lambda selection: selection.index)

    def iter_select_expand(
        self,
        prompts: Sequence[Prompt],
        *,
        candidates: int = 4,
        chunk: Chunk = Chunk(),
        beam: int = 1,
        criterion: str | AnyCriterion = "ppl",
        threshold: float | None = None,
        max_tokens: int = 4096,
        sampling: Sampling = Sampling(top_p=0.95),
        loop_guard: LoopGuard | None = LoopGuard(),
        seed: int = 0,
        answers: Sequence[str | None] | None = None,
        teacher_topk: int = 0,
        skip: frozenset[int] = frozenset(),
        labels: Sequence[str] | None = None,
    ) -> Iterator[Selection]:
        """The same, each Selection as its prompt ends.

        skip: indices of prompts that are not run (done before); the others get what they would have got without it.
        """
        options = SearchOptions(
            candidates=candidates,
            chunk=chunk,
            beam=beam,
            criterion=resolve(criterion),
            threshold=threshold,
            max_tokens=max_tokens,
            loop_guard=loop_guard,
            seed=seed,
        )
        teacher, _ = self._runner("teacher"), self._runner("student")  # say so before anything starts
        if not 0 <= teacher_topk <= teacher.decoder.config.vocab_size:
            raise InputError(f"teacher_topk must be in 0..{teacher.decoder.config.vocab_size}, not {teacher_topk}")
        brancher = self._brancher(sampling, "teacher", topk=teacher_topk)
        names = labels_of(prompts, labels)
        check_answers(answers, options.criterion, names)
        starts = self._prompt_searches(prompts, names, options, brancher, skip, answers)
        return search(starts, brancher.expander, options)

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
        """Sample n responses per prompt from one model, without scoring. Errors as in `select_expand`.

        rsd: the student judges every token of the teacher, and writes itself what it refuses.
        """
        results: dict[int, list[Completion]] = {}
        for index, completions in self.iter_generate(
            prompts, model=model, n=n, sampling=sampling, max_tokens=max_tokens, seed=seed, rsd=rsd
        ):
            results[index] = completions
        return [results[i] for i in range(len(prompts))]

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
        skip: frozenset[int] = frozenset(),
        labels: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The same, each prompt's index and responses as it ends. skip and labels: see `iter_select_expand`."""
        if n < 1 or max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, not {n} and {max_tokens}")
        if rsd is not None and model != "teacher":
            raise InputError("rsd is the student's say in what the teacher writes: it needs model='teacher'")
        roles: list[Role] = [model] if rsd is None else ["teacher", "student"]
        brancher = self._brancher(sampling, model, scored=rsd is not None, rsd=rsd)
        whole = Chunk(tokens=max_tokens, until=None)
        names = labels_of(prompts, labels)
        queue = {
            index: Expansion(
                root, n, whole, response_limit(self._runners, root.prompt, max_tokens, roles), names[index]
            )
            for index, root, _ in self._roots(prompts, names, brancher, seed, roles)
            if index not in skip
        }
        for expansion in queue.values():
            check_fits(brancher.expander, expansion)
        return generate(queue, brancher.expander)

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
        """Put a token into a given response and let the model go on, n times: the response's index, the fork and its
        completions, as each ends (see nodes.py).

        forks: of each response, by position and token; what is in front of them is computed once. max_tokens: of the
        whole response. occurrence: how many equal prompts come before, as for `generate`; the completions depend on
        it, the seed, the prompt, the response's index, position and token alone. Errors as in `generate`.
        """
        if n < 1 or max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, not {n} and {max_tokens}")
        if len(responses) != len(forks):
            raise InputError(f"{len(responses)} responses but forks of {len(forks)}")
        runner, tokenizer = self._runner(model), self._tokenizers[model]
        ids = tuple(self._encode(prompt, model, label))
        for response, wanted in zip(responses, forks, strict=True):
            check_ids([*response, *(fork.token for fork in wanted)], runner, label)
            if not all(0 <= fork.position <= min(len(response), max_tokens - 1) for fork in wanted):
                raise InputError(f"{label}: a fork lies outside its response of {len(response)} tokens or max_tokens")
        rendered = PromptIds(teacher=ids) if model == "teacher" else PromptIds(teacher=(), student=ids)
        request = Forcing(
            prompt=rendered,
            prompt_ids=ids,
            responses=responses,
            forks=forks,
            stream=prompt_stream(seed, ids, occurrence),
            n=n,
            max_tokens=response_limit(self._runners, rendered, max_tokens, [model]),
            ends=tokenizer.end_token_ids,
            label=label,
        )
        brancher = self._brancher(sampling, model, scored=False)
        return iter_force(request, brancher, brancher.expander, runner, self.usage)

    def node_reader(self, model: Role = "student") -> NodeReader:
        """Reads what a model says at single places of given responses."""
        return NodeReader(self._runner(model), self.tokenizer(model).largest_id + 1, self.usage)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str | Sequence[int]], *, model: Role = "student"
    ) -> list[TokenStats]:
        """Statistics of every token of each response given its prompt, under one model; one TokenStats per response.

        responses: token ids, or text (encoded as it is, nothing added). No [tokens, vocabulary] tensor is built.
        Raises InputError on an empty response or unequal counts; else as `select_expand`.
        """
        labels_of(prompts, None)
        if len(prompts) != len(responses):
            raise InputError(f"{len(prompts)} prompts but {len(responses)} responses")
        runner, tokenizer = self._runner(model), self._tokenizers[model]
        pairs = []
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            prompt_ids = self._encode(prompt, model, f"prompt {index}")
            ids = tokenizer.encode(response, special=False) if isinstance(response, str) else list(response)
            if not ids:
                raise InputError(f"response {index} is empty")
            check_ids(ids, runner, f"response {index}")
            check_positions(len(prompt_ids) + len(ids) - 1, runner, f"prompt {index} with its response")
            pairs.append((prompt_ids, ids))
        return score(runner, pairs)

    def local_logprob(
        self, prompt: Prompt, response: Sequence[int], windows: Sequence[Window], *, model: Role = "student"
    ) -> list[Tensor]:
        """log p(response[start:end] | prompt, response[context:start]) for windows (context, start, end).

        Every window is a sequence of its own behind the prompt, positions included; the prompt is computed once.
        """
        runner = self._runner(model)
        prompt_ids = self._encode(prompt, model, "the prompt")
        check_ids(response, runner, "the response")
        for window in windows:
            if len(window) != 3 or not 0 <= window[0] <= window[1] < window[2] <= len(response):
                raise InputError(
                    f"{tuple(window)} is no window (context, start, end) of a response of {len(response)} tokens"
                )
        longest = max((end - context - 1 for context, _, end in windows), default=0)
        check_positions(len(prompt_ids) + longest, runner, "the prompt with a window")
        return counted_logprob(runner, self.usage, prompt_ids, response, windows)

    def branch(
        self, prompt: Prompt, *, sampling: Sampling = Sampling(top_p=0.95), seed: int = 0, answer: str | None = None
    ) -> Branch:
        """The root of a tree for searches of your own; see `Branch`. answer: for criteria that read it."""
        brancher = self._brancher(sampling, "teacher", scored="student" in self._runners)
        roles: list[Role] = ["teacher", "student"] if "student" in self._runners else ["teacher"]
        ((_, root, _),) = self._roots([prompt], ["the prompt"], brancher, seed, roles, [answer])
        return root

    @property
    def pages_in_use(self) -> tuple[int, int]:
        """Held pages and all pages, over both caches."""
        pools = [runner.tree.pool for runner in self._runners.values()]
        return sum(p.num_pages - p.num_free for p in pools), sum(p.num_pages for p in pools)

    @cached_property
    def fingerprints(self) -> dict[Role, str]:
        """Identifies each loaded checkpoint: 16 hex digits."""
        return {role: fingerprint(runner.directory) for role, runner in self._runners.items()}

    def longest(self, model: Role) -> int:
        """Tokens of prompt and response that a model takes: its positions, or what its cache holds."""
        runner = self._runner(model)
        pool = runner.tree.pool
        return min(runner.decoder.config.max_position_embeddings, (pool.num_pages - 2) * pool.page_size)

    def tokenizer(self, model: Role) -> Tokenizer:
        """The tokenizer of a loaded model."""
        self._runner(model)
        return self._tokenizers[model]

    def _brancher(
        self,
        sampling: Sampling,
        writer: Role,
        *,
        scored: bool = True,
        rsd: ReverseSpeculation | None = None,
        topk: int = 0,
    ) -> EngineBrancher:
        for role in (writer, *(("student",) if scored else ())):
            self._runner(role)  # says which is missing
        return EngineBrancher(
            self._runners,
            self._tokenizers,
            sampling,
            writer,
            scored=scored,
            rsd=rsd,
            topk=topk,
            max_batch=self._max_batch,
            usage=self.usage,
            promises=self._promises,
        )

    def _runner(self, role: Role) -> ModelRunner:
        runner = self._runners.get(role)
        if runner is None:
            raise InputError(f"this engine has no {role}; give {role}= to Engine.from_pretrained")
        return runner

    def _encode(self, prompt: Prompt, role: Role, label: str) -> list[int]:
        runner = self._runner(role)
        try:
            ids = self._tokenizers[role].encode_prompt(prompt)
        except InputError as error:
            raise InputError(f"{label}: {error}") from None
        check_ids(ids, runner, label)
        check_positions(len(ids), runner, label)
        return ids

    def _roots(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[str],
        owner: EngineBrancher,
        seed: int,
        roles: list[Role],
        answers: Sequence[str | None] | None = None,
    ) -> Iterator[tuple[int, Branch, int]]:
        """Index, root branch and occurrence (how many equal prompts came before) of each prompt."""
        seen: Counter[tuple[int, ...]] = Counter()
        for index, prompt in enumerate(prompts):
            ids = {role: tuple(self._encode(prompt, role, labels[index])) for role in roles}
            answer = None if answers is None else answers[index]
            rendered = PromptIds(teacher=ids.get("teacher", ()), student=ids.get("student", ()), answer=answer)
            key = ids[roles[0]]
            yield index, Branch(owner, rendered, prompt_stream(seed, key, seen[key])), seen[key]
            seen[key] += 1

    def _room_before_answer(self, prompt: PromptIds, label: str) -> int:
        """What the student's positions leave for a response behind which a criterion reads the reference answer."""
        answer = len(self._tokenizers["student"].encode_plain(prompt.answer or "")) + ANSWER_ROOM
        room = self._runner("student").decoder.config.max_position_embeddings - len(prompt.student) - answer
        if room < 1:
            raise CapacityError(f"{label}: prompt and reference answer leave no position for a response")
        return room

    def _prompt_searches(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[str],
        options: SearchOptions,
        owner: EngineBrancher,
        skip: frozenset[int],
        answers: Sequence[str | None] | None,
    ) -> list[PromptSearch]:
        roles: list[Role] = ["teacher", "student"]
        searches = []
        for index, root, occurrence in self._roots(prompts, labels, owner, options.seed, roles, answers):
            limit = response_limit(self._runners, root.prompt, options.max_tokens, roles)
            if needs_answer(options.criterion):
                assert root.prompt.answer is not None
                limit = min(limit, self._room_before_answer(root.prompt, labels[index]))
            start = PromptSearch(index, labels[index], occurrence, root, limit)
            if index not in skip:
                for expansion in start.next_round(options):
                    check_fits(owner.expander, expansion)
                searches.append(start)
        return searches
