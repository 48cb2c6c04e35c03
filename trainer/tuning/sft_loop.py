"""The training loop of mp-sft: the one of all training, over batches that say what they hold."""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

from megapatch.models import family
from megapatch.models.layers.spec import mixture_layers
from megapatch.trainer.data.sample_places import Samples, in_conversations
from megapatch.trainer.data.sources import BySource
from megapatch.trainer.loop import Trainer
from megapatch.trainer.pretrain import Plan
from megapatch.trainer.ranks import warn
from megapatch.trainer.saving import checkpoint
from megapatch.trainer.session import Session
from megapatch.trainer.sizes.flops import flops_per_token
from megapatch.trainer.step import Batches, StepResult
from megapatch.trainer.tuning import sft_data
from megapatch.trainer.tuning.adapters import num_trained
from megapatch.trainer.tuning.sft_batches import GlobalBatch
from megapatch.trainer.tuning.sft_options import SftOptions
from megapatch.trainer.watching.metrics import Log

log = logging.getLogger(__name__)


class SftTrainer(Trainer):
    """Runs a session to its last step; the log says of each step what was trained."""

    batch: GlobalBatch

    def remember(self, batch: GlobalBatch) -> Batches:
        """The batch of the step that comes, which is asked when that step is recorded."""
        self.batch = batch
        return batch

    def _record(self, result: StepResult, *args: Any, **words: Any) -> None:
        tokens = round(self.batch.counts["tokens"])
        super()._record(replace(result, tokens=tokens, extra=result.extra | self.batch.said), *args, **words)


def _tell_balancing(session: Session, options: SftOptions) -> None:
    """Warn where experts are balanced over more than a conversation, which seq_aux_loss is for."""
    config = session.config
    if options.packing and config.moe_router_load_balancing_type == "seq_aux_loss" and config.moe_aux_loss_coeff:
        warn(
            log,
            "seq_aux_loss of config.json or --moe-aux-loss: balances experts over all conversations of a forward pass, "
            "%d tokens, not over each; with --no-packing it does, over the padding too",
            options.pass_shape[0],
        )


def make_trainer(session: Session, records: Log, plan: Plan) -> SftTrainer:
    """The loop and its batches; every rank must call."""
    options, vocab_size = session.options, family.vocab_size(session.hf)
    assert isinstance(options, SftOptions)
    samples, valid = sft_data.build(options, plan.tokenizer, session.num_samples)
    checkpoint.reads(session, samples.names)
    _tell_balancing(session, options)
    held = valid or samples  # without validation, eval_steps are 0
    for split, blend in (("training", samples), ("validation", valid)):
        for about in blend.about if blend else []:
            records.write("data", split=split, **about)
            log.info(
                "%s: %s  %s conversations in %s rows, %s %% full; %s truncated, %s tokens lost",
                *(split, about["prefix"], about["conversations"], about["rows"], about["fill_percent"]),
                *(about["truncated"], about["lost_tokens"]),
            )
    read: Any = Samples(samples, in_conversations, remember=options.log_sample_ids)
    made = partial(GlobalBatch, options=options, vocab_size=vocab_size)
    trained, validated = (BySource(blend.names, session.device.torch) for blend in (samples, held))
    trainer = SftTrainer(
        session,
        records=records,
        source=plan.source,
        num_micro_batches=plan.count,
        flops_per_token=flops_per_token(
            *(session.config, vocab_size, samples.context, sum(mixture_layers(session.config))),
            adapters=num_trained(session.hf, options),
        ),
        train=lambda start: trainer.remember(made(read, start, trained)),
        valid=lambda step: made(held, step * options.global_batch_size, validated),
        eval_steps=options.eval_iters if valid is not None else 0,
    )
    trainer.samples, trainer.trained, trainer.validated = read, trained, validated
    return trainer
