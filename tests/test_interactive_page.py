"""The selection page in a real browser, from the call to the attached delta."""

import json
import queue
import random
import re
import threading
from pathlib import Path

import jax.numpy as jnp
import nnx_models
import pytest
from conftest import build
from flax import linen as nn
from flax import nnx
from tiers import chromium

import jdelta
from jdelta.core import attaching
from jdelta.display import interactive
from jdelta.display.interactive.server import Server
from jdelta.hosts.adapting import adapt
from jdelta.trees import addressing

pytestmark = pytest.mark.browser


def expect(found):
    """What playwright expects, imported when a test runs: collecting the tests takes no playwright."""
    from playwright.sync_api import expect

    return expect(found)


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api

    sync_api.expect.set_options(timeout=20_000)  # other tests keep every core busy
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


class Call:
    """A call that waits for the page, in a thread of its own; the browser is in the test's."""

    def __init__(self, monkeypatch, browser, call):
        self.servers, self.results, self.browser = queue.Queue(), queue.Queue(), browser
        self.problems, self.requests, self.contexts = [], [], []
        monkeypatch.setattr(interactive.notebook, "show", self.servers.put)
        threading.Thread(target=self._run, args=(call,), daemon=True).start()
        self.server = self.servers.get(timeout=60)

    def _run(self, call):
        try:
            self.results.put(call())
        except BaseException as error:
            self.results.put(error)

    def open(self, width=1200, scheme="light"):
        context = self.browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: self.problems.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(self.server.url)
        return page

    def result(self):
        return self.results.get(timeout=60)

    def close(self):
        for context in self.contexts:
            context.close()
        self.server.submissions.put(_Stop())


class _Stop:
    """Ends a call that is still waiting."""

    @property
    def value(self):
        raise KeyboardInterrupt

    def answer(self, status, **reply):
        pass


@pytest.fixture
def start(monkeypatch, browser):
    calls = []

    def start(call):
        calls.append(Call(monkeypatch, browser, call))
        return calls[-1]

    yield start
    for call in calls:
        call.close()


def bert(layers=4):
    return build("bert", "FlaxBertForSequenceClassification", {"num_hidden_layers": layers}, _do_init=False)


def row(page, name, nth=0):
    exact = page.locator(".name", has_text=re.compile(f"^{re.escape(name)}$"))
    return page.get_by_role("treeitem").filter(has=exact).nth(nth)


def query(i):
    return f"bert.encoder.layer.{i}.attention.self.query"


def test_search_select_unfold_deselect_two_layers_and_submit(start, capsys):
    call = start(lambda: jdelta.LoraModel(bert(), interactive_modify=True, lora_r=2))
    page = call.open()
    expect(page.get_by_role("tree")).to_be_visible()

    page.fill("#pattern", "self.query")
    expect(page.locator("#found")).to_have_text("4 modules match")
    expect(page.locator(".row.hit")).to_have_count(1)
    page.fill("#pattern", "")
    expect(page.locator(".row.hit")).to_have_count(0)

    before = page.locator(".row").count()
    row(page, "0-3").locator(".fold").click()  # all layers fold into their line
    expect(row(page, "0-3")).to_have_attribute("aria-expanded", "false")
    assert page.locator(".row").count() < before
    row(page, "0-3").locator(".fold").click()

    row(page, "query").locator(".name").click()
    expect(row(page, "query")).to_have_attribute("aria-checked", "true")
    row(page, "0-3").locator(".fold").click()
    expect(row(page, "0-3")).to_contain_text("4 selected inside")
    row(page, "0-3").locator(".fold").click()
    expect(page.locator("#chosen")).to_have_text("4")
    expect(page.locator("#code")).to_have_text('modified_modules=["query"]')
    assert "dotted" in row(page, "query").locator(".name").evaluate("el => getComputedStyle(el).outlineStyle")

    row(page, "0-3").locator(".star").dblclick()
    for layer in ("1", "3"):
        row(page, layer).locator(".fold").click()
        row(page, "attention", 1).locator(".fold").click()
        row(page, "self", 1).locator(".fold").click()
        row(page, "query", 1).click()
        row(page, layer).locator(".fold").click()
    expect(row(page, "query")).to_have_attribute("aria-checked", "mixed")
    expect(page.locator("#code")).to_have_text(r'modified_modules=[r"[r][02]\.attention\.self\.query"]')
    shown = int(page.inner_text("#trains").replace(",", ""))

    page.get_by_role("button", name="Use these 2 modules").click()
    expect(page.locator("#over h1")).to_have_text("Done")
    delta = call.result()
    assert delta.targets == [query(0), query(2)]
    assert shown == sum(leaf.size for leaf in jdelta.trees.surgery.flatten(delta.shapes()).values())
    assert f"modified_modules: {[query(0), query(2)]!r}" in capsys.readouterr().out
    assert call.problems == []
    here = call.server.url.partition("?")[0]
    assert [url for url in call.requests if not url.startswith((here, "data:"))] == []


