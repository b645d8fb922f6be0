"""What from_pretrained may be called with, the Hub's cache, and the errors of its client."""

from types import SimpleNamespace

import pytest
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
from tests.hub.configs import CONFIG, MAIN, OLD, load

# Arguments -------------------------------------------------------------------------------------------------


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


# The Hub's cache -------------------------------------------------------------------------------------------


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


# The Hub's client ------------------------------------------------------------------------------------------


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
