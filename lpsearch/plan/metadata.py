"""What a plan file says besides the plan: the model that it is for, what was measured, and where it comes from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "FileModel",
    "KindMetrics",
    "LatencyMetrics",
    "ModelIdentity",
    "PlanMetadata",
    "PlanMetrics",
    "Provenance",
    "ProxyMetrics",
    "RecoveredLoss",
    "Recovery",
]


class FileModel(BaseModel):
    """Base of everything that comes in from a file: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelIdentity(FileModel):
    """The model that a plan is for.

    Attributes:
        id: hub id, path or package of the artefact, e.g. ``meta-llama/Llama-2-7b-hf``.
        name: what the artefact is, where the id does not say so, e.g. ``SmolLM2-135M-Instruct (4-bit Q4_1)``; left out
            of the file where the id does.
        revision: commit or version of the artefact; None for a local path.
        num_layers: number of decoder layers.
        fingerprint: ``<geometry>-<weights>``, see :func:`lpsearch.models.fingerprint_model`.
    """

    id: str
    name: str | None = Field(default=None, exclude_if=lambda name: name is None)
    revision: str | None = None
    num_layers: int = Field(gt=0)
    fingerprint: str


class KindMetrics(FileModel):
    """Loss of a plan on one of several kinds of text, paired with the unmodified model on the same windows.

    Attributes:
        data: the data specification.
        weight: weight of the kind in the mean over kinds, relative to those of the others.
        nll: mean negative log-likelihood in nats per token.
        delta_nll: ``nll`` minus the unmodified model's, in nats per token.
        delta_nll_se: standard error of ``delta_nll`` over windows, in nats per token; None for one window.
        perplexity: ``exp(nll)``.
        kl_nats_per_token: mean KL(base || plan) over the vocabulary; None unless it was measured.
        kl_se: standard error of it over windows; None for one window.
        windows: number of windows.
        num_tokens: tokens whose loss was counted.
    """

    data: str
    weight: float = Field(gt=0)
    nll: float
    delta_nll: float
    delta_nll_se: float | None
    perplexity: float
    kl_nats_per_token: float | None = None
    kl_se: float | None = None
    windows: int = Field(gt=0)
    num_tokens: int = Field(gt=0)


class ProxyMetrics(FileModel):
    """Loss of a plan over fixed windows, paired with the unmodified model on the same windows.

    Of several kinds of text, the losses are weighted means over the kinds.

    Attributes:
        variant: what was done to the plan's weights before: ``raw`` nothing; after a ``refit`` the losses are those of
            repaired weights, which the plan file does not hold.
        nll: mean negative log-likelihood in nats per token.
        delta_nll: ``nll`` minus the unmodified model's, in nats per token.
        delta_nll_se: standard error of ``delta_nll`` over windows, in nats per token; None for one window.
        perplexity: ``exp(nll)``.
        kl_nats_per_token: mean KL(base || plan) over the vocabulary; None unless it was measured.
        by_kind: the same of each kind of text, where there are several.
        data: the data specification, e.g. ``wikitext2:validation``; of several kinds all of them, to be read.
        windows: number of windows.
        seq_len: tokens in a window.
        num_tokens: tokens whose loss was counted.
        dtype: dtype of the weights, e.g. ``bfloat16``.
        device: device that ran it, e.g. ``cpu`` or ``NVIDIA H100 80GB HBM3``.
    """

    variant: str = "raw"
    nll: float
    delta_nll: float
    delta_nll_se: float | None
    perplexity: float
    kl_nats_per_token: float | None = None
    by_kind: tuple[KindMetrics, ...] = ()
    data: str
    windows: int = Field(gt=0)
    seq_len: int = Field(gt=1)
    num_tokens: int = Field(gt=0)
    dtype: str
    device: str


