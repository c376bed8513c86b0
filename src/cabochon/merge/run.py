"""A merge from its configuration to a folder: open, plan, execute."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.base.files import unfinished_bytes
from cabochon.base.version import package_version
from cabochon.merge.card import card
from cabochon.merge.config import MergeConfig, ModelRef
from cabochon.merge.diagnose import Diagnosis, diagnose
from cabochon.merge.execute import execute, execute_in_memory, workers
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
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)  # files of the output's tokenizer, by name

    @classmethod
    def prepare(cls, config: MergeConfig, *, seed: int = 0, token: str | None = None, offline: bool = False) -> "Merge":
        """Find the models, fetching those on the Hub, and lay the merge out.

        Raises as `open_models` and `plan`, and `BadInput` for tokenizers or a chat template that cannot be used.
        """
        models = open_models(config.models(), token=token, offline=offline)
        vocabulary = None
        if config.tokenizer:
            source = config.tokenizer.source
            outside = [source] if isinstance(source, ModelRef) and source not in models else []
            known = models | open_models(outside, token=token, offline=offline)
            folders = {ref: (model.folder, model.config.vocab_size) for ref, model in known.items()}
            vocabulary = align(read_tokenizers(folders, config.base), config.tokenizer, config.base)
        planned = plan(config, models, seed=seed, vocabulary=vocabulary)
        donor = models[config.base or config.models()[0]]
        files = vocabulary.files if vocabulary else tokenizer_files(donor.folder)
        tokenizer, notes = with_chat_template(files, config.chat_template, list(models.values()))
        return cls(config, models, replace(planned, notes=(*planned.notes, *notes)), seed, vocabulary, tokenizer)

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
        files = {**self.tokenizer, "README.md": text.encode(), CONFIG_FILE: self.config.text.encode()}
        execute(
            self.plan,
            self.models,
            out,
            key=self.key(str(shard_bytes)),
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

    def changed(self, config: MergeConfig) -> "Merge":
        """The same models merged as another configuration of them says. Raises as `plan`."""
        planned = plan(config, self.models, seed=self.seed, vocabulary=self.vocabulary)
        return replace(self, config=config, plan=planned)

    def into(self, tensors: Mapping[str, Tensor], *, threads: int = 0) -> None:
        """Merge into tensors in memory; as `execute_in_memory`."""
        execute_in_memory(self.plan, self.models, tensors, threads=threads)

    def missing_bytes(self, out: Path) -> int:
        """Bytes that the disk still has to find room for, given what an unfinished merge left."""
        return max(0, self.plan.nbytes - unfinished_bytes(out))

    def key(self, also: str = "") -> str:
        """What the values of the output depend on, and something more, as one word: what was made of other things is
        of no use.
        """
        states = [line for model in self.models.values() for line in model.identity()]
        told = "\n".join([package_version(), repr(self.config), str(self.seed), also, *states])
        return hashlib.sha256(told.encode()).hexdigest()
