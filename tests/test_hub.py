"""Deltas on the Hub: the real huggingface_hub against a small copy of the Hub's HTTP interface, on this machine."""

import base64
import collections
import contextlib
import functools
import hashlib
import http.server
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import types
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from conftest import fresh, train_deltas
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions

import jdelta
from jdelta.hosts.linen.instrument import attachments_of
from jdelta.saved import folder, hub
from jdelta.saved.finetuned import Finetuned

REPO = "me/movies"


class Repository:
    """Commits as whole snapshots, and what points at them."""

    def __init__(self, private: bool = False):
        self.private = private
        self.gated = False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.commit("main", {".gitattributes": b""})

    def commit(self, ref: str, files: dict[str, bytes], base: str | None = None) -> str:
        before = self.commits.get(self.refs.get(base or ref, ""), {})
        sha = hashlib.sha1(f"{ref} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = before | files
        self.refs[ref] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class FakeHub:
    """What huggingface_hub asks of the Hub to make, fill and read repositories of models.

    Attributes:
      tokens: what each token may do, `"write"` or `"read"`.
      upload: how files other than text are to be sent, `"regular"` or `"lfs"`.
      fails: patterns of `"METHOD path"` that are answered with this status.
      asked: the requests so far, as `(method, path, token)`.
    """

    def __init__(self):
        self.repos: dict[str, Repository] = {}
        self.tokens = {"writer": "write", "reader": "read"}
        self.upload = "regular"
        self.blobs: dict[str, bytes] = {}
        self.verified: list[str] = []
        self.fails: dict[str, int] = {}
        self.portal = False
        self.asked: list[tuple[str, str, str]] = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def paths(self, method: str) -> list[str]:
        return [path for how, path, _ in self.asked if how == method]

    def _handler(self):
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                url = urllib.parse.urlsplit(self.path)
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                fake.asked.append((self.command, url.path, token))
                try:
                    status, headers, data = fake.reply(self.command, url, token, body)
                except Refused as error:
                    status, headers, data = error.status, error.headers, b""
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *_):
                pass

        return Handler

    def reply(self, method: str, url: urllib.parse.SplitResult, token: str, body: bytes):
        for pattern, status in self.fails.items():
            if re.search(pattern, f"{method} {url.path}"):
                raise Refused(status, message="so it is")
        if self.portal:
            return 200, {}, b"<html>Please log in to this network</html>"
        if token and token not in self.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        for route, handle in ROUTES.items():
            if found := re.fullmatch(route, f"{method} {url.path}"):
                arguments = [urllib.parse.unquote(part) for part in found.groups()]
                answer = handle(self, token, body, urllib.parse.parse_qs(url.query), *arguments)
                if isinstance(answer, tuple):
                    return answer
                return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        raise AssertionError(f"the fake Hub knows no {method} {url.path}")

    def opened(self, name: str, token: str) -> Repository:
        repo = self.repos.get(name)
        if repo is None or (repo.private and not token):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def files(self, name: str, token: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.opened(name, token)
        if (sha := repo.sha(revision)) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def must_write(self, token: str):
        if self.tokens.get(token) != "write":
            raise Refused(403 if token else 401, message="Forbidden" if token else "Invalid username or password.")

    def create(self, token, body, query):
        self.must_write(token)
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, Repository(bool(asked.get("private"))))
        return status, {"Content-Type": "application/json"}, json.dumps({"url": f"{self.url}/{name}"}).encode()

    def branch(self, token, body, query, name, branch):
        self.must_write(token)
        repo = self.opened(name, token)
        if branch in repo.refs:
            raise Refused(409, message="Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        return {}

    def info(self, token, body, query, name, revision="main"):
        if self.opened(name, token).gated:
            raise Refused(403, "GatedRepo", "Access to it is restricted")
        sha, files = self.files(name, token, revision)
        return {
            "id": name,
            "sha": sha,
            "private": self.repos[name].private,
            "siblings": [{"rfilename": file} for file in files],
        }

    def tree(self, token, body, query, name, revision):
        _, files = self.files(name, token, revision)
        return [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files.items()]

    def preupload(self, token, body, query, name, revision):
        self.must_write(token)
        self.files(name, token, revision)
        modes = {True: "regular", False: self.upload}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith((".json", ".md"))],
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def commit(self, token, body, query, name, revision):
        self.must_write(token)
        repo, files = self.opened(name, token), {}
        for item in map(json.loads, body.splitlines()):
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"], validate=True)
            elif item["key"] == "lfsFile":
                assert item["value"]["oid"] in self.verified
                files[item["value"]["path"]] = self.blobs[item["value"]["oid"]]
        ref = "refs/pr/1" if "create_pr" in query else revision
        sha = repo.commit(ref, files, base=revision)
        page = f"{self.url}/{name}"
        return {"commitUrl": f"{page}/commit/{sha}", "commitOid": sha, "pullRequestUrl": f"{page}/discussions/1"}

    def batch(self, token, body, query, name):
        self.must_write(token)
        urls = {"upload": "/lfs/{}", "verify": "/lfs/verify/{}"}
        return {
            "transfer": "basic",
            "objects": [
                {**what, "actions": {key: {"href": self.url + url.format(what["oid"])} for key, url in urls.items()}}
                for what in json.loads(body)["objects"]
            ],
        }

    def put(self, token, body, query, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        return {}

    def verify(self, token, body, query, oid):
        self.must_write(token)
        assert json.loads(body) == {"oid": oid, "size": len(self.blobs[oid])}
        self.verified.append(oid)
        return {}

    def resolve(self, token, body, query, name, revision, file):
        sha, files = self.files(name, token, revision)
        if file not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = files[file]
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}
        if etag not in self.blobs:
            return 200, {**headers, "Content-Length": str(len(data))}, data
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"', "Location": f"{self.url}/lfs/{etag}"}
        return 302, {**headers, **linked}, b""

    def harm(self, token, body, query, file):
        """A server that goes along: `..` in a name has shortened the address before it is sent."""
        headers = {"X-Repo-Commit": self.repos[REPO].refs["main"], "ETag": f'"{hashlib.sha256(b"evil").hexdigest()}"'}
        return 200, headers, b"evil"

    def blob(self, token, body, query, oid):
        return 200, {}, self.blobs[oid]


