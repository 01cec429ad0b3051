"""Locate the exports that a config names, so that every node finds them."""

from __future__ import annotations

from rayrm.config import OWN
from rayrm.errors import ServiceError
from rayrm.model.adapters import read_adapters
from rayrm.model.export import read_identity
from rayrm.model.foreign import open_model, open_template, pinned
from rayrm.model.net import check_max_length, load_config
from rayrm.serving.config import ServeConfig
from rayrm.serving.record import Served
from rayrm.text.template import Template


def locate_export(config: ServeConfig) -> tuple[ServeConfig, Served]:
    """Return the config with its exports named so that every node finds them, and the exports.

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


def load_served_template(served: Served, max_length: int | None) -> Template:
    """Load the template that builds the rows of a served version.

    Raises ServiceError if its export holds another version by now: its replicas build rows as the
    files did when they loaded them.
    """
    template, export = open_template(served.export, max_length)
    if served.version and not export.has_version(served.version):
        raise ServiceError(
            f"{served.export} now holds {export.version}, not {served.version}, which was "
            "deployed: deploy it again"
        )
    return template


def locate_adapters(config: ServeConfig) -> tuple[ServeConfig, Served]:
    """Do the same as locate_export for rewards that share a backbone."""
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
