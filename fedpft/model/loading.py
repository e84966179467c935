"""Foundation models, their tokenizers and image processors, to and from disk. The only importer of transformers.

Whatever transformers would do in silence to make a directory load, such as drawing weights that are not there, is an
error here: what the silos tune and the owner plugs into must be the FM.
"""

import copy
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedpft import faults, machine
from fedpft.config import Dtype, Hold, TaskName
from fedpft.errors import ModelError
from fedpft.finite import not_finite
from fedpft.model import architectures
from fedpft.model.mapped import INDEX, MappedTensors, Shards, hold_on_disk, release
from fedpft.model.packing import varlen_attention
from fedpft.model.precision import DTYPES, hold_wide, name_of
from fedpft.seeding import derive_seed
from fedpft.tasks import TASKS

log = logging.getLogger(__name__)

# A checkpoint's new head is no news here; transformers would print a table for it.
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched

IN_MEMORY = 0.2  # of all that there is: an FM, its proxy, and what both need to be distilled
# What safetensors calls the types that weights may be stored in, and what they are held in then. The widest come first.
PRECISIONS = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# What a model returns and how it goes about it, not what it computes: a config.json keeps what its last user wanted.
_OURS: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "chunk_size_feed_forward": 0,
    "_attn_implementation": None,
    "architectures": [],  # of two classes for one task transformers takes the one that is named here, else the first
}
# Keys of config.json that make transformers build another model than the weights are for, or read other files.
_REFUSED = {
    "quantization_config": "save the FM's own weights, without quantization",
    "per_layer_config": "an FM whose layers differ in shape is not supported",
    "fusion_config": "remove it: it replaces parts of the FM",
    "transformers_weights": f"remove it, and call the weights {WEIGHTS}",
}


def load_model(
    path: Path,
    task: TaskName,
    labels: Sequence[str],
    *,
    seed: int,
    dtype: Dtype = "auto",
    hold: Hold = "memory",
    memory: int | None = None,
) -> nn.Module:
    """Loads an FM for a task, in eval mode and with every parameter frozen.

    The task head, if the task has one, is drawn where the checkpoint has none of C rows; so is a module that a
    checkpoint may lack (`architectures.Architecture.optional`), which from then on trains with the head. Nothing else
    ever is. `trained_modules` of the model names both, and `is_drawn` says whether any was drawn. They are held in
    float32, whatever the type of the others, and what is drawn for them does not depend on that.

    Args:
        path: directory as `save_pretrained` writes it.
        labels: C label names in the order of their class indices; none for a head of one number.
        seed: for what is drawn.
        dtype: what the FM is held in; `auto`: what most of its values are stored in (of float64: float32).
        hold: `disk`: the weights stay in their files (`held` of the model), but for those that are stored in
            another type; `auto`: if they would take more than IN_MEMORY of the memory.
        memory: what there is where the FM computes, in bytes; None: the machine's.

    Raises:
        ModelError: no such directory, not a model, weights that are not those that config.json asks for or hold NaN, or
            a model type without a row in architectures.py.
    """
    config = _config(path)
    _check_files(path)
    if TASKS[task].head:
        rows = labels or ("value",)
        config.id2label = dict(enumerate(rows))
        config.label2id = {name: index for index, name in enumerate(rows)}
    config.problem_type = TASKS[task].problem_type
    held = _stored_in(path) if dtype == "auto" else DTYPES[dtype]
    with torch.random.fork_rng(devices=[]):
        try:
            stored, kind = MappedTensors(weight_files(path)), _class_of(task, config, held)
            torch.manual_seed(derive_seed(seed, "task head"))
            model, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=dict(stored.tensors),
                dtype=held,
                ignore_mismatched_sizes=True,  # of the head; of all else it is said below
                output_loading_info=True,
            )
        except Exception as error:  # of whatever kind: the directory is somebody else's, the code as well
            if faults.is_out_of_memory(error):
                raise
            raise ModelError(
                f"{path}: cannot be loaded for {task} ({first_line(error)})",
                "check model.path: config.json and weights must be those of one model",
            ) from None
    model.config._name_or_path = ""  # what is written out need not say where the FM lies
    if (path / GENERATION).is_file() and model.can_generate():
        model.generation_config = _generation_config(path)
    if not len(architectures.layers_of(model)):
        raise ModelError(f"{path}: config.json says that the FM has no layers", "check model.path")
    head = architectures.on_top(model) if TASKS[task].head else ()
    drawn = _drawn(path, model, report, head)
    model.trained_modules = (*head, *(module for module in drawn if module not in head))
    model.is_drawn = bool(drawn)
    _check_precision(path, model)
    if drawn and held != torch.float32:
        _draw_in_float32(model, report, derive_seed(seed, "task head"))
    hold_wide(model, model.trained_modules)
    if (name := not_finite(model.state_dict(), stored.release)) is not None:
        raise ModelError(
            f"{path}: {name} holds NaN or infinity in {name_of(held)}",
            "restore the FM's weights from where they came from"
            if held != torch.float16
            else "set model.dtype: bfloat16 if its numbers are too large for float16, or restore its weights",
        )
    on_disk = hold == "disk" or (hold == "auto" and stored.nbytes > IN_MEMORY * (memory or machine.memory_bytes()))
    if on_disk and architectures.architecture_of(model).experts is not None:
        log.warning("%s: a mixture's experts are stored one by one, and held together: all of it is in memory", path)
        on_disk = False
    if on_disk:
        hold_on_disk(model, stored)
    trained = [each for module in model.trained_modules for each in model.get_submodule(module).parameters()]
    for tensor in trained if on_disk else (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # or it would change with whatever is written into its file
        stored.release()
    whole = sum(parameter.nbytes for parameter in model.parameters())
    mapped = sum(parameter.nbytes for parameter in model.parameters() if parameter in stored)
    log.info("%s: the FM is held in %s%s", path, name_of(held), _where(mapped, whole))
    return prepare(model)


def load_processor(path: Path, task: TaskName) -> Any:
    """The tokenizer (text) or image processor (images) that lies in a model or proxy directory; ModelError."""
    try:
        loader = getattr(transformers, TASKS[task].processor)
        processor = loader.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{path}: holds no tokenizer or image processor that can be loaded ({first_line(error)})",
            "save it beside the model",
        ) from None
    if TASKS[task].has_tokens:
        # Without these files transformers makes up a tokenizer that knows no word.
        files = {"tokenizer.json", *processor.vocab_files_names.values()}
        if not any((path / name).is_file() for name in files):
            raise ModelError(f"{path}: holds no tokenizer ({' or '.join(sorted(files))})", "save it beside the model")
        if processor.pad_token_id is None:
            processor.pad_token = processor.eos_token
        if processor.pad_token_id is None:
            raise ModelError(
                f"{path}: the tokenizer has no padding token", "set pad_token in the model's tokenizer_config.json"
            )
    return processor


