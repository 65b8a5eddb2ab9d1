"""Read any supported checkpoint: a Hugging Face directory as downloaded, or one of our own files.

Those are safetensors files whose header says everything needed to run them (checkpoint_writer.py).
A file's name carries no meaning, nothing is ever unpickled, and a checkpoint is untrusted: its
header, shapes and dtypes are checked before anything of its size is allocated.
"""

import json
import re
import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint_writer import DTYPES, METADATA_KEY, VERSION
from config import ModelConfig
from errors import UserError, first_rank
from huggingface import config_from_hf, hf_names, part_rows
from kernels import native
from kernels.formats import FORMATS
from kernels.linear import Linear, QuantizedLinear
from model import Transformer

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def read_json(path: Path) -> dict:
    """A JSON object from a file, or a UserError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


SIDE_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass
class Checkpoint:
    """An opened checkpoint: its shape and where each tensor lies. Tensors are read when asked for.

    Attributes:
        directory: where the tokenizer files are.
        header: of a file of ours (mode, groupsize, algorithm, layers); {} for a source model.
        files: the safetensors file that holds each stored tensor.
    """

    path: Path
    directory: Path
    config: ModelConfig
    header: dict
    files: dict[str, Path]

    def own_files(self) -> set[Path]:
        """The files that it consists of, which no output may overwrite."""
        return {*self.files.values(), *(self.directory / name for name in SIDE_FILES)}

    def stored(self, name: str) -> list[str]:
        """The stored tensors that our tensor `name` stacks."""
        return [name] if self.header else hf_names(name)

    def spec(self, name: str) -> tuple[torch.dtype, list[int]]:
        """dtype and shape of our tensor `name`, from the file's header alone."""
        dtypes, shapes = [], []
        for part in self.stored(name):
            if part not in self.files:
                why, stem = "incomplete or another model", part.removesuffix(".weight")
                if {f"{stem}.qweight", f"{stem}.weight_packed"} & self.files.keys():
                    why = "it is quantized: see scripts/convert_quantized.py"
                raise UserError(f"{self.path} has no tensor {part!r}: {why}")
            with safe_open(self.files[part], "pt") as f:
                view = f.get_slice(part)
                dtypes.append(view.get_dtype())
                shapes.append(view.get_shape())
        if len(set(dtypes)) > 1 or len({tuple(s[1:]) for s in shapes}) > 1:
            raise UserError(f"{self.path}: the parts of {name} have different dtypes or widths")
        if dtypes[0] not in DTYPES:
            raise UserError(f"{self.path}: dtype {dtypes[0]} of {name} is not supported")
        rows = [s[0] for s in shapes] if shapes[0] else []
        if len(rows) > 1 and rows != (want := part_rows(self.config, name)):
            raise UserError(f"{self.path}: the parts of {name} have {rows} rows, not {want}")
        rows = [sum(rows)] if rows else []
        return DTYPES[dtypes[0]], rows + shapes[0][1:]

    def tensor(
        self, name: str, rows: list[slice] | None = None, columns: slice | None = None
    ) -> Tensor:
        """Our tensor `name`, in memory of its own: all of it, or only these `rows` of the stacked
        tensor, one range after the other, and of them only these `columns`. Nothing else is read.
        """
        pieces, first = [], 0
        for part in self.stored(name):
            # Opened anew each time: a mapping kept open would count every page ever read.
            with safe_open(self.files[part], "pt") as f:
                if rows is None and columns is None:
                    pieces.append((0, f.get_tensor(part)))
                    continue
                view = f.get_slice(part)
                count = view.get_shape()[0]
                for i, want in enumerate(rows or [slice(0, None)]):
                    # Of the stacked tensor, in which this part begins at row `first`.
                    low = want.start or 0
                    high = first + count if want.stop is None else want.stop
                    low, high = max(low - first, 0), min(high - first, count)
                    if low < high:
                        where = slice(low, high)
                        pieces.append((i, view[where] if columns is None else view[where, columns]))
                first += count
        tensors = [tensor for _, tensor in sorted(pieces, key=lambda piece: piece[0])]
        return tensors[0].clone() if len(tensors) == 1 else torch.cat(tensors)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the unquantized weights."""
        dtype = self.spec("tok_embeddings.weight")[0]
        if dtype not in FLOATS:
            raise UserError(f"{self.path}: weights in {dtype}; only fp32, fp16 and bf16 can be run")
        return dtype


def _read_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """Tensor names and metadata of a safetensors file; its offsets are checked by the library."""
    try:
        with safe_open(path, "pt") as f:
            return list(f.keys()), f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error})") from None


def _open_directory(path: Path) -> Checkpoint:
    config_path, index = path / "config.json", path / "model.safetensors.index.json"
    if not config_path.exists():
        raise UserError(f"{path} has no config.json: give a Hugging Face directory")
    try:
        config = config_from_hf(read_json(config_path))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{config_path}: missing or malformed entry ({error})") from None
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map: the download is incomplete")
        shards = sorted({str(shard) for shard in weight_map.values()})
        if any(Path(shard).name != shard for shard in shards):
            raise UserError(f"{index} points outside its directory")
    else:
        shards = ["model.safetensors"]
    files = {}
    for shard in shards:
        if not (path / shard).exists():
            raise UserError(f"{path} has no {shard}: the download is incomplete")
        files |= dict.fromkeys(_read_names(path / shard)[0], path / shard)
    return _checked_count(Checkpoint(path, path, config, {}, files))


def open_checkpoint(path: Path | str | None = None) -> Checkpoint:
    """Open a Hugging Face directory, or a safetensors file of ours, without reading its tensors.

    None is the default model, fetched first if it is missing.
    """
    if path is None:
        from scripts.download import ensure_default_model  # a script: it edits sys.path

        try:
            path = ensure_default_model()
        except OSError as error:
            raise UserError(str(error)) from None
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: give a directory or a .safetensors file")
    if not path.is_file():
        raise UserError(f"{path} is no plain file: give a directory or a .safetensors file")
    names, metadata = _read_names(path)
    if METADATA_KEY not in metadata:
        if not (path.parent / "config.json").exists():
            raise UserError(f"{path} is not of quantize.py, and no config.json is beside it")
        directory = _open_directory(path.parent)
        if path not in directory.files.values():
            raise UserError(f"{path} is no checkpoint: not of quantize.py, nor of its directory")
        return directory
    try:
        header = json.loads(metadata[METADATA_KEY])
        if header["version"] > VERSION:
            raise UserError(f"{path} was written by a newer version; update flatllama")
        config = ModelConfig.from_dict(header["config"])
        if not re.fullmatch(r"[a-z0-9-]+", header["mode"]):
            raise ValueError(f"mode {header['mode']!r}")
        if not isinstance(header.get("groupsize"), int | None):
            raise TypeError(f"group size {header['groupsize']!r}")
        for settings in header["layers"].values():
            if settings["format"] not in FORMATS:
                raise UserError(f"{path} uses the unknown format {settings['format']!r}")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: malformed header ({error!r})") from None
    return _checked_count(Checkpoint(path, path.parent, config, header, dict.fromkeys(names, path)))


def _checked_count(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if it has at least a tensor a layer: a header may announce any number."""
    if checkpoint.config.n_layers > len(checkpoint.files):
        layers, count = checkpoint.config.n_layers, len(checkpoint.files)
        raise UserError(f"{checkpoint.path}: {layers} layers announced, but only {count} tensors")
    return checkpoint