NAME = "([^/]+/[^/]+)"
ROUTES = {
    "POST /api/repos/create": FakeHub.create,
    "POST /api/validate-yaml": lambda *_: {},
    f"POST /api/models/{NAME}/branch/(.+)": FakeHub.branch,
    f"GET /api/models/{NAME}": FakeHub.info,
    f"GET /api/models/{NAME}/revision/(.+)": FakeHub.info,
    f"GET /api/models/{NAME}/tree/(.+)": FakeHub.tree,
    f"POST /api/models/{NAME}/preupload/(.+)": FakeHub.preupload,
    f"POST /api/models/{NAME}/commit/(.+)": FakeHub.commit,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": FakeHub.batch,
    "PUT /lfs/(.+)": FakeHub.put,
    "POST /lfs/verify/(.+)": FakeHub.verify,
    "GET /lfs/(.+)": FakeHub.blob,
    f"(?:HEAD|GET) /{NAME}/resolve/([^/]+)/(.+)": FakeHub.resolve,
    r"(?:HEAD|GET) /.*(evil\.txt|delta_config\.json|delta\.safetensors)": FakeHub.harm,
}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The fake Hub, in place of the real one, with the token of someone who may write and an empty cache."""
    server = FakeHub()
    # huggingface_hub reads its environment when it is imported, which has long happened.
    environment = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    for name, value in environment.items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)  # imported by name
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda _: None))  # of retries
    monkeypatch.setenv("HF_TOKEN", "writer")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    reset_sessions()
    yield server
    server.close()
    reset_sessions()


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()


def classifier():
    return fresh("bert", "FlaxBertForSequenceClassification")


@functools.cache
def lora(seed: int = 0) -> jdelta.LoraModel:
    """A delta that stands for a trained one; each seed gives other values. Built once: leave it as it is."""
    delta = jdelta.LoraModel(classifier(), lora_r=2)
    delta.freeze_module(exclude=["deltas", "classifier"])
    train_deltas(delta, seed)
    return delta


def load(source: str = REPO, **options) -> jdelta.DeltaModel:
    return jdelta.AutoDeltaModel.from_finetuned(source, backbone_model=classifier(), **options)


def stored(revision: str | None = None) -> Finetuned:
    """What the Hub gives, without a model to put it on."""
    return Finetuned.read(hub.fetch(REPO, revision))


def assert_same(left: jdelta.DeltaModel | Finetuned, right: jdelta.DeltaModel | Finetuned):
    a, b = (it if isinstance(it, Finetuned) else it.finetuned() for it in (left, right))
    assert a.config == b.config
    assert a.values.keys() == b.values.keys()
    for name in a.values:
        np.testing.assert_array_equal(a.values[name], b.values[name], strict=True, err_msg=name)


def holds(fake: FakeHub, revision: str = "main") -> dict[str, bytes]:
    return fake.repos[REPO].commits[fake.repos[REPO].sha(revision)]


def publish(fake: FakeHub, files: dict[str, bytes] | None = None) -> Repository:
    """Puts a repository with these files on the Hub, or one with a delta, without jdelta's `push`."""
    fake.repos[REPO] = Repository()
    if files is None:
        lora().save_finetuned("saved")
        files = {name: Path("saved", name).read_bytes() for name in (folder.CONFIG, folder.TENSORS)}
    fake.repos[REPO].commit("main", files)
    return fake.repos[REPO]


