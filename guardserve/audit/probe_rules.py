"""Rules on what a model does when it runs on an example."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import nn

from guardserve.audit.comparison import lost_axis
from guardserve.audit.fit import Fit
from guardserve.audit.registry import Gap, Hit, rule
from guardserve.audit.report import join
from guardserve.audit.subject import Subject, Unchecked

_SHOWN = 3

# Two unrelated outputs disagree by 1.4. On eight photos good models come to 1.1, where single layers may be far off,
# and new ones with random weights to 1.6, where no layer is off by much.
_UNLIKE, _WILD = 0.9, 1.25
_OFF_BY, _FAR_OFF_BY, _FAR_OFF_BY_RATIO = 0.5, 1.0, math.log(6)


@rule("BN101", "fails-at-batch-size-1", "error")
def fails_alone(subject: Subject) -> Iterator[Hit | Gap]:
    """The model fails at batch size 1.

    A server meets single rows all the time. A model that normalises by its batch raises on them or divides by zero, and
    a ``squeeze()`` without an axis takes the batch axis away with the others.

    Why: single requests fail, or get an output of another shape or without meaning, while larger batches hide it.

    Found: by running the first row of the example alone, and among others: it raises alone only, or is non-finite or
    lacks the batch axis alone only.

    Remedy: give BatchNorm layers running statistics; use ``var(correction=0)`` in statistics of your own; name the axis
    in ``squeeze(axis)``.

    Example::

        nn.BatchNorm1d(8, track_running_stats=False).eval()(torch.zeros(1, 8))      # raises ValueError
    """
    probes = subject.probes
    if probes.alone is None:
        raise Unchecked(f"the program takes batches of {probes.rows} rows only")
    if probes.alone.error:
        if probes.batch is None or probes.batch.error:
            raise Unchecked(f"it runs neither on one row nor on {probes.rows}: {probes.alone.failure}")
        yield Hit("", f"one row alone raises {probes.alone.failure}, {probes.rows} rows do not")
    elif probes.alone_nonfinite is not None:
        yield Hit("", f"for one row alone {probes.alone_nonfinite}, among {probes.rows} rows it is finite")
    if probes.batch is not None and not probes.alone.error:
        lost = lost_axis(probes.batch.output, probes.alone.output, probes.rows)
        if lost is not None:
            path, shape, alone = lost
            yield Hit("", f"{path} has shape {tuple(alone)} for one row, and {tuple(shape)} for {probes.rows}")


@rule("BN102", "depends-on-batch-mates", "error")
def depends_on_mates(subject: Subject) -> Iterator[Hit | Gap]:
    """The output of a sample depends on its batch mates.

    The same row is put among two sets of other rows, and alone. Its output may differ by rounding only. Whatever
    mixes rows shows: batch statistics, a recurrent layer that takes the batch axis for time, a maximum over the
    batch, dynamic quantisation with one scale for the batch.

    Why: the same request gets different answers depending on what else is in flight, which no test with a fixed batch
    shows.

    Found: by the largest difference in the row's output, as a part of its largest value. The tolerance is 1e-5 in
    float32 between batches of one size, and 1e-2 between a row alone and in a batch, where other kernels round
    differently. The layer named is the innermost whose output differs first.

    Remedy: give the layer running statistics, or replace what mixes rows; for a graph with training-mode BatchNorm,
    trace or export again after ``eval()``.

    Example::

        nn.BatchNorm2d(8, track_running_stats=False).eval()     # BN102, and BN002 names the cause
    """
    probes = subject.probes
    found = probes.dependence
    if isinstance(found, str):
        raise Unchecked(found)
    if probes.random:
        yield Gap(probes.random)
    if found is None:
        return
    beside = f"alone instead of in a batch of {probes.rows}" if found.alone else f"with {probes.rows - 1} other rows"
    seen = f"{beside}, a row's {found.difference}"
    if found.module is None:
        # a look into a graph is not possible, but its normalisations may tell
        yield Hit(next((norm.name for norm in subject.graph_norms if norm.trains), ""), seen)
    elif _is_dynamically_quantised(subject.inner.get_submodule(found.module)):
        why = "dynamic quantisation has one scale for the whole batch, so that answers vary a little with its mates"
        yield Hit(subject.prefix + found.module, seen, "warning", why, "Quantise statically, or serve single rows.")
    else:
        yield Hit(subject.prefix + found.module, f"{seen}; it begins in this module")


def _is_dynamically_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.quantized.dynamic")


_STATISTIC = re.compile(r"(running|moving)_(mean|var|variance|std)|num_batches_tracked")


@rule("BN103", "inference-changes-state", "error")
def changes_state(subject: Subject) -> Iterator[Hit | Gap]:
    """Inference changes the running statistics.

    Even under ``no_grad()`` and ``inference_mode()`` a layer can update its buffers: these stop gradients, not
    assignments. A program traced in training mode does so with every request.

    Why: each request changes the answers to all later ones, and one bad request can spoil them for good.

    Found: by comparing parameters, buffers and tensors kept on modules before and after each forward in eval mode.
    Running statistics are an error. Another buffer or parameter is a warning if the same input gives another output
    afterwards, and an info if not, as for a counter or a cache.

    Remedy: update statistics only ``if self.training``; trace or export again after ``eval()``.

    Example::

        def forward(self, x):
            self.running_mean.lerp_(x.mean(0), 0.1)     # BN103: no look at self.training
            return x - self.running_mean
    """
    by_owner: dict[str, list[str]] = {}
    other: list[str] = []
    for name in subject.probes.changed:
        owner, _, attribute = name.rpartition(".")
        if _STATISTIC.fullmatch(attribute):
            by_owner.setdefault(owner, []).append(attribute)
        else:
            other.append(name)
    for owner, attributes in by_owner.items():
        yield Hit(subject.prefix + owner, f"a forward in eval mode changed {join(attributes)}")
    state = {**dict(subject.inner.named_parameters()), **dict(subject.inner.named_buffers())}
    carries = subject.probes.carries
    why = "the same request gets another answer afterwards" if carries else "it did not change a later answer here"
    for name in (name for name in other if name in state):
        owner, _, attribute = name.rpartition(".")
        seen = f"a forward in eval mode changed {attribute}"
        yield Hit(subject.prefix + owner, seen, "warning" if carries else "info", why)


@rule("BN104", "trains-during-forward", "error")
def trains_during_forward(subject: Subject) -> Iterator[Hit | Gap]:
    """A module returns to training mode during forward.

    Some code calls ``self.train()``, or ``layer.train()``, inside ``forward``: Monte Carlo dropout, a helper that was
    meant for training, a wrapper that restores what it takes for the usual mode. Layers in a plain list, or made in the
    forward, are no submodules, and are always in training mode.

    Why: ``model.eval()`` before the call has no effect, and the model normalises by the batch at hand all the same.

    Found: by looking at the flags of all modules at each call of a module or an operator, in a forward that begins in
    eval mode.

    Remedy: take the call out of ``forward``; until then serve through EvalGuard, which keeps BatchNorm and dropout in
    eval mode during the forward.

    Example::

        def forward(self, x):
            self.train()        # BN104
            return self.body(x)
    """
    training = subject.probes.training
    if training:
        names = [subject.prefix + name for name in training]
        shown = join((name or "the model itself" for name in names), _SHOWN)
        yield Hit(names[0], f"in training mode during a forward that began in eval mode: {shown}")
    for name, kind in subject.probes.unregistered:
        remedy = "make it a submodule, by an attribute of its own or an `nn.ModuleList`, and only in `__init__`"
        seen = f"a {kind} that is no submodule, in a list or made in the forward, trains during the forward"
        yield Hit(subject.prefix + name, seen, remedy=remedy)


@rule("BN105", "non-finite-output", "error")
def non_finite_output(subject: Subject) -> Iterator[Hit | Gap]:
    """The output is not finite for a finite input.

    NaN and infinity have no form in JSON, and pass through all later arithmetic. They come from damaged statistics,
    from a division or logarithm near zero, and from half precision.

    Why: the answer is worthless, and a client may take it for a number.

    Found: by running the example as it is, and again with a look into every module when an output is not finite. The
    module named is the first whose output is not finite while its inputs were.

    Remedy: look at the module named: at its statistics and parameters first, then at its arithmetic for such inputs.

    Example::

        model.bn1.running_var.fill_(-1)     # BN105 in bn1, and BN006 names the cause
    """
    probes = subject.probes
    if all(run is None or run.error for run in (probes.given, probes.alone)):
        raise Unchecked(f"it runs only on {probes.rows} rows, and the example has another number")
    if probes.nonfinite is None:
        return
    bad, origin = probes.nonfinite
    if origin is None:
        yield Hit("", f"{bad}; where it arose was not seen")
    else:
        yield Hit(subject.prefix + origin.module, f"{bad}; it arose in {origin}")


@rule("BN106", "statistics-do-not-fit", "warning")
def statistics_do_not_fit(subject: Subject) -> Iterator[Hit | Gap]:
    """The running statistics do not fit the example.

    The example runs once with running statistics, and once with those of the batch (BatchNorm alone in training mode,
    dropout off, on a copy). When the outputs have next to nothing in common, the model was trained on other data, or
    the example is preprocessed differently.

    Why: predictions on such data are close to arbitrary, however good the model is on its own.

    Found: from two measures, both far beyond what eight rows of fitting data give. Outputs disagree by more than 0.9
    of their spread from row to row (1.4 is unrelated), and the input of a layer differs from its running statistics,
    in the median channel, by a standard deviation or by a factor of 6 in variance; or by more than 1.25 and half a
    deviation. Noise instead of real data fits no trained model.

    Remedy: check the preprocessing (scale, channel order, normalisation); if the data is right, re-estimate the running
    statistics on it.

    Example::

        audit(model, photos * 255)      # BN106 in the first layer: trained on values from 0 to 1
    """
    fit = subject.probes.fit
    if isinstance(fit, str):
        raise Unchecked(fit)
    if not _misfits(fit):
        return
    worst = fit.worst
    yield Hit(
        subject.prefix + worst.name,
        f"the outputs of {fit.rows} rows with batch statistics differ from those with running statistics by "
        f"{fit.disagreement:.2g} of their spread; in this layer the input is {worst.shift:.2g} running deviations off "
        f"and its variance by a factor of {math.exp(worst.spread):.3g}, in the median channel",
    )


def _misfits(fit: Fit) -> bool:
    far_off = fit.worst.shift > _FAR_OFF_BY or fit.worst.spread > _FAR_OFF_BY_RATIO
    return (fit.disagreement > _UNLIKE and far_off) or (fit.disagreement > _WILD and fit.worst.shift > _OFF_BY)
