"""The table of common names against real traces of every Flax class of transformers."""

import functools
import re
import sys
from unittest import mock

import jax.numpy as jnp
import pytest
import zoo
from flax import linen as nn
from tiers import breadth

import jdelta
from jdelta.hosts.adapting import adapt
from jdelta.names import common_names, guess
from jdelta.names.common_names import NAMES, TABLE, register_common_names, resolve
from jdelta.names.table import as_tuple

CLASSES = zoo.classes()
CNNS = [name for name in CLASSES if zoo.family_of(name) in ("resnet", "regnet")]
LAYERS = HEADS = 2
HIDDEN, WIDE, VOCAB = 16, 32, 60

UNTIED = {"tie_word_embeddings": False}
CROSS = {"is_decoder": True, "add_cross_attention": True, **UNTIED}
VARIANTS = {
    **{
        f"{name} untied": (name, UNTIED)
        for name in CLASSES
        if name.endswith(("LM", "ForConditionalGeneration", "LMHeadModel", "MTModel")) or "ForPreTraining" in name
    },
    **{
        f"Flax{family}ForCausalLM with cross-attention": (f"Flax{family}ForCausalLM", CROSS)
        for family in ("Bert", "BigBird", "Electra", "Roberta", "RobertaPreLayerNorm", "XLMRoberta")
    },
    "FlaxGPT2LMHeadModel with cross-attention": ("FlaxGPT2LMHeadModel", CROSS),
    "block-sparse BigBird": (
        "FlaxBigBirdModel",
        {"attention_type": "block_sparse", "max_position_embeddings": 64},
    ),
    "gated T5": ("FlaxT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    "T5 encoder": ("FlaxT5EncoderModel", {}),
    "gated, transient-global LongT5": (
        "FlaxLongT5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "encoder_attention_type": "transient-global"},
    ),
    "BEiT without mean pooling": ("FlaxBeitModel", {"use_mean_pooling": False}),
    "masked BEiT": ("FlaxBeitForMaskedImageModeling", {"vocab_size": VOCAB}),
    "SwiGLU DINOv2": ("FlaxDinov2Model", {"use_swiglu_ffn": True}),
    "CTC wav2vec2": ("FlaxWav2Vec2ForCTC", {"vocab_size": VOCAB}),
    "bottleneck ResNet": ("FlaxResNetForImageClassification", {"layer_type": "bottleneck"}),
}
CASES = {**{name: (name, {}) for name in CLASSES}, **VARIANTS}
ATTENDING = [case for case in CASES if CASES[case][0] not in CNNS]


# One of each kind: fused and separate projections, grouped heads, cross-attention, images, sound, no attention.
QUICK = (
    "FlaxBertForSequenceClassification",
    "FlaxGPT2LMHeadModel",
    "FlaxLlamaForCausalLM",
    "FlaxBartForConditionalGeneration",
    "FlaxT5ForConditionalGeneration untied",
    "FlaxVisionTextDualEncoderModel",
    "FlaxWhisperForAudioClassification",
    "block-sparse BigBird",
)
QUICK_CNN = "FlaxResNetForImageClassification"


@functools.cache
def traced(case):
    """The structure of a case, and the paths of the modules in which attention weights were computed."""
    class_name, changes = CASES[case]
    model = zoo.build(class_name, changes, _do_init=False)
    paths = set()

    def spy(file, weights):
        def record(*args, **kwargs):
            paths.add(nn.module._context.module_stack[-1].path)
            return weights(*args, **kwargs)

        return mock.patch.object(file, "dot_product_attention_weights", record)

    spies = [
        spy(file, file.dot_product_attention_weights)
        for name, file in list(sys.modules.items())
        if name.startswith("transformers.models.") and "dot_product_attention_weights" in vars(file)
    ]
    for patch in spies:
        patch.start()
    try:
        return adapt(model).structure(), paths
    finally:
        for patch in spies:
            patch.stop()


def named(case, *names):
    """What the common names mean in a case; nothing, where it has none."""
    structure = traced(case)[0]
    try:
        return resolve(structure, names)
    except ValueError as error:
        if "has none of the common names" in str(error):
            return []
        raise


def paths_of(infos):
    return [info.path for info in infos]


def width(info):
    return info.y.shape[-1]


def is_linear(info):
    return "kernel" in info.params and not issubclass(info.type, nn.Conv)


def layers_of(case):
    """How many layers with self-attention, and how many with cross-attention, the configuration asks for."""
    class_name, changes = CASES[case]
    config = zoo.config(zoo.family_of(class_name), **changes)
    if zoo.family_of(class_name) == "albert":
        return 1, 0  # one layer, called twice
    if class_name == "FlaxBartForCausalLM":
        return LAYERS, LAYERS  # initialised with cross-attention, which a call without an encoder skips
    if config.is_encoder_decoder and not class_name.endswith(("AudioClassification", "EncoderModel")):
        return 2 * LAYERS, LAYERS
    if hasattr(config, "vision_config"):
        return 2 * LAYERS, 0
    return LAYERS, LAYERS * config.add_cross_attention


def test_there_are_126_classes_of_40_families():
    mappings = vars(zoo.modeling_flax_auto)
    families = {key for name, m in mappings.items() if re.fullmatch("FLAX_MODEL_.*MAPPING_NAMES", name) for key in m}
    assert len(CLASSES) == 126
    assert len(families) == 40
    assert families - zoo.FAMILIES.keys() == {"gpt-sw3"}  # another name of GPT-2's class


# --- every class is covered


@pytest.mark.parametrize("case", breadth(ATTENDING, *QUICK))
def test_attention_and_feed_forward_are_found_on_every_layer(case):
    own, cross = layers_of(case)
    for name in ("attn", "attn.q", "attn.k", "attn.v", "attn.proj", "attn.layer_norm", "ff.w2", "ff.layer_norm"):
        assert len(named(case, name)) == own, name
    gated = len(named(case, "ff.w1")) == 2 * own
    assert gated or len(named(case, "ff.w1")) == own
    assert gated == (zoo.family_of(CASES[case][0]) in ("llama", "mistral", "gemma", "mt5") or "gated" in case)
    for name in ("crossattn", "crossattn.q", "crossattn.k", "crossattn.v", "crossattn.proj", "crossattn.layer_norm"):
        assert len(named(case, name)) == cross, name


@pytest.mark.parametrize("case", breadth([*CNNS, "bottleneck ResNet"], QUICK_CNN))
def test_blocks_and_convolutions_are_found_where_there_is_no_attention(case):
    structure = traced(case)[0]
    blocks = named(case, "block")
    assert len(blocks) == 3
    assert [info.y.shape[-1] for info in blocks] == [8, 16, 16]
    convolutions = [info for info in structure if info.type is nn.Conv and "embedder" not in info.path]
    assert named(case, "conv") == convolutions
    assert all(any(info.path[: len(b.path)] == b.path for b in blocks) for info in convolutions)
    assert named(case, "attn", "ff", "layer_norm", "embeddings") == []


@pytest.mark.parametrize("case", breadth(CASES, *QUICK, QUICK_CNN))
def test_embeddings_are_those_of_tokens_or_of_patches(case):
    structure = traced(case)[0]
    tokens = [info for info in structure if info.type is nn.Embed and info.fields["num_embeddings"] == VOCAB]
    patches = [info for info in structure if info.type is nn.Conv and info.fields["kernel_size"] == (4, 4)]
    assert named(case, "embeddings") == sorted(tokens + patches, key=list(structure).index)
    without = zoo.family_of(CASES[case][0]) in ("resnet", "regnet", "wav2vec2")  # and Whisper's encoder alone
    assert bool(tokens or patches) != (without or case == "FlaxWhisperForAudioClassification")


@pytest.mark.parametrize("case", breadth(CASES, *QUICK, QUICK_CNN))
def test_heads_are_the_modules_that_give_logits(case):
    """A head over the vocabulary is as wide as it; a classifier is the last linear module, outside the layers."""
    structure = traced(case)[0]
    heads = named(case, "lm_head.proj")
    assert all(width(info) == VOCAB for info in heads)
    wide = [info for info in structure if is_linear(info) and width(info) == VOCAB]
    assert [info for info in heads if is_linear(info)] == wide
    classifiers = named(case, "classifier")
    if "Classification" in case or "QuestionAnswering" in case or "MultipleChoice" in case or "NextSentence" in case:
        assert classifiers == [info for info in structure if is_linear(info)][-1:]
    assert all(is_linear(info) and width(info) in (1, 2, 3) for info in classifiers)
    no_logits = case.endswith("Model") and "LMHead" not in case and "MT" not in case and "Decoder" not in case
    assert not (no_logits and (heads or classifiers))


@pytest.mark.slow
def test_every_class_with_a_head_has_it_under_a_common_name_unless_it_is_tied():
    without = set()
    for name in CLASSES:
        head = not name.endswith("Model") or name.endswith(("LMHeadModel", "MTModel"))
        if head and not named(name, "lm_head.proj", "classifier"):
            without.add(name)
    without.remove("FlaxWav2Vec2ForPreTraining")  # contrastive: no logits
    for name in without:
        with pytest.raises(ValueError, match="tied head"):
            resolve(traced(name)[0], ["lm_head.proj"])
        assert named(f"{name} untied", "lm_head.proj")


# --- and each name points to what it says


@pytest.mark.parametrize("case", breadth(ATTENDING, *QUICK))
def test_attn_is_where_attention_weights_are_computed_and_projected(case):
    computed = traced(case)[1]
    homes = paths_of(named(case, "attn", "crossattn"))
    if "DistilBert" not in case and "block-sparse" not in case:  # these two have their own product
        assert computed
    for path in computed:
        assert sum(path[: len(home)] == home for home in homes) == 1, path
    for home in homes if computed else ():
        assert any(path[: len(home)] == home for path in computed), home
    for kind in ("attn", "crossattn"):
        for part in ("q", "k", "v", "proj"):
            inside = paths_of(named(case, f"{kind}.{part}"))
            for home, path in zip(paths_of(named(case, kind)), inside, strict=True):
                assert path[: len(home)] == home


@pytest.mark.parametrize("case", breadth(ATTENDING, *QUICK))
def test_the_widths_are_those_of_the_configuration(case):
    family = zoo.family_of(CASES[case][0])
    wide = {"bloom": 4 * HIDDEN}.get(family, WIDE)
    narrow = HIDDEN // HEADS if family in ("llama", "mistral", "gemma") else HIDDEN
    fused = family in ("gpt2", "bloom")
    for kind in ("attn", "crossattn"):
        for info in named(case, f"{kind}.q"):
            if kind == "attn" and ("c_attn" in info.path or fused):
                assert (info.x.shape[-1], width(info)) == (HIDDEN, 3 * HIDDEN)
                assert info in named(case, "attn.k")
                assert info in named(case, "attn.v")
            else:
                assert (info.x.shape[-1], width(info)) == (HIDDEN, HIDDEN)
                assert info.path[-1][0] == "q"
        for info in named(case, f"{kind}.k", f"{kind}.v"):
            held = {"c_attn": 3 if kind == "attn" else 2, "query_key_value": 3}.get(info.path[-1], 1)
            assert width(info) == (held * HIDDEN if held > 1 else narrow)
            assert held > 1 or info.path[-1][0] == ("k" if info in named(case, f"{kind}.k") else "v")
        for info in named(case, f"{kind}.proj"):
            assert (info.x.shape[-1], width(info)) == (HIDDEN, HIDDEN)
    if case != "SwiGLU DINOv2":
        assert {(info.x.shape[-1], width(info)) for info in named(case, "ff.w1")} == {(HIDDEN, wide)}
        assert {(info.x.shape[-1], width(info)) for info in named(case, "ff.w2")} == {(wide, HIDDEN)}


@pytest.mark.parametrize("name", ["FlaxT5Model", "FlaxMT5Model", "FlaxLongT5Model", "FlaxGemmaModel"])
def test_query_and_output_projection_are_told_apart_by_their_widths(name):
    """Where the heads together are not as wide as the model, at 2 × 12, a mix-up would show."""
    changes = {"head_dim": 12} if "Gemma" in name else {"d_kv": 12}
    structure = adapt(zoo.build(name, changes, _do_init=False)).structure()
    assert {width(info) for info in resolve(structure, ["attn.q", "crossattn.q"])} == {24}
    assert {(info.x.shape[-1], width(info)) for info in resolve(structure, ["attn.proj", "crossattn.proj"])} == {
        (24, HIDDEN)
    }


@pytest.mark.parametrize("case", breadth(CASES, *QUICK, QUICK_CNN))
def test_layer_norms_are_norms(case):
    norms = named(case, "layer_norm")
    for info in norms:
        assert "Norm" in info.type.__name__
        assert {leaf.shape for leaf in info.params.values()} == {(HIDDEN,)}


@pytest.mark.parametrize("case", breadth(ATTENDING, *QUICK))
def test_projections_run_before_what_they_feed(case):
    order = {path: i for i, path in enumerate(paths_of(traced(case)[0]))}
    for kind in ("attn", "crossattn"):
        for part in ("q", "k", "v"):
            pairs = zip(paths_of(named(case, f"{kind}.{part}")), paths_of(named(case, f"{kind}.proj")), strict=True)
            assert all(order[a] < order[b] for a, b in pairs)
    w1, w2 = paths_of(named(case, "ff.w1")), paths_of(named(case, "ff.w2"))
    assert all(order[a] < order[b] for a, b in zip(w1[:: len(w1) // len(w2)], w2, strict=True))


GUESSED = [
    name
    for family, name in zoo.REPRESENTATIVE.items()
    # blocks of blocks, a bias table among the projections, one norm for two, norms in odd places, cross c_attn, convs
    if family not in ("albert", "t5", "mt5", "longt5", "gptj", "roberta-prelayernorm")
    and not family.endswith("net")
    and family != "vision-encoder-decoder"
]


@pytest.mark.parametrize("name", breadth(GUESSED, zoo.REPRESENTATIVE["bert"], zoo.REPRESENTATIVE["bart"]))
def test_the_table_says_what_the_names_of_the_modules_suggest(name):
    """Guesses, which know nothing of the table, agree with it."""
    structure = traced(name)[0]
    for block, guessed in guess.guess(structure).items():
        info = next(info for info in structure if info.type.__name__ == block)
        there = {
            (key, path)
            for key, paths in TABLE[block].items()
            for path in as_tuple(paths)
            if ".".join((*info.path, path)) in structure.modules
        }
        assert {(key, path) for key, paths in guessed.items() for path in as_tuple(paths)} == there


@pytest.mark.slow
def test_no_entry_of_the_table_is_dead():
    seen = set()
    for case in CASES:
        structure = traced(case)[0]
        for info in structure:
            for name, paths in TABLE.get(info.type.__name__, {}).items():
                for path in as_tuple(paths):
                    if ".".join((*info.path, path) if path else info.path) in structure.modules:
                        seen.add((info.type.__name__, name, path))
    wanted = {(block, name, path) for block in TABLE for name in TABLE[block] for path in as_tuple(TABLE[block][name])}
    assert sorted(wanted - seen) == []
    assert {name for _, name, _ in wanted} == set(NAMES)


# --- wherever the blocks are


class Tagger(nn.Module):
    """A user's own head on BERT."""

    bert: nn.Module

    @nn.compact
    def __call__(self, ids):
        ones = jnp.ones_like(ids)
        hidden = self.bert(ids, ones, ones * 0, ones * 0, None, return_dict=False)[0]
        return nn.Dense(3)(hidden)


def test_a_family_is_found_inside_a_users_module():
    bert = zoo.build("FlaxBertModel", _do_init=False).module
    model = jdelta.Backbone(Tagger(bert=bert))
    layers = [f"bert.encoder.layer.{i}.attention.self" for i in range(LAYERS)]
    assert jdelta.LoraModel(model).targets == [f"{layer}.{part}" for layer in layers for part in ("query", "value")]


def test_both_halves_of_composites_are_found():
    names = {info.path[0] for info in named("FlaxVisionTextDualEncoderModel", "attn")}
    assert names == {"text_model", "vision_model"}
    for case in ("FlaxEncoderDecoderModel", "FlaxVisionEncoderDecoderModel", "FlaxSpeechEncoderDecoderModel"):
        assert {info.path[0] for info in named(case, "attn")} == {"encoder", "decoder"}
        assert {info.path[0] for info in named(case, "crossattn")} == {"decoder"}


def test_layers_under_remat_are_found():
    model = zoo.build("FlaxBertModel", _do_init=False)
    module = model.module.clone(gradient_checkpointing=True)
    ids = jnp.zeros((1, 3), jnp.int32)
    structure = jdelta.Backbone(module, dummy_inputs=(ids, ids, ids, ids, None)).structure()
    assert len(resolve(structure, ["attn.q"])) == LAYERS


# --- a new family


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(8, name=name)(x)[..., None, :] for name in ("wq", "wk", "wv"))
        return nn.Dense(HIDDEN, name="wo")(nn.dot_product_attention(q, k, v)[..., 0, :])


class ToyBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + Attention(name="mix")(nn.LayerNorm(name="norm_1")(x))
        h = nn.Dense(WIDE, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(HIDDEN, name="down")(nn.gelu(h)), None


class Toy(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, HIDDEN, name="tokens")(ids)
        if self.scan:
            stack = nn.scan(ToyBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name="blocks")(x, None)
        else:
            for i in range(3):
                x, _ = ToyBlock(name=f"block_{i}")(x)
        return nn.Dense(VOCAB, name="head")(x)


@pytest.fixture
def restored_table():
    """The table as it was before a test that registers something."""
    with mock.patch.dict(TABLE):
        yield


def toy(scan=False):
    return jdelta.Backbone(Toy(scan), dummy_inputs=(jnp.array([[5, 6, 7, 8]]),))


@pytest.mark.usefixtures("restored_table")
@pytest.mark.parametrize("scan", [False, True])
def test_the_error_on_an_unknown_model_shows_it_and_the_line_to_write(scan):
    model = toy(scan)
    with pytest.raises(ValueError, match="Toy has no block of a known family") as caught:
        jdelta.LoraModel(model)
    text = str(caught.value)
    layers = "blocks ToyBlock 1×4×16 → 1×4×16 called 3" if scan else "block_0-2 (3 layers) ToyBlock 1×4×16 → 1×4×16"
    assert layers in text
    assert "tokens Embed 1×4 → 1×4×16" in text
    assert text.count("wq Dense 1×4×16 → 1×4×8") == 1
    assert "modified_modules=['mix.wq', 'mix.wv']" in text
    (line,) = re.findall(r"jdelta\.register_common_names\(.*\)", text)
    eval(line, {"jdelta": common_names})
    assert TABLE["ToyBlock"] == {
        "attn": ("mix",),
        "attn.q": ("mix.wq",),
        "attn.k": ("mix.wk",),
        "attn.v": ("mix.wv",),
        "attn.proj": ("mix.wo",),
        "attn.layer_norm": ("norm_1",),
        "ff.w1": ("up",),
        "ff.w2": ("down",),
        "ff.layer_norm": ("norm_2",),
    }
    layers = ["blocks"] if scan else [f"block_{i}" for i in range(3)]
    assert jdelta.LoraModel(model).targets == [f"{layer}.mix.{part}" for layer in layers for part in ("wq", "wv")]
    adapter = jdelta.AdapterModel(model, ["ff.w2"], common_structure=True, bottleneck_dim=2)
    assert adapter.targets == [f"{layer}.down" for layer in layers]
    jdelta.ParallelAdapterModel(model, bottleneck_dim=2)
    jdelta.BitFitModel(model)


@pytest.mark.usefixtures("restored_table")
def test_a_registered_class_covers_its_subclasses_and_may_be_registered_again():
    class Special(ToyBlock):
        pass

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Special(name="only")(x)[0]

    x = jnp.ones((1, 4, HIDDEN))
    structure = jdelta.Backbone(Net(), dummy_inputs=(x,)).structure()
    register_common_names(ToyBlock, {"attn.q": "mix.wq", "block": ""})
    assert [info.name for info in resolve(structure, ["attn.q"])] == ["only.mix.wq"]
    assert [info.name for info in resolve(structure, ["block"])] == ["only"]
    register_common_names("Special", {"attn.q": ("mix.wk", "mix.wv")})
    assert [info.name for info in resolve(structure, ["attn.q"])] == ["only.mix.wk", "only.mix.wv"]


@pytest.mark.usefixtures("restored_table")
def test_a_built_in_entry_may_be_replaced():
    register_common_names("FlaxBertLayer", {"attn.q": "attention.self.key"})
    assert {info.path[-1] for info in named("FlaxBertModel", "attn.q")} == {"key"}


@pytest.mark.usefixtures("restored_table")
def test_all_names_of_one_entry_that_end_with_layer_norm_are_meant():
    register_common_names(ToyBlock, {"layer_norm": "norm_1", "ff.layer_norm": "norm_2"})
    structure = toy(scan=True).structure()
    assert [info.name for info in resolve(structure, ["layer_norm"])] == ["blocks.norm_1", "blocks.norm_2"]


def test_a_class_that_only_shares_a_known_name_is_unknown():
    class FlaxBertLayer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="query")(x)

    structure = jdelta.Backbone(FlaxBertLayer(), dummy_inputs=(jnp.ones((1, 3)),)).structure()
    with pytest.raises(ValueError, match="no block of a known family"):
        resolve(structure, ["attn.q"])


def test_a_long_model_is_shown_in_forty_lines():
    class Long(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(60):
                x = nn.Dense(3 + i)(x)
            return x

    structure = jdelta.Backbone(Long(), dummy_inputs=(jnp.ones((1, 3)),)).structure()
    with pytest.raises(ValueError, match=r"Dense_38 Dense 1×40 → 1×41\n *… and 21 more") as caught:
        resolve(structure, ["attn.q"])
    assert "Dense_39" not in str(caught.value)
    assert "register_common_names" not in str(caught.value)  # nothing repeated, nothing like attention


def test_a_name_that_is_none_gets_the_closest():
    with pytest.raises(
        ValueError, match=r"'attn\.query' is no common name\. Did you mean 'attn\.q'\? There are: attn,"
    ):
        resolve(traced("FlaxBertModel")[0], ["attn.query"])


def test_names_that_a_model_lacks_are_an_error_that_says_what_it_has():
    with pytest.raises(ValueError, match=r"FlaxResNetModule has none of .* attn, ff\. It has: block, conv\.$"):
        resolve(traced("FlaxResNetModel")[0], ["attn", "ff"])
    assert common_names.known(traced("FlaxResNetModel")[0], ["attn", "ff"]) == []
    with pytest.raises(ValueError, match=r"none of .* lm_head\.proj\. It has: attn, .*'lm_head' cannot .*tied head"):
        resolve(traced("FlaxGPT2LMHeadModel")[0], ["lm_head.proj"])


@pytest.mark.parametrize(
    ("block", "names", "error", "message"),
    [
        (3, {"attn": "x"}, TypeError, "the block is a class of linen or nnx, or its name, got 3"),
        (int, {"attn": "x"}, TypeError, "the block is a class of linen or nnx, or its name"),
        (ToyBlock(), {"attn": "x"}, TypeError, "the block is a class of linen or nnx, or its name"),
        ("my.Block", {"attn": "x"}, ValueError, "'my.Block' is not the name of a class"),
        ("Block", ["attn"], TypeError, r"the names are a mapping .*got \['attn'\]"),
        ("Block", {}, ValueError, "no names were given for Block"),
        ("Block", {"atn.q": "x"}, ValueError, "'atn.q' is no common name. Did you mean 'attn.q'"),
        ("Block", {3: "x"}, TypeError, "a common name is a string, got 3"),
        ("Block", {"attn.q": 3}, TypeError, "'attn.q' of Block is a path .*got 3"),
        ("Block", {"attn.q": ("a", 3)}, TypeError, "'attn.q' of Block is a path .*got"),
        ("Block", {"attn.q": "a..b"}, ValueError, "'a..b' is not a dot-joined path"),
        ("Block", {"attn.q": " a"}, ValueError, "' a' is not a dot-joined path"),
    ],
)
def test_a_wrong_registration(block, names, error, message):
    before = dict(TABLE)
    with pytest.raises(error, match=message):
        register_common_names(block, names)
    assert before == TABLE


class Mixer(nn.Module):
    """Layers without names that say what they are."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.Dense(HIDDEN, name=f"mix_{i}")(nn.Dense(WIDE, name=f"wide_{i}")(x))
        return x


class GemmaLike(nn.Module):
    """Its feed-forward has two matrices in one module."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, kv = (nn.DenseGeneral((2, 8), name=name)(x) for name in ("q_einsum", "kv_einsum"))
            x = x + nn.DenseGeneral(HIDDEN, axis=(-2, -1), name="attn_vec_einsum")(nn.dot_product_attention(q, kv, kv))
            return x + GemmaLike.FeedForward(name="mlp")(x)

    class FeedForward(nn.Module):
        @nn.compact
        def __call__(self, x):
            gating, linear = (
                self.param(n, nn.initializers.normal(), s) for n, s in (("gating", (16, 8)), ("lin", (8, 16)))
            )
            return jnp.tanh(x @ gating) @ linear

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = GemmaLike.Block(name=f"layer_{i}")(x)
        return x


class OneLeaf(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, ())


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (Mixer(), {}),
        (OneLeaf(), {}),
        (GemmaLike(), {"Block": {"attn.q": "q_einsum", "attn.k": "kv_einsum", "attn.v": "kv_einsum"}}),
    ],
)
def test_what_names_and_shapes_do_not_say_is_not_guessed(module, wanted):
    backbone_model = jdelta.Backbone(module, dummy_inputs=(jnp.ones((1, 4, HIDDEN)),))
    assert guess.guess(backbone_model.structure()) == wanted
    with pytest.raises(ValueError, match="has no block of a known family") as caught:
        jdelta.AdapterModel(backbone_model)
    assert "modified_modules=[]" not in str(caught.value)
    assert ("register_common_names" in str(caught.value)) == bool(wanted)