@contextlib.contextmanager
def refused(error: type[Exception], *words: str):
    """Loads into a model; it fails with exactly this error and words, and leaves the model alone."""
    model = classifier()
    before = jax.tree.leaves(model.params)
    with pytest.raises(error) as raised:
        yield model
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)
    assert not attachments_of(model.module)
    after = jax.tree.leaves(model.params)
    assert len(after) == len(before)
    assert all(a is b for a, b in zip(after, before, strict=True))


# --- there and back


@pytest.mark.parametrize("upload", ["regular", "lfs"])
def test_what_is_pushed_comes_back_bit_for_bit(fake, ids, upload):
    fake.upload = upload
    delta = lora()
    address = delta.push_to_hub(REPO)
    assert address == f"{fake.url}/{REPO}/commit/{fake.repos[REPO].sha('main')}"
    delta.save_finetuned("saved")
    for name in (folder.CONFIG, folder.TENSORS, folder.CARD):
        assert holds(fake)[name] == Path("saved", name).read_bytes()
    assert (len(fake.blobs) == 1) == (upload == "lfs")

    back = load()
    assert_same(delta, back)
    np.testing.assert_array_equal(back.backbone_model(ids).logits, delta.backbone_model(ids).logits)
    plain = classifier()(ids).logits
    assert not np.array_equal(back.backbone_model(ids).logits, plain)


def test_load_finetuned_takes_a_repository_too(fake):
    delta, other = lora(0), lora.__wrapped__(1)
    delta.push_to_hub(REPO)
    other.load_finetuned(REPO)
    assert_same(delta, other)


def test_params_can_be_pushed_in_place_of_the_models_own(fake):
    delta, trained = lora(0), lora(1)
    delta.push_to_hub(REPO, trained.backbone_model.params)
    assert_same(stored(), trained)


def test_a_second_push_replaces_the_first_and_both_are_revisions(fake):
    first, second = lora(0), lora(1)
    old = first.push_to_hub(REPO).rsplit("/", 1)[-1]
    assert_same(load(), first)
    second.push_to_hub(REPO)
    assert_same(load(), second)
    assert_same(load(revision=old), first)


def test_a_branch_is_made_and_leaves_main_alone(fake):
    first, second = lora(0), lora(1)
    first.push_to_hub(REPO)
    for _ in range(2):  # the second time it is there
        second.push_to_hub(REPO, revision="runs/2")
    assert_same(stored(), first)
    assert_same(stored(revision="runs/2"), second)


def test_a_pull_request_leaves_main_alone(fake):
    first, second = lora(0), lora(1)
    first.push_to_hub(REPO)
    second.push_to_hub(REPO, create_pr=True)
    assert_same(stored(), first)
    assert_same(stored(revision="refs/pr/1"), second)


def test_a_name_without_its_user_is_completed(fake):
    lora().push_to_hub("movies")
    assert list(fake.repos) == [REPO]
    assert folder.TENSORS in holds(fake)


@pytest.mark.parametrize("private", [True, False])
def test_private_and_the_token_reach_the_hub(fake, monkeypatch, private):
    monkeypatch.delenv("HF_TOKEN")
    delta = lora()
    delta.push_to_hub(REPO, private=private, token="writer", commit_message="The best so far")
    assert fake.repos[REPO].private is private
    assert {token for _, _, token in fake.asked} == {"writer"}


def test_a_private_repository_opens_to_the_token_of_the_environment(fake, monkeypatch):
    delta = lora()
    delta.push_to_hub(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with refused(FileNotFoundError, REPO, "private", "HF_TOKEN") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)
    monkeypatch.setenv("HF_TOKEN", "reader")
    assert_same(load(), delta)


