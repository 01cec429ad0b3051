"""Find the exports that a Serve config names, and name them so that every node finds them."""

from __future__ import annotations

from rayrm.config import OWN
from rayrm.model.adapters import read_adapters
from rayrm.model.export import read_identity
from rayrm.model.foreign import open_model, pinned
from rayrm.model.net import check_max_length, load_config
from rayrm.serving.config import ServeConfig
from rayrm.serving.record import (
    Served,
)


def locate_export(config: ServeConfig) -> tuple[ServeConfig, Served]:
    """The config with its exports found, and named so that every node finds them.

    Raises ExportError, ModelError or ConfigError.
    """
    if config.adapters:
        return locate_adapters(config)
    if "://" in config.export:
        _, export = read_identity(config.export)
        return config, Served(export=config.export, version=export.version)
    directory, export = open_model(config.export)
    if config.max_length is not None:
        check_max_length(config.max_length, load_config(str(directory)))
    where = pinned(config.export, directory)
    located = config.model_copy(update={"export": where})
    return located, Served(export=where, version=export.version)


def locate_adapters(config: ServeConfig) -> tuple[ServeConfig, Served]:
    """As locate_export, where several rewards share a backbone."""
    read = read_adapters(config.export, config.adapters, config.max_length)
    found = {
        name: Served(
            export=path if "://" in path else str(read[name].directory.resolve()),
            version=read[name].export.adapter_version,
        )
        for name, path in {OWN: config.export, **config.adapters}.items()
    }
    own = found.pop(OWN)
    check_max_length(read[OWN].template.spec.max_length, load_config(str(read[OWN].directory)))
    served = Served(export=own.export, version=own.version, adapters=found)
    return config.model_copy(update=served.place), served
