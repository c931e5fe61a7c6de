"""What other programs call our flags: a flag of theirs that is typed here is answered with ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping

FIELD_NAMES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gpu-memory-utilization": ("vLLM", ("memory-utilization",)),
    "mem-fraction-static": ("SGLang", ("memory-utilization",)),
    "kv-cache-memory-bytes": ("vLLM", ("memory-bytes",)),
    "max-running-requests": ("SGLang", ("max-num-seqs",)),
    "max-new-tokens": ("transformers", ("max-tokens", "rollout.max-tokens")),
    "max-completion-length": ("TRL", ("max-tokens", "rollout.max-tokens")),
    "include-stop-str-in-output": ("vLLM", ("include-stop",)),
    "stop-strings": ("transformers", ("stop",)),
    "data-offset": ("other programs", ("offset",)),
    "temperature": ("vLLM", ("sampling.temperature",)),
    "top-p": ("vLLM", ("sampling.top-p",)),
    "top-k": ("vLLM", ("sampling.top-k",)),
    "min-p": ("vLLM", ("sampling.min-p",)),
    "num-return-sequences": ("transformers", ("n", "candidates", "samples")),
    "num-generations": ("TRL", ("n", "candidates", "samples")),
    "beam-width": ("search-and-learn", ("beam",)),
    "num-beams": ("transformers", ("beam",)),
    "tensor-parallel-size": ("vLLM", ("devices",)),
    "data-parallel-size": ("vLLM", ("devices",)),
    "model-name-or-path": ("transformers", ("model", "student")),
    "student-name-or-path": ("KDFlow", ("student", "model-name-or-path")),
    "teacher-name-or-path": ("KDFlow", ("teacher", "teacher-model-name-or-path")),
    "teacher-model-name-or-path": ("TRL", ("teacher",)),
    "teacher": ("genssd select", ("teacher-model-name-or-path",)),
    "student": ("genssd select", ("model-name-or-path", "model")),
    "model": ("vLLM", ("model-name-or-path", "student", "teacher")),
    "dataset": ("other trainers", ("data",)),
    "dataset-name": ("TRL", ("data",)),
    "train-file": ("transformers", ("data",)),
    "validation-file": ("transformers", ("eval-data",)),
    "max-samples": ("LlamaFactory", ("limit",)),
    "torch-dtype": ("transformers", ("dtype",)),
    "warmup-ratio": ("older transformers", ("warmup-steps",)),
    "loss-top-k": ("TRL", ("kd-topk",)),
    "gkd-logits-topk": ("ms-swift", ("kd-topk",)),
    "kd-alpha": ("axolotl", ("kd-ratio",)),
    "kd-temperature": ("axolotl", ("temperature",)),
    "attn-impl": ("ms-swift", ("attn-implementation",)),
    "max-seq-length": ("TRL", ("max-length",)),
    "cutoff-len": ("LlamaFactory", ("max-length",)),
    "overwrite-output-dir": ("transformers", ("overwrite",)),
    "resume-from-checkpoint": ("transformers", ("resume",)),
    "resume": ("genssd select", ("resume-from-checkpoint last",)),
    "num-shards": ("datasets", ("shard",)),
    "enable-thinking": ("Qwen3", ("chat-template-kwargs",)),
    "seed-everything": ("Lightning", ("seed",)),
}
"""Flags of other programs and of other commands of genssd, without "--": whose they are, and ours for the same thing.
The first of ours that the command has is named."""


def name_ours(flag: str, known: Collection[str]) -> str | None:
    """Return the end of a message about a flag of another program: ours for it; None where the command has none.

    flag: with "--". known: flags of the command, with "--".
    """
    owner, ours = FIELD_NAMES.get(flag.removeprefix("--"), ("", ()))
    own = next((name for name in ours if f"--{name.split()[0]}" in known), None)
    return None if own is None else f", a name of {owner}: here it is '--{own}'"
