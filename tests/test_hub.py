"""Files, a cache as the Hub's client lays it out, and a recorded Hub: no test needs a network."""

import json
import os
import stat
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_fngd import hub
from hf_fngd.config import FNGDConfig

CONFIG = FNGDConfig(lr=0.25, damping=0.01, target_modules=["fc1", "fc2"])
MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def seed(tmp_path):
    """Return a function that puts a file into a Hub cache, and the cache's folder."""
    cache = tmp_path / "cache"

    def put(text, commit=MAIN, ref="main", subfolder="", repo="user/repo", name=hub.CONFIG_NAME):
        folder = cache / ("models--" + repo.replace("/", "--"))
        blob = folder / "blobs" / f"{len(list(folder.glob('blobs/*')))}"
        pointer = folder / "snapshots" / commit / subfolder / name
        reference = folder / "refs" / ref
        for path in (blob, pointer, reference):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        reference.write_text(commit)

    return SimpleNamespace(put=put, cache=cache)


def load(seed, name="user/repo", **options):
    return FNGDConfig.from_pretrained(name, cache_dir=seed.cache, **options)


# Local folders and files


def test_a_folder_gives_back_what_was_saved(tmp_path):
    path = CONFIG.save_pretrained(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "fngd_config.json"
    assert path.read_text() == CONFIG.to_json_string()
    assert [entry.name for entry in path.parent.iterdir()] == ["fngd_config.json"]
    assert FNGDConfig.from_pretrained(path.parent) == CONFIG
    assert FNGDConfig.from_pretrained(str(path)) == CONFIG
    assert FNGDConfig.load(str(path.parent)) == FNGDConfig.load(path) == CONFIG


def test_saving_again_replaces_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "marian"}')
    FNGDConfig().save_pretrained(tmp_path)
    CONFIG.save_pretrained(tmp_path)
    assert FNGDConfig.from_pretrained(tmp_path) == CONFIG
    assert (tmp_path / "config.json").read_text() == '{"model_type": "marian"}'
    assert len(list(tmp_path.iterdir())) == 2


def test_a_models_own_config_is_never_read(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": 0.5}')
    with pytest.raises(OSError, match=r"no fngd_config\.json in the folder .*save_pretrained"):
        FNGDConfig.from_pretrained(tmp_path)


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    CONFIG.save_pretrained(tmp_path)

    def full_disk(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        FNGDConfig().save_pretrained(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["fngd_config.json"]
    assert FNGDConfig.from_pretrained(tmp_path) == CONFIG


def test_an_invalid_config_is_not_saved(tmp_path):
    config = FNGDConfig()
    config.lr = -1.0
    with pytest.raises(ValueError, match=r"^lr "):
        config.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_file_has_the_users_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    path = CONFIG.save_pretrained(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_saving_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="is a file: save_pretrained takes the folder"):
        CONFIG.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_hub_arguments_without_a_push_are_refused(tmp_path):
    with pytest.raises(TypeError, match="repo_id: only accepted together with push_to_hub=True"):
        CONFIG.save_pretrained(tmp_path, repo_id="user/repo")


def test_a_local_subfolder(tmp_path):
    CONFIG.save_pretrained(tmp_path / "a" / "b")
    assert FNGDConfig.from_pretrained(tmp_path, subfolder="a/b") == CONFIG
    assert FNGDConfig.from_pretrained(tmp_path / "a", subfolder="./b/") == CONFIG
    with pytest.raises(OSError, match=r"no fngd_config\.json in the folder .*c"):
        FNGDConfig.from_pretrained(tmp_path, subfolder="c")


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "a\\..\\b", "C:/a", "../a"])
def test_an_unsafe_subfolder_is_refused(tmp_path, subfolder):
    with pytest.raises(ValueError, match=r"^subfolder must be a relative path"):
        FNGDConfig.from_pretrained(tmp_path, subfolder=subfolder)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 0.1")
    with pytest.raises(OSError, match=r"only a \.json file is read"):
        FNGDConfig.from_pretrained(tmp_path / "config.yaml")
    path = CONFIG.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="without a subfolder"):
        FNGDConfig.from_pretrained(path, subfolder="a")


def test_an_empty_name_does_not_mean_the_working_folder(tmp_path, monkeypatch):
    CONFIG.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name_or_path is empty"):
        FNGDConfig.from_pretrained("")
    assert FNGDConfig.from_pretrained(".") == CONFIG


def test_a_presets_name_goes_before_a_folder(tmp_path, monkeypatch):
    CONFIG.save_pretrained(tmp_path / "paper")
    monkeypatch.chdir(tmp_path)
    assert FNGDConfig.load("paper") == FNGDConfig.preset("paper")
    assert FNGDConfig.load("./paper") == FNGDConfig.from_pretrained("paper") == CONFIG


