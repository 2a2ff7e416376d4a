"""How long saving, loading and the fingerprint take, on BERT base with random weights (110 million parameters).

python benchmarks/finetuned.py
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import transformers

import jdelta
from jdelta.trees import fingerprint, surgery


def seconds(function: Callable[[], object], runs: int = 3) -> float:
    """The shortest of several runs."""

    def once() -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return min(once() for _ in range(runs))


def main() -> None:
    transformers.logging.set_verbosity_error()
    model = transformers.FlaxBertForSequenceClassification(transformers.BertConfig())
    leaves = {surgery.name_of(path): leaf for path, leaf in surgery.flatten(model.params).items()}
    held = sum(leaf.nbytes for leaf in leaves.values())
    print(f"backbone                        {sum(map(np.size, leaves.values())):,} parameters, {held / 1e6:.0f} MB")
    print(f"fingerprint                     {seconds(lambda: fingerprint.fingerprint(leaves), runs=1):.2f} s")
    print(f"fingerprint of the same arrays  {seconds(lambda: fingerprint.fingerprint(leaves)):.4f} s")

    delta = jdelta.LoraModel(model, lora_r=8)
    delta.freeze_module(["deltas", "classifier"])
    with tempfile.TemporaryDirectory() as folder:
        save = functools.partial(delta.save_finetuned, folder, allow_untrained=True)
        print(f"save_finetuned                  {seconds(save):.3f} s")
        print(f"load_finetuned                  {seconds(lambda: delta.load_finetuned(folder)):.3f} s")
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"the folder                      {size / 1e3:.0f} kB")
    before = jax.tree.leaves(jdelta.prune(model.params, "lora"))
    print(f"merge                           {seconds(lambda: (delta.merge(), delta.unmerge())):.2f} s, with unmerge")
    after = jax.tree.leaves(jdelta.prune(model.params, "lora"))
    print(f"weights after it                {'bit-equal' if all(map(np.array_equal, before, after)) else 'CHANGED'}")


if __name__ == "__main__":
    main()
