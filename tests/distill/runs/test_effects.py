"""Every field of every config has an effect, or is refused where another one turns it off."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.configs import MODELS, another, changed, config_of

from genssd.cli import main
from genssd.configs import CONFIGS
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.runs.effects import check_effects, list_fields
from genssd.distill.runs.field_kinds import fields_of
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError

CHAT = {"system_prompt", "chat_template_kwargs", "template_date", "special_tokens_in_text"}
PAIR_CHAT = CHAT | {"teacher_template_kwargs", "student_template_kwargs"}
ENGINE = {
    "threads",
    "device",
    "dtype",
    "memory_utilization",
    "memory_bytes",
    "max_num_seqs",
    "deterministic",
    "backend",
}
POOL = ENGINE | {"processes", "devices", "ray"}
CLUSTER = {"ray_actors", "ray_cpus"}
SAMPLING = {"sampling.temperature", "sampling.top_p", "sampling.top_k", "sampling.min_p"}
WRITING = SAMPLING | {"generation_config"}
SEARCH = WRITING | POOL | {"stop"} | {
    "candidates", "chunk.tokens", "chunk.until", "chunk.limit", "chunk.shortest", "criterion", "threshold",
    "max_tokens", "teacher_topk", "teacher_states", "loop_guard", "seed", "calibrate.data", "beam", "on_unlearnable",
    "selection_temperature", "prompt_budget.tokens", "prompt_budget.seconds", "total_budget.tokens",
    "total_budget.seconds",
}  # fmt: skip
TRAINING = {
    "teacher_model_name_or_path", "kd_ratio", "lmbda", "key_attention.weight", "statuses", "max_length", "layout",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_train_tokens",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "bf16", "gradient_checkpointing", "torch_compile", "attn_implementation", "use_peft", "fsdp",
    "eval_data", "report_to", "logging_steps", "save_steps", "device", "seed", "threads",
    "token_weights.entropy_of", "token_weights.half_life",
}  # fmt: skip
RUN = {"output_dir", "resume", "overwrite", "limit", "data"}
MONITORED = {"report_to", "logging_steps", "shard", "offset"}
ALWAYS = {
    "demo": {"output_dir", "prompts", "candidates", "train_tokens", "learning_rate", "batch_size", "eval_problems"}
    | {"post_hoc", "seed", "threads"},
    "select": SEARCH | PAIR_CHAT | RUN | MONITORED | {"teacher", "student", "peek"},
    "generate": POOL | PAIR_CHAT | WRITING | RUN | MONITORED
    | {"teacher", "student", "method", "n", "max_tokens", "stop", "teacher_states", "seed"},
    "score": POOL | PAIR_CHAT | RUN | {"student", "teacher", "criteria", "verify", "equal_length"}
    | {f"pick.{name}" for name in ("by", "keep", "correct", "finished", "loops", "min_steps", "max_steps")}
    | {f"pick.{name}" for name in ("threshold", "best_share", "mix", "weigh")},
    "reproduce": {"task", "arms", "seeds", "output_dir", "resume", "table", "model", "data", "problems", "threads"}
    | {"eval_problems", "candidates", "train_tokens", "learning_rate", "batch_size", "model_steps"},
    "reselect": ENGINE | {"run", "criterion", "student", "output_dir"},
    "export": {"run", "format", "student", "statuses", "require_correct", "output_dir"},
    "prefix": POOL | CHAT | WRITING | RUN | {"student", "judge", "judge_tokens", "max_tokens", "batch", "seed"},
    "leaf": CHAT | RUN | {"student", "teacher", "share", "max_length", "device", "threads", "devices", "processes"},
    "evaluate": POOL | CHAT | RUN | {"model", "samples", "max_tokens", "stop", "shard", "offset"},
    "diagnose": POOL | CHAT | WRITING | RUN
    | {"student", "teacher", "contexts", "rollouts", "nodes_per_window", "top_k", "teacher_top_k", "min_probability"}
    | {"completions", "budget", "max_tokens", "losses", "page_questions", "seed", "beta", "alpha"}
    | {"node_weights", "weights_loss"},
    "train": TRAINING | CHAT
    | {"model_name_or_path", "data", "output_dir", "require_correct", "resume_from_checkpoint", "writer"}
    | {"overwrite", "push_to_hub"},
    "distill": PAIR_CHAT | {f"train.{name}" for name in TRAINING} | {f"select.{name}" for name in SEARCH}
    | {"teacher", "student", "data", "output_dir", "resume", "overwrite", "rounds", "prompts_per_round", "restart"}
    | {"require_correct", "eval_data", "threads", "processes", "devices", "push_to_hub"},
    "report": ENGINE | {"run", "output", "criteria", "prompts", "student"},
    "tune": {"model_name_or_path", "teacher", "student", "dtype", "device", "tune_file", "seconds"},
    "doctor": {"teacher", "student", "data", "config", "run", "command", "rows", "verify", "json"},
    "env": set(),
}  # fmt: skip
"""Fields that have an effect where all others have their defaults."""

LOSS = {
    "kd_loss", "kd_states", "kd_standardize", "kd_topk", "kd_topk_of", "mask_special_tokens", "beta", "alpha",
    "temperature", "kd_tail", "kd_vocabulary", "adaptive_alpha",
    *(f"key_attention.{name}" for name in ("words", "max_words", "rows")),
    *(f"key_attention.{role}_temperature" for role in ("teacher", "student")),
}  # fmt: skip
OFF_IN_TRAINING = LOSS | {
    "token_weights.fraction",
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "eval_steps", "save_total_limit",
    "rollout.max_tokens", "rollout.memory_bytes", "rollout.train_on", *(f"rollout.{name}" for name in SAMPLING),
}  # fmt: skip
SERVED = {"teacher_tokenizer"} | {
    f"server.{name}" for name in ("model_name", "seeds", "in_flight", "timeout", "patience")
}
CALIBRATE = {"calibrate.share", "calibrate.limit"}
OFF_IN_SEARCH = (
    CALIBRATE | SERVED | CLUSTER | {"max_resamples", "min_chunk_tokens", "drop_teacher_after", "include_stop"}
)
METHODS = ("alternate", "relay")
OFF: dict[str, set[str]] = {
    "select": OFF_IN_SEARCH,
    "generate": SERVED | CLUSTER | {"include_stop"} | {f"rsd.{name}" for name in ("probability", "top", "tries")}
    | {f"{method}.student.{name.rpartition('.')[2]}" for name in SAMPLING for method in ("rsd", "alternate", "relay")}
    | {f"{method}.chunk.{name}" for name in ("tokens", "until", "limit", "shortest") for method in METHODS}
    | {f"alternate.{name}" for name in ("criterion", "student_candidates", "teacher_candidates")}
    | {f"relay.{name}" for name in ("error", "threshold", "window", "teacher", "takeovers")},
    "score": {"pick.similarity"} | CLUSTER,
    "prefix": CLUSTER,
    "doctor": {"verify_seconds"},
    "reproduce": {"controls"},
    "evaluate": WRITING | CLUSTER | {"seed", "include_stop"},
    "diagnose": {"context_readers"} | CLUSTER
    | {f"templates.{name}" for name in ("hint", "solution", "summary", "other")},
    "train": OFF_IN_TRAINING | {"allow_eval_overlap"},
    "distill": {f"train.{name}" for name in OFF_IN_TRAINING} | {f"select.{name}" for name in OFF_IN_SEARCH}
    | {"eval_limit", "allow_eval_overlap"},
}  # fmt: skip
"""Fields that something else has to turn on."""


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "data.jsonl")]


@pytest.mark.parametrize("command", CONFIGS)
def test_every_field_has_an_effect_or_is_refused(command: str, data: list[str]) -> None:
    config = config_of(command, data)
    check_effects(config)
    unmet = dict(list_fields(config))
    assert {name for name, need in unmet.items() if need is None} == ALWAYS[command]
    assert {name for name, need in unmet.items() if need is not None} == OFF.get(command, set())
    for setting in fields_of(config):
        for name in (n for n in unmet if n == setting.name or n.startswith(f"{setting.name}.")):
            if unmet[name] is None:
                continue
            other = changed(config, name, another(dict(values_of(config))[name]))
            with pytest.raises(InputError, match=rf"^{name}=.* has no effect: it needs "):
                check_effects(other)


def values_of(config: Any, prefix: str = "") -> Any:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from values_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


TRAIN = {"model_name_or_path": MODELS[1], "data": ("d",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd_loss": "jsd", "beta": 0.3}, r"kd_loss='jsd' has no effect: it needs a kd_ratio above 0"),
        ({"kd_ratio": 0.5, "beta": 0.3}, r"beta=0\.3 has no effect: it needs kd_loss jsd or distillm2"),
        ({"kd_ratio": 0.5, "kd_loss": "jsd", "beta": 0.3}, None),
        ({"kd_ratio": 0.5, "kd_loss": "jsd", "alpha": 0.3}, r"alpha=0\.3 has no effect: it needs kd_loss skew_"),
        ({"kd_ratio": 0.5, "kd_tail": "renormalize"}, None),
        (
            {"kd_ratio": 0.5, "kd_tail": "renormalize", "teacher_model_name_or_path": "t"},
            "kd_tail='renormalize' has no",
        ),
        ({"kd_ratio": 0.5, "kd_vocabulary": "drop"}, r"kd_vocabulary='drop' .* a teacher in memory"),
        ({"max_steps": 3, "num_train_epochs": 2.0}, r"num_train_epochs=2\.0 .* neither max_steps nor max_train_tokens"),
        ({"lora_r": 8}, "lora_r=8 has no effect: it needs use_peft"),
        ({"lora_r": 8, "use_peft": True}, None),
        ({"save_total_limit": None}, "save_total_limit=None has no effect: it needs save_steps"),
        ({"save_total_limit": 2}, None),
        ({"eval_steps": 2}, "eval_steps=2 has no effect: it needs eval_data"),
    ],
)
def test_options_of_a_training(changes: dict[str, Any], message: str | None) -> None:
    config = TrainConfig(**{**TRAIN, **changes})
    if message is None:
        check_effects(config)
        return
    with pytest.raises(InputError, match=message):
        run_train(config)


def test_a_value_of_a_file_counts_like_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: m\ndata: [d]\nbeta: 0.3\n")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", str(config)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "genssd: beta=0.3 has no effect: it needs kd_loss jsd or distillm2, and a kd_ratio above 0\n"
    )
    config.write_text("model_name_or_path: m\ndata: [d]\nbeta: 0.5\n")  # the default
    with pytest.raises(SystemExit):
        main(["train", "--config", str(config)])
    assert "m does not exist" in capsys.readouterr().err


def test_nested_options_are_named_in_full(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "q", "answer": "1"}\n')
    config = EvaluateConfig(model=MODELS[1], data=str(data), output_dir=str(tmp_path / "run"))
    greedy = changed(changed(config, "samples", 2), "sampling.temperature", 0.0)
    with pytest.raises(InputError, match=r"^sampling\.top_p=0\.9 has no effect: it needs a temperature above 0"):
        run_evaluate(changed(greedy, "sampling.top_p", 0.9))
    with pytest.raises(InputError, match=r"^seed=1 has no effect: it needs a number of samples above 0"):
        run_evaluate(changed(config, "seed", 1))
    assert not (tmp_path / "run").exists()
    chunk = changed(changed(config_of("select", [str(data)]), "chunk.until", None), "chunk.limit", 300)
    with pytest.raises(InputError, match=r"^chunk\.limit=300 has no effect: it needs a delimiter \(until\)"):
        check_effects(chunk)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_unlearnable": "resample", "max_resamples": 5}, None),
        ({"on_unlearnable": "shorten", "min_chunk_tokens": 5}, None),
        ({"on_unlearnable": "shorten", "max_resamples": 5}, "max_resamples=5 .* it needs on_unlearnable resample"),
        ({"on_unlearnable": "accept_best", "threshold": 3.0}, None),
        ({"on_unlearnable": "accept_best"}, "on_unlearnable='accept_best' .* it needs a threshold, calibrate.data or"),
        ({"on_unlearnable": "resample", "loop_guard": False}, "on_unlearnable='resample' .* it needs a threshold"),
        ({"candidates": 1, "selection_temperature": 1.0}, r"selection_temperature=1\.0 .* at least 2 candidates"),
    ],
)
def test_policies_of_a_search(changes: dict[str, Any], message: str | None, data: list[str]) -> None:
    config = dataclasses.replace(config_of("select", data), **changes)
    if message is None:
        check_effects(config)
        return
    with pytest.raises(InputError, match=message):
        check_effects(config)