def test_overrides(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    assert FNGDConfig.from_pretrained(tmp_path, lr=0.5).lr == 0.5
    assert FNGDConfig.load(tmp_path, lr=0.5).damping == CONFIG.damping
    with pytest.raises(ValueError, match="no argument 'learning_rate'"):
        FNGDConfig.from_pretrained(tmp_path, learning_rate=0.5)


# What may be in a file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a valid JSON file"),
        (b"", "not a valid JSON file"),
        (b"\xff\xfe\x00", "not a valid JSON file"),
        (b"\xef\xbb\xbf{}", "not a valid JSON file: Unexpected UTF-8 BOM"),
        (b'{"lr": 1, "eps": 1, "lr": 2}', "not a valid JSON file: the key 'lr' is there more than once"),
        (b'{"future": {"a": 1, "a": 1}}', "not a valid JSON file: the key 'a' is there more than once"),
        (b'{"lr": ' + b"9" * 5000 + b"}", "not a valid JSON file"),
        (b"[" * 200_000, "not a valid JSON file"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b"null", "must hold a JSON object, not a NoneType"),
        (b'{"lr": 1}' + b" " * hub.MAX_BYTES, f"larger than {hub.MAX_BYTES} bytes"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, content, message):
    path = tmp_path / hub.CONFIG_NAME
    path.write_bytes(content)
    with pytest.raises(OSError, match=message) as caught:
        FNGDConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "key"),
    [
        ('{"lr": "fast"}', TypeError, "lr"),
        ('{"damping": NaN}', ValueError, "damping"),
        ('{"lr": 1e999}', ValueError, "lr"),
        ('{"refresh": 1.5}', TypeError, "refresh"),
        ('{"strict": 1}', TypeError, "strict"),
        ('{"target_modules": ' + "[" * 200 + "]" * 200 + "}", TypeError, "target_modules"),
        ('{"config_version": "99.0"}', ValueError, "config_version"),
    ],
)
def test_a_bad_value_names_key_and_file(tmp_path, content, error, key):
    path = tmp_path / hub.CONFIG_NAME
    path.write_text(content)
    with pytest.raises(error, match=f"^{key}") as caught:
        FNGDConfig.from_pretrained(tmp_path)
    assert caught.value.__notes__ == [f"The config was read from {path}"]


def test_the_largest_file_that_is_read(tmp_path):
    (tmp_path / hub.CONFIG_NAME).write_bytes(b'{"lr": 1}'.ljust(hub.MAX_BYTES))
    assert FNGDConfig.from_pretrained(tmp_path) == FNGDConfig(lr=1.0)


def test_what_is_written_can_be_read(tmp_path, recorded):
    listed = FNGDConfig(target_modules=["a" * 60] * 3000)
    assert FNGDConfig.from_pretrained(listed.save_pretrained(tmp_path)) == listed
    listed.target_modules *= 2
    for use in (lambda: listed.save_pretrained(tmp_path / "new"), lambda: listed.push_to_hub("user/repo")):
        with pytest.raises(ValueError, match=f"larger than {hub.MAX_BYTES} bytes.*regular expression"):
            use()
    assert not (tmp_path / "new").exists()
    assert recorded.calls == []


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / hub.CONFIG_NAME).symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=rf"{hub.CONFIG_NAME} cannot be read: Input/output error"):
        FNGDConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_a_regular_file_is_opened(tmp_path, make):
    make(tmp_path / hub.CONFIG_NAME)
    with pytest.raises(OSError, match=rf"there is no {hub.CONFIG_NAME} in the folder"):
        FNGDConfig.from_pretrained(tmp_path)


# What from_pretrained may be called with

BAD_TEXTS = [(5, TypeError), (b"a", TypeError), (["a"], TypeError)]
BAD_TEXTS += [("a\0b", ValueError), ("a\nb", ValueError), ("\ud800", ValueError), ("a" * 5000, ValueError)]


@pytest.mark.parametrize("key", ["name_or_path", "subfolder", "revision", "cache_dir"])
@pytest.mark.parametrize(("value", "error"), BAD_TEXTS)
def test_arguments_that_are_no_text_are_named(seed, key, value, error):
    seed.put(CONFIG.to_json_string())
    options = {"name_or_path": "user/repo", "cache_dir": seed.cache, key: value}
    with pytest.raises(error, match=f"^{key} must") as caught:
        FNGDConfig.from_pretrained(**options)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"),
    [("token", 5), ("token", b"t"), ("local_files_only", 1), ("local_files_only", None), ("force_download", "no")],
)
def test_flags_and_the_token_are_checked(seed, key, value):
    seed.put(CONFIG.to_json_string())
    with pytest.raises(TypeError, match=f"^{key} must be .*, got a {type(value).__name__}"):
        load(seed, **{key: value})


