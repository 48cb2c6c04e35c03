"""transformers' side of a comparison: its own model without storage, filled layer by layer from safetensors."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

from megapatch.models import hf_files
from megapatch.models.cli import UserError
from megapatch.models.device import Device
from megapatch.models.family import HfConfig
from megapatch.models.load import HfWeights
from megapatch.models.shapes import Layout
from megapatch.models.transformers_types import refuse_unknown
from megapatch.tools.verify.points import KEY, QUERY, Watch, Weight
from megapatch.tools.verify.stream import OUTER, Engine, Unit, empty_parameters
from megapatch.tools.verify.switches import plain_attention

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN = "plain attention"
_number = count()


class Unlike(Exception):
    """transformers' model cannot be taken layer by layer; says why."""


class HfNames:
    """Which parameter of transformers' model each tensor of a file goes into."""

    def __init__(self, model: Any) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError as error:
            raise Unlike("it needs transformers 5 (weight conversion)") from error
        self.prefix, self.state = model.base_model_prefix, model.state_dict()
        self.mapping = get_model_conversion_mapping(model)
        self.renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        self.converters = [m for m in self.mapping if isinstance(m, WeightConverter)]

    def __call__(self, name: str) -> str | None:
        """The parameter's name; None where the model has no place for the tensor."""
        from transformers.core_model_loading import rename_source_key

        for renamings, converters in ((self.renamings, self.converters), ([], [])):
            found, _ = rename_source_key(name, renamings, converters, self.prefix, self.state)
            if found in self.state:
                return found
        return None


class Attention:
    """transformers' SDPA attention, seen on its way in; or the same by plain arithmetic, another summation order."""

    def __init__(self) -> None:
        self.name = f"megapatch_{next(_number)}"
        self.see: Callable[[str, Tensor], None] | None = None
        self.plain = False
        AttentionInterface.register(self.name, self)
        AttentionMaskInterface.register(self.name, sdpa_mask)

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        """q [b, n, s, d], k and v [b, g, s, d] -> [b, s, n, d]"""
        if self.see is not None:
            self.see(QUERY, q.transpose(1, 2))
            self.see(KEY, k.transpose(1, 2))
        if self.plain:
            return plain_attention(q, k, v, mask, kwargs.get("scaling")).transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    def watch(self, see: Callable[[str, Tensor], None]) -> Any:
        """Show queries and keys until the answer's ``remove`` is called."""
        self.see = see
        return self

    def remove(self) -> None:
        """Show no more."""
        self.see = None

    @contextmanager
    def switched(self, _: nn.Module) -> Iterator[None]:
        """Plain arithmetic while the context lasts."""
        self.plain = True
        yield
        self.plain = False


def engine(folder: Path, hf: HfConfig, ids: Tensor, device: Device, precision: str, rounded: bool) -> Engine:
    """``folder`` on transformers; with ``rounded`` every weight is one that bf16 can hold."""
    disable_progress_bar()
    refuse_unknown(hf, "choose --engine core, or compare core checkpoints")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with empty_parameters():
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision]).to(device.torch).eval()
    attention = Attention() if model._supports_attention_backend and _uses_sdpa(model) else None
    if attention:
        model.set_attn_implementation(attention.name)
    HfWeights(folder, hf)  # refuses a folder that does not fit its config.json
    names, layout = HfNames(model), Layout(hf)
    meaning: dict[str, list[Weight]] = {}
    for placed in layout.placed:
        for part, name in enumerate(placed.hf):
            weight = Weight(placed, part, layout)
            if (there := names(name)) is None:
                raise Unlike(f"transformers has no place for {name}")
            meaning.setdefault(there, []).append(weight)
    units = _units(model, meaning, layout)
    b, s = ids.shape
    watch = Watch(model, meaning, units, lambda x: x.unflatten(0, (b, s)) if x.dim() == 2 else x)

    def layer_hooks(path: str, points: dict[str, Tensor]) -> list[Any]:
        seen = [attention.watch(lambda name, value: watch.put(points, name, value))] if attention else []
        return seen + watch.layer(path, points)

    return Engine(
        model=model,
        forward=lambda: model(ids, use_cache=False).logits,
        units=units,
        load=_Loader(folder, model, names, device, rounded),
        watch=layer_hooks,
        outward=lambda x, unit: x,
        inward=lambda x: x.to(model.dtype),
        about=f"{folder}: transformers, {precision}",
        leaves=watch.leaves,
        streams={PLAIN: attention.switched} if attention and precision != "fp32" else {},
    )


