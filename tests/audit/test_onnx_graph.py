"""ONNX files: BN003 and the rules on statistics."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from audit.models import BUILDS, Build, codes, convolutional, hits, norm_names, norms, reasons, residual, tabular
from audit.programs import silence
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from guardserve.audit import Report
from guardserve.audit.engine import audit_subject
from guardserve.audit.onnx_graph import onnx_subject
from guardserve.exceptions import MissingExtraError, ModelLoadError


def exported(model: nn.Module, example: Any, path: Path) -> Path:
    """Write a model as ONNX in its present mode, with its BatchNorm layers unfused."""
    args = example if isinstance(example, tuple) else (example,)
    mode = torch.onnx.TrainingMode.TRAINING if model.training else torch.onnx.TrainingMode.EVAL
    with silence():
        torch.onnx.export(model, args, str(path), training=mode, dynamo=False, do_constant_folding=False)
    return path


def audited(path: Path) -> Report:
    """Audit an ONNX file."""
    return audit_subject(onnx_subject(path))


def written(path: Path, *nodes: Any, opset: int = 17, constants: dict[str, Any] | None = None) -> Path:
    """Write a graph by hand, with statistics of four channels."""
    arrays = {"scale": np.ones(4), "b": np.zeros(4), "norm.running_mean": np.ones(4), "norm.running_var": np.ones(4)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()} | (constants or {})
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initialisers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(list(nodes), "graph", values, [output], initialisers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def norm(x: str = "x", *, outputs: tuple[str, ...] = ("y",), **attributes: Any) -> Any:
    """Make a batch normalisation."""
    names = [x, "scale", "b", "norm.running_mean", "norm.running_var"]
    return helper.make_node("BatchNormalization", names, list(outputs), name="node", **attributes)


@pytest.mark.parametrize("build", [convolutional, residual, tabular])
def test_a_model_exported_in_eval_mode_is_clean(build: Build, tmp_path: Path) -> None:
    """Its statistics are judged, and what needs code is said to be unchecked."""
    report = audited(exported(*build(), tmp_path / "model.onnx"))
    assert not report.findings
    assert report.subject == "ONNX graph with 2 BatchNorm layers"
    assert set(report.ran) == {"BN003", "BN004", "BN005", "BN006", "BN007", "BN008", "BN009", "BN015"}
    assert "code of the model is needed" in reasons(report, "BN102")[0]


@pytest.mark.parametrize("build", BUILDS[:3])
def test_bn003_a_model_exported_in_training_mode(build: Build, tmp_path: Path) -> None:
    """Each of its layers is named as in the model."""
    model, example = build()
    report = audited(exported(model.train(), example, tmp_path / "model.onnx"))
    assert [finding.module for finding in hits(report, "BN003")] == norm_names(model)


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes", "trains"),
    [
        (17, ("y",), {}, False),
        (15, ("y", "m", "v"), {"training_mode": 1}, True),
        (14, ("y",), {"training_mode": 0}, False),
        (13, ("y",), {}, False),
        (9, ("y", "m", "v", "sm", "sv"), {}, True),
        (9, ("y", "", "", "", ""), {}, False),
        (6, ("y",), {"is_test": 1}, False),
        (6, ("y",), {}, True),
    ],
)
def test_bn003_in_every_version_of_the_operator(
    opset: int, outputs: tuple[str, ...], attributes: dict[str, Any], trains: bool, tmp_path: Path
) -> None:
    """An attribute tells the mode since opset 14; before it the outputs, and before 7 is_test."""
    path = written(tmp_path / "m.onnx", norm(outputs=outputs, **attributes), opset=opset)
    assert ("BN003" in codes(audited(path))) is trains


def test_bn003_legitimate_uses_of_batch_statistics_are_left_out(tmp_path: Path) -> None:
    """A normalised weight, and samples that were turned into channels."""
    weight = norm("w", training_mode=1)
    report = audited(written(tmp_path / "w.onnx", weight, constants={"w": np.ones((1, 4, 9), np.float32)}))
    assert codes(report) == {"BN015"}
    shape = np.array([1, -1, 8, 8])
    instance = [helper.make_node("Reshape", ["x", "shape"], ["r"]), norm("r", training_mode=1)]
    assert codes(audited(written(tmp_path / "i.onnx", *instance, constants={"shape": shape}))) == {"BN015"}
    flat = [helper.make_node("Reshape", ["x", "shape"], ["r"]), norm("r", training_mode=1)]
    assert "BN003" in codes(audited(written(tmp_path / "f.onnx", *flat, constants={"shape": np.array([-1, 4])})))


def test_bn003_inside_a_branch(tmp_path: Path) -> None:
    """A graph within the graph sees the values around it."""
    branch = helper.make_graph(
        [norm(outputs=("inner",), training_mode=1)],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    report = audited(written(tmp_path / "m.onnx", node, constants={"c": np.array(True)}))
    assert [finding.module for finding in hits(report, "BN003")] == ["norm", "norm"]


def test_statistics_come_from_constants_and_through_identities(tmp_path: Path) -> None:
    """Exporters write them in either way."""
    constant = numpy_helper.from_array(np.array([1, -1, 1, 1], np.float32), "value")
    nodes = [
        helper.make_node("Constant", [], ["v"], value=constant),
        helper.make_node("Identity", ["v"], ["norm.running_var"]),
        helper.make_node("Identity", ["m"], ["mean"]),
        helper.make_node("BatchNormalization", ["x", "scale", "b", "mean", "norm.running_var"], ["y"], name="node"),
    ]
    path = tmp_path / "m.onnx"
    written(path, *nodes, constants={"m": np.array([0, np.nan, 0, 0], np.float32)})
    model = onnx.load(path)
    kept = [tensor for tensor in model.graph.initializer if not tensor.name.startswith("norm.")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, path)
    report = audited(path)
    assert [finding.module for finding in hits(report, "BN006")] == ["node"]
    assert "running_mean holds 1 non-finite value of 4 (channel 1)" in hits(report, "BN005")[0].message


@pytest.mark.parametrize(
    ("attribute", "value", "code"),
    [("running_mean", float("nan"), "BN005"), ("running_var", -1.0, "BN006"), ("running_var", 1e6, "BN009")],
)
@pytest.mark.parametrize("build", BUILDS[:3])
def test_damaged_statistics_are_found(build: Build, attribute: str, value: float, code: str, tmp_path: Path) -> None:
    """They are those of the model."""
    model, example = build()
    getattr(norms(model)[-1], attribute)[1] = value
    report = audited(exported(model, example, tmp_path / "model.onnx"))
    assert [finding.module for finding in hits(report, code)] == [norm_names(model)[-1]]


def test_bn008_half_precision(tmp_path: Path) -> None:
    """float16 and bfloat16 statistics keep their types."""
    half = np.ones(4, np.float16)
    report = audited(written(tmp_path / "h.onnx", norm(), constants={"norm.running_var": half, "scale": half}))
    assert "running_var and weight are held in float16" in hits(report, "BN008")[0].message
    path = written(tmp_path / "b.onnx", norm())
    model = onnx.load(path)
    brain = helper.make_tensor("b", TensorProto.BFLOAT16, [4], [1.0, 2.0, 3.0, 4.0])
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "b"]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, brain])
    onnx.save(model, path)
    assert "bias is held in bfloat16" in hits(audited(path), "BN008")[0].message


def test_bn004_and_bn007_use_the_nodes_epsilon(tmp_path: Path) -> None:
    """Fresh statistics, and variances below the epsilon of the node."""
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    fresh = written(tmp_path / "f.onnx", norm(), constants={"norm.running_mean": zeros, "norm.running_var": ones})
    assert codes(audited(fresh)) == {"BN004"}
    small = written(tmp_path / "s.onnx", norm(epsilon=0.5), constants={"norm.running_var": ones / 4})
    assert "below eps=0.5" in hits(audited(small), "BN007")[0].message


def test_files_that_are_no_models(tmp_path: Path) -> None:
    """Missing, damaged and empty files are told apart."""
    with pytest.raises(ModelLoadError, match="there is no file"):
        onnx_subject(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07garbage")
    with pytest.raises(ModelLoadError, match=r"bad\.onnx"):
        onnx_subject(tmp_path / "bad.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="holds no graph"):
        onnx_subject(tmp_path / "empty.onnx")


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command that installs it is in the message."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r'pip install "guardserve\[onnx\]"'):
        onnx_subject(tmp_path / "m.onnx")
