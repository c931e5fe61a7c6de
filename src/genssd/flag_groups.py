"""The order in which help texts and config files list the flags: what matters first, then by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from genssd.flag_list import Flag

MAIN: Mapping[str, tuple[str, ...]] = {
    "demo": ("output_dir", "prompts", "candidates", "post_hoc", "threads", "seed"),
    "select": ("teacher", "student", "data", "output_dir", "resume", "criterion", "candidates", "chunk.tokens",
               "max_tokens", "threshold"),
    "score": ("student", "data", "criteria", "output_dir", "resume", "teacher", "pick.by", "pick.keep", "pick.correct",
              "limit"),
    "reselect": ("run", "criterion", "output_dir", "student"),
    "export": ("run", "format", "output_dir", "student"),
    "generate": ("teacher", "data", "student", "output_dir", "resume", "n", "max_tokens", "sampling.temperature",
                 "method", "limit"),
    "prefix": ("student", "data", "output_dir", "resume", "judge", "max_tokens", "sampling.temperature", "limit"),
    "leaf": ("student", "teacher", "data", "output_dir", "resume", "share", "max_length", "limit"),
    "train": ("model_name_or_path", "data", "output_dir", "resume_from_checkpoint", "learning_rate",
              "num_train_epochs", "per_device_train_batch_size", "teacher_model_name_or_path", "kd_ratio", "kd_loss"),
    "evaluate": ("model", "data", "output_dir", "resume", "samples", "max_tokens", "sampling.temperature", "limit"),
    "distill": ("teacher", "student", "data", "output_dir", "resume", "rounds", "eval_data", "select.criterion",
                "select.candidates", "train.learning_rate"),
    "diagnose": ("student", "data", "teacher", "contexts", "output_dir", "resume", "rollouts", "completions",
                 "max_tokens", "limit"),
    "reproduce": ("task", "arms", "seeds", "output_dir", "resume", "table", "model", "data", "problems",
                  "train_tokens"),
    "report": ("run", "output", "criteria", "prompts", "student"),
    "tune": ("teacher", "student", "model_name_or_path", "seconds", "tune_file"),
    "doctor": ("teacher", "student", "data", "config", "run", "command", "verify", "json"),
    "env": (),
}  # fmt: skip
"""The flags of every command that matter most, at most ten; required ones stand before the others."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "models": ("teacher", "student", "model", "model_name_or_path", "teacher_model_name_or_path", "backend", "dtype",
               "teacher_tokenizer", "server"),
    "input": ("data", "run", "config", "command", "limit", "offset", "shard", "rows", "verify_seconds", "contexts",
              "context_readers", "templates", "eval_data", "eval_limit", "eval_steps", "allow_eval_overlap",
              "require_correct", "statuses", "writer", "max_length", "prompts_per_round", "problems", "eval_problems"),
    "search": ("criterion", "candidates", "chunk", "beam", "threshold", "calibrate", "on_unlearnable", "max_resamples",
               "min_chunk_tokens", "drop_teacher_after", "selection_temperature", "loop_guard", "prompt_budget",
               "total_budget", "teacher_topk", "teacher_states"),
    "responses": ("n", "method", "rsd", "alternate", "relay", "samples", "max_tokens", "stop", "include_stop",
                  "sampling", "generation_config", "seed"),
    "criteria": ("criteria", "pick", "equal_length", "verify", "judge", "judge_tokens", "share"),
    "diagnosis": ("rollouts", "nodes_per_window", "top_k", "teacher_top_k", "min_probability", "completions", "budget",
                  "losses", "node_weights", "weights_loss"),
    "rounds": ("rounds", "restart"),
    "comparison": ("task", "arms", "controls", "seeds", "model_steps"),
    "loss": ("kd_ratio", "kd_loss", "kd_states", "kd_standardize", "kd_topk", "kd_topk_of", "kd_tail", "kd_vocabulary",
             "mask_special_tokens",
             "beta", "alpha", "adaptive_alpha", "temperature", "key_attention", "lmbda", "rollout",
             "token_weights"),
    "training": ("num_train_epochs", "max_steps", "max_train_tokens", "train_tokens", "per_device_train_batch_size",
                 "batch_size", "gradient_accumulation_steps", "layout", "learning_rate", "lr_scheduler_type",
                 "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
                 "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "chat": ("system_prompt", "chat_template_kwargs", "teacher_template_kwargs", "student_template_kwargs",
             "template_date", "special_tokens_in_text"),
    "output": ("output_dir", "output", "format", "resume", "overwrite", "resume_from_checkpoint", "report_to",
               "logging_steps", "save_steps", "save_total_limit", "peek", "page_questions", "prompts", "post_hoc",
               "json", "tune_file", "push_to_hub", "table"),
    "machine": ("device", "devices", "processes", "ray", "ray_actors", "ray_cpus", "threads", "memory_utilization",
                "memory_bytes", "max_num_seqs", "batch", "deterministic", "bf16", "gradient_checkpointing",
                "torch_compile", "attn_implementation", "fsdp", "seconds"),
}  # fmt: skip
"""Fields of configs by the group in which help texts list them; a nested config is listed as a whole."""

PARTS = ("select", "train")
"""Nested configs that have groups of their own, because they are the options of other commands."""


def group_flags(command: str, flags: Sequence[Flag]) -> dict[str, list[Flag]]:
    """Return the flags of a command by the title of their group: required ones, those that matter, and the others."""
    known = {flag.name: flag for flag in flags}
    first = [known[name] for name in MAIN[command]]
    groups = {
        "required": [flag for flag in flags if flag.is_required],
        "main options": [flag for flag in first if not flag.is_required],
    }
    shown = {flag.name for listed in groups.values() for flag in listed}
    for part in ("", *PARTS):
        for title, fields in GROUPS.items():
            members = [flag for flag in flags if flag.name not in shown and find_group(flag) == (part, title)]
            members.sort(key=lambda flag: fields.index(_split(flag)[1]))
            groups[f"{part}: {title}" if part else title] = members
    return {title: members for title, members in groups.items() if members}


def find_group(flag: Flag) -> tuple[str, str]:
    """Return the part of PARTS that a flag belongs to, empty without one, and its group.

    Raises KeyError on a flag that is in no group.
    """
    part, field = _split(flag)
    for title, fields in GROUPS.items():
        if field in fields:
            return part, title
    raise KeyError(flag.name)


def _split(flag: Flag) -> tuple[str, str]:
    """Return the part that has groups of its own, empty without one, and the field in it that the flag belongs to."""
    first, _, rest = flag.name.partition(".")
    return (first, rest.split(".")[0]) if first in PARTS else ("", first)
