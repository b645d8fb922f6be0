"""A cache as the Hub's client lays it out, its errors, and pushing to a recorded Hub: no test needs a network."""

import json
import os
from types import SimpleNamespace
from unittest import mock
from unittest.mock import call

import pytest
from huggingface_hub import ModelCard, errors

from hf_fngd import hub
from hf_fngd.config import FNGDConfig
from tests.refusals import refusal

CONFIG = FNGDConfig(lr=0.25, sharing="never", damping=0.01, target_modules=["fc1", "fc2"])
MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def seed(tmp_path):
    """Return a function that puts a file into a Hub cache, and the cache's folder."""
    cache = tmp_path / "cache"

    def put(text, commit=MAIN, ref="main", subfolder="", name=hub.CONFIG_NAME):
        folder = cache / "models--user--repo"
        blob = folder / "blobs" / f"{len(list(folder.glob('blobs/*')))}"
        pointer = folder / "snapshots" / commit / subfolder / name
        reference = folder / "refs" / ref
        for path in (blob, pointer, reference):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        reference.write_text(commit)

    def load(name="user/repo", **options):
        return FNGDConfig.from_pretrained(name, **({"cache_dir": cache} | options))

    return SimpleNamespace(put=put, load=load, cache=cache)


# The Hub's cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local_files_only", [True, False])
def test_the_cache_answers_without_a_network(seed, local_files_only):
    seed.put(CONFIG.to_json_string())
    assert seed.load(local_files_only=local_files_only) == CONFIG
    assert seed.load(local_files_only=local_files_only, lr=0.5).lr == 0.5
    assert FNGDConfig.load("user/repo", cache_dir=seed.cache, local_files_only=local_files_only) == CONFIG
    # Saving over a cached file leaves the cache whole.
    FNGDConfig().save_pretrained(seed.cache / "models--user--repo" / "snapshots" / MAIN)
    assert (seed.cache / "models--user--repo" / "blobs" / "0").read_text() == CONFIG.to_json_string()


def test_revision_and_subfolder(seed):
    seed.put(CONFIG.to_json_string())
    seed.put(CONFIG.to_json_string(), ref="refs/pr/1", commit="c" * 40)
    seed.put(FNGDConfig(lr=0.5).to_json_string(), commit=OLD, ref="v1")
    seed.put(FNGDConfig(lr=0.75).to_json_string(), subfolder="optimizer/fngd")
    assert seed.load() == seed.load(revision="main") == seed.load(revision=MAIN) == CONFIG
    assert seed.load(revision="refs/pr/1") == CONFIG
    assert seed.load(revision="v1").lr == seed.load(revision=OLD).lr == 0.5
    assert seed.load(subfolder="optimizer/fngd").lr == 0.75
    for missing in ({"revision": "v2"}, {"revision": "v1", "subfolder": "optimizer/fngd"}):
        with pytest.raises(OSError, match=r"not in the Hub's cache"):
            seed.load(**missing)


def test_a_cached_model_without_a_config_of_ours(seed):
    seed.put('{"lr": 0.5}', name="config.json")
    with pytest.raises(OSError, match=r"fngd_config\.json of 'user/repo'.*not in the Hub's cache.*HF_HUB_OFFLINE"):
        seed.load()


NOWHERE = ["./no/such/folder", "/no/such/file.json", "a/b/c", "user/re po", "user/" + "r" * 250]


@pytest.mark.parametrize("name", [*NOWHERE, "http://localhost:1/x", "--x"])
def test_what_is_neither_local_nor_an_id(seed, name):
    error = refusal(lambda: seed.load(name))
    assert isinstance(error, OSError)
    assert str(error).startswith(f"fngd_config.json of {name[:200]!r}")
    assert "no such local folder or .json file" in str(error)


@pytest.mark.parametrize("key", ["name_or_path", "subfolder", "revision", "cache_dir"])
@pytest.mark.parametrize("value", [5, ["a"], b"a", object(), "a\0b", "\ud800", "x" * 5000, "../../../../etc", "a~1"])
def test_what_is_no_text_or_no_name_is_refused(seed, key, value):
    seed.put(CONFIG.to_json_string())
    arguments = {"name_or_path": "user/repo", "cache_dir": seed.cache} | {key: value}
    refusal(lambda: FNGDConfig.from_pretrained(**arguments), longest=21_000)


def test_a_misspelt_preset_is_told(seed):
    with pytest.raises(OSError, match="no such local folder") as caught:
        FNGDConfig.load("papr", cache_dir=seed.cache)
    assert caught.value.__notes__ == ["There is no such preset either: did you mean 'paper'?"]


