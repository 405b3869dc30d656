"""generate()'s loop over tokens for one sequence, with nothing around a token that is not needed.

transformers' own loop (`GenerationMixin._sample`) spends a tenth of a small model's token on what
one sequence in plain greedy search or sampling does not need. The loop here is that method's, the
prompt and the first token go through the same methods of the model, and what it replaces is known
by its text: another version's loop, or a call that asks for more, runs as it is. Shape suffixes:
P positions, V vocabulary.
"""

import functools
import hashlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .hire_draw import BEYOND, Draw, Floor, greedy
from .hire_token import altered

# SHA-256 of the source of `GenerationMixin._sample`: transformers 5.20 to 5.23.
_KNOWN = {"9f5d2e3906df657912a0025b73b4f03ccc9b33f2c2c7ea5ded251c4fc998a277"}
_OURS = {
    "_sample", "_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation",
}  # fmt: skip
_CALLED = {*_OURS, "forward"}
_PATIENCE = 8  # tokens in a row whose certified rows may be in vain
_OWN = "transformers.generation."  # criteria and processors that touch what they are given alone


@functools.cache
def known() -> bool:
    """Whether transformers' loop is the one that is repeated here."""
    try:
        text = inspect.getsource(GenerationMixin._sample)
    except (OSError, TypeError):  # no source to be had
        return False
    return hashlib.sha256(text.encode()).hexdigest() in _KNOWN


@dataclass
class Job:
    """The arguments of `_sample`, `more` those of the model."""

    input_ids: torch.Tensor
    processors: Any
    criteria: Any
    config: Any
    streamer: Any
    more: dict[str, Any] = field(default_factory=dict)

    def watched(self) -> bool:
        """Whether code that may reach for the model runs between tokens."""
        parts = [*self.processors, *self.criteria]
        return self.streamer is not None or not all(
            type(part).__module__.startswith(_OWN) for part in parts
        )


def serves(model: Any, job: Job) -> bool:
    """Whether `Loop` gives what transformers' loop gives."""
    kind, state, config = type(model), model.hire_state, job.config
    # A class derived from the twin, or an instance, may have methods of its own.
    if not known() or "hire_native" not in vars(kind) or not _CALLED.isdisjoint(vars(model)):
        return False
    if any(getattr(kind.hire_native, name) is not getattr(GenerationMixin, name) for name in _OURS):
        return False
    asked = (
        config.is_assistant, config.output_attentions, config.output_hidden_states,
        config.compile_config is not None, model.config.is_encoder_decoder, model.training,
    )  # fmt: skip
    if any(asked) or state.scope != "decode" or not state.native_step or not state.generating:
        return False
    ids, lists = job.input_ids, (type(job.processors), type(job.criteria))
    if ids.shape[0] != 1 or ids.device.type != "cpu" or model.device.type != "cpu":
        return False
    ends = any(hasattr(criterion, "eos_token_id") for criterion in job.criteria)
    if lists != (LogitsProcessorList, StoppingCriteriaList) or not job.more.get("use_cache"):
        return False
    return not ends or config._pad_token_tensor is not None


