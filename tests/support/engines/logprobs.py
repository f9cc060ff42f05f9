"""How likely a model finds a text, token by token."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel


def logprobs(model: PreTrainedModel | PeftModel, tokens: list[int]) -> torch.Tensor:
    """The logprob of every token but the first, given the previous ones."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
