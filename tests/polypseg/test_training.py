"""The training loop: shares and parts of a batch, NaN, lack of memory, three classes, recipes."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from polypseg import network_training
from polypseg.checkpoint import CheckpointError, load_state, load_weights
from polypseg.config import ConfigError, load_recipe, make_config, recipes
from polypseg.data import PolypDataset, batches, find_pairs, make_synthetic
from polypseg.objective import Objective
from polypseg.runs import lock_folder
from polypseg.train import main
from polypseg.validation import score

TINY = ["data.size=32", "data.scales=[1.0]", "explicit.epochs=2", "explicit.batch=4"]
TINY += ["explicit.ema=0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    make_synthetic(folder, train=10, test=1, size=32, seed=0)
    return folder


def train(run: Path, data: Path, *settings: str, phases: str = "explicit") -> None:
    arguments = [str(run), "--data", str(data), "--no-evaluate", "--phases", phases]
    assert main([*arguments, *TINY, *settings]) == 0


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_parts_and_processes_share_every_batch(data: Path) -> None:
    dataset = PolypDataset(find_pairs(data / "TrainDataset"), 32, train=False, seed=0)

    def order(**options: int) -> list[list[int]]:
        loader = batches(dataset, 4, True, 3, 1, drop_last=True, **options)
        return [batch["index"].tolist() for batch in loader]

    whole = order()
    assert [len(batch) for batch in whole] == [4, 4]
    parts = order(parts=2)
    assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == whole
    shares = [order(rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    both = [order(parts=2, rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*both, strict=True)] == parts
    with pytest.raises(ValueError, match="4 cannot be shared evenly by 3 parts x 1"):
        order(parts=3)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    config = make_config()
    images, masks = torch.randn(4, 3, 32, 32), (torch.rand(4, 1, 32, 32) > 0.5).float()
    gradients = []
    for parts in (1, 2):
        torch.manual_seed(0)
        objective = Objective(network_training.build_model(config.model), config.explicit)
        objective.eval()  # batch statistics are of a part
        for some, their in zip(images.chunk(parts), masks.chunk(parts), strict=True):
            (objective(some, their).objective / parts).backward()
        gradients.append([p.grad for p in objective.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


class Shares(torch.nn.Module):
    """A model whose average shows which share each update has in it: the k-th sets the k-th 1."""

    def __init__(self, updates: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(updates, dtype=torch.float64))
        self.register_buffer("statistics", torch.zeros(updates, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def update(self, number: int) -> None:
        with torch.no_grad():
            self.weight.zero_()[number] = 1
            self.statistics.zero_()[number] = 1
            self.count += 1


def shares_of(ema: float, updates: int, resumed_after: int | None = None) -> torch.Tensor:
    """The share of every update in the average of all."""
    model = Shares(updates)
    average = network_training.WeightAverage(model, ema)
    for number in range(updates):
        if number == resumed_after:
            state = average.state_dict()
            average = network_training.WeightAverage(Shares(updates), ema)
            average.load_state_dict(state)
        model.update(number)
        average.update_parameters(model)
    assert torch.equal(average.module.statistics, average.module.weight)
    assert average.module.count.dtype == torch.int64
    assert 0.5 * updates <= average.module.count.item() <= updates
    return average.module.weight.detach()


def test_the_average_of_a_short_training_is_not_its_start() -> None:
    a, b, c = 2 / 11, 3 / 12, 4 / 13  # decays of the second, third and fourth update, by hand
    expected = torch.tensor([a * b * c, (1 - a) * b * c, (1 - b) * c, 1 - c], dtype=torch.float64)
    torch.testing.assert_close(shares_of(0.99, 4), expected)
    torch.testing.assert_close(shares_of(0.99, 4, resumed_after=2), expected)
    torch.testing.assert_close(shares_of(0.0, 4), torch.eye(4, dtype=torch.float64)[3])


def test_the_average_of_a_long_training_is_that_without_warm_up() -> None:
    """With a decay of 0.9 the warm-up ends after 80 updates, which then have no share left."""
    ages = torch.arange(299, -1, -1, dtype=torch.float64)
    expected = 0.1 * 0.9**ages
    torch.testing.assert_close(shares_of(0.9, 300)[81:], expected[81:])
    torch.testing.assert_close(shares_of(0.9, 300), expected, rtol=0, atol=1e-9)


def test_a_short_training_saves_its_last_weights_rather_than_its_first(
    data: Path, tmp_path: Path
) -> None:
    train(tmp_path, data, "explicit.ema=0.99", "explicit.warmup=0")
    first = load_state(tmp_path / "previous.pt")["model"]  # after 2 of 4 updates
    last = load_state(tmp_path / "last.pt")["model"]
    saved, _ = load_weights(tmp_path / "explicit.safetensors")
    to_first, to_last = (
        sum(
            float((value - weights[key]).square().sum())
            for key, value in saved.items()
            if value.is_floating_point()
        )
        for weights in (first, last)
    )
    assert to_last < to_first


def test_a_resumed_run_may_be_cut_into_parts_but_not_otherwise_changed(
    data: Path, tmp_path: Path
) -> None:
    train(tmp_path, data)
    file = tmp_path / "config.yaml"  # as a version before data.train_on wrote it
    file.write_text(file.read_text().replace("  train_on: split\n", ""))
    train(tmp_path, data, "explicit.accumulate=2")
    assert "now also holds data.train_on=split, as before" in (tmp_path / "train.log").read_text()
    assert "train_on: split" in file.read_text()
    with pytest.raises(ConfigError, match=r"explicit\.lr was 0\.0006, now 0\.1"):
        train(tmp_path, data, "explicit.lr=0.1")


def test_an_update_without_finite_gradient_leaves_no_trace(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Objective.forward
    calls = iter(range(100))

    def sometimes_nan(self: Objective, images: torch.Tensor, *rest: object) -> object:
        return original(self, images * (float("nan") if next(calls) == 1 else 1), *rest)

    monkeypatch.setattr(Objective, "forward", sometimes_nan)
    train(tmp_path, data)
    assert [row["skipped"] for row in rows(tmp_path)] == ["1", "0"]
    assert "1 of 2 updates skipped" in (tmp_path / "train.log").read_text()
    weights, _ = load_weights(tmp_path / "explicit.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_lost_training_stops_and_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Objective.forward
    monkeypatch.setattr(
        Objective, "forward", lambda self, images, *rest: original(self, images * torch.nan, *rest)
    )
    monkeypatch.setattr(network_training, "MAX_SKIPPED", 3)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row.*lower explicit\.lr"):
        train(tmp_path, data)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")],
)  # fmt: skip
def test_lack_of_memory_names_the_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Objective, "forward", fail)
    with pytest.raises(MemoryError, match=r"explicit phase ran out .*raise explicit\.accumulate"):
        train(tmp_path, data)


def test_a_checkpoint_of_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "mdeq", data, "model.name=mdeq")
    (tmp_path / "polypdeq").mkdir()
    last = tmp_path / "polypdeq" / "last.pt"
    last.write_bytes((tmp_path / "mdeq" / "last.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"last\.pt: this checkpoint does not fit the polyp"):
        train(tmp_path / "polypdeq", data)
    weights = (tmp_path / "mdeq" / "explicit.safetensors").read_bytes()
    (tmp_path / "polypdeq" / "explicit.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"polypdeq-add \(they are of mdeq\)"):
        train(tmp_path / "polypdeq", data, phases="implicit")


def test_tensorboard_holds_every_epoch(data: Path, tmp_path: Path) -> None:
    """Skipped where it is not installed, which is no part of a development environment."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, data, "--tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "val_dice"):
        scalars = events.Scalars(f"explicit/{name}")
        assert [each.step for each in scalars] == [1, 2]
        expected = [float(row[name]) for row in rows(tmp_path)]
        assert [each.value for each in scalars] == pytest.approx(expected)