def build_model(config: ModelConfig, layers: dict[str, dict], dtype: torch.dtype) -> Transformer:
    """A Transformer on the meta device, with the quantized layers that a header lists."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        for name, settings in layers.items():
            try:
                old, cls = model.get_submodule(name), FORMATS[settings["format"]]
                rest = {k: v for k, v in settings.items() if k not in ("format", "input_scale")}
                if rest and rest not in [{"groupsize": size} for size in cls.groupsizes]:
                    raise ValueError(f"{cls.name} with {rest}")
                shape = (old.in_features, old.out_features)
                new = cls(*shape, bias=old.bias is not None, dtype=dtype, **rest)
                if settings.get("input_scale"):
                    new.input_scale = torch.empty(old.in_features, dtype=torch.bfloat16)
            except (AttributeError, TypeError, ValueError) as error:
                raise UserError(f"malformed header: layer {name!r} ({error})") from None
            model.set_submodule(name, new)
    return model


def check_specs(
    checkpoint: Checkpoint, model: Transformer, names: list[str], others: Set[str] = frozenset()
) -> None:
    """Compare what is stored with what the model takes of `names`: names, shapes, dtypes.

    Before anything is allocated. A tensor that nothing takes, and that is not among `others`, means
    that this is another model.
    """
    expected = model.state_dict()
    for name in names:
        dtype, shape = checkpoint.spec(name)
        want = expected[name]
        same = dtype == want.dtype or {dtype, want.dtype} <= set(FLOATS)
        if shape != list(want.shape) or not same:
            raise UserError(
                f"{checkpoint.path}: {name} is {dtype} {shape}, "
                f"but its header or config.json says {want.dtype} {list(want.shape)}"
            )
    unused = checkpoint.files.keys() - {part for name in names for part in checkpoint.stored(name)}
    unused = sorted(n for n in unused - others if not n.endswith("rotary_emb.inv_freq"))
    if checkpoint.config.tied_head and "lm_head.weight" in unused and not checkpoint.header:
        unused.remove("lm_head.weight")
    if unused:
        raise UserError(
            f"{checkpoint.path} holds tensors that its header or config.json does not account for "
            f"({len(unused)}): {', '.join(unused[:3])}"
        )


def tensor_names(model: Transformer) -> list[str]:
    """Names in the state dict that a checkpoint stores: a tied head is stored once."""
    tied = isinstance(model.output, torch.nn.Linear) and model.config.tied_head
    return [n for n in model.state_dict() if not (tied and n == "output.weight")]


def load_model(
    checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a checkpoint, ready to run, its weights repacked for `device`.

    `dtype` converts what is not quantized, and so the activations; None keeps the checkpoint's.
    """
    stored_dtype = checkpoint.dtype
    model = build_model(checkpoint.config, checkpoint.header.get("layers", {}), stored_dtype)
    names = tensor_names(model)
    check_specs(checkpoint, model, names)
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        tensor = checkpoint.tensor(name)
        if isinstance(module, QuantizedLinear):
            own = dtype if attribute == "bias" else None
            setattr(module, attribute, tensor.to(device=device, dtype=own or tensor.dtype))
        else:
            tensor = tensor.to(device=device, dtype=dtype or stored_dtype)
            setattr(module, attribute, torch.nn.Parameter(tensor, requires_grad=False))
    if "output.weight" not in names and isinstance(model.output, torch.nn.Linear):
        model.output.weight = model.tok_embeddings.weight
    repack(model)
    return model.eval()


def repack(model: torch.nn.Module) -> None:
    """Turn every linear layer's weight into the layout of its device's kernel, one by one.

    Formats without one are named on stderr.
    """
    plain = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.repack()
            if not module.repacked and native.prepare(module.weight.device):
                plain.add(module.name)
        elif isinstance(module, Linear):
            native.prepare(module.weight.device)
        if isinstance(module, (Linear, QuantizedLinear)):
            native.to_huge_pages(module)
    if plain and first_rank():
        names = ", ".join(sorted(plain))
        print(f"flatllama: no kernel for {names}: plain PyTorch, far slower", file=sys.stderr)
