"""The configuration: complete, typed, and honest about every fault."""

from pathlib import Path

import pytest
import torch
import yaml

from polypseg import run_config
from polypseg.config import ConfigError, load_config, make_config
from polypseg.run_config import load_run_config
from polypseg.train import main
from polypseg.train_arguments import parse


def test_every_default_is_set_and_explained() -> None:
    text = (Path(__file__).parents[2] / "polypseg" / "defaults.yaml").read_text()
    settings = [line for line in text.splitlines() if ":" in line and not line.startswith("#")]
    shared = yaml.safe_load(text)["explicit"].keys() | yaml.safe_load(text)["hyper"].keys()
    for line in settings:
        # Keys that several phases share are explained where they first occur.
        assert "#" in line or line.split(":")[0].strip() in shared or line.strip().endswith(":"), (
            line
        )
    assert make_config() == make_config({})


def test_changes_and_overrides_come_on_top_in_order() -> None:
    config = make_config(
        {"explicit": {"epochs": 3, "lr": 0.1}}, ["explicit.epochs=5", "data.scales=[0.5, 2]"]
    )
    assert config.explicit.epochs == 5
    assert config.explicit.lr == 0.1
    assert config.data.scales == (0.5, 2)
    assert config.implicit == make_config().implicit


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = make_config({}, ["explicit.lr=1e-3", "model.name=polypdeq-res", "seed=7"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    assert config.explicit.lr == 1e-3


def test_an_older_run_keeps_its_meaning_where_defaults_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    stored = yaml.safe_load(make_config({}, ["explicit.ema=0.7"]).to_yaml())
    del stored["explicit"]["ema"]
    file.write_text(yaml.safe_dump(stored))
    with pytest.raises(ConfigError, match=r"config\.yaml: lacks explicit\.ema; .*\.safetensors"):
        load_run_config(file)
    # As if explicit.ema had come later, and meant 0.5 before.
    monkeypatch.setitem(run_config._AS_BEFORE, "explicit.ema", 0.5)
    assert load_run_config(file) == make_config({}, ["explicit.ema=0.5"])
    assert load_run_config(file, ["seed=1"]).seed == 1


@pytest.mark.parametrize("key", sorted(run_config._AS_BEFORE))
def test_every_later_setting_may_be_lacking(tmp_path: Path, key: str) -> None:
    stored = yaml.safe_load(make_config().to_yaml())
    section, name = key.split(".")
    del stored[section][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    assert getattr(getattr(load_run_config(tmp_path / "config.yaml"), section), name) is not None


def test_the_released_models_are_understood() -> None:
    for file in (Path(__file__).parents[2] / "models").glob("*/config.yaml"):
        assert load_run_config(file).data.train_on in ("split", "all")


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(
            {"explicit": {"epoch": 3, "lr": "fast"}, "data": {"size": 100}, "modle": {}},
            ["implicit.solver", "seed.x=1", "hyper.batch=0"],
        )
    message = str(caught.value)
    for fragment in (
        "explicit.epoch is not",
        "explicit.lr must",
        "modle",
        "data.size must",
        "hyper.batch must",
        "implicit.solver",
        "seed",
    ):
        assert fragment in message


@pytest.mark.parametrize("pattern", [r"[a-z]+(\d+)", r"[^_]+_(\d)", "%(a)", "@(a)"])
def test_a_pattern_that_is_no_yaml_is_taken_as_it_stands(pattern: str) -> None:
    assert make_config(overrides=[f"data.group={pattern}"]).data.group == pattern


def test_nothing_after_the_equals_sign_empties_a_text_and_is_no_number() -> None:
    pattern = {"data": {"group": r"(\d+)_"}}
    assert make_config(pattern, ["data.group="]).data.group == ""
    with pytest.raises(ConfigError) as caught:
        make_config({}, ["seed=", "explicit.lr=", "data.scales="])
    for wanted in ("seed must be of type int, got ''", "explicit.lr must be of type float, got ''"):
        assert wanted in str(caught.value)
    assert "data.scales must be a list of numbers, got ''" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.scales=[1.0", "data.scales must be a list of numbers, got '[1.0'"),
        ("data.size=100", "data.size must be a positive multiple of 32, got 100"),
        (
            "model.name=unet",
            "model.name must be one of polypdeq-add, polypdeq-res, mdeq,",
        ),
        ("model.classes=2", "model.classes must be 1 or 3, got 2"),
        ("explicit.epochs=0", "explicit.epochs must be at least 1, got 0"),
        ("explicit.epochs=true", "explicit.epochs must be of type int, got True"),
        ("implicit.ema=1.5", "implicit.ema must be between 0 and 1, got 1.5"),
        ("implicit.backward=magic", "implicit.backward must be one of implicit, phantom"),
        ("data.scales=[1.0, .inf]", "data.scales must be positive and finite, got (1.0, inf)"),
        ("data.scales=[.nan]", "data.scales must be positive and finite, got (nan,)"),
        ("data.scales=[]", "data.scales must be at least one number, got ()"),
        ("explicit.lr=.inf", "explicit.lr must be a finite number, got inf"),
        ("implicit.ema=nan", "implicit.ema must be a finite number, got nan"),
        ("solve.tol=-.inf", "solve.tol must be a finite number, got -inf"),
        ("explicit.clip=0", "explicit.clip must be above 0, got 0.0"),
        ("implicit.clip=-1", "implicit.clip must be above 0, got -1.0"),
        ("seed=-1", "seed must be between 0 and 9223372036854775807 (2**63 - 1), got -1"),
        (f"seed={2**63}", "(2**63 - 1), got 9223372036854775808"),
    ],
)
def test_values_out_of_range_are_refused(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({}, [override])
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        f"{section}.{key}"
        for section, values in yaml.safe_load(make_config().to_yaml()).items()
        if isinstance(values, dict)
        for key, value in values.items()
        if isinstance(value, float)
    ],
)
def test_every_number_must_be_finite(name: str) -> None:
    for value in (".inf", "-.inf", ".nan"):
        with pytest.raises(ConfigError, match=rf"{name} must be a finite number, got -?(inf|nan)"):
            make_config({}, [f"{name}={value}"])


def test_the_largest_seed_is_one_that_torch_takes() -> None:
    seed = make_config({}, [f"seed={2**63 - 1}"]).seed
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: there is no such"):
        load_config(tmp_path / "gone.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: it must hold settings"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml: cannot be read"):
        load_config(tmp_path / "broken.yaml")


@pytest.mark.parametrize("name", ["runs/lr=1e-4", "lr=1e-4", "a/explicit.lr=1", "data.v2/lr=3"])
def test_a_new_run_may_have_an_equals_sign_in_its_name(name: str) -> None:
    arguments = parse([name, "explicit.lr=1e-4"])
    assert (arguments.run, arguments.set) == (Path(name), ["explicit.lr=1e-4"])


@pytest.mark.parametrize("setting", ["seed=3", "explicit.lr=1e-4", "data.scales=[1.0]", "data=3"])
def test_a_setting_is_not_taken_for_a_new_run(
    setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = parse(["--print-config", setting, "seed=2"])
    assert (arguments.run, arguments.set) == (None, [setting, "seed=2"])
    with pytest.raises(SystemExit):
        parse([setting])
    assert "RUN, the run directory, is needed" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["explicit.lrr=1", "lrr=1"])
def test_a_mistaken_setting_is_not_taken_for_a_new_run_either(setting: str) -> None:
    with pytest.raises(ConfigError, match="is not a setting"):
        main(["--print-config", setting])


def test_an_existing_folder_is_a_run_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seed=3").mkdir()
    assert parse(["seed=3"]).run == Path("seed=3")
