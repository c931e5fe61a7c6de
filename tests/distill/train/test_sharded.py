"""FSDP2 over two and four gloo processes: the same curves as one process, for all weights and for adapters, with a
sharded teacher and on-policy steps; and sharded checkpoints, resumed by another number of processes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import convert, edit_state, sign, stored_dtypes
from support.rank_jobs import make_config
from support.ranks import Rank, Ranks
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint
from support.training_runs import ROWS, metrics, weights
from transformers import AutoModelForCausalLM

from genssd.distill.train.config import TrainConfig
from genssd.distill.train.resume import find_checkpoint
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import CheckpointError, InputError

pytestmark = pytest.mark.slow

STEPS, PER_EPOCH, SAVED = 6, 3, 2
"""Steps of a training, those of an epoch, and the first one with a checkpoint, which lies within an epoch."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """Trainings in one directory; a run is called by its number of processes."""

    base: Path
    student: Path
    teacher: Path
    did: dict[str, list[dict[str, Any]]]
    """By the name of a run, what each process did: see `rank_jobs.train_one`."""

    def options(self, name: str, processes: int, **changes: Any) -> dict[str, Any]:
        """Return the options of a run: nine examples, four of them in a step; every second step is on-policy.

        The student's head is tied to its embedding. Four processes take other parts of a step than one and two.
        """
        size = 1 if processes == 4 else 2
        return {
            "model_name_or_path": str(self.student), "teacher_model_name_or_path": str(self.teacher),
            "data": [str(self.base / "data.jsonl")], "eval_data": [str(self.base / "data.jsonl")],
            "allow_eval_overlap": True, "output_dir": str(self.base / name), "fsdp": processes > 1,
            "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // processes // size,
            "num_train_epochs": 2.0, "layout": "tree", "learning_rate": 1e-3, "warmup_steps": 0.0, "kd_ratio": 0.5,
            "lmbda": 0.5, "seed": 3,
            "rollout": {"max_tokens": 5, "memory_bytes": 1 << 22}, "logging_steps": 1, "save_steps": SAVED,
            "eval_steps": SAVED, "save_total_limit": None, **changes,
        }  # fmt: skip

    def adapter_options(self, name: str, processes: int, **changes: Any) -> dict[str, Any]:
        """Return the options of a run with adapters, dropout, gradient checkpointing and a student in bfloat16.

        The rank of the adapters is less than four processes, one of which then has no part of a matrix.
        """
        changes |= {"use_peft": True, "lora_r": 3, "lora_dropout": 0.2, "learning_rate": 1e-2}
        changes |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // processes}
        changes |= {"gradient_checkpointing": True, "layout": "pad"}
        return self.options(name, processes, model_name_or_path=str(self.base / "bf16"), **changes)

    def resumed(self, options: dict[str, Any], source: str) -> dict[str, Any]:
        """Return the options of a run that goes on from a copy of the first checkpoint of another one."""
        target = Path(options["output_dir"])
        shutil.copytree(self.base / source / f"checkpoint-{SAVED}", target / f"checkpoint-{SAVED}")
        shutil.copy(self.base / source / "metrics.jsonl", target / "metrics.jsonl")  # of later steps, too
        return {**options, "resume_from_checkpoint": "last"}

    def curve(self, name: str) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(self.base / name)]

    def shards(self, name: str) -> list[Path]:
        return sorted((self.base / name / f"checkpoint-{SAVED}" / "shards").iterdir())


@pytest.fixture(scope="module")
def runs(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Runs:
    """Return the runs of one process, of two, and of another number that goes on from their checkpoints."""
    base = tmp_path_factory.mktemp("sharded")
    (base / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:9]))
    convert(tiny_pair.student, base / "bf16", torch.bfloat16)
    save_checkpoint(base / "tied", "qwen3", seed=5, tie_word_embeddings=True)
    runs = Runs(base, base / "tied", tiny_pair.teacher, {})

    def train(processes: int, *trainings: dict[str, Any]) -> None:
        done = ranks.results(processes, "train", *trainings)
        for number, options in enumerate(trainings):
            runs.did[Path(options["output_dir"]).name] = [results[number] for results in done]

    train(1, runs.options("1", 1), runs.adapter_options("adapters-1", 1))
    train(2, runs.options("2", 2), runs.adapter_options("adapters-2", 2), runs.resumed(runs.options("1-2", 2), "1"),
          runs.resumed(runs.adapter_options("adapters-1-2", 2), "adapters-1"))  # fmt: skip
    train(4, runs.resumed(runs.options("2-4", 4), "2"), runs.resumed(runs.adapter_options("adapters-2-4", 4),
          "adapters-2"))  # fmt: skip
    train(1, runs.resumed(runs.options("2-1", 1), "2"), runs.resumed(runs.adapter_options("adapters-2-1", 1),
          "adapters-2"))  # fmt: skip
    return runs


def assert_same_curve(runs: Runs, name: str, expected: str) -> None:
    """Sums over processes are rounded otherwise than those of one: nothing else may differ."""
    found, curve = runs.curve(name), runs.curve(expected)
    assert len(found) == len(curve) == STEPS + STEPS // SAVED
    for row, wanted in zip(found, curve, strict=True):
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=1e-5), (name, row["step"], key)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Adam's first steps are lr * sign(gradient): where the gradient is nearly 0 rounding decides."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert ((value - found[name]).abs() < tolerance).float().mean() > 0.99, name


@pytest.mark.parametrize("name", ["2", "1-2", "2-1", "2-4"])
def test_all_weights_and_a_sharded_teacher_train_as_in_one_process(runs: Runs, name: str) -> None:
    """Uninterrupted, and resumed in the middle of an epoch; a step is evaluated and saved at once."""
    assert_same_curve(runs, name, "1")
    assert_same_weights(weights(runs.base / name), weights(runs.base / "1"), 2e-5)
    assert ["divergence" in row and "cross_entropy" not in row for row in runs.curve("1") if "loss" in row].count(True)


@pytest.mark.parametrize("name", ["adapters-2", "adapters-1-2", "adapters-2-1", "adapters-2-4"])
def test_adapters_train_as_in_one_process(runs: Runs, name: str) -> None:
    """With dropout, which depends on the step and the part of its batch, and not on the process."""
    assert_same_curve(runs, name, "adapters-1")
    found, expected = (load_file(runs.base / n / "adapter" / "adapter_model.safetensors") for n in (name, "adapters-1"))
    assert_same_weights(found, expected, 2e-4)
    assert stored_dtypes(runs.base / name) == ({torch.bfloat16}, "bfloat16")


def test_adapters_of_several_processes_are_loaded_by_peft(runs: Runs) -> None:
    from peft import PeftModel

    base: Any = AutoModelForCausalLM.from_pretrained(runs.base / "bf16", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(runs.base / "adapters-2" / "adapter")).merge_and_unload()
    merged = weights(runs.base / "adapters-2")
    start = weights(runs.base / "bf16")
    for name, value in adapted.state_dict().items():
        assert torch.equal(value.bfloat16().float(), merged[name]), name
        assert torch.equal(merged[name], start[name]) == ("proj" not in name), name


@pytest.mark.parametrize("names", [("2",), ("2", "2-4"), ("1", "1-2"), ("adapters-2", "adapters-2-1")])
def test_every_example_is_trained_once_an_epoch(runs: Runs, names: tuple[str, ...]) -> None:
    """names: a run, and one that goes on from its checkpoint."""
    rows_of_step: dict[int, list[str]] = {}
    for number, name in enumerate(names):
        for process in runs.did[name]:
            for when, rows in process["counted"].items():
                step = int(when.removeprefix("step "))
                assert number == 0 or step > SAVED
                if len(names) == 1 or (step > SAVED) == (number == 1):
                    rows_of_step.setdefault(step, []).extend(rows)
    epochs = [[row for step in range(a, a + PER_EPOCH) for row in rows_of_step[step]] for a in (1, 1 + PER_EPOCH)]
    assert len(set(epochs[0])) == 9
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(set(epochs[0]))


@pytest.mark.parametrize("name", ["2", "2-4", "adapters-2", "adapters-2-4"])
def test_every_process_holds_its_part_of_student_and_teacher(runs: Runs, name: str) -> None:
    """Matrices are cut into equal parts of their rows, and what is left over makes the first parts larger."""
    processes = runs.did[name]
    for model in ("student", "teacher"):
        held = [process["bytes"][model][0] for process in processes]
        (whole,) = {process["bytes"][model][1] for process in processes}
        assert sum(held) == pytest.approx(whole, rel=0.02)  # FSDP2 pads uneven parts
        assert max(held) < 1.05 * whole / len(processes)
    (alone,) = runs.did["1"]
    assert alone["bytes"]["teacher"][0] == alone["bytes"]["teacher"][1] == processes[0]["bytes"]["teacher"][1]


@pytest.mark.parametrize("names", [("1", "2"), ("adapters-1", "adapters-2"), ("1", "2-4")])
def test_every_process_writes_its_own_rows_and_all_what_one_writes(runs: Runs, names: tuple[str, str]) -> None:
    (alone,), processes = runs.did[names[0]], runs.did[names[1]]
    steps = [step for step in alone["written"] if step in processes[0]["written"]]
    assert steps
    for step in steps:
        parts = [process["written"][step] for process in processes]
        assert [set(part) for part in parts] == [
            {str(i) for i in range(len(alone["written"][step])) if i % len(parts) == rank} for rank in range(len(parts))
        ]
        assert {index: ids for part in parts for index, ids in part.items()} == alone["written"][step]


def config_of_one(runs: Runs, output_dir: Path, **changes: Any) -> TrainConfig:
    """Return the config in which one process goes on with the run "2"."""
    return make_config(
        {**runs.options("2", 1), "output_dir": str(output_dir), "resume_from_checkpoint": "last", **changes}
    )


@pytest.fixture
def copied(runs: Runs, tmp_path: Path) -> Path:
    """Return the output directory of a copy of the run "2"."""
    shutil.copytree(runs.base / "2", tmp_path / "run")
    return tmp_path / "run"


def test_a_sharded_checkpoint_has_a_file_of_every_process(runs: Runs) -> None:
    shards = runs.shards("2")
    assert [path.name[:11] for path in shards] == ["shard-00001", "shard-00002"]
    sizes = [path.stat().st_size for path in shards]
    assert max(sizes) < 1.1 * min(sizes)
    assert not (shards[0].parents[1] / "optimizer.safetensors").exists()
    held = sum(path.stat().st_size for path in runs.shards("adapters-2"))
    assert held < 0.3 * sum(sizes), "frozen weights are in no checkpoint of adapters"


def test_a_shard_that_is_missing_or_damaged_is_named(runs: Runs, copied: Path) -> None:
    shard = copied / f"checkpoint-{STEPS}" / "shards" / runs.shards("2")[1].name
    content = shard.read_bytes()
    remedy = f"resume from the checkpoint before it: --resume-from-checkpoint {copied}/checkpoint-{STEPS - SAVED}"

    def assert_refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            run_train(config_of_one(runs, copied))
        assert shard.name in str(caught.value)
        assert remedy in str(caught.value)
        assert "\n" not in str(caught.value)

    shard.unlink()
    assert_refused("is missing")
    for damaged in (content[:-100], content[:40], b"", content[:-100] + bytes(100)):
        shard.write_bytes(damaged)
        assert_refused("is damaged: its content has another checksum")
    for damaged in (content[:-100], content[:40], b""):  # with checksums that agree
        shard.write_bytes(damaged)
        sign(shard.parents[1])
        assert_refused("is damaged")


def test_shards_of_another_training_are_refused(runs: Runs, copied: Path) -> None:
    path = copied / f"checkpoint-{STEPS}"

    def assert_refused(shards: list[Path], message: str) -> None:
        shutil.rmtree(path / "shards")
        (path / "shards").mkdir()
        for shard in shards:
            shutil.copy(shard, path / "shards" / shard.name)
        sign(path)
        with pytest.raises(CheckpointError, match=message):
            run_train(config_of_one(runs, copied))

    assert_refused(runs.shards("2"), r"shards is damaged: it is of step 2, trainer_state\.json of 6")
    assert_refused(runs.shards("2")[:1], r"shards is damaged: (it has no |.* has the shape )")
    assert_refused(runs.shards("2")[1:], r"shards is damaged: it has [\d,]+ of the [\d,]+ values of ")
    assert_refused(runs.shards("adapters-2"), "shards is damaged: it has no model.embed_tokens.weight/exp_avg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 1},
         r"was trained with 4 examples in a step \(per_device_train_batch_size 2 x gradient_accumulation_steps 1 x "
         r"processes 2\), not 2; on 1 process choose .* product with the number of processes is 4"),
        ({"learning_rate": 2e-3}, r"was trained with learning_rate=0\.001, not 0\.002"),
        ({"seed": 4}, "was trained with seed=3, not 4"),
    ],
)  # fmt: skip
def test_the_examples_of_a_step_and_all_other_settings_stay(
    runs: Runs, copied: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_train(config_of_one(runs, copied, **changes))


def test_the_same_number_of_processes_divides_a_step_as_before(runs: Runs, tmp_path: Path) -> None:
    """So that it goes on bit for bit."""
    shutil.copytree(runs.base / "1", tmp_path / "run")
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    with pytest.raises(InputError, match="was trained with per_device_train_batch_size=2, not 1"):
        run_train(config_of_one(runs, tmp_path / "run", **changes))


def test_a_checkpoint_without_its_number_of_processes_is_damaged(runs: Runs, copied: Path) -> None:
    edit_state(copied / f"checkpoint-{STEPS}", lambda fields: fields["settings"].pop("processes"), signed=True)
    with pytest.raises(CheckpointError, match="settings has no per_device_train_batch_size"):
        run_train(config_of_one(runs, copied))


@pytest.mark.parametrize(("moment", "rank"), [("find_shard", 1), ("write_json", 0), ("publish_directory", 0)])
def test_a_process_killed_while_it_saves_costs_the_steps_since_the_last_checkpoint(
    runs: Runs, ranks: Ranks, tmp_path: Path, moment: str, rank: int
) -> None:
    """Whatever is written already: two processes train two more steps, and one process goes on to the same model."""
    options = runs.resumed({**runs.options("2", 2), "output_dir": str(tmp_path / "run")}, "2")
    ended: list[Rank] = ranks.run(2, "train_and_die", options, moment, rank)
    assert ended[rank].status == -9
    run = tmp_path / "run"
    assert (run / f"checkpoint-{STEPS - SAVED}.tmp").exists()
    assert find_checkpoint("last", run) == run / f"checkpoint-{SAVED}"
    summary = run_train(config_of_one(runs, run))
    assert summary.steps == STEPS
    assert_same_weights(weights(run), weights(runs.base / "1"), 2e-5)
    assert not list(run.glob("*.tmp"))


def test_a_full_disk_of_one_process_ends_all_and_leaves_the_checkpoint_before(
    runs: Runs, ranks: Ranks, tmp_path: Path
) -> None:
    """With room again the same processes go on bit for bit, and remove old checkpoints when the new ones are whole."""
    options = runs.resumed({**runs.options("2", 2), "output_dir": str(tmp_path / "run"), "save_total_limit": 1}, "2")
    for message, left in ranks.results(2, "train_on_a_full_disk", options, 1):
        assert re.search(r"cannot be written by process 1: No space left .*; checkpoint-2 is kept", message), message
        assert "\n" not in message
        assert left == [f"checkpoint-{SAVED}"]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    resumed, uninterrupted = weights(tmp_path / "run"), weights(runs.base / "2")
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted), "bit for bit"
