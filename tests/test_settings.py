"""The one reader of the environment."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelstore.errors import InvalidSetting, Refused
from modelstore.reference import parse_reference
from modelstore.settings import FIELDS, Settings, parse_size

ROOT = {"MODELSTORE_ROOT": "/vol/modelstore"}


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    settings = Settings.from_env(ROOT)
    assert settings.root == Path("/vol/modelstore")
    assert (settings.dtype, settings.lease_s, settings.wait_s, settings.offline) == (None, 30.0, 1800.0, False)
    assert settings.model is None
    assert settings.hf_endpoint == "https://huggingface.co"


def test_every_variable_is_read() -> None:
    settings = Settings.from_env(
        ROOT
        | {
            "MODEL_ID": "org/name",
            "MODEL_REVISION": "v2",
            "MODEL_DTYPE": "bf16",
            "MODELSTORE_LEASE_S": "12",
            "MODELSTORE_WAIT_S": "34",
            "MODELSTORE_OFFLINE": "1",
            "MODELSTORE_ALLOWED_MODELS": "org/name, org/other@v1",
            "HF_TOKEN": "hf_secret",
            "HF_ENDPOINT": "http://127.0.0.1:1/",
            "RUNPOD_POD_ID": "pod-7",
        }
    )
    assert settings.model == parse_reference("org/name@v2")
    assert (settings.dtype, settings.lease_s, settings.wait_s, settings.offline) == ("bfloat16", 12.0, 34.0, True)
    assert settings.hf_endpoint == "http://127.0.0.1:1"
    assert settings.worker_id == "pod-7"
    assert len(settings.allowed_models) == 2
    assert "hf_secret" not in repr(settings)


def test_model_name_of_worker_vllm_serves_if_model_id_is_not_set() -> None:
    assert str(Settings.from_env(ROOT | {"MODEL_NAME": "org/other"}).model) == "org/other"
    assert str(Settings.from_env(ROOT | {"MODEL_NAME": "org/other", "MODEL_ID": "org/name"}).model) == "org/name"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MODEL_ID", "not a model"),
        ("MODEL_NAME", "x"),
        ("MODEL_DTYPE", "int3"),
        ("MODELSTORE_ROOT", "relative"),
        ("MODELSTORE_LEASE_S", "soon"),
        ("MODELSTORE_LEASE_S", "0"),
        ("MODELSTORE_WAIT_S", "-1"),
        ("MODELSTORE_WAIT_S", "nan"),
        ("MODELSTORE_OFFLINE", "maybe"),
        ("MODELSTORE_ALLOWED_MODELS", "org/name,??"),
        ("HF_ENDPOINT", "huggingface.co"),
        ("HF_ENDPOINT", "https://user:pass@host"),
        ("HF_ENDPOINT", "https://:secret@host"),
        ("HF_ENDPOINT", "http://[::1"),
        ("HF_ENDPOINT", "http://host:port"),
    ],
)
def test_a_bad_value_fails_and_names_its_variable(variable: str, value: str) -> None:
    with pytest.raises(InvalidSetting, match=variable) as caught:
        Settings.from_env(ROOT | {variable: value})
    assert caught.value.exit_code == 2


def test_a_bad_token_is_refused_without_being_shown() -> None:
    with pytest.raises(InvalidSetting, match="HF_TOKEN") as caught:
        Settings.from_env(ROOT | {"HF_TOKEN": "hf_sec ret"})
    assert "hf_sec" not in str(caught.value)


def test_the_root_is_on_the_mounted_volume_and_not_on_a_folder_of_that_name() -> None:
    mounted = "mfs#host:9421 /runpod-volume fuse rw 0 0\n"
    only_cached_models = "overlay / overlay rw 0 0\nx /runpod-volume/huggingface-cache/hub fuse ro 0 0\n"
    assert Settings.from_env({}, mounts=mounted).root == Path("/runpod-volume/modelstore")
    assert Settings.from_env({"HOME": "/h"}, mounts=only_cached_models).root != Path("/runpod-volume/modelstore")


def test_without_a_volume_the_root_is_in_the_cache_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    if Path("/workspace").is_dir():
        pytest.skip("this machine has a /workspace, which goes before the cache")
    assert Settings.from_env({"HOME": "/h"}, mounts="").root == Path("/h/.cache/modelstore")
    assert "no network volume" in caplog.text


def test_the_policy_lets_the_listed_models_through_and_no_other() -> None:
    settings = Settings.from_env(ROOT | {"MODEL_ID": "org/served", "MODELSTORE_ALLOWED_MODELS": "org/name,org/pin@v1"})
    settings.check_allowed(parse_reference("org/name"))
    settings.check_allowed(parse_reference("org/pin@v1"))
    for refused in ("org/other", "org/served", "file:///x"):
        with pytest.raises(Refused, match="MODELSTORE_ALLOWED_MODELS"):
            settings.check_allowed(parse_reference(refused))


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 200 * 10**9), ("1.5TiB", int(1.5 * 2**40)), ("7", 7), ("3 MB", 3 * 10**6)]
)
def test_sizes_are_decimal_and_binary_with_an_i(text: str, size: int) -> None:
    assert parse_size("X", text) == size


@pytest.mark.parametrize("text", ["much", "", "-1GB", "9" * 400, "1\u212a", "1e9", "1 XB"])
def test_a_size_that_is_none_names_its_variable(text: str) -> None:
    with pytest.raises(InvalidSetting, match="MODELSTORE_QUOTA"):
        parse_size("MODELSTORE_QUOTA", text)


def test_the_fields_that_are_documented_are_the_fields_that_are_read() -> None:
    class Recorder(dict[str, str]):
        def __init__(self) -> None:
            super().__init__(ROOT | {"MODEL_ID": "org/name"})
            self.read: set[str] = set()

        def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
            self.read.add(key)
            return super().get(key, default)

    environment = Recorder()
    Settings.from_env(environment)
    others = {"MODEL_NAME", "RUNPOD_POD_ID", "HUGGING_FACE_HUB_TOKEN", "OPENAI_SERVED_MODEL_NAME_OVERRIDE"}
    others.add("HF_HUB_OFFLINE")
    assert {field.variable for field in FIELDS} == environment.read - others


COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.mark.parametrize("asked", [f"org/safe@{OTHER}", "org/safe", "org/safe@refs/pr/1", "org/safe@v1"])
def test_a_model_that_is_allowed_at_a_commit_is_allowed_at_no_other(asked: str) -> None:
    settings = Settings.from_env(ROOT | {"MODELSTORE_ALLOWED_MODELS": f"org/safe@{COMMIT}"})
    settings.check_allowed(parse_reference(f"org/safe@{COMMIT}"))
    with pytest.raises(Refused, match="MODELSTORE_ALLOWED_MODELS"):
        settings.check_allowed(parse_reference(asked))


def test_an_entry_without_a_revision_means_the_one_that_the_operator_set() -> None:
    env = ROOT | {"MODEL_ID": "org/own", "MODEL_REVISION": "v2", "MODELSTORE_ALLOWED_MODELS": "org/own,org/other"}
    settings = Settings.from_env(env)
    for allowed in ("org/own@v2", "org/other"):
        settings.check_allowed(parse_reference(allowed))
    for refused in ("org/own", f"org/own@{COMMIT}", "org/other@v2", f"org/other@{COMMIT}"):
        with pytest.raises(Refused):
            settings.check_allowed(parse_reference(refused))


def test_code_runs_only_of_commits_that_the_operators_settings_name() -> None:
    env = {"MODELSTORE_TRUST_REMOTE_CODE": "1", "MODEL_ID": f"org/own@{COMMIT}"}
    settings = Settings.from_env(ROOT | env | {"MODELSTORE_ALLOWED_MODELS": f"org/own@{COMMIT},org/x@{OTHER},org/y,@z"})
    assert settings.may_run_code_of("org/own", COMMIT)
    assert settings.may_run_code_of("org/x", OTHER)
    for repo_id, commit in (("org/own", OTHER), ("org/x", COMMIT), ("org/y", COMMIT), ("org/z", COMMIT)):
        assert not settings.may_run_code_of(repo_id, commit)
    assert settings.may_run_code_of("org/y", COMMIT, named=parse_reference(f"org/y@{COMMIT}"))
    assert not settings.may_run_code_of("org/y", COMMIT, named=parse_reference("@y"))
    assert not Settings.from_env(ROOT | {"MODEL_ID": f"org/own@{COMMIT}"}).may_run_code_of("org/own", COMMIT)
    folder = Settings.from_env(ROOT | env | {"MODEL_ID": "file:///models/mine"})
    assert folder.may_run_code_of("local/mine", COMMIT)


@pytest.mark.parametrize("blank", ["\n", " ", "\r\n", "\t"])
def test_blanks_and_line_breaks_around_a_value_are_no_part_of_it(blank: str) -> None:
    """A secret that was made of a file often ends with one."""
    plain = {"MODELSTORE_ROOT": "/volume/modelstore", "HF_ENDPOINT": "https://hub.example", "HF_TOKEN": "hf_abc", "MODEL_ID": "org/name", "MODEL_REVISION": "main"}  # fmt: skip
    settings = Settings.from_env({name: f"{blank}{value}{blank}" for name, value in plain.items()})
    assert replace(settings, worker_id="w") == replace(Settings.from_env(plain), worker_id="w")
    assert (settings.root, settings.hf_token) == (Path("/volume/modelstore"), "hf_abc")


def test_a_bad_revision_is_blamed_on_its_own_variable() -> None:
    with pytest.raises(InvalidSetting, match=r"^MODEL_REVISION"):
        Settings.from_env(ROOT | {"MODEL_ID": "org/name", "MODEL_REVISION": "no good..\x00"})
    with pytest.raises(InvalidSetting, match=r"^MODEL_ID"):
        Settings.from_env(ROOT | {"MODEL_ID": "no good", "MODEL_REVISION": "main"})


def test_a_folder_of_the_image_is_no_volume() -> None:
    """Images have a /workspace of their own; RunPod mounts the pod's volume there."""
    image = "overlay / overlay rw 0 0\n"
    assert Settings.from_env({"HOME": "/h"}, mounts=image).root == Path("/h/.cache/modelstore")
    pod = f"{image}mfs#10.0.0.1:9421 /workspace fuse rw 0 0\n"
    assert Settings.from_env({"HOME": "/h"}, mounts=pod).root == Path("/workspace/modelstore")
