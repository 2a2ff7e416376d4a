"""What the selection page is told, what the server lets through, and what becomes of an answer. No browser here."""

import http.client
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import nnx_models
import pytest
from conftest import build
from flax import linen as nn
from flax import nnx
from tiers import breadth

import jdelta
from jdelta.core import attaching
from jdelta.display import interactive
from jdelta.display.interactive.cost import costs, parameter_costs
from jdelta.display.interactive.describe import describe
from jdelta.display.interactive.server import Refused, Server
from jdelta.hosts.adapting import adapt
from jdelta.trees import surgery


def counts(delta):
    """How many parameters train, and how many there are, as the attached model has them."""
    flags = surgery.flatten(surgery.parameters(delta.trainable_mask()))
    leaves = surgery.flatten(surgery.parameters(adapt(delta.backbone_model).tree()))
    sizes = {path: leaf.size for path, leaf in leaves.items() if leaf is not surgery.empty_node}
    return sum(size for path, size in sizes.items() if flags[path]), sum(sizes.values())


def abstract(layers=2):
    """A tiny BERT of shapes alone: nothing is compiled."""
    return build("bert", "FlaxBertForSequenceClassification", {"num_hidden_layers": layers}, _do_init=False)


def names_of(model):
    return [info.name for info in adapt(model).structure() if info.name]


def costs_of(method, model, **arguments):
    state = interactive._unattached(model, method, arguments)
    return costs(state, state.method.exclude_modules or ())


# --- what a selection costs

SHARED = {"reduction_factor": 2, "shared_phm_rule": True, "shared_W_phm": True}
METHODS = [
    pytest.param(jdelta.LoraModel, {"lora_r": 2}, marks=pytest.mark.slow),
    (jdelta.LoraModel, {"lora_r": 2, "rank_pattern": {"[r].*": 3}, "unfrozen_modules": ["classifier"]}),
    pytest.param(jdelta.AdapterModel, {}, marks=pytest.mark.slow),
    (jdelta.BitFitModel, {"unfrozen_modules": ["classifier", "1.attention"]}),
    pytest.param(jdelta.LowRankAdapterModel, {"reduction_factor": 4}, marks=pytest.mark.slow),
    pytest.param(jdelta.CompacterModel, {"reduction_factor": 2}, marks=pytest.mark.slow),
    pytest.param(jdelta.CompacterModel, SHARED, marks=pytest.mark.slow),
    pytest.param(
        jdelta.CompacterModel, SHARED | {"learn_phm": False, "factorized_phm_rule": True}, marks=pytest.mark.slow
    ),
    (jdelta.PrefixModel, {"embed_dim": 4, "mid_dim": 5}),
    pytest.param(jdelta.PrefixModel, {"reparameterize": False}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "arguments"), METHODS, ids=lambda v: getattr(v, "__name__", None))
@pytest.mark.slow
def test_the_cost_of_a_selection_is_what_the_attached_delta_has(method, arguments):
    found = costs_of(method, abstract(), **arguments)
    assert found.exact
    able = list(found.modules)
    picks = [able[-1:], [name for name in able if name.endswith("attention")] or able[1:4]]
    if method is not jdelta.PrefixModel:
        picks.append(able)
    for pick in picks:
        model = abstract()
        delta = method(model, modified_modules=interactive.patterns_of(pick, names_of(model)), **arguments)
        assert found.of(pick) == counts(delta), pick


@pytest.mark.parametrize(
    "method",
    [jdelta.LoraModel, jdelta.AdapterModel, jdelta.BitFitModel, jdelta.PrefixModel],
    ids=lambda m: m.__name__,
)
@pytest.mark.slow
def test_exactly_the_modules_with_a_reason_cannot_be_attached_to(method):
    names = names_of(abstract(layers=1))
    found = costs_of(method, abstract(layers=1))
    assert {*found.modules, *found.reasons} == {"", *names}
    for name in names:
        try:
            method(abstract(layers=1), modified_modules=interactive.patterns_of([name], names))
        except (TypeError, ValueError):
            assert name in found.reasons, name
        else:
            assert name in found.modules, found.reasons[name]


