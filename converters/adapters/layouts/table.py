"""The layouts there are, in the order in which they are asked."""

from converters.adapters.layouts import authors_glue, authors_vision, native, peft, peft_methods
from converters.adapters.layouts.authors_llm import AUTHORS_LLM, MULTIPLICATIVE_LORA
from converters.adapters.layouts.layout import Layout
from converters.adapters.layouts.libraries import mlx, red
from converters.adapters.layouts.lora import LORA, NONLINEAR_LORA
from converters.adapters.layouts.peft_parts import whole

LAYOUTS: tuple[Layout, ...] = (
    native.LAYOUT,
    peft.LAYOUT,
    peft_methods.LAYOUT,
    whole.LAYOUT,
    AUTHORS_LLM,
    authors_vision.LAYOUT,
    authors_glue.LAYOUT,
    LORA,
    NONLINEAR_LORA,
    MULTIPLICATIVE_LORA,
    mlx.LAYOUT,
    red.LAYOUT,
)
