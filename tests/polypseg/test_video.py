"""Videos: every frame once, warm starts that agree with cold ones, honest measurements."""

import csv
import json
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from polypseg import cli
from polypseg.data import DataError
from polypseg.predict import find_polyps, predict_files
from polypseg.predictor import Predictor
from polypseg.video import check_video, predict_video, saving, writable_rate

FRAMES = 22


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """A camera that moves over a smooth picture by a pixel a frame."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((150, 80), Image.Resampling.BICUBIC))
    return [picture[:, i : i + 120] for i in range(FRAMES)]


@pytest.fixture(scope="module")
def video(frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "pan.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 20.0, (120, 80))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def test_every_frame_has_a_mask_a_row_and_a_picture(tiny_run, video, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(video), "--run", str(tiny_run), "--out", str(out), "--solver", "anderson"]
    assert cli.predict(arguments) == 0
    printed = capsys.readouterr().out
    assert f"pan.mp4: {FRAMES} frames, with a polyp marked:" in printed
    assert "warm start, measured on 2 frames" in printed
    with open(out / "videos" / "pan.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["frame"]) for row in rows] == list(range(FRAMES))
    assert float(rows[-1]["time"]) == pytest.approx((FRAMES - 1) / 20)
    for row in rows:
        mask = np.asarray(Image.open(out / "masks" / "pan" / f"{int(row['frame']):06d}.png"))
        assert mask.shape == (80, 120)
        assert int(row["polyp_pixels"]) == (mask == 255).sum()
    assert [i for i, row in enumerate(rows) if row["cold_evaluations"]] == [10, 20]
    (entry,) = json.loads((out / "predictions.json").read_text())["videos"]
    assert (entry["file"], entry["frames"]) == (str(video), FRAMES)
    drawn = cv2.VideoCapture(str(out / "overlays" / "pan.mp4"))
    try:
        count = 0
        while drawn.read()[0]:
            count += 1
    finally:
        drawn.release()
    assert count == FRAMES
    assert not list((out / "overlays").glob(".*"))


def test_times_are_those_of_a_rate_that_varies(tiny_run, video, tmp_path):
    data = bytearray(video.read_bytes())
    # The second half lasts half as long: another entry in the table of the frames' durations.
    at = data.index(b"stts") - 4
    count, duration = struct.unpack(">II", data[at + 16 : at + 24])
    entries = (FRAMES // 2, duration, count - FRAMES // 2, duration // 2)
    data[at : at + 24] = struct.pack(">I4s6I", 32, b"stts", 0, 2, *entries)
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):  # in which it lies
        start = data.index(box) - 4
        data[start : start + 4] = struct.pack(
            ">I", 8 + int.from_bytes(data[start : start + 4], "big")
        )
    path = tmp_path / "varied.mp4"
    path.write_bytes(data)
    rows, _ = predict_video(Predictor.from_run(tiny_run, "explicit"), path, tmp_path / "out")
    durations = np.diff([row.time for row in rows])
    assert durations == pytest.approx([0.05] * (FRAMES // 2) + [0.025] * (FRAMES // 2 - 1))


def test_a_warm_start_saves_evaluations_and_keeps_the_answer(tiny_run, video, tmp_path):
    predictor = Predictor.from_run(tiny_run, "anderson", tol=1e-4, max_steps=50)
    rows, saved = predict_video(predictor, video, tmp_path / "out")
    assert saved.frames == 2
    assert saved.evaluations < saved.cold_evaluations
    assert saved.dice > 0.99
    assert all(row.status in ("CONVERGED", "STARTED_CONVERGED") for row in rows)
    measured = [row for row in rows if row.cold_evaluations > 0]
    assert saved.evaluations == np.mean([row.evaluations for row in measured])


def test_a_warm_start_at_the_solution_takes_one_evaluation(tiny_run, frames):
    predictor = Predictor.from_run(tiny_run, "anderson", tol=1e-3, max_steps=50)
    cold = predictor.predict_frame(frames[0])
    warm = predictor.predict_frame(frames[0], cold.state)
    assert (warm.result.evaluations, warm.result.status) == (1, "STARTED_CONVERGED")
    np.testing.assert_allclose(warm.result.probability, cold.result.probability, atol=1e-6)


def test_a_state_that_is_not_finite_is_not_used(tiny_run, frames):
    predictor = Predictor.from_run(tiny_run, "anderson")
    expected = predictor.predict(frames[0])
    state = predictor.predict_frame(frames[0]).state * float("nan")
    found = predictor.predict_frame(frames[0], state).result
    assert found.status == expected.status
    np.testing.assert_array_equal(found.probability, expected.probability)


def test_an_explicit_pass_has_nothing_to_save(tiny_run, video, tmp_path):
    _, saved = predict_video(Predictor.from_run(tiny_run, "explicit"), video, tmp_path / "out")
    assert saved.frames == 0
    assert "not measured" in str(saved)
    assert saving([]).frames == 0


def test_broken_videos_are_named_with_everything_else(tiny_run, video, tmp_path, capsys):
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 100)
    whole = video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.avi").write_bytes(b"")
    out = tmp_path / "out"
    assert cli.predict([str(tmp_path), "--run", str(tiny_run), "--out", str(out)]) == 1
    message = capsys.readouterr().err
    for name in ("noise.mp4", "cut.mp4", "empty.avi"):
        assert f"{tmp_path / name}: cannot be decoded as a video" in message
    assert not out.exists()
    with pytest.raises(DataError, match="there is no such file"):
        check_video(tmp_path / "nothing.mp4")


def test_a_video_that_was_cut_is_told(tiny_run, frames, tmp_path, capsys):
    path = tmp_path / "scope.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20.0, (120, 80))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    arguments = [str(path), "--run", str(tiny_run), "--solver", "explicit", "--out"]
    assert cli.predict([*arguments, str(tmp_path / "whole")]) == 0
    assert "warning" not in capsys.readouterr().err
    whole = path.read_bytes()
    # The frames of this container are whole JPEG files, one after the other.
    end = [i for i in range(len(whole)) if whole.startswith(b"\xff\xd8\xff", i)][9]
    path.write_bytes(whole[:end])
    assert cli.predict([*arguments, str(tmp_path / "cut")]) == 0
    error = capsys.readouterr().err
    assert f"warning: {path}: announces {FRAMES} frames, but only 9 could be decoded" in error


def test_overlays_that_cannot_be_written_whole_are_an_error(tiny_run, video, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    arguments = [str(video), "--run", str(tiny_run), "--solver", "explicit", "--out", str(out)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a disk or a file system that takes masks, which are small, and no large file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        assert cli.predict(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"pan.mp4: 0 of {FRAMES} frames could be written" in capsys.readouterr().err
    assert not list((out / "overlays").iterdir())


@pytest.mark.parametrize("rate", [0.5, 25.0, 30000 / 1001, 90.123, 119.637, 960.5432, 1e6])
def test_overlays_of_any_rate_can_be_written(tmp_path, rate):
    near = writable_rate(rate)
    code = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(tmp_path / "rate.mp4"), code, near, (64, 64))
    assert writer.isOpened()
    writer.release()
    assert near == pytest.approx(min(rate, 65535), rel=1e-4)


def test_overlays_of_odd_sizes_lose_no_pixel(tiny_run, tmp_path):
    path = tmp_path / "odd.avi"
    # FFmpeg's encoders would cut the frames already here.
    code = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), cv2.CAP_OPENCV_MJPEG, code, 20.0, (75, 51))
    picture = np.zeros((51, 75, 3), np.uint8)
    picture[-1], picture[:, -1] = 255, 255
    for _ in range(3):
        writer.write(picture)
    writer.release()
    predict_video(Predictor.from_run(tiny_run, "explicit"), path, tmp_path / "out")
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "odd" / "000000.png"))
    assert mask.shape == (51, 75)
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "overlays" / "odd.mp4"))
    try:
        frame = drawn.read()[1]
    finally:
        drawn.release()
    assert frame.shape == (52, 76, 3)
    # The last row and column are white, or yellow where they are outlined.
    assert frame[-1, :, 1].min() > 128
    assert frame[:, -1, 1].min() > 128
    assert np.median(frame[10:40, 10:60, 1]) < 128


def test_images_and_videos_are_found_side_by_side(tiny_run, video, frames, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "pan.mp4").write_bytes(video.read_bytes())
    Image.fromarray(frames[0]).save(folder / "pan.png")
    predictor = Predictor.from_run(tiny_run, "explicit")
    found = predict_files(predictor, [folder, f"{folder}/*.mp4"], tmp_path / "out")
    assert [row.file for row in found.images] == [str(folder / "pan.png")]
    assert [(path.name, len(rows)) for path, (rows, _) in found.videos.items()] == [
        ("pan.mp4", FRAMES)
    ]


def test_polyps_are_the_connected_regions():
    mask = np.zeros((20, 30), bool)
    mask[2:5, 3:9] = True
    mask[5, 9] = True  # touches by a corner
    mask[10:12, 20:22] = True
    assert find_polyps(mask) == [
        {"x": 3, "y": 2, "width": 7, "height": 4, "pixels": 19},
        {"x": 20, "y": 10, "width": 2, "height": 2, "pixels": 4},
    ]
    assert find_polyps(np.zeros((4, 4), bool)) == []
