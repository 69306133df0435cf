"""Rules on how a model is put together around its BatchNorm layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from guardserve.audit.flow import (
    ACTIVATIONS,
    DROPOUTS,
    IDENTITIES,
    JOINS,
    MIXING,
    POOLS,
    RESHAPES,
    TRANSPOSITIONS,
    Step,
)
from guardserve.audit.registry import Gap, Hit, rule
from guardserve.audit.report import join
from guardserve.audit.subject import Subject, is_sharded
from guardserve.batchnorm import is_batchnorm

_SHOWN = 3


@rule("BN010", "unsynchronised-batchnorm", "warning")
def unsynchronised(subject: Subject) -> Iterator[Hit | Gap]:
    """Plain BatchNorm layers are trained under data parallelism.

    DistributedDataParallel and DataParallel split a batch. A plain BatchNorm layer normalises each part by its own
    statistics; DistributedDataParallel then keeps the running statistics of the first process only.

    Why: with few samples on each device the statistics are noisy, and those that are saved have seen only a part of the
    data.

    Found: from the wrappers in the module tree, and the classes of the layers inside them.

    Remedy: train with ``nn.SyncBatchNorm.convert_sync_batchnorm(model)`` under DistributedDataParallel; to serve, take
    the model out of the wrapper (``model.module``).

    Example::

        DistributedDataParallel(resnet50())                                             # BN010
        DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(resnet50()))    # clean
    """
    seen: set[nn.Module] = set()
    for name, module in subject.root.named_modules():
        wraps = isinstance(module, (DataParallel, DistributedDataParallel)) or is_sharded(module)
        if wraps and module not in seen:
            seen.update(module.modules())
            plain = [
                inner_name
                for inner_name, inner in module.named_modules(prefix=name)
                if is_batchnorm(inner) and "Sync" not in type(inner).__name__
            ]
            if plain:
                yield Hit(
                    name, f"{type(module).__name__} holds {len(plain)} plain BatchNorm layers ({join(plain, _SHOWN)})"
                )


@rule("BN011", "activation-before-batchnorm", "info")
def activation_before(subject: Subject) -> Iterator[Hit | Gap]:
    """An activation feeds straight into BatchNorm.

    The usual order is convolution, BatchNorm, activation. The other order works too, and some good models have it, but
    the statistics are then those of a skewed, one-sided distribution.

    Why: mean and variance describe such values badly, so that the running statistics need more data, and shift scores
    are noisier.

    Found: from the order of operations, as the example input passes through the model or as a symbolic trace or the
    graph tells it. Reshapes between the two do not count, anything else does.

    Remedy: nothing, for a trained model; in a new one put BatchNorm before the activation.

    Example::

        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
    """
    for step, name in _norm_steps(subject):
        origins = step.origins(IDENTITIES | RESHAPES | DROPOUTS)
        if origins and all(origin.kind in ACTIVATIONS for origin in origins):
            yield Hit(name, f"{_places(origins)} feeds it")
    yield from _unreached(subject)


@rule("BN012", "dropout-before-batchnorm", "info")
def dropout_before(subject: Subject) -> Iterator[Hit | Gap]:
    """Dropout comes before BatchNorm.

    In training, dropout raises the variance of what comes after it; in eval mode it does nothing. A BatchNorm layer
    behind it has learnt the variance of training (Li et al. 2018, arXiv:1801.05134).

    Why: in eval mode the input's variance is smaller than the running variance, and that shift grows from layer to
    layer.

    Found: from the order of operations, with convolutions, activations, pooling, additions and concatenations between
    the two. A probability of 0 does not count, nor does AlphaDropout, which keeps the variance.

    Remedy: put dropout behind the last BatchNorm layer, or re-estimate the running statistics with dropout off.

    Example::

        nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64), nn.BatchNorm1d(64))
    """
    through = IDENTITIES | RESHAPES | MIXING | ACTIVATIONS | POOLS | JOINS
    for step, name in _norm_steps(subject):
        dropouts = [origin for origin in step.origins(through) if origin.kind in DROPOUTS and origin.probability]
        if dropouts:
            yield Hit(name, f"{_places(dropouts)} with p={max(d.probability for d in dropouts):g} comes before it")
    yield from _unreached(subject)


@rule("BN013", "redundant-bias", "info")
def redundant_bias(subject: Subject) -> Iterator[Hit | Gap]:
    """A bias right before BatchNorm is redundant.

    BatchNorm subtracts the mean of each channel, and with it any constant that was added to the channel.

    Why: the bias has no effect in training, but takes memory, time and an optimiser's state, and drifts with weight
    decay.

    Found: from the order of operations, where the output of a convolution or a linear layer with a bias goes nowhere
    but into BatchNorm.

    Remedy: build the layer with ``bias=False``; a trained one can be left as it is, or fused.

    Example::

        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))                # BN013
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))    # clean
    """
    for step, name in _norm_steps(subject):
        origins = step.origins(IDENTITIES | TRANSPOSITIONS)
        if origins and all(origin.kind in MIXING and origin.bias and origin.users == 1 for origin in origins):
            yield Hit(name, f"{_places(origins)} has a bias and feeds only it")
    yield from _unreached(subject)


def _norm_steps(subject: Subject) -> Iterator[tuple[Step, str]]:
    """Yield each normalisation that was seen, once, with its qualified name."""
    seen: set[str] = set()
    for step in subject.flow.norms:
        name = subject.prefix + step.name
        if name not in seen:
            seen.add(name)
            yield step, name


def _unreached(subject: Subject) -> Iterator[Gap]:
    """Tell which layers the forward did not come to, such as those of an auxiliary classifier for training."""
    if isinstance(subject.inner, (torch.jit.ScriptModule, fx.GraphModule)):
        return
    expected = {subject.prefix + name for name in subject.norm_names} - {name for _, name in _norm_steps(subject)}
    missing = [layer for layer in subject.layers if layer.name in expected]
    scripted = [layer.name for layer in missing if isinstance(layer.module, torch.jit.ScriptModule)]
    skipped = [layer.name for layer in missing if layer.name not in scripted]
    if skipped:
        yield Gap(f"the forward does not come to {join(skipped, _SHOWN)}")
    if scripted:
        yield Gap(f"{join(scripted, _SHOWN)} {'is' if len(scripted) == 1 else 'are'} hidden inside TorchScript")


def _places(steps: list[Step]) -> str:
    """Name steps by module and kind."""
    return join(dict.fromkeys(f"{step.name} ({step.kind})" if step.name else step.kind for step in steps))


@rule("BN015", "no-batchnorm", "info")
def no_batchnorm(subject: Subject) -> Iterator[Hit | Gap]:
    """There is no BatchNorm to watch.

    The model has none, or its layers were fused into convolutions, by ``fuse_conv_bn_eval``, ``torch.jit.freeze`` or an
    ONNX export, which leaves nothing behind.

    Why: the monitor reads shifts of the input from BatchNorm layers, and has nothing to read here.

    Found: from the modules, the graph or the keys of the state_dict.

    Remedy: watch the model before it is fused, or fuse it with guardserve, which leaves a place to watch.

    Example::

        convnext_tiny()     # LayerNorm only
    """
    if subject.has_batchnorm:
        return
    others = Counter(type(module).__name__ for module in subject.modules if "Norm" in type(module).__name__)
    having = f", which has {join(f'{count} {kind}' for kind, count in others.items())}" if others else ""
    yield Hit("", f"there is no BatchNorm layer in this {subject.kind}{having}")
