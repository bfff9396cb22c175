"""What a cfg.json of SAELens 2 to 6 says of the function that an SAE computes.

Every key is one of three kinds: it says what is computed (and is understood or refused), it says
how the SAE was trained or kept (and changes nothing), or it is not known (and is refused: what it
does cannot be told). Read off SAELens' releases 2.0 to 6.54.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CFG_NAME = "cfg.json"
_BLOCK = re.compile(r"(?:blocks|layers|h)\.(\d+)")

# Names of SAELens 2 to 5.
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}

# Keys that change what an SAE computes, and the values that ours compute.
_COMPUTED_AS: dict[str, tuple[Any, ...]] = {
    "apply_b_dec_to_input": (True, False),
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "activation_fn": ("relu",),
    "use_error_term": (False, None),
}

_WHY_NOT = {
    "expected_average_only_in": "the factor of the activations is not in the folder; fold it in "
    "with sae-lens (fold_activation_norm_scaling_factor) and save again",
    "covariance_whitening": "the whitening is not in the folder; fold it in with sae-lens "
    "(fold_covariance_whitening) and save again",
    "constant_norm_rescale": "every token has a factor of its own, which no weights can hold",
    "layer_norm": "every token has a mean and a factor of its own, which no weights can hold",
    "hook_z": "activations come here with their heads already side by side, [..., d_in]",
    "tanh-relu": "sae-lens 6 itself reads it as relu, which is another function",
}
_WHY_NOT["True"] = _WHY_NOT["expected_average_only_in"]

_UNDERSTOOD = {
    *("architecture", "d_in", "d_sae", "dtype", "metadata", "k", "activation_fn_kwargs"),
    *("rescale_acts_by_decoder_norm", "finetuning_scaling_factor", *_COMPUTED_AS),
    # of sae=tfa, checked by its class
    *("n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk"),
    *("tied_weights", "activation_normalization_factor"),
}

# Where and how it was trained, logged and kept.
_TRAINING = """
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm
    aux_loss_coefficient b_dec_init_method cached_activations_path checkpoint_path compile_llm
    compile_sae context_size dataset_path dataset_trust_remote_code dead_feature_estimation_method
    dead_feature_threshold dead_feature_window decoder_heuristic_init decoder_heuristic_init_norm
    decoder_init_norm decoder_orthogonal_init detach_matryoshka_losses device
    disable_concat_sequences eval_batch_size_prompts eval_every_n_wandb_logs
    exclude_special_tokens expansion_factor feature_sampling_window finetuning_method
    finetuning_tokens from_pretrained_path ghost_grads hf_hook_name hook_eval hook_head_index
    hook_layer hook_name hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input
    jumprelu_tanh_scale l0_coefficient l0_warm_up_steps l1_coefficient l1_loss_wd_norm
    l1_warm_up_steps llm_compilation_mode llm_device log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb logger lp_norm lr lr_decay_steps
    lr_end lr_scheduler_name lr_warm_up_steps matryoshka_widths mean_activation
    model_class_name model_from_pretrained_kwargs model_kwargs model_name mse_loss_normalization
    n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles
    neuronpedia_id noise_variance normalize_sae_decoder output_path pre_act_loss_coefficient
    prefetch_llm_batches prepend_bos resume resume_from_checkpoint run_name sae_compilation_mode
    sae_lens_training_version sae_lens_version save_final_checkpoint
    scale_sparsity_penalty_by_decoder_norm seed seqpos_slice sequence_separator_token
    store_batch_size store_batch_size_prompts streaming target_l0 tokens_per_buffer
    topk_threshold_lr total_training_tokens train_batch_size train_batch_size_samples
    train_batch_size_tokens training_tokens use_cached_activations use_chat_formatting
    use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project