class Loop:
    """One sequence from its prompt to its end."""

    def __init__(self, model: Any, job: Job) -> None:
        config = job.config
        self._model, self._job, self._more = model, job, job.more
        self._base: Any = getattr(model, model.base_model_prefix)
        self._head = model.get_output_embeddings()
        self._ids_1P, self._new = job.input_ids, list[int]()  # the sequence, and its latest tokens
        self._short: Any = None  # hire_token.Tokens while they serve
        self._beyond = 0  # tokens in a row for which certified rows did not suffice
        self._steps = 0  # taken by transformers' way
        self._behind = 0  # tokens that the arguments of the model do not know of
        named = config.return_dict_in_generate
        self._scores: Any = () if named and config.output_scores else None
        self._logits: Any = () if named and config.output_logits else None
        self._watched = job.watched()
        # Whether anybody looks at logits, and at the sequence before its end.
        self._reads_logits = bool(
            len(job.processors) or config.do_sample or self._scores == () or self._logits == ()
        )
        self._limit = _plain_limit(job.criteria)
        self._draw = self._floor = None
        if config.do_sample and self._scores is None:
            self._draw = Draw.of(job.processors)
        if self._scores is None and self._logits is None and self._may_certify():
            self._floor = Floor.of(job.processors, self._draw)

    def run(self) -> Any:
        """What `_sample` returns."""
        model, job = self._model, self._job
        outputs = model._prefill(job.input_ids, job.config, self._more, is_first_iteration=True)
        logits_1V = self._take(outputs)
        del outputs  # the logits of a whole prompt
        with model._optimize_model_for_decode():
            try:
                token = self._choose(logits_1V, None)
                while not self._ends(token):
                    token = self._next(token)
            finally:
                self._close()
                model._hire_forget_uncertified()  # whatever there was to say has been said
        if job.streamer is not None:
            job.streamer.end()
        return self._result()

    @property
    def certifies(self) -> bool:
        """Whether tokens come of certified rows although the settings alone do not allow it."""
        return self._floor is not None

    def _may_certify(self) -> bool:
        """Whether the head's certificate is there, but not what the settings ask for."""
        spec, config = getattr(self._head, "hire", None), self._job.config
        uncertified = self._model.hire_state.head_mode != "recipe"
        chosen = self._draw is not None or not config.do_sample
        return bool(spec is not None and spec.spec["certified"] and uncertified and chosen)

    # ----------------------------------------------------------------- a token

    def _next(self, token: int) -> int:
        """The token behind `token`, the last of the sequence."""
        short = self._opened()
        found = short.next(token, logits=self._reads_logits) if short else None
        if found is None:
            return self._choose(self._step(), None)
        self._behind += 1
        if self._floor is None or found[1] is None:
            return self._choose(found[1], found[0])
        if not short.sparse:
            self._model._hire_say_uncertified()
            return self._choose(found[1], found[0])
        certified = self._of_certified(self._floor.under(found[1]), found[1])
        self._beyond = self._beyond + 1 if certified == BEYOND else 0
        if certified != BEYOND:
            return certified
        token = self._choose(short.again(), None)
        if self._beyond > _PATIENCE:
            self._floor = None
            self._close()  # what it opened certifies
            self._model._hire_say_uncertified()
        return token

    def _of_certified(self, level: float, logits_1V: torch.Tensor) -> int:
        """The next token, BEYOND where it may be a row whose logit is no more than `level`."""
        if self._draw is not None:
            return self._draw.token(self._ids(), logits_1V, level)
        return greedy(self._job.processors, self._ids(), logits_1V, level)

    def _opened(self) -> Any:
        """Tokens in one call each, where nothing stands in the way."""
        short = self._short
        if short is not None and short.left > 0 and not (self._watched and self._changed(short)):
            return short
        self._close()
        if not self._base.hire_steps() or altered(self._model):
            return None
        cache = self._more.get("past_key_values")
        if self._watched and getattr(cache, "_is_user_defined", False):
            return None  # that code may look into the cache
        state, floor, draw = self._model.hire_state, self._floor, self._draw
        before = state.head_mode, state.head_top
        if floor is not None:
            state.head_mode, state.head_top = "recipe", floor.num
        elif draw is not None and draw.reads_best:
            state.head_top = draw.top_k
        try:
            self._short = self._base.hire_step.open(self._base, self._head, cache)
        finally:
            state.head_mode, state.head_top = before
        return self._short

    def _changed(self, short: Any) -> bool:
        """Whether code between tokens did something that a step must know of."""
        return short.listened() or altered(self._model) or not self._base.hire_steps()

    def _close(self) -> None:
        if self._short is not None:
            self._short.close()
            self._short = None

    def _step(self) -> torch.Tensor:
        """Logits [1, V] by transformers' own way."""
        self._close()
        if self._steps and self.certifies:  # the first one shows whether others can be short
            self._model._hire_say_uncertified()
        self._steps += 1
        model, more = self._model, self._more
        if self._behind:
            more = model._update_model_kwargs_for_generation({}, more, num_new_tokens=self._behind)
            self._behind = 0
        inputs = model.prepare_inputs_for_generation(self._ids(), next_sequence_length=1, **more)
        self._more = more
        return self._take(model(**inputs, return_dict=True))

    def _take(self, outputs: Any) -> torch.Tensor:
        self._more = self._model._update_model_kwargs_for_generation(
            outputs, self._more, is_encoder_decoder=False
        )
        found_1V: torch.Tensor = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        return found_1V

    def _choose(self, logits_1V: torch.Tensor | None, best: int | None) -> int:
        """The next token; `best` is the largest of the logits where that is known."""
        job = self._job
        if not self._reads_logits and best is not None:
            return best
        assert logits_1V is not None
        if self._draw is not None:
            if self._logits is not None:
                self._logits += (logits_1V,)
            return self._draw.token(self._ids(), logits_1V)
        scores_1V = logits_1V
        if len(job.processors):
            scores_1V, best = job.processors(self._ids(), logits_1V), None
        if self._scores is not None:
            self._scores += (scores_1V,)
        if self._logits is not None:
            self._logits += (logits_1V,)
        if job.config.do_sample:
            return int(torch.multinomial(torch.softmax(scores_1V, dim=-1), num_samples=1))
        return int(torch.argmax(scores_1V, dim=-1)) if best is None else best

    # ----------------------------------------------------------------- the sequence

    def _ids(self) -> torch.Tensor:
        """The sequence so far [1, P], a new tensor whenever it has grown."""
        if self._new:
            new_1P = torch.tensor([self._new])
            self._ids_1P, self._new = torch.cat([self._ids_1P, new_1P], dim=-1), []
        return self._ids_1P

    def _ends(self, token: int) -> bool:
        """Add a token to the sequence, and hand it to the streamer; whether it is the last."""
        self._new.append(token)
        length, limit = self._ids_1P.shape[1] + len(self._new), self._limit
        if limit is None or length > limit.quiet:
            ends = bool(self._job.criteria(self._ids(), self._scores).all())
        else:
            ends = length >= limit.length or token in limit.tokens
        if self._job.streamer is not None:
            self._job.streamer.put(torch.tensor([token]))
        return ends

    def _result(self) -> Any:
        ids: Any = self._ids()
        if not self._job.config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=self._scores,
            logits=self._logits,
            past_key_values=self._more.get("past_key_values"),
        )


