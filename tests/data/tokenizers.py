"""Tokenizers of every kind that matters for rows: what their post-processor adds, and what their chat template
writes."""

from __future__ import annotations

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"w{i}" for i in range(40)] + [*"ab", "user", "assistant", "system", "tool", ":", "\n", "yes", "no", "call"]
SPECIAL = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "<pad>"]
VOCAB = len(SPECIAL) + len(WORDS)

POST = {
    # what the tokenizer puts around one text, and around two
    "nothing": (None, None),
    "start token": ("<s> $A", "<s> $A <s> $B"),
    "end token": ("$A </s>", "$A </s> $B </s>"),
    "start and end": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "cls and sep": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
}
AROUND = {
    "nothing": ([], []),
    "start token": (["<s>"], []),
    "end token": ([], ["</s>"]),
    "start and end": (["<s>"], ["</s>"]),
    "cls and sep": (["[CLS]"], ["[SEP]"]),
}
BODY = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}assistant : {% endif %}"
TEMPLATES = {
    "with a start token": "{{ bos_token }} " + BODY + PROMPT,
    "without one": BODY + PROMPT,
    "parts only": "{% for m in messages %}{{ m['role'] }} : {% for p in m['content'] %}{% if p['type'] == 'text' %}"
    "{{ p['text'] }}{% endif %}{% endfor %} </s>\n{% endfor %}" + PROMPT,
}
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + BODY
)
TOOLS = (
    "{% for m in messages %}{% if 'tool_calls' in m and m['tool_calls'] | length %}call "
    "{{ m['tool_calls'][0]['function']['name'] }} {{ m['tool_calls'][0]['function']['arguments'] | tojson }} </s>"
    "{% else %}{{ m['role'] }} : {{ m['content'] }} </s>\n{% endif %}{% endfor %}"
)


def made(post: str = "nothing", template: str | None = None, **special: str) -> hf.PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    single, pair = POST[post]
    if single:
        ids = [(word, vocabulary[word]) for word in SPECIAL]
        inner.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    if post == "cls and sep":
        named["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    tokenizer.chat_template = template
    return tokenizer