@pytest.mark.parametrize(("family", "cls"), [("t5", "FlaxT5ForConditionalGeneration"), ("albert", "FlaxAlbertModel")])
@pytest.mark.parametrize("method", breadth([jdelta.LoraModel, jdelta.PrefixModel], jdelta.LoraModel))
def test_it_is_exact_where_modules_are_shared_and_attention_differs(family, cls, method):
    arguments = {"lora_r": 2} if method is jdelta.LoraModel else {"embed_dim": 3, "mid_dim": 4}
    found = costs_of(method, build(family, cls, _do_init=False), **arguments)
    delta = method(build(family, cls, _do_init=False), **arguments)
    assert found.of(delta.targets) == counts(delta)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6, name="inner")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, use_bias=False, name="first")(x)
        scan = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan(name="blocks")(x, None)[0]


@pytest.mark.parametrize("method", [jdelta.LoraModel, jdelta.AdapterModel, jdelta.BitFitModel])
def test_layers_inside_scan_cost_as_often_as_they_are(method):
    module, x = Scanned(), jnp.ones((2, 3))
    params = module.init(jax.random.key(0), x)["params"]
    arguments = {"lora_r": 2} if method is jdelta.LoraModel else {}
    found = costs_of(method, jdelta.Backbone(module, params, dummy_inputs=(x,)), **arguments)
    for name in ("first", "blocks.inner"):
        delta = method(jdelta.Backbone(module, params, dummy_inputs=(x,)), modified_modules=[name], **arguments)
        assert found.of([name]) == counts(delta)


class Widen(nn.Module):
    @nn.compact
    def __call__(self, y):
        return nn.Dense(y.shape[-1] + 1)(y)


def test_a_method_of_ones_own_is_measured_and_its_misfits_have_a_reason(bert):
    class WidenConfig(jdelta.Method):
        def edits(self, host, structure):
            layer = Widen() if host.name == "classifier" else nn.Dense(host.y.shape[-1])
            yield jdelta.CallEdit(host.path, "after", layer)

    class WidenModel(jdelta.DeltaModel):
        method_class = WidenConfig

    found = costs_of(WidenModel, bert)
    assert "shape (1, 3)" in found.reasons["classifier"]
    assert found.of(["bert.pooler"])[0] == 16 * 16 + 16


def test_what_is_excluded_or_belongs_to_another_delta_has_a_reason(bert):
    first = jdelta.BitFitModel(bert, modified_modules=["pooler"])
    found = costs_of(jdelta.BitFitModel, bert, exclude_modules=["encoder"])
    assert "trained by delta 'bitfit' already" in found.reasons["bert.pooler.dense"]
    assert "exclude_modules" in found.reasons["bert.encoder.layer.0.attention.self.query"]
    assert first.attached


# --- what the page is told


def test_repeated_layers_are_one_run_and_everything_is_in_order_of_execution(bert):
    delta = jdelta.DeltaModel(bert)
    page = describe(delta.structure, {}, None, model="m")
    rows = page["modules"]
    keys = [row[0] for row in rows]
    assert rows[0][:2] == ["", -1]
    layers = [row for row in rows if row[2] == "FlaxBertLayer"]
    assert [row[0] for row in layers] == ["0", "1"]
    assert layers[0][6] == layers[1][6] >= 0
    assert keys.index("query") < keys.index("pooler") < keys.index("classifier")
    assert rows[0][5] == sum(leaf.size for leaf in jax.tree.leaves(bert.params))


def test_layers_that_differ_are_no_run():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, width in enumerate([4, 4, 5]):
                x = nn.Dense(width, name=f"layers_{i}")(x)
            return x

    model = jdelta.Backbone(Net(), None, dummy_inputs=(jnp.ones((1, 4)),))
    rows = describe(jdelta.DeltaModel(model).structure, {}, None)["modules"]
    runs = [row[6] for row in rows[1:]]
    assert runs[0] == runs[1] != runs[2]


