"""Chat templates in the shapes of well-known models', with tokenizers of single bytes for them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rayrm.text.chat import Rule, Thoughts
from rayrm.text.fingerprints import fingerprint
from rayrm.text.template import Template, TemplateSpec, set_pad_token
from tests.tiny import byte_tokenizer

# Thoughts of turns before the last question go; an answer without one gets an empty one.
QWEN3 = """\
{% if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
<tools>{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content }}<|im_end|>
{% endif %}
{% set ns = namespace(searching=true, question=messages | length - 1) %}
{% for m in messages[::-1] %}
{% set i = messages | length - 1 - loop.index0 %}
{% if ns.searching and m.role == 'user' and not (m.content.startswith('<tool_response>') \
and m.content.endswith('</tool_response>')) %}
{% set ns.searching = false %}{% set ns.question = i %}
{% endif %}
{% endfor %}
{% for m in messages %}
{% set content = m.content if m.content is string else '' %}
{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{% set thought = '' %}
{% if m.reasoning_content is string %}
{% set thought = m.reasoning_content %}
{% elif '</think>' in content %}
{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{% if loop.index0 > ns.question and (loop.last or thought) %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
{%- else %}
{{- '<|im_start|>assistant\\n' + content }}
{%- endif %}
{% for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else \
call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Today's date in the system message; contents trimmed; tools before the first question.
LLAMA31 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{% else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools %}
{% set question = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer, or call one of:\\n' }}
{%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n' }}{% endfor %}
{{- question + '<|eot_id|>' }}
{%- endif %}
{% for m in messages %}
{% if m.tool_calls %}
{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{% set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
{{- '"parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role in ('tool', 'ipython') %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}
{{- '<|eot_id|>' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\
{% endif %}"""

GEMMA2 = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + \
m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# The system message moves to the last question.
MISTRAL = """\
{% if messages[0]['role'] == 'system' %}\
{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}\
{{ bos_token }}{% for m in messages %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}\
{% if m['role'] == 'user' %}\
{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}\
{% if system is defined and m == asked[-1] %}{{ '[INST] ' + system + '\\n\\n' + m['content'] }}\
{% else %}{{ '[INST] ' + m['content'] }}{% endif %}{{ '[/INST]' }}\
{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"""

# Thoughts of all answers go; the generation prompt opens one.
DEEPSEEK_R1 = """\
{% set ns = namespace(system='', after_tool=false) %}\
{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}\
{% endfor %}{{ bos_token + ns.system }}{% for m in messages %}\
{% if m['role'] == 'user' %}{% set ns.after_tool = false %}{{ '<User>' + m['content'] }}{% endif %}\
{% if m['role'] == 'assistant' and m['tool_calls'] %}{% for call in m['tool_calls'] %}\
{{ '<Assistant><call>' + call['function']['name'] + '\\n' + call['function']['arguments'] }}\
{% endfor %}{{ '<end>' }}{% endif %}\
{% if m['role'] == 'assistant' and m['content'] is not none %}\
{% set content = m['content'].split('</think>')[-1] %}\
{{ ('<outputs_end>' if ns.after_tool else '<Assistant>') + content + '<end>' }}\
{% set ns.after_tool = false %}{% endif %}\
{% if m['role'] == 'tool' %}{% set ns.after_tool = true %}{{ '<output>' + m['content'] }}\
{% endif %}{% endfor %}\
{% if add_generation_prompt and not ns.after_tool %}{{ '<Assistant><think>\\n' }}{% endif %}"""


@dataclass(frozen=True)
class Shape:
    """A chat template, and its tokenizer's special tokens, EOS first, the end of turn second."""

    template: str
    special: tuple[str, ...]
    bos: str | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        named = {"eos_token": self.special[0]} | ({"bos_token": self.bos} if self.bos else {})
        return byte_tokenizer(self.special, template=self.template, adds_bos=False, **named)

    def template_of(
        self,
        rule: Rule = "template",
        thoughts: Thoughts = "keep",
        ends: tuple[str, ...] = (),
        max_length: int = 2000,
    ) -> Template:
        tokenizer = self.tokenizer
        made_by = fingerprint(tokenizer)
        set_pad_token(tokenizer)
        spec = TemplateSpec("chat", "\n", max_length, made_by, rule, thoughts, ends)
        return Template(tokenizer, spec)


SHAPES = {
    "qwen3": Shape(QWEN3, ("<|im_end|>", "<|im_start|>", "<|endoftext|>")),
    "llama31": Shape(
        LLAMA31,
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>", "<|begin|>"),
        "<|begin|>",
    ),
    "gemma2": Shape(
        GEMMA2, ("<eos>", "<end_of_turn>", "<start_of_turn>", "<pad>", "<bos>"), "<bos>"
    ),
    "mistral": Shape(MISTRAL, ("</s>", "<unk>", "<s>"), "<s>"),
    "deepseek r1": Shape(
        DEEPSEEK_R1, ("<end>", "<User>", "<Assistant>", "<pad>", "<begin>"), "<begin>"
    ),
}
