import io
import pathlib
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest
from conftest import build
from flax import linen as nn
from rich.console import Console

import jdelta


def shown(model, color=False, **kwargs):
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=color, color_system="truecolor" if color else None)
    jdelta.Visualization(model).structure_graph(console=console, **kwargs)
    return out.getvalue()


@pytest.fixture(scope="module")
def model():
    model = build("bert", "FlaxBertForSequenceClassification", {"num_hidden_layers": 12})
    model.delta = jdelta.LoraModel(model, lora_r=2, unfrozen_modules=["classifier"])
    return model


def test_repeated_layers_are_collapsed_into_one_line_with_their_count(model):
    text = shown(model)
    assert "0-11 (12 layers) FlaxBertLayer 1×1×16 → 1×1×16" in text
    assert text.count("query Dense") == 1


def test_layers_that_differ_are_not_collapsed_together():
    model = build("bert", "FlaxBertForSequenceClassification", {"num_hidden_layers": 5}, _do_init=False)
    jdelta.LoraModel(model, modified_modules=["2.attention.self.query"], lora_r=2)
    text = shown(model)
    assert "0-1 (2 layers)" in text
    assert "3-4 (2 layers)" in text
    assert text.count("lora") == 1


def test_kinds_of_parameters_are_told_apart_without_colour(model):
    text = shown(model, mask=model.delta.trainable_mask(model.params))
    lines = [line.strip("│├└─ ") for line in text.splitlines()]
    assert "Δ+ a 16×2 float32" in lines
    assert "+ kernel 16×2 float32" in lines  # the classifier
    assert "- kernel 16×16 float32" in lines
    assert "+ trainable   - frozen   Δ of a delta" in text


def test_colours_are_those_of_opendelta(model):
    text = shown(model, color=True, mask=model.delta.trainable_mask(model.params))
    assert "\x1b[38;2;175;0;255mΔ+ a 16×2 float32" in text  # purple
    assert "\x1b[31m0-11" in text  # red
    assert "\x1b[32m FlaxBertLayer" in text  # green
    assert "\x1b[37mbert" in text  # white
    assert "\x1b[94m+ kernel 16×2" in text  # blue
    assert "\x1b[90m- kernel 16×16" in text  # grey


def test_the_counts(model):
    text = shown(model, mask=model.delta.trainable_mask(model.params))
    delta = 12 * 2 * 2 * 16 * 2
    head = 16 * 2 + 2
    total = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert f"parameters {total:,}" in text
    assert f"trainable  {delta + head:,} ({(delta + head) / total:.4%})" in text
    assert f"delta      {delta:,} ({delta / total:.4%})" in text
    assert (
        f"{total * 4 / 1000:.1f} kB of parameters, {((delta + head) * 8 + 4) / 1000:.1f} kB of optimizer state" in text
    )


def test_log_prints_the_tree_of_the_delta(model, capsys):
    model.delta.log()
    assert "Δ+ b 2×16 float32" in capsys.readouterr().out


def test_a_detached_delta_is_not_shown():
    model = build("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model, lora_r=2)
    delta.detach()
    assert "lora" not in shown(model)


def test_calls_and_scans():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="shared")
            return layer(layer(x))

    text = shown(jdelta.Backbone(Model(), dummy_inputs=(jnp.ones((2, 4)),)))
    assert "shared Dense 2×4 → 2×4 called 2 times" in text


