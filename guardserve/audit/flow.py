"""Data flow around BatchNorm layers: which step produced what a normalisation is given.

A flow is a graph of steps, read from a ``torch.fx`` graph or a TorchScript graph, or recorded while a model runs
(:mod:`guardserve.audit.observer`). A step's kind is its operator's or module's name in lower case without
underscores, so that ``nn.ReLU``, ``F.relu``, ``Tensor.relu_`` and ``aten::relu`` are all ``relu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from guardserve.symbolic import Tracer

INPUT, NORM = "input", "batchnorm"


def _kinds(names: str) -> frozenset[str]:
    return frozenset(names.split())


ACTIVATIONS = _kinds(
    "relu relu6 leakyrelu prelu rrelu elu celu selu gelu silu swish mish hardswish hardsigmoid hardtanh sigmoid "
    "logsigmoid tanh softplus softsign threshold clamp clip"
)
MIXING = _kinds(
    "conv1d conv2d conv3d convtranspose1d convtranspose2d convtranspose3d convolution linear addmm conv2dsame"
)
DROPOUTS = _kinds("dropout dropout1d dropout2d dropout3d featuredropout nativedropout")
_ATTENTION = "scaleddotproductattention"
IDENTITIES = _kinds("identity contiguous clone detach alias to float double half typeas getitem if list")
TRANSPOSITIONS = _kinds("transpose permute movedim swapaxes t flatten squeeze unsqueeze")
RESHAPES = TRANSPOSITIONS | _kinds("view reshape unsafeview unflatten")
POOLS = _kinds(
    "maxpool1d maxpool2d maxpool3d avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d "
    "adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d mean pad interpolate upsample"
)
JOINS = frozenset(["add", "iadd", "cat", "concat", "concatenate"])
LOOKS = _kinds("size symsize dim ndim getattr len numel isfloatingpoint")
"""Operators that look at a tensor without passing its values on."""
KNOWN = ACTIVATIONS | MIXING | DROPOUTS | IDENTITIES | RESHAPES | POOLS | JOINS


@dataclass(eq=False)
class Step:
    """One operation on activations.

    Attributes:
        kind: What it does, as the module describes.
        name: Qualified name of the module that does it, as far as it is known.
        sources: The steps whose outputs it takes.
        bias: Whether it adds a bias of its own, for convolutions and linear layers.
        probability: Probability of dropping a value, for dropouts.
        trains: Whether a dropout that is no module drops for good, being told so by its argument.
        users: Number of steps that take its output.
    """

    kind: str
    name: str
    sources: list[Step] = field(default_factory=list)
    bias: bool = False
    probability: float = 0.0
    trains: bool = False
    users: int = 0

    def __post_init__(self) -> None:
        for source in self.sources:
            source.users += 1

    def origins(self, through: frozenset[str]) -> list[Step]:
        """Return the nearest steps before this one that are not of the kinds which are looked through."""
        found: list[Step] = []
        seen: set[int] = set()
        pending = list(self.sources)
        while pending:
            step = pending.pop()
            if id(step) in seen:
                continue
            seen.add(id(step))
            if step.kind in through:
                pending += step.sources
            else:
                found.append(step)
        return found

    @property
    def depends_on_input(self) -> bool:
        """Whether any of it comes from the model's inputs, unlike a normalised weight."""
        seen: set[int] = set()
        pending = [self]
        while pending:
            step = pending.pop()
            if step.kind == INPUT:
                return True
            if id(step) not in seen:
                seen.add(id(step))
                pending += step.sources
        return False


@dataclass(frozen=True)
class Flow:
    """The normalisations of a model's activations, each with all that comes before it, and dropouts that drop."""

    norms: tuple[Step, ...]
    dropping: tuple[Step, ...]

    @classmethod
    def of(cls, steps: list[Step]) -> Flow:
        """Keep the normalisations and the dropouts of activations."""
        norms = (step for step in steps if step.kind == NORM and step.depends_on_input)
        dropping = (step for step in steps if step.trains and step.probability and step.depends_on_input)
        return cls(tuple(norms), tuple(dropping))


