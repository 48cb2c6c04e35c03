"""Chat templates of the shapes that published models have, a tokenizer for them, and conversations, for tests."""

import json
import random
from pathlib import Path
from typing import Any

from megapatch.tools.preprocess.train_tokenizer import main as train_tokenizer

SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>
<s> </s> [INST] [/INST]""".split()
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{% generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}{%- endif %}
{%- endfor %}"""
TOOLS = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{%- if message.content %}{{- message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- set said = call.function.arguments %}
{{- (said if said is string else said | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
THINKING = """\
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages[::-1] %}
{%- if message.role == 'user' and not ns.found %}
{%- set ns.found = true %}{%- set ns.last = messages | length - 1 - loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{%- if loop.index0 > ns.last and message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "tools": TOOLS, "thinking": THINKING}
_WORDS = "the a quick fox naïve 漢字 日本 👩‍👩‍👧 e\u0301 x=1; \n\n\t  def f(): <b> 12,345 Ünïcödé".split(" ")


def untagged(template: str) -> str:
    """The template as most models have it, without generation tags."""
    for tag in ("{% generation %}", "{%- generation %}", "{% endgeneration %}", "{%- endgeneration %}"):
        template = template.replace(tag, "{%- if true %}" if "end" not in tag else "{%- endif %}")
    return template


def make_tokenizer(folder: Path, template: str, *, normalizer: str | None = "NFC", **config: Any) -> Path:
    """A byte-level BPE of 700 tokens whose text is normalized, with special tokens, and bos by its post-processor."""
    from tokenizers import Tokenizer, normalizers, processors

    text = folder.parent / "chat-text.txt"
    text.write_text(Path(__file__).read_text() * 3, encoding="utf-8")
    argv = ["--input", str(text), "--vocab-size", "700", "--special-tokens", *SPECIAL, "--output", str(folder)]
    assert train_tokenizer(argv) == 0
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if normalizer:
        backend.normalizer = getattr(normalizers, normalizer)()
    bos = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    backend.save(str(folder / "tokenizer.json"))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said |= {"bos_token": "<|begin_of_text|>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "special_tokens_map.json").unlink()
    (folder / "chat_template.jinja").write_text(template)
    return folder


def conversations(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of one to three questions and answers, words of many alphabets in them."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randrange(1, most)))

    turns = [[("user", text(30)), ("assistant", text(40))] for _ in range(3 * number)]
    return [
        {
            "messages": [
                {"role": r, "content": c} for turn in turns[3 * i : 3 * i + rng.randrange(1, 4)] for r, c in turn
            ]
        }
        for i in range(number)
    ]


def write(path: Path, records: list[Any]) -> Path:
    """JSON lines; text stands for a line as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