def test_everything_can_be_done_by_keyboard(start):
    call = start(lambda: jdelta.LoraModel(bert(), interactive_modify=True, lora_r=2))
    page = call.open()
    press = page.keyboard.press
    expect(page.get_by_role("tree")).to_be_focused()
    press("/")
    page.keyboard.type("self.value")
    press("Enter")
    expect(page.locator("#chosen")).to_have_text("4")
    page.keyboard.press("Control+a")
    page.keyboard.type("1.attention.self.value")
    press("Shift+Enter")
    expect(page.locator("#chosen")).to_have_text("3")
    press("Escape")
    expect(page.get_by_role("tree")).to_be_focused()

    def active():
        return page.locator(f"#{page.get_attribute('#tree', 'aria-activedescendant')}")

    press("Home")
    press("ArrowDown")
    expect(active().locator(".name")).to_have_text("bert")
    press("ArrowLeft")
    expect(active()).to_have_attribute("aria-expanded", "false")
    press("Space")  # cannot be chosen: says why, and nothing changes
    expect(page.locator("#about .why")).to_contain_text("no kernel")
    expect(page.locator("#chosen")).to_have_text("3")
    press("End")
    expect(active().locator(".name")).to_have_text("classifier")
    press("Enter")
    expect(page.locator("#chosen")).to_have_text("4")
    press("Home")
    press("ArrowDown")
    press("ArrowRight")
    for _ in range(20):
        if active().locator(".name").inner_text() == "0-3":
            break
        press("ArrowDown")
    press("*")
    expect(row(page, "2")).to_be_visible()
    press("*")
    expect(row(page, "2")).to_have_count(0)
    press("Control+Enter")
    assert call.result().targets == [query(i).replace("query", "value") for i in (0, 2, 3)] + ["classifier"]
    assert call.problems == []


EVIL = "</script><img src=x onerror=alert(1)>"


