"""One forward pass of a training: from examples to the sums of their losses, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genssd.distill.data.examples import Example
from genssd.distill.train.batches import Batch, Layout, TokenRow, lay_out
from genssd.distill.train.key_attention import (
    IMPLEMENTATION,
    Keys,
    LayerAttention,
    Router,
    collecting,
    find_keys,
    key_attention_loss,
)
from genssd.distill.train.losses import Head, Loss, LossOptions, loss_of, topk_of
from genssd.distill.train.models import completion_states
from genssd.engine.errors import CapacityError
from genssd.engine.text import Tokenizer
from genssd.kernels.logprob import TopK


class CompletionLoss(torch.nn.Module):
    """Student and loss as one module: what is split over processes is put together for both."""

    def __init__(self, model: Any, router: Router | None, options: LossOptions, special_ids: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.router = router
        self._options = options
        self._special_ids = special_ids

    def forward(
        self,
        batch: Batch,
        weight: Tensor,
        rejected: Tensor,
        teacher: Head | TopK | None,
        keys: Sequence[Keys | None],
        teacher_looks: LayerAttention,
        own: bool,
    ) -> Loss:
        """teacher: what it says; teacher_looks: where it looks."""
        with collecting(keys) as looks:
            student = Head(completion_states(self.model, batch), self.model.get_output_embeddings().weight)
        loss = loss_of(
            self._options,
            student,
            batch.target,
            weight,
            teacher,
            rejected_M=rejected,
            special_ids=self._special_ids,
            own=own,
        )
        if self.router is None:
            return loss
        attention = key_attention_loss(teacher_looks, looks, self.router, self._options.key_attention)
        return loss._replace(attention=attention)


class ForwardPass:
    """A student, and the teacher where there is one, over examples."""

    def __init__(
        self, model: Any, teacher: Any, tokenizer: Tokenizer, options: LossOptions, *, layout: Layout, bf16: bool
    ) -> None:
        self._model = model
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._options = options
        self._layout = layout
        self._bf16 = bf16
        self._device: torch.device = model.get_input_embeddings().weight.device
        router = None
        if options.key_attention.weight:
            model.set_attn_implementation(IMPLEMENTATION)
            teacher.set_attn_implementation(IMPLEMENTATION)
            shape = model.config
            head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
            router = Router(shape.num_key_value_heads * head, shape.num_hidden_layers).to(self._device)
        self.module = CompletionLoss(model, router, options, tokenizer.hf.all_special_ids)

    def extra_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained beside the model's own parameters."""
        router = self.module.router
        return {} if router is None else {f"router.{name}": p for name, p in router.named_parameters()}

    def loss(self, examples: Sequence[Example], *, counts: bool, own: bool, when: str) -> Loss:
        """Sums over the completion tokens; all 0 if they do not count. own: whether the student wrote the completions.

        Raises CapacityError, saying `when` and what to lower, if it does not fit into memory.
        """
        try:
            return self._loss(examples, counts, own)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, on a CPU it is an allocator's message
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            longest = max(len(example.input_ids) for example in examples)
            raise CapacityError(
                f"{len(examples)} examples of up to {longest} tokens do not fit into memory at {when}: lower "
                "per_device_train_batch_size (and raise gradient_accumulation_steps as much), lower max_length, or use "
                "gradient_checkpointing"
            ) from None

    def _loss(self, examples: Sequence[Example], counts: bool, own: bool) -> Loss:
        batch = self._lay_out([TokenRow(example.input_ids, example.num_prompt) for example in examples])
        weight = torch.tensor([w * counts for e in examples for w in e.token_weights()], device=self._device)
        rejected = torch.tensor([e.rejected for e in examples for _ in range(e.num_completion)], device=self._device)
        keys: list[Keys | None] = [None for _ in examples]
        if self.module.router is not None and counts:
            keys = [self._keys(e, e.input_ids[: e.num_prompt]) for e in examples]
        teacher: Head | TopK | None = None
        looks = LayerAttention(keys)
        if self._options.uses_rows:
            top = topk_of(examples)
            teacher = TopK(top.ids.to(self._device), top.logprob.to(self._device))
        elif self._options.uses_teacher:
            teacher, looks = self._ask_teacher(examples, batch, keys)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            loss: Loss = self.module(batch, weight, rejected, teacher, keys, looks, own)
        return loss

    @torch.no_grad()
    def _ask_teacher(
        self, examples: Sequence[Example], batch: Batch, keys: Sequence[Keys | None]
    ) -> tuple[Head, LayerAttention]:
        """The teacher's states, behind the prompts as it reads them, and where it looks."""
        if any(example.teacher_prompt_ids for example in examples):
            prompts = [e.teacher_prompt_ids or e.input_ids[: e.num_prompt] for e in examples]
            batch = self._lay_out(
                [TokenRow((*p, *e.completion_ids), len(p)) for p, e in zip(prompts, examples, strict=True)]
            )
            keys = [self._keys(e, p) if found else None for e, p, found in zip(examples, prompts, keys, strict=True)]
        with collecting(keys) as looks:
            states = completion_states(self._teacher, batch)
        return Head(states, self._teacher.get_output_embeddings().weight), looks

    def _keys(self, example: Example, prompt_ids: Sequence[int]) -> Keys | None:
        """Key words and steps; words of the prompt count where both models read the same prompt."""
        pieces = self._tokenizer.pieces
        ended = example.input_ids[-1] in self._tokenizer.end_token_ids
        return find_keys(
            pieces(prompt_ids),
            [*pieces(example.completion_ids[: example.num_completion - ended]), *[""] * ended],
            self._options.key_attention,
            in_prompt=not example.teacher_prompt_ids,
        )

    def _lay_out(self, rows: Sequence[TokenRow]) -> Batch:
        return lay_out(rows, self._layout, self._tokenizer.hf.pad_token_id or 0).to(self._device)
