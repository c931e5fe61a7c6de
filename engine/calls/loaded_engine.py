"""The models and caches of an engine: how they are loaded, and what can be asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from genssd.engine.calls.nodes import NodeReader
from genssd.engine.checkpoints.checkpoint import fingerprint
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Backend, Role
from genssd.engine.common.options_check import check_arguments
from genssd.engine.common.usage import CacheUse, Usage
from genssd.engine.host.threads import effective_threads
from genssd.engine.models.launches import LaunchRecord, describe_launches
from genssd.engine.readers.pair_prompts import PairPrompt
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.thinking_pair import ThinkingPair, compare_thinking
from genssd.engine.served.options import ServerOptions
from genssd.engine.served.record import ServerRecord
from genssd.engine.setup.loading import load_models
from genssd.engine.setup.memory import choose_device
from genssd.engine.setup.requests import check_ids, check_positions, check_sizes
from genssd.engine.setup.resources import Resources
from genssd.engine.setup.team_loading import check_teachers, list_names, load_team
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Prompt, Tokenizer
from genssd.kernels.threads import torch_threads


class LoadedEngine:
    """A teacher, a student or both, with their caches and tokenizers. The searches are methods of `Engine`."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def __repr__(self) -> str:
        urls = [f"teacher={one.served.url}" for one in self._resources.list_teachers() if one.served is not None]
        runners = self._resources.list_runners()
        models = [*urls, *(f"{runner.role}={runner.directory}" for runner in runners)]
        if not runners:
            return f"<Engine {', '.join(models)}>"
        decoder = runners[0].decoder
        held, total = self.pages_in_use
        dtype = str(decoder.dtype).removeprefix("torch.")
        return (
            f"<Engine {', '.join(models)}: {dtype} on {decoder.device}, {held} of {format_count(total, 'page')} in use>"
        )

    @classmethod
    @check_arguments()
    def from_pretrained(
        cls,
        teacher: str | Path | Sequence[str | Path] | None = None,
        student: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        memory_utilization: float = 0.9,
        memory_bytes: int | None = None,
        max_num_seqs: int | None = None,
        deterministic: bool = True,
        threads: int | None = None,
        backend: Backend = "auto",
        teacher_tokenizer: str | Path | None = None,
        server: ServerOptions = ServerOptions(),
        student_stream: bool = False,
    ) -> Self:
        """Load one or both models and return an engine over them.

        teacher, student: hub id or local directory; with one of them only `generate`, `score` and `branch` of that
        model work. device: None takes CUDA where a device is found, else the CPU. dtype: "auto" is the checkpoint's
        own, float32 on a CPU that has no bf16 arithmetic. memory_utilization: the fraction of the memory free after
        loading that the two caches get together; memory_bytes sets that budget in bytes instead. max_num_seqs: maximum
        number of candidates decoded at once; None for 256, or, on a CPU, as few as keep the rate (batching.py).
        deterministic: on a GPU, a token's bits do not depend on how many are scored or drawn with it; False takes the
        fastest kernels for every number of tokens (docs/tuning.md). threads: number of CPU threads, on which no result
        depends; None: torch's number, at most the cores that are given. backend: "genssd" is the engine's own decoder,
        "transformers" transformers' class, which is slower; "auto" takes the own decoder where it knows the model_type.
        A student with another tokenizer than the teacher's reads the bytes of its text (byte_reader.py).
        A teacher may also be the URL of a server with OpenAI's API, such as "http://host:8000/v1" of vLLM or SGLang: it
        writes, and what reads its hidden states raises InputError. teacher_tokenizer: hub id or directory of its
        tokenizer; None takes that of the served model where it is at hand, else the student's. server: how it is asked.
        student_stream: on a GPU, the student scores candidates on a CUDA stream of its own while the teacher goes on
        writing, to the same results; it takes more memory, as both compute at once. Not measured on a GPU yet, so it is
        off by default.
        A list of teachers compete in the search: each writes candidates, and the student scores all (team.py). At most
        one of them may be a URL.
        Raises CheckpointError on an unusable directory, InputError on a tokenizer that does not spell bytes or a
        student_stream without a student that the own decoder computes on a GPU, CapacityError without room,
        ServerError on a server that is not there or cannot be used.
        """
        if teacher is None and student is None:
            raise InputError("from_pretrained needs a teacher, a student or both")
        check_sizes(memory_utilization, max_num_seqs)
        names = list_names(teacher)
        if teacher is not None:
            check_teachers(names, student)
        options: dict[str, Any] = {
            "dtype": dtype, "device": choose_device(device), "deterministic": deterministic, "backend": backend,
            "teacher_tokenizer": teacher_tokenizer, "server": server,
        }  # fmt: skip
        with torch_threads(effective_threads(threads)):
            if student is not None and len(names) > 1:
                models = load_team(names, student, **options)
            else:
                models = load_models(next(iter(names), None), student, **options)
        sizes = (memory_bytes, memory_utilization, max_num_seqs)
        return cls(models.open_resources(*sizes, threads, student_stream=student_stream))

    @check_arguments()
    def with_chat(self, options: ChatOptions) -> Self:
        """Return this engine, its caches and counts shared, with other options of rendering chats.

        Raises InputError naming a variable of the options that a chat template does not read.
        """
        return type(self)(self._resources.with_chat(options))

    @property
    def usage(self) -> Usage:
        """Numbers of tokens that the engine has processed so far."""
        return self._resources.usage

    @property
    def pages_in_use(self) -> tuple[int, int]:
        """Number of held pages and of all pages, over both caches."""
        use = self._collect()
        return use.held_pages, use.pages

    @property
    def bytes_in_use(self) -> tuple[int, int]:
        """Number of bytes of the held pages and of all pages, over both caches."""
        use = self._collect()
        return use.held_bytes, use.bytes

    @property
    def cache_use(self) -> CacheUse:
        """Pages and bytes of both caches, read by any thread while the engine works.

        Pages of branches that nobody holds any more count as held until the engine works again.
        """
        return self._resources.cache_use

    def _collect(self) -> CacheUse:
        """Free the pages of branches that nobody holds any more; return what is in use then."""
        for runner in self._resources.list_runners():
            runner.tree.free_abandoned()
        return self._resources.cache_use

    @property
    def threads(self) -> int:
        """Number of CPU threads that compute."""
        runner = next(iter(self._resources.list_runners()), None)
        return effective_threads(None if runner is None else runner.threads)

    @cached_property
    def fingerprints(self) -> dict[Role, str]:
        """Identification of each loaded checkpoint: 16 hex digits; of a served teacher with its name in front.

        Of several teachers, the first one; `teachers` has those of the others.
        """
        loaded = {role: fingerprint(runner.directory) for role, runner in self._resources.runners.items()}
        served = self._resources.served
        return loaded if served is None else {**loaded, "teacher": served.fingerprint}

    @property
    def server(self) -> ServerRecord | None:
        """The server that runs the teacher, or one of several, and what it has done; None where no server does."""
        served = [one.served for one in self._resources.list_teachers() if one.served is not None]
        return served[0].record if served else None

    @property
    def teachers(self) -> tuple[Self, ...]:
        """An engine over each of the teachers and the student; they share caches and counts with this one.

        The methods of an engine with several teachers, other than the search, use the first one.
        """
        # not kept where it is this engine: a reference to itself would keep its caches until the collector runs
        return self._team or (self,)

    @cached_property
    def _team(self) -> tuple[Self, ...]:
        """An engine over each of several teachers and the student; empty for one teacher."""
        each = self._resources.list_teachers()
        return tuple(type(self)(replace(one, others=())) for one in each) if len(each) > 1 else ()

    @cached_property
    def launches(self) -> LaunchRecord | None:
        """Configurations of the GPU kernels that the engine takes, and where they come from; None on a CPU."""
        decoders = [runner.decoder for runner in self._resources.list_runners()]
        return describe_launches(decoders) if decoders else None

    @check_arguments()
    def positions(self, model: Role) -> int:
        """Return the number of positions of a model: the maximum number of tokens that it can read after each other."""
        return self._resources.positions(model)

    @check_arguments()
    def vocabulary(self, model: Role) -> int:
        """Return the number of token ids that a model's head has. Raises InputError when it is not loaded."""
        return self._resources.vocab_size(model)

    @check_arguments()
    def max_sequence_length(self, model: Role) -> int:
        """Return the maximum number of tokens in prompt and response: a model's positions, or what its cache holds."""
        if self._resources.served_as(model) is not None:
            return self._resources.positions(model)
        return self._resources.runner(model).max_sequence_length

    @property
    def reader(self) -> Reader:
        """How the student reads the teacher's tokens: by ids, or with another tokenizer by the bytes of the text."""
        return self._resources.reader

    @check_arguments()
    def tokenizer(self, model: Role) -> Tokenizer:
        """Return the tokenizer of a loaded model. Raises InputError when the engine was made without the model."""
        return self._resources.tokenizer(model)

    @check_arguments(but=("prompt",))
    def encode_pair(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt as the search gives it to teacher and student. Raises InputError where one cannot read it."""
        return self._resources.pairs.encode(prompt)

    @property
    def thinking(self) -> ThinkingPair:
        """What the chat templates of the two models do about thoughts. Raises InputError when one is not loaded, and on
        a template that cannot be parsed."""
        return compare_thinking(self._resources.pairs)

    @check_arguments()
    def node_reader(self, model: Role = "student") -> NodeReader:
        """Return a reader of one model's predictions at single positions of given responses."""
        return NodeReader(self._resources.runner(model), self.tokenizer(model).largest_id + 1, self.usage)

    @check_arguments(but=("prompt", "response"))
    def hidden_states(self, prompt: Prompt, response: Sequence[int], *, model: Role = "teacher") -> Tensor:
        """Return the hidden states of a model that predict the tokens of a response, [tokens, width], in its dtype.

        They are what the model's head multiplies: those after the last norm, over the divisor of the logits, if it has
        one. response: token ids. Raises InputError on an empty response, on one that is longer than the model's
        positions, and on a served model; CapacityError on more than the cache holds, NumericsError on NaN or infinite
        values.
        """
        runner = self._resources.runner(model)
        prompt_ids = self._resources.encode(prompt, model, "the prompt")
        ids = check_ids(response, runner, "the response")
        if not ids:
            raise InputError("the response is empty")
        check_positions(len(prompt_ids) + len(ids) - 1, runner, "the prompt with its response")
        return self._resources.hidden_states(model, prompt_ids, ids)
