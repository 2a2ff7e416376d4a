"""Folders that anybody may have written: every damage is an error that names the file, or loads what was saved."""

import contextlib
import copy
import json
import random
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn
from safetensors.numpy import save
from tiers import breadth

import jdelta
from jdelta.saved import folder
from jdelta.saved.finetuned import Finetuned, _checksum

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="out")(nn.Dense(6, name="up")(x))


@pytest.fixture(scope="module")
def net():
    x = jnp.ones((2, 4))
    return Net(), Net().init(jax.random.key(0), x), (x,)


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    """A LoRA with every argument set, as it was saved and as it lies on the disk."""
    path = tmp_path_factory.mktemp("saved") / "lora"
    delta = jdelta.LoraModel(
        jdelta.Backbone(*net),
        [r"[r]\w+"],
        exclude_modules=["up"],
        unfrozen_modules=["up.bias"],
        lora_r=2,
        rank_pattern={"out": 3},
        alpha_pattern={"out": 5.0},
    )
    delta.save_finetuned(path, noisy(delta.backbone_model.params))
    return path, Finetuned.read(path), json.loads((path / folder.CONFIG).read_text())


def at(path, description, tensors):
    """A folder with a description, a dict or bytes, and the tensors of another folder."""
    path.mkdir(exist_ok=True)
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    (path / folder.CONFIG).write_bytes(text)
    if not (path / folder.TENSORS).exists():
        (path / folder.TENSORS).write_bytes((tensors / folder.TENSORS).read_bytes())
    return path


def equal(found, other):
    """Whether two saved deltas are the same, with the same bits."""
    same = all(
        getattr(found, key) == getattr(other, key) for key in vars(found) if key not in ("values", "backbone")
    ) and (found.backbone is None) == (other.backbone is None)
    return same and all(np.array_equal(found.values[key], value) for key, value in other.values.items())


