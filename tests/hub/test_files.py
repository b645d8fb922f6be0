"""Local folders and files, and what may be in them."""

import os
import random
import stat

import pytest

from hf_fngd import hub
from hf_fngd.config import FNGDConfig
from tests.refusals import pickled, refusal

CONFIG = FNGDConfig(lr=0.25, sharing="never", damping=0.01, target_modules=["fc1", "fc2"])


def test_a_folder_gives_back_what_was_saved(tmp_path):
    (tmp_path / "plain").write_text("")
    path = CONFIG.save_pretrained(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "fngd_config.json"
    assert path.read_text() == CONFIG.to_json_string()
    assert [entry.name for entry in path.parent.iterdir()] == ["fngd_config.json"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for name in (path.parent, str(path.parent), path, str(path)):
        assert FNGDConfig.from_pretrained(name) == FNGDConfig.load(name) == CONFIG
    assert FNGDConfig.from_pretrained(tmp_path / "new", subfolder="./folder/") == CONFIG
    assert FNGDConfig.load(path, lr=0.5) == FNGDConfig.from_pretrained(path.parent, lr=0.5) != CONFIG


def test_saving_again_replaces_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "marian"}')
    FNGDConfig().save_pretrained(tmp_path)
    CONFIG.save_pretrained(tmp_path)
    assert FNGDConfig.from_pretrained(tmp_path) == CONFIG
    assert (tmp_path / "config.json").read_text() == '{"model_type": "marian"}'
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    CONFIG.save_pretrained(tmp_path)

    def full_disk(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        FNGDConfig().save_pretrained(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["fngd_config.json"]
    assert FNGDConfig.from_pretrained(tmp_path) == CONFIG


def test_what_cannot_be_saved_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="is a file: save_pretrained takes the folder"):
        CONFIG.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(TypeError, match="repo_id: only accepted together with push_to_hub=True"):
        CONFIG.save_pretrained(tmp_path, repo_id="user/repo")
    listed = FNGDConfig(target_modules=["a" * 60] * 3000)
    assert FNGDConfig.from_pretrained(listed.save_pretrained(tmp_path)) == listed
    with pytest.raises(ValueError, match=f"larger than {hub.MAX_BYTES} bytes.*regular expression"):
        FNGDConfig(target_modules=["a" * 60] * 6000).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_presets_name_goes_before_a_folder(tmp_path, monkeypatch):
    CONFIG.save_pretrained(tmp_path / "paper")
    monkeypatch.chdir(tmp_path)
    assert FNGDConfig.load("paper") == FNGDConfig.preset("paper")
    assert FNGDConfig.load("./paper") == FNGDConfig.from_pretrained("paper") == CONFIG


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "a\\..\\b", "../a", "../" * 100])
def test_an_unsafe_subfolder_is_refused(tmp_path, subfolder):
    error = refusal(lambda: FNGDConfig.from_pretrained(tmp_path, subfolder=subfolder))
    assert str(error).startswith("subfolder must be relative")


@pytest.mark.parametrize(
    ("name", "subfolder", "message"),
    [
        (".", "", "no fngd_config.json in the folder"),  # whose config.json is a model's own
        (".", "c", "no fngd_config.json in the folder"),
        ("config.yaml", "", "only a .json file is read"),
        ("config.json", "a", "without a subfolder"),
    ],
)
def test_a_path_without_a_config_of_ours_is_refused(tmp_path, name, subfolder, message):
    (tmp_path / "config.yaml").write_text("lr: 0.1")
    (tmp_path / "config.json").write_text('{"lr": 0.5}')
    error = refusal(lambda: FNGDConfig.from_pretrained(tmp_path / name, subfolder=subfolder))
    assert isinstance(error, OSError)
    assert message in str(error)


# What may be in a file -------------------------------------------------------------------------------------