@dataclass(frozen=True)
class _Limit:
    """Where a sequence ends: at a length or behind one of some tokens. Behind `quiet` the
    criteria themselves have something to say."""

    length: float
    quiet: float
    tokens: frozenset[int]


def _plain_limit(criteria: Any) -> _Limit | None:
    """What criteria say where they are transformers' two plain ones; None: they must be asked."""
    length, quiet, tokens = float("inf"), float("inf"), set[int]()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            length = min(length, criterion.max_length)
            if criterion.max_position_embeddings is not None:
                quiet = min(quiet, criterion.max_position_embeddings)
        elif type(criterion) is EosTokenCriteria:
            tokens.update(criterion.eos_token_id.flatten().tolist())
        else:
            return None
    return _Limit(length, quiet, frozenset(tokens))


def sample(model: Any, native_loop: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """What `native_loop`, the model's own `_sample`, returns of these arguments."""
    more = dict(kwargs)
    synced_gpus = bool(more.pop("synced_gpus", False))
    job = Job(
        input_ids,
        processors=more.pop("logits_processor"),
        criteria=more.pop("stopping_criteria"),
        config=more.pop("generation_config"),
        streamer=more.pop("streamer", None),
        more=more,
    )
    loop = None if synced_gpus or not serves(model, job) else Loop(model, job)
    if loop is None or not loop.certifies:
        model._hire_say_uncertified()
    return native_loop(input_ids, **kwargs) if loop is None else loop.run()
