"""The sides of tests/bench/train.py: each gives a function that makes one training step and returns its loss."""

import argparse
import os
from collections.abc import Callable
from typing import Any

LR, DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
Step = Callable[[], float]  # makes a step; its loss


def make_model(args: argparse.Namespace) -> int:
    """FOLDER/model with a tokenizer, and data; the number of parameters."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, Qwen3Config

    from megapatch.models.indexed_data import write_index

    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 192),
        head_dim=64,
        max_position_embeddings=args.seq_length,
        tie_word_embeddings=True,
    )
    net = AutoModelForCausalLM.from_config(config)
    net.save_pretrained(args.folder / "model")
    made = Tokenizer(models.WordLevel({str(i): i for i in range(args.vocabulary)}, unk_token="0"))
    made.save(str(args.folder / "model" / "tokenizer.json"))
    (args.folder / "model" / "tokenizer_config.json").write_text('{"eos_token": "0"}')
    row = np.random.default_rng(0).integers(1, args.vocabulary, args.seq_length)
    count = num_steps(args) * args.global_batch_size * args.seq_length + 1
    np.resize(row.astype(np.int32), count).tofile(args.folder / "data.bin")  # all samples are one: order is nothing
    write_index(args.folder / "data.idx", np.array([count], np.int64), np.dtype(np.int32))
    return sum(p.numel() for p in net.parameters())


def num_steps(args: argparse.Namespace) -> int:
    """Steps of a side in all."""
    return args.rounds + 2


class LastLoss:
    """A sink that keeps the last loss."""

    loss = 0.0

    def write(self, record: dict) -> None:
        self.loss = record.get("loss", self.loss)

    def close(self) -> None:
        pass


def our_trainer(args: argparse.Namespace) -> Any:
    """mp-pretrain up to its first step."""
    from megapatch.models import cli, device
    from megapatch.trainer.options import PretrainOptions

    found = device.start()
    from megapatch.trainer.pretrain import make_plan, prepare

    folder, steps = args.folder, num_steps(args)
    words = f"--model {folder}/model --data-path {folder}/data --save {folder}/run-{os.getpid()} --train-iters {steps}"
    words += f" --split 1 --lr {LR} --lr-schedule constant --weight-decay {DECAY} --clip-grad {CLIP}"
    words += f" --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]} --precision {args.precision} --log-interval {steps}"
    for name in ("seq_length", "micro_batch_size", "global_batch_size"):
        words += f" --{name.replace('_', '-')} {getattr(args, name)}"
    options = cli.parser(PretrainOptions, prog="mp-pretrain").parse_args(words.split())
    trainer, records = prepare(options, found, make_plan(options))
    records.sinks.append(LastLoss())
    return trainer


def our_step(args: argparse.Namespace) -> Step:
    """A step of mp-pretrain."""
    trainer = our_trainer(args)

    def step() -> float:
        trainer._one_step()
        return trainer.records.sinks[-1].loss

    return step


def core_step(args: argparse.Namespace) -> Step:
    """The same with megatron-core's own model, layers, loss and optimizer step; of our patches, what a CPU needs."""
    from megapatch.models import device

    device.make_faster = lambda: None  # type: ignore[assignment]
    device.start()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megapatch.models import build
    from megapatch.trainer import session
    from megapatch.trainer import step as step_module
    from megapatch.trainer.saving import optimizer_state

    def block_spec(config: Any, *_: Any) -> TransformerBlockSubmodules:
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
        return TransformerBlockSubmodules([layer] * config.num_layers, WrappedTorchNorm)

    def update(session: Any) -> float | None:
        done, norm, _ = session.optimizer.step()
        session.schedule.step(increment=session.options.global_batch_size)
        return float(norm) if done else None

    build.spec.block_spec = block_spec  # type: ignore[assignment]
    build.Model, build.fuse_activations = GPTModel, lambda model: None  # type: ignore[assignment,misc]
    step_module.update = update
    allocate = optimizer_state.allocate

    def unfused(optimizer: Any) -> None:
        allocate(optimizer)
        for group in optimizer.param_groups:
            group |= {"fused": None, "foreach": None}

    session.optimizer_state.allocate = unfused
    return our_step(args)


def their_step(args: argparse.Namespace, pure: bool = False) -> Step:
    """A usual training loop's step over the same samples; with ``pure``, weights are bf16 and have no masters."""
    import torch
    from transformers import AutoModelForCausalLM

    batches = their_batches(args)
    net = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=torch.bfloat16 if pure else torch.float32)
    matrices = [p for p in net.parameters() if p.dim() > 1]
    norms = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    count = args.global_batch_size // args.micro_batch_size
    net.train()

    def step() -> float:
        total = 0.0
        for _ in range(count):
            tokens, labels = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16" and not pure):
                logits = net(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def floor_step(args: argparse.Namespace) -> Step:
    """The products with the weights alone, forward and backward, each by the faster of MKL and oneDNN."""
    import torch

    h, tokens = args.hidden, args.micro_batch_size * args.seq_length
    layer = [(h + 2 * 64 * max(1, h // 192), h), (h, h), (6 * h, h), (h, 3 * h)]
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    shapes = [shape for shape in layer for _ in range(args.layers)] + [(args.vocabulary, h)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    sums = [torch.zeros(shape) for shape in shapes] if dtype == torch.float32 else []
    inputs = {k: torch.randn(tokens, k, dtype=dtype) for _, k in shapes}
    grads = {n: torch.randn(tokens, n, dtype=dtype) for n, _ in shapes}
    linear = torch.ops.mkldnn._linear_pointwise

    @torch.no_grad()
    def step() -> float:
        for _ in range(args.global_batch_size // args.micro_batch_size):
            for weight in weights:
                linear(inputs[weight.shape[1]], weight, None, "none", [], "")
                linear(grads[weight.shape[0]], weight.t(), None, "none", [], "")
            for i, (n, k) in enumerate(shapes):
                sums[i].addmm_(grads[n].t(), inputs[k]) if sums else grads[n].t() @ inputs[k]
        return 0.0

    return step


def their_batches(args: argparse.Namespace) -> Any:
    """Tokens and labels [b, s], read here so that nothing of megatron-core is in memory."""
    import numpy as np
    import torch

    row = np.fromfile(args.folder / "data.bin", np.int32, args.seq_length + 1).astype(np.int64)
    rows = torch.from_numpy(row).expand(args.micro_batch_size, -1)
    while True:
        yield rows[:, :-1], rows[:, 1:]


SIDE: dict[str, Callable[[argparse.Namespace], Step]] = {
    "ours": our_step,
    "transformers": their_step,
    "transformers, pure bf16": lambda args: their_step(args, pure=True),
    "core": core_step,
    "floor": floor_step,
}