class Evil(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in (EVIL, "a b", "quote\"'", "back\\slash", "[r]x", "${x}", "ünï"):
            x = nn.Dense(4, name=name)(x)
        return x


def test_names_of_modules_are_only_text(start):
    call = start(lambda: jdelta.select_modules(jdelta.Backbone(Evil(), None, dummy_inputs=(jnp.ones((1, 4)),))))
    page = call.open()
    expect(page.get_by_role("treeitem")).to_have_count(8)
    assert page.locator("img").count() == 0
    page.fill("#pattern", EVIL)
    page.press("#pattern", "Enter")
    expect(row(page, EVIL)).to_have_attribute("aria-checked", "true")
    row(page, "[r]x").click()
    row(page, "quote\"'").click()
    code = page.inner_text("#code")
    names = eval(code.removeprefix("modified_modules="))
    everything = [EVIL, "a b", "quote\"'", "back\\slash", "[r]x", "${x}", "ünï"]
    assert set(jdelta.match(everything, names)) == {EVIL, "[r]x", "quote\"'"}
    page.click("#submit")
    chosen = call.result()
    assert set(jdelta.match(everything, chosen)) == {EVIL, "[r]x", "quote\"'"}
    expect(page.locator("#over pre")).to_contain_text("onerror")
    assert page.locator("img").count() == 0
    assert call.problems == []


UNPRINTABLE = "a\x01b\x1b[31m\u202e\ufffe"


class Unprintable(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name=UNPRINTABLE)(nn.Dense(2, name="plain")(x))


def test_names_of_control_characters_are_shown_as_python_writes_them_and_can_be_chosen(start):
    call = start(lambda: jdelta.select_modules(jdelta.Backbone(Unprintable(), None, (jnp.ones((1, 2)),))))
    page = call.open()
    line = row(page, r"a\x01b\x1b[31m\u202e\ufffe")
    line.locator(".name").click()
    expect(page.locator("#code")).to_contain_text(r"\u0001b")
    page.click("#submit")
    assert call.result() == [UNPRINTABLE]
    assert call.problems == []


def test_of_two_pages_one_submits_and_the_other_says_so(start):
    call = start(lambda: jdelta.select_modules(bert()))
    first, second, third = call.open(), call.open(), call.open()
    third.close()  # a page that is closed can be opened again: the first two are that
    for page in (first, second):
        row(page, "classifier").click()
        expect(page.locator("#chosen")).to_have_text("1")
    first.click("#submit")
    assert call.result() == ["classifier"]
    expect(first.locator("#over h1")).to_have_text("Done")
    expect(second.locator("#over h1")).to_have_text("A selection was already made")
    expect(second.locator("#over pre")).to_contain_text("classifier")


def test_what_cannot_be_attached_is_said_and_can_be_mended(start, monkeypatch):
    before = attaching.tried

    def tried(state, edits):
        if len(edits) > 1:
            raise ValueError("These two do not go together.")
        return before(state, edits)

    monkeypatch.setattr(attaching, "tried", tried)
    call = start(lambda: jdelta.LoraModel(bert(1), interactive_modify=True, lora_r=2))
    page = call.open()
    row(page, "query").click()
    row(page, "key").click()
    page.click("#submit")
    expect(page.get_by_role("alert")).to_have_text("These two do not go together.")
    row(page, "key").click()
    page.click("#submit")
    expect(page.locator("#over h1")).to_have_text("Done")
    assert call.result().targets == [query(0)]


def test_when_python_stops_the_page_says_so(start):
    call = start(lambda: jdelta.select_modules(bert(1)))
    page = call.open()
    call.server.submissions.put(_Stop())
    assert isinstance(call.result(), KeyboardInterrupt)
    expect(page.locator("#over h1")).to_have_text("Python no longer waits")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)])
def test_axe_finds_no_violation(start, scheme, width):
    import axe_playwright_python

    axe = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()
    call = start(lambda: jdelta.LoraModel(bert(), interactive_modify=True, lora_r=2))
    page = call.open(width, scheme)

    def violations():
        page.evaluate(axe)
        found = page.evaluate("axe.run()")
        return [(v["id"], [node["html"][:150] for node in v["nodes"][:3]]) for v in found["violations"]]

    assert violations() == []
    page.fill("#pattern", "query")
    page.press("#pattern", "Enter")
    page.fill("#pattern", "1.attention.self.query")
    page.press("#pattern", "Shift+Enter")
    page.press("#pattern", "Escape")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".some")).not_to_have_count(0)
    assert violations() == []
    page.fill("#pattern", "[r](")
    expect(page.locator("#found")).to_contain_text("does not understand")
    assert violations() == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click("#submit")
    expect(page.locator("#over h1")).to_have_text("Done")
    assert violations() == []


# --- the page and Python agree


@pytest.fixture(scope="module")
def model_page(browser):
    """A page on a model of two stacks, whose names end alike, with its names in Python."""
    names = adapt(build("t5", "FlaxT5ForConditionalGeneration", {"num_layers": 12})).structure()
    description = interactive.describe(names, {}, None, model="T5", method="", arguments="")
    with Server(lambda nonce: interactive.document(description, nonce), "127.0.0.1", True) as server:
        page = browser.new_page()
        page.goto(server.url)
        yield page, [info.name for info in names if info.name]
        page.close()


FIND = "(p) => { try { return matching(p).map((i) => names[i]) } catch (e) { return e.message } }"