class Reader(HTMLParser):
    """Fails on tags that do not close in order; collects text, attributes and how deep each text is folded."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.attributes, self.depths = [], "", [], {}
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        self.depths.setdefault(data.strip(), self.open.count("details"))


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="$<b> & 'q'$")(x)


@pytest.fixture(scope="module")
def odd():
    return jdelta.Visualization(jdelta.Backbone(Odd(), dummy_inputs=(jnp.ones((2, 4)),)))


def test_the_page_says_what_the_terminal_says_and_folds(model, tmp_path):
    page = model.delta.visualization().to_html(tmp_path / "tree.html")
    assert (tmp_path / "tree.html").read_text(encoding="utf-8") == page
    read = Reader(page)
    words = [line.strip("│├└─ ") for line in shown(model, mask=model.delta.trainable_mask).splitlines()]
    for line in filter(None, words):
        assert line in read.text
    assert read.depths["FlaxBertLayer"] - read.depths["FlaxBertEncoder"] == 2
    assert '<span class="delta">Δ+ a 16×2 float32</span>' in page
    assert '<span class="trainable">+ kernel 16×2 float32</span>' in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_loads_nothing_and_runs_nothing(model):
    page = model.delta.visualization().to_html()
    read = Reader(page)
    assert not {"src", "href", "onclick"} & {name for name, _ in read.attributes}
    assert "<script" not in page
    assert not re.search(r"https?:|url\(|@import", page)


def test_names_are_escaped(odd):
    page, svg = odd.to_html(), odd.to_svg()
    assert "<b>" not in page + svg
    assert "$<b> & 'q'$ Dense" in Reader(page).text
    assert "$<b> & 'q'$ Dense" in "".join(ElementTree.fromstring(svg).itertext())


def test_notebooks_show_a_piece_that_keeps_its_style_to_itself(model):
    for shown_by in (model.delta, model.delta.visualization()):
        piece = shown_by._repr_html_()
        read = Reader(piece)
        assert read.text.count("Δ+ a 16×2 float32") == 2
        assert "<body" not in piece
    rules = re.sub(r"@media[^{]*{(.*?})\s*}", r"\1", re.search("<style>(.*)</style>", piece, re.DOTALL)[1])
    selectors = [part.strip() for group in re.findall(r"([^{}]+){", rules) for part in group.split(",")]
    assert all(selector.startswith(".jdelta") for selector in selectors)


def test_a_detached_delta_can_be_shown():
    delta = jdelta.LoraModel(build("bert", "FlaxBertForSequenceClassification"), lora_r=2)
    delta.detach()
    assert "lora" not in delta._repr_html_()


def test_the_svg_has_every_line_inside_its_picture(model, tmp_path):
    svg = model.delta.visualization().to_svg(tmp_path / "tree.svg")
    assert (tmp_path / "tree.svg").read_text(encoding="utf-8") == svg
    root = ElementTree.fromstring(svg)
    texts = [element for element in root.iter() if element.tag.endswith("}text")]
    lines = ["".join(text.itertext()) for text in texts]
    words = [line.strip("│├└─ ") for line in shown(model, mask=model.delta.trainable_mask).splitlines()]
    assert [line.strip() for line in lines] == list(filter(None, words))
    assert all(0 < float(text.get("y")) < float(root.get("height")) for text in texts)
    assert all(
        float(t.get("x")) + 7.8 * len(line) < float(root.get("width")) for t, line in zip(texts, lines, strict=True)
    )
    colours = {"".join(e.itertext()): e.get("fill") for e in root.iter() if e.tag.endswith("tspan")}
    assert colours["Δ+ a 16×2 float32"] == "#af00ff"
    assert "url(" not in svg


def test_the_png(model, odd, tmp_path):
    model.delta.visualization().to_png(tmp_path / "tree.png")
    odd.to_png(tmp_path / "odd")  # a $ starts no formula
    for name in ("tree.png", "odd"):
        data = pathlib.Path(tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000


@pytest.mark.slow
def test_a_picture_of_very_many_lines_is_within_what_matplotlib_draws():
    from jdelta.display.drawing import Drawing, Line
    from jdelta.display.plotting import _MOST_PIXELS, save, tree

    figure = tree(Drawing(Line((), tuple(Line(()) for _ in range(3000))), (), ()))
    save(figure, out := io.BytesIO(), "png")
    height = int.from_bytes(out.getvalue()[20:24])
    assert _MOST_PIXELS * 0.9 < height <= _MOST_PIXELS


def test_a_mask_that_is_given_goes_before_the_own(model):
    nothing = lambda params: jax.tree.map(lambda _: False, params)  # noqa: E731
    assert "trainable  0 (0.0000%)" in model.delta.visualization().to_svg(mask=nothing)


@pytest.mark.parametrize("palette", ["LIGHT", "DARK"])
def test_every_colour_can_be_read(palette):
    """WCAG's contrast, at least 4.5."""
    from jdelta.display import drawing

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    back = luminance(drawing.BACKGROUNDS[palette == "DARK"])
    for kind, colour in getattr(drawing, palette).items():
        high, low = sorted((luminance(colour), back), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, kind


def test_without_matplotlib_the_error_says_what_to_install(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "jdelta.display.plotting", raising=False)
    monkeypatch.delattr(jdelta.display, "plotting", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jdelta\[plot\]'"):
        model.delta.visualization().to_png(tmp_path / "tree.png")


def test_something_that_is_no_backbone():
    with pytest.raises(TypeError, match="expected a Flax model of transformers"):
        jdelta.Visualization("bert")


UNPRINTABLE = "a\x01b\x1b[31m\u202e\ufffe\x85<&"  # control characters, a mark of direction, no character; and markup


class Unprintable(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name=UNPRINTABLE)(x)


def test_names_of_control_characters_and_half_surrogates_are_escaped_and_the_files_are_valid(tmp_path):
    x = jnp.ones((1, 2))
    params = {"params": {**Unprintable().init(jax.random.key(0), x)["params"], "\ud800": {"\udfff\0": x}}}
    picture = jdelta.Visualization(jdelta.Backbone(Unprintable(), None, (x,)))
    escaped = r"a\x01b\x1b[31m\u202e\ufffe\x85<&"

    svg = picture.to_svg(tmp_path / "odd.svg", params=params)
    texts = [
        "".join(text.itertext()) for text in ElementTree.fromstring(svg.encode()).iter() if text.tag.endswith("text")
    ]
    assert any(text.startswith(escaped + " Dense") for text in texts)
    assert r"\ud800" in texts
    assert any(text.startswith(r"+ \udfff\x00 1×2") for text in texts)
    assert ElementTree.parse(tmp_path / "odd.svg")

    page = picture.to_html(tmp_path / "odd.html", params=params)
    assert (tmp_path / "odd.html").read_text("utf-8") == page
    assert all(char.isprintable() or char == "\n" for char in page)
    assert rf'<span class="name">{escaped.replace("&", "&amp;").replace("<", "&lt;")}</span>' in page

    console = Console(file=io.StringIO(), width=200)
    picture.structure_graph(params, console=console)
    assert escaped in console.file.getvalue()
    console.file.getvalue().encode()
