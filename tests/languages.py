"""Tokenizers and chat templates for the tests of language models: byte-level BPE, trained here on a few sentences."""

from functools import cache
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = [
    "Question: what is the colour of the sea? Answer: blue, as a rule.",
    "Hello, how are you? Fine, thanks. And you? I am fine, too.",
    "user assistant system yes no You are a helpful assistant. ",
    "The stone falls, the bird rests, the water moves.\nThe fish does not say why.\n\n",
    "unhappy un happy 北京是中国的首都。答案是北京。",
] * 20
MARKS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<turn>", "</turn>"]

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# BOS, system within the first user turn, no generation prompt, roles that must alternate
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '<s>[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"""
# as Qwen3: what was thought is dropped from all answers but the last
THINKING = """{% for m in messages %}{% set content = m['content'] %}
{%- if m['role'] == 'assistant' and not loop.last and '</think>' in content %}
{%- set content = content.split('</think>')[-1] | trim %}{% endif %}
{{- '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# as SmolLM2: a system prompt of its own
SMOL = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# as Gemma: BOS, "model", contents stripped, no system
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<turn>' + role + '\n' + m['content'] | trim + '</turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""
# no control token at all, and nothing between a question and its answer
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ALPACA = """{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"""
# asks for an answer with the beginning of a thought that it does not write down
ASKS_OTHERWISE = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "thinking": THINKING,
    "smol": SMOL,
    "gemma": GEMMA,
    "alpaca": ALPACA,
}


@cache
def _trained(bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    written: str = tokenizer.to_str()
    return written


def tokenizer(template: str | None = None, *, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer. bos: it puts <s> before every sequence."""
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(bos)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = template
    return made