def test_a_delta_that_should_be_private_is_not_put_into_a_public_repository(fake):
    publish(fake, {})
    with pytest.raises(ValueError, match=r"'me/movies' is there already, and is public.*settings"):
        lora().push_to_hub(REPO, private=True)
    assert list(holds(fake)) == [".gitattributes"]


@pytest.mark.parametrize("own", [True, False])
def test_a_model_card_without_the_mark_stays(fake, own):
    card = f"# Mine\n{folder.MARK if own else ''}".encode()
    publish(fake, {folder.CARD: card})
    lora().push_to_hub(REPO)
    assert (holds(fake)[folder.CARD] != card) == own
    assert folder.CONFIG in holds(fake)


@pytest.mark.parametrize("upload", ["regular", "lfs"])
def test_a_push_writes_nothing_on_the_disk(fake, monkeypatch, tmp_path, upload):
    """So one that is killed leaves nothing, and a full disk does not matter."""
    fake.upload = upload
    publish(fake, {folder.CARD: folder.MARK.encode()})
    delta, limits = lora(), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        delta.push_to_hub(REPO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert_same(stored(), delta)
    assert not (tmp_path / "nowhere").exists()


def test_of_two_pushes_at_a_time_one_is_there(fake):
    deltas = [lora(0), lora(1)]
    with ThreadPoolExecutor(2) as threads:
        for pushed in [threads.submit(delta.push_to_hub, REPO) for delta in deltas]:
            assert pushed.result()
    found = stored().values
    assert any(all((delta.finetuned().values[k] == v).all() for k, v in found.items()) for delta in deltas)


def test_other_files_of_the_repository_stay(fake):
    publish(fake, {"results.txt": b"89 %"})
    lora().push_to_hub(REPO)
    assert holds(fake)["results.txt"] == b"89 %"


def test_only_the_files_of_the_delta_are_downloaded(fake):
    publish(fake).commit("main", {"model.safetensors": b"x", f"sub/{folder.CONFIG}": b"{}", "a.py": b"", "b.pkl": b""})
    load()
    files = [path.rpartition("/resolve/")[2].partition("/")[2] for path in fake.paths("GET") if "/resolve/" in path]
    assert set(files) == {folder.CONFIG, folder.TENSORS}
    assert len(files) == 2


def test_a_second_load_downloads_nothing(fake):
    publish(fake)
    stored()
    count = collections.Counter(fake.paths("GET"))
    stored()
    assert collections.Counter(fake.paths("GET")) - count == {f"/api/models/{REPO}/revision/main": 1}


def test_files_asked_for_are_those_that_come(fake):
    publish(fake, {"adapter_config.json": b"{}", folder.CONFIG: b"{}"})
    copy = hub.fetch(REPO, files=("adapter_config.json", "adapter_model.safetensors"))
    assert [file.name for file in copy.iterdir()] == ["adapter_config.json"]


# --- without a connection


def test_offline_what_was_loaded_before_comes_from_the_cache(fake, monkeypatch):
    repo = publish(fake)
    delta = load()
    repo.commit("main", {folder.CONFIG: b"changed since"})
    fake.asked.clear()
    offline(monkeypatch)
    assert_same(load(), delta)
    assert fake.asked == []


def test_with_the_hub_down_what_was_loaded_before_comes_from_the_cache(fake):
    publish(fake)
    delta = stored()
    fake.fails["."] = 503
    assert_same(stored(), delta)


def test_the_cache_that_pushing_leaves_alone_serves_offline(fake, monkeypatch):
    """A look at the model card must not make an incomplete snapshot the newest one."""
    repo = publish(fake)
    delta = stored()
    repo.commit("main", {folder.CARD: b"# Mine"})
    lora(1).push_to_hub(REPO)
    offline(monkeypatch)
    assert_same(stored(), delta)


@pytest.mark.slow
def test_the_environment_of_a_new_process_decides(fake, tmp_path):
    """As users have it: HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, with nothing replaced in huggingface_hub."""
    publish(fake)
    code = f"from jdelta.saved import folder, hub; print(folder.read(hub.fetch({REPO!r}))[2])"
    environment = {
        **os.environ,
        "HF_ENDPOINT": fake.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    for offline_too in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | offline_too, capture_output=True, text=True, check=False
        )
        assert done.stdout == "True\n", done.stderr
    assert len(fake.paths("GET")) == 3  # the list and two files, all by the first process


def test_offline_and_not_in_the_cache_is_said(fake, monkeypatch):
    publish(fake)
    offline(monkeypatch)
    with refused(ConnectionError, "no folder 'me/movies'", "HF_HUB_OFFLINE") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)
    with pytest.raises(ConnectionError, match=r"does not take 'me/movies'.*HF_HUB_OFFLINE"):
        lora().push_to_hub(REPO)
    assert fake.asked == []


