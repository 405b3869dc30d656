"""Loading and saving of HiRE models: predictors and runtime files travel with the weights."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils.hub import cached_file

from .hire_config import (
    PREDICTOR_FILE,
    check_predictor_tensors,
    describe,
    head_tensor_shapes,
    layer_tensor_shapes,
)
from .hire_head import SparseHead
from .hire_head_native import path as native_head_path
from .hire_install import Native
from .hire_native import path as native_path

RUNTIME_FILES = (
    "modeling_hire.py",
    "hire_codes.py",
    "hire_config.py",
    "hire_install.py",
    "hire_io.py",
    "hire_memory.py",
    "hire_predict.py",
    "hire_select.py",
    "hire_native.py",
    "hire_cache.py",
    "hire_blocks.py",
    "hire_token.py",
    "hire_step.py",
    "hire_draw.py",
    "hire_sample.py",
    "hire_ffn.py",
    "hire_head_native.py",
    "hire_head.py",
)
logger = logging.getLogger("hire")


def share_conversions(twin: type, native: type, model_type: str) -> None:
    """Give a twin class the weight conversions of its native class (merging experts, say).

    Transformers skips them for classes that come from a checkpoint unless registered by name.
    """
    found = get_checkpoint_conversion_mapping(native.__name__)
    if found is None:
        found = get_checkpoint_conversion_mapping(model_type)
    if found is not None:
        register_checkpoint_conversion_mapping(twin.__name__, found, overwrite=True)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers where their type may lie: a file's header can have any length.

    Kernels read weights where they are, and not every processor takes numbers at odd addresses.
    """
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


_UPLOAD_KEYS = (
    "repo_id",
    "private",
    "revision",
    "commit_message",
    "commit_description",
    "create_pr",
)


def _upload(folder: Path, token: Any, **options: Any) -> None:
    """Upload a saved folder; `repo_id` is the folder's name when it is not given."""
    api = HfApi(token=token)
    private, repo_id = options.pop("private", None), options.pop("repo_id", folder.name)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    ignored = ["__pycache__/*", "*.pyc"]
    api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=ignored, **options)


class HireIoMixin(Native):
    """Loading and saving: predictors and runtime files travel with the weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Native loading, then the predictors; see PreTrainedModel.from_pretrained.

        Raises OSError when the predictor file is missing, ValueError when it does not fit.
        """
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        for parameter in model.parameters():
            parameter.data = aligned(parameter.data)
        model._hire_load(pretrained_model_name_or_path, kwargs)
        return result

    def _hire_parts(self) -> tuple[Any, SparseHead | None]:
        base = getattr(self, self.base_model_prefix, self)
        output = self.get_output_embeddings() if self.hire_causal else None
        return base, getattr(output, "hire", None)

    def _hire_load(self, source: Any, kwargs: Mapping[str, Any]) -> None:
        base, head = self._hire_parts()
        if base.hire_layers or (head is not None and head.spec["kind"] == "lr"):
            keys = (
                "cache_dir",
                "force_download",
                "local_files_only",
                "token",
                "revision",
                "subfolder",
            )
            options = {key: kwargs[key] for key in keys if kwargs.get(key) is not None}
            path = cached_file(source, PREDICTOR_FILE, **options)
            self._hire_assign(path, base, head)
        for counter in [layer.counts for layer in base.hire_layers.values()] + [
            base.hire_fallbacks
        ]:
            counter.zero_()  # Transformers fills non-persistent buffers with whatever memory held
        if head is not None:
            head.counts.zero_()
        path = f"{native_path(base.hire_layers.values())}; {base.hire_step.path(base)}"
        if head is not None:
            path = f"{path}; {native_head_path(head.spec, self.get_output_embeddings())}"
        logger.warning("hire: %s", describe(self.config.hire, path))

    def _hire_assign(self, path: Any, base: Any, head: SparseHead | None) -> None:
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{PREDICTOR_FILE} cannot be read: {error}") from error
        for index, layer in base.hire_layers.items():
            prefix = f"layers.{index}."
            own = {
                k.removeprefix(prefix): aligned(tensors.pop(k))
                for k in list(tensors)
                if k.startswith(prefix)
            }
            check_predictor_tensors(own, layer_tensor_shapes(layer), prefix)
            layer.predictor_tensors, layer.prepared = own, None
        head_tensors = {k: aligned(tensors.pop(k)) for k in list(tensors) if k.startswith("head.")}
        if head is not None:
            width = self.get_output_embeddings().weight.shape[1]
            check_predictor_tensors(head_tensors, head_tensor_shapes(head.spec, width), "")
            head.predictor_tensors, head.prepared = head_tensors, None
        if tensors:
            raise ValueError(
                f"{PREDICTOR_FILE}: {sorted(tensors)[0]} is not called for by config.hire"
            )

    def save_pretrained(
        self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Native saving plus predictors, runtime files and both auto_map entries.

        With `push_to_hub` the finished folder is uploaded; the native way would miss our files.
        """
        upload = {key: kwargs.pop(key) for key in _UPLOAD_KEYS if push_to_hub and key in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        base, head = self._hire_parts()
        tensors = {
            f"layers.{index}.{name}": tensor
            for index, layer in base.hire_layers.items()
            for name, tensor in layer.predictor_tensors.items()
        }
        if head is not None:
            tensors.update(head.predictor_tensors)
        if tensors:
            (folder / PREDICTOR_FILE).parent.mkdir(exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in tensors.items()},
                folder / PREDICTOR_FILE,
                {"format": "pt"},
            )
        for name in RUNTIME_FILES:
            shutil.copyfile(Path(__file__).parent / name, folder / name)
        self._hire_patch_config(folder / "config.json")
        if push_to_hub:
            _upload(folder, kwargs.get("token"), **upload)

    def _hire_patch_config(self, path: Path) -> None:
        """Native architecture name and both auto_map entries, whichever of the two was saved."""
        config = json.loads(path.read_text())
        own = type(self).__name__
        entries = {
            key: value.rpartition(".")[2].rpartition("--")[2]
            for key, value in (getattr(self.config, "auto_map", None) or {}).items()
        }
        if self.hire_causal:
            entries["AutoModelForCausalLM"] = own
            entries["AutoModel"] = type(getattr(self, self.base_model_prefix)).__name__
        else:
            entries["AutoModel"] = own
        config["auto_map"] = {key: f"modeling_hire.{name}" for key, name in entries.items()}
        config["architectures"] = [entries.get("AutoModelForCausalLM", own).removeprefix("Hire")]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
