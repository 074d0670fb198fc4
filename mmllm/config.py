"""Every setting of a run, typed and checked before anything is loaded.

YAML, at most one `extends`, then `section.key=value` overrides; OmegaConf merges, pydantic checks. A wrong key, type,
range or combination is one ConfigError that names the dotted path, what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, what was given and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16"]


class VisionConfig(_Section):
    """The vision tower: an open_clip model name, `local-dir:FOLDER`, or a model config `FILE.json`."""

    source: str
    pretrained: str | None = None  # an open_clip tag or a weights file; none for local-dir, which holds its own
    layer: Annotated[int, Field(lt=0)] = -2  # whose output is read; LLaVA reads the last but one
    fit: Literal["stretch", "pad", "square"] = "pad"  # how a picture that is not square becomes square

    @model_validator(mode="after")
    def _one_place_of_weights(self) -> VisionConfig:
        if self.pretrained and self.source.startswith(("local-dir:", "hf-hub:")):
            raise ValueError(f"{self.source} holds its own weights, so pretrained ({self.pretrained}) must be left out")
        return self


class ProjectorConfig(_Section):
    """One of PROJECTORS and its options."""

    kind: str = "mlp"
    options: dict[str, Any] = Field(default_factory=dict)


class LanguageConfig(_Section):
    """The LLM backbone: a folder or a hub name that AutoModelForCausalLM reads."""

    source: str
    revision: str | None = None
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "sdpa"


class ModelConfig(_Section):
    """Either `checkpoint` (a model of an earlier stage) or all three parts."""

    checkpoint: str | None = None
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    language: LanguageConfig | None = None
    template: str | None = None  # a key of TEMPLATES; `tokenizer` is the tokenizer's own

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        parts = [name for name in ("vision", "projector", "language", "template") if getattr(self, name) is not None]
        if self.checkpoint and set(parts) - {"template"}:
            raise ValueError(f"checkpoint already holds {', '.join(parts)}; give either checkpoint or the parts")
        if not self.checkpoint and len(parts) < 4:
            raise ValueError(f"needs vision, projector, language and template, or checkpoint; got {parts or 'nothing'}")
        return self


class _DataFile(_Section):
    """A file, a folder, or a pattern such as `{000..123}.tar` or `*.parquet`; local, or an fsspec URL."""

    path: str
    images: str | None = None  # the folder that image paths start from; default: the file's own
    prompt: str = "Describe the picture."  # what a caption answers, where rows are captions without a question
    max_examples: PositiveInt | None = None  # the first usable ones


class SourceConfig(_DataFile):
    """One of the sources that are mixed.

    `weight` is how often an epoch shows each row: 3 is three times, 0.5 is every second one, the others in the next
    epoch. With `streaming`, shards (a tar, a row group, megabytes of JSON lines) come in random order, unindexed, and
    the weight counts shards.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    streaming: bool = False

    @model_validator(mode="after")
    def _stream_has_no_first(self) -> SourceConfig:
        if self.streaming and self.max_examples:
            raise ValueError("max_examples needs an index of the rows; take it or streaming out")
        return self


class ReplayConfig(_DataFile):
    """Data of another kind, such as conversations without pictures, as a share of all examples that training sees."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05

    def as_source(self) -> SourceConfig:
        return SourceConfig(**self.model_dump(exclude={"fraction"}))


class DataConfig(_Section):
    train: tuple[SourceConfig, ...]
    val: tuple[SourceConfig, ...] = ()
    replay: ReplayConfig | None = None
    max_length_tokens: PositiveInt = 2048
    num_workers: Annotated[int, Field(ge=0)] = 0
    group_by_length: bool = True  # not where data are streamed: their lengths are not known before
    cache_features: bool = False  # keep the frozen tower's output of every training image on disk
    max_bad_fraction: Fraction = 0.01  # a run with more unusable examples than this does not start

    @model_validator(mode="after")
    def _streams(self) -> DataConfig:
        if self.is_streamed and not all(source.streaming for source in self.train):
            raise ValueError("train mixes streamed and indexed sources: set streaming for all or none (not for replay)")
        if any(source.streaming or source.weight != 1 for source in self.val):
            raise ValueError("val is read whole and once; set streaming and weight for train alone")
        if self.is_streamed and self.cache_features:
            raise ValueError("cache_features needs all pictures beforehand; take it or streaming out")
        return self

    @property
    def is_streamed(self) -> bool:
        return any(source.streaming for source in self.train)


class OptimConfig(_Section):
    """AdamW with cosine decay after a linear warm-up. `learning_rates` has one row for each trained part."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rates: dict[str, Annotated[float, Field(gt=0)]]
    matrix_learning_rate: Annotated[float, Field(gt=0)] = 0.02  # muon only: that of hidden matrices
    max_steps: PositiveInt
    batch_size: PositiveInt  # examples of one rank and micro-step
    accumulate_steps: PositiveInt = 1
    warmup_fraction: Fraction = 0.03
    decay_fraction: Fraction = 1.0  # the last part of the run, over which cosine decay happens
    weight_decay: NonNegative = 0.0
    beta2: Fraction = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False


