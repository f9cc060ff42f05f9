"""Models of texts."""

import transformers as tf
from support.onnx_zoo.rows import HEAD, HIDDEN, QUERY_VALUE, QV, SIZES, Row, transposed_lora

from converters.outputs.onnx.options import Form

_SCORE, _SPANS = ["score"], ("start_logits", "end_logits")
TEXT = {**SIZES, "vocab_size": 96, "max_position_embeddings": 40}
_DISTIL = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "vocab_size": 96, "max_position_embeddings": 40}
_DEBERTA = {**TEXT, "type_vocab_size": 0, "relative_attention": True, "position_biased_input": False}
_DEBERTA_V3 = {**_DEBERTA, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
_MODERN = {**TEXT, "num_hidden_layers": 2, "local_attention": 8, "global_attn_every_n_layers": 2,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}  # fmt: skip
_LM = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADED = {**_LM, "head_dim": 8}
_SLIDING = {**_LM, "sliding_window": 6, "head_dim": 8}
_GEMMA = {**_SLIDING, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96, "n_positions": 40}

ENCODER_ROWS = {
    "bert": Row("BERT", tf.BertForSequenceClassification, TEXT, QUERY_VALUE, HEAD),
    "bert-tokens": Row("BERT", tf.BertForTokenClassification, TEXT, QUERY_VALUE, HEAD),
    "bert-questions": Row(
        "BERT", tf.BertForQuestionAnswering, TEXT, QUERY_VALUE, ["qa_outputs"], _SPANS, (2,)
    ),
    "bert-features": Row("BERT", tf.BertModel, TEXT, QUERY_VALUE, None, HIDDEN, (3,)),
    "roberta": Row("RoBERTa", tf.RobertaForSequenceClassification, TEXT, QUERY_VALUE, HEAD),
    "xlm-roberta": Row("XLM-RoBERTa", tf.XLMRobertaForTokenClassification, TEXT, QUERY_VALUE, HEAD),
    "xlm-roberta-xl": Row("XLM-RoBERTa-XL", tf.XLMRobertaXLForSequenceClassification, TEXT, QUERY_VALUE, HEAD),
    "camembert": Row("CamemBERT", tf.CamembertForSequenceClassification, TEXT, QUERY_VALUE, HEAD),
    "electra": Row(
        "ELECTRA", tf.ElectraForSequenceClassification, {**TEXT, "embedding_size": 16}, QUERY_VALUE, HEAD
    ),
    "distilbert": Row(
        "DistilBERT", tf.DistilBertForSequenceClassification, _DISTIL, ["q_lin", "v_lin"],
        ["pre_classifier", "classifier"],
    ),
    "albert": Row(
        "ALBERT", tf.AlbertForSequenceClassification,
        {**TEXT, "embedding_size": 16, "num_hidden_layers": 2}, QUERY_VALUE, HEAD,
    ),
    "mpnet": Row("MPNet", tf.MPNetForSequenceClassification, TEXT, ["attn.q", "attn.v"], HEAD),
    "deberta": Row(
        "DeBERTa", tf.DebertaForSequenceClassification, {**_DEBERTA, "pos_att_type": "c2p|p2c"}, ["in_proj"], HEAD
    ),
    "deberta-v3": Row(
        "DeBERTa v2, v3", tf.DebertaV2ForSequenceClassification, {**_DEBERTA_V3, "pos_att_type": "p2c|c2p"},
        ["query_proj", "value_proj"], HEAD, tested=(Form.SHARED, Form.SWAPPABLE),
    ),
    "deberta-v2": Row(
        "DeBERTa v2, v3", tf.DebertaV2ForTokenClassification,
        {**_DEBERTA_V3, "pos_att_type": "p2c|c2p", "conv_kernel_size": 3, "conv_act": "gelu", "type_vocab_size": 2},
        ["query_proj", "value_proj"], HEAD,
    ),
    "modernbert": Row("ModernBERT", tf.ModernBertForSequenceClassification, _MODERN, ["Wqkv"], HEAD),
    "modernbert-tokens": Row("ModernBERT", tf.ModernBertForTokenClassification, _MODERN, ["Wqkv"], HEAD),
    "modernbert-questions": Row(
        "ModernBERT", tf.ModernBertForQuestionAnswering, _MODERN, ["Wqkv"], HEAD, _SPANS, (2,)
    ),
}  # fmt: skip
DECODER_ROWS = {
    "llama": Row(
        "Llama", tf.LlamaForCausalLM, {**_LM, "tie_word_embeddings": True}, QV, None, labels=(3,)
    ),
    "llama-texts": Row(
        "Llama", tf.LlamaForSequenceClassification, _LM, QV, _SCORE, tested=(Form.SHARED, Form.SWAPPABLE)
    ),
    "llama-tokens": Row("Llama", tf.LlamaForTokenClassification, _LM, QV, _SCORE),
    "mistral": Row("Mistral", tf.MistralForCausalLM, _SLIDING, QV, None, labels=(3,)),
    "mistral-texts": Row("Mistral", tf.MistralForSequenceClassification, _SLIDING, QV, _SCORE),
    "qwen2": Row("Qwen2", tf.Qwen2ForCausalLM, _LM, QV, None, labels=(3,)),
    "qwen2-texts": Row("Qwen2", tf.Qwen2ForSequenceClassification, _LM, QV, _SCORE),
    "qwen3": Row("Qwen3", tf.Qwen3ForCausalLM, HEADED, QV, None, labels=(3,)),
    "qwen3-texts": Row("Qwen3", tf.Qwen3ForSequenceClassification, HEADED, QV, _SCORE),
    "gemma": Row("Gemma", tf.GemmaForCausalLM, HEADED, QV, None, labels=(3,)),
    "gemma2": Row("Gemma 2", tf.Gemma2ForCausalLM, _GEMMA, QV, None, labels=(3,)),
    "gemma2-texts": Row("Gemma 2", tf.Gemma2ForSequenceClassification, _GEMMA, QV, _SCORE),
    "gemma3": Row("Gemma 3 (text)", tf.Gemma3ForCausalLM, _GEMMA, QV, None, labels=(3,)),
    "gemma3-texts": Row("Gemma 3 (text)", tf.Gemma3TextForSequenceClassification, _GEMMA, QV, _SCORE),
    "phi3": Row("Phi-3", tf.Phi3ForCausalLM, _LM, ["qkv_proj"], None, labels=(3,)),
    "gpt2": Row(
        "GPT-2", tf.GPT2LMHeadModel, _GPT2, ["c_attn", "c_fc"], None, labels=(3,), adapter=transposed_lora,
        tested=(Form.SWAPPABLE, Form.SELF_MERGING),
    ),
    "gpt2-texts": Row(
        "GPT-2", tf.GPT2ForSequenceClassification, {**_GPT2, "pad_token_id": 0}, ["c_attn"], _SCORE,
        adapter=transposed_lora,
    ),
}  # fmt: skip
TEXT_ROWS = {**ENCODER_ROWS, **DECODER_ROWS}