PATTERNS = [
    "q", "SelfAttention.q", "0.layer.0.SelfAttention.q", "wi", "DenseReluDense.wi", "encoder", "nothing",
    "elfAttention.q", r"[r](\d)+\.layer\.0", r"[r][0-3]\.layer.0.SelfAttention.[qv]", r"[r]encoder\..*\.q",
    r"[r]^encoder\.block", r"[r]q$", r"[r]^q", r"[r].*", r"[r].", r"[r]\w+", r"[r]block\.(1|3|11)\.layer\.0",
    r"[r]block\.1{2}\..*\.wo", r"[r]block\.\d{,1}", r"[r]block\.\d{2,}", r"[r]block\.\d{1,2}?",
    r"[r](?:encoder|decoder)\.block", r"[r](?=enc).*\.k", r"[r](?!enc).*\.k", r"[r][^.]+\.SelfAttention",
    r"[r]\bq\b", r"[r]\Bq", r"[r][]a-z]+", r"[r][^]]+q", r"[r]a{", r"[r]{}", r"[r]x{,}q", r"[r]q{1}",
    r"[r]Self\x41ttention", r"[r](?i)SELFATTENTION", r"[r](q)\1?", r"[r](?P<a>q)", r"[r]q\Z", r"[r]\Aq",
    r"[r](?<=A)q", r"[r]q++", r"[r]q{1}{1}", r"[r]*", r"[r](", r"[r])", r"[r][", r"[r]a|*", r"[r]()", r"[r]|q",
    r"[r](|q)+", r"[r]\q", r"[r]q\\", r"[r]\s*q", r"[r][\w.]*\.q", r"[r][a-\d]", r"[r][z-a]", r"[r]^*q",
    r"[r](?=q)*q", r"[r][[]q", r"[r][a--b]q", r"[r]\.q", r"[r]\-q", r"[r]q\n?", r"[r](((((q)))))", r"[r](?#x)q",
    r"[r](?:q", r"[r][^\d.]+", r"[r]-q", r"[r]q{0}wo", r"[r]q\b", r"[r]\D+",
]  # fmt: skip


def check(page, names, pattern):
    """Whether the page understood; raises if it found something else than Python does."""
    found = page.evaluate(FIND, pattern)
    try:
        wanted = [name for name in names if addressing.matches(name, pattern)]
    except ValueError:
        wanted = None
    if isinstance(found, str):
        return False
    assert wanted is not None, pattern
    assert sorted(found) == sorted(wanted), pattern
    return True


@pytest.mark.filterwarnings("ignore:Possible (nested set|set difference):FutureWarning")
def test_the_page_finds_what_python_finds_or_says_that_it_does_not_understand(model_page):
    understood = {pattern: check(*model_page, pattern) for pattern in PATTERNS}
    assert sum(understood.values()) >= 45
    for pattern in PATTERNS[:24]:
        assert understood[pattern], pattern


def test_random_patterns_mean_the_same_in_the_page_and_in_python(model_page):
    page, names = model_page
    rng = random.Random(0)
    marks = [*".^$|?+*])({}-", "(?:", "(?=", "(?!", "[0-9]", "[^.]", ".*", "{1,2}", "{2}", "{,3}", "[a-", "[]q]", "??"]
    words = [*"qkvo0123", r"\d", r"\w", r"\W", r"\b", r"\.", "layer", "block", "encoder", "SelfAttention", "wo"]
    atoms = [*marks, *words]
    patterns = ["[r]" + "".join(rng.choices(atoms, k=rng.randint(1, 7))) for _ in range(1500)]
    patterns = [p for p in patterns if not re.search(r"[*+}][)]?[*+{]", p)]
    found = page.evaluate(f"(list) => list.map({FIND})", patterns)
    understood = 0
    for pattern, hits in zip(patterns, found, strict=True):
        if isinstance(hits, str):
            continue
        understood += 1
        assert sorted(hits) == sorted(name for name in names if addressing.matches(name, pattern)), pattern
    assert understood > 300