class LoraConfig(_Section):
    """LoRA on the LLM's linear layers through peft. Paper: https://arxiv.org/abs/2106.09685"""

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class LogConfig(_Section):
    """How often things happen, in optimizer steps. 0 is never; the end of the run always validates and saves."""

    every_steps: PositiveInt = 10
    validate_every_steps: Annotated[int, Field(ge=0)] = 0
    save_every_steps: Annotated[int, Field(ge=0)] = 0
    keep_checkpoints: PositiveInt = 1
    num_samples: Annotated[int, Field(ge=0)] = 4  # answers shown at each validation, with their pictures
    max_val_examples: PositiveInt = 200
    tensorboard: bool = False


class RunConfig(_Section):
    """What every run has. `stage` says which of CONFIGS this is."""

    stage: str
    out: str
    seed: Annotated[int, Field(ge=0)] = 0
    num_threads: PositiveInt | None = None  # CPU threads of one process; default: torch's own
    optim: OptimConfig
    log: LogConfig = LogConfig()

    def check_rates(self, parts: Iterable[str]) -> None:
        """Raises ValueError where the trained parts are not those that have a learning rate."""
        if set(self.optim.learning_rates) != set(parts):
            raise ValueError(
                f"optim.learning_rates has {sorted(self.optim.learning_rates)} but this run trains {sorted(parts)}; "
                "give one rate a part"
            )


class StageConfig(RunConfig):
    """Stage 1 (projector on captions) and stage 2 (projector and LLM on conversations)."""

    stage: Literal["stage1", "stage2"]
    model: ModelConfig
    data: DataConfig
    train: Annotated[tuple[Literal["vision", "projector", "language"], ...], Field(min_length=1)]
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _combination(self) -> StageConfig:
        self.check_rates(self.train)
        if self.lora and "language" not in self.train:
            raise ValueError("lora adapts the LLM, but train does not list language")
        if self.data.cache_features and "vision" in self.train:
            raise ValueError("data.cache_features keeps the frozen tower's output, but train lists vision")
        return self


class WarmupVisionConfig(RunConfig):
    """Contrastive training of a small CLIP on the scenes world."""

    stage: Literal["warmup_vision"]
    clip: dict[str, Any]  # open_clip's model config: embed_dim, vision_cfg, text_cfg
    tokenizer: str  # folder of the text tower's tokenizer
    num_scenes: PositiveInt  # each with its near misses
    num_val_scenes: PositiveInt = 100
    words_weight: Annotated[float, Field(ge=0)] = 1.0  # of the loss on the words of regions, beside the contrastive one

    @model_validator(mode="after")
    def _rates(self) -> WarmupVisionConfig:
        self.check_rates(["vision"])
        return self


class GuideConfig(_Section):
    """Some heads of one layer, and what they are shown to read before an answer: see mmllm/training/lookup.py."""

    layer: Annotated[int, Field(ge=0)]
    heads: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    reads: Literal["first", "last", "named"]


