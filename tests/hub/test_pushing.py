"""Pushing to a recorded Hub."""

import json

from huggingface_hub import ModelCard

from hf_fngd.config import FNGDConfig
from tests.hub.configs import CONFIG


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


def test_save_and_push(recorded, tmp_path):
    path = CONFIG.save_pretrained(tmp_path / "run-1", push_to_hub=True, token="t", private=False)
    assert FNGDConfig.from_pretrained(path) == CONFIG
    assert recorded.calls[0] == ("HfApi", {"token": "t", "library_name": "hf-fngd"})
    assert recorded.calls[1] == ("create_repo", "run-1", {"private": False, "exist_ok": True})
    CONFIG.save_pretrained(tmp_path / "run-1", push_to_hub=True, repo_id="user/other")
    assert recorded.calls[-1][1] == "user/other"