@pytest.mark.parametrize(
    "revision", ["", "..", "../../refs/main", "a/../b", "/etc/passwd", "a b", "a~1", "a\\b", "a:b"]
)
def test_a_revision_that_git_would_refuse_never_becomes_a_path(seed, revision):
    seed.put(CONFIG.to_json_string())
    with pytest.raises(ValueError, match=r"^revision must be the name of a branch or a tag"):
        load(seed, revision=revision)


def test_revisions_with_slashes_are_fine(seed):
    seed.put(CONFIG.to_json_string(), ref="refs/pr/1")
    seed.put(CONFIG.to_json_string(), ref="feature/v1.0-rc_2", commit=OLD)
    assert load(seed, revision="refs/pr/1") == load(seed, revision="feature/v1.0-rc_2") == CONFIG


def test_a_long_name_is_shortened_in_the_message(seed):
    with pytest.raises(OSError, match=r"^fngd_config.json of 'user/r+\.\.\.'"):
        load(seed, name="user/" + "r" * 250)


def test_unknown_keys_warn(tmp_path):
    (tmp_path / hub.CONFIG_NAME).write_text('{"lr": 0.5, "future": {"a": 1}, "config_version": "1.7"}')
    with pytest.warns(UserWarning, match="does not know: future"):
        assert FNGDConfig.from_pretrained(tmp_path) == FNGDConfig(lr=0.5)


# The Hub's cache


@pytest.mark.parametrize("local_files_only", [True, False])
def test_the_cache_answers_without_a_network(seed, local_files_only):
    seed.put(CONFIG.to_json_string())
    assert load(seed, local_files_only=local_files_only) == CONFIG
    assert load(seed, local_files_only=local_files_only, lr=0.5).lr == 0.5
    assert FNGDConfig.load("user/repo", cache_dir=seed.cache, local_files_only=local_files_only) == CONFIG


def test_revision_and_subfolder(seed):
    seed.put(CONFIG.to_json_string())
    seed.put(FNGDConfig(lr=0.5).to_json_string(), commit=OLD, ref="v1")
    seed.put(FNGDConfig(lr=0.75).to_json_string(), subfolder="optimizer/fngd")
    assert load(seed) == load(seed, revision="main") == load(seed, revision=MAIN) == CONFIG
    assert load(seed, revision="v1").lr == load(seed, revision=OLD).lr == 0.5
    assert load(seed, subfolder="optimizer/fngd").lr == 0.75
    for missing in ({"revision": "v2"}, {"revision": "v1", "subfolder": "optimizer/fngd"}):
        with pytest.raises(OSError, match=r"not in the Hub's cache"):
            load(seed, **missing)


def test_a_cached_model_without_a_config_of_ours(seed):
    seed.put('{"lr": 0.5}', name="config.json")
    with pytest.raises(OSError, match=r"fngd_config\.json of 'user/repo'.*not in the Hub's cache") as caught:
        load(seed)
    assert str(seed.cache) in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_saving_over_a_cached_file_leaves_the_cache_whole(seed):
    seed.put(CONFIG.to_json_string())
    snapshot = seed.cache / "models--user--repo" / "snapshots" / MAIN
    FNGDConfig().save_pretrained(snapshot)
    assert (seed.cache / "models--user--repo" / "blobs" / "0").read_text() == CONFIG.to_json_string()


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/file.json", "a/b/c", "user/re po"])
def test_what_is_neither_local_nor_an_id(seed, name):
    with pytest.raises(OSError, match=r"no such local folder or \.json file"):
        load(seed, name)


def test_options_that_exclude_each_other(seed):
    seed.put(CONFIG.to_json_string())
    with pytest.raises(OSError, match="force_download"):
        load(seed, force_download=True, local_files_only=True)


def http_error(kind):
    """Build an error as the client raises it from a response of the Hub."""
    return kind("from the Hub", response=SimpleNamespace(headers={}, request=None, status_code=404))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(RepositoryNotFoundError), "no such local folder .* no such repository .*hf auth login"),
        (http_error(GatedRepoError), "access .* must be granted .*hf auth login"),
        (
            http_error(RevisionNotFoundError),
            "at revision 'v9': the repository has no such branch, tag or commit",
        ),
        (http_error(RemoteEntryNotFoundError), "repository has no such file.*push_to_hub"),
        (EntryNotFoundError("from the client"), "repository has no such file.*push_to_hub"),
        (LocalEntryNotFoundError("from the client"), "not in the Hub's cache"),
        (http_error(HfHubHTTPError), "could not be fetched from .*: .*from the Hub"),
        (RuntimeError("connection lost"), "could not be fetched from .*: connection lost"),
    ],
)
def test_errors_of_the_client_are_explained(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match=message) as caught:
        FNGDConfig.from_pretrained("user/repo", revision="v9", subfolder="sub")
    assert str(caught.value).startswith("sub/fngd_config.json of 'user/repo' at revision 'v9': ")
    assert caught.value.__cause__ is error