def test_without_tensorboard_nothing_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match="--tensorboard needs a package: pip install tensorboard"):
        train(tmp_path / "run", data, "--tensorboard")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mdeq", "segformer-b0"])
def test_other_networks_train(data: Path, tmp_path: Path, name: str) -> None:
    implicit = ["implicit.epochs=1", "implicit.batch=4", "hyper.epochs=1", "hyper.steps=2"]
    if name == "mdeq":
        train(tmp_path, data, f"model.name={name}", *implicit, phases="explicit,implicit,hyper")
        assert [row["phase"] for row in rows(tmp_path)] == ["explicit"] * 2 + ["implicit", "hyper"]
    else:
        with pytest.raises(ConfigError, match="segformer-b0 is an explicit network"):
            train(tmp_path, data, f"model.name={name}", phases="implicit")
        arguments = [str(tmp_path), "--data", str(data), "--no-evaluate", f"model.name={name}"]
        assert main([*arguments, *TINY]) == 0
        assert [row["phase"] for row in rows(tmp_path)] == ["explicit"] * 2


def paint(folder: Path, coloured: Path) -> None:
    """Copy a folder with its masks painted red and green in turn."""
    (coloured / "masks").mkdir(parents=True)
    (coloured / "images").symlink_to(folder / "images")
    for number, file in enumerate(sorted((folder / "masks").iterdir())):
        mask = np.asarray(Image.open(file)) > 0
        colour = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)[number % 2]
        Image.fromarray(mask[..., None] * colour).save(coloured / "masks" / file.name)