def _uses_sdpa(model: Any) -> bool:
    return model.config._attn_implementation == "sdpa"


def _units(model: Any, meaning: Mapping[str, Sequence[Weight]], layout: Layout) -> dict[str, Unit]:
    """Module path -> unit: the modules of the layers, and those of the embedding, the final norm and the output."""
    units: dict[str, Unit] = {}
    for name, (weight, *_) in meaning.items():
        layer, core = weight.placed.layer, weight.placed.rule.core
        if layer is None and core.removesuffix(".weight") in OUTER:
            units[name.removesuffix(".weight")] = core.removesuffix(".weight")
        elif layer is not None:
            before, found, _ = name.partition(f".{layer}.")
            if not found:
                raise Unlike(f"{name} is in no list of layers")
            units[f"{before}.{layer}"] = layer
    output = model.get_output_embeddings()
    units.update({name: "output_layer" for name, module in model.named_modules() if module is output})
    return units


class _Loader:
    """Reads parameters by name, through transformers' own conversion."""

    def __init__(self, folder: Path, model: Any, names: HfNames, device: Device, rounded: bool) -> None:
        self.model, self.names, self.device, self.rounded = model, names, device, rounded
        files = {name: tensor.file for name, tensor in hf_files.tensors(folder).items()}
        self.files, self.sources = files, dict[str, list[str]]()
        for name in files:
            if (there := names(name)) is not None:  # early files hold buffers that follow from config.json
                self.sources.setdefault(there, []).append(name)
        first: dict[int, str] = {}
        tied = model.named_parameters(remove_duplicate=False)
        self.same = {name: first.setdefault(id(p), name) for name, p in tied}
        self.shape = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
        self._load([name for name, _ in model.named_buffers() if name in self.sources])

    def __call__(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """The values of these parameters."""
        stored = {name: self._stored(name) for name in names}
        found = self._load(sorted(set(stored.values())))
        values = {name: found[stored[name]] for name in names}
        return {name: v.bfloat16().to(v.dtype) if self.rounded else v for name, v in values.items()}

    def _stored(self, name: str) -> str:
        """The name under which a parameter's value is in the files: its own, or that of one it is tied to."""
        same = [other for other, first in self.same.items() if first == self.same[name] and other in self.sources]
        if not same:
            raise UserError(f"{name}: transformers' model has this weight, the folder has not; get the model again")
        return self.same[name] if self.same[name] in same else same[0]

    def _load(self, names: Sequence[str]) -> dict[str, Tensor]:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        stored = [n for name in names for n in self.sources[name]]
        opened = {path: safe_open(path, framework="pt") for path in {self.files[n] for n in stored}}  # unmapped after
        given = {n: opened[self.files[n]].get_slice(n) for n in stored}
        config = LoadStateDictConfig(
            device_map={"": self.device.torch}, dtype=self.model.dtype, weight_mapping=self.names.mapping
        )
        empty = {name: self.shape[name] for name in names if name in self.shape}
        convert_and_load_state_dict_in_model(self.model, given, config)
        found = {name: self.model.get_parameter(name).detach() for name in empty}
        for name, parameter in empty.items():
            path, _, leaf = name.rpartition(".")
            self.model.get_submodule(path)._parameters[leaf] = parameter
        if missing := [name for name, value in found.items() if value.is_meta]:
            raise Unlike(f"transformers does not convert {missing[0]} by itself")
        return found


def whole(folder: Path, hf: HfConfig, ids: Tensor, device: Device) -> Tensor:
    """fp32 logits [b, s, v] of the whole model at once."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device.torch).eval()(ids).logits