OURS = CONFIG.to_json_string().encode()
NO_JSON = "not a valid JSON file"
MALFORMED = [
    (b"", NO_JSON),
    (b" \n\t", NO_JSON),
    *((OURS[:place], NO_JSON) for place in range(1, len(OURS) - 2, 40)),
    (OURS[:20] + b"\xff\xfe" + OURS[20:], NO_JSON),
    (OURS[:20] + b"\0" + OURS[20:], NO_JSON),
    (OURS + b"{}", NO_JSON),
    (OURS.replace(b'"', b"'"), NO_JSON),
    (b"// comment\n" + OURS, NO_JSON),
    (b"lr: 0.1\n", NO_JSON),
    (b"!!python/object/apply:os.system ['touch x']", NO_JSON),
    (b'{"lr": 1, "eps": 1, "lr": 2}', f"{NO_JSON}: a key is there more than once"),
    (b'{"future": {"a": 1, "a": 1}}', f"{NO_JSON}: a key is there more than once"),
    (b'{"lr": ' + b"9" * 5000 + b"}", NO_JSON),
    (b"[" * 200_000, NO_JSON),
    (b'{"a":' * 30_000 + b"1" + b"}" * 30_000, NO_JSON),
    *((random.Random(seed).randbytes(10**seed), NO_JSON) for seed in range(1, 6)),
    (b"[1, 2]", "must hold a JSON object, not a list"),
    (b"null", "must hold a JSON object, not a NoneType"),
    (OURS + b" " * hub.MAX_BYTES, f"larger than {hub.MAX_BYTES} bytes"),
    (OURS + b" " * hub.MAX_BYTES * 64, f"larger than {hub.MAX_BYTES} bytes"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_file_is_named(tmp_path, content, message):
    path = tmp_path / hub.CONFIG_NAME
    path.write_bytes(content)
    error = refusal(lambda: FNGDConfig.from_pretrained(tmp_path))
    assert isinstance(error, OSError)
    assert str(path) in str(error)
    assert message in str(error)


def test_a_pickle_is_not_unpickled(tmp_path):
    (tmp_path / hub.CONFIG_NAME).write_bytes(pickled(tmp_path / "executed"))
    assert NO_JSON in str(refusal(lambda: FNGDConfig.from_pretrained(tmp_path)))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "error", "key"),
    [
        ('{"lr": "fast"}', TypeError, "lr"),
        ('{"momentum": NaN}', ValueError, "momentum"),
        ('{"lr": 1e999}', ValueError, "lr"),
        ('{"damping": 0.1}', ValueError, "damping"),
        ('{"target_modules": ' + "[" * 200 + "]" * 200 + "}", TypeError, "target_modules"),
        ('{"config_version": "99.0"}', ValueError, "config_version"),
    ],
)
def test_a_bad_value_names_key_and_file(tmp_path, content, error, key):
    path = tmp_path / hub.CONFIG_NAME
    path.write_text(content)
    raised = refusal(lambda: FNGDConfig.from_pretrained(tmp_path))
    assert type(raised) is error
    assert str(raised).startswith(key)
    assert raised.__notes__ == [f"The config was read from {path}"]
    # What is wrong in a file may be replaced, what is wrong in the call may not.
    assert type(refusal(lambda: FNGDConfig.from_pretrained(tmp_path, learning_rate=0.5))) in (TypeError, ValueError)


def test_the_largest_file_that_is_read_and_keys_of_a_later_version(tmp_path):
    text = '{"lr": 0.5, "future": {"a": 1}, "config_version": "2.7"}'
    (tmp_path / hub.CONFIG_NAME).write_text(text.ljust(hub.MAX_BYTES))
    with pytest.warns(UserWarning, match="does not know: future"):
        assert FNGDConfig.from_pretrained(tmp_path) == FNGDConfig(lr=0.5)


ODD = {
    "a pipe": (os.mkfifo, "there is no fngd_config.json in the folder"),
    "a folder": (os.mkdir, "there is no fngd_config.json in the folder"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "there is no fngd_config.json in the folder"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "there is no fngd_config.json in the folder"),
    "a link to itself": (lambda path: path.symlink_to(path), "there is no fngd_config.json in the folder"),
    "a link to a secret": (lambda path: path.symlink_to("/etc/passwd"), NO_JSON),
    "a link to what cannot be read": (
        lambda path: path.symlink_to("/proc/self/mem"),
        "fngd_config.json cannot be read",
    ),
}


@pytest.mark.parametrize(("make", "message"), ODD.values(), ids=ODD)
def test_an_odd_file_is_neither_opened_nor_shown(tmp_path, make, message):
    make(tmp_path / hub.CONFIG_NAME)
    error = refusal(lambda: FNGDConfig.from_pretrained(tmp_path))
    assert message in str(error)
    assert "root:" not in str(error)
