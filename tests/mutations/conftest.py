"""Two small trained networks, built once for each target that a test asks for."""

from __future__ import annotations

import importlib
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baking import finish, start
from edgebake.verify import verify

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the modules beside this one; pytest's import mode adds nothing

from tampering import Artifact, Mutation, Outcome, Outputs, nets_in  # noqa: E402


class Workshop:
    """The recipes' folder, the store, the output folder; builds what is asked for, once."""

    def __init__(self, folder: Path) -> None:
        self.recipes, self.store, self.out = folder / "recipes", folder / "store", folder / "dist"
        shutil.copytree(HERE / "digits", self.recipes)
        self.nets = nets_in(self.recipes)
        self.nets.fit(self.recipes)
        self.built = cache(self._build)
        self.samples = cache(self._samples)
        self.artifact = cache(self._artifact)

    def _samples(self, network: str) -> Mapping[str, np.ndarray]:
        from edgebake.target import SampleRequest

        make = {"layered": self.nets.flat_samples, "rows": self.nets.row_samples}[network]
        drawn = make(SampleRequest(count=256, skip=64, seed=0, options={}))
        calls = [sample.calls[0].tensors() for sample in drawn]
        return {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}

    def float_outputs(self, network: str) -> Outputs:
        """What the float network itself says of the samples."""
        import torch

        with torch.inference_mode():
            found = self.nets.trained(network, self.recipes)(
                *(torch.from_numpy(v) for v in self.samples(network).values())
            )
        several = isinstance(found, tuple)
        return {f"output.{n}" if several else "output": v.numpy() for n, v in enumerate(found if several else [found])}

    def _build(self, network: str, target: str) -> Path:
        only = f"{network}/*@{target}#*"
        where = ("--out", self.out, "--store", self.store)
        done = finish(start("build", self.recipes / f"{network}.yaml", "--only", only, "-j", "2", *where), 1200)
        assert done.code == 0, done.out + done.err
        return self.out / network / "model" / target / "any"

    def _artifact(self, network: str, target: str, scheme: str) -> Artifact:
        runner = {"onnx-cpu": "mutations_onnx", "executorch-xnnpack": "mutations_pte"}[target]
        run: Any = importlib.import_module(runner).run
        folder = self.built(network, target) / scheme
        return Artifact(folder, self.float_outputs(network), partial(run, samples=self.samples(network)))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Fits the networks; builds happen on demand."""
    return Workshop(tmp_path_factory.mktemp("mutations"))


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[Callable[[Mutation], Outcome]]:
    """Judges the mutations of every selected test of the module, two at a time: each waits for a process to import.

    Two processes, not threads: Python 3.11 loses count when two threads parse at once (cpython#106905), and reading an
    array of an .npz file parses its header.
    """
    target = request.module.TARGET
    mine = [item for item in request.session.items if isinstance(item, pytest.Function)]
    calls = [item.callspec for item in mine if item.module is request.module and hasattr(item, "callspec")]
    chosen = {str(m): m for call in calls if (m := call.params.get("mutation"))}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        begun = {}
        for name, mutation in chosen.items():
            artifact = workshop.artifact(mutation.network, target, mutation.scheme)
            folder = artifact.copy(mutation.name, mutation.edit)
            begun[name] = artifact, folder, pool.submit(verify, folder)

        def finish(mutation: Mutation) -> Outcome:
            artifact, folder, judgement = begun[str(mutation)]
            return Outcome(
                mutation=mutation,
                target=target,
                effect_db=artifact.effect_db(folder),
                bound_db=artifact.limits["parity"]["sqnr_db"],
                result=judgement.result(),
            )

        yield finish
