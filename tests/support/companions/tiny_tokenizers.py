"""Tiny tokenizers and processors, saved as transformers saves them."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

WORDS = ("<unk>", "<pad>", "<image>", "hello", "world")


def tiny_tokenizer(template: Any = None, words: tuple[str, ...] = WORDS, **special: str) -> PreTrainedTokenizerFast:
    """One token for each word."""
    whole = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", chat_template=template, **special)


def tiny_processor(size: int, template: str | None = None) -> LlavaProcessor:
    """A processor for images of this size."""
    images = CLIPImageProcessor(size={"height": size, "width": size}, do_center_crop=False)
    return LlavaProcessor(images, tiny_tokenizer(template), patch_size=4, chat_template=template)


def said(folder: Path, **options: Any) -> str:
    """What the tokenizer in a folder makes of a greeting."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, **options))


def said_by_processor(folder: Path) -> str:
    """The same of the processor."""
    return str(AutoProcessor.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "hi"}]))
