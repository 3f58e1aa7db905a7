"""Every rule in one table: EK1 places, EK2 modes, EK3 statistics, EK4 settings, EK5 counts.

A rule's function looks at an `Observation` and yields what it found; the table has the words. A
code is never used again for something else.
"""

from __future__ import annotations

from typing import Final

from . import counts, gaps, inference, settings, statistics, structure
from .base import Rule

__all__ = ["RULES"]

_ALL = ("error", "warning", "note")

RULES: Final = (
    Rule(
        "EK101",
        "bias-before-norm",
        ("note",),
        ("training",),
        "biases",
        "The norm subtracts each channel's mean, and the bias with it: it costs and does nothing.",
        "Build the layer with bias=False; beta is the bias. --fix moves it into the running mean.",
        structure.bias_before_norm,
        fixable=True,
    ),
    Rule(
        "EK102",
        "norm-on-logits",
        ("warning",),
        ("inference",),
        "outputs",
        "A batch norm makes each class's logit as large as every other's over the batch, so rare "
        "classes cannot stay rare and a loss cannot say how sure the network is.",
        "Leave the last layer without a norm, with a bias. If the output is an embedding, ignore "
        "this.",
        structure.norm_on_logits,
    ),
    Rule(
        "EK103",
        "norm-after-norm",
        ("warning",),
        ("training",),
        "channels",
        "The second norm undoes the first one's gamma and beta, which learn nothing.",
        "Remove one of the two.",
        structure.norm_after_norm,
    ),
    Rule(
        "EK104",
        "dropout-before-norm",
        ("warning", "note"),
        ("training",),
        "variance in training over variance in inference",
        "Dropout raises the variance in training alone, and the norm remembers that variance for "
        "inference (Li et al. 2019, 'variance shift').",
        "Put dropout behind the last norm, or lower its rate.",
        structure.dropout_before_norm,
    ),
    Rule(
        "EK105",
        "norm-reused",
        ("warning", "note"),
        ("training",),
        "calls in one forward",
        "One pair of running statistics has to serve places that see different values, so at "
        "inference it fits none of them.",
        "Give every place a norm of its own; the layer may still be shared.",
        structure.reused,
    ),
    Rule(
        "EK106",
        "fixed-image-size",
        ("note",),
        (),
        "places",
        "With statistics for each place the network takes images of one size only, and each "
        "statistic is of as many values as the batch has samples.",
        "Use one statistic per channel ('n c h w -> c') unless places differ on purpose.",
        structure.fixed_size,
    ),
    Rule(
        "EK107",
        "norm-never-called",
        ("note",),
        ("training", "inference"),
        "channels",
        "It has parameters that never get a gradient and statistics that never move.",
        "Call it or remove it. If a branch that the example did not take calls it, ignore this.",
        inference.never_called,
    ),
    Rule(
        "EK108",
        "norm-in-one-mode",
        ("error",),
        ("training", "inference"),
        "calls",
        "What is behind the norm was trained on normalized values and gets others at inference.",
        "Call it in both modes; eval() alone makes it use running statistics. To save its time, "
        "fold it (evenkeel.fold).",
        inference.skipped_at_inference,
    ),
    Rule(
        "EK109",
        "batch-statistics-at-inference",
        ("warning",),
        ("inference",),
        "samples in the batch that decide",
        "The answer for a sample then depends on which others are in its batch, and one sample "
        "alone may give nothing but beta.",
        "Use track_running_stats=True, training=self.training with F.batch_norm, and let eval() "
        "reach the norm.",
        inference.batch_statistics_at_inference,
    ),
    Rule(
        "EK201",
        "eval-in-training",
        ("warning", "note"),
        (),
        "batches behind the statistics",
        "With frozen statistics gamma and beta learn for values that are no longer normalized.",
        "If it is frozen on purpose, freeze gamma and beta too (evenkeel.freeze); else call "
        "train() on the network before each epoch.",
        inference.eval_in_training,
    ),
    Rule(
        "EK202",
        "training-in-eval",
        ("error",),
        (),
        "weight of each new batch",
        "Answers depend on the batch, and every evaluation overwrites the running statistics.",
        "Call eval() on the whole network behind everything that calls train() on parts of it.",
        inference.training_in_eval,
    ),
    Rule(
        "EK203",
        "frozen-but-moving",
        ("warning",),
        (),
        "weight of each new batch",
        "requires_grad=False stops gamma and beta alone: running statistics still go over to the "
        "new data, and with them what the frozen layers compute.",
        "Use evenkeel.freeze, which lasts; eval() alone is undone by the next train().",
        inference.frozen_but_moving,
    ),
    Rule(
        "EK301",
        "never-updated",
        _ALL,
        (),
        "batches counted",
        "At inference the norm does not normalize: it has no statistics of any data.",
        "Train, load the buffers along with the weights, or run evenkeel.recalibrate on data.",
        statistics.never_updated,
    ),
    Rule(
        "EK302",
        "not-finite",
        ("error",),
        (),
        "values",
        "One NaN or infinite batch stays in an exponential average for good, and inference gives "
        "NaN for every input, even where the optimizer skipped the step.",
        "Go back to a checkpoint before it, or run evenkeel.recalibrate on data.",
        statistics.not_finite,
    ),
    Rule(
        "EK303",
        "negative-variance",
        ("error",),
        (),
        "the least variance",
        "The root of a negative number is NaN. E[x^2] - E[x]^2 in low precision gives such "
        "numbers, and so do averages of weights with negative factors.",
        "Run evenkeel.recalibrate on data.",
        statistics.negative_variance,
    ),
    Rule(
        "EK304",
        "vanished-variance",
        ("warning", "note"),
        (),
        "the least variance",
        "Such channels were constant in training. What else ever comes there is blown up by "
        "1/sqrt(eps); subnormal numbers make folded layers several times slower on a CPU.",
        "Find out why the channel is dead; prune it, or lower gamma. --fix makes subnormals zero.",
        statistics.tiny_variance,
        fixable=True,
    ),
    Rule(
        "EK305",
        "half-precision-statistics",
        ("warning", "note"),
        (),
        "relative step of the dtype",
        "A running average in half precision loses small changes, and variances under 6e-8 become "
        "zero in float16.",
        "Keep norms in float32 (autocast does); convert only for inference.",
        statistics.half_precision,
    ),
    Rule(
        "EK306",
        "statistics-do-not-fit",
        ("warning",),
        ("measure",),
        "deviations",
        "The norm's running statistics are not those of the data: other preprocessing, another "
        "domain, weights that moved on, or too few batches.",
        "Check the preprocessing; if the data is right, run evenkeel.recalibrate on it.",
        gaps.mismatch,
    ),
    Rule(
        "EK307",
        "eval-gap",
        ("error", "warning"),
        ("measure",),
        "deviations of the output",
        "Good in training and bad in eval mode is this gap: running statistics are not what the "
        "network was trained with.",
        "Begin at the layer that is named; those behind it are off because it is. If training goes "
        "on at a high learning rate, statistics lag behind weights: run evenkeel.recalibrate.",
        gaps.eval_gap,
    ),
    Rule(
        "EK308",
        "stale-average",
        ("error",),
        (),
        "deviations",
        "Averaged weights (EMA, SWA) need statistics of their own: those of other weights do not "
        "belong to them.",
        "Run evenkeel.recalibrate on data, or average with use_buffers=True.",
        statistics.stale_average,
    ),
    Rule(
        "EK309",
        "statistics-not-saved",
        ("error",),
        (),
        "buffers missing",
        "A file of parameters() alone has no running statistics, and inference needs them.",
        "Save network.state_dict(), which has the buffers, or run evenkeel.recalibrate on data.",
        statistics.lost_statistics,
    ),
    Rule(
        "EK310",
        "counted-twice",
        ("warning",),
        ("run",),
        "counts in one step",
        "Checkpointing runs the segment again in the backward pass, so each batch moves the "
        "statistics twice: a momentum of 0.1 works like 0.19, and batches are counted double.",
        "Halve the momentum, or keep norms out of the checkpointed segment.",
        statistics.counted_twice,
    ),
    Rule(
        "EK401",
        "dead-gamma",
        ("warning", "note"),
        (),
        "channels",
        "A channel with gamma zero carries beta alone, whatever comes in.",
        "Prune such channels, or take weight decay off gamma if it did this.",
        settings.dead_gamma,
    ),
    Rule(
        "EK402",
        "huge-gamma",
        ("warning",),
        (),
        "the largest gamma",
        "The norm gives values of deviation gamma; hundreds overflow float16 and saturate what "
        "is behind.",
        "Lower the learning rate, or look for a channel that is almost always constant.",
        settings.huge_gamma,
    ),
    Rule(
        "EK403",
        "momentum-of-other-convention",
        _ALL,
        (),
        "momentum",
        "In torch and cuDNN momentum weighs the new batch; in Keras, Flax, ONNX, Caffe and Darknet "
        "it weighs the old value, and 0.9 or 0.99 there is 0.1 or 0.01 here.",
        "Use 1 minus the other framework's number.",
        settings.momentum_of_other_convention,
    ),
    Rule(
        "EK404",
        "eps-outlier",
        _ALL,
        (),
        "eps",
        "A large epsilon outweighs small variances; a tiny one divides by rounding errors; one "
        "that differs from the rest is often a conversion's leftover.",
        "Use the epsilon that the weights were trained with, else 1e-5.",
        settings.eps_outlier,
    ),
    Rule(
        "EK405",
        "eps-zero",
        ("error", "warning"),
        (),
        "the least variance",
        "A constant channel then gives 0/0, and half precision makes small variances zero.",
        "Use 1e-5; to keep a folded detector's numbers exactly, check that no variance is small.",
        settings.eps_zero,
    ),
    Rule(
        "EK406",
        "weight-decay-on-norm",
        ("warning", "note"),
        ("optimizer",),
        "weight decay",
        "Decay of the layer before a norm is undone by the norm; decay of gamma and beta is not, "
        "and pulls the network to zero output.",
        "Put gamma and beta (parameters with one axis) into a group with weight_decay=0.",
        settings.weight_decay,
    ),
    Rule(
        "EK407",
        "not-in-optimizer",
        ("warning", "note"),
        ("optimizer",),
        "parameters left out",
        "They keep their values for good: the norm was made or swapped after the optimizer was, or "
        "is frozen without its statistics.",
        "Make the optimizer last, or freeze the norm with its statistics.",
        settings.left_out_of_optimizer,
    ),
    Rule(
        "EK501",
        "one-value-per-owner",
        ("error", "note"),
        ("run or attempt",),
        "values per owner",
        "The variance of one value is zero: torch raises, and elsewhere the output is beta.",
        "Larger batches, drop_last=True in the loader, or a norm that averages more axes.",
        counts.one_value,
    ),
    Rule(
        "EK502",
        "two-values-per-owner",
        ("warning", "note"),
        ("run or attempt",),
        "values per owner",
        "Two values are normalized to +1 and -1 whatever they were, and nothing warns.",
        "Larger batches, drop_last=True in the loader, or a norm that averages more axes.",
        counts.two_values,
    ),
    Rule(
        "EK503",
        "small-batch",
        ("warning",),
        ("data",),
        "samples per process",
        "Statistics of a few samples are noise: accuracy falls at 8 samples per process and fast "
        "below (Wu & He 2018, table 2).",
        "Larger batches, SyncBatchNorm over the processes, or group norm.",
        counts.small_batch,
    ),
    Rule(
        "EK504",
        "sync-norm-on-cpu",
        _ALL,
        (),
        "channels",
        "torch.nn.SyncBatchNorm trains on GPUs alone.",
        "Move the network to a GPU first, or use plain batch norm on the CPU.",
        counts.sync_on_cpu,
    ),
)
"""All rules, in the order of their codes."""
