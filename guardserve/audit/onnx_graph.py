"""ONNX models: their batch normalisations and the statistics in them. The only home of ``onnx``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from guardserve.audit.layers import NormLayer
from guardserve.audit.subject import Subject
from guardserve.exceptions import MissingExtraError, ModelLoadError
from guardserve.graphs import GraphNorm

if TYPE_CHECKING:
    import onnx

_OPERATOR = "BatchNormalization"
_MIXING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DEFAULT_EPS = 1e-5
# since this opset an attribute tells the mode; in those before it the number of outputs, and before 7 is_test
_TRAINING_MODE, _IS_TEST_NO_MORE = 14, 7
_IN_INFERENCE = 1


def onnx_subject(path: Path, example: Any = None) -> Subject:
    """View an ONNX file, which is not run, so that an example is of no use.

    Raises:
        MissingExtraError: ``onnx`` is not installed.
        ModelLoadError: The file cannot be read.
    """
    try:
        import onnx  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("auditing an ONNX file", "onnx") from error
    if not path.is_file():
        raise ModelLoadError(f"there is no file {str(path)!r}")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf, and files of external data, raise anything
        raise ModelLoadError(f"{path} is a damaged or truncated ONNX file: {error}") from error
    if not model.graph.node:
        raise ModelLoadError(f"{path} is no ONNX model: it holds no graph")
    found = list(_normalisations(model))
    layers, norms = [layer for layer, _ in found], [norm for _, norm in found]
    return Subject("ONNX graph", layers, norms, example=example, weights=_weights(model))


def _weights(model: onnx.ModelProto) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the constant weights of convolutions and linear layers."""
    scope = _Scope(model.graph, 0)
    for node in model.graph.node:
        for name in node.input[1:] if node.op_type in _MIXING else ():
            tensor = scope.tensor(name)
            if tensor is not None:
                yield name, tensor


def _normalisations(model: onnx.ModelProto) -> Iterator[tuple[NormLayer, GraphNorm]]:
    opset = next((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), 1)
    for scope in (model.graph, *model.functions):
        yield from _Scope(scope, opset).normalisations()


class _Scope:
    """A graph or a function, and how its values come about."""

    def __init__(self, scope: Any, opset: int, outer: _Scope | None = None) -> None:
        self._nodes = list(scope.node)
        self._opset = opset
        self._outer = outer
        self._made = {output: node for node in self._nodes for output in node.output}
        self._constants = {tensor.name: tensor for tensor in getattr(scope, "initializer", ())}
        inputs = (value if isinstance(value, str) else value.name for value in scope.input)
        # before IR version 4 initialisers were inputs too
        self._inputs = set(inputs) - self._constants.keys()

    def normalisations(self) -> Iterator[tuple[NormLayer, GraphNorm]]:
        """Yield the normalisations of activations, here and in the branches and loops inside."""
        for node in self._nodes:
            attributes = _attributes(node)
            for value in attributes.values():
                for graph in value if isinstance(value, list) else [value]:
                    if hasattr(graph, "initializer"):
                        yield from _Scope(graph, self._opset, self).normalisations()
            if node.op_type == _OPERATOR and self.depends(node.input[0]) and not self._is_by_sample(node.input[0]):
                yield self._normalisation(node, attributes)

    def _normalisation(self, node: Any, attributes: dict[str, Any]) -> tuple[NormLayer, GraphNorm]:
        weight, bias, mean, var = (self.tensor(name) for name in node.input[1:5])
        name = node.input[3].removesuffix(".running_mean")
        if name == node.input[3]:
            name = node.name or node.output[0]
        layer = NormLayer(name, _OPERATOR, mean, var, weight, bias, eps=attributes.get("epsilon", _DEFAULT_EPS))
        return layer, GraphNorm(name, _OPERATOR, self._trains(node, attributes))

    def _trains(self, node: Any, attributes: dict[str, Any]) -> bool:
        if self._opset >= _TRAINING_MODE:
            return bool(attributes.get("training_mode", 0))
        if self._opset < _IS_TEST_NO_MORE:
            return not attributes.get("is_test", 0)
        return sum(bool(output) for output in node.output) > _IN_INFERENCE

    def depends(self, name: str) -> bool:
        """Tell whether a value comes from the inputs; what cannot be followed does."""
        pending, seen = [name], set[str]()
        while pending:
            current = pending.pop()
            if current in self._inputs:
                return True
            if current in seen or not current:
                continue
            seen.add(current)
            if current in self._made:
                pending += self._made[current].input
            elif current not in self._constants and (self._outer is None or self._outer.depends(current)):
                return True
        return False

    def _is_by_sample(self, name: str) -> bool:
        """Tell whether samples were turned into channels before, which makes it an instance normalisation."""
        node = self._made.get(name)
        if node is None or node.op_type != "Reshape":
            return False
        shape = self.tensor(node.input[1])
        return shape is not None and shape.numel() > 1 and int(shape[0]) == 1

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return a constant value; None when it is computed or missing."""
        from onnx import numpy_helper  # noqa: PLC0415 - an extra

        node = self._made.get(name)
        while node is not None and node.op_type == "Identity":
            name = node.input[0]
            node = self._made.get(name)
        proto = self._constants.get(name)
        if node is not None and node.op_type == "Constant":
            proto = _attributes(node).get("value")
        if proto is None:
            return None if self._outer is None or node is not None else self._outer.tensor(name)
        array = numpy_helper.to_array(proto)
        if array.dtype.kind in "fiu" and array.dtype.name != "bfloat16":
            return torch.from_numpy(array.copy())
        return torch.from_numpy(array.astype("float32")).to(torch.bfloat16)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper  # noqa: PLC0415 - an extra

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
