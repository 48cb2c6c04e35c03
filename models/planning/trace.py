"""The pieces of a model on one rank, by running its real modules once on tensors without content.

A piece is what comes before the first layer, a layer of each kind, or what comes after the last one. Bytes and work of
a stage of any depth are sums over its pieces: ``stages.py``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from torch import Tensor
from torch._subclasses import FakeTensorMode

from megapatch.models.build import ModelOptions, build
from megapatch.models.device import seed_everything
from megapatch.models.family import HfConfig, find
from megapatch.models.layers.attention import window_of
from megapatch.models.planning.groups import pretending
from megapatch.models.planning.meter import Meter, Segment, Work, replaced
from megapatch.models.planning.saved import Saved, Watch
from megapatch.models.planning.stand_ins import converted, standing_in, workspace

BEFORE, AFTER = "before", "after"  # the layers of the first and of the last stage
ALIGNED = 64  # numbers: where tensors begin in the buffers of a distributed optimizer
RECEIVED, SENT = "received", "sent"  # instead of these, on other stages


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank; ``load``: what the busiest rank of experts gets, as a multiple of an even share."""

    seq_length: int
    samples: int
    load: float = 1.0


@dataclass(frozen=True)
class Piece:
    """Of one micro-batch: bytes it keeps from forward to backward pass; the most it has in each above what was there
    when its forward pass began; what stays in its modules until they run again; its parameters, those of them that are
    experts', numbers that pad them in buffers, and the largest tensor's; the work of each pass; what a layer saved that
    could wait in host memory (of the piece before the layers: what of that its caller holds)."""

    kept: int
    forward: int
    backward: int
    left: int
    parameters: int
    experts: int
    padding: int
    largest: int
    forward_work: Work = field(compare=False)
    backward_work: Work = field(compare=False)
    saved: tuple[Saved, ...] = ()


def layer_kinds(hf: HfConfig) -> list[str]:
    """Of each layer, a name of its kind: layers of a kind are alike in all but their numbers."""
    fields = find(hf).transformer_config(hf)
    pattern, window = fields.get("moe_layer_freq", 1), fields.get("window_size")
    mixture = [bool(fields.get("num_moe_experts")) and (pattern[n] if isinstance(pattern, list) else 1)
               for n in range(fields["num_layers"])]  # fmt: skip
    seen = _Windows(window, fields.get("window_attn_skip_freq"))
    return [("experts" if mixed else "dense") + seen.name(n) for n, mixed in enumerate(mixture)]


@dataclass(frozen=True)
class _Windows:
    window_size: Any
    window_attn_skip_freq: Any

    def name(self, layer: int) -> str:
        width = window_of(self, layer + 1) if self.window_size else None  # type: ignore[arg-type]
        return f", window {width}" if width else ""


@dataclass(frozen=True)
class Traced:
    """Each kind of piece by its name; bytes that all layers share; parameters of the embedding that a last stage of
    its own holds again, as its output layer."""

    pieces: dict[str, Piece]
    shared: int
    tied: int


def trace(hf: HfConfig, made: ModelOptions, batch: Batch, *, alone: bool = True) -> Traced:
    """Run each kind of piece once; with ``alone`` of a pipeline of one stage, else also what other stages have.

    ``made.parallel`` is without a pipeline: pieces do not depend on it.
    """
    kinds = layer_kinds(hf)
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    windows = find(hf).transformer_config(hf).get("window_size")
    run = range(max(first) + 1) if windows else first  # a window follows from a layer's number
    with _built(hf, made, run, batch) as (model, meter):
        names = [BEFORE, *(kinds[layer] for layer in run), AFTER]
        found = dict(zip(names, measured(model, meter, batch, True), strict=True))
        if not alone:
            ends = measured(model, meter, batch, False)
            # what came and went is held by the schedule, and nothing of it stays
            given = Counter(found[names[1]].saved) - Counter(ends[1].saved)
            received = replace(ends[0], left=0, saved=tuple(given.elements()))
            found |= {RECEIVED: received, SENT: replace(ends[-1], left=0)}
        again = model.share_embeddings_and_output_weights
        tied = model.embedding.word_embeddings.weight.numel() if again else 0
    return Traced(found, meter.shared, tied)


def whole(hf: HfConfig, made: ModelOptions, batch: Batch, layers: int | None = None) -> list[Piece]:
    """The pieces of the whole model, or of so many layers of it, each of them run: what sums are compared with."""
    with _built(hf, made, range(layers or len(layer_kinds(hf))), batch) as (model, meter):
        return measured(model, meter, batch, True)


@contextmanager
def _built(hf: HfConfig, made: ModelOptions, run: Sequence[int], batch: Batch) -> Iterator[tuple[Any, Meter]]:
    """These layers of the model, without content, and a meter that knows its parameters."""
    parallel = made.parallel
    world = max(parallel.tp * parallel.cp, parallel.expert_tp * parallel.ep)
    fields = find(hf).transformer_config(hf)
    pattern = fields.get("moe_layer_freq")
    shorter: dict[str, Any] = {"num_layers": len(run)}
    shorter |= {"moe_layer_freq": [pattern[layer] for layer in run]} if isinstance(pattern, list) else {}
    shorter |= {"perform_initialization": False, "calculate_per_token_loss": True}
    meter = Meter(workspace=workspace(made.device))
    with ExitStack() as stack:
        stack.enter_context(pretending(parallel, world, 0))
        seed_everything(0, 0)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        with replaced({(torch.nn.Module, "_apply"): converted}):
            model = build(hf, replace(made, overrides=made.overrides | shorter))[0]
        model = getattr(model, "module", model)  # without the wrapper that widens what stages exchange
        stack.enter_context(standing_in(made.device, meter, batch.load))
        meter.know([*model.parameters(), *model.buffers(), *_summing(model)])
        yield model.train(), meter