EVIL = "</script><img src=x onerror=alert(1)>"


def test_names_cannot_leave_the_data_of_the_page():
    text = interactive.document({"model": EVIL + "__NONCE__\u2028&"}, "n0nce")
    assert text.count("</script>") == 2  # the page's own
    assert "<img" not in text
    data = json.loads(re.search(r'id="data" nonce="n0nce">(.*?)</script>', text).group(1))
    assert data["model"] == EVIL + "__NONCE__\u2028&"


def test_names_of_half_surrogates_and_control_characters_reach_the_page_as_they_are():
    names = ["\ud800", "a\0\x1b\u202e", "\ufffe"]
    text = interactive.document({"model": names}, "n").encode()  # UTF-8
    assert json.loads(re.search(rb'id="data" nonce="n">(.*?)</script>', text).group(1))["model"] == names
    assert not any(byte < 32 and byte != 10 for byte in text)


def test_the_page_asks_nothing_of_anybody_else():
    text = interactive.document({}, "n")
    assert re.findall(r"https?://|src=|@import|url\(", text) == []
    assert " style=" not in text
    assert re.findall(r"\son\w+=", text) == []


def test_a_name_that_ends_like_another_becomes_a_regex():
    names = ["a.b", "x.a.b", "c"]
    for name in names:
        assert jdelta.match(names, interactive.patterns_of([name], names)) == [name]


# --- the server


@pytest.fixture
def server():
    with Server(lambda nonce: f"<p>{nonce}</p>", "127.0.0.1", True, limit=1000) as server:
        yield server


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def request(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    here = f"127.0.0.1:{server.server_port}"
    sent = {"Host": here}
    if method == "POST":
        sent |= {"Origin": f"http://{here}", "X-Jdelta-Token": server.token, "Content-Type": "application/json"}
    sent |= {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(
        method, path, body=body, headers={key: value for key, value in sent.items() if value is not None}
    )
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text, dict(reply.getheaders())


def ask(server, take):
    """Waits for an answer in a thread, as the main thread would; gives its result or exception."""
    results = queue.Queue()

    def run():
        try:
            results.put(server.wait(take))
        except BaseException as error:
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    return results


def submit(server, value, **headers):
    return request(server, "POST", "/submit", json.dumps(value), **headers)


def test_the_page_needs_the_token_and_forbids_all_but_its_own_script(server):
    status, text, headers = request(server, "GET", f"/?token={server.token}")
    assert status == 200
    nonce = re.search("<p>(.*)</p>", text).group(1)
    policy = headers["Content-Security-Policy"]
    assert f"script-src 'nonce-{nonce}'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Cache-Control"] == "no-store"
    assert nonce not in request(server, "GET", f"/?token={server.token}")[1]
    for path in ("/", "/?token=", "/?token=wrong", f"/?token={server.token}x", "/favicon.ico"):
        assert request(server, "GET", path)[0] == 403
    assert request(server, "HEAD", f"/?token={server.token}")[:2] == (200, "")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8888", "127.0.0.1.evil.example", "1.2.3.4", "", "a@127.0.0.1"]
)
def test_a_foreign_host_is_refused(server, host):
    status, text, _ = request(server, "GET", f"/?token={server.token}", Host=host)
    assert status == 403
    assert "host" in text
    assert submit(server, {}, Host=host, Origin=f"http://{host}")[0] == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9999", "[::1]:80"])
def test_a_forwarded_port_is_fine(server, host):
    assert request(server, "GET", f"/?token={server.token}", Host=host)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", None, "http://127.0.0.1:1", "file://"])
def test_a_foreign_origin_is_refused(server, origin):
    assert submit(server, {}, Origin=origin)[0] == 403
    assert server.submissions.empty()


