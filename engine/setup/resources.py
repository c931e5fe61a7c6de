"""Resources that all calls on one engine share: models with caches and tokenizers, counts, and page reservations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.usage import CacheUse, Usage
from genssd.engine.criteria.candidate import ActivationMeans, Window
from genssd.engine.criteria.criterion import AnyCriterion, needs_answer
from genssd.engine.decoding.activations import mean_activations
from genssd.engine.decoding.page_budget import Reservations
from genssd.engine.decoding.windows import local_logprob
from genssd.engine.models.hidden_states import read_states
from genssd.engine.models.runner import ModelRunner
from genssd.engine.readers.pair_prompts import PairEncoder, render_with
from genssd.engine.readers.prompt_ids import PromptIds
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.token_map import TokenMap
from genssd.engine.served.teacher import ServedTeacher
from genssd.engine.setup.requests import check_ids_below, check_list, check_positions, find_misfit
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Prompt, Tokenizer

ANSWER_ROOM = 32
"""Positions kept free for the text that a criterion writes before the reference answer, in addition to the answer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the models read it."""

    index: int
    ids: PromptIds
    label: str
    occurrence: int
    """Number of equal prompts before this one."""
    misfit: str | None = None
    """Why the prompt cannot be run: it is longer than a model's positions or than an empty cache."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The loaded models of an engine, and the state that its calls share."""

    runners: dict[Role, ModelRunner]
    tokenizers: Mapping[Role, Tokenizer]
    max_num_seqs: int
    """Maximum number of candidates decoded at once."""
    reader: Reader = field(default_factory=TokenMap)
    """How the student reads the teacher's tokens."""
    usage: Usage = field(default_factory=Usage)
    reservations: Reservations = field(default_factory=dict)
    """Pages that expansions in flight may still take."""
    served: ServedTeacher | None = None
    """The teacher, where a server runs it; it has no runner then."""
    others: tuple[Resources, ...] = ()
    """Further teachers, each beside the same student, with the same counts and reservations."""
    team_readers: Mapping[tuple[int, int], Reader] = field(default_factory=dict)
    """How one of several teachers reads the tokens of another, by the indices of the writer and the reader."""

    def list_teachers(self) -> tuple[Resources, ...]:
        """Return the models of every teacher with the student, those of the first one first."""
        return (self, *self.others)

    def list_runners(self) -> list[ModelRunner]:
        """Return the runners of all models."""
        return list(dict.fromkeys(runner for one in self.list_teachers() for runner in one.runners.values()))

    def runner(self, role: Role) -> ModelRunner:
        """Return the runner of a model. Raises InputError when the engine was made without it, or a server runs it."""
        runner = self.runners.get(role)
        if runner is None and role == "teacher" and self.served is not None:
            raise InputError(
                f"the teacher is served at {self.served.url}: it can write, and what reads its hidden states or its "
                "whole distribution needs its weights here; give teacher= a hub id or a local directory"
            )
        if runner is None:
            raise InputError(f"this engine has no {role}; give {role}= to Engine.from_pretrained")
        return runner

    def served_as(self, role: Role) -> ServedTeacher | None:
        """Return the server that runs a model; None where it runs here, or not at all."""
        return self.served if role == "teacher" else None

    def tokenizer(self, role: Role) -> Tokenizer:
        """Return the tokenizer of a model. Raises InputError when the engine was made without it."""
        if self.served_as(role) is None:
            self.runner(role)
        return self.tokenizers[role]

    def positions(self, role: Role) -> int:
        """Return the maximum number of tokens in a sequence of a model. Raises InputError as `tokenizer` does."""
        served = self.served_as(role)
        return self.runner(role).decoder.config.max_position_embeddings if served is None else served.positions

    def vocab_size(self, role: Role) -> int:
        """Return the number of token ids of a model's head. Raises InputError as `tokenizer` does."""
        served = self.served_as(role)
        return self.runner(role).decoder.config.vocab_size if served is None else served.vocab_size

    def find_misfit(self, num_tokens: int, role: Role, label: str) -> str | None:
        """Return why a model cannot run a sequence of so many tokens; None if it can. See `requests.find_misfit`."""
        served = self.served_as(role)
        if served is None:
            return find_misfit(num_tokens, self.runner(role), label)
        if num_tokens < served.positions:
            return None
        length = format_count(num_tokens, "token")
        return f"{label} has {length}; the teacher served at {served.url} has {served.positions} positions"

    @cached_property
    def pairs(self) -> PairEncoder:
        """The encoder of prompts for both models. Raises InputError as `tokenizer` does."""
        return PairEncoder(self.tokenizer("teacher"), self.tokenizer("student"), self.reader)

    @property
    def cache_use(self) -> CacheUse:
        """Pages and bytes of all caches, without changing them: safe in any thread."""
        pools = [runner.tree.pool for runner in self.list_runners()]
        held = [pool.num_pages - pool.num_free for pool in pools]
        return CacheUse(
            held_pages=sum(held),
            pages=sum(pool.num_pages for pool in pools),
            held_bytes=sum(count * p.page_nbytes for count, p in zip(held, pools, strict=True)),
            bytes=sum(pool.nbytes for pool in pools),
        )

    def with_chat(self, options: ChatOptions) -> Resources:
        """Return the same models, caches and counts with other options of rendering chats."""
        others = tuple(one.with_chat(options) for one in self.others)
        return replace(self, tokenizers=render_with(self.tokenizers, options), others=others)

    def encode(self, prompt: Prompt, role: Role, label: str) -> list[int]:
        """Return a prompt's token ids as a model reads it. Raises InputError or CapacityError naming the label."""
        ids = self._encode_any(prompt, role, label)
        misfit = self.find_misfit(len(ids), role, label)
        if misfit is not None:
            raise CapacityError(misfit)
        return ids

    def _encode_any(self, prompt: Prompt, role: Role, label: str) -> list[int]:
        """Return a prompt's token ids, however many they are. Raises InputError naming the label."""
        tokenizer = self.tokenizer(role)
        try:
            ids = tokenizer.encode_prompt(prompt)
        except InputError as error:
            raise InputError(f"{label}: {error}") from None
        return check_ids_below(ids, self.vocab_size(role), role, label)

    def encode_all(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[str],
        roles: Sequence[Role],
        answers: Sequence[str | None] | None = None,
    ) -> Iterator[EncodedPrompt]:
        """Yield every prompt as the models of these roles read it, with the reason where it is too long for one.

        Prompts are equal, for `occurrence`, when the model of the first role reads the same tokens. Raises InputError
        on a prompt that cannot be encoded.
        """
        seen: Counter[tuple[int, ...]] = Counter()
        for index, prompt in enumerate(prompts):
            label = labels[index]
            if len(roles) == 1:
                alone = tuple(self._encode_any(prompt, roles[0], label))
                rendered = PromptIds(teacher=alone) if roles[0] == "teacher" else PromptIds(student=alone)
            else:
                rendered = self._encode_for_both(prompt, label)
            ids: dict[Role, tuple[int, ...]] = {"teacher": rendered.teacher, "student": rendered.student}
            misfits = (self.find_misfit(len(ids[role]), role, "the prompt") for role in roles)
            key = ids[roles[0]]
            yield EncodedPrompt(
                index=index,
                ids=rendered if answers is None else replace(rendered, answer=answers[index]),
                label=label,
                occurrence=seen[key],
                misfit=next(filter(None, misfits), None),
            )
            seen[key] += 1

    def _encode_for_both(self, prompt: Prompt, label: str) -> PromptIds:
        """Return a prompt's token ids as both models read it. Raises InputError naming the label."""
        try:
            pair = self.pairs.encode(prompt)
        except InputError as error:
            raise InputError(f"{label}: {error}") from None
        check_ids_below(pair.teacher, self.vocab_size("teacher"), "teacher", label)
        check_ids_below(pair.student, self.vocab_size("student"), "student", label)
        return PromptIds(teacher=pair.teacher, student=pair.student, num_lead=pair.num_lead)

    def encode_pairs(
        self, prompts: Sequence[Prompt], responses: Sequence[str | Sequence[int]], role: Role
    ) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of every prompt and its response. responses: token ids, or text, encoded as it is.

        Raises InputError on an empty response or unequal counts, CapacityError on a pair that is longer than the
        model's positions.
        """
        check_list("responses", responses, "responses")
        if len(prompts) != len(responses):
            raise InputError(f"{format_count(len(prompts), 'prompt')} but {format_count(len(responses), 'response')}")
        runner, tokenizer = self.runner(role), self.tokenizer(role)
        pairs = []
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            prompt_ids = self.encode(prompt, role, f"prompt {index}")
            label = f"response {index}"
            try:
                ids = tokenizer.encode(response, special=False) if isinstance(response, str) else response
            except InputError as error:
                raise InputError(f"{label}: {error}") from None
            ids = check_ids_below(ids, self.vocab_size(role), role, label)
            if not ids:
                raise InputError(f"{label} is empty")
            check_positions(len(prompt_ids) + len(ids) - 1, runner, f"prompt {index} with its response")
            pairs.append((prompt_ids, ids))
        return pairs

    def response_limit(self, prompt: PromptIds, max_tokens: int, roles: Sequence[Role]) -> int:
        """Return the maximum number of tokens in a response: max_tokens, or the positions that the models have free."""
        num_used = {"teacher": len(prompt.teacher), "student": len(prompt.student)}
        free = [self.positions(role) - num_used[role] for role in roles]
        return min(max_tokens, *free)

    def search_limit(self, prompt: EncodedPrompt, max_tokens: int, criterion: AnyCriterion) -> int:
        """Return the maximum number of tokens in a response that the search writes and the criterion can judge.

        Where the criterion reads the reference answer, the student has positions left for it; the result is less than 1
        where that leaves none for the response.
        """
        limit = self.response_limit(prompt.ids, max_tokens, ["teacher", "student"])
        if not needs_answer(criterion):
            return limit
        num_answer = len(self.tokenizers["student"].encode_plain(prompt.ids.answer or "")) + ANSWER_ROOM
        return min(limit, self.positions("student") - len(prompt.ids.student) - num_answer)

    def local_logprob(
        self, role: Role, prompt_ids: Sequence[int], ids: Sequence[int], windows: Sequence[Window]
    ) -> list[Tensor]:
        """Score windows of a response (see windows.py) and count the tokens that this computes."""
        logprobs = local_logprob(self.runners[role], prompt_ids, ids, windows)
        # the last token of a window is predicted, not read
        self.usage.window_tokens += len(prompt_ids) + sum(end - context - 1 for context, _, end in windows)
        return logprobs

    def mean_activations(
        self, role: Role, prompt_ids: Sequence[int], ids: Sequence[int], start: int
    ) -> ActivationMeans:
        """Read a response (see activations.py) and count the tokens that this computes."""
        special_ids = frozenset(self.tokenizers[role].hf.all_special_ids)
        means = mean_activations(self.runners[role], prompt_ids, ids, start, special_ids)
        self.usage.window_tokens += len(prompt_ids) + len(ids)
        return means

    def hidden_states(self, role: Role, prompt_ids: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Read a response (see hidden_states.py) and count the tokens that this computes."""
        states = read_states(self.runners[role], prompt_ids, ids)
        self.usage.prefill_tokens += len(prompt_ids) + len(ids) - 1
        return states
