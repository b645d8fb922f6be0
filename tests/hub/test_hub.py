"""The Hub's cache, and the errors of its client."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_fngd import hub
from hf_fngd.config import FNGDConfig
from tests.hub.configs import CONFIG, MAIN, OLD, load


@pytest.mark.parametrize("key", ["name_or_path", "subfolder", "revision", "cache_dir"])
@pytest.mark.parametrize("value", [5, ["a"], "a\0b", "a\nb", "\ud800", "a" * 5000])
def test_what_is_no_text_or_no_name_is_an_error_of_a_readable_length(seed, key, value):
    seed.put(CONFIG.to_json_string())
    options = {"name_or_path": "user/repo", "cache_dir": seed.cache, key: value}
    with pytest.raises((TypeError, ValueError, OSError)) as caught:
        FNGDConfig.from_pretrained(**options)
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("local_files_only", [True, False])
def test_the_cache_answers_without_a_network(seed, local_files_only):
    seed.put(CONFIG.to_json_string())
    assert load(seed, local_files_only=local_files_only) == CONFIG
    assert load(seed, local_files_only=local_files_only, lr=0.5).lr == 0.5
    assert FNGDConfig.load("user/repo", cache_dir=seed.cache, local_files_only=local_files_only) == CONFIG


def test_revision_and_subfolder(seed):
    seed.put(CONFIG.to_json_string())
    seed.put(CONFIG.to_json_string(), ref="refs/pr/1", commit="c" * 40)
    seed.put(FNGDConfig(lr=0.5).to_json_string(), commit=OLD, ref="v1")
    seed.put(FNGDConfig(lr=0.75).to_json_string(), subfolder="optimizer/fngd")
    assert load(seed) == load(seed, revision="main") == load(seed, revision=MAIN) == CONFIG
    assert load(seed, revision="refs/pr/1") == CONFIG
    assert load(seed, revision="v1").lr == load(seed, revision=OLD).lr == 0.5
    assert load(seed, subfolder="optimizer/fngd").lr == 0.75
    for missing in ({"revision": "v2"}, {"revision": "v1", "subfolder": "optimizer/fngd"}):
        with pytest.raises(OSError, match=r"not in the Hub's cache"):
            load(seed, **missing)


def test_a_cached_model_without_a_config_of_ours(seed):
    seed.put('{"lr": 0.5}', name="config.json")
    with pytest.raises(OSError, match=r"fngd_config\.json of 'user/repo'.*not in the Hub's cache.*HF_HUB_OFFLINE"):
        load(seed)


def test_saving_over_a_cached_file_leaves_the_cache_whole(seed):
    seed.put(CONFIG.to_json_string())
    snapshot = seed.cache / "models--user--repo" / "snapshots" / MAIN
    FNGDConfig().save_pretrained(snapshot)
    assert (seed.cache / "models--user--repo" / "blobs" / "0").read_text() == CONFIG.to_json_string()


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/file.json", "a/b/c", "user/re po", "user/" + "r" * 250])
def test_what_is_neither_local_nor_an_id(seed, name):
    with pytest.raises(OSError, match=r"no such local folder or \.json file") as caught:
        load(seed, name)
    assert str(caught.value).startswith(f"fngd_config.json of {name[:200]!r}")


def http_error(kind):
    """Build an error as the client raises it from a response of the Hub."""
    return kind("from the Hub", response=SimpleNamespace(headers={}, request=None, status_code=404))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        *(
            (http_error(kind), "no such local folder .* the Hub says: .*from the Hub")
            for kind in (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError, HfHubHTTPError)
        ),
        (EntryNotFoundError("from the client"), "the Hub says: from the client"),
        (LocalEntryNotFoundError("from the client"), "not in the Hub's cache"),
        (RuntimeError("connection lost"), "the Hub says: connection lost"),
    ],
)
def test_errors_of_the_client_say_what_was_looked_for(monkeypatch, error, message):
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