def raw(server, request: bytes) -> bytes:
    """What the server says to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        reply = b""
        while part := connection.recv(1 << 16):
            reply += part
    return reply


def status(reply: bytes) -> int:
    """The status of a whole answer with a body of the length that it says; else 0."""
    head, _, body = reply.partition(b"\r\n\r\n")
    found = re.match(rb"HTTP/1.0 (\d\d\d) ", head)
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    return int(found[1]) if found and length and int(length[1]) == len(body) else 0


BAD_REQUESTS = {
    "an address that is none": b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a fragment that is none": b"POST http://[/submit HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an origin that is none": b"GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[\r\n\r\n",
    "an origin that does not end": b"POST /submit HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[::1\r\n\r\n",
    "nothing": b"\r\n\r\n",
    "spaces": b"  \r\n",
    "one word": b"GET\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n",
    "an odd version": b"GET / HTTP/x.1\r\n\r\n",
    "no version": b"POST /\r\n\r\n",
}


@pytest.mark.parametrize("bad", BAD_REQUESTS)
def test_a_request_that_cannot_be_read_is_answered(server, bad, capsys):
    assert status(raw(server, BAD_REQUESTS[bad])) == 400
    assert "Traceback" not in capsys.readouterr().err


def test_a_line_that_is_too_long_too_many_headers_and_an_unknown_method_are_answered(server):
    assert status(raw(server, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")) == 414
    assert status(raw(server, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n")) == 431
    assert status(raw(server, b"PUT / HTTP/1.1\r\n\r\n")) == 501
    assert status(raw(server, b"GET / HTTP/9.9\r\n\r\n")) == 505


@pytest.mark.parametrize("seeds", breadth([150, 10_000], 150))
def test_whatever_is_sent_is_answered(server, seeds, capsys):
    host = f"127.0.0.1:{server.server_port}"
    body = b'{"modules": ["a"]}'
    templates = [
        f"GET /?token={server.token} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n\r\n".encode(),
        f"POST /submit HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nX-Jdelta-Token: wrong\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body,
        f"POST /wait HTTP/1.1\r\nHost: {host}\r\nX-Jdelta-Token: wrong\r\n\r\n".encode(),
        f"HEAD /%5B?a=b#c HTTP/1.0\r\nHost: [::1]:{server.server_port}\r\nOrigin: null\r\n\r\n".encode(),
    ]
    odd = [
        b"[",
        b"]",
        b"http://[",
        b"//",
        b"%",
        b"\0",
        b"\xff",
        b"\r\n",
        b" ",
        b":",
        b"\xa0",
        b"#",
        b"?",
        b"\x85",
        b"9" * 30,
    ]
    for seed in range(seeds):
        rng = random.Random(seed)
        request = bytearray(rng.choice(templates))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(request))
            match rng.randrange(4):
                case 0:
                    request[at] = rng.randrange(256)
                case 1:
                    request[at : at + rng.randrange(1, 30)] = b""
                case 2 | 3:
                    request[at:at] = rng.choice(odd)
            request = request or bytearray(b"x")
        reply = raw(server, bytes(request))
        assert reply.startswith(b"HTTP/1.0 "), (seed, bytes(request), reply)
        assert not reply.startswith(b"HTTP/1.0 500"), (seed, bytes(request), reply)
    assert "Traceback" not in capsys.readouterr().err


def test_answers_come_by_post_with_the_token_in_its_header(server):
    status, text, headers = request(server, "GET", f"/submit?token={server.token}&modules=a")
    assert (status, headers["Allow"]) == (405, "POST")
    assert "POST" in text
    assert submit(server, {}, X_Jdelta_Token=None)[0] == 403
    assert submit(server, {}, X_Jdelta_Token="é")[0] == 403
    assert request(server, "PUT", "/submit", "{}")[0] == 501
    assert request(server, "POST", "/elsewhere", "{}")[0] == 404
    assert server.submissions.empty()


def test_bodies_that_cannot_be_read_are_refused(server):
    post = lambda body, **headers: request(server, "POST", "/submit", body, **headers)[0]  # noqa: E731
    assert post("x" * 1001) == 413
    assert post("{}", Content_Length="999999999999") == 413
    assert post("{}", Content_Length="9" * 5000) == 413
    assert post("{}", Content_Length="-1") == 411
    assert post("{}", Content_Type="text/plain") == 415
    for body in ("", "{", "\xff", "[" * 900, '{"modules": nope}'):
        assert post(body.encode("latin-1")) == 400
    assert server.submissions.empty()


def test_a_refused_answer_can_be_given_again_and_a_second_one_comes_too_late():
    def take(value):
        if value == "bad":
            raise Refused("Not this one.")
        return [value]

    with Server(str, "127.0.0.1", True) as server:
        results = ask(server, take)
        status, text, _ = submit(server, "bad")
        assert (status, json.loads(text)) == (422, {"error": "Not this one."})
        watching = queue.Queue()
        threading.Thread(target=lambda: watching.put(request(server, "POST", "/wait", "{}"))).start()
        assert submit(server, "good")[0] == 200
        assert results.get(timeout=5) == ["good"]
        status, text, _ = submit(server, "late")
        assert status == 409
        assert json.loads(text)["chosen"] == ["good"]
        assert json.loads(watching.get(timeout=5)[1]) == {"state": "chosen", "chosen": ["good"]}


def test_of_answers_at_the_same_time_one_is_taken():
    with Server(str, "127.0.0.1", True) as server:
        replies = queue.Queue()
        threads = [threading.Thread(target=lambda i=i: replies.put(submit(server, i)[0])) for i in range(6)]
        for thread in threads:
            thread.start()
        while server.submissions.qsize() < 6:
            time.sleep(0.01)
        taken = server.wait(lambda value: value)
    for thread in threads:
        thread.join()
    assert taken in range(6)
    assert sorted(replies.queue) == [200, *[409] * 5]


def test_an_error_in_python_reaches_the_caller_and_the_page(server):
    results = ask(server, lambda value: 1 / 0)
    assert submit(server, 1)[0] == 500
    assert isinstance(results.get(timeout=5), ZeroDivisionError)


def test_after_the_end_the_port_is_free():
    port = free_port()
    with Server(str, "127.0.0.1", port), pytest.raises(OSError, match=f"port {port} at 127.0.0.1 is in use"):
        Server(str, "127.0.0.1", port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    with Server(str, "127.0.0.1", port):
        pass


def test_true_is_the_first_free_port():
    with Server(str, "127.0.0.1", True) as one, Server(str, "127.0.0.1", True) as other:
        assert 8888 <= one.server_port < other.server_port < 8988


def test_ports_and_hosts_that_cannot_be_are_errors():
    for port in (0, 65536, -1):
        with pytest.raises(ValueError, match="from 1 to 65535"):
            Server(str, "127.0.0.1", port)
    for port in ("8888", 1.5, False):
        with pytest.raises(TypeError, match="number or True"):
            Server(str, "127.0.0.1", port)
    with pytest.raises(OSError, match=r"cannot listen at '192\.0\.2\.1'"):
        Server(str, "192.0.2.1", True)


def test_it_listens_at_the_loopback_address_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert Server.knows(server, "localhost:1")
    assert not Server.knows(server, "10.0.0.1")


def test_at_another_address_its_own_names_are_known():
    with Server(str, "0.0.0.0", True) as server:
        assert server.knows("10.0.0.1:8888")
        assert server.knows(socket.gethostname())
        assert not server.knows("evil.example")


# --- from the call to the delta


class Page:
    """Plays the browser: takes the link from what is printed, and submits."""

    def __init__(self, monkeypatch, *answers):
        self.replies, answers = [], list(answers)

        def show(server):
            def play():
                for answer in answers:
                    self.replies.append(submit(server, answer))

            threading.Thread(target=play, daemon=True).start()

        monkeypatch.setattr(interactive.notebook, "show", show)

    @property
    def errors(self):
        return [json.loads(text).get("error") for _, text, _ in self.replies]


QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]


def test_a_method_is_attached_to_what_was_chosen(bert, monkeypatch, capsys):
    Page(monkeypatch, {"modules": QUERIES[::-1] + QUERIES[:1]})
    delta = jdelta.LoraModel(bert, interactive_modify=True, lora_r=2)
    assert delta.targets == QUERIES
    assert delta.config.modified_modules == tuple(QUERIES)
    printed = capsys.readouterr().out
    assert f"modified_modules: {QUERIES!r}\n" in printed
    assert len(re.findall(r"http://127.0.0.1:\d+/\?token=[\w-]{32}\n", printed)) == 1
    assert re.search(r"ssh -L (\d+):127\.0\.0\.1:\1 ", printed)


def test_answers_that_mean_nothing_are_refused_and_the_page_stays(bert, monkeypatch):
    page = Page(
        monkeypatch,
        {"modules": []},
        {"modules": ["bert.encoder.layer.7"]},
        {"modules": ["bert.encoder"]},
        {"modules": "classifier"},
        {"modules": [3]},
        {},
        ["classifier"],
        {"modules": ["classifier"]},
    )
    assert jdelta.select_modules(bert, jdelta.LoraModel, lora_r=2) == ["classifier"]
    deadline = time.time() + 5
    while len(page.replies) < 8 and time.time() < deadline:
        time.sleep(0.01)
    assert [status for status, _, _ in page.replies] == [422] * 7 + [200]
    errors = page.errors
    assert "at least one" in errors[0]
    assert "no module ends with 'bert.encoder.layer.7'" in errors[1]
    assert "no kernel" in errors[2]
    assert "lora" not in str(jax.tree.structure(bert.params))


def test_what_modules_cannot_take_together_is_said_in_the_page(monkeypatch, bert):
    def one_only(state, edits):
        if len(edits) > 1:
            raise ValueError("one is enough.")
        return before(state, edits)

    before = attaching.tried
    monkeypatch.setattr(attaching, "tried", one_only)
    page = Page(monkeypatch, {"modules": QUERIES}, {"modules": QUERIES[:1]})
    delta = jdelta.AdapterModel(bert, interactive_modify=True)
    assert delta.targets == QUERIES[:1]
    assert page.errors[0] == "one is enough."


def test_names_alone(bert, monkeypatch):
    Page(monkeypatch, {"modules": ["bert", "bert.encoder"]})
    assert jdelta.select_modules(bert) == ["bert", "bert.encoder"]
    Page(monkeypatch, {"modules": ["classifier"]})
    assert jdelta.select_modules(bert, jdelta.LoraConfig(lora_r=1)) == ["classifier"]


def test_modules_and_parameters_of_an_nnx_module_are_chosen_like_those_of_linen(monkeypatch):
    model = nnx_models.Model(nnx.Rngs(0))
    inputs, graph = {"dummy_inputs": (nnx_models.IDS,)}, nnx.graphdef(model)
    page = Page(monkeypatch, {"modules": ["layers.0.norm"]}, {"modules": ["layers.0.up", "stack.down"]})
    names = jdelta.select_modules(model, jdelta.LoraModel, lora_r=2, **inputs)
    assert names == ["layers.0.up", "stack.down"]
    assert "no kernel" in page.errors[0]
    Page(monkeypatch, {"modules": ["embed.embedding", "layers.1.down.kernel"]})
    parameters = jdelta.select_parameters(model, jdelta.LoraModel, lora_r=2, **inputs)
    assert parameters == ["embed.embedding", "layers.1.down.kernel"]
    assert nnx.graphdef(model) == graph  # a choice alone changes nothing

    found = costs_of(jdelta.LoraModel, model, lora_r=2)
    Page(monkeypatch, {"modules": names})
    delta = jdelta.LoraModel(model, interactive_modify=True, lora_r=2)
    assert delta.targets == names
    assert found.of(names) == counts(delta)


def test_methods_whose_modules_are_not_single_are_refused_with_the_reason(bert):
    for method in (jdelta.ParallelAdapterModel, jdelta.SoftPromptModel):
        with pytest.raises(ValueError, match="cannot be chosen one by one"):
            method(bert, interactive_modify=True)
    with pytest.raises(ValueError, match="nothing to choose"):
        jdelta.DeltaModel(bert, interactive_modify=True)


def test_arguments_that_contradict_the_page_are_errors(bert):
    with pytest.raises(ValueError, match="not both"):
        jdelta.LoraModel(bert, ["query"], interactive_modify=True)
    with pytest.raises(ValueError, match="common_structure"):
        jdelta.LoraModel(bert, common_structure=True, interactive_modify=True)
    with pytest.raises(ValueError, match="leave modified_modules"):
        jdelta.select_modules(bert, jdelta.LoraConfig(modified_modules=["query"]))
    with pytest.raises(TypeError, match="Give it too"):
        jdelta.select_modules(bert, lora_r=3)
    with pytest.raises(TypeError, match="no argument 'lora_rank'"):
        jdelta.select_modules(bert, jdelta.LoraModel, lora_rank=3)
    with pytest.raises(TypeError, match=r"such as jdelta\.LoraModel"):
        jdelta.select_modules(bert, "lora")
    with pytest.raises(ValueError, match="65535"):
        jdelta.LoraModel(bert, interactive_modify=70000)


SCRIPT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
sys.path.insert(0, {tests!r})
import jax
from conftest import build
import jdelta
model = build("bert", "FlaxBertForSequenceClassification", {{"num_hidden_layers": 1}})
before = model.params, model.module
try:
    jdelta.LoraModel(model, interactive_modify={port})
except KeyboardInterrupt:
    print("unchanged:", model.params is before[0] and model.module is before[1], flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_gives_the_terminal_back_and_leaves_the_model_as_it_was():
    port = free_port()
    script = SCRIPT.format(tests=os.path.dirname(__file__), port=port)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    stuck = threading.Timer(120, process.kill)
    stuck.start()
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("Waiting"):
            break
    process.send_signal(signal.SIGINT)
    printed += process.stdout.read()
    assert process.wait() == 0
    stuck.cancel()
    assert f"127.0.0.1:{port}/?token=" in printed
    assert "unchanged: True" in printed
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


# --- notebooks


def fake_ipython(monkeypatch, shown, kernel=True):
    shell = types.SimpleNamespace(kernel=object() if kernel else None)
    display = types.SimpleNamespace(IFrame=lambda url, **size: (url, size), display=shown.append)
    module = types.SimpleNamespace(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", module)


def shown_page(bert, monkeypatch):
    """Answers as soon as the page is announced; the notebook's own `show` runs."""
    show = interactive.notebook.show

    def show_and_answer(server):
        show(server)
        status, _, headers = request(server, "GET", f"/?token={server.token}")
        assert status == 200
        policies.append(headers["Content-Security-Policy"])
        threading.Thread(target=submit, args=(server, {"modules": ["classifier"]}), daemon=True).start()

    policies = []
    monkeypatch.setattr(interactive.notebook, "show", show_and_answer)
    assert jdelta.select_modules(bert) == ["classifier"]
    return policies[0]


