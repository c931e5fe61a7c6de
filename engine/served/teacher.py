"""A teacher that a server runs: what it is, how it is asked, and whether it answers what the search needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from genssd.engine.checkpoints.address import parse_url
from genssd.engine.checkpoints.config import load_config
from genssd.engine.checkpoints.model_names import find_directory
from genssd.engine.common.errors import CheckpointError, InputError, ServerError
from genssd.engine.common.quoting import one_line, quote
from genssd.engine.models.sampling import Sampling
from genssd.engine.served.client import Client, RequestRefused, ServedModel
from genssd.engine.served.connections import Call, TransportFault
from genssd.engine.served.options import ServerOptions
from genssd.engine.served.record import ServerRecord
from genssd.engine.served.replies import BadReply, TextInDoubt, Written, is_whole, read_reply
from genssd.engine.served.workers import Workers
from genssd.engine.texts.text import PROBE, Tokenizer
from genssd.engine.texts.text_stream import REPLACEMENT

logger = logging.getLogger(__name__)

TOKENIZER_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files of a hub repository that a tokenizer and its chat template need; the weights stay where they are."""
PROBE_TOKENS = 16
PROBE_TEMPERATURE = 2.0
"""Temperature at which two completions of PROBE_TOKENS tokens are the same only where both have the same noise."""
TOLERANCE = 0.02
"""Largest difference between the log-probabilities of one token in two requests, in nats: servers batch anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """A request for completions of one prompt."""

    prompt_ids: Sequence[int]
    n: int
    max_tokens: int
    sampling: Sampling
    seed: int
    num_topk: int = 0
    """Number of the most likely tokens that are returned with each token."""
    stop: tuple[str, ...] = ()
    """Texts after each of which the server may end; without one, only the end of a response ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTeacher:
    """The model of a server, with the tokenizer that renders prompts for it."""

    client: Client
    model: ServedModel
    tokenizer: Tokenizer
    workers: Workers
    has_seeds: bool = True
    """Whether the completions of one request with a seed have different noise."""
    positions: int = field(kw_only=True)
    """Maximum number of tokens in prompt and response."""
    vocab_size: int
    """Number of token ids that its head has, by the config of the tokenizer's directory."""

    @staticmethod
    def connect(url: str, options: ServerOptions, tokenizer: str | Path | None, student: Path | None) -> ServedTeacher:
        """Ask a server for its model, find the tokenizer, and try whether it answers what the search needs.

        tokenizer: hub id or directory; None takes that of the served model where it is at hand, else the student's.
        Raises InputError on a URL that cannot be used, ServerError on a server that cannot, CheckpointError on a
        tokenizer that cannot be loaded.
        """
        client = Client(parse_url(url), options)
        model = client.connect()
        directory = _find_tokenizer(url, model, tokenizer, student)
        config = load_config(directory)
        teacher = ServedTeacher(
            client=client,
            model=model,
            tokenizer=Tokenizer(directory),
            workers=Workers(options.in_flight),
            positions=model.positions or config.max_position_embeddings,
            vocab_size=config.vocab_size,
        )
        return replace(teacher, has_seeds=teacher._try())

    @property
    def url(self) -> str:
        """URL of the server, without a key."""
        return self.client.address.url

    @property
    def fingerprint(self) -> str:
        """Name of the model on the server, and 16 hex digits that change with its name, root or positions."""
        return self.model.fingerprint

    @property
    def record(self) -> ServerRecord:
        """What can be told about the server now."""
        return ServerRecord(
            url=self.url,
            model=self.model.name,
            root=self.model.root,
            positions=self.positions,
            tokenizer=str(self.tokenizer.directory),
            requests=self.client.num_requests,
            repeats=self.client.num_repeats,
        )

    def ask(self, request: Completions, call: Call) -> list[Written]:
        """Return the completions of a prompt. Waits for the server; call it in a thread of its own.

        Raises RequestRefused, BadReply, ServerError, Cancelled.
        """
        fields = self._make_fields(request)
        for _ in range(MAX_TORN):
            reply = self.client.post("/completions", fields, call)
            if is_whole(reply):
                return read_reply(
                    reply, request.n, self.tokenizer, vocab_size=self.vocab_size, num_topk=request.num_topk
                )
            self.client.num_repeats += 1
            call.wait(1.0)  # the server is being stopped
        raise RequestRefused(f"the server gave the completion up {MAX_TORN} times")

    def check_topk(self, num_topk: int) -> None:
        """Raise InputError where the server does not return so many most likely tokens."""
        request = self._probe(num_topk=num_topk)
        try:
            self.ask(request, Call())
        except (RequestRefused, BadReply) as error:
            raise InputError(
                f"teacher_topk={num_topk}: the server {self.url} does not return so many: {error}; vLLM returns 20 "
                "unless it is started with --max-logprobs"
            ) from None

    def _make_fields(self, request: Completions) -> dict[str, Any]:
        sampling = request.sampling
        is_greedy = sampling.temperature == 0.0
        # every option is sent: a server would take those that are missing from the model's generation_config.json
        fields: dict[str, Any] = {
            "model": self.model.name,
            "prompt": list(request.prompt_ids),
            "n": request.n,
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if is_greedy else sampling.top_p,
            "top_k": -1 if is_greedy else sampling.top_k or -1,
            "min_p": 0.0 if is_greedy else sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": request.num_topk,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": sorted(self.tokenizer.end_token_ids),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "stream": False,
        }
        if self.client.options.seeds:
            fields["seed"] = request.seed
        if request.stop:
            fields |= {"stop": list(request.stop), "include_stop_str_in_output": True, "no_stop_trim": True}
        return fields

    def _probe(self, **changes: Any) -> Completions:
        """Return a request for one token after a text that every tokenizer knows."""
        request = Completions(
            prompt_ids=self.tokenizer.encode_raw(PROBE), n=1, max_tokens=1, sampling=Sampling(), seed=1
        )
        return replace(request, **changes)

    def _try(self) -> bool:
        """Return `has_seeds`. Raises ServerError on a server whose answers cannot be used.

        Two requests show whether ids are read and returned, whether the tokenizer is the served model's, and whether
        log-probabilities are those at temperature 1 before any filter.
        """
        hot = Sampling(temperature=PROBE_TEMPERATURE)
        try:
            pair = self._try_pair(self._probe(n=2, max_tokens=PROBE_TOKENS, sampling=hot))
            (greedy,) = self.ask(self._probe(sampling=Sampling(temperature=0.0)), Call())
            (drawn,) = self.ask(self._probe(sampling=replace(hot, top_k=1)), Call())
        except (RequestRefused, BadReply, TransportFault) as error:
            raise ServerError(f"the server {self.url} cannot be the teacher: {error}") from None
        for completion in pair:
            self._check_text(completion)
        is_same = greedy.tokens[0] == drawn.tokens[0]  # else two tokens are equally likely, and nothing is shown
        if is_same and abs(greedy.logprobs[0] - drawn.logprobs[0]) > TOLERANCE:
            raise ServerError(
                f"the server {self.url} gives log-probabilities after temperature and filters, and those of the model "
                "are needed: start vLLM with --logprobs-mode raw_logprobs, SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1"
            )
        if any(completion.is_from_text for completion in (*pair, greedy, drawn)):
            logger.warning(
                "the server %s returns no token ids: they are read from the text, and a prompt whose tokens are in "
                "doubt fails",
                self.url,
            )
        return len(pair) == 2 and pair[0].tokens != pair[1].tokens

    def _check_text(self, completion: Written) -> None:
        """Raise ServerError where the ids of a completion have another text for the tokenizer than for the server."""
        hf = self.tokenizer.hf
        here, there = (
            "".join(text.replace(REPLACEMENT, "").split())
            for text in (str(hf.decode(completion.tokens)), completion.text)
        )
        # the server leaves out the end of a response, and the bytes of a character that is not complete
        if not here.startswith(there) and not there.startswith(here):
            raise ServerError(
                f"the tokenizer {self.tokenizer.directory} is not that of {self.model.name}, served at {self.url}: it "
                f"reads {quote(here)} where the server wrote {quote(there)}; give teacher_tokenizer"
            )

    def _try_pair(self, request: Completions) -> list[Written]:
        """Return two completions; none where they came as text that leaves their tokens in doubt, as unlikely ones do.

        Raises as `ask` does.
        """
        try:
            return self.ask(request, Call())
        except TextInDoubt:
            return []