def test_three_classes_train_and_are_scored_apart(data: Path, tmp_path: Path) -> None:
    coloured = tmp_path / "data"
    paint(data / "TrainDataset", coloured)
    train(tmp_path / "run", coloured, "model.classes=3")
    last = rows(tmp_path / "run")[-1]
    each = [float(last[f"val_dice_{name}"]) for name in ("neoplastic", "non_neoplastic")]
    assert float(last["val_dice"]) == pytest.approx(sum(each) / 2)
    assert 0 <= float(last["val_dice_polyp"]) <= 1


def test_three_classes_are_tested_on_coloured_masks(data: Path, tmp_path: Path) -> None:
    coloured = tmp_path / "data"
    for folder in ("TrainDataset", "TestDataset/Synthetic"):
        paint(data / folder, coloured / folder)
    run = tmp_path / "run"
    arguments = [str(run), "--data", str(coloured), "--phases", "explicit", "model.classes=3"]
    assert main([*arguments, *TINY]) == 0
    with open(run / "evaluation" / "summary.csv", newline="") as file:
        found = [(row["data"], row["target"]) for row in csv.DictReader(file)]
    assert found == [("Synthetic", name) for name in ("polyp", "neoplastic", "non_neoplastic")]


def test_score_of_three_classes_by_hand() -> None:
    truth = torch.tensor([[0, 1, 1, 2]], dtype=torch.uint8)
    predicted = torch.tensor([0, 1, 2, 2])
    logits = torch.nn.functional.one_hot(predicted, 3).T[:, None].float()
    found = score(logits, truth)
    assert found["dice_neoplastic"] == pytest.approx(2 / 3)  # TP 1, FN 1
    assert found["dice_non_neoplastic"] == pytest.approx(2 / 3)  # TP 1, FP 1
    assert found["dice"] == pytest.approx(2 / 3)
    assert found["iou"] == pytest.approx(1 / 2)
    assert found["dice_polyp"] == 1


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_is_complete_and_can_be_listed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_recipe(name, ["seed=5"])
    assert config.seed == 5
    assert main(["--recipe", "list"]) == 0
    assert f"{name} " in capsys.readouterr().out
    assert main(["--recipe", name, "--print-config", "seed=5"]) == 0
    assert make_config(yaml.safe_load(capsys.readouterr().out)) == config


def test_the_paper_recipe_holds_the_papers_numbers() -> None:
    config = load_recipe("polypdeq-add-paper")
    explicit, implicit, hyper = config.explicit, config.implicit, config.hyper
    assert (explicit.epochs, explicit.batch, explicit.lr, explicit.final_lr) == (
        100,
        16,
        1e-3,
        1e-6,
    )
    assert (implicit.epochs, implicit.warm_epochs, implicit.solver) == (100, 5, "broyden")
    assert (implicit.warm_lr, implicit.lr, implicit.max_steps) == (1e-3, 1e-4, 100)
    assert (hyper.epochs, hyper.batch, hyper.lr, hyper.memory, hyper.steps) == (8, 8, 1e-3, 5, 12)
    assert (hyper.initializer, hyper.rank) == ("convolution", 0)
    assert config.solve.hyper_steps == 12
    assert config.data.scales == (0.75, 1.0, 1.25)
    with pytest.raises(ConfigError, match="no recipe 'unet'; known: demo, mdeq-paper"):
        load_recipe("unet")


def test_a_second_demo_leaves_the_images_of_the_first_alone(tmp_path: Path) -> None:
    half_drawn = tmp_path / "data.partial" / "TrainDataset"
    half_drawn.mkdir(parents=True)
    with (
        lock_folder(tmp_path),
        pytest.raises(ValueError, match="another training is at work in this run directory"),
    ):
        main([str(tmp_path), "--demo"])
    assert half_drawn.exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_torchrun_trains_one_run(data: Path, tmp_path: Path) -> None:
    module = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    program = ["--no-python", sys.executable, "-c", "import polypseg.cli as c; exit(c.train())"]
    arguments = [str(tmp_path / "two"), "--data", str(data), "--no-evaluate", "--device", "cpu"]
    phases = ["--phases", "explicit"]
    command = [*module, *program, *arguments, *phases, *TINY]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    train(tmp_path / "one", data)
    two, one = (rows(tmp_path / name) for name in ("two", "one"))
    assert [row["epoch"] for row in two] == ["1", "2"]
    for ours, theirs in zip(two, one, strict=True):
        assert float(ours["val_dice"]) == pytest.approx(float(theirs["val_dice"]), abs=0.02)