def test_in_jupyter_the_page_is_shown_below_the_cell(bert, monkeypatch):
    shown = []
    fake_ipython(monkeypatch, shown)
    policy = shown_page(bert, monkeypatch)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=.+", shown[0][0])
    assert "frame-ancestors http://localhost:*" in policy
    assert "google" not in policy


def test_in_colab_the_port_is_shown_through_its_proxy(bert, monkeypatch):
    shown = []
    fake_ipython(monkeypatch, shown)
    output = types.SimpleNamespace(serve_kernel_port_as_iframe=lambda port, **more: shown.append((port, more)))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(output=output))
    policy = shown_page(bert, monkeypatch)
    assert shown[0][1]["path"].startswith("/?token=")
    assert "https://*.googleusercontent.com" in policy


def test_in_a_terminal_nothing_is_shown(bert, monkeypatch):
    shown = []
    fake_ipython(monkeypatch, shown, kernel=False)
    assert "frame-ancestors 'none'" in shown_page(bert, monkeypatch)
    assert shown == []


@pytest.mark.slow
def test_ipython_is_not_imported():
    code = "import sys, jdelta.display.interactive as i; i.notebook.kind(); print('IPython' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# --- parameters


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="dense")(x)
        return jnp.einsum("bi,eio->beo", x, self.param("wi", nn.initializers.lecun_normal(), (3, 8, 4)))


