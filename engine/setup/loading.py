"""Loading of models: from hub ids or directories to runners whose caches share one budget."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from genssd.engine.cache.page_list import PageList
from genssd.engine.checkpoints.address import is_url
from genssd.engine.checkpoints.basic_config import is_supported
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.config import ModelConfig, load_config
from genssd.engine.checkpoints.config_files import read_config
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Backend, Role
from genssd.engine.common.usage import Usage
from genssd.engine.decoding.batching import choose_max_num_seqs
from genssd.engine.host.threads import effective_threads
from genssd.engine.models.language_model import LanguageModel
from genssd.engine.models.launches import describe_launches
from genssd.engine.models.model import Decoder
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool, bytes_of_page, page_size_of, pages_within
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.side_stream import SideStream
from genssd.engine.models.transformers_model import TransformersModel
from genssd.engine.models.transformers_runner import TransformersRunner
from genssd.engine.readers.byte_reader import find_reader
from genssd.engine.readers.ends import check_ends, describe_foreign_ends, find_foreign_ends
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.token_map import TokenMap
from genssd.engine.served.options import ServerOptions
from genssd.engine.served.teacher import ServedTeacher, describe_served
from genssd.engine.setup.memory import (
    cache_budget,
    check_weights_fit,
    choose_dtype,
    count_working_bytes,
    describe_float32,
)
from genssd.engine.setup.requests import check_vocabulary
from genssd.engine.setup.resources import Resources
from genssd.engine.texts.text import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModels:
    """The models of one engine, by role, and how the student reads the teacher's tokens."""

    directories: dict[Role, Path]
    decoders: dict[Role, LanguageModel]
    tokenizers: dict[Role, Tokenizer]
    reader: Reader = field(default_factory=TokenMap)
    served: ServedTeacher | None = None
    """The teacher, where a server runs it: it has a tokenizer here and no decoder."""
    others: tuple[LoadedModels, ...] = ()
    """Further teachers, each with the same student (team_loading.py)."""
    team_readers: Mapping[tuple[int, int], Reader] = field(default_factory=dict)
    """How one of several teachers reads the tokens of another, by the indices of the writer and the reader."""

    @staticmethod
    def of_one(role: Role, decoder: LanguageModel, tokenizer: Tokenizer) -> LoadedModels:
        """Return one model that is in memory already."""
        return LoadedModels(
            directories={role: tokenizer.directory}, decoders={role: decoder}, tokenizers={role: tokenizer}
        )

    def open_resources(
        self,
        memory_bytes: int | None,
        free_fraction: float,
        max_num_seqs: int | None = None,
        threads: int | None = None,
        *,
        student_stream: bool = False,
    ) -> Resources:
        """Give every decoder a cache; all hold the same number of tokens.

        memory_bytes: size of all caches together; None takes a fraction of the free memory (`cache_budget`).
        max_num_seqs: maximum number of candidates decoded at once; None for the default (`choose_max_num_seqs`).
        threads: number of threads that compute; None for the default of `threads.effective_threads`. student_stream:
        whether the student scores on a CUDA stream of its own. Raises InputError where it cannot.
        """
        placed = self._list_decoders()
        decoders = [decoder for _, _, decoder in placed]
        if not decoders:
            return Resources(runners={}, tokenizers=self.tokenizers, max_num_seqs=1, served=self.served)
        device = decoders[0].device
        if max_num_seqs is None:
            weights = [decoder.weights_per_token for decoder in decoders]
            max_num_seqs = choose_max_num_seqs(weights, device, effective_threads(threads))
        working = max(_working_bytes(decoder, max_num_seqs) for decoder in decoders)
        budget = cache_budget(device, memory_bytes, free_fraction, working_bytes=working)
        usage = Usage()
        runners: dict[int, ModelRunner] = {}
        for (role, directory, decoder), (num_pages, page_bytes) in zip(
            placed, pages_within(budget, decoders), strict=True
        ):
            runner = open_runner(role, directory, decoder, num_pages, usage=usage, threads=threads)
            runner.tree.pool.page_bytes = page_bytes
            runners[id(decoder)] = runner
        if student_stream:
            give_side_stream(runners[id(decoder)] for role, _, decoder in placed if role == "student")
        first, *others = [
            Resources(
                runners={role: runners[id(decoder)] for role, decoder in models.decoders.items()},
                tokenizers=models.tokenizers,
                max_num_seqs=max_num_seqs,
                reader=models.reader,
                usage=usage,
                served=models.served,
            )
            for models in (self, *self.others)
        ]
        others = [replace(other, reservations=first.reservations) for other in others]
        return replace(first, others=tuple(others), team_readers=self.team_readers)

    def _list_decoders(self) -> list[tuple[Role, Path, LanguageModel]]:
        """Return the decoders of all models, the student's once, with their roles and directories."""
        return [
            (role, models.directories[role], decoder)
            for models in (self, *self.others)
            for role, decoder in models.decoders.items()
            if models is self or role == "teacher"
        ]