def http_error(kind):
    """Build an error as the client raises it from a response of the Hub."""
    return kind("from the Hub", response=SimpleNamespace(headers={}, request=None, status_code=404))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        *(
            (http_error(kind), "no such local folder .* the Hub says: .*from the Hub")
            for kind in (
                errors.RepositoryNotFoundError,
                errors.GatedRepoError,
                errors.RevisionNotFoundError,
                errors.HfHubHTTPError,
            )
        ),
        (errors.EntryNotFoundError("from the client"), "the Hub says: from the client"),
        (errors.LocalEntryNotFoundError("from the client"), "not in the Hub's cache"),
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
    options = {"revision": "v1", "cache_dir": str(tmp_path), "token": "t"}
    options |= {"local_files_only": True, "force_download": True}
    for method in (FNGDConfig.from_pretrained, FNGDConfig.load):
        assert method("user/repo", subfolder="sub", **options) == CONFIG
        assert calls.pop() == (("user/repo", "sub/fngd_config.json"), {**options, "library_name": "hf-fngd"})


# Pushing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch):
    """Stand-in for HfApi, the class and the object, that keeps the calls in order."""
    api = mock.Mock(spec=hub.HfApi)
    api.return_value = api
    api.create_repo.side_effect = lambda name, **options: SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")
    api.file_exists.return_value = False
    api.create_commit.return_value = "the commit"
    monkeypatch.setattr(hub, "HfApi", api)
    return api


def committed(api):
    """Return the files of the last commit."""
    _, operations = api.create_commit.call_args.args
    return {operation.path_in_repo: operation.path_or_fileobj.decode() for operation in operations}


def test_push_to_a_new_repository(api):
    assert CONFIG.push_to_hub("user/repo", private=True, token="t", commit_message="Share") == "the commit"
    assert api.mock_calls == [
        call(token="t", library_name="hf-fngd"),
        call.create_repo("user/repo", private=True, exist_ok=True),
        call.file_exists("user/repo", "README.md", revision=None),
        call.create_commit("user/repo", mock.ANY, commit_message="Share", revision=None, create_pr=False),
    ]
    assert set(committed(api)) == {"fngd_config.json", "README.md"}
    assert FNGDConfig.from_dict(json.loads(committed(api)["fngd_config.json"])) == CONFIG


def test_the_card_is_valid_and_tells_what_it_is_and_one_that_is_there_is_left_alone(api):
    CONFIG.push_to_hub("repo")
    card = ModelCard(committed(api)["README.md"])
    assert card.data.to_dict()["library_name"] == "hf-fngd"
    assert card.data.tags == ["hf_fngd", "optimizer-config"]
    assert "model-index" not in card.data.to_dict()
    assert card.text.lstrip().startswith("# me/repo")
    assert 'FNGDConfig.from_pretrained("me/repo")' in card.text
    assert CONFIG.to_json_string() in card.text
    api.file_exists.return_value = True
    CONFIG.push_to_hub("user/repo")
    assert set(committed(api)) == {"fngd_config.json"}


def test_push_to_a_branch_creates_it_and_to_a_pull_request_does_not(api):
    CONFIG.push_to_hub("user/repo", revision="tuned", create_pr=True)
    api.create_branch.assert_called_once_with("user/repo", branch="tuned", exist_ok=True)
    api.file_exists.assert_called_once_with("user/repo", "README.md", revision="tuned")
    *_, (name, _, options) = api.mock_calls
    assert (name, options["revision"], options["create_pr"]) == ("create_commit", "tuned", True)
    CONFIG.push_to_hub("user/repo", revision="refs/pr/1")
    assert api.create_branch.call_count == 1


def test_save_and_push(api, tmp_path):
    path = CONFIG.save_pretrained(tmp_path / "run-1", push_to_hub=True, token="t", private=False)
    assert FNGDConfig.from_pretrained(path) == CONFIG
    created = [call(token="t", library_name="hf-fngd"), call.create_repo("run-1", private=False, exist_ok=True)]
    assert api.mock_calls[:2] == created
    CONFIG.save_pretrained(tmp_path / "run-1", push_to_hub=True, repo_id="user/other")
    assert api.create_commit.call_args.args[0] == "user/other"
    with pytest.raises(ValueError, match=f"larger than {hub.MAX_BYTES} bytes"):
        FNGDConfig(target_modules=["a" * 60] * 6000).push_to_hub("user/repo")