def test_parameters_are_chosen_by_name_and_their_costs_are_exact(monkeypatch, capsys):
    model = jdelta.Backbone(Experts(), dummy_inputs=(jnp.ones((2, 8)),))
    page = Page(monkeypatch, {"modules": ["dense"]}, {"modules": ["dense.bias"]}, {"modules": ["wi", "dense.kernel"]})
    names = jdelta.select_parameters(model, jdelta.LoraModel, lora_r=2)
    assert sorted(names) == ["dense.kernel", "wi"]
    assert "modified_parameters: [" in capsys.readouterr().out
    assert "no parameter ends with 'dense'" in page.errors[0]
    assert "LoRA needs a matrix" in page.errors[1]
    before = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    state = interactive._unattached(model, jdelta.LoraModel, {"lora_r": 2})
    trains, total = parameter_costs(state).of(names)
    delta = jdelta.LoraModel(model, modified_parameters=names, lora_r=2)
    own = sum(leaf.size for leaf in jax.tree.leaves(delta.shapes()))
    assert (trains, total) == (own, before + own)
    assert delta.targets == ["wi", "dense.kernel"] or delta.targets == ["dense.kernel", "wi"]


def test_the_page_of_parameters_has_a_row_for_each_below_its_module():
    structure = adapt(jdelta.Backbone(Experts(), dummy_inputs=(jnp.ones((2, 8)),))).structure()
    rows = describe(structure, {}, None, True)["modules"]
    named = {row[0]: row for row in rows}
    assert {"wi", "dense", "kernel", "bias"} <= named.keys()
    assert rows[named["kernel"][1]][0] == "dense"
    assert named["wi"][2:6] == ["float32", "[3, 8, 4]", 1, 96]
    assert named["kernel"][7] == -1
    assert "kernel" not in {row[0] for row in describe(structure, {}, None)["modules"]}