def _check_files(path: Path) -> None:
    """Looks at what lies beside an FM's config.json, without loading it.

    Raises:
        ModelError: something is missing, not yet fetched, not safetensors, or makes transformers load something else.
    """
    for file in sorted(path.iterdir()):
        if file.is_file() and _begins(file).startswith(POINTER):
            raise ModelError(
                f"{file}: a pointer of git-lfs, not the file itself", "run `git lfs pull` where the FM comes from"
            )
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"{path}: holds an adapter (adapter_config.json), which transformers would load on top of the FM",
            "merge it into the FM and save that, or move adapter_config.json away",
        )
    there = [name for name in (WEIGHTS, INDEX) if (path / name).exists()]
    if len(there) == 2:
        raise ModelError(f"{path}: holds both {WEIGHTS} and {INDEX}", "remove the one that is not the FM")
    if any(path.glob("shard-*-model-*.safetensors")):
        raise ModelError(
            f"{path}: holds shards of a distributed checkpoint, which transformers would load in place of {there[0]}"
            if there
            else f"{path}: holds a distributed checkpoint",
            "load the FM with transformers and save it with save_pretrained into a new directory",
        )
    if not there:
        others = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.h5", "*.gguf", "*.msgpack") for file in path.glob(pattern)
        )
        found = f", only {others[0]}" if others else ""
        raise ModelError(
            f"{path}: no {WEIGHTS} there{found}", "load the FM with transformers and save it with save_pretrained"
        )
    if there == [INDEX]:
        _check_shards(path)


def empty_model(directory: Path, task: TaskName, num_layers: int) -> nn.Module:
    """A model of the FM's shape and type with `num_layers` layers, whose parameters are yet to be put in (`assign`).

    Raises:
        ValueError: config.json names a type in which no FM is held.
    """
    config = _config(directory)
    if (held := name_of(config.dtype)) not in DTYPES:
        raise ValueError(f"config.json: dtype is {held}")
    set_layers(config, range(num_layers))
    config.problem_type = TASKS[task].problem_type
    with accelerate.init_empty_weights(include_buffers=False):
        model = _model_class(task).from_config(config, dtype=DTYPES[held], trust_remote_code=False)
    model.tie_weights()  # which each parameter's move to `meta` has undone
    return prepare(model)


