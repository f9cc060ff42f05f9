"""The names of the layouts, for `--layout` and `--help`. Each is read by a file in `converters/adapters/layouts/`."""

LAYOUT_SUMMARIES = {
    "hf-peft": "HF PEFT: adapter_config.json with peft_type PEANUT or IA3",
    "authors-llm": "the PEANuT authors' LLM code: peft_type LORA, lora_A (r, in) and lora_B (in, r)",
    "authors-vision": "their image-classification code: q_adapter, v_adapter, <dense>.adapter in a state dict",
    "authors-glue": "their GLUE code: the same names under attention.self; needs --scaling",
    "peanut": "this project's own: peanut_config.json, written by converters.save_adapter",
    "lora": "LoRA and DoRA as PEFT writes them: peft_type LORA, lora_A (r, in) and lora_B (out, r)",
    "nonlinear-lora": "the paper's ablation W0 + relu(A) B in LoRA's names (lora_B is A); only if asked for",
    "multiplicative-lora": "the paper's ablation W0 + W0 A B in the names of authors-llm; only if asked for",
    "red": "RED of its authors' code: delta_vector.pth, with classifier.pth beside it for a classifier",
    "mlx": "LoRA and DoRA of mlx-lm: adapters.safetensors, lora_a (in, r) and lora_b (r, out)",
}
