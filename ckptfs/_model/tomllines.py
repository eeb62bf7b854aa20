"""Alias of `toml_lines` for one release: a daemon or a client of the previous release that still
runs imports it when it reads its configuration."""

from ckptfs._model.toml_lines import explained, line_of, lines_of

__all__ = ["explained", "line_of", "lines_of"]