def set_layers(config: Any, kept: Sequence[int]) -> None:
    """Makes a model's configuration one of the given layers of it, in their order. In place.

    Raises:
        ModelError: the layers would compute something else in other places.
    """
    config = architectures.config_of(config)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and list(kept) != list(range(len(kept))):
        raise ModelError(
            "the FM scales a layer's attention by its number, so that no layer can be left out",
            "choose proxy.keep: neurons",
        )
    depth, config.num_hidden_layers = config.num_hidden_layers, len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    if hasattr(config, "mlp_only_layers"):  # a mixture's: which of its layers have one FFN and no experts
        step = config.decoder_sparse_step
        dense = {layer for layer in range(depth) if layer in config.mlp_only_layers or (layer + 1) % step}
        config.mlp_only_layers = [index for index, layer in enumerate(kept) if layer in dense]
        config.decoder_sparse_step = 1
    if hasattr(config, "stage_names"):  # a vision backbone's: the stem and each layer, and which of them it returns
        config.stage_names = config.stage_names[: len(kept) + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def prepare(model: nn.Module) -> nn.Module:
    """Freezes every parameter and turns dropout and caches off. In place; returns the model."""
    config: Any = model.config
    config.use_cache = False
    if getattr(config, "pad_token_id", None) is None and hasattr(config, "eos_token_id"):
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return model.requires_grad_(False).eval()


def save_config(model: nn.Module, directory: Path) -> None:
    """Writes config.json for others: without the path the FM was loaded from, with the cache that writing needs."""
    config: Any = copy.deepcopy(model.config)
    config._name_or_path = ""
    if hasattr(config, "use_cache"):
        config.use_cache = True
    config.save_pretrained(directory)


def save_model(model: nn.Module, processor: Any, directory: Path) -> None:
    """Writes a directory that plain `transformers` loads."""
    model.save_pretrained(directory)  # type: ignore[operator]
    save_config(model, directory)
    processor.save_pretrained(directory)


def save_parts(model: nn.Module, processor: Any, directory: Path, parts: Iterable[Mapping[str, Tensor]]) -> None:
    """The same of a model on disk, whose weights are these, a file for each part; its own are given back meanwhile."""
    shards = Shards(directory)
    for part in parts:
        shards.put(part)
        release(model)
    shards.finish()
    model.config.architectures = [type(model).__name__]  # type: ignore[union-attr]  # as `save_pretrained` does
    save_config(model, directory)
    if model.can_generate():  # type: ignore[operator]
        model.generation_config.save_pretrained(directory)  # type: ignore[union-attr, operator]
    processor.save_pretrained(directory)


def attend_within_rows(model: nn.Module) -> None:
    """Lets a model whose attention is torch's own be told where packed rows end; else it computes what it did."""
    name = "fedpft_varlen"
    if model.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
        attention = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
        transformers.AttentionInterface.register(name, varlen_attention(attention))
        masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        transformers.AttentionMaskInterface.register(name, masks)
        model.set_attn_implementation(name)  # type: ignore[operator]


def convert_gguf(file: Path, directory: Path) -> None:
    """Writes a causal language model of a GGUF file, with its weights widened to float32, and its tokenizer.

    Raises:
        ModelError: the file cannot be read, or packages that transformers needs for it are missing (gguf, accelerate).
    """
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:
        raise ModelError(
            f"{file}: cannot be converted ({first_line(error)})", "pip install gguf accelerate; fetch the file again"
        ) from None
    del read.config.quantization_config  # with it transformers refuses to save
    model: Any = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    save_model(model, tokenizer, directory)


def _model_class(task: TaskName) -> Any:
    return getattr(transformers, TASKS[task].model)


def _class_of(task: TaskName, config: Any, dtype: torch.dtype) -> Any:
    """The class of transformers that a model of this configuration has for a task; of two the config names one."""
    with torch.device("meta"):
        return type(_model_class(task).from_config(config, dtype=dtype, trust_remote_code=False))


def _generation_config(path: Path) -> Any:
    try:
        return transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{path / GENERATION}: {first_line(error)}", "save it with transformers again") from None


def _where(mapped: int, whole: int) -> str:
    """What of an FM of `whole` bytes stays on disk, if anything does."""
    if not mapped:
        return ""
    return f"; {mapped / 2**30:.1f} of {whole / 2**30:.1f} GiB stay on disk, and are read layer by layer"


def _config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json there", "give the directory of a model saved by transformers")
    try:
        # As it stands: `AutoConfig` acts on some keys before it can be asked.
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        for key, remedy in _REFUSED.items():
            if raw.get(key) is not None:
                raise ModelError(f"{path}/config.json: {key} is set", remedy)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        architectures.row(config.model_type)
        for key, value in _OURS.items():
            setattr(config, key, value)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path}/config.json: {first_line(error)}", "check model.path") from None
    return config


