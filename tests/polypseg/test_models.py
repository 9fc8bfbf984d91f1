"""The networks: shapes, injections, the encoder's identity and its weights."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deqsolvers import Anderson, Implicit, fixed_point
from polypseg.checkpoint import CheckpointError
from polypseg.config import MODELS, ModelConfig
from polypseg.models import MixTransformer, build_model, load_encoder_weights
from polypseg.models.mit import _segformer_name, _timm_name


def segformer_state(encoder: MixTransformer) -> dict[str, torch.Tensor]:
    """The encoder's weights under the names that SegFormer's own files use."""
    return {_segformer_name(key): value.clone() for key, value in encoder.state_dict().items()}


@pytest.fixture(scope="module")
def encoder() -> MixTransformer:
    torch.manual_seed(0)
    return MixTransformer("b0").eval()


def test_encoder_is_mit_b0(encoder: MixTransformer) -> None:
    # The number of parameters of SegFormer's MiT-B0 without its classification head.
    assert sum(p.numel() for p in encoder.parameters()) == 3_319_392
    with torch.inference_mode():
        shapes = [tuple(x.shape) for x in encoder(torch.randn(2, 3, 64, 96))]
    assert shapes == [(2, 32, 16, 24), (2, 64, 8, 12), (2, 160, 4, 6), (2, 256, 2, 3)]


@pytest.mark.parametrize(
    ("segformer", "timm"),
    [
        ("patch_embed1.proj.weight", "patch_embed.proj.weight"),
        ("patch_embed3.norm.bias", "stages.2.downsample.norm.bias"),
        ("block1.0.attn.q.weight", "stages.0.blocks.0.attn.q.weight"),
        ("block4.1.mlp.dwconv.dwconv.weight", "stages.3.blocks.1.mlp.dwconv.weight"),
        ("norm2.weight", "stages.1.norm.weight"),
    ],
)
def test_key_names(segformer: str, timm: str) -> None:
    assert _timm_name(segformer) == timm
    assert _segformer_name(timm) == segformer


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_encoder_weights_are_loaded_whole(
    encoder: MixTransformer, tmp_path: Path, suffix: str
) -> None:
    state = segformer_state(encoder)
    path = tmp_path / f"mit{suffix}"
    if suffix == ".pth":
        # As SegFormer's own files: nested, prefixed, with a head that is not the encoder's.
        state = {f"backbone.{key}": value for key, value in state.items()}
        torch.save({"state_dict": {**state, "decode_head.bias": torch.zeros(2)}}, path)
    else:
        save_file(state, path)
    other = build_model(ModelConfig()).eval()
    load_encoder_weights(other.encoder, path)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = encoder(image)
        x = other.features(image)
        assert torch.equal(x, expected[0])  # the model's own parts hold the weights
        for stage, wanted in zip(other.deq.f.stages, expected[1:], strict=True):
            x = stage(x)
            assert torch.equal(x, wanted)


def test_wrong_encoder_weights_name_the_keys_and_load_nothing(tmp_path: Path) -> None:
    model = build_model(ModelConfig())
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    state = segformer_state(model.encoder)
    del state["block2.1.norm1.weight"]
    state["block9.0.norm1.weight"] = torch.ones(3)
    state["norm1.bias"] = torch.ones(7)
    save_file(
        {key: torch.ones_like(value) for key, value in state.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CheckpointError) as caught:
        load_encoder_weights(model.encoder, tmp_path / "x.safetensors")
    for word in ("x.safetensors", "block2.1.norm1.weight", "block9.0.norm1.weight", "norm1.bias"):
        assert word in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"patch_embed1.proj.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match=r"bomb\.pth"):
        load_encoder_weights(MixTransformer(), tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_missing_file_of_encoder_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors.*no such file"):
        load_encoder_weights(MixTransformer(), tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_polypdeq_shapes_and_size(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name)).eval()
    # The paper's range for f is 3.9 to 4.2 million with its decoder.
    assert 3.7e6 < sum(p.numel() for p in model.parameters()) < 4.3e6
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        explicit = model.explicit(images)
        implicit = model(images)
    assert explicit.logits.shape == implicit.logits.shape == (2, 1, 64, 96)
    assert explicit.solution is None
    assert implicit.solution is not None
    assert implicit.solution.z.shape == (2, 32, 16, 24)


def test_injections_differ_where_they_should() -> None:
    add, res = (build_model(ModelConfig(name=name)).deq.f for name in MODELS)
    assert add.injection is None
    z, e = torch.randn(2, 1, 32, 16, 16)
    injected = res.injection(z, e)
    assert injected.shape == z.shape
    assert not torch.allclose(injected, z + e)


@pytest.mark.parametrize("name", MODELS)
def test_f_treats_images_independently_and_alike_in_training(name: str) -> None:
    torch.manual_seed(0)
    f = build_model(ModelConfig(name=name)).deq.f
    z, e = torch.randn(2, 3, 32, 16, 16)
    with torch.no_grad():
        together = f.train()(z, e)
        again = f(z, e)
        alone = f.eval()(z[1:2], e[1:2])
    assert torch.equal(together, again)  # nothing is redrawn between evaluations
    assert torch.allclose(together[1:2], alone, atol=1e-5)  # no batch statistics


def test_the_implicit_prediction_is_read_from_the_fixed_point() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig()).eval()
    model.deq = model.deq.with_solver(Anderson(), tol=1e-5, max_steps=100)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        e = model.features(images)
        solution = fixed_point(model.deq.f, torch.zeros_like(e), (e,), tol=1e-5, max_steps=100)
        prediction = model(images)
        assert torch.allclose(prediction.logits, model.read_out(solution.z), atol=1e-4)


def test_gradients_reach_every_parameter_through_the_fixed_point() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="polypdeq-res")).train()
    model.deq = model.deq.with_solver(Anderson(), backward=Implicit(tol=1e-3), max_steps=30)
    model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_sides_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 70"):
        build_model(ModelConfig())(torch.randn(1, 3, 64, 70))


def test_the_real_pretrained_encoder_loads() -> None:
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("POLYPSEG_DATA", default))
    path = folder.parent / "weights" / "mit_b0_ade20k.safetensors"
    if not path.is_file():
        pytest.skip(f"no pretrained encoder at {path}")
    encoder = MixTransformer().eval()
    before = encoder.patch_embed.proj.weight.clone()
    load_encoder_weights(encoder, path)
    assert not torch.equal(before, encoder.patch_embed.proj.weight)
