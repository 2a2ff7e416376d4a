"""The keys of PEFT's files, as PEFT writes them when nothing is around its model.

Files that were saved in other ways have more in their keys: the adapter's name (`lora_A.default.weight`), what wraps
the model or parts of it (`_orig_mod` of torch.compile, `module` of data parallelism), PEFT's own prefix twice, or not
at all.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable

from jdelta.saved.finetuned import listing
from jdelta.saved.peft.names import NORM, PROMPT, TOKENS, Names, Tensors
from jdelta.saved.peft.tuners import TUNERS

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LEAD = re.compile(rf"(?:{'|'.join(_WRAPPERS)}|base_model(?:\.model)?)\.")
_SHARED = sorted({end for tuner in TUNERS.values() for end in tuner.shared.values()})
_ENDS = {end.removesuffix(".weight") for tuner in TUNERS.values() for end in tuner.tensors.values()}.union(_SHARED)
_NAMES = ("lora_(?:embedding_)?[AB]", "lora_magnitude_vector", NORM, TOKENS, *sorted(map(re.escape, _ENDS)))
_TENSOR = rf"\.(?:{'|'.join(_NAMES)})"
_INSIDE = re.compile(rf"(?:{_TENSOR}|\.base_layer|\.modules_to_save|\.original_module)(?:\.|$)")
_NAMED = re.compile(rf"(.+{_TENSOR})\.(?!weight$|bias$)([^.]+)((?:\.weight|\.bias)?)")
_OWN = re.compile(rf".+{_TENSOR}(?:\.|$)")
_TO_SAVE = re.compile(r"(.+\.modules_to_save)\.([^.]+)\.(.+)")
_PROMPT = re.compile(rf"(?:.+\.)?(?:{PROMPT}|prompt_encoder\.([^.]+)\.embedding\.weight)")
_ROOT = re.compile(rf"(?:(?:{'|'.join(_WRAPPERS)}|base_model)\.)*({'|'.join(map(re.escape, _SHARED))})(?:\.([^.]+))?")


def normalized(tensors: Tensors, prefix: str, names: Names) -> Tensors:
    """The tensors by the names of the model's modules, with PEFT's words in them: `….query.lora_A.weight`.

    What a model's own module is called is never taken for a wrapper: only what keeps a key from meaning a module of the
    model is taken off.

    Args:
      tensors: by the keys of the file.
      prefix: what PEFT puts before every key.
      names: of the model.

    Raises:
      ValueError: the file holds several adapters, or two keys mean the same.
    """
    at_root = {key: (PROMPT, match[1]) for key in tensors if (match := _PROMPT.fullmatch(key))}
    at_root |= {key: (match[1], match[2]) for key in tensors if (match := _ROOT.fullmatch(key))}
    plain = _unwrapped([key for key in tensors if key not in at_root], prefix, names)
    adapters = {name for _, name in at_root.values() if name}
    unnamed = False
    for key, name in list(plain.items()):
        if match := _NAMED.fullmatch(name):
            plain[key] = match[1] + match[3]
            adapters.add(match[2])
        elif _OWN.match(name):
            unnamed = True
    for key, name in list(plain.items()):
        if match := _TO_SAVE.fullmatch(name):
            module = match[1].removesuffix(".modules_to_save")
            named = {f"{module}.{match[2]}.{match[3]}": False, f"{module}.{match[3]}": True}
            if match[2] in adapters or next((n for leaf, n in named.items() if _is_leaf(names, leaf)), False):
                plain[key] = f"{match[1]}.{match[3]}"
                adapters.add(match[2])
    if len(adapters) > 1 or (adapters and unnamed and any(_NAMED.search(key) for key in tensors)):
        found = [*map(repr, sorted(adapters)), *(["one without a name"] if unnamed else [])]
        raise ValueError(
            f"the file holds {len(found)} adapters: {', '.join(found)}. Save one alone, for example with "
            "model.save_pretrained(…, selected_adapters=[…])."
        )
    plain |= {key: end for key, (end, _) in at_root.items()}
    if double := [name for name, count in Counter(plain.values()).items() if count > 1]:
        both = [key for key in tensors if plain[key] == double[0]]
        raise ValueError(f"two keys of the file mean {double[0]!r}: {listing(both)}.")
    return {plain[key]: tensor for key, tensor in tensors.items()}


def _unwrapped(keys: list[str], prefix: str, names: Names) -> dict[str, str]:
    """Each key without what is around the names of modules, the same at the start of all of them."""
    leads = set.intersection(*({*_leads(key)} for key in keys)) if keys else {""}
    usual = [lead for lead in leads if re.fullmatch(rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*{re.escape(prefix)}", lead)]
    best: tuple[int, int, dict[str, str]] | None = None
    for lead in [*sorted(usual, key=len), *sorted(leads.difference(usual), key=len)]:
        found = {key: _inner(key.removeprefix(lead), names.find) for key in keys}
        unknown = sum(name is None for name in found.values())
        taken = sum(len(key) - len(lead) - len(name) for key, name in found.items() if name is not None)
        if best is None or (unknown, taken) < best[:2]:
            best = unknown, taken, {key: name or key.removeprefix(lead) for key, name in found.items()}
    assert best is not None
    return best[2]


def _leads(key: str) -> Iterable[str]:
    """What may be in front of a key's names: nothing, and every part of its start that no name has to be."""
    at = 0
    yield ""
    while match := _LEAD.match(key, at):
        yield from {key[: at + len("base_model.")]} if match[0] == "base_model.model." else ()
        at = match.end()
        yield key[:at]


def _inner(key: str, find: Callable[[str], str | None]) -> str | None:
    """The key with the fewest wrappers in its middle taken off so that it means a module; `None` if none does."""
    inside = _INSIDE.search(key)
    end = inside.start() if inside else key.rindex(".") if "." in key else len(key)
    parts, rest = key[:end].split("."), key[end:]
    at = [i for i, part in enumerate(parts) if part in _WRAPPERS]
    for count in range(len(at) + 1) if len(at) <= 6 else (0, len(at)):
        hits = set()
        for off in itertools.combinations(at, count):
            name = ".".join(part for i, part in enumerate(parts) if i not in off)
            if find(name) is not None:
                hits.add(name)
        if len(hits) > 1:
            raise ValueError(f"the key {key!r} may mean any of {listing(sorted(hits))}.")
        if hits:
            return hits.pop() + rest
    return None


def _is_leaf(names: Names, name: str) -> bool:
    try:
        return bool(names.leaf(name))
    except ValueError:
        return False
