"""What files hold of the model in config.json: other names, further copies, layers less. Imports no torch."""

from collections.abc import Collection, Container, Iterable
from fnmatch import fnmatchcase

from megapatch.models.family import HfConfig, find, placed_rules, tied_embeddings


def full_names(hf: HfConfig, names: Iterable[str], wanted: Container[str]) -> dict[str, str]:
    """Name in a folder's files -> in the whole model: the prefix added where the bare model's files lack it.

    Buffers, which follow from config.json, are left out.
    """
    found = find(hf)
    kept = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in found.buffers)]
    if any(name.startswith(found.prefix) for name in kept):
        return {name: name for name in kept}
    return {name: name if name in wanted else found.prefix + name for name in kept}


def plain(hf: HfConfig) -> HfConfig:
    """config.json without the layers that files may lack (multi-token prediction)."""
    return {**hf, **find(hf).optional}


def as_held(hf: HfConfig, names: Collection[str]) -> HfConfig:
    """What config.json says, or ``plain`` of it where none of these tensors is of a layer that files may lack."""
    without = plain(hf)
    if without == hf:
        return hf
    all_names, plain_names = (
        {name for placed in placed_rules(c) for name in (*placed.hf, placed.key(True), placed.key(False))}
        for c in (hf, without)
    )
    return hf if (all_names - plain_names).intersection(names) else without


def copies(hf: HfConfig) -> dict[str, str]:
    """Names that files may hold although config.json says that they repeat another weight, and which."""
    family = find(hf)
    rules = {rule.core: rule.hf[0] for rule in family.rules(hf)}
    tied = tied_embeddings(hf) and "output_layer.weight" in rules
    output = {rules["output_layer.weight"]: rules["embedding.word_embeddings.weight"]} if tied else {}
    return {**family.copies(hf), **output}


def lacking(hf: HfConfig, held: HfConfig) -> list[str]:
    """What to tell of a config.json whose files hold only ``held``."""
    said = ", ".join(f"{key} {hf[key]}" for key in find(hf).optional if hf.get(key) != held.get(key))
    return [f"config.json says {said}, but the source has no such layer; neither has the target"] if said else []