def kind_of(name: str) -> str:
    """Return the kind of step for the name of an operator or of a class."""
    kind = name.lower().replace("_", "").removeprefix("parametrized")
    return NORM if kind in {"nativebatchnorm", "batchnormimplindex"} else kind


def is_whole(module: nn.Module) -> bool:
    """Tell whether a module is one step: one of torch.nn that is no container, or one that its name explains."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    if isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith(("torch.nn.", "torch.ao.")):
        return True
    return kind_of(type(module).__name__) in KNOWN and next(module.children(), None) is None


def module_step(module: nn.Module, name: str, sources: list[Step], *, norm: bool) -> Step:
    """Make the step of a module that is looked at as a whole."""
    return Step(
        NORM if norm else kind_of(type(module).__name__),
        name,
        sources,
        bias=isinstance(getattr(module, "bias", None), torch.Tensor),
        probability=_number(getattr(module, "p", 0.0)),
    )


def function_step(function: str, name: str, sources: list[Step], args: Any, kwargs: Any) -> Step:
    """Make the step of an operator, from its arguments."""
    kind = kind_of(function)
    third = kwargs.get("bias", args[2] if len(args) > 2 else None)  # noqa: PLR2004 - input, weight, bias
    probability = _number(kwargs.get("p", args[1] if len(args) > 1 else 0.5)) if kind in DROPOUTS else 0.0
    trains = kind in DROPOUTS and _dropout_mode(args, kwargs) is True
    if kind == _ATTENTION:  # it has no mode, and drops whenever it is told a probability
        probability = _number(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))  # noqa: PLR2004
        trains = True
    # addmm is a linear layer with its bias first
    bias = third is not None or kind == "addmm"
    return Step(kind, name, sources, bias=bias, probability=probability, trains=trains)


def _dropout_mode(args: Any, kwargs: Any) -> object:
    """Return the argument of a functional dropout that tells whether to drop: it does, unless it is told not to."""
    return kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))  # noqa: PLR2004


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


class _Tracer(Tracer):
    """Traces into a model as far as the flow needs it."""

    def __init__(self, norms: frozenset[str]) -> None:
        super().__init__()
        self._norms = norms

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is one step."""
        return module_qualified_name in self._norms or is_whole(m)


def traced_flow(model: nn.Module, norms: frozenset[str]) -> Flow:
    """Trace a model symbolically, which raises for code that depends on values, and read the flow.

    Tracing runs the model's code, and may change it as a forward may.
    """
    if is_whole(model) or "" in norms:
        return Flow.of([Step(INPUT, "")])
    return fx_flow(_Tracer(norms).trace(model), dict(model.named_modules()), norms)


def fx_flow(graph: fx.Graph, modules: dict[str, nn.Module], norms: frozenset[str]) -> Flow:
    """Read the flow of a ``torch.fx`` graph: a symbolic trace or a program from ``torch.export``.

    Args:
        graph: The graph.
        modules: The modules that it may call, by qualified name.
        norms: Names of the normalisation layers among them.
    """
    steps: dict[fx.Node, Step] = {}
    for node in graph.nodes:
        sources = [steps[source] for source in node.all_input_nodes if source in steps]
        if node.op == "placeholder":
            steps[node] = Step(INPUT, node.name)
        elif node.op == "call_module":
            module = modules[str(node.target)]
            steps[node] = module_step(module, str(node.target), sources, norm=str(node.target) in norms)
        elif node.op in {"call_function", "call_method"} and kind_of(_operator(node.target)) not in LOOKS:
            steps[node] = function_step(_operator(node.target), _layer(node), sources, node.args, node.kwargs)
    return Flow.of(list(steps.values()))