class WarmupLanguageConfig(RunConfig):
    """Training of a small causal LM on descriptions of scenes and questions about them.

    `language` is a transformers config (model_type and its options) of an LM to be trained from random weights with a
    tokenizer of its own, or names the `source` of both, to go on from there.
    """

    stage: Literal["warmup_language"]
    language: LanguageConfig | dict[str, Any]
    vocab_size: PositiveInt = 512
    num_descriptions: PositiveInt
    num_turns: PositiveInt = 10
    retell: Fraction = 0.15  # share of conversations that only tell the scene again in other words
    ask_more: dict[str, PositiveInt] = Field(default_factory=dict)  # question type: how often it is asked, on top of 1
    guides: list[GuideConfig] = Field(default_factory=list)
    guide_weight: Annotated[float, Field(ge=0)] = 0.5  # of the loss that shows attention where an answer is read
    read_out: Annotated[int, Field(ge=0)] | None = None  # the layer behind which two compared values must be readable
    num_val_descriptions: PositiveInt = 400

    @model_validator(mode="after")
    def _rates(self) -> WarmupLanguageConfig:
        self.check_rates(["language"] if self.read_out is None else ["language", "read_out"])
        if isinstance(self.language, dict) and ("model_type" not in self.language or "source" in self.language):
            raise ValueError(
                f"language: needs a model_type and its options, or source, revision and attention of a trained LM; "
                f"got {sorted(self.language)}"
            )
        return self


CONFIGS: dict[str, type[RunConfig]] = {
    "stage1": StageConfig,
    "stage2": StageConfig,
    "warmup_vision": WarmupVisionConfig,
    "warmup_language": WarmupLanguageConfig,
}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"no config file at {path}; configs/README.md lists those that come with the project")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not OmegaConf.is_dict(tree) or not tree:
        raise ConfigError(f"{path} must hold sections with keys, such as `optim:`; got {tree!s:.60}")
    return tree


def _drop_options(base: Any, new: Any) -> None:
    """A part of another `kind` does not keep the options of the one that it replaces."""
    for key in new:
        if key not in base or OmegaConf.is_interpolation(base, key) or OmegaConf.is_interpolation(new, key):
            continue
        old, fresh = base[key], new[key]
        if OmegaConf.is_dict(old) and OmegaConf.is_dict(fresh):
            if "kind" in fresh and fresh["kind"] != old.get("kind"):
                old.pop("options", None)
            _drop_options(old, fresh)


def _merge(base: Any, new: Any) -> Any:
    _drop_options(base, new)
    return OmegaConf.merge(base, new)


def _problem(error: Any, tree: Any) -> str:
    path = ".".join(str(step) for step in error["loc"])
    allowed = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        parent: Any = tree
        return f"{path}: unknown key (given: {error['input']!r}){_near(error['loc'], parent)}"
    if error["type"] == "missing":
        return f"{path}: missing, and it has no default"
    given = "" if isinstance(error["input"], dict | BaseModel) else f" (given: {error['input']!r})"
    return f"{path or 'config'}: {allowed}{given}"


def _near(location: tuple[Any, ...], tree: Any) -> str:
    """The keys that are allowed where this one stands."""
    model: Any = CONFIGS[tree["stage"]]
    for step in location[:-1]:
        if isinstance(step, int):
            continue
        annotation = model.model_fields[step].annotation if step in getattr(model, "model_fields", {}) else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return ""
    return f"; allowed: {', '.join(model.model_fields)}"


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked settings of a YAML file with `section.key=value` overrides. Raises ConfigError."""
    path = Path(path)
    tree = _read(path)
    if parent := tree.pop("extends", None):
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends must name one file, got {parent!r}")
        base = _read(path.parent / parent)
        if "extends" in base:
            raise ConfigError(f"{path} extends {parent}, which extends another file; one level is allowed")
        tree = _merge(base, tree)
    given: Any = OmegaConf.create()
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        try:
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
            OmegaConf.merge(tree, given)
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise ConfigError(f"override {override!r} cannot be read: {error}") from error
    try:
        values = OmegaConf.to_container(_merge(tree, given), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    assert isinstance(values, dict)
    stage = values.get("stage")
    if stage not in CONFIGS:
        what = "missing" if stage is None else f"{stage!r} is not known"
        raise ConfigError(f"{path} cannot be used:\n  stage: {what}; allowed: {', '.join(CONFIGS)}")
    try:
        return CONFIGS[stage].model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_problem(row, values)}" for row in error.errors())
        raise ConfigError(f"{path} cannot be used:\n{problems}") from error


def dump_config(config: RunConfig) -> str:
    """The resolved settings as YAML that runs the same run again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
