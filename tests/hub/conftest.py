"""A cache as the Hub's client lays it out, and a recorded Hub: no test needs a network."""

import os
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from hf_fngd import hub
from tests.hub.configs import MAIN


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