def load_models(
    teacher: str | Path | None,
    student: str | Path | None,
    dtype: str,
    device: torch.device,
    *,
    deterministic: bool,
    backend: Backend = "auto",
    teacher_tokenizer: str | Path | None = None,
    server: ServerOptions = ServerOptions(),
) -> LoadedModels:
    """Load models and tokenizers from hub ids or local directories; a teacher may be the URL of a server.

    teacher_tokenizer, server: how such a teacher is read and asked (`ServedTeacher.connect`).
    deterministic: whether kernels over the heads must give a row the same bits for every number of rows. backend: who
    computes the models. Logs how the student reads the teacher where their tokenizers differ. Raises CheckpointError on
    a directory that cannot be used, InputError on different tokenizers that do not spell bytes of text.
    """
    names: dict[Role, str | Path | None] = {"teacher": teacher, "student": student}
    url = teacher if isinstance(teacher, str) and is_url(teacher) else None
    directories = {role: locate(name) for role, name in names.items() if name is not None and name != url}
    for path in directories.values():
        load_config(path)  # what is no model's directory is refused as such, before its weights are looked for
    dtypes = {role: choose_dtype(path, dtype, device) for role, path in directories.items()}
    own = {role: has_own_decoder(path, backend) for role, path in directories.items()}
    check_weights_fit(directories, dtypes, device)
    served = None if url is None else ServedTeacher.connect(url, server, teacher_tokenizer, directories.get("student"))
    tokenizers = {role: Tokenizer(path) for role, path in directories.items()}
    if served is not None:
        logger.info("%s", describe_served(served))
        tokenizers["teacher"] = served.tokenizer
    decoders: dict[Role, LanguageModel] = {}
    for role, path in directories.items():
        if own[role]:
            decoders[role] = Decoder.load(path, dtypes[role], device, deterministic=deterministic)
        else:
            decoders[role] = TransformersModel.load(
                path, tokenizers[role], dtypes[role], device, deterministic=deterministic
            )
            logger.info(
                "the %s %s (model_type %s) runs in transformers, one sequence at a time: slower than the engine's own "
                "decoder",
                role,
                path,
                decoders[role].config.model_type,
            )
    for role, decoder in decoders.items():
        check_vocabulary(tokenizers[role], decoder)
        check_ends(tokenizers[role], decoder.config.vocab_size)
    reader: Reader = TokenMap()
    if len(tokenizers) == 2:
        reader = choose_reader(tokenizers["teacher"], tokenizers["student"], f"teacher {teacher}", f"student {student}")
    if dtype == "auto" and (line := describe_float32(dtypes, device)) is not None:
        logger.info("%s", line)
    if decoders and (launches := describe_launches(list(decoders.values()))) is not None:
        logger.info("kernel configurations: %s", launches.description)
    return LoadedModels(directories=directories, decoders=decoders, tokenizers=tokenizers, reader=reader, served=served)


def choose_reader(teacher: Tokenizer, student: Tokenizer, teacher_name: str, student_name: str) -> Reader:
    """Return how the student reads the teacher's tokens, and log where the tokenizers differ.

    By ids where they match but for added tokens, else by bytes. Raises InputError where neither is possible.
    """
    reader = find_reader(teacher, student, teacher_name, student_name)
    if not isinstance(reader, TokenMap):
        logger.info("%s", reader.describe())
        return reader
    foreign = find_foreign_ends(teacher, student, reader)
    if foreign:
        logger.warning("%s", describe_foreign_ends(foreign, teacher, student))
    if not reader.is_identity:
        logger.warning("%s", reader.describe())
    return reader


def has_own_decoder(directory: Path, backend: Backend) -> bool:
    """Return whether the own decoder computes a model. Raises CheckpointError where it is asked to and cannot."""
    if backend == "genssd":
        ModelConfig.load(directory)
    return backend == "genssd" or (backend == "auto" and is_supported(read_config(directory)))


def open_runner(
    role: Role,
    directory: Path,
    model: LanguageModel,
    num_pages: int,
    *,
    page_size: int | None = None,
    usage: Usage | None = None,
    threads: int | None = None,
) -> ModelRunner:
    """Give a model a cache of so many pages and return its runner.

    page_size: number of tokens in a page; None for the usual one. Raises CapacityError when the device has too little
    memory.
    """
    if isinstance(model, Decoder):
        return PagedRunner(
            role, directory, model, PagePool.for_model(model, num_pages, page_size), usage=usage, threads=threads
        )
    assert isinstance(model, TransformersModel)
    size = page_size or page_size_of(model)
    pages = PageList(num_pages, size, bytes_of_page(model, size), model.device)
    return TransformersRunner(role, directory, model, pages, usage=usage, threads=threads)


def give_side_stream(runners: Iterable[ModelRunner]) -> None:
    """Give the student a CUDA stream of its own. runners: the student's, or none where there is no student.

    Raises InputError where there is none, or where it cannot use one.
    """
    runner = next(iter(runners), None)
    if not isinstance(runner, PagedRunner) or runner.decoder.device.type != "cuda":
        raise InputError(
            "student_stream=True needs a student that the engine's own decoder computes on a CUDA device; leave it out"
        )
    runner.side = SideStream(runner.decoder.device)


def _working_bytes(model: LanguageModel, max_num_seqs: int) -> int:
    return count_working_bytes(model.values_per_token, model.dtype, model.head.weight.shape[0], max_num_seqs)
