"""What is run: a model by its layers, from a name, a folder, a `config.json` or the Hub.

`spec` has the layers and what follows from them, `dimensions` tells plain models in fewer words,
`by_name` has the models known by name, whose configs are in `built_in`, and `families` reads a published
config.json of any of them by its `model_type`, with the functions of `readers`, which share what is in
`decoder`, and `published_dtype`. `quantisation` tells how a config says that weights are stored, and
`stored_formats` which of our tensors are then packed; `gguf` makes a config of a GGUF file. `workspace` is
what computing a layer takes for a while.
"""

from pathlib import Path

from hrm.errors import ModelError, meant
from hrm.files import is_file, is_folder
from hrm.hub import CONFIG_FILE, HubModel
from hrm.model_spec.by_name import BUILT_IN_MODELS
from hrm.model_spec.config_file import Keys, read_config
from hrm.model_spec.dimensions import Dimensions
from hrm.model_spec.families import decoder_keys, read_spec, spec_as_stored, spec_from_hf_config
from hrm.model_spec.gguf import SUFFIX, read_header
from hrm.model_spec.published_dtype import with_quantisation
from hrm.model_spec.spec import ModelSpec
from hrm.model_spec.stored_formats import What, packable, packed_as

__all__ = [
    "BUILT_IN_MODELS",
    "Dimensions",
    "Keys",
    "ModelSpec",
    "What",
    "decoder_keys",
    "load_model",
    "packable",
    "packed_as",
    "read_config",
    "read_spec",
    "spec_as_stored",
    "spec_from_hf_config",
]


def load_model(model: str) -> ModelSpec:
    """Resolve a built-in name, a checkpoint folder, the path of a `config.json` or GGUF file, or a name on the Hub.

    Of a model on the Hub its config.json alone is fetched. Raises ModelError if it is none of them or
    the config cannot be used.
    """
    if model in BUILT_IN_MODELS:
        return BUILT_IN_MODELS[model]
    path = Path(model)
    if is_folder(path):
        path /= CONFIG_FILE
        if not is_file(path):
            raise ModelError(
                "--model", model, f"has no {CONFIG_FILE}", "download it too, or name the folder that has it"
            )
    on_hub = None if is_file(path) else HubModel.named(model)
    if on_hub is not None:
        return spec_as_stored(decoder_keys(read_config(on_hub.config()), on_hub.config_name))
    if not is_file(path):
        files = "a config.json or its folder, a GGUF file"
        if path.parent != Path():
            rule = f"must be {files}, or org/name on the Hub"
            raise ModelError("--model", model, rule, "check the path; hrm models lists built-in names")
        rule = f"must be one of {', '.join(BUILT_IN_MODELS)}, {files}, or org/name on the Hub"
        raise ModelError("--model", model, rule, meant(model, BUILT_IN_MODELS, "see hrm models"))
    if path.suffix == SUFFIX:
        return spec_as_stored(decoder_keys(read_header(path).config(), str(path)))
    return spec_as_stored(decoder_keys(with_quantisation(read_config(path), path.parent), str(path)))
