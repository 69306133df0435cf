"""Rules on the numbers that normalisation layers keep; they need no code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn.parameter import is_lazy

from guardserve.audit.layers import NormLayer
from guardserve.audit.registry import Gap, Hit, rule
from guardserve.audit.report import join
from guardserve.audit.subject import Subject

_USUAL_EPS = 1e-5
_LARGEST_HALF = torch.finfo(torch.float16).max
_HARMLESS = 0.01
_SHOWN = 8


def each_layer(check: Callable[[NormLayer], Hit | str | None]) -> Callable[[Subject], Iterator[Hit | Gap]]:
    """Turn a check of one layer into a check of them all; what it returns is a hit, or the value seen."""

    @functools.wraps(check)
    def check_all(subject: Subject) -> Iterator[Hit | Gap]:
        for layer in subject.layers:
            if layer.unreadable:
                yield Gap(f"{layer.name or 'the model itself'} was not checked: {layer.unreadable}")
                continue
            seen = check(layer)
            if seen is not None:
                yield Hit(layer.name, seen) if isinstance(seen, str) else seen

    return check_all


@rule("BN004", "running-stats-never-updated", "warning")
@each_layer
def never_updated(layer: NormLayer) -> str | None:
    """Running statistics were never updated.

    A new layer starts with a running mean of 0 and a running variance of 1. Both are found unchanged in every channel
    when the model was never trained, when its weights were loaded without the buffers, or when the layer was in eval
    mode all along.

    Why: in eval mode the layer passes its input through unnormalised, which is not what the layers after it were
    trained on.

    Found: from the values, all means exactly 0 and all variances exactly 1. ``num_batches_tracked`` is only told: some
    trained checkpoints ship it as 0.

    Remedy: load a checkpoint with its buffers (``load_state_dict(..., strict=True)``), or re-estimate the statistics
    with a few batches of training data.

    Example::

        model = resnet18().eval()   # random weights, statistics of no data
    """
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or not mean.numel() or bool((mean != 0).any()) or bool((var != 1).any()):
        return None
    count = "unknown" if layer.batches is None else int(layer.batches)
    return f"running_mean is 0 and running_var 1 in all {mean.numel()} channels, num_batches_tracked is {count}"


@rule("BN005", "non-finite-statistics", "error")
def non_finite(subject: Subject) -> Iterator[Hit | Gap]:
    """Running statistics or affine parameters are not finite.

    One training batch with a NaN or an infinity in it is enough: the running statistics are moving averages, and a
    moving average never forgets a NaN. Training itself need not show it, because in training mode the layer uses the
    batch's own statistics.

    Why: every output of such a channel is NaN or constant in eval mode, whatever the input.

    Found: from the values of ``running_mean``, ``running_var``, ``weight`` and ``bias``. A NaN or an infinity in the
    weights of another layer counts too: the damage goes there when BatchNorm is fused into a convolution or frozen
    with it.

    Remedy: go back to a checkpoint from before the bad batch, or reset the layer (``reset_running_stats()``) and
    re-estimate its statistics with clean data.

    Example::

        model.train()
        model(batch_with_a_nan)     # under no_grad() and inference_mode() too
        model.eval()                # BN005: running_mean and running_var are NaN from now on
    """
    yield from _non_finite_layers(subject)
    known = {id(tensor) for layer in subject.layers for tensor in layer.tensors.values()}
    for name, tensor in subject.weights:
        if id(tensor) in known or is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
            continue
        # minus infinity is how a mask is written
        bad = tensor.detach().isnan() | tensor.detach().isposinf() if tensor.is_floating_point() else None
        if bad is not None and bool(bad.any()):
            owner, _, attribute = name.rpartition(".")
            seen = f"{attribute} holds {int(bad.sum())} non-finite value{'s' * (int(bad.sum()) > 1)} of {bad.numel()}"
            yield Hit(owner, seen, why="whatever is computed with it is not finite either, for any input")


@each_layer
def _non_finite_layers(layer: NormLayer) -> str | None:
    faults = []
    for name, tensor in layer.tensors.items():
        bad = ~tensor.detach().isfinite()
        if bool(bad.any()):
            count = int(bad.sum())
            values = "value" if count == 1 else "values"
            faults.append(f"{name} holds {count} non-finite {values} of {bad.numel()} ({_channels(bad)})")
    return join(faults) or None


@rule("BN006", "negative-variance", "error")
@each_layer
def negative_variance(layer: NormLayer) -> Hit | None:
    """A running variance is negative.

    No data has a negative variance, so the value is damage: weights averaged or subtracted as if they were all
    parameters, a cast that overflowed, or a corrupted file.

    Why: the square root of a negative ``running_var + eps`` is NaN, and so is every output of the channel in eval mode.

    Found: from the values of ``running_var``.

    Remedy: load an undamaged checkpoint, or reset the layer and re-estimate its statistics; do not average buffers with
    weights that can be negative.

    Example::

        average = {key: 2 * a[key] - b[key] for key in a}   # extrapolates the variances below zero
    """
    var = layer.running_var
    if var is None or var.is_complex():
        return None
    bad = var.detach() < 0
    if not bool(bad.any()):
        return None
    lowest, eps = float(var.detach().min()), _eps(layer)
    seen = (
        f"running_var is negative in {int(bad.sum())} of {bad.numel()} channels ({_channels(bad)}), least {lowest:.4g}"
    )
    if lowest + eps < 0:
        return Hit(layer.name, seen)
    why = f"eps={eps:g} still outweighs it, but whatever damaged the values may have damaged others"
    return Hit(layer.name, seen, why=why)


@rule("BN007", "near-dead-channels", "info")
@each_layer
def near_dead(layer: NormLayer) -> str | None:
    """Channels have next to no variance.

    A running variance below ``eps`` means that the channel hardly varied in training: a dead filter, often the work of
    weight decay. Many good checkpoints have such channels.

    Why: the channel carries no information, and ``eps`` alone decides how much an unusual input is amplified in it.

    Found: from the values, as the number of channels with ``running_var < eps``. A state_dict does not tell ``eps``, so
    that 1e-5 is assumed.

    Remedy: nothing has to be done; the channels can be pruned.

    Example::

        (model.bn1.running_var < model.bn1.eps).sum()
    """
    var = layer.running_var
    if var is None or var.is_complex():
        return None
    eps = _eps(layer)
    dead = (var.detach() < eps) & (var.detach() >= 0)
    count = int(dead.sum())
    return f"{count} of {var.numel()} channels have a running variance below eps={eps:g}" if count else None


@rule("BN008", "half-precision-statistics", "error")
@each_layer
def half_precision(layer: NormLayer) -> str | None:
    """A BatchNorm layer is held in half precision.

    ``model.half()`` and ``model.to(torch.bfloat16)`` convert running statistics with everything else. float16 ends at
    65504 and loses what is below 6e-8; bfloat16 keeps three significant digits.

    Why: a variance that overflowed makes its channel constant with nothing non-finite to see, and rounding shifts the
    statistics that all outputs are scaled by.

    Found: from the element types of ``running_mean``, ``running_var``, ``weight`` and ``bias``.

    Remedy: keep BatchNorm in float32, by autocast instead of ``half()``, or by ``layer.float()`` on BatchNorm layers
    of a model that was loaded in float32; converting back does not bring lost digits back.

    Example::

        model = resnet50(weights="DEFAULT").half()          # BN008
        with torch.autocast("cuda", dtype=torch.float16):   # clean: BatchNorm stays in float32
            model(x)
    """
    halves = {
        name: str(tensor.dtype).removeprefix("torch.")
        for name, tensor in layer.tensors.items()
        if tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
    }
    dtypes = join(dict.fromkeys(halves.values()))
    return f"{join(halves)} {'is' if len(halves) == 1 else 'are'} held in {dtypes}" if halves else None


@rule("BN009", "not-representable-in-half", "warning")
@each_layer
def unfit_for_half(layer: NormLayer) -> Hit | None:
    """Statistics would not survive a cast to half precision.

    The model is sound as it is, but ``half()``, a float16 export or a float16 engine would change it: values beyond
    65504 become infinite, variances below 6e-8 become zero.

    Why: after ``half()`` an infinite variance makes the channel constant, and a zero one changes its scale, both with
    finite outputs.

    Found: by casting the values to float16 and back. A variance that becomes zero only counts where ``eps`` does not
    outweigh it; where it does, this is an info.

    Remedy: keep the BatchNorm layers in float32 (autocast does), or fuse them into the convolutions before a cast.

    Example::

        float(torch.tensor(1e6).half())     # inf
    """
    faults = []
    for name, tensor in layer.tensors.items():
        if tensor.dtype not in {torch.float32, torch.float64}:
            return None
        values = tensor.detach().abs()
        over = (values > _LARGEST_HALF) & values.isfinite()
        if bool(over.any()):
            faults.append(f"{name} reaches {float(values[over].max()):.4g} (float16 ends at 65504, {_channels(over)})")
    if faults:
        return Hit(layer.name, join(faults))
    return _underflow(layer)


def _underflow(layer: NormLayer) -> Hit | None:
    if layer.running_var is None:
        return None
    var, eps = layer.running_var.detach().double(), _eps(layer)
    lost = (var > 0) & (var.half() == 0)
    if not bool(lost.any()):
        return None
    seen = f"running_var becomes 0 in float16 in {int(lost.sum())} of {var.numel()} channels ({_channels(lost)})"
    change = float((((var + eps) / (eps or 0.0)).sqrt() - 1)[lost].max()) if eps else float("inf")
    if change > _HARMLESS:
        return Hit(layer.name, f"{seen}, which changes their scale by a factor of up to {1 + change:.3g}")
    why = "the outputs hardly change, because eps outweighs these variances"
    return Hit(layer.name, seen, "info", why, "Nothing has to be done.")


def _eps(layer: NormLayer) -> float:
    return _USUAL_EPS if layer.eps is None else layer.eps


def _channels(mask: torch.Tensor) -> str:
    """Name the first few channels of a mask."""
    found = mask.flatten().nonzero().flatten().tolist()
    return f"channel{'s' * (len(found) > 1)} {join(map(str, found), _SHOWN)}"