def _operator(target: Any) -> str:
    """Return the bare name of what a node calls: ``relu`` for ``aten.relu.default``."""
    name = str(getattr(target, "__name__", target))
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return name
    operator = str(packet).rpartition(".")[2]
    # without statistics to keep it is what instance normalisation is decomposed to
    return "batch_norm" if "batch_norm" in operator and "no_stats" not in str(target) else operator


def _layer(node: fx.Node) -> str:
    """Return the module that a node was traced in; exports name it by the place of its running mean too."""
    for argument in node.args[1:5]:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return str(argument.target).rpartition(".")[0]
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def script_flow(module: torch.jit.ScriptModule) -> Flow:
    """Read the flow of a TorchScript graph."""
    graph = script_graph(module)
    steps: dict[str, Step] = {value.debugName(): Step(INPUT, "") for value in list(graph.inputs())[1:]}
    order: list[Step] = []
    for node in _script_nodes(graph):
        # parameters, constants and sizes are no activations
        if node.kind() in {"prim::GetAttr", "prim::Constant"} or not any(map(_holds_tensors, node.outputs())):
            continue
        values = list(node.inputs())
        if node.kind() == "prim::If":
            values = [value for block in node.blocks() for value in block.outputs()]
        sources = [steps[value.debugName()] for value in values if value.debugName() in steps]
        step = _script_step(module, node, sources)
        order.append(step)
        steps.update((value.debugName(), step) for value in node.outputs())
    return Flow.of(order)


def script_graph(module: torch.jit.ScriptModule) -> Any:
    """Return the graph of a TorchScript module's forward; one of no node when it has none, as lists of modules."""
    try:
        return module.inlined_graph
    except (AttributeError, RuntimeError):
        return torch._C.Graph()  # noqa: SLF001 - torch gives no other way


def _holds_tensors(value: Any) -> bool:
    return "Tensor" in value.type().annotation_str


def _script_nodes(block: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, those of inner blocks before the node that holds them."""
    for node in block.nodes():
        for inner in node.blocks():
            yield from _script_nodes(inner)
        yield node


_SCRIPT_KINDS = {"prim::If": "if", "prim::ListConstruct": "list", "aten::_convolution": "convolution"}


def _script_step(module: torch.jit.ScriptModule, node: Any, sources: list[Step]) -> Step:
    kind = _SCRIPT_KINDS.get(node.kind()) or kind_of(node.kind().rpartition("::")[2])
    values = list(node.inputs())
    if kind == NORM:
        return Step(kind, next(filter(None, map(script_owner, (values[3], values[1]))), ""), sources)
    bias = len(values) > 2 and kind in MIXING and _is_tensor(module, values[2])  # noqa: PLR2004
    probability = _number(values[1].toIValue()) if kind in DROPOUTS else 0.0
    trains = kind in DROPOUTS and len(values) > 2 and values[2].toIValue() is True  # noqa: PLR2004
    return Step(kind, script_owner(values[1]) if kind in MIXING else "", sources, bias, probability, trains)


def script_path(value: Any) -> list[str]:
    """Return the attributes that lead from a TorchScript module to a value; those of a frozen one are in its name."""
    parts: list[str] = []
    node = value.node()
    while node.kind() == "prim::GetAttr":
        parts.insert(0, node.s("name"))
        node = next(node.inputs()).node()
    name = str(value.debugName())
    return parts or (name.split(".")[1:] if name.startswith("self.") else [])


def script_owner(value: Any) -> str:
    """Return the qualified name of the TorchScript module that a value is an attribute of."""
    return ".".join(script_path(value)[:-1])


def _is_tensor(module: torch.jit.ScriptModule, value: Any) -> bool:
    """Tell whether an optional argument is given."""
    found: Any = module
    for part in script_path(value):
        found = getattr(found, part, None)
    return isinstance(found if found is not module else value.toIValue(), torch.Tensor)
