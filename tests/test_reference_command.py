"""The command that makes a reference profile, and the server that judges by one."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from guardserve.cli import main
from guardserve.demo.digits import SHIFTS, Digits, load_digits
from guardserve.detection.calibration import RunLength
from guardserve.exceptions import MissingExtraError, ReferenceMismatchError, ReferenceProfileError
from guardserve.loading import load_model
from guardserve.loading.arrays import load_batches
from guardserve.loading.images import load_images
from guardserve.metrics import Metrics
from guardserve.monitor import ReferenceProfile
from guardserve.runtime import Runtime
from guardserve.signature import TensorSpec

IMAGE = TensorSpec("image", torch.float32, (-1, 1, 8, 8))


def run(*arguments: str | Path) -> tuple[int, str]:
    """Run a command in this process; return its exit status and everything it printed."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Load the real digits once."""
    return load_digits()


@pytest.fixture(scope="module")
def made(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Make a profile of the demo's model from its reference images; return its file and the report."""
    folder = tmp_path_factory.mktemp("profile")
    np.save(folder / "clean.npy", digits.reference.images.numpy())
    status, text = run("reference", "demo", "--data", folder / "clean.npy", "--out", folder / "profile.safetensors")
    assert status == 0, text
    return folder / "profile.safetensors", text


def test_the_report_tells_count_target_measurement_and_what_the_data_carry(made: tuple[Path, str]) -> None:
    """451 images are too few for one false alarm in 10,000, and the report says so with what would do."""
    _, text = made
    assert "451 samples, 5 BatchNorm layers" in text
    assert "one false alarm in 10,000 samples" in text
    measured = re.search(r"measured +one in ([\d,]+) on samples that took no part\s+\(95 % interval ([\d,]+) to", text)
    assert measured, text
    assert int(measured[2].replace(",", "")) < int(measured[1].replace(",", ""))
    assert "a reference of 451 samples carries (4510): give at least 1000 samples" in text


def test_the_server_judges_requests_by_the_profile(made: tuple[Path, str], digits: Digits) -> None:
    """Live digits, which took no part in the profile, raise no alarm; inverted ones do at once."""
    runtime = Runtime(load_model("demo"), reference=ReferenceProfile.load(made[0]), target_arl=4000)
    runtime.start()
    metrics = Metrics(runtime)
    try:
        runtime.infer({"image": digits.live.images})
        assert runtime.monitor.verdict().alarms == 0
        assert 'guardserve_shift_alarms_total{model="digits_cnn"} 0.0' in metrics.render().decode()
        runtime.infer({"image": SHIFTS["inverted"](digits.live.images[:8])})
        text = metrics.render().decode()
    finally:
        runtime.close()
    assert 'guardserve_shift_state{model="digits_cnn",state="shifted"} 1.0' in text
    assert 'guardserve_shift_alarms_total{model="digits_cnn"} 1.0' in text


def test_serve_refuses_what_is_no_profile_of_the_model(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing file, or a profile of other weights, is one line before anything listens."""
    status, text = run("serve", "demo", "--reference", tmp_path / "absent.safetensors")
    assert status == 1
    assert "absent.safetensors cannot be read" in text
    other = load_model("demo")
    torch.nn.init.constant_(other.module.get_parameter("blocks.0.norm.weight"), 2.0)
    with pytest.raises(ReferenceMismatchError, match="fingerprint"):
        Runtime(other, reference=ReferenceProfile.load(made[0]))
    monkeypatch.setenv("GUARDSERVE_TARGET_ARL", "5")
    status, text = run("serve", "demo")
    assert status == 1
    assert "--target-arl (or GUARDSERVE_TARGET_ARL) is '5'" in text


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_every_format_gives_the_same_batches(tmp_path: Path, suffix: str) -> None:
    """The samples come in order, in the input's type, whatever holds them; the named array is taken among several."""
    samples = np.random.default_rng(0).random((70, 1, 8, 8))
    path = tmp_path / f"clean{suffix}"
    if suffix == ".npy":
        np.save(path, samples)
    elif suffix == ".npz":
        np.savez(path, image=samples, label=np.zeros(70))
    else:
        save_file({"image": samples, "label": np.zeros(70)}, path)
    batches = load_batches(path, IMAGE)
    parts = list(batches)
    assert len(batches) == 70
    assert [len(part) for part in parts] == [32, 32, 6]
    assert torch.equal(torch.cat(parts), torch.from_numpy(samples).float())
    fixed = load_batches(path, TensorSpec("image", torch.float32, (8, 1, 8, 8)))
    assert {len(part) for part in fixed} == {8}
    assert len(fixed) == 64


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A pickle, another shape, another type, another format, several unnamed arrays: none is guessed at."""
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros((5, 64), np.float32))
    np.save(tmp_path / "bytes.npy", np.zeros((5, 1, 8, 8), np.uint8))
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    (tmp_path / "clean.csv").write_text("1,2")
    for name, reason in (
        ("pickled.npy", "cannot be read as .npy"),
        ("flat.npy", r"has shape \(5, 64\), but input 'image' takes samples of shape \(1, 8, 8\)"),
        ("bytes.npy", "holds uint8, but input 'image' takes float32"),
        ("two.npz", "holds the arrays a, b"),
        ("broken.npz", "cannot be read as .npz"),
        ("clean.csv", "is none of .npy, .npz, .safetensors"),
        ("absent.npy", "cannot be read as .npy"),
    ):
        with pytest.raises(ReferenceProfileError, match=reason):
            load_batches(tmp_path / name, IMAGE)


def test_the_command_fails_before_it_runs_the_model_when_it_cannot_write(tmp_path: Path, digits: Digits) -> None:
    """A folder that is not there costs no minutes of reading."""
    np.save(tmp_path / "clean.npy", digits.reference.images[:4].numpy())
    status, text = run(
        "reference", "demo", "--data", tmp_path / "clean.npy", "--out", tmp_path / "no" / "p.safetensors"
    )
    assert status == 1
    assert "no is no folder" in text
    status, text = run("reference", "demo", "--data", tmp_path / "clean.npy", "--out", tmp_path / "p.safetensors")
    assert status == 1
    assert "4 finite samples: give at least 100" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.npy"]


def test_the_command_refuses_at_once_what_would_fail_at_the_end(tmp_path: Path, digits: Digits) -> None:
    """A folder or a fifo to write to, and a target that no number is: one line each, and both stay."""
    np.save(tmp_path / "clean.npy", digits.reference.images[:4].numpy())
    os.mkfifo(tmp_path / "fifo")
    for out, target, reason in (
        (tmp_path, "1000", "is a folder: give the path of a file"),
        (tmp_path / "fifo", "1000", "is no regular file: give the path of a file"),
        (tmp_path / "p.safetensors", "nan", "--target-arl is nan"),
    ):
        status, text = run("reference", "demo", "--data", tmp_path / "clean.npy", "--out", out, "--target-arl", target)
        assert (status, text.startswith("Error:"), reason in text.replace("\n", " ")) == (1, True, True), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.npy", "fifo"]


def test_a_batch_without_a_finite_sample_is_left_out(tmp_path: Path, digits: Digits) -> None:
    """Before the good ones, among them, and after."""
    images = digits.reference.images.numpy().copy()
    for start in (0, 96, 416):
        images[start : start + 32] = np.nan
    np.save(tmp_path / "clean.npy", images)
    out = tmp_path / "p.safetensors"
    status, text = run("reference", "demo", "--data", tmp_path / "clean.npy", "--out", out, "--target-arl", "100")
    assert status == 0, text
    assert "left out    96 samples with NaN or infinity" in text
    assert ReferenceProfile.load(out).samples == len(images) - 96


def test_the_report_tells_of_repeats_and_of_a_run_length_far_off(
    tmp_path: Path, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image twice: half of them count, and the report says so; and how far the measurement is from the target."""
    np.save(tmp_path / "clean.npy", np.concatenate([digits.reference.images.numpy()[:300]] * 2))
    monkeypatch.setattr("guardserve.detection.reference.measure", lambda *_, **__: RunLength(20, 10, 40))
    status, text = run(
        "reference", "demo", "--data", tmp_path / "clean.npy", "--out", tmp_path / "p", "--target-arl", "100"
    )
    assert status == 0, text
    assert "p: 300 samples, 5 BatchNorm layers" in text
    assert "left out    300 repeats: 300 samples are distinct" in text
    assert "warning     of 600 samples 300 are distinct" in text
    assert "warning     samples that took no part gave one false alarm in 20 (10 to 40), where 100 was asked" in text


def test_samples_that_do_not_differ_give_no_profile(tmp_path: Path, digits: Digits) -> None:
    """One image again and again, which the command could make a profile of that alarms at anything."""
    np.save(tmp_path / "same.npy", np.repeat(digits.reference.images[:1].numpy(), 120, axis=0))
    out = tmp_path / "p.safetensors"
    status, text = run("reference", "demo", "--data", tmp_path / "same.npy", "--out", out, "--target-arl", "100")
    assert status == 1
    assert "the reference's 120 samples do not differ in any layer" in text
    assert not out.exists()


def grey(folder: Path, images: torch.Tensor) -> None:
    """Write images, pixels from 0 to 1, as grey PNG files."""
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(folder / f"{index:04}.png")


def test_a_folder_of_images_gives_batches_in_the_order_of_names(tmp_path: Path, digits: Digits) -> None:
    """Pixels are scaled, shifted and divided as asked; folders within count; what is no image is passed over."""
    images = digits.reference.images[:40]
    grey(tmp_path / "clean", images)
    (tmp_path / "clean" / "notes.txt").write_text("not an image")
    grey(tmp_path / "clean" / "more", images[:3])
    batches = load_images(tmp_path / "clean", IMAGE, mean=[0.5], std=[0.25])
    parts = torch.cat(list(batches))
    assert len(batches) == 43
    assert torch.allclose(parts[:40], (images - 0.5) / 0.25, atol=4 / 255)
    assert torch.equal(parts[40:], parts[:3])
    free = TensorSpec("image", torch.float32, (-1, 3, -1, -1))
    resized = next(iter(load_images(tmp_path / "clean", free, size=16, mean=[0, 0, 1])))
    assert resized.shape == (32, 3, 16, 16)
    assert torch.allclose(resized[:, 2], resized[:, 0] - 1)
    fixed = load_images(tmp_path / "clean", TensorSpec("image", torch.float32, (8, 1, 8, 8)))
    assert {len(part) for part in fixed} == {8}


def broken_png() -> bytes:
    """Return a PNG whose second chunk of pixels has a broken name, for which Pillow raises a SyntaxError."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (500, 500), np.uint8)).save(file, "png")
    first, second, rest = file.getvalue().split(b"IDAT", 2)
    broken = first + b"IDAT" + second + b"\x00\x01\x02\x03" + rest
    with Image.open(io.BytesIO(broken)) as image, pytest.raises(SyntaxError):
        image.load()
    return broken


def test_images_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path) -> None:
    """An empty folder, a broken file, an input of another kind, no size, too many numbers."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    free = TensorSpec("image", torch.float32, (-1, 3, -1, -1))
    flat = TensorSpec("x", torch.float32, (-1, 10))
    (tmp_path / "chunk").mkdir()
    (tmp_path / "chunk" / "b.png").write_bytes(broken_png())
    for folder, spec, options, reason in (
        ("chunk", IMAGE, {}, r"b\.png cannot be read as an image"),
        ("empty", IMAGE, {}, "has no image"),
        ("broken", IMAGE, {}, r"a\.png cannot be read as an image"),
        ("broken", flat, {}, "give the samples as an array"),
        ("broken", free, {}, "give the size that requests in production have"),
        ("broken", IMAGE, {"size": 9}, "takes images of 8 x 8"),
        ("broken", free, {"size": 9, "mean": [1, 2]}, "mean has 2 numbers"),
        ("broken", IMAGE, {"std": [0]}, "give positive numbers"),
    ):
        with pytest.raises(ReferenceProfileError, match=reason):
            list(load_images(tmp_path / folder, spec, **options))


def test_without_pillow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays need nothing more; images need an extra."""
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"guardserve\[images\]"):
        load_images(tmp_path, IMAGE)


def test_the_command_takes_a_folder_and_a_sequence(tmp_path: Path, digits: Digits) -> None:
    """The same digits as images, taken as ordered: a profile that says so; options of images are for folders."""
    grey(tmp_path / "clean", digits.reference.images)
    out = tmp_path / "p.safetensors"
    status, text = run("reference", "demo", "--data", tmp_path / "clean", "--out", out, "--ordered", "--image-std", "1")
    assert status == 0, text
    assert "451 samples, taken as a sequence, 5 BatchNorm layers" in text
    assert ReferenceProfile.load(out).ordered
    status, text = run("reference", "demo", "--data", tmp_path / "clean", "--out", out, "--image-mean", "a,b")
    assert (status, "--image-mean is 'a,b'" in text) == (1, True)
    np.save(tmp_path / "clean.npy", digits.reference.images.numpy())
    status, text = run("reference", "demo", "--data", tmp_path / "clean.npy", "--out", out, "--image-size", "8")
    assert (status, "clean.npy is no folder of images" in text) == (1, True)
