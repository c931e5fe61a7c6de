"""Tokenizers whose chat templates behave as those of published models, in our own words."""

from __future__ import annotations

from pathlib import Path

from support.toys import ENDINGS, save_checkpoint, save_model
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from genssd.engine.text import Tokenizer

THINKING_WRAPPER = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set text = m.content -%}{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.last -%}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- text + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As Qwen3: the last answer always has a thought before it, an empty one where none is known."""

THINK_OPENER = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""
"""As DeepSeek-R1: the generation prompt opens a thought, and every answer in the messages loses its own."""

SPACED = """
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + m.content.strip() + ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content.strip() + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}
"""
"""As Llama 2: spaces around the answer; roles other than user and assistant are ignored."""

FIELD_OPENER = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' -%}{{- '<think>' + (m.reasoning_content or '') + '</think>' -}}{%- endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""
"""As Nemotron 3: the generation prompt opens a thought, which the messages have in a field of its own alone."""

CHANNELS = """
{%- for m in messages -%}
{%- if m.thinking -%}{{- '<|im_start|>assistant<|thought|>' + m.thinking + '<|im_end|>' -}}{%- endif -%}
{{- '<|im_start|>' + m.role + '<|final|>' + m.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}
"""
"""As gpt-oss: the thought is a turn of its own, without tags."""

TOOLS = """
{%- if tools %}{{- '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content -}}
{%- for call in m.tool_calls or [] -%}
{{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML that writes tools and calls of tools."""


QWEN3_TEMPLATE = """
{%- set ns = namespace(query=messages | length - 1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') -}}
{{- '# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not (loop.first and tools)) -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{%- set text = m.content -%}{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.query and (loop.last or thought) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- text -}}
{%- for call in m.tool_calls or [] -%}
{{- ('\\n' if text or not loop.first else '') + '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As Qwen3 with its tools, whose description is shorter here."""

R1_TEMPLATE = """
{%- for m in messages if m.role == 'system' -%}{{- m.content -}}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<\uff5cUser\uff5c>' + m.content -}}
{%- elif m.role == 'assistant' -%}
{{- '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<\uff5cAssistant\uff5c><think>\\n' -}}{%- endif -%}
"""
"""As DeepSeek-R1-Distill-Qwen, with its own tokens and without its tools."""

SMOLLM2 = """
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As SmolLM2-Instruct: ChatML with a system message of its own where the conversation has none."""


def make_tokenizer(directory: Path, template: str) -> Tokenizer:
    """Return the tokenizer of a tiny checkpoint with another chat template."""
    save_checkpoint(directory)
    (directory / "chat_template.jinja").write_text(template)
    return Tokenizer(directory)


def make_bos_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a tiny checkpoint that puts <|begin|> before a text, as its chat template does, too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|end|>", "<|begin|>", "<|role|>"])
    raw.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 257)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|role|>"],
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(directory)
    save_model(directory, "llama", eos_token_id=ENDINGS)
    return Tokenizer(directory)
