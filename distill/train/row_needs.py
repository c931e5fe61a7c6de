"""What a loss needs of the rows that it is trained on, beyond what every training reads of them."""

from __future__ import annotations

from genssd.distill.data.examples import Example
from genssd.distill.train.loss_options import LossOptions
from genssd.engine.common.errors import InputError


def check_example(example: Example, loss: LossOptions) -> None:
    """Check that the loss can use an example.

    Raises InputError naming its row: on a preference pair that the loss does not learn from, without the teacher's top
    k where the loss reads it, and where the file of the top k is damaged.
    """
    if example.rejected and loss.kd_loss != "distillm2":
        raise InputError(
            f"{example.where}: a preference pair, which kd_loss distillm2 alone learns from (or TRL's trainers); give "
            "--kd-loss distillm2, or take the pairs out of the data"
        )
    if loss.uses_rows:
        if example.topk is None:
            raise InputError(
                f"{example.where}: no teacher_topk of this student's tokenizer, which kd_ratio needs; select with "
                "--teacher-topk, or name a teacher_model_name_or_path"
            )
        example.topk.read()
