"""Trainings on a device without values: nothing mixes its tensors with those of the host.

Values of some trainings are compared in kernels/triton/test_cuda_paths.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_cuda import FakeCuda
from support.tiny_pair import TinyPair
from support.training_runs import config_for

from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.token_weight_options import TokenWeightOptions
from genssd.distill.train.trainer import run_train

ROLLOUTS = {"kd_ratio": 0.5, "lmbda": 1.0}
TRAININGS: dict[str, dict[str, Any]] = {
    "entropy of the student": {"token_weights": TokenWeightOptions(entropy_of="student", half_life=4.0)},
    "entropy of the teacher": {"kd_ratio": 0.5, "token_weights": TokenWeightOptions(entropy_of="teacher")},
    "adaptive alpha": {"kd_ratio": 0.5, "kd_loss": "skew_forward_kl", "adaptive_alpha": True},
    "student's top-k": {"kd_ratio": 0.5, "kd_loss": "reverse_kl", "kd_topk": 5, "kd_topk_of": "student"},
    "judged": {**ROLLOUTS, "rollout": RolloutOptions(max_tokens=2, memory_bytes=1 << 20, train_on="all")},
    "wrong alone": {**ROLLOUTS, "rollout": RolloutOptions(max_tokens=2, memory_bytes=1 << 20, train_on="wrong")},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_devices_are_not_mixed(name: str, tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} and {i} is", "completion": f"{2 * i}. So {i}!", "answer": str(2 * i)} for i in range(2)]
    changes = dict(TRAININGS[name])
    if "kd_ratio" in changes:
        changes["teacher_model_name_or_path"] = str(tiny_pair.teacher)
    config = config_for(
        tiny_pair, write_rows(rows), tmp_path / "run", device="cuda:0", gradient_accumulation_steps=1, **changes
    )
    with FakeCuda(computes=False):
        assert run_train(config).steps > 0
