"""One forward pass of a training: from examples to the differentiable sums of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from genssd.distill.data.examples import Example
from genssd.distill.train.batches import ExampleBatch, TokenBatch, TokenRow, build_token_batch
from genssd.distill.train.config import Layout
from genssd.distill.train.distributed import World, reshard
from genssd.distill.train.key_attention import (
    IMPLEMENTATION,
    AttentionCollector,
    KeyWords,
    LayerRouter,
    compute_key_attention_loss,
    find_key_words,
)
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.losses import CompletionTokens, Head, LossSums, SpanTargets, Targets, compute_loss
from genssd.distill.train.models import Teacher, compute_completion_states
from genssd.distill.train.row_topk import read_topk
from genssd.distill.train.span_losses import SpanHead, align_spans
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError
from genssd.engine.models.transformers_loading import logits_softcap
from genssd.engine.texts.text import Tokenizer
from genssd.kernels.logprob import TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTargets:
    """Outputs of the teacher that the student is trained towards; None where the loss does not use them."""

    distributions: Targets | None = None
    """The teacher's distributions of the completion tokens."""
    attention: AttentionCollector | None = None
    """The teacher's attention to key words."""


class CompletionLoss(torch.nn.Module):
    """Student and loss in one module, so that FSDP2 gathers the sharded weights for both."""

    def __init__(
        self, model: Any, router: LayerRouter | None, options: LossOptions, special_ids: Sequence[int]
    ) -> None:
        super().__init__()
        self.model = model
        self.router = router
        self.options = options
        self._special_ids = special_ids

    def forward(
        self,
        batch: TokenBatch,
        tokens: CompletionTokens,
        teacher: TeacherTargets,
        key_words: Sequence[KeyWords | None],
    ) -> LossSums:
        """Compute the loss of a batch. key_words: of each row, for the loss on attention."""
        collector = None if self.router is None else AttentionCollector(key_words)
        states = compute_completion_states(self.model, batch, collector)
        student = Head(states, self.model.get_output_embeddings().weight, logits_softcap(self.model))
        sums = compute_loss(self.options, student, tokens, teacher.distributions, special_ids=self._special_ids)
        if self.router is None:
            return sums
        assert collector is not None
        assert teacher.attention is not None
        attention = compute_key_attention_loss(teacher.attention, collector, self.router, self.options.key_attention)
        return sums._replace(attention=attention)


