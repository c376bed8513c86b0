"""A merge from its configuration to a folder: open, plan, execute."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cabochon.base.errors import BadInput
from cabochon.base.files import unfinished_bytes
from cabochon.base.version import package_version
from cabochon.merge.card import card
from cabochon.merge.config import MergeConfig, ModelRef
from cabochon.merge.diagnose import Diagnosis, diagnose
from cabochon.merge.execute import execute, workers
from cabochon.merge.plan import Plan, plan
from cabochon.merge.sources import Opened, Tensors, open_models
from cabochon.merge.template import with_chat_template
from cabochon.merge.vocabulary import Vocabulary, align, read_tokenizers, tokenizer_files
from cabochon.weights.save import SHARD_BYTES

CONFIG_FILE = "mergekit_config.yml"  # where the Hub's merges have it


@dataclass(frozen=True)
class Merge:
    """A merge whose models are open and whose plan is made: all that can be wrong with its configuration was said."""

    config: MergeConfig
    models: Mapping[ModelRef, Opened]
    plan: Plan
    seed: int = 0
    vocabulary: Vocabulary | None = None  # of the output, where the configuration asks for one

    @classmethod
    def prepare(cls, config: MergeConfig, *, seed: int = 0, token: str | None = None, offline: bool = False) -> "Merge":
        """Find the models, fetching those on the Hub, and lay the merge out. Raises as `open_models` and `plan`."""
        models = open_models(config.models(), token=token, offline=offline)
        vocabulary = None
        if config.tokenizer:
            source = config.tokenizer.source
            outside = [source] if isinstance(source, ModelRef) and source not in models else []
            known = models | open_models(outside, token=token, offline=offline)
            folders = {ref: (model.folder, model.config.vocab_size) for ref, model in known.items()}
            vocabulary = align(read_tokenizers(folders, config.base), config.tokenizer, config.base)
        return cls(config, models, plan(config, models, seed=seed, vocabulary=vocabulary), seed, vocabulary)

    def write(
        self,
        out: Path,
        *,
        threads: int = 0,
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
        hashes: bool = False,
        report: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Write the merged model with its tokenizer and card, whole or not at all; as `execute`.

        `hashes` puts the SHA-256 of large weight files into the card, too, which takes seconds for each.
        """
        text = card(out.resolve().name, self.config, self.plan, self.models, seed=self.seed, hashes=hashes)
        donor = self.models[self.config.base or self.config.models()[0]]
        tokenizer = self.vocabulary.files if self.vocabulary else tokenizer_files(donor.folder)
        files = {
            **with_chat_template(tokenizer, self.config.chat_template, list(self.models.values())),
            "README.md": text.encode(),
            CONFIG_FILE: self.config.text.encode(),
        }
        execute(
            self.plan,
            self.models,
            out,
            key=self._key(shard_bytes),
            files=files,
            threads=threads,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            report=report,
        )

    def inspect(self, *, threads: int = 0, report: Callable[[int], None] = lambda _: None) -> Diagnosis:
        """Compare the models with the base, without merging them. `report` is called with the bytes that are read.

        Where all densities of the merge are the same, signs are counted after trimming, as TIES does.

        Raises `BadInput`: there is no base, or the models differ in shape or hold values that are not finite.
        """
        base = self.models[self.config.base] if self.config.base else None
        if base is None:
            raise BadInput(
                "the merge cannot be looked at", "task vectors are what models have beyond a base", "add base_model"
            )
        others = [model for model in self.models.values() if model is not base]
        densities = {d for job in self.plan.jobs for d in job.settings.per_model.get("density", ())}
        density = densities.pop() if len(densities) == 1 else 1.0

        def done(name: str) -> None:
            for model in (base, *others):
                model.let_go(name)
                report(model.nbytes(name))

        named = {str(model.ref): Tensors(model) for model in others}
        with workers(threads) as run:
            return diagnose(Tensors(base), named, density=density, run=run, done=done)

    def missing_bytes(self, out: Path) -> int:
        """Bytes that the disk still has to find room for, given what an unfinished merge left."""
        return max(0, self.plan.nbytes - unfinished_bytes(out))

    def _key(self, shard_bytes: int) -> str:
        """What the bytes of the output depend on, as one word: unfinished work with another one is of no use."""
        states = [line for model in self.models.values() for line in model.identity()]
        told = "\n".join([package_version(), repr(self.config), str(self.seed), str(shard_bytes), *states])
        return hashlib.sha256(told.encode()).hexdigest()