NESTED = [[[[[]]]]]
WRONG = [None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", "x", "\ud800", "a\0b", [], {}, [{}], [None]]
WRONG += [{"x": {}}, [NESTED], {"": NESTED}, "y" * 2000, [1] * 50]


def places(value, path=()):
    """The paths of all values in a description."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(description, path, change):
    """The description with the value at this path changed: `change(holder, key)`."""
    new = copy.deepcopy(description)
    holder = new
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return new


def damages(description):
    """Every value replaced by everything that is wrong somewhere, or missing; and keys that nobody knows."""
    for path in places(description):
        for wrong in WRONG:
            yield path, changed(description, path, lambda holder, key, wrong=wrong: holder.__setitem__(key, wrong))
        yield path, changed(description, path, lambda holder, key: holder.pop(key))
        if isinstance(path[-1], str):
            yield path, changed(description, path, lambda holder, key: holder.update({f"{key}_": holder.pop(key)}))


def signed(description):
    """The description with the checksum that it should have, if one can be made."""
    with contextlib.suppress(UnicodeError):
        description["description_sha256"] = _checksum(description)
    return description


def read(path):
    """What a folder holds, or the `ValueError` that names a file of it."""
    try:
        return Finetuned.read(path)
    except ValueError as error:
        text = str(error)
    return text if (folder.CONFIG in text or folder.TENSORS in text) and len(text) < 3000 else pytest.fail(text[:3000])


@pytest.mark.parametrize("share", breadth([0.3, 1.0], 0.3))
def test_every_field_replaced_by_everything_wrong_is_a_value_error_or_the_same(saved, tmp_path, share):
    path, original, description = saved
    rng, count = random.Random(0), 0
    for where, new in damages(description):
        if rng.random() > share:
            continue
        count += 1
        found = read(at(tmp_path / "new", new, path))
        assert isinstance(found, str) or equal(found, original), where
    assert count > 500 * share


@pytest.mark.parametrize("share", breadth([0.05, 1.0], 0.05))
def test_a_damaged_description_with_a_right_checksum_is_a_value_error_or_attaches(net, saved, tmp_path, share):
    path, _, description = saved
    rng, model, attached = random.Random(0), jdelta.Backbone(*net), 0
    params = model.params
    for where, new in damages(description):
        if where[0] == "description_sha256" or rng.random() > share:
            continue
        if isinstance(found := read(at(tmp_path / "new", signed(new), path)), str):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                delta = jdelta.AutoDeltaModel.from_finetuned(found, model)
            except ValueError:
                assert model.params is params
            else:
                attached += 1
                delta.remove()
                params = model.params
    assert attached


@pytest.mark.parametrize("seeds", breadth([100, 3_000], 100))
def test_bytes_that_changed_are_a_value_error_or_the_same(saved, tmp_path, seeds):
    path, original, _ = saved
    whole = (path / folder.CONFIG).read_bytes()
    for seed in range(seeds):
        rng = random.Random(seed)
        text, position = bytearray(whole), rng.randrange(len(whole))
        match rng.randrange(5):
            case 0 | 1:
                text[position] ^= 1 << rng.randrange(8)
            case 2:
                text[position : position + rng.randrange(1, 80)] = b""
            case 3:
                text[position:position] = rng.choice(
                    [b"[" * 9, b"9" * 30, b"NaN", b"\xff", b"\xef\xbb\xbf", b'"', b"{}"]
                )
            case 4:
                text[position:] = b""
        found = read(at(tmp_path / "new", bytes(text), path))
        assert isinstance(found, str) or equal(found, original), seed


def test_one_bit_of_an_argument_is_noticed(saved, tmp_path):
    path, _, _ = saved
    text = (path / folder.CONFIG).read_text()
    assert '"lora_alpha": 16.0' in text
    new = text.replace('"lora_alpha": 16.0', '"lora_alpha": 96.0').encode()
    with pytest.raises(ValueError, match=r"delta_config\.json was changed after it was saved"):
        Finetuned.read(at(tmp_path / "new", new, path))


def test_a_folder_of_an_earlier_version_loads(saved, tmp_path):
    path, original, description = saved
    old = {key: value for key, value in description.items() if key != "description_sha256"} | {"jdelta_format": 1}
    assert equal(Finetuned.read(at(tmp_path / "new", old, path)), original)


NOT_JSON = {
    "nothing": (b"", "delta_config"),
    "a list": (b"[]", "no JSON object, but list"),
    "lists in lists": (b"[" * 100_000, "nested deeper"),
    "lists in lists that end": (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
    "some lists in lists": (b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}", "nested deeper than 20"),
    "a number of 5,000 digits": (b'{"name": ' + b"9" * 5000 + b"}", "'name' is no finite number of 64 bits"),
    "a number of 5,000 digits behind a dot": (b'{"name": 1.' + b"9" * 5000 + b"}", "'jdelta_format' is missing"),
    "infinity": (b'{"arguments": {"lora_alpha": Infinity}}', "'arguments.lora_alpha' is no finite"),
    "an exponent": (b'{"arguments": {"lora_alpha": 1e999}}', "'arguments.lora_alpha' is no finite"),
    "a double key": (b'{"name": "a", "name": "b"}', "the key 'name' is there twice"),
    "Latin-1": ('{"name": "é"}'.encode("latin-1"), "not in UTF-8"),
    "UTF-16": ('{"name": "a"}'.encode("utf-16"), "not in UTF-8"),
    "a byte order mark": (b'\xef\xbb\xbf{"name": "a"}', "BOM"),
    "half a character": (b'{"targets": ["\\ud800"]}', "'targets.0' is no Unicode"),
    "too much": (b" " * (2**24 + 1), "bytes"),
}


@pytest.mark.parametrize("text", NOT_JSON)
def test_what_is_no_description_is_a_value_error(saved, tmp_path, text):
    path, _, _ = saved
    data, message = NOT_JSON[text]
    with pytest.raises(ValueError, match=message):
        Finetuned.read(at(tmp_path / "new", data, path))


# --- tensors


def with_header(header, data=b"\0" * 40):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start=0, end=40, shape=(10,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HEADERS = {
    "an overlap": (with_header({"a": tensor(0, 40), "b": tensor(20, 40, (5,))}), "'a' and 'b' overlap"),
    "a gap": (with_header({"a": tensor(4, 40, (9,))}), "the file's bounds and 'a' have a gap"),
    "less than the file": (with_header({"a": tensor(0, 36, (9,))}), "'a' and the file's bounds have a gap"),
    "more than the file": (with_header({"a": tensor(0, 44, (11,))}), "'a' and the file's bounds overlap"),
    "an absurd offset": (with_header({"a": tensor(0, 2**62, (2**60,))}), "'a' and the file's bounds overlap"),
    "offsets the other way": (with_header({"a": tensor(40, 0)}), "does not have the -40 bytes"),
    "another size": (with_header({"a": tensor(shape=(11,))}), "does not have the 40 bytes"),
    "an absurd shape": (with_header({"a": tensor(shape=(2**62, 2**62))}), "does not have the 40 bytes"),
    "a negative axis": (with_header({"a": tensor(shape=(-10,))}), "has shape"),
    "a shape of floats": (with_header({"a": tensor(shape=(10.0,))}), "has shape"),
    "a shape of bools": (with_header({"a": tensor(shape=(True, 10))}), "has shape"),
    "one offset": (with_header({"a": {**tensor(), "data_offsets": [0]}}), "data_offsets"),
    "an unknown dtype": (with_header({"a": tensor(dtype="F31")}), "dtype 'F31'"),
    "an unknown key": (with_header({"a": {**tensor(), "x": 1}}), "entry of 'a'"),
    "a list": (with_header([]), "no JSON object, but list"),
    "no JSON": (with_header(b"{"), "Expecting"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}, "a": tensor()}), "__metadata__"),
    "a double": (with_header(b'{"a": %b, "a": %b}' % ((json.dumps(tensor()).encode(),) * 2)), "'a' is there twice"),
    "a header beyond the file": ((10**18).to_bytes(8, "little") + b"{}", "cut off"),
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_does_not_fit_its_file_names_the_tensor(saved, tmp_path, header):
    path, _, description = saved
    data, message = HEADERS[header]
    at(tmp_path / "new", description, path)
    (tmp_path / "new" / folder.TENSORS).write_bytes(data)
    with pytest.raises(ValueError, match=rf"delta\.safetensors is no whole safetensors file .*{message}"):
        Finetuned.read(tmp_path / "new")


@pytest.mark.parametrize("count", breadth([20_000, 700_000], 20_000))
def test_a_header_of_very_many_tensors_is_refused_before_it_is_read(saved, tmp_path, count):
    path, _, description = saved
    header = b"{%b}" % b",".join(
        b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(count)
    )
    at(tmp_path / "new", description, path)
    (tmp_path / "new" / folder.TENSORS).write_bytes(with_header(header, b""))
    before = time.perf_counter()
    with pytest.raises(ValueError, match=r"its header has [\d,]+ bytes; for what is expected here"):
        Finetuned.read(tmp_path / "new")
    assert time.perf_counter() - before < 1


def test_an_empty_tensor_and_a_scalar_come_back(tmp_path):
    values = {"b": np.zeros((0, 3), np.float32), "a": np.array(2.5, np.float16), "c": np.arange(3, dtype=np.int8)}
    folder.write(tmp_path / "out", {"leaves": {}}, values, "card")
    _, found, intact = folder.read(tmp_path / "out")
    assert intact
    assert list(found) == ["a", "b", "c"]
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)


# --- PEFT

PEFT_CONFIG = {  # as PEFT 0.17 writes it
    "alpha_pattern": {"up": 8},
    "auto_mapping": None,
    "base_model_name_or_path": "some/bert",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.1,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": ["out"],
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 2,
    "rank_pattern": {"up": 3},
    "revision": None,
    "target_modules": ["up"],
    "target_parameters": None,
    "task_type": "SEQ_CLS",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def peft_tensors():
    shapes = {"up.lora_A.weight": (3, 4), "up.lora_B.weight": (6, 3), "out.weight": (4, 6), "out.bias": (4,)}
    rng = np.random.default_rng(0)
    return {f"base_model.model.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("share", breadth([0.01, 0.4], 0.01))
def test_every_damage_of_an_adapter_of_peft_is_a_value_error_or_a_delta(net, tmp_path, share):
    model = jdelta.Backbone(*net)
    (tmp_path / ADAPTER).write_bytes(save(peft_tensors()))
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(PEFT_CONFIG))
    jdelta.from_peft(tmp_path, model).remove()  # it does load
    params, rng, loaded = model.params, random.Random(0), 0
    for where, new in damages(PEFT_CONFIG):
        if rng.random() > share:
            continue
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(new))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                delta = jdelta.from_peft(tmp_path, model)
        except ValueError as error:
            message = str(error)
        else:
            loaded += 1
            delta.remove()
            params, message = model.params, str(tmp_path)
        assert str(tmp_path) in message, where
        assert model.params is params, where
    assert loaded


ODD_FIELDS = {
    "no heads": ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "token_dim": 16, "num_attention_heads": 0}),
    "a rank of 0": {"r": 0},
    "an infinite alpha": {"lora_alpha": float("inf")},
    "a rank that is a bool": {"r": True},
    "a rank of a pattern that is a text": {"rank_pattern": {"up": "3"}},
    "modules to save that are none": {"modules_to_save": [{}]},
    "a bias that is none": {"bias": ["all"]},
    "a type that is none": {"peft_type": ["LORA"]},
}


@pytest.mark.parametrize("odd", ODD_FIELDS)
def test_a_field_of_peft_that_makes_no_sense_is_named(net, tmp_path, odd):
    fields = ODD_FIELDS[odd]
    (tmp_path / ADAPTER).write_bytes(save(peft_tensors()))
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(PEFT_CONFIG | fields))
    with pytest.raises(ValueError, match="|".join(key for key in fields if fields[key] != "PREFIX_TUNING")):
        jdelta.from_peft(tmp_path, jdelta.Backbone(*net))


def test_a_header_of_very_many_tensors_of_peft_is_refused_before_it_is_read(net, tmp_path):
    header = b"{%b}" % b",".join(
        b'"base_model.model.bert.%d.lora_A":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(20_000)
    )
    (tmp_path / ADAPTER).write_bytes(with_header(header, b""))
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(PEFT_CONFIG))
    with pytest.raises(ValueError, match="its header has"):
        jdelta.from_peft(tmp_path, jdelta.Backbone(*net))
