"""A language model as a user sees it: text in, text out.

lm = cabochon.load()                  # the model that ships inside; or a folder, or a Hub id
lm.generate("The capital of France is").text
"""

from cabochon.lm.answers import Completion, Stream, Usage
from cabochon.lm.load import load
from cabochon.lm.model import LM, Prompt, Score

__all__ = ["LM", "Completion", "Prompt", "Score", "Stream", "Usage", "load"]
