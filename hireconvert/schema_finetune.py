"""The recipe section `finetune`: a short training run in which the student selects."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hireconvert.sections import Count, In, Positive, Problem, Section, Share, Text, source_problems


class FinetuneLossRecipe(Section):
    """Weights of the parts of the training loss; a part of weight 0 is not computed."""

    kl: Annotated[float, In(0)] = Field(
        default=1.0, description="KL(dense original || student) of the logits, weight"
    )
    features: Annotated[float, In(0)] = Field(
        default=0.0, description="normalised squared error of each decoder layer's output, weight"
    )
    lm: Annotated[float, In(0)] = Field(
        default=0.0, description="cross-entropy of the text's own next tokens, weight"
    )

    def _problems(self) -> Iterator[Problem]:
        if self.kl == self.features == self.lm == 0:
            yield "kl", "every weight is 0; at least one part of the loss must count"


class FinetuneRecipe(Section):
    """A short training run in which the student selects as it will when decoding."""

    source: Text | None = Field(
        default=None,
        description="text to train on, in the form of data.source and read with its columns and "
        "split; null takes that",
    )
    num_tokens: Count = Field(default=262144, description="tokens to train on")
    window: Annotated[int, In(2)] = Field(default=512, description="tokens per packed window")
    step_windows: Count = Field(default=2, description="windows per optimizer step")
    learning_rate: Positive = Field(default=5.0e-5, description="peak learning rate")
    warmup: Annotated[float, In(0, 1)] = Field(
        default=0.03, description="share of the steps over which the learning rate rises"
    )
    weight_decay: Annotated[float, In(0)] = Field(default=0.0, description="AdamW weight decay")
    clip: Positive = Field(default=1.0, description="largest norm of the gradient")
    loss: FinetuneLossRecipe = Field(default=FinetuneLossRecipe(), description="what is minimised")
    mask: Literal["oracle", "predicted", "oracle_then_predicted"] = Field(
        default="oracle",
        description="who selects: exact scores, predictors, or exact scores for the first half",
    )
    anneal: Annotated[float, In(0, 1)] = Field(
        default=0.3,
        description="share of the steps over which the kept share falls to the recipe's",
    )
    anneal_from: Share = Field(
        default=0.7, description="kept share of the first step, unless the recipe's is larger"
    )
    dense_prefix: Annotated[float, In(0, 1, open_high=True)] = Field(
        default=0.0, description="largest share of a window that runs dense first, as prompts do"
    )
    parameters: Literal["ffn", "ffn_and_norms", "all_but_embeddings"] = Field(
        default="ffn_and_norms", description="which weights are trained"
    )
    lora_rank: Count | None = Field(
        default=None,
        description="train low-rank updates of this rank and merge them; null: weights",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the forward and backward passes; weights stay float32"
    )
    checkpoint_steps: Count = Field(
        default=50, description="optimizer steps between checkpoints that --resume continues from"
    )

    def _problems(self) -> Iterator[Problem]:
        if self.num_tokens < self.window:
            found = f"{self.num_tokens} is less than one window of {self.window} tokens"
            yield "num_tokens", f"{found} (finetune.window)"
        elif self.num_tokens // self.window < self.step_windows:
            step = f"{self.step_windows} windows of {self.window} tokens"
            yield "num_tokens", f"{self.num_tokens} is less than one step of {step}"
        yield from source_problems(self.source or "self")