"""
_CHANGES_NOTHING = frozenset(_TRAINING.split())


def understood(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`cfg` in the form of SAELens 6; raises ValueError for what is not computed here."""
    found = {_RENAMED.get(key, key): value for key, value in cfg.items()}
    is_old = not isinstance(found.get("metadata"), dict)
    if is_old and "hook_name" in found:
        # Before version 4 there was one architecture and no key for it.
        found.setdefault("architecture", "standard")
        if "hook_z" in str(found["hook_name"]):
            found.setdefault("reshape_activations", "hook_z")
    missing = [key for key in ("architecture", "d_in", "d_sae") if key not in found]
    if missing:
        raise ValueError(f"{CFG_NAME} has no {', '.join(missing)}: {_what_it_is(cfg)}")
    for key in ("d_in", "d_sae"):
        if type(found[key]) is not int or found[key] < 1:
            raise ValueError(f"{CFG_NAME}: {key} is {found[key]!r}, it must be an integer above 0")
    found = _with_activation(found)
    for key, allowed in _COMPUTED_AS.items():
        value = found.get(key, allowed[0])
        if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
            why = _WHY_NOT.get(str(value))
            raise ValueError(
                f"{CFG_NAME}: {key}={value!r} is not supported, only {allowed[0]!r}"
                + (f": {why}" if why else "")
            )
    if found.get("rescale_acts_by_decoder_norm") and found["architecture"] != "topk":
        raise ValueError(
            f"{CFG_NAME}: rescale_acts_by_decoder_norm=True is not supported with architecture "
            f"{found['architecture']!r}, only with 'topk'"
        )
    metadata = {} if is_old else found["metadata"]
    _check_layer({**found, **metadata})
    for said in (found, metadata):
        if (head := said.get("hook_head_index")) is not None:
            raise ValueError(
                f"{CFG_NAME}: hook_head_index={head!r}: the SAE is of one attention head, whose "
                "activations are not read here"
            )
    of_ours = metadata.get("tcsae")
    own = isinstance(of_ours, dict) and "sae" in of_ours
    unknown = sorted(found.keys() - _UNDERSTOOD - _CHANGES_NOTHING)
    if unknown and not own:
        raise ValueError(
            f"{CFG_NAME}: {', '.join(f'{key}={found[key]!r}' for key in unknown)} is not known "
            "here and may change what the SAE computes; load it with sae-lens, save it with "
            "save_model, and take that folder"
        )
    return found


def _check_layer(said: Mapping[str, Any]) -> None:
    name, layer = said.get("hook_name"), said.get("hook_layer")
    named = _BLOCK.search(name) if isinstance(name, str) else None
    if named and type(layer) is int and int(named[1]) != layer:
        raise ValueError(f"{CFG_NAME}: hook_layer is {layer}, but hook_name {name}")


def _with_activation(cfg: dict[str, Any]) -> dict[str, Any]:
    """TopK was an activation function of the architecture "standard" once."""
    kwargs = cfg.get("activation_fn_kwargs") or {}
    if cfg.get("activation_fn") != "topk":
        if kwargs:
            raise ValueError(
                f"{CFG_NAME}: activation_fn_kwargs={kwargs!r} is not known with activation_fn="
                f"{cfg.get('activation_fn')!r}"
            )
        return cfg
    if cfg["architecture"] not in ("standard", "topk"):
        raise ValueError(
            f"{CFG_NAME}: activation_fn='topk' with architecture {cfg['architecture']!r} is not "
            "computed here"
        )
    if set(kwargs) - {"k"}:
        raise ValueError(f"{CFG_NAME}: activation_fn_kwargs={kwargs!r}: only k is known")
    chosen = {**cfg, "architecture": "topk", "activation_fn": "relu"}
    if "k" in kwargs:
        if cfg.get("k") not in (None, kwargs["k"]):
            raise ValueError(f"{CFG_NAME}: k is {cfg['k']!r}, but activation_fn_kwargs={kwargs!r}")
        chosen["k"] = kwargs["k"]
    return chosen


def _what_it_is(cfg: Mapping[str, Any]) -> str:
    if "trainer" in cfg:
        return "it is dictionary_learning's, whose weights are ae.pt beside its config.json"
    if "num_latents" in cfg or {"k", "activation"} <= cfg.keys():
        return "it is sparsify's, whose weights are sae.safetensors beside it"
    return "it is not SAELens' format"