def test_options_reach_the_client(monkeypatch, tmp_path):
    path = CONFIG.save_pretrained(tmp_path)
    calls = []

    def download(*args, **kwargs):
        calls.append((args, kwargs))
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    options = {
        "revision": "v1",
        "cache_dir": str(tmp_path),
        "token": "t",
        "local_files_only": True,
        "force_download": True,
    }
    for method in (FNGDConfig.from_pretrained, FNGDConfig.load):
        assert method("user/repo", subfolder="sub", **options) == CONFIG
        assert calls.pop() == (("user/repo", "sub/fngd_config.json"), {**options, "library_name": "hf-fngd"})


# Pushing


class RecordedHub:
    """Stand-in for HfApi: keeps the calls in order, and the files of the last commit."""

    def __init__(self, has_card=False):
        self.has_card = has_card
        self.calls = []
        self.files = {}

    def __call__(self, **kwargs):
        self.calls.append(("HfApi", kwargs))
        return self

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        self.calls.append(("create_branch", repo_id, kwargs))

    def file_exists(self, repo_id, name, **kwargs):
        self.calls.append(("file_exists", repo_id, name, kwargs))
        return self.has_card

    def create_commit(self, repo_id, operations, **kwargs):
        self.calls.append(("create_commit", repo_id, kwargs))
        self.files = {operation.path_in_repo: operation.path_or_fileobj.decode() for operation in operations}
        return "the commit"


@pytest.fixture
def recorded(monkeypatch):
    api = RecordedHub()
    monkeypatch.setattr(hub, "HfApi", api)
    return api


def test_push_to_a_new_repository(recorded):
    commit = CONFIG.push_to_hub("user/repo", private=True, token="t", commit_message="Share")
    assert commit == "the commit"
    assert recorded.calls == [
        ("HfApi", {"token": "t", "library_name": "hf-fngd"}),
        ("create_repo", "user/repo", {"private": True, "exist_ok": True}),
        ("file_exists", "user/repo", "README.md", {"revision": None}),
        ("create_commit", "user/repo", {"commit_message": "Share", "revision": None, "create_pr": False}),
    ]
    assert set(recorded.files) == {"fngd_config.json", "README.md"}
    assert FNGDConfig.from_dict(json.loads(recorded.files["fngd_config.json"])) == CONFIG


def test_the_card_is_valid_and_tells_what_it_is(recorded):
    CONFIG.push_to_hub("repo")
    card = ModelCard(recorded.files["README.md"])
    assert card.data.to_dict()["library_name"] == "hf-fngd"
    assert card.data.tags == ["hf_fngd", "optimizer-config"]
    assert "model-index" not in card.data.to_dict()
    assert card.text.lstrip().startswith("# me/repo")
    assert 'FNGDConfig.from_pretrained("me/repo")' in card.text
    assert CONFIG.to_json_string() in card.text


def test_a_card_that_is_there_is_left_alone(recorded):
    recorded.has_card = True
    CONFIG.push_to_hub("user/repo")
    assert set(recorded.files) == {"fngd_config.json"}


def test_push_to_a_branch_creates_it(recorded):
    CONFIG.push_to_hub("user/repo", revision="tuned", create_pr=True)
    assert ("create_branch", "user/repo", {"branch": "tuned", "exist_ok": True}) in recorded.calls
    assert ("file_exists", "user/repo", "README.md", {"revision": "tuned"}) in recorded.calls
    name, _, options = recorded.calls[-1]
    assert (name, options["revision"], options["create_pr"]) == ("create_commit", "tuned", True)


def test_push_to_a_pull_request_creates_no_branch(recorded):
    CONFIG.push_to_hub("user/repo", revision="refs/pr/1")
    assert "create_branch" not in [call[0] for call in recorded.calls]


def test_an_invalid_config_is_not_pushed(recorded):
    config = FNGDConfig()
    config.lr = -1.0
    with pytest.raises(ValueError, match=r"^lr "):
        config.push_to_hub("user/repo")
    assert recorded.calls == []


def test_save_and_push(recorded, tmp_path):
    path = CONFIG.save_pretrained(tmp_path / "run-1", push_to_hub=True, token="t", private=False)
    assert FNGDConfig.from_pretrained(path) == CONFIG
    assert recorded.calls[0] == ("HfApi", {"token": "t", "library_name": "hf-fngd"})
    assert recorded.calls[1] == ("create_repo", "run-1", {"private": False, "exist_ok": True})
    CONFIG.save_pretrained(tmp_path / "run-1", push_to_hub=True, repo_id="user/other")
    assert recorded.calls[-1][1] == "user/other"
