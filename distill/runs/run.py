"""One run of one command over its output directory: begun, resumed or refused by the same rules everywhere.

    with Run.open(config, "score", journal="features.jsonl") as run:
        for row in run.done(): ...        what an earlier part of the run has finished
        run.journal.append(row)           what this part finishes, on disk at once
        run.write_summary(...)

OUTPUT_DIR/run.json       the config, the settings that decide the result, the date in chat templates, versions, the
                          number of threads; on a GPU: kernel configurations
OUTPUT_DIR/JOURNAL        one line per finished piece of work
OUTPUT_DIR/bad_rows.txt   input that could not be used, by file and line
OUTPUT_DIR/summary.json   counts and results of the finished run

The directory belongs to one process at a time and to one command for good. A run is resumed only with the settings
that it was begun with (see settings.py).
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from genssd.distill.runs.chat_settings import ChatSettings, choose_date
from genssd.distill.runs.directory import RECORD, claim_directory, require_resume
from genssd.distill.runs.effects import check_effects
from genssd.distill.runs.journal import Journal, complete_rows, has_lines, write_json
from genssd.distill.runs.output_files import check_outputs_unread, remove_outputs
from genssd.distill.runs.record import PACKAGES, read_record
from genssd.distill.runs.settings import check_same_settings, settings_of
from genssd.distill.runs.stopped import describe_stopped
from genssd.distill.runs.writing import keep_spans, remove_leftovers, write_text
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.host.threads import ThreadChoice
from genssd.engine.setup.model_facts import ModelFacts
from genssd.engine.texts.chat_options import ChatOptions

Fingerprints = Mapping[str, str] | Mapping[Role, str]
"""Fingerprints of models that are loaded already, by the name of the config's field."""
M = TypeVar("M", bound=ModelFacts)
"""The models of a run: an engine, or those of other processes."""


class RunConfig(Protocol):
    """A config dataclass with the directory that the run writes to; `resume: bool` where the command can resume."""

    @property
    def output_dir(self) -> str: ...


