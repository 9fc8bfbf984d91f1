"""What a training starts from: another run, also one with other classes, and what is refused."""

from pathlib import Path

import pytest
import torch
import yaml

from polypseg.checkpoint import CheckpointError, load_weights, save_weights
from polypseg.config import ConfigError, ModelConfig, make_config
from polypseg.data import make_synthetic
from polypseg.models import build_model
from polypseg.released import RELEASED
from polypseg.starting import Start, network_of
from polypseg.train import main


def model_config(*settings: str) -> ModelConfig:
    return make_config(overrides=settings).model


def a_run(folder: Path, *settings: str, phase: str = "explicit", seed: int = 7) -> Path:
    """A run directory of one phase with random weights."""
    config = make_config(overrides=settings)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    torch.manual_seed(seed)
    weights = build_model(config.model).state_dict()
    save_weights(folder / f"{phase}.safetensors", weights, {"model": config.model.name})
    return folder


@pytest.mark.parametrize("name", ["polypdeq-res", "mdeq", "segformer-b0"])
def test_all_weights_of_a_run_are_taken(name: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", f"model.name={name}")
    config = model_config(f"model.name={name}")
    model = build_model(config)
    assert Start(run=run).load(model, config).endswith("run/explicit.safetensors")
    torch.testing.assert_close(
        dict(model.state_dict()), load_weights(run / "explicit.safetensors")[0], rtol=0, atol=0
    )


@pytest.mark.skipif(not RELEASED.is_dir(), reason="not a clone")
def test_a_released_model_has_only_implicit_weights() -> None:
    config = make_config(network_of(RELEASED)).model
    model = build_model(config)
    assert "implicit.safetensors" in Start(run=RELEASED).load(model, config)
    theirs, _ = load_weights(RELEASED / "implicit.safetensors")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs[key].to(value.dtype), rtol=0, atol=0)


def test_explicit_weights_are_preferred(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", phase="implicit")
    (run / "explicit.safetensors").write_bytes(
        (a_run(tmp_path / "other", seed=8) / "explicit.safetensors").read_bytes()
    )
    model = build_model(model_config())
    assert "explicit.safetensors" in Start(run=run).load(model, model_config())


@pytest.mark.parametrize("name", ["polypdeq-add", "mdeq", "segformer-b0"])
def test_other_classes_begin_with_the_same_pixels(name: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", f"model.name={name}")
    one = model_config(f"model.name={name}")
    three = model_config(f"model.name={name}", "model.classes=3")
    binary, several, back = build_model(one), build_model(three), build_model(one)
    Start(run=run).load(binary, one)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():  # so that half of the pixels are polyp
        binary.get_parameter(f"head.{len(binary.head) - 1}.bias").sub_(
            binary.eval().explicit(images).logits.median()
        )
    save_weights(run / "explicit.safetensors", binary.state_dict(), {})
    assert "tells 3 classes as it told 1" in Start(run=run).load(several, three)
    other = tmp_path / "three"
    other.mkdir()
    (other / "config.yaml").write_text(
        make_config(overrides=[f"model.name={name}", "model.classes=3"]).to_yaml()
    )
    save_weights(other / "explicit.safetensors", several.state_dict(), {})
    assert "tells 1 classes as it told 3" in Start(run=other).load(back, one)

    with torch.no_grad():
        logits, classes, again = (
            model.eval().explicit(images).logits for model in (binary, several, back)
        )
    polyp = logits[:, 0] > 0
    assert polyp.any()
    assert not polyp.all()
    torch.testing.assert_close(classes.argmax(1) > 0, polyp)
    torch.testing.assert_close(again, logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.name=polypdeq-res"], r"holds a polypdeq-add .* give model\.name=polypdeq-add"),
        (["model.encoder=b1"], r"encoder b0, and .* encoder b1"),
    ],
)
def test_another_network_is_refused(settings: list[str], message: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    config = model_config(*settings)
    with pytest.raises(CheckpointError, match=message):
        Start(run=run).load(build_model(config), config)


def test_a_folder_that_is_no_run_or_has_no_weights_is_refused(tmp_path: Path) -> None:
    model, config = build_model(model_config()), model_config()
    with pytest.raises(ConfigError, match=r"not a run directory; it has no config\.yaml"):
        Start(run=tmp_path).load(model, config)
    run = a_run(tmp_path / "run")
    (run / "explicit.safetensors").unlink()
    with pytest.raises(CheckpointError, match="train its explicit phase first"):
        Start(run=run).load(model, config)


def test_the_network_is_that_of_the_run_unless_another_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", "model.name=polypdeq-res", "model.classes=3", "data.size=64")
    command = [str(tmp_path / "new"), "--start-from", str(run), "--print-config"]
    assert main(command) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"] == {"name": "polypdeq-res", "encoder": "b0", "classes": 1}
    assert config["data"]["size"] == make_config().data.size
    assert main([*command, "model.name=mdeq"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["name"] == "mdeq"


def test_fine_tuning_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", a_run(tmp_path / "run")
    make_synthetic(data, train=8, test=1, size=32, seed=0)
    tiny = ["data.size=32", "data.scales=[1.0]", "explicit.epochs=1", "explicit.batch=4"]
    still = ["explicit.lr=1e-12", "explicit.final_lr=1e-12"]
    common = ["--data", str(data), "--phases", "explicit", "--no-evaluate", *tiny, *still]
    tuned = tmp_path / "tuned"
    assert main([str(tuned), "--start-from", str(run), *common]) == 0
    assert f"starts from {run}" in (tuned / "train.log").read_text()
    theirs, _ = load_weights(run / "explicit.safetensors")
    ours, _ = load_weights(tuned / "explicit.safetensors")
    for key in (key for key in theirs if key.startswith("deq.")):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)

    with pytest.raises(ConfigError, match="no config"):
        main([str(tmp_path / "new"), "--start-from", str(tmp_path / "nowhere"), *common])
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        main([str(tuned), "--start-from", str(run), "--encoder-weights", "w", *common])
    assert "not allowed with" in capsys.readouterr().err