def test_a_method_of_modules_alone_says_so_for_each_parameter():
    model = jdelta.Backbone(Experts(), dummy_inputs=(jnp.ones((2, 8)),))
    found = parameter_costs(interactive._unattached(model, jdelta.AdapterModel, {}))
    assert set(found.reasons.values()) == {"The method changes modules; name some in modified_modules."}


@pytest.mark.parametrize("method", [jdelta.VeraModel, jdelta.RandLoraModel])
def test_shared_random_matrices_do_not_train_whether_saved_or_drawn_again(method):
    model = jdelta.Backbone(Experts(), dummy_inputs=(jnp.ones((2, 8)),))
    for saved in (False, True):
        arguments = {"r": 2, "save_projection": saved}
        state = interactive._unattached(model, method, arguments)
        delta = method(model, modified_parameters=["wi", "dense.kernel"], **arguments)
        trains = sum(leaf.size for leaf in jax.tree.leaves(delta.partition()[0]))
        delta.remove()
        assert parameter_costs(state).of(["wi", "dense.kernel"])[0] == trains
        delta = method(model, ["dense"], **arguments)
        own = sum(leaf.size for leaf in jax.tree.leaves(delta.shapes()))
        trains = sum(leaf.size for leaf in jax.tree.leaves(delta.partition()[0]))
        delta.remove()
        before = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        assert costs(state).of(["dense"]) == (trains, before + own)
