"""What all routes share: the model, its worker, the limits, and how a request's fields become jobs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from d2moe.errors import RequestError
from d2moe.runtime.generate import Model
from d2moe.runtime.grammar import Grammar, Grammars, Kind
from d2moe.runtime.request import Request, check_prompt
from d2moe.runtime.sampling import SamplingParams
from d2moe.runtime.scheduler import Job
from d2moe.runtime.worker import Worker
from d2moe.serve import tools
from d2moe.serve.metrics import Metrics
from d2moe.serve.schema import MOST_CHOICES, ChatRequest, Common, CompletionRequest, Tool, width_of
from d2moe.serve.stream import Channel, Outbox
from d2moe.serve.tools import Form

COMPLETION_TOKENS = 16
"""Tokens of a plain completion that asks for no number, as in OpenAI's interface."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
MOST_PROMPTS = 256


@dataclass(frozen=True)
class Limits:
    """`queue`: requests that may wait. `tokens`: most tokens of an answer (None: what the context holds). `body_bytes`: of a
    request. `drain_s`: how long running answers may go on after a signal to stop."""

    queue: int = 64
    tokens: int | None = None
    body_bytes: int = 4_000_000
    drain_s: float = 30.0


@dataclass
class Plan:
    """One request, worked out but not started. `params` hold per choice; choice i of prompt p has number p * n + i."""

    prompts: list[list[int]]
    n: int
    params: SamplingParams
    bits: float
    grammars: list[Grammar | None]
    generate: bool = True
    tools: list[Tool] = field(default_factory=list)
    form: Form = field(default_factory=Form)
    several_calls: bool = True
    shown: tuple[int, ...] = ()
    """Special tokens that are part of the text."""