def test_the_shortest_patterns_mean_exactly_the_selection(model_page):
    page, names = model_page
    rng = random.Random(1)
    selections = [rng.sample(names, rng.randint(1, 40)) for _ in range(40)]
    for _ in range(60):  # as people choose: some modules in some layers
        kinds = rng.sample(["q", "v", "wi", "SelfAttention", "0", "layer_norm", "EncDecAttention.o"], 2)
        layers = {str(i) for i in rng.sample(range(12), rng.randint(1, 12))}
        stacks = rng.choice([("encoder",), ("decoder",), ("encoder", "decoder")])
        parts = [name for name in names if name.split(".")[0] in stacks and layers & set(name.split(".")[2:3])]
        chosen = [name for name in parts if name.endswith(tuple(f".{kind}" for kind in kinds))]
        selections += [chosen] if chosen else []
    script = "(lists) => lists.map((list) => python(shortest(list.map((n) => names.indexOf(n)))))"
    for selection, code in zip(selections, page.evaluate(script, selections), strict=True):
        patterns = eval(code.removeprefix("modified_modules="))
        assert jdelta.match(names, patterns) == [name for name in names if name in set(selection)], code


@pytest.mark.parametrize(
    ("numbers", "pattern"),
    [
        ("0 1 2 3", "[0-3]"),
        ("0 2", "[02]"),
        ("0 1 2 3 4 5 6 7 8 9 10 11", "(1[01]|[0-9])"),
        ("10 11 20 21", "[12][01]"),
        ("3 13", "(13|3)"),
    ],
)
def test_numbers_become_short_classes(model_page, numbers, pattern):
    text, single = model_page[0].evaluate(
        "(list) => { const d = digitsOf(list.sort()); return [d.text, d.single] }", numbers.split()
    )
    made = text if single else f"({text})"
    assert {n for n in map(str, range(40)) if re.fullmatch(made, n)} == set(numbers.split())
    assert len(made) <= len(pattern)


def test_a_link_without_its_token_shows_no_model(model_page, browser):
    page, _ = model_page
    other = browser.new_page()
    reply = other.goto(page.url.partition("?")[0])
    assert reply.status == 403
    assert "token" in json.loads(other.inner_text("body"))["error"]
    other.close()


def test_a_click_is_not_lost_when_the_page_scrolls_below_it(start):
    call = start(lambda: jdelta.select_modules(bert()))
    page = call.open()
    box = row(page, "embeddings").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.evaluate("() => { tree.scrollTop = 5; return new Promise((done) => setTimeout(done, 200)); }")
    page.mouse.up()
    expect(page.locator("#chosen")).to_have_text("1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_parameters_are_rows_below_their_modules_and_are_submitted(start, scheme, tmp_path):
    call = start(lambda: jdelta.select_parameters(bert(1), jdelta.LoraModel, lora_r=2))
    page = call.open(scheme=scheme)
    expect(page.locator("#title")).to_have_text("parameters for LoraModel")
    row(page, "kernel").click()
    expect(page.locator("#noun")).to_have_text("parameters")
    page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
    page.click("#submit")
    (name,) = call.result()
    assert name.endswith("kernel") or "kernel" in name


def test_an_nnx_module_is_shown_with_the_names_of_its_attributes(start):
    model = nnx_models.Model(nnx.Rngs(0))
    call = start(lambda: jdelta.LoraModel(model, interactive_modify=True, lora_r=2, dummy_inputs=(nnx_models.IDS,)))
    page = call.open()
    expect(row(page, "layers")).to_be_visible()
    row(page, "up").click()
    expect(page.locator("#chosen")).to_have_text("2")  # equal blocks are one line
    page.fill("#pattern", "stack.down")
    page.press("#pattern", "Enter")
    expect(page.locator("#chosen")).to_have_text("3")
    shown = int(page.inner_text("#trains").replace(",", ""))
    page.click("#submit")
    delta = call.result()
    assert delta.targets == ["layers.0.up", "layers.1.up", "stack.down"]
    assert shown == sum(leaf.size for leaf in jdelta.trees.surgery.flatten(delta.shapes()).values())
    assert model.layers[0].up.lora.a.shape == (4, 2)
    assert call.problems == []
