"""mp-preprocess: text to ids, in megatron-core's indexed format."""

import json
import logging

from megapatch.models.cli import run
from megapatch.models.indexed_data import manifest_path
from megapatch.models.tokenizer import Tokenizer
from megapatch.tools.preprocess.corpus.job import Corpus
from megapatch.tools.preprocess.corpus.options import Options
from megapatch.tools.preprocess.encoding.encoder import Encoder
from megapatch.tools.preprocess.reading.inputs import find_sources
from megapatch.tools.preprocess.run.pipeline import run_job
from megapatch.tools.preprocess.run.workers import quiet_engine

_LOG = logging.getLogger("megapatch.tools.preprocess")
EXAMPLES = """examples:
  mp-preprocess --input 'wiki/*.jsonl.gz' books.jsonl --tokenizer Qwen3-0.6B --output-prefix data/train --split 98,2
  mp-preprocess --input /usr/lib/python3.11 --glob '*.py' --on-bad-line skip --tokenizer tok --output-prefix data/code
  curl -s https://example.org/big.jsonl.zst | mp-preprocess --input - --tokenizer tok --output-prefix data/big
  sbatch --array=0-15 --wrap 'mp-preprocess --input *.jsonl --shards 16 --shard $SLURM_ARRAY_TASK_ID --tokenizer tok \\
    --output-prefix data/part$SLURM_ARRAY_TASK_ID --resume'"""


def preprocess(options: Options) -> None:
    """Write all outputs and their manifests, or nothing."""
    sources = find_sources(options)
    if options.shards > 1 and (options.deduplicate or options.max_tokens):
        _LOG.warning("--deduplicate and --max-tokens: each shard by itself; merged they are not the undivided output")
    with quiet_engine():
        encoder = Encoder(Tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code), options)
        job = Corpus(options, encoder)
        run_job(job, sources, options)
    if options.json:
        found = [json.loads(manifest_path(output.prefix).read_bytes()) for output in job.outputs]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Run mp-preprocess; the exit status."""
    return run(Options, preprocess, prog="mp-preprocess", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