class Service:
    """Lives from the loading of the model to the end of the server."""

    def __init__(self, model: Model, limits: Limits | None = None, name: str | None = None, grammars: Grammars | None = None):
        self.model, self.limits = model, limits or Limits()
        self.name = name or model.tokenizer.where.removesuffix(".d2moe")
        self.created = int(time.time())
        self.default_bits = float(model.engine.config.bits)
        engine: Any = model.engine
        self.metrics = Metrics(engine)
        self.worker = Worker(engine, self.limits.queue, self.metrics)
        self.metrics.watch(self.worker)
        self._grammars = grammars
        self._outbox: Outbox | None = None  # of the event loop, once there is one

    @property
    def engine(self) -> Any:
        return self.model.engine

    def plan_completion(self, body: CompletionRequest) -> Plan:
        """Not for the event loop: reads a text and may build a grammar. RequestError, ConfigError."""
        if body.best_of not in (None, body.n or 1):
            raise RequestError("best_of other than n is not supported")
        if body.stream and body.best_of is not None and body.best_of > 1:
            raise RequestError("best_of cannot be streamed")
        prompts = self._prompts(body.prompt)
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        scores = {"logprobs": body.logprobs, "prompt_logprobs": body.logprobs if body.echo else None}
        return self._plan(body, prompts, limit, scores, self._constraint(body))

    def plan_chat(self, body: ChatRequest) -> Plan:
        """As `plan_completion`, through the model's chat template."""
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise RequestError("give either max_tokens or max_completion_tokens, not both")
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs")
        tokenizer = self.model.tokenizer
        offered, form = tools.offered(body, tokenizer.tool_template)
        variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
        taken = {"messages", "tools", "add_generation_prompt"} & variables.keys()
        if taken:
            raise RequestError(f"chat_template_kwargs must not hold {', '.join(sorted(taken))}")
        if offered:
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in offered]
        prompt = tokenizer.chat([tools.plain(m) for m in body.messages], **variables)
        constraint = self._constraint(body, tools.forced(body, offered, form, tokenizer.token_id))
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if limit == 0:
            raise RequestError("max_tokens is 0, expected at least 1")
        scores = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        plan = self._plan(body, [prompt], limit, scores, constraint)
        plan.tools, plan.form, plan.several_calls = offered, form, body.parallel_tool_calls is not False
        if offered:
            markers = (tokenizer.token_id(text) for text in (form.opening, form.closing) if text)
            plan.shown = tuple(token for token in markers if token is not None and tokenizer.is_special(token))
        return plan

    def start(self, plan: Plan) -> tuple[list[Job], Channel]:
        """Queue the plan's jobs, all or none (BusyError); on the event loop."""
        self._outbox = self._outbox or Outbox()
        channel = Channel(self._outbox, len(plan.grammars))
        model, engine = self.model, self.engine
        jobs: list[Job] = []
        for index, grammar in enumerate(plan.grammars):
            params = plan.params
            if params.seed is not None:
                params = replace(params, seed=(params.seed + index % plan.n) % 2**64)
            request = Request(
                plan.prompts[index // plan.n],
                params,
                model.tokenizer,
                vocab=engine.shape.vocab,
                context=engine.context,
                eos_ids=model.eos_ids,
                grammar=grammar,
                shown=plan.shown,
            )
            jobs.append(Job(request, plan.bits, channel.listener(index), generate=plan.generate))
        self.worker.submit(jobs)
        return jobs, channel

    def _prompts(self, prompt: Any) -> list[list[int]]:
        if isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int)):
            prompt = [prompt]
        texts = [prompt] if isinstance(prompt, str) else prompt
        if len(texts) > MOST_PROMPTS:
            raise RequestError(f"{len(texts)} prompts in one request, expected at most {MOST_PROMPTS}")
        encode = self.model.tokenizer.encode
        return [encode(t) if isinstance(t, str) else t for t in texts]

    def _plan(
        self,
        body: Common,
        prompts: list[list[int]],
        limit: int | None,
        scores: dict[str, int | None],
        constraint: tuple[Kind, Any] | None,
    ) -> Plan:
        engine, most = self.engine, self.limits.tokens
        if most is not None and limit is not None and limit > most:
            raise RequestError(f"{limit:,} tokens are more than this server gives to one answer ({most:,})")
        values = {"temperature": 1.0, "seed": None, **self.model.defaults}
        values |= {k: v for k in SAMPLING if (v := getattr(body, k)) is not None}
        if body.seed is not None:
            values["seed"] = body.seed % 2**64
        if body.logit_bias:
            biases = [(int(token), bias) for token, bias in body.logit_bias.items()]
            above = [token for token, _ in biases if token >= engine.shape.vocab]
            if above:
                raise RequestError(f"logit_bias names token {above[0]}, the vocabulary has 0 to {engine.shape.vocab - 1}")
            values["logit_bias"] = biases
        uniform = engine.config.uniform
        bits = width_of(body.bits, body.quality, self.default_bits, routed=engine.router is not None and not uniform)
        engine.dial(bits, uniform)
        values |= {"stop": body.stop or (), "ignore_eos": body.ignore_eos, "bits": bits, **scores}
        params = SamplingParams.make({**values, "max_tokens": max(1, limit) if limit is not None else most})
        tokens = [check_prompt(p, engine.shape.vocab, engine.context) for p in prompts]
        n = body.n or 1
        if len(tokens) * n > max(MOST_CHOICES, MOST_PROMPTS):
            raise RequestError(f"{len(tokens) * n} answers in one request, expected at most {max(MOST_CHOICES, MOST_PROMPTS)}")
        grammars = [self._grammar(constraint) for _ in range(len(tokens) * n)]
        return Plan(tokens, n, params, bits, grammars, generate=limit != 0)

    def _grammar(self, constraint: tuple[Kind, Any] | None) -> Grammar | None:
        if constraint is None:
            return None
        if self._grammars is None:
            raise RequestError("this server has no grammars: llguidance is not installed, or the model's tokenizer has no end token")
        return self._grammars.make(*constraint)

    @staticmethod
    def _constraint(body: CompletionRequest | ChatRequest, calls: str | None = None) -> tuple[Kind, Any] | None:
        """What the answer must follow, by whichever field says so."""
        found: list[tuple[Kind, Any]] = []
        if calls is not None:
            found.append(("lark", calls))
        if body.grammar is not None:
            found.append(("lark", body.grammar))
        if body.regex is not None:
            found.append(("regex", body.regex))
        wanted = body.response_format if isinstance(body, ChatRequest) else None
        if wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise RequestError("response_format of type json_schema needs json_schema")
            found.append(("json_schema", wanted.json_schema.schema_))
        elif wanted is not None and wanted.type == "json_object":
            found.append(("json_schema", {"type": "object"}))
        if len(found) > 1:
            raise RequestError("an answer can follow one of response_format, grammar, regex and a demanded tool call, not several")
        return found[0] if found else None
