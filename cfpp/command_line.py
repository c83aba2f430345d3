"""The flag --config of `cfpp.main` and `cfpp.aot`, and what may be wrong with it, in one line."""

import difflib
import os
import runpy
from collections.abc import Iterator

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from cfpp.errors import UserError, one_line

config_flags.DEFINE_config_file("config", help_string="Path of the configuration, maybe with :ARG.")

Config = ml_collections.ConfigDict


def parse(argv: list[str]) -> list[str]:
    """Parses the flags of a program, --config among them.

    Returns:
      What is left over: the program.

    Raises:
      UserError: a mistake in them.
    """
    path = _config_path(argv)
    default = _load(path) if path else Config()
    try:
        left_over = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        raise UserError(_illegal_value(default, error)) from error
    except flags.Error as error:
        raise UserError(one_line(error)) from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(_unknown_field(argv, path, default, error)) from error
    _check_values(default)
    if len(left_over) > 1:
        raise UserError(f"unexpected argument {left_over[1]!r}; options start with --")
    return left_over


def _config_path(argv: list[str]) -> str:
    """The value of --config."""
    given = [
        value if equals else "".join(argv[index + 1 : index + 2])
        for index, (name, equals, value) in enumerate(word.partition("=") for word in argv)
        if name in ("--config", "-config")
    ]
    if len(given) > 1:
        raise UserError(f"--config is given {len(given)} times: {', '.join(given)}; give one")
    if not given:
        if any(word.lstrip("-").startswith("help") for word in argv):
            return ""
        raise UserError("--config is missing; give a file such as configs/quickstart.py")
    (path,) = given
    if not os.path.isfile(path.split(":", 1)[0]):
        raise UserError(
            f"--config={path}: there is no file {path.split(':', 1)[0]!r} in {os.getcwd()}"
        )
    return path


def _illegal_value(default: Config, error: flags.IllegalFlagValueError) -> str:
    """Tells a value of a wrong type."""
    flag = str(error).partition(": ")[0].removeprefix("flag ")
    if not flag.startswith("--config."):
        return one_line(error)
    field = flag.partition("=")[0].removeprefix("--config.")
    value = config_path.get_value(field, default)
    if isinstance(value, Config):
        return f"{flag}: {_is_group(field, value)}"
    wanted = config_path.get_type(field, default).__name__  # a placeholder's too
    default_value = "" if value is None else f", as the default {value!r}"
    return f"{flag}: give a value of type {wanted}{default_value}"


def _is_group(field: str, group: Config) -> str:
    inside = f"set --config.{field}.{next(iter(group))}, ..." if group else "give a dict"
    return f"this is a group of fields; {inside}"


def _unknown_field(argv: list[str], path: str, default: Config, error: Exception) -> str:
    """Tells the first --config.field that the configuration lacks, and the nearest it has."""
    known = list(_fields(default))
    for word in argv:
        field = word.partition("=")[0].lstrip("-").removeprefix("config.")
        if word.lstrip("-").startswith("config.") and field not in known:
            nearest = difflib.get_close_matches(field, known, n=1, cutoff=0.0)
            return f"--config.{field}: {path} has no such field; the nearest is {nearest[0]}"
    raise error


def _check_values(default: Config) -> None:
    """Checks what `config_flags` lets pass: another group of fields, a tuple's elements."""
    for field, value in flags.FLAGS["config"].override_values.items():
        wanted = config_path.get_value(field, default)
        if isinstance(wanted, Config) and wanted:
            raise UserError(f"--config.{field}={value.to_dict()}: {_is_group(field, wanted)}")
        if isinstance(wanted, tuple) and wanted:
            kinds = {type(item) for item in wanted} | ({int} if type(wanted[0]) is float else set())
            if any(type(item) not in kinds for item in value):
                raise UserError(f"--config.{field}={value}: give a tuple, as the default {wanted}")


def _load(path: str) -> Config:
    """The configuration as its file has it, without the command line.

    Raises:
      UserError: the file is none of Python's, gives no configuration, or refuses the argument.
    """
    file, *arg = path.split(":", 1)
    try:
        get_config = runpy.run_path(file).get("get_config", lambda *_: None)
        config = get_config(*arg)
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"--config={path}: {kind}{one_line(error)}") from error
    if not isinstance(config, Config):
        raise UserError(
            f"--config={path}: {file} has no get_config that returns a ConfigDict; give a file "
            "such as configs/quickstart.py"
        )
    return config


def _fields(config: Config, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, Config):
            yield from _fields(value, f"{prefix}{name}.")
