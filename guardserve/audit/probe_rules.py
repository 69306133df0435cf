"""Rules on what a model does when it runs on an example."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from torch import nn

from guardserve.audit.comparison import lost_axis
from guardserve.audit.fit import Fit
from guardserve.audit.registry import Gap, Hit, rule
from guardserve.audit.report import Severity, join
from guardserve.audit.subject import Subject, Unchecked
from guardserve.nonfinite import named_tensors

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
    differently. The layer named is the innermost whose output differs first. An output without a batch axis that
    changes with the rows, such as a mean over the batch, is a warning; an info where others have one.

    Remedy: give the layer running statistics, or replace what mixes rows; for a graph with training-mode BatchNorm,
    trace or export again after ``eval()``.

    Example::

        nn.BatchNorm2d(8, track_running_stats=False).eval()     # BN102, and BN002 names the cause
    """
    probes = subject.probes
    found = probes.dependence
    yield from _uncompared(subject)
    if probes.reduced is not None:
        why = "what is computed over the whole batch is no answer to any one request in it"
        remedy = "Return a value for each row; leave losses and statistics of the batch to training."
        # where there is an answer for each row too, it may be what training needs
        severity: Severity = "warning" if isinstance(found, str) else "info"
        yield Hit("", f"an output has no batch axis, and with other rows {probes.reduced}", severity, why, remedy)
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


def _uncompared(subject: Subject) -> Iterator[Gap]:
    reasons = subject.probes.uncompared
    if reasons:
        yield Gap(join(reasons, _SHOWN))


def _is_dynamically_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.quantized.dynamic")


_STATISTIC = re.compile(r"(running|moving)_(mean|var|variance|std)|num_batches_tracked")


@rule("BN103", "inference-changes-state", "error")
def changes_state(subject: Subject) -> Iterator[Hit | Gap]:
    """Inference changes the running statistics, or anything else that later answers depend on.

    Even under ``no_grad()`` and ``inference_mode()`` a layer can update its buffers: these stop gradients, not
    assignments. A program traced in training mode does so with every request. A hidden state or a cache that is kept on
    a module goes from one request to the next just as well.

    Why: each request changes the answers to all later ones, and one bad request can spoil them for good.

    Found: by comparing parameters, buffers and other attributes of modules before and after each forward in eval mode,
    and by asking a model again after another request, beside a fresh copy that is asked the same. Running statistics
    that change are an error, and whatever else changes if the answer does; else a buffer or parameter, such as a
    counter, is an info. A fresh copy that does not repeat its own answer is a warning: the state is elsewhere.

    Remedy: update statistics only ``if self.training``; pass states in and out instead of keeping them; trace or export
    again after ``eval()``.

    Example::

        def forward(self, x):
            self.running_mean.lerp_(x.mean(0), 0.1)     # BN103: no look at self.training
            return x - self.running_mean
    """
    probes = subject.probes
    statistics = [name for name in probes.changed if _STATISTIC.fullmatch(name.rpartition(".")[2])]
    others = [name for name in probes.changed if name not in statistics]
    for owner, attributes in _by_owner(statistics):
        yield Hit(subject.prefix + owner, f"a forward in eval mode changed {join(attributes)}")
    if probes.unsteady:
        why = "it keeps a state outside its modules, or draws random numbers of its own, and no copy or seed repeats it"
        yield Hit("", f"the same model, input and seed do not give the same answer: {probes.unsteady}", "warning", why)
    if probes.carried is None:
        state = {**dict(subject.inner.named_parameters()), **dict(subject.inner.named_buffers())}
        for owner, attributes in _by_owner([name for name in others if name in state]):
            why = "it did not change a later answer here, as a counter or a cache of constants does not"
            yield Hit(subject.prefix + owner, f"a forward in eval mode changed {join(attributes)}", "info", why)
    elif others:
        for owner, attributes in _by_owner(others):
            seen = f"a forward in eval mode changed {join(attributes, _SHOWN)}, and after it {probes.carried}"
            yield Hit(subject.prefix + owner, seen)
    elif not statistics:
        yield Hit("", f"after another request {probes.carried}; what it left behind was not seen")


def _by_owner(names: Iterable[str]) -> Iterable[tuple[str, list[str]]]:
    """Put the attributes of each module together."""
    found: dict[str, list[str]] = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        found.setdefault(owner, []).append(attribute)
    return found.items()


@rule("BN104", "trains-during-forward", "error")
def trains_during_forward(subject: Subject) -> Iterator[Hit | Gap]:
    """A module returns to training mode during forward.

    Some code calls ``self.train()``, or ``layer.train()``, inside ``forward``: Monte Carlo dropout, a helper that was
    meant for training, a wrapper that restores what it takes for the usual mode. Layers in a plain list, or made in the
    forward, are no submodules, and are always in training mode; ``F.dropout`` drops unless it is told not to.

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
    told = {name for name, kind in subject.probes.unregistered if "Dropout" in kind}
    dropping = subject.probes.flow.dropping if subject.probes.flow else ()
    for step in (step for step in dropping if step.name not in told):
        seen = f"{step.kind} with p={step.probability:g} is called as a function and told to drop, in eval mode too"
        why = "the same request gets another answer each time, and `model.eval()` has no effect on it"
        yield Hit(
            subject.prefix + step.name, seen, why=why, remedy="pass `training=self.training`, which is not the default"
        )


@rule("BN105", "non-finite-output", "error")
def non_finite_output(subject: Subject) -> Iterator[Hit | Gap]:
    """The output is not finite for a finite input.

    NaN and infinity have no form in JSON, and pass through all later arithmetic. They come from damaged statistics,
    from a division or logarithm near zero, and from half precision.

    Why: the answer is worthless, and a client may take it for a number.

    Found: by running the example as it is, and again with a look into every module when an output is not finite. The
    module named is the first whose output is not finite while its inputs were. Minus infinity that the code writes, or
    that stands in the same places for every input, is a mask by design and a warning.

    Remedy: look at the module named: at its statistics and parameters first, then at its arithmetic for such inputs.

    Example::

        model.bn1.running_var.fill_(-1)     # BN105 in bn1, and BN006 names the cause
    """
    probes = subject.probes
    if all(run is None or run.error for run in (probes.given, probes.alone)):
        raise Unchecked(f"it runs only on {probes.rows} rows, and the example has another number")
    if not any(True for run in (probes.given, probes.alone) if run for _ in named_tensors(run.output)):
        raise Unchecked(join(probes.uncompared, _SHOWN) or "the output holds no numbers")
    yield from _uncompared(subject)
    if probes.nonfinite is None:
        return
    bad, origin = probes.nonfinite.values, probes.nonfinite.origin
    place = "" if origin is None else subject.prefix + origin.module
    seen = f"{bad}; {'where it arose was not seen' if origin is None else f'it arose in {origin}'}"
    if probes.nonfinite.by_design is None:
        yield Hit(place, seen)
    else:
        why = f"{probes.nonfinite.by_design}, but JSON has no form for it, and EvalGuard refuses it by default"
        yield Hit(place, seen, "warning", why, "Write the least finite number instead, `torch.finfo(x.dtype).min`.")


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
