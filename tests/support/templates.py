"""Tokenizers whose chat templates behave as those of published models, in our own words."""

from __future__ import annotations

import json
from pathlib import Path

from support.toys import ENDINGS, save_checkpoint, save_model
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from genssd.engine.texts.text import Tokenizer

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


SMOLLM3 = """
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = '/think' if enable_thinking else '/no_think' -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}
{%- if '/no_think' in system -%}{%- set mode = '/no_think' -%}{%- elif '/think' in system -%}{%- set mode = '/think' -%}
{%- endif -%}
{%- set custom = system.replace('/no_think', '').replace('/think', '').rstrip() -%}
{%- endif -%}
{%- set empty = '' if mode == '/think' else '<think>\\n\\n</think>\\n' -%}
{{- '<|im_start|>system\\nReasoning Mode: ' + mode + '\\n\\n' + (custom or 'You are SmolLM.') + '<|im_end|>\\n' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + empty + m.content.lstrip('\\n') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' + empty -}}{%- endif -%}
"""
"""As SmolLM3: reads enable_thinking, and /think and /no_think in the system message, which go before it."""

DEEPSEEK_V31 = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{{- ('</think>' + m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('<think>' if thinking is defined and thinking else '</think>') -}}
{%- endif -%}
"""
"""As DeepSeek-V3.1: the prompt opens a thought where the variable thinking is true, else it closes one."""

QWEN3_SWITCH = QWEN3_TEMPLATE.replace(
    "'<|im_start|>assistant\\n' -}}{%- endif -%}\n",
    "'<|im_start|>assistant\\n' -}}\n{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}\n{%- endif -%}\n",
)
"""As Qwen3 with its switch, which writes an empty thought into the prompt when it is false."""

GRANITE = """
{%- if thinking -%}{{- '<|im_start|>system\\nThink first.<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As Granite 3.2: the variable thinking changes the system message alone."""


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


MULTI_STEP = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}
{%- set ns.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' -}}
{%- elif m.role == 'assistant' and loop.index0 < ns.last -%}
{{- '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
"""As Qwen3: wraps results of tools, drops earlier thoughts, and reads enable_thinking."""

TRIMMED_DATE = """
{%- if not date_string is defined -%}
{%- if strftime_now is defined -%}{%- set date_string = strftime_now("%d %b %Y") -%}
{%- else -%}{%- set date_string = "26 Jul 2024" -%}{%- endif -%}
{%- endif -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{- '<|im_start|>system\\nToday Date: ' + date_string + '\\n\\n' + system + '<|im_end|>' -}}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{- '<|im_start|>ipython\\n' + (m.content | tojson) + '<|im_end|>' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As Llama 3.2: prints the date, trims contents, and writes results of tools as JSON."""

SYSTEM_IN_USER = """
{%- set ns = namespace(system='') -%}
{%- for m in messages -%}{%- if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- endif -%}{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|im_start|>' + m.content -}}
{%- elif m.role == 'assistant' -%}{{- '<think>' + m.content + '<|im_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}
"""
"""As DeepSeek: the system message stands before all turns, and contents touch the names of tokens."""

CONTROL_NAMES = ("<|im_start|>", "<|im_end|>", "<s>", "<think>", "</think>", "<tool_response>", "</tool_response>")
"""Control tokens of `make_merging_tokenizer`; the last four are added tokens that are not special."""
SPACED_KINDS = ("metaspace", "prepended")
CORPUS = [
    "What is 12 + 34? The answer is 46, says the system user assistant.\n\n",
    "<|im_start|>user\nhello<|im_end|>\n<think>\nwhy\n</think>\n\n<s>[INST] x [/INST]</s>",
    "def f(x):\n    return x ** 2  # im_start im_end think tool_response\n",
]


def make_merging_tokenizer(directory: Path, template: str, kind: str = "bytes") -> Tokenizer:
    """Return a tokenizer with merges, a BOS, special and other control tokens, an added word and a run of spaces.

    kind: bytes (as Qwen), metaspace (as Llama 2: a space before the first word alone), prepended (as older conversions
    of Llama 2: a space before every piece between special tokens), or stripping (as Phi-3: control
    tokens take the spaces around them).
    """
    raw = RawTokenizer(models.BPE(byte_fallback=kind in SPACED_KINDS))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "metaspace":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        alphabet = [chr(i) for i in range(32, 127)] + ["\n", "\u2581"]
    elif kind == "prepended":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        replace, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
        raw.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
        alphabet = [chr(i) for i in range(33, 127)] + ["\n", "\u2581"]
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)] if kind in SPACED_KINDS else []
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700, initial_alphabet=alphabet, special_tokens=byte_tokens, show_progress=False, min_frequency=1
        ),
    )
    if byte_tokens:  # the trainer adds them as tokens; they belong to the model alone
        fields = json.loads(raw.to_str())
        raw = RawTokenizer.from_str(json.dumps({**fields, "added_tokens": []}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<|im_end|>")
    strips = {"lstrip": kind == "stripping", "rstrip": kind == "stripping", "normalized": False}
    special = [AddedToken(name, special=True, **strips) for name in CONTROL_NAMES[:3]]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([AddedToken(name, special=False, **strips) for name in CONTROL_NAMES[3:]])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=True) for name in ("genssd", "        ")])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    save_model(directory, vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, eos_token_id=end)
    return Tokenizer(directory)