def test_offline_a_cache_without_the_delta_is_no_repository_without_one(fake, monkeypatch):
    publish(fake)
    huggingface_hub.hf_hub_download(REPO, ".gitattributes")
    offline(monkeypatch)
    with refused(ConnectionError, REPO, "HF_HUB_OFFLINE") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)


def test_no_connection_is_said(fake):
    delta = lora()
    fake.close()
    with refused(ConnectionError, "no folder 'me/movies'", "refused") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)
    with pytest.raises(ConnectionError, match=r"does not take 'me/movies'.*refused"):
        delta.push_to_hub(REPO)


def test_the_login_page_of_a_network_is_no_hub(fake):
    fake.portal = True
    with refused(ConnectionError, REPO) as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)
    with pytest.raises(ConnectionError, match="does not take"):
        lora().push_to_hub(REPO)


# --- what cannot be loaded


@pytest.mark.parametrize("token", ["", "reader"])
def test_a_repository_that_does_not_exist(fake, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with refused(FileNotFoundError, "no folder 'me/nothing'", "it has none") as model:
        jdelta.AutoDeltaModel.from_finetuned("me/nothing", backbone_model=model)


def test_a_revision_that_does_not_exist(fake):
    publish(fake)
    with refused(FileNotFoundError, REPO, "no such revision", "'v9'") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model, revision="v9")


def test_a_gated_repository(fake):
    publish(fake).gated = True
    with refused(PermissionError, REPO, "Ask for it on its page") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)


@pytest.mark.parametrize("token", ["expired", "reader"])
def test_a_token_that_the_hub_does_not_know_or_allow(fake, monkeypatch, token):
    publish(fake)
    monkeypatch.setenv("HF_TOKEN", token)
    if token == "reader":
        fake.fails["/revision/"] = 403
    with refused(PermissionError, REPO, "token", "HF_TOKEN") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)


@pytest.mark.parametrize("where", ["/revision/", "HEAD .*/resolve/", "GET .*/resolve/"])
def test_a_hub_that_fails(fake, where):
    publish(fake)
    fake.fails[where] = 500
    with refused(ConnectionError, REPO, "500") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)


@pytest.mark.parametrize("files", [{}, {"model.safetensors": b"x", f"sub/{folder.CONFIG}": b"{}"}])
def test_a_repository_without_a_delta(fake, files):
    publish(fake, files)
    with refused(FileNotFoundError, REPO, folder.CONFIG, "it holds .gitattributes", *files) as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)


@pytest.mark.parametrize("missing", [folder.CONFIG, folder.TENSORS])
def test_a_repository_with_half_a_delta(fake, missing):
    del (files := next(reversed(publish(fake).commits.values())))[missing]
    assert len(files) == 2
    with refused(FileNotFoundError, "me--movies", f"{missing} is missing") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)


@pytest.mark.parametrize("name", [folder.CONFIG, folder.TENSORS])
@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "of another kind"])
def test_a_repository_whose_files_are_damaged(fake, name, how):
    repo = publish(fake)
    data = holds(fake)[name]
    flipped = data.replace(b'"lora"', b'"lola"') if name == folder.CONFIG else data[:-1] + bytes([data[-1] ^ 1])
    damaged = {"cut": data[:-9], "flipped": flipped, "empty": b"", "of another kind": b"[1, 2]"}[how]
    assert damaged != data
    repo.commit("main", {name: damaged})
    with refused(ValueError, "me--movies", name) as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)


def test_a_disk_that_fails_is_not_taken_for_a_hub_that_fails(fake, tmp_path):
    publish(fake)
    (tmp_path / "cache").write_text("a file, where huggingface_hub wants a folder")
    with refused(NotADirectoryError, "cache") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model)


# --- folder or repository


