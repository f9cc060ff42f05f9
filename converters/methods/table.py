"""The methods there are. To add one: its file in this folder, a row here, a test file in `tests/methods/`."""

from converters.methods.base import Method
from converters.methods.dora import Dora
from converters.methods.ia3 import Ia3
from converters.methods.peanut import Tweaker
from converters.methods.peft_form import PeftForm

METHODS: dict[str, type[Method]] = {method.name: method for method in (Tweaker, Dora, Ia3)}

_FORMS = [(method, method.peft) for method in METHODS.values() if method.peft is not None]

# peft_type -> the method it stands for, and how PEFT saves it
PEFT_METHODS: dict[str, tuple[type[Method], PeftForm]] = {
    form.peft_type: (method, form) for method, form in _FORMS if form.flag is None
}
# field of a LoraConfig -> the variant of LoRA that it turns on
LORA_VARIANTS: dict[str, tuple[type[Method], PeftForm]] = {
    form.flag: (method, form) for method, form in _FORMS if form.flag is not None
}
