"""A decoder against its float model: what is kept of the float model's text, and what an artifact makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgebake.llm import digest, generation
from edgebake.llm.meter import TextMeter
from edgebake.metrics import ParityMeter
from edgebake.types import Loaded, ReferenceCall, SampleSet, Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake.reference import Reference

    Arrays = Mapping[str, NDArray[Any]]

Step = generation.Step
NOT_MEASURED = "not_measured"  # of a reference's facts: why the float model was not run
CONTINUED = "continued"  # of a reference's facts: prompts, and what the float model goes on with


def kept(calls: Iterable[tuple[ReferenceCall, ...]]) -> Iterator[tuple[ReferenceCall, ...]]:
    """``calls`` of the float model with what :mod:`edgebake.llm.digest` keeps of their logits."""
    for recorded in calls:
        after = digest.following([call.inputs for call in recorded], generation.TOKENS)
        yield tuple(
            ReferenceCall(
                method=call.method, inputs=call.inputs, outputs=digest.of_float(call.outputs[digest.LOGITS], words)
            )
            for call, words in zip(recorded, after, strict=True)
        )


def continued(loaded: Loaded, samples: SampleSet) -> dict[str, Any]:
    """Prompts from ``samples`` and the float model's greedy text after each: plain data for a reference's facts."""
    import torch

    from edgebake.buffers import untouched

    (name,) = loaded.methods
    module = loaded.methods[name]

    def step(tokens: NDArray[Any], position: NDArray[Any]) -> NDArray[Any]:
        logits: NDArray[Any] = module(torch.from_numpy(tokens), torch.from_numpy(position))[0].numpy()
        return logits

    prompts = generation.prompts(samples)
    once, context = sizes(loaded.signature)
    with torch.inference_mode(), untouched(module):
        texts = [generation.greedy(step, prompt, once, context)[0] for prompt in prompts]
    return {CONTINUED: {"prompts": prompts, "texts": texts}}


def sizes(signature: Signature) -> tuple[int, int]:
    """Tokens that a call of the decoder takes at most, and that its cache keeps."""
    assert signature.language is not None
    (method,) = signature.methods.values()
    size = method.inputs[0].shape[1]
    once = size if isinstance(size, int) else signature.dims[size].max
    return once, signature.language.context


def reduced(recorded: Reference, index: int) -> Callable[[int, Arrays], dict[str, NDArray[Any]]]:
    """(call of sample ``index``, an artifact's outputs) -> what is kept of them."""
    calls = recorded.sample(index).calls
    after = digest.following([call.inputs for call in calls], generation.TOKENS)

    def reduce(number: int, outputs: Arrays) -> dict[str, NDArray[Any]]:
        words = calls[number].outputs[digest.WORDS]
        return digest.of_artifact(outputs[digest.LOGITS], after[number], words)

    return reduce


def run(signature: Signature, recorded: Reference, step: generation.Step) -> dict[str, Any]:
    """Greedy text after the reference's prompts, its speed, and reading token by token against reading at once."""
    once, context = sizes(signature)
    prompts = recorded.facts[CONTINUED]["prompts"]
    texts = [generation.greedy(step, prompt, once, context) for prompt in prompts]
    first = next(iter(generation.texts(recorded.sample_set())), [])
    return {
        "texts": [new for new, _ in texts],
        "unknown": generation.unknown([new for new, _ in texts], signature.language),
        "speed": generation.speed([took for _, took in texts]),
        "stepwise": generation.stepwise(step, first, once),
    }


def measure(recorded: Reference, outputs: Arrays, ran: Mapping[str, Any]) -> dict[str, Any]:
    """``measurements["language"]`` and ``["outputs"]``: of what :func:`reduced` and :func:`run` gave.

    Where the float model was not run, what the artifact alone says.
    """
    own = {name: ran[name] for name in ("stepwise", "speed", "unknown")}
    if NOT_MEASURED in recorded.facts:
        return {"language": own, "outputs": {}}
    text, parity = TextMeter(), ParityMeter()
    for index, sample in recorded.samples():
        for number, call in enumerate(sample.calls):
            got = {name: outputs[f"{index}.{number}.{name}"] for name in digest.OF_ARTIFACT}
            text.add(sample.source, call.outputs, got, int(call.inputs[generation.POSITION][0]))
            whole = [{digest.LOGITS: side[digest.LOGITS]} for side in (call.outputs, got)]
            parity.add(index, sample.source, *whole)
    continued_texts = recorded.facts[CONTINUED]["texts"]
    language = {
        **text.measurements(),
        "generated": generation.agreement(continued_texts, ran["texts"]),
        **own,
    }
    return {"language": language, "outputs": parity.measurements()}