MAX_TORN = 20
"""Number of times that a server may give a completion up before its end."""


def describe_served(teacher: ServedTeacher) -> str:
    """Return the served model and its tokenizer, for the log."""
    return f"the teacher {teacher.model} is served at {teacher.url}; its tokenizer is {teacher.tokenizer.directory}"


def locate_tokenizer(name: str | Path) -> Path:
    """Return a directory with a tokenizer and a config.json, from a directory or a hub id; weights are not fetched.

    Raises CheckpointError when neither exists.
    """
    directory = find_directory(name)
    if directory is not None:
        return directory
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(TOKENIZER_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is no local directory and cannot be had from the hub: {one_line(error)}"
        ) from None


def find_served_tokenizer(url: str, options: ServerOptions, tokenizer: str | Path | None, student: Path | None) -> Path:
    """Return the directory of the tokenizer that `ServedTeacher.connect` takes; of the server only its model is asked.

    Raises the errors of `ServedTeacher.connect` as far as they come before any request for completions.
    """
    return _find_tokenizer(url, Client(parse_url(url), options).connect(), tokenizer, student)


def _find_tokenizer(url: str, model: ServedModel, name: str | Path | None, student: Path | None) -> Path:
    """Return the directory of the teacher's tokenizer."""
    if name is not None:
        return locate_tokenizer(name)
    for origin in dict.fromkeys(filter(None, (model.root, model.name))):
        try:
            return locate_tokenizer(origin)
        except CheckpointError:
            continue
    if student is None:
        raise InputError(
            f"the tokenizer of {quote(model.name)}, served at {url}, is not at hand: give teacher_tokenizer, a hub id "
            "or a directory with tokenizer and config.json"
        )
    logger.warning(
        "the tokenizer of %s is not at hand: the student's is taken; give teacher_tokenizer where it is another one",
        quote(model.name),
    )
    return student