def _stored_in(path: Path) -> torch.dtype:
    """What most values of an FM are stored in. Who wants the others as they are, says it in the configuration."""
    counts = dict.fromkeys(PRECISIONS, 0)
    try:
        for file in weight_files(path):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    stored = opened.get_slice(name)
                    if (kind := stored.get_dtype()) in counts:
                        counts[kind] += math.prod(stored.get_shape())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be loaded ({first_line(error)})", "check model.path") from None
    most = max(counts, key=lambda kind: counts[kind])
    if others := [f"{count:,} as {kind}" for kind, count in counts.items() if count and kind != most]:
        log.warning(
            "%s: of its values %s are stored as %s, %s: all are held in %s; model.dtype chooses another type",
            path,
            f"{counts[most]:,}",
            most,
            ", ".join(others),
            name_of(PRECISIONS[most]),
        )
    return PRECISIONS[most]


def _draw_in_float32(model: Any, report: dict[str, Any], seed: int) -> None:
    """Draws once more what was drawn in a narrow type, where the numbers are others, and coarse."""
    for name in (*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])):
        owner, _, last = name.rpartition(".")
        empty = torch.empty_like(model.get_parameter(name), dtype=torch.float32)
        setattr(model.get_submodule(owner), last, nn.Parameter(empty))
    for module in model.modules():
        module._is_hf_initialized = False  # transformers goes by those of the parameters then
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()


def weight_files(path: Path) -> list[Path]:
    """The one safetensors file of a model, or its shards; ModelError."""
    return [path / WEIGHTS] if (path / WEIGHTS).exists() else [path / name for name in _shards(path)]


def _shards(path: Path) -> list[str]:
    """The files that an index names; ModelError."""
    try:
        names = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelError(f"{path / INDEX}: cannot be read ({first_line(error)})", "save the FM again") from None
    return sorted(map(str, names))


def _check_shards(path: Path) -> None:
    for name in _shards(path):
        if Path(name).name != name or not (path / name).is_file():
            raise ModelError(f"{path / INDEX}: names {name}, which is not there", "copy all files of the FM")


def _begins(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(len(POINTER))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})", "let this user read it") from None


def _drawn(path: Path, model: nn.Module, report: dict[str, Any], head: tuple[str, ...]) -> tuple[str, ...]:
    """Modules of the head, and optional ones, that transformers has drawn; ModelError if it drew or left out any other.

    Args:
        head: the modules of the task's head.
    """
    base, row = architectures.base_name(model), architectures.architecture_of(model)
    inside = tuple(f"{module}." for module in head)
    missing: set[str] = set(report["missing_keys"])
    drawn = []
    for module in (f"{base}.{optional}" for optional in row.optional):
        names = {name for name in model.state_dict() if name.startswith(f"{module}.")}
        if names and names <= missing:
            log.info("%s has no %s: it is drawn, and trains with the task head", path, module)
            drawn.append(module)
            missing -= names
    if head:
        odd = (*missing, *(name for name, *_ in report["mismatched_keys"]))
        strange = [module for module in head if any(name.startswith(f"{module}.") for name in odd)]
        log.info("%s: the task head is %s", path, "drawn from the seed" if strange else "the checkpoint's own")
        drawn += strange
    for name in sorted(missing):
        if not name.startswith(inside):
            shape = tuple(model.state_dict()[name].shape)
            raise _other_model(path, f"the weights lack {name} {shape}")
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        if not name.startswith(inside):
            raise _other_model(path, f"{name} is {tuple(stored)}, config.json asks for {tuple(wanted)}")
    for name in sorted(report["unexpected_keys"]):
        if name.startswith(architectures.layers_path(model)):
            raise _other_model(path, f"the weights have {name}, for which config.json has no place")
    return tuple(drawn)


def _check_precision(path: Path, model: nn.Module) -> None:
    """Integers and 8-bit floats are quantized weights, which mean nothing without their scales."""
    base, mixture = f"{architectures.base_name(model)}.", architectures.architecture_of(model).experts is not None
    parameters = {name.removeprefix(base) for name, _ in model.named_parameters()}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                kind = opened.get_slice(name).get_dtype()
                in_expert = mixture and ".experts." in name  # which are stored one by one, and by other names
                if (in_expert or name.removeprefix(base) in parameters) and kind not in PRECISIONS:
                    raise ModelError(f"{file}: {name} is stored as {kind}", "save the FM without quantization")


def _other_model(path: Path, fault: str) -> ModelError:
    return ModelError(f"{path}: {fault}", "save weights and config.json of one model together")


def first_line(error: Exception) -> str:
    """What to say of an error of transformers or torch, whose texts run over many lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