class Run:
    """The output directory while one command works in it. Build with `Run.open`."""

    def __init__(self, config: RunConfig, command: str, journal: str | None, stack: ExitStack) -> None:
        self.output_dir = Path(config.output_dir)
        self.resumed = False
        """Whether an earlier part of the run has finished some of its work."""
        self._config = config
        self._command = command
        self._journal_path = None if journal is None else self.output_dir / journal
        self._journal: Journal | None = None
        self._stack = stack
        self._record: dict[str, Any] = {}
        self._begun: dict[str, Any] = {}
        self._chat_options: ChatOptions | None = None
        self._is_recorded = False
        self._ends: list[int] | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        config: RunConfig,
        command: str,
        *,
        journal: str | None = None,
        fingerprints: Fingerprints | None = None,
        parts: str | None = None,
        free: Collection[str] = (),
        chosen: Collection[str] = (),
    ) -> Iterator[Run]:
        """Hold the output directory while the block runs, and begin or resume the run in it (see `record`).

        journal: name of the file with one line per finished piece of work. The other arguments are those of `begin`.
        Raises InputError when the directory cannot be written, belongs to another command or process, holds finished
        work that is not to be resumed, or was begun with other settings.
        """
        with cls.claim(config, command, journal=journal) as run:
            run.begin(fingerprints=fingerprints, parts=parts, free=free, chosen=chosen)
            yield run

    @classmethod
    @contextmanager
    def claim(cls, config: RunConfig, command: str, *, journal: str | None = None) -> Iterator[Run]:
        """Hold the output directory while the block runs. The caller decides when the run begins: see `begin`.

        Raises InputError when a setting of the config has no effect, when overwrite would remove what the run reads,
        and when the directory cannot be written, or belongs to another command or process.
        """
        check_effects(config)
        if getattr(config, "overwrite", False) and getattr(config, "resume", False):
            raise InputError("resume goes on with a run, and overwrite removes it: give one of them")
        if getattr(config, "overwrite", False):
            check_outputs_unread(config, command)
        with ExitStack() as stack:
            stack.enter_context(claim_directory(Path(config.output_dir), command))
            run = cls(config, command, journal, stack)
            try:
                yield run
            except KeyboardInterrupt as error:  # a signal: the command line prints the notes
                error.add_note(run.describe())
                raise

    def begin(
        self,
        *,
        fingerprints: Fingerprints | None = None,
        parts: str | None = None,
        free: Collection[str] = (),
        chosen: Collection[str] = (),
    ) -> None:
        """Decide whether the run is begun or resumed, and refuse it where it may not be; write nothing yet.

        A run has begun when its journal has a row, or when a file matches the glob `parts`. fingerprints: those of
        models that are loaded already. free: fields of the config that may still change, although they count for the
        result. chosen: settings that the run chooses where the config has None (see `choose`). Raises
        InputError as `open` does, and on a journal with a damaged line.
        """
        if getattr(self._config, "overwrite", False) and self.path(RECORD).exists():
            remove_outputs(self.output_dir, self._command)
        has_rows = self._journal_path is not None and has_lines(self._journal_path)
        self.resumed = has_rows or (parts is not None and any(self.output_dir.glob(parts)))
        if self.resumed:
            require_resume(self._config, self.journal_path if has_rows else self.output_dir)
        if has_rows:
            self._row_ends()  # a damaged line is refused before anything is loaded
        self._record = {
            "command": self._command,
            "config": json.loads(json.dumps(dataclasses.asdict(self._config))),  # type: ignore[call-overload]
            "settings": settings_of(self._config, fingerprints),
            "versions": {name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
        }
        date = choose_date(self._config)
        if self.resumed:
            begun = self._begun = read_record(self.path("run.json"))
            for name in chosen:
                if self._record["settings"][name] is None:
                    self._record["settings"][name] = begun["settings"].get(name)
            self._check_settings(begun, self._record["settings"], free)
            self._record |= {"versions": begun["versions"], "python": begun["python"]}
            date = choose_date(self._config, begun.get("template_date"))
            self._record |= {"launches": begun["launches"]} if "launches" in begun else {}
        if isinstance(self._config, ChatSettings) and date is not None:
            self._record["template_date"] = date
            self._chat_options = self._config.make_chat_options(date)

    def use(self, models: M) -> M:
        """Record the models' number of threads, the server of the teacher and, on a GPU, their kernel configurations.

        Returns the models.
        The results depend on the configurations, and not on the number of threads. Raises InputError where an earlier
        part of the run took others for the same models.
        """
        self._record["threads"] = models.threads
        if models.server is not None:
            self._record["server"] = {
                name: getattr(models.server, name) for name in ("url", "model", "root", "positions", "tokenizer")
            }
        if models.launches is None:
            self._write_record()
            return models
        further = [one.fingerprints["teacher"] for one in models.teachers[1:]]
        names = "+".join([*models.fingerprints.values(), *further])
        now = dataclasses.asdict(models.launches)
        begun = self._record.get("launches", {}).get(names, now)
        if begun["digest"] != now["digest"]:
            raise InputError(
                f"{self.output_dir} was begun with other kernel configurations ({begun['source']}, deterministic="
                f"{begun['deterministic']}) than are used now ({now['source']}, deterministic={now['deterministic']}); "
                "resume on such a GPU with the same tune file and deterministic, or choose another output_dir"
            )
        self._record.setdefault("launches", {})[names] = begun
        self._write_record()
        return models

    def fix_threads(self, choice: ThreadChoice) -> ThreadChoice:
        """Return the number of threads on which this run's results depend, and record it.

        That of an earlier part of the run comes before `choice`.
        """
        begun = self._begun.get("threads")
        if isinstance(begun, int) and begun > 0:
            choice = ThreadChoice(count=begun, reason="as this run was begun")
        self._record["threads"] = choice.count
        self._write_record()
        return choice

    def chosen(self, name: str) -> Any:
        """Return the value of a setting that an earlier part of the run chose; None where this part chooses it."""
        return self._begun["settings"].get(name) if self.resumed else None

    def choose(self, name: str, value: Any) -> None:
        """Record the value of a setting that the config leaves to the run, so that a resumed run keeps it."""
        self._record["settings"][name] = value
        self._write_record()

    def _write_record(self) -> None:
        """Write run.json again, if it has been written."""
        if self._is_recorded:
            write_json(self.path("run.json"), self._record)

    def record(self) -> None:
        """Write run.json, remove the summary and the temporary files of an earlier part, and cut a torn last line off
        the journal.

        The first use of `journal`, `write_bad_rows` or `write_summary` does this. A command that writes anything else
        before calls it itself, when all that it can refuse has been checked: until then a run that is refused leaves
        the record of an earlier part as it was, and a directory without one to other commands.
        """
        if self._is_recorded:
            return
        write_json(self.path("run.json"), self._record)
        self._is_recorded = True
        remove_leftovers(self.output_dir)
        self.path("summary.json").unlink(missing_ok=True)
        if self._journal_path is not None:
            self.keep(len(self._row_ends()) - 1)

    @property
    def template_date(self) -> str:
        """Date that chat templates print in this run, also when it is resumed on another day."""
        return str(self._record["template_date"])

    @property
    def chat_options(self) -> ChatOptions:
        """Options of the rendering of chats in this run."""
        assert self._chat_options is not None, f"{self._command} renders no chats"
        return self._chat_options

    @property
    def journal_path(self) -> Path:
        """The file of the journal."""
        assert self._journal_path is not None, f"{self._command} has no journal"
        return self._journal_path

    @property
    def journal(self) -> Journal:
        """The journal, open for appending after the rows that are kept."""
        if self._journal is None:
            self.record()
            self._journal = self._stack.enter_context(Journal(self.journal_path))
        return self._journal

    def path(self, name: str) -> Path:
        """Return the path of a file of the output directory."""
        return self.output_dir / name

    def done(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the journal in order, without a torn last line."""
        ends = [0]
        for row, end in complete_rows(self.journal_path):
            ends.append(end)
            yield row
        self._ends = ends

    def keep(self, count: int) -> None:
        """Cut the journal to its first `count` rows; what they leave out is done again."""
        self.keep_rows(range(count))

    def keep_rows(self, numbers: Iterable[int]) -> None:
        """Keep only some rows of the journal, by their numbers from 0; what the others hold is done again."""
        assert self._journal is None, "the journal is open already"
        ends = self._row_ends()
        keep_spans(self.journal_path, [(ends[number], ends[number + 1]) for number in numbers])
        self._ends = None

    def sort_rows(self, key: Callable[[Mapping[str, Any]], int]) -> None:
        """Put the rows of the journal into the order of a number of each. Nothing is appended to it afterwards."""
        self._journal = None
        order = sorted((key(row), number) for number, row in enumerate(self.done()))
        self.keep_rows(number for _, number in order)

    def describe(self) -> str:
        """Return what the output directory holds of this run now, and how the run goes on, for whoever stopped it."""
        can_resume = hasattr(self._config, "resume")
        return describe_stopped(self.output_dir, self._command, self._journal_path, can_resume=can_resume)

    def write_bad_rows(self, messages: Sequence[str]) -> None:
        """Write bad_rows.txt: a line for every row of the input that could not be used."""
        self.record()
        write_text(self.path("bad_rows.txt"), "".join(f"{message}\n" for message in messages))

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json."""
        self.record()
        write_json(self.path("summary.json"), values)

    def _check_settings(self, begun: Mapping[str, Any], settings: Mapping[str, Any], free: Collection[str]) -> None:
        def fixed(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if name.split(".")[0] not in free}

        check_same_settings(fixed(begun["settings"]), fixed(settings), f"{self.output_dir} was begun")

    def _row_ends(self) -> list[int]:
        """Return the offsets at which the rows of the journal end, with 0 in front."""
        if self._ends is None:
            for _ in self.done():
                pass
        assert self._ends is not None
        return self._ends