@pytest.mark.parametrize(
    "name", ["./out/lora", "../out", "a/b/c", "/out/lora", "out/lora/", "~/lora", "lora", "", "a b/c"]
)
def test_a_mistyped_path_is_not_asked_of_the_hub(fake, name):
    with refused(FileNotFoundError, f"no folder {name!r}", "'user/name'") as model:
        jdelta.AutoDeltaModel.from_finetuned(name, backbone_model=model)
    assert fake.asked == []


def test_a_mistyped_path_that_looks_like_a_repository(fake):
    with refused(FileNotFoundError, "no folder 'out/lora'", "the Hub gives no repository of that name") as model:
        jdelta.AutoDeltaModel.from_finetuned("out/lora", backbone_model=model)


def test_a_folder_goes_first(fake, tmp_path):
    publish(fake)
    delta = lora(1)
    delta.save_finetuned(REPO)
    assert_same(load(REPO), delta)
    assert_same(load(tmp_path / REPO), delta)
    with refused(ValueError, "'me/movies' is a path", "'v1'") as model:
        jdelta.AutoDeltaModel.from_finetuned(REPO, backbone_model=model, revision="v1")
    assert fake.asked == []


def test_a_path_object_is_never_a_repository(fake, tmp_path):
    publish(fake)
    with refused(FileNotFoundError, "no such folder") as model:
        jdelta.AutoDeltaModel.from_finetuned(tmp_path / REPO, backbone_model=model)
    assert fake.asked == []


# --- what cannot be pushed


@pytest.mark.parametrize(
    ("token", "word"), [("reader", "Forbidden"), ("expired", "Invalid credentials"), ("", "HF_TOKEN")]
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_push_that_is_not_allowed(fake, monkeypatch, token, word, exists):
    monkeypatch.setenv("HF_TOKEN", token)
    if exists:
        publish(fake, {})
    delta = lora()
    with pytest.raises(PermissionError, match=rf"does not take 'me/movies'(?s:.)*{word}"):
        delta.push_to_hub(REPO)
    assert not exists or list(holds(fake)) == [".gitattributes"]


@pytest.mark.parametrize(
    ("where", "status", "error"),
    [
        ("POST /api/repos/create", 500, ConnectionError),
        ("POST /api/repos/create", 400, ValueError),
        ("GET .*/README.md", 500, ConnectionError),
        ("POST .*/preupload/", 429, ConnectionError),
        ("POST .*/lfs/objects/batch", 403, PermissionError),
        ("PUT /lfs/", 403, PermissionError),
        ("POST .*/commit/", 403, PermissionError),
        ("POST .*/commit/", 413, ConnectionError),
    ],
)
def test_a_push_that_fails_midway_changes_nothing(fake, where, status, error):
    fake.repos[REPO] = Repository()
    fake.upload = "lfs"
    fake.fails[where] = status
    with pytest.raises(error, match=rf"does not take 'me/movies'(?s:.)*(so it is|{status})") as raised:
        lora().push_to_hub(REPO)
    assert type(raised.value) is error
    assert list(holds(fake)) == [".gitattributes"]


def test_a_push_to_a_pull_request_that_does_not_exist(fake):
    with pytest.raises(FileNotFoundError, match="no such revision"):
        lora().push_to_hub(REPO, revision="refs/pr/9")


@pytest.mark.parametrize("name", ["a/b/c", "me/mo vies", "", "me/"])
def test_a_name_that_no_repository_can_have(fake, name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        lora().push_to_hub(name)
    assert fake.asked == []


def test_an_unknown_option_of_a_push(fake):
    with pytest.raises(TypeError, match="privat"):
        lora().push_to_hub(REPO, privat=True)
    assert fake.asked == []


# --- a repository that means harm


@pytest.mark.parametrize("deltas_too", [True, False])
def test_names_that_leave_the_folder_are_never_written(fake, tmp_path, deltas_too):
    """`deltas_too`: the names end as a delta's files do, and huggingface_hub is asked for everything."""
    names = ("../{}", "../../../../{}", "a/../../../{}", f"{tmp_path}/{{}}", "..\\{}", "~/{}")
    evil = {name.format(file): b"evil" for name in names for file in (folder.CONFIG, "evil.txt")}
    repo = publish(fake)
    repo.commit("main", evil)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    if deltas_too:
        with pytest.raises(ValueError, match="Invalid pointer path"):
            hub.fetch(REPO, files=("*",))
    else:
        load()
        assert not any("evil" in path or ".." in path for path in fake.paths("GET"))
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]
    assert all((tmp_path / "cache" / "models--me--movies") in path.resolve().parents for path in written)
