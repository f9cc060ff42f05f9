"""Models of sounds."""

import transformers as tf
from support.onnx_zoo.rows import HEAD, HIDDEN, PROJECTED, QV, SIZES, Row

from converters.outputs.onnx.options import Form

WAVES = {
    **SIZES, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
}  # fmt: skip
AST = {**SIZES, "max_length": 64, "num_mel_bins": 32}
WHISPER = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_layers": 1,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "vocab_size": 96, "max_source_positions": 50,
    "num_mel_bins": 16, "classifier_proj_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_STABLE = {**WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
_LENGTHS = (400, 731, 523)

SOUND_ROWS = {
    "wav2vec2": Row(
        "wav2vec2", tf.Wav2Vec2ForSequenceClassification, _STABLE, QV, PROJECTED, lengths=_LENGTHS,
        tested=(Form.SHARED, Form.SWAPPABLE),
        processor=lambda: tf.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    ),
    "wav2vec2-features": Row("wav2vec2", tf.Wav2Vec2Model, WAVES, QV, None, HIDDEN, (3,), lengths=_LENGTHS),
    "hubert": Row(
        "HuBERT", tf.HubertForSequenceClassification, {**WAVES, "use_weighted_layer_sum": True}, QV, PROJECTED,
        lengths=_LENGTHS,
        processor=lambda: tf.Wav2Vec2FeatureExtractor(),
    ),
    "ast": Row(
        "AST", tf.ASTForAudioClassification, AST, QV, HEAD, shape=(64, 32), tested=(Form.SHARED,),
        processor=lambda: tf.ASTFeatureExtractor(max_length=64, num_mel_bins=32),
    ),
    "whisper": Row(
        "Whisper (encoder)", tf.WhisperForAudioClassification, WHISPER, QV, PROJECTED, shape=(16, 100),
        tested=(Form.SHARED,),
        processor=lambda: tf.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    ),
}  # fmt: skip
