#!/usr/bin/env bash
# The whole path on this machine, offline, in minutes: text -> tokenizer -> data -> model -> training at TP=2 with a
# kill -9 and a resume -> Hugging Face folder -> generation -> report.html. Every claim is checked; a failed one fails.
#   scripts/quickstart.sh [--input FILE...] [--model HF_FOLDER] [--output FOLDER] [--steps N]
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/steps.sh
source "$MEGAPATCH_ROOT/scripts/steps.sh"

input=() model="" out="$PWD/quickstart" steps=60
while [ $# -gt 0 ]; do
    case "$1" in
        --input) shift; while [ $# -gt 0 ] && [[ "$1" != --* ]]; do input+=("$1"); shift; done
            [ ${#input[@]} -gt 0 ] || { echo "--input needs a text file, or several" >&2; exit 2; } ;;
        --model) model="${2:?--model needs a Hugging Face folder}"; shift 2 ;;
        --output) out="${2:?--output needs a folder}"; shift 2 ;;
        --steps) steps="${2:?--steps needs a number}"; shift 2
            [[ "$steps" =~ ^([6-9]|[1-9][0-9]{1,8})$ ]] || { echo "--steps $steps: expected 6 or more" >&2; exit 2; } ;;
        *) sed -n '2,4s/^# *//p' "${BASH_SOURCE[0]}"; [ "$1" = --help ] || { echo "unknown: $1" >&2; exit 2; }; exit ;;
    esac
done
use_env
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ ${#input[@]} = 0 ]; then input=("$(python -c 'import os; print(os.path.dirname(os.__file__))')"/*.py); fi
begin_steps "$out"

if [ -z "$model" ]; then
    model="$out/model"
    step "train a tokenizer" mp-train-tokenizer --input "${input[@]}" --vocab-size 4096 --output "$out/tokenizer"
    step "make a Qwen3 model" mp-new-model --model-type qwen3 --tokenizer "$out/tokenizer" --target "$model" \
        --dtype fp32 --set hidden_size=128 intermediate_size=384 num_hidden_layers=4 num_attention_heads=4 \
        num_key_value_heads=2 head_dim=32 max_position_embeddings=512 tie_word_embeddings=true
fi
step "tokenize the text" mp-preprocess --input "${input[@]}" --tokenizer "$model" --output-prefix "$out/data"
step "convert to megatron-core" mp-convert --source "$model" --target "$out/core"

half=$((steps / 2))
cat >"$out/train.args" <<END
--model "$out/core" --data-path "$out/data" --split 95,5,0 --tp 2 --sequence-parallel --seq-length 256 --micro-batch-size 4
--global-batch-size 16 --train-iters $steps --lr 3e-3 --min-lr 3e-4 --lr-warmup-iters $((steps / 10))
--save-interval $((steps / 3)) --eval-interval $half --eval-iters 2 --log-interval $((steps / 6))
END
train=(torchrun --standalone --nproc-per-node 2 --no-python mp-pretrain "@$out/train.args")
step "train at TP=2, uninterrupted" "${train[@]}" --save "$out/straight"
step "train again, kill -9 after step $half" killed_after "$half" "$out/run/log.jsonl" "${train[@]}" --save "$out/run"
step "resume and finish" "${train[@]}" --save "$out/run"
verify mp-check --name "killed and resumed: loss and gradient norm of every step are bitwise the uninterrupted run's" \
    --equal "$out/straight/log.jsonl" "$out/run/log.jsonl" --where event=train --fields loss grad_norm lr
verify mp-check --name "the loss on held-out text fell" --falls "$out/run/log.jsonl" --where event=eval --fields loss

step "export to a Hugging Face folder" mp-convert --source "$out/run" --target "$out/exported"
printf '%s\n' 'def read(self, size=-1):' 'import os' '    for name in' 'class Error(Exception):' >"$out/prompts.txt"
generate=(mp-generate --input "$out/prompts.txt" --format text --max-new-tokens 48)
step "generate with megatron-core" "${generate[@]}" --model "$out/run" --output "$out/megatron.jsonl"
step "generate with transformers" "${generate[@]}" --model "$out/exported" --engine transformers --output "$out/hf.jsonl"
verify mp-check --name "greedy text of megatron-core and of transformers is the same, token by token" \
    --equal "$out/megatron.jsonl" "$out/hf.jsonl" --key id --fields token_ids text
verify mp-verify --source "$out/run" --target "$out/exported"
finish_steps uninterrupted="$out/straight/log.jsonl" "killed and resumed=$out/run/log.jsonl"
