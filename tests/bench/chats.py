"""mp-preprocess-chat beside transformers' apply_chat_template on real text: python tests/bench/chats.py --help"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from real_text import collect

from megapatch.models.cli import FAILED, Common, opt, run
from megapatch.models.indexed_data import IndexedDocuments

TOOL = [sys.executable, "-m", "megapatch.tools.preprocess.preprocess_chat"]
TRAIN = [sys.executable, "-m", "megapatch.tools.preprocess.train_tokenizer"]
LINE = "{:28} {:>10} {:>10} {:>16}"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Time mp-preprocess-chat, one worker, and transformers' apply_chat_template in turns; compare all ids and masks.

    Conversations of one to four questions and answers, about 1 KB, are cut from the text that this machine has; the
    template is ChatML with generation tags, and without them for the second figure. CPU seconds of all processes
    include the start; the rate does not: it is that of twice as many conversations less that of once as many.
    """

    number: int = opt("conversations", 12_000)
    rounds: int = opt("how often each is measured", 3)
    seed: int = opt("order and cutting of the text", 1)
    vocab_size: int = opt("tokens of the tokenizer", 32_768)
    folder: Optional[Path] = opt("where to work, kept (default: a temporary folder); text is made once", None)


def bench(options: Options) -> int:
    """Print samples as JSON lines, then a table of medians on stderr; 1 when an id or a mask differs."""
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        folder.mkdir(exist_ok=True)
        prepare(folder, options)
        samples: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name, measure in (("transformers", by_transformers), ("tagged", by_tool), ("untagged", by_tool)):
                rate = measure(folder, name, options.number)
                samples.setdefault(name, []).append(rate)
                print(json.dumps({"name": name, "per_s": round(rate)}), flush=True)
        differ = sum(differing(folder, name, options.number) for name in ("tagged", "untagged"))
        tell(samples, differ, options)
    return FAILED if differ else 0


def prepare(folder: Path, options: Options) -> None:
    """Text, tokenizers with and without tags, and conversations."""
    text, tok = folder / "text.jsonl", folder / "tagged"
    if not text.exists():
        collect(text, 30e6, options.seed)
    if not tok.exists():
        size = str(options.vocab_size)
        argv = [*TRAIN, "--input", str(text), "--vocab-size", size, "--chat-template", "chatml", "--output", str(tok)]
        subprocess.run(argv, check=True)
        shutil.copytree(tok, folder / "untagged")
        template = (tok / "chat_template.jinja").read_text()
        for tag in ("{%- generation %}\n", "{%- endgeneration %}\n"):
            template = template.replace(tag, "")
        (folder / "untagged" / "chat_template.jinja").write_text(template)
    write(folder / "chats.jsonl", conversations(text, options.number, options.seed))
    write(folder / "twice.jsonl", conversations(text, 2 * options.number, options.seed))


def conversations(text: Path, number: int, seed: int) -> list[Any]:
    """Questions and answers cut from the texts, in turn."""
    rng = random.Random(seed)
    texts = [json.loads(line)["text"] for line in text.open(encoding="utf-8")]
    made = []
    while len(made) < number:
        source = texts[len(made) % len(texts)]
        at = rng.randrange(max(1, len(source) - 1200))
        messages = []
        for _ in range(rng.randrange(1, 5)):
            for role, most in (("user", 150), ("assistant", 500)):
                size = rng.randrange(20, most)
                messages.append({"role": role, "content": source[at : at + size] or "nothing"})
                at += size
        made.append({"messages": messages})
    return made


def write(path: Path, records: list[Any]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")


def by_tool(folder: Path, name: str, number: int) -> float:
    """Conversations per CPU second: the time of twice as many less the time of once as many."""
    times = []
    for data in ("chats", "twice"):
        argv = ["--input", str(folder / f"{data}.jsonl"), "--tokenizer", str(folder / name), "--workers", "1"]
        began = os.times()
        prefix = str(folder / f"out-{name}-{data}")
        subprocess.run([*TOOL, *argv, "--output-prefix", prefix, "--force"], check=True, stderr=subprocess.DEVNULL)
        ended = os.times()
        times.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
    return number / (times[1] - times[0])


def by_transformers(folder: Path, _: str, number: int) -> float:
    """Conversations per CPU second of apply_chat_template, JSON included; the answers are kept for the comparison."""
    tokenizer = loaded(folder)
    began = time.process_time()
    for line in (folder / "chats.jsonl").open(encoding="utf-8"):
        rendered(tokenizer, json.loads(line)["messages"])
    return number / (time.process_time() - began)


def loaded(folder: Path) -> Any:
    """transformers' tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder / "tagged"))


def rendered(tokenizer: Any, messages: list[Any]) -> Any:
    """ids and mask as transformers makes them."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)


def differing(folder: Path, name: str, number: int) -> int:
    """How many of all conversations have other ids or masks than transformers'."""
    tokenizer = loaded(folder)
    ids, masks = (IndexedDocuments(folder / f"out-{name}-chats{end}") for end in ("", "_mask"))
    assert len(ids) == len(masks) == number
    count = 0
    for line, mine, mask in zip((folder / "chats.jsonl").open(encoding="utf-8"), ids, masks, strict=True):
        theirs = rendered(tokenizer, json.loads(line)["messages"])
        count += theirs["input_ids"] != mine.tolist() or theirs["assistant_masks"] != mask.tolist()
    return count


def tell(samples: dict[str, list[float]], differ: int, options: Options) -> None:
    """The table."""
    middle = {name: statistics.median(rates) for name, rates in samples.items()}
    print(LINE.format("conversations per CPU second", "median", "times", "range"), file=sys.stderr)
    for name, rates in samples.items():
        row = f"{middle[name]:,.0f}", f"{middle[name] / middle['transformers']:.1f}"
        print(LINE.format(name, *row, f"{min(rates):,.0f}-{max(rates):,.0f}"), file=sys.stderr)
    print(f"{differ} of {2 * options.number:,} differ from transformers in ids or mask", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    return run(Options, bench, prog="bench/chats.py", argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