class CompletionStates(torch.nn.Module):
    """A teacher up to its last hidden states, as a module, so that FSDP2 gathers its sharded weights.

    The weights of its head are gathered with them, and stay until `ForwardPass.free_gathered_weights`: the loss reads
    them, and its backward pass does.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, attention: AttentionCollector | None = None) -> torch.Tensor:
        """Return what `compute_completion_states` returns, [M, D]."""
        return compute_completion_states(self.model, batch, attention)


class ForwardPass:
    """Forward pass over examples: through the student and, where the loss needs one, the teacher."""

    def __init__(
        self, module: CompletionLoss, teacher: Teacher | None, tokenizer: Tokenizer, *, layout: Layout, bf16: bool
    ) -> None:
        self.module = module
        self._teacher = teacher
        self._teacher_states = None if teacher is None else CompletionStates(teacher.model)
        self._tokenizer = tokenizer
        self._layout = layout
        self._bf16 = bf16

    @staticmethod
    def build(
        model: Any, teacher: Teacher | None, tokenizer: Tokenizer, options: LossOptions, *, layout: Layout, bf16: bool
    ) -> ForwardPass:
        """Build the module that computes the loss. teacher: None where the loss does not need one.

        With key_attention, the attention implementation of both models is replaced by IMPLEMENTATION.
        """
        router = None
        if options.key_attention.weight:
            model.set_attn_implementation(IMPLEMENTATION)
            assert teacher is not None
            teacher.model.set_attn_implementation(IMPLEMENTATION)
            shape = model.config
            width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
            router = LayerRouter(shape.num_key_value_heads * width, shape.num_hidden_layers)
            router = router.to(model.get_input_embeddings().weight.device)
        module = CompletionLoss(model, router, options, tokenizer.hf.all_special_ids)
        return ForwardPass(module, teacher, tokenizer, layout=layout, bf16=bf16)

    def shard_weights(self, world: World) -> None:
        """Shard the weights of the student, and of the teacher, over the processes, if that is asked for."""
        world.shard_weights(self.module.model, self.module)
        if self._teacher_states is not None:
            world.shard_weights(self._teacher_states.model, self._teacher_states)

    def free_gathered_weights(self) -> None:
        """Free the sharded weights that a forward pass has gathered: after its backward pass, or where none follows."""
        reshard(self.module)
        if self._teacher_states is not None:
            reshard(self._teacher_states)

    def extra_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that are trained in addition to the model's own."""
        router = self.module.router
        return {} if router is None else {f"router.{name}": p for name, p in router.named_parameters()}

    def compute_loss(self, batch: ExampleBatch, *, counted: bool, when: str) -> LossSums:
        """Compute the sums of the losses over the completion tokens.

        counted: False runs the models with all weights 0, so that the sums are 0. when: the moment that an error
        message names, such as "step 3". Raises CapacityError, which says what to lower, if memory does not suffice.
        """
        try:
            return self._compute_loss(batch, counted)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, on a CPU it is an allocator's message
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            longest = max(len(example.input_ids) for example in batch.examples)
            raise CapacityError(
                f"memory does not suffice for {format_count(len(batch.examples), 'example')} of up to "
                f"{format_count(longest, 'token')} at {when}: lower per_device_train_batch_size (and raise "
                "gradient_accumulation_steps as much), lower max_length, or use "
                "gradient_checkpointing"
            ) from None

    def _compute_loss(self, batch: ExampleBatch, counted: bool) -> LossSums:
        device, examples = self._device, batch.examples
        token_batch = self._build_token_batch([TokenRow(e.input_ids, e.num_prompt) for e in examples])
        tokens = CompletionTokens(
            target_M=token_batch.target,
            weight_M=torch.tensor([w * counted for e in examples for w in e.token_weights()], device=device),
            rejected_M=torch.tensor([e.rejected for e in examples for _ in range(e.num_completion)], device=device),
            lengths=[e.num_completion for e in examples],
            on_policy=batch.on_policy,
        )
        key_words: list[KeyWords | None] = [None for _ in examples]
        if self.module.router is not None and counted:
            key_words = [self._find_key_words(e, e.input_ids[: e.num_prompt]) for e in examples]
        teacher = self._compute_teacher_targets(examples, token_batch, key_words)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            sums: LossSums = self.module(token_batch, tokens, teacher, key_words)
        return sums

    def _compute_teacher_targets(
        self, examples: Sequence[Example], batch: TokenBatch, key_words: Sequence[KeyWords | None]
    ) -> TeacherTargets:
        """Return the teacher's outputs for the examples, from the rows or from the teacher in memory."""
        if self.module.options.uses_rows:
            top = read_topk(examples)
            return TeacherTargets(distributions=TopK(top.ids.to(self._device), top.logprob.to(self._device)))
        if self.module.options.uses_teacher:
            return self._run_teacher(examples, batch, key_words)
        return TeacherTargets()

    @torch.no_grad()
    def _run_teacher(
        self, examples: Sequence[Example], batch: TokenBatch, key_words: Sequence[KeyWords | None]
    ) -> TeacherTargets:
        """Run the teacher on the completions, each after the prompt as the teacher reads it."""
        assert self._teacher is not None
        assert self._teacher_states is not None
        model = self._teacher.model
        if self._teacher.reads_bytes:
            return TeacherTargets(distributions=self._run_foreign_teacher(self._teacher, examples))
        for example in examples:
            self._teacher.check_example(example)  # a completion of the student's own has not been checked yet
        if any(example.teacher_prompt_ids for example in examples):
            prompts = [e.teacher_prompt_ids or e.input_ids[: e.num_prompt] for e in examples]
            batch = self._build_token_batch(
                [TokenRow((*p, *e.completion_ids), len(p)) for p, e in zip(prompts, examples, strict=True)]
            )
            key_words = [
                self._find_key_words(example, prompt) if words else None
                for example, prompt, words in zip(examples, prompts, key_words, strict=True)
            ]
        collector = None if self.module.router is None else AttentionCollector(key_words)
        states = self._teacher_states(batch, collector)
        head = Head(states, model.get_output_embeddings().weight, logits_softcap(model))
        return TeacherTargets(distributions=head, attention=collector)

    def _run_foreign_teacher(self, teacher: Teacher, examples: Sequence[Example]) -> SpanTargets:
        """Run a teacher with another tokenizer on the text of the completions, as far as it has positions."""
        rows: list[TokenRow] = []
        student_spans: list[int] = []
        teacher_spans: list[int] = []
        num_spans = 0
        for example in examples:
            text, prompt = teacher.read_text(example), example.teacher_prompt_ids
            ids = text.ids[: teacher.positions - len(prompt)]
            rows.append(TokenRow((*prompt, *ids), len(prompt)))
            own, other, count = align_spans(text.student_ends, text.ends[: len(ids)])
            student_spans += [-1] * (example.num_completion - len(own))  # the lead
            student_spans += [span + num_spans if span >= 0 else -1 for span in own]
            teacher_spans += [span + num_spans if span >= 0 else -1 for span in other]
            num_spans += count
        batch = build_token_batch(rows, self._layout, pad_id=0).to(self._device)  # the student's may not be an id here
        assert self._teacher_states is not None
        states = self._teacher_states(batch)
        head = SpanHead(
            states,
            teacher.model.get_output_embeddings().weight,
            logits_softcap(teacher.model),
            batch.target,
            torch.tensor(teacher_spans, device=self._device),
        )
        return SpanTargets(teacher=head, student_span_M=torch.tensor(student_spans, device=self._device))

    def _find_key_words(self, example: Example, prompt_ids: Sequence[int]) -> KeyWords | None:
        """Find the key words and steps; words of the prompt count where both models read the same prompt."""
        pieces = self._tokenizer.pieces
        has_end = example.input_ids[-1] in self._tokenizer.end_token_ids
        return find_key_words(
            pieces(prompt_ids),
            [*pieces(example.completion_ids[: example.num_completion - has_end]), *[""] * has_end],
            self.module.options.key_attention,
            in_prompt=not example.teacher_prompt_ids,
        )

    def _build_token_batch(self, rows: Sequence[TokenRow]) -> TokenBatch:
        return build_token_batch(rows, self._layout, self._tokenizer.hf.pad_token_id or 0).to(self._device)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.module.model.get_input_embeddings().weight.device
        return device