class LatencyMetrics(FileModel):
    """Time of one decode step of a plan, and how it is known.

    Attributes:
        kind: ``measured`` on this very plan, or ``estimated`` by the fitted latency model.
        latency_ms: TPOT in milliseconds.
        baseline_latency_ms: TPOT of the unmodified model under the same runtime.
        speedup: ``baseline_latency_ms / latency_ms``.
        batch_size: sequences decoded together.
        context_len: cached tokens of each sequence.
        dtype: dtype of the weights.
        device: device that was measured.
        engine: what the time is of: ``runtime`` (this package's own), ``transformers``, ``llama.cpp`` or ``vllm``; None
            in files of older versions, whose times are of the runtime.
        runtime: how the engine executed the step, e.g. ``transformers eager, fused layers``.
        versions: package versions at the measurement.
        mean_error: mean relative error of the model's estimates on depths that it was not fitted to; None where that is
            not known.
        workload: None for one decode step; else what the time is of, e.g. ``prefill:2048``, or of a mix
            ``decode:1x1024@0.5,prefill:2048@0.5``, where ``batch_size`` and ``context_len`` are those of the first.
        kv_bytes_per_token: bytes of the plan's KV cache of one sequence of ``context_len`` tokens, over all GPUs, a
            token; None where that is not known.
        baseline_kv_bytes_per_token: those of the unmodified model.
    """

    kind: Literal["measured", "estimated"]
    latency_ms: float = Field(gt=0)
    baseline_latency_ms: float = Field(gt=0)
    speedup: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    context_len: int = Field(ge=0)
    dtype: str
    device: str
    engine: str | None = None
    runtime: str
    versions: dict[str, str]
    mean_error: float | None = Field(default=None, ge=0)
    workload: str | None = None
    kv_bytes_per_token: int | None = Field(default=None, ge=0)
    baseline_kv_bytes_per_token: int | None = Field(default=None, ge=0)


class PlanMetrics(FileModel):
    """What was measured for a plan; None where nothing was."""

    proxy: ProxyMetrics | None = None
    heldout: ProxyMetrics | None = None
    latency: LatencyMetrics | None = None


class RecoveredLoss(FileModel):
    """What a repair won back on one kind of text, on windows that it was not fitted to.

    Attributes:
        data: the data specification, e.g. ``wikitext2:test``.
        windows: number of windows.
        seq_len: tokens in a window.
        num_tokens: tokens whose loss was counted.
        untouched_delta_nll: what the plan costs without the repair, in nats per token.
        delta_nll: what it costs with it, in nats per token.
        delta_nll_se: standard error of ``delta_nll`` over windows; None for one window.
    """

    data: str
    windows: int = Field(gt=0)
    seq_len: int = Field(gt=1)
    num_tokens: int = Field(gt=0)
    untouched_delta_nll: float
    delta_nll: float
    delta_nll_se: float | None

    @property
    def recovered_share(self) -> float | None:
        """Share of the loss that was won back; None where the plan lost nothing."""
        return 1 - self.delta_nll / self.untouched_delta_nll if self.untouched_delta_nll > 0 else None


class Recovery(FileModel):
    """How the weights that belong to a plan were repaired.

    Attributes:
        method: ``refit`` in closed form, or ``distill`` by training.
        data: the texts that it was fitted to.
        num_tokens: tokens of them that were used, each as often as it was used.
        steps: steps of training; None for a refit.
        seconds: wall time.
        settings: what else decided the result, by option.
        losses: what it won back, by kind of text.
        fingerprint: of the repaired model; see :func:`lpsearch.models.fingerprint_model`.
        dtype: dtype of the weights while they were repaired.
        device: device that did it.
        versions: package versions that did it.
    """

    method: Literal["refit", "distill"]
    data: tuple[str, ...]
    num_tokens: int = Field(gt=0)
    steps: int | None = None
    seconds: float = Field(ge=0)
    settings: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    losses: tuple[RecoveredLoss, ...] = ()
    fingerprint: str
    dtype: str
    device: str
    versions: dict[str, str] = Field(default_factory=dict)


class Provenance(FileModel):
    """Where a plan comes from.

    Attributes:
        study: name of the Optuna study.
        trial: number of the trial within it.
        seed: seed of the study.
        versions: package versions that produced it.
        created_at: ISO 8601 time, UTC.
        recovery: how its weights were repaired; None for a plan of the unmodified weights.
    """

    study: str | None = None
    trial: int | None = None
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    created_at: str | None = None
    recovery: Recovery | None = None


class PlanMetadata(FileModel):
    """Everything in a plan file besides the groups."""

    model: ModelIdentity
    metrics: PlanMetrics = PlanMetrics()
    provenance: Provenance = Provenance()
