"""Folders of sentence-transformers: a model without a head, its pooling, and normalisation."""

import transformers as tf
from support.onnx_zoo.rows import HIDDEN, QUERY_VALUE, QV, Row
from support.onnx_zoo.text_rows import HEADED, TEXT

SENTENCE_ROWS = {
    "sentences-bert": Row(
        "sentence-transformers: BERT", tf.BertModel, TEXT, QUERY_VALUE, None, HIDDEN, (3,), pooling=("mean_tokens",)
    ),
    "sentences-xlm-roberta": Row(
        "sentence-transformers: XLM-RoBERTa", tf.XLMRobertaModel, TEXT, QUERY_VALUE, None, HIDDEN, (3,),
        pooling=("cls_token",),
    ),
    "sentences-mpnet": Row(
        "sentence-transformers: MPNet", tf.MPNetModel, TEXT, ["attn.q", "attn.v"], None, HIDDEN, (3,),
        pooling=("mean_tokens",),
    ),
    "sentences-qwen3": Row(
        "sentence-transformers: Qwen3", tf.Qwen3Model, HEADED, QV, None, HIDDEN, (3,), pooling=("lasttoken",)
    ),
}  # fmt: skip
