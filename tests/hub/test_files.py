"""Local folders and files, and what may be in them."""

import os
import stat

import pytest

from hf_fngd import hub
from hf_fngd.config import FNGDConfig
from tests.hub.configs import CONFIG

# Local folders and files -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "a\\..\\b", "../a"])
def test_an_unsafe_subfolder_is_refused(tmp_path, subfolder):
    with pytest.raises(ValueError, match=r"^subfolder must be relative"):
        FNGDConfig.from_pretrained(tmp_path, subfolder=subfolder)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 0.1")
    with pytest.raises(OSError, match=r"only a \.json file is read"):
        FNGDConfig.from_pretrained(tmp_path / "config.yaml")
    path = CONFIG.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="without a subfolder"):
        FNGDConfig.from_pretrained(path, subfolder="a")


def test_a_presets_name_goes_before_a_folder(tmp_path, monkeypatch):
    CONFIG.save_pretrained(tmp_path / "paper")
    monkeypatch.chdir(tmp_path)
    assert FNGDConfig.load("paper") == FNGDConfig.preset("paper")
    assert FNGDConfig.load("./paper") == FNGDConfig.from_pretrained("paper") == CONFIG


def test_overrides(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    assert FNGDConfig.from_pretrained(tmp_path, lr=0.5).lr == 0.5
    assert FNGDConfig.load(tmp_path, lr=0.5).damping == CONFIG.damping
    with pytest.raises(TypeError, match="no argument 'learning_rate'"):
        FNGDConfig.from_pretrained(tmp_path, learning_rate=0.5)


# What may be in a file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a valid JSON file"),
        (b"", "not a valid JSON file"),
        (b"\xff\xfe\x00", "not a valid JSON file"),
        (b'{"lr": 1, "eps": 1, "lr": 2}', "not a valid JSON file: a key is there more than once"),
        (b'{"future": {"a": 1, "a": 1}}', "not a valid JSON file: a key is there more than once"),
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
        ('{"momentum": NaN}', ValueError, "momentum"),
        ('{"lr": 1e999}', ValueError, "lr"),
        ('{"damping": 0.1}', ValueError, "damping"),
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
    listed = FNGDConfig(target_modules=["a" * 60] * 6000)
    for use in (lambda: listed.save_pretrained(tmp_path / "new"), lambda: listed.push_to_hub("user/repo")):
        with pytest.raises(ValueError, match=f"larger than {hub.MAX_BYTES} bytes.*regular expression"):
            use()
    assert not (tmp_path / "new").exists()
    assert recorded.calls == []


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / hub.CONFIG_NAME).symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=rf"{hub.CONFIG_NAME} cannot be read: .*Input/output error"):
        FNGDConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_a_regular_file_is_opened(tmp_path, make):
    make(tmp_path / hub.CONFIG_NAME)
    with pytest.raises(OSError, match=rf"there is no {hub.CONFIG_NAME} in the folder"):
        FNGDConfig.from_pretrained(tmp_path)


def test_unknown_keys_warn(tmp_path):
    (tmp_path / hub.CONFIG_NAME).write_text('{"lr": 0.5, "future": {"a": 1}, "config_version": "2.7"}')
    with pytest.warns(UserWarning, match="does not know: future"):
        assert FNGDConfig.from_pretrained(tmp_path) == FNGDConfig(lr=0.5)