def _summing(model: Any) -> list[Tensor]:
    """Buffers where gradients are summed, as megatron-core's data parallelism does after each backward function."""
    buffers = []
    for parameter in model.parameters():
        main = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
        buffers.append(main)

        def add(parameter: Tensor, main: Tensor = main) -> None:
            assert parameter.grad is not None
            main.add_(parameter.grad)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add)
    return buffers


def measured(model: Any, meter: Meter, batch: Batch, alone: bool) -> list[Piece]:
    """Run forward and backward pass of one micro-batch; the pieces in order."""
    ends = (model.pre_process, model.post_process, model.decoder.final_layernorm)
    _become(model, *(ends if alone else (False, False, None)))
    hooks = [layer.register_forward_pre_hook(_marking(meter, n), with_kwargs=True)
             for n, layer in enumerate(model.decoder.layers)]  # fmt: skip
    last = model.decoder.final_layernorm
    if last is not None:
        hooks.append(last.register_forward_pre_hook(_marking(meter, len(model.decoder.layers)), with_kwargs=True))
    meter.segments.clear()
    watch = Watch([*model.parameters(), *model.buffers()])
    try:
        with watch.watching(model.decoder), meter:
            _run(model, meter, batch)
            meter.end()
    finally:
        for hook in hooks:
            hook.remove()
        _become(model, *ends)
    pieces = _pieces(meter.segments, _counts(model, alone))
    layers = watch.layers[: len(model.decoder.layers)]
    middle = [replace(piece, saved=saved) for piece, saved in zip(pieces[1:-1], layers, strict=True)]
    return [pieces[0], *middle, pieces[-1]]


def _become(model: Any, first: bool, last: bool, norm: Any) -> None:
    """A model of a pipeline's first stage, of its last, of both or of none."""
    model.pre_process = model.decoder.pre_process = first
    model.post_process = model.decoder.post_process = last
    model.decoder.final_layernorm = norm


def _marking(meter: Meter, number: int) -> Any:
    """A hook that begins piece ``number`` (before the layers: -1) in the forward pass, and ends it in the backward."""

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if meter.segments[-1].name != f"{number - 1}":
            return  # computed again
        meter.mark(f"{number}")
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: meter.mark(f"back {number - 1}", grad))

    return hook


def _run(model: Any, meter: Meter, batch: Batch) -> None:
    config = model.config
    length = batch.seq_length // config.context_parallel_size
    meter.mark("-1")
    shape = (batch.samples, length)
    tokens, labels, places = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    weights = torch.ones(shape)
    if not model.pre_process:
        own = length // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        size = (own, batch.samples, config.hidden_size)
        model.set_input_tensor(torch.empty(size, dtype=config.params_dtype, requires_grad=True))
    out = model(tokens, places, None, labels=labels, loss_mask=weights)
    if model.post_process:
        total = (out.float() * weights).sum()
        meter.mark(f"back {len(model.decoder.layers)}")
        total.backward()
    else:
        meter.mark(f"{len(model.decoder.layers)}")
        deallocate_output_tensor(out, config.deallocate_pipeline_outputs)
        meter.mark(f"back {len(model.decoder.layers)}")
        grad = torch.empty(size, dtype=config.params_dtype)
        out.register_hook(lambda grad: meter.mark(f"back {len(model.decoder.layers) - 1}", grad))
        if config.deallocate_pipeline_outputs:
            custom_backward(out, grad)
        else:
            torch.autograd.backward(out, grad_tensors=grad)
        model.set_input_tensor(None)


def _counts(model: Any, alone: bool) -> list[tuple[int, int, int, int]]:
    """Parameters as a piece tells them, before the layers, of each, and after them."""
    layers = [_count(layer.parameters()) for layer in model.decoder.layers]
    if not alone:
        return [_count([]), *layers, _count([])]
    before = [*model.embedding.parameters()]
    others = {id(x) for x in [*before, *model.decoder.layers.parameters()]}
    return [_count(before), *layers, _count(x for x in model.parameters() if id(x) not in others)]


def _count(parameters: Iterable[Tensor]) -> tuple[int, int, int, int]:
    numbers = [(x.numel(), getattr(x, "allreduce", True)) for x in parameters]
    every = [n for n, _ in numbers]
    return (
        sum(every),
        sum(n for n, dense in numbers if not dense),
        sum(-n % ALIGNED for n in every),
        max(every, default=0),
    )


def _pieces(segments: Sequence[Segment], counts: Sequence[tuple[int, int, int, int]]) -> list[Piece]:
    """Join each forward segment with the backward one of its name."""
    by_name, following = {s.name: s for s in segments}, dict(pairwise(s.name for s in segments))
    found: list[Piece] = []
    for number in reversed(range(-1, len(counts) - 1)):
        ahead, behind = by_name[f"{number}"], by_name[f"back {number}"]
        after = by_name[following[behind.name]]
        later = sum(piece.left for piece in found)  # is there, too, while this piece goes backward
        piece = Piece(
            ahead.end - ahead.begin,
            ahead.peak - ahead.begin,
            behind.peak - ahead.begin - later,
            behind.end - (0 if after.stays else after.handed) - ahead.begin - later,
            *counts[number + 1],
            ahead.work,
            behind.work,
        )
        found.insert(0, piece)
    hidden = by_name[f"back {len(counts) - 3}"].handed
    if found[-1].left < 0:  # the layers' output, which is kept by the last of them, and freed by what comes after it
        found[-1] = replace(found[-1], left=found[-1].left + hidden)
        found[0] = replace(found[0], left=found[0].left - hidden)
    return found
