"""Check of what options need of models, files and machine, which a command itself finds out after loading or later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from genssd.distill.data.problems import read_usable_problems
from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.model_files import ModelFiles
from genssd.distill.doctor.settings import Settings
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.runs.metrics import check_monitor
from genssd.distill.runs.model_sampling import find_sampling
from genssd.distill.runs.monitor_options import MonitorOptions
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.runs.pools import choose_engine_places
from genssd.distill.runs.sampling_options import ModelSampling
from genssd.distill.runs.teacher_options import TeacherOptions
from genssd.distill.select.config import Calibrate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.train.adapters import add_adapters
from genssd.distill.train.config import TrainConfig, TrainSettings
from genssd.distill.train.models import check_layout
from genssd.distill.train.resume import find_start
from genssd.distill.train.stored_states import check_states
from genssd.engine.common.errors import GenssdError, InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.models.transformers_loading import make_empty_model

Need = Callable[[], object]
"""A function that raises GenssdError where an option's need is not met."""


def check_options(inputs: Inputs) -> list[Finding]:
    """Find options that need what the models, the files or the machine do not have."""
    settings = inputs.settings
    if settings.config is None:
        return []
    for need in _list_needs(inputs):
        try:
            need()
        except GenssdError as error:
            return [Finding(name="options", level="error", line=str(error))]
    line = "models, files and machine have what they need"
    return [Finding(name="options", level="ok", line=line)]


def _list_needs(inputs: Inputs) -> Iterator[Need]:
    settings, config = inputs.settings, inputs.settings.config
    if isinstance(settings.engine, PoolOptions):
        models = dict(settings.models)
        student = models.pop("student", None)
        yield partial(
            choose_engine_places, settings.engine, None, [*models.values(), *settings.further_teachers], student, None
        )
    if isinstance(config, ModelSampling) and (not isinstance(config, EvaluateConfig) or config.samples):
        role: Role = "student" if isinstance(config, EvaluateConfig) else "teacher"
        yield partial(find_sampling, config, settings.models[role])
    if settings.search is not None:
        yield partial(_check_topk, inputs, settings.search.teacher_topk)
    if isinstance(settings.engine, TeacherOptions) and settings.engine.teacher_states:
        yield partial(_check_states, inputs)
    if settings.search is not None:
        yield partial(_check_calibration, settings.search.calibrate, settings)
    if isinstance(config, GenerateConfig) and config.has_two_writers:
        yield partial(_check_two_writers, inputs)
    if isinstance(config, TrainConfig):
        yield partial(find_start, config)
    if isinstance(config, MonitorOptions):
        yield partial(check_monitor, config.report_to)
    if settings.training is not None:
        yield partial(check_monitor, settings.training.report_to)
        if settings.training.kd_states and inputs.training_teacher is not None and inputs.rows.examples:
            yield partial(check_states, inputs.rows.examples, inputs.training_teacher.directory)
        for model in (inputs.student, None if settings.training.kd_states else inputs.training_teacher):
            if model is not None and model.has_weights:
                yield partial(_check_trained, model, settings.training, is_student=model is inputs.student)


def _check_topk(inputs: Inputs, teacher_topk: int) -> None:
    """Raise InputError where the teacher's top k cannot be kept as ids of the student, or a teacher has fewer."""
    for pair in inputs.pairs:
        if teacher_topk and not pair.is_identity and pair.known_reader is not None:
            raise InputError(f"teacher_topk needs models whose tokens are the same: {pair.known_reader.describe()}")
        if teacher_topk > (vocabulary := pair.teacher.config.vocab_size):
            raise InputError(f"teacher_topk must be in 0..{vocabulary}, not {teacher_topk}")


def _check_states(inputs: Inputs) -> None:
    """Raise InputError where the teacher's states cannot be kept at the tokens of the student."""
    for pair in inputs.pairs:
        if not pair.is_identity and pair.known_reader is not None:
            raise InputError(f"teacher_states needs models whose tokens are the same: {pair.known_reader.describe()}")


def _check_two_writers(inputs: Inputs) -> None:
    for pair in inputs.pairs:
        if not pair.is_identity and pair.known_reader is not None:
            raise InputError(f"two writers need models whose tokens are the same: {pair.known_reader.describe()}")


def _check_calibration(calibrate: Calibrate, settings: Settings) -> None:
    if calibrate.data is not None:
        read_usable_problems(calibrate.data, calibrate.limit, system_prompt=settings.chat.system_prompt)


def _check_trained(model: ModelFiles, training: TrainSettings, *, is_student: bool) -> None:
    """Raise GenssdError where a model of a training has not what the layout or the adapters need. Reads no weights."""
    implementation = training.attn_implementation if is_student else None
    empty = make_empty_model(model.directory, attn_implementation=implementation)
    check_layout(empty, training.layout)
    if is_student and training.use_peft:
        add_adapters(
            empty,
            r=training.lora_r,
            alpha=training.lora_alpha,
            dropout=training.lora_dropout,
            targets=training.lora_target_modules,
        )
