"""A reader of the manual: runs commands, HTTP requests and Python in a folder of its own, all in this process and without Ray.

Commands that a block does not run (`names only`) are held against what there is: the commands and options of catid2, jobs/, ray
and serve, the targets of the Makefile, the files that they name.
"""

import argparse
import json
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import NoReturn

import pytest
import typer
import yaml
from fastapi.testclient import TestClient

from catid2_ray import cli
from catid2_ray.config import Recipe
from catid2_ray.on_ray.serve import app as serve_app
from tests.command import run_here
from tests.documents.blocks import ROOT, Block
from tests.documents.shop import reduced, write_recipe

# Programs of others: that they are called at all is all that is known of them here.
_OTHERS = ("aws", "docker", "git", "kubectl", "pip", "sbatch")


class _Arguments(argparse.ArgumentParser):
    """Fails as a test does."""

    def error(self, message: str) -> NoReturn:
        raise AssertionError(message)


class Reader:
    """Follows one page from its first block to its last. `patch` puts the process back as it was; `client` asks the application
    (one for all pages: Serve's batches wait in the event loop of the first request)."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, client: TestClient | None = None):
        self.folder, self.patch, self.client = folder, patch, client
        self.names, self.served, self.replica = {"__name__": "notebook"}, "catid2_store", None
        patch.chdir(folder)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error) -> None:
        if self.replica:
            self.replica.serving.end()

    def follow(self, block: Block) -> None:
        """Do what the block shows; AssertionError, or what it raises, where that does not work."""
        if block.language == "sh":
            for command in block.commands:
                (self._check if block.reason else self._run)(shlex.split(command))
        elif block.language == "python":
            code = compile(block.text, block.place, "exec")
            if block.reason is None:
                exec(code, self.names)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml" and block.mark != "part of another file":
            Recipe.build(_completed(yaml.safe_load(block.text)))

    def _run(self, words: list[str]) -> None:
        if words[:2] == ["catid2", "init"]:
            self._init(words)
        elif words[0] == "catid2":
            _ended_well(run_here(*words[1:]))
        elif words[:2] == ["python", "-m"]:
            self.patch.setattr(sys, "argv", words[2:])
            try:
                runpy.run_module(words[2], run_name="__main__")
            except SystemExit as ended:
                assert not ended.code, f"it ended with {ended.code}"
        elif words[0] == "curl":
            self._request(words[1:])
        elif words[0] == "export":
            self.patch.setenv(*words[1].split("=", 1))
        else:
            assert words[0] == "make", f"nothing is known of {words[0]}: run it by hand and mark the block `names only`"
            _check_target(words[1:])

    def _init(self, words: list[str]) -> None:
        """`catid2 init … --out FILE`, and the file in the sizes of tests. A file that an earlier page's reader made makes way."""
        path = self.folder / words[words.index("--out") + 1]
        path.unlink(missing_ok=True)
        _ended_well(run_here(*words[1:]))
        write_recipe(path, reduced(yaml.safe_load(path.read_text(encoding="utf-8"))))

    def _request(self, words: list[str]) -> None:
        """What curl would ask the server for, asked of the application in this process."""
        parser = _Arguments()
        parser.add_argument("url")
        parser.add_argument("-s", action="store_true")
        parser.add_argument("-H")
        parser.add_argument("-d")
        parser.add_argument("-X", choices=["PUT", "DELETE"])
        asked = parser.parse_args(words)
        host, _, path = asked.url.removeprefix("http://").partition("/")
        assert host == "localhost:8000" and (asked.d is None or asked.H == "content-type: application/json")
        if self.replica is None:
            self.replica = _replica(self.served)
            limits = SimpleNamespace(max_ongoing_requests=serve_app.MAX_ONGOING)
            context = SimpleNamespace(servable_object=self.replica, _deployment_config=limits)
            self.patch.setattr("ray.serve.get_replica_context", lambda: context)
        if asked.d:
            kind = {"content-type": "application/json"}
            answer = self.client.request(asked.X or "POST", f"/{path}", content=asked.d, headers=kind)
        else:
            answer = self.client.get(f"/{path}")
        assert answer.status_code == 200, f"{asked.url} gave {answer.status_code}: {answer.text}"

    def _check(self, words: list[str]) -> None:
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
            words = words[1:]
        name = Path(words[0]).name
        if name == "catid2":
            asked = _check_options(typer.main.get_command(cli.app), words[1:])
            if words[1] == "serve":
                self.served = asked["store"]
        elif name == "python" and words[2].startswith("jobs."):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), f"there is no {words[2]}"
            _check_job(words[2], words[3:])
        elif name == "python" and words[2] == "pytest":
            assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/")), "a file is missing"
        elif name == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), f"there is no {words[1]}"
        elif name in ("ray", "serve"):
            own, _, job = _split(words[1:], "--")
            module = import_module("ray.scripts.scripts" if name == "ray" else "ray.serve.scripts")
            _check_options(module.cli, own + (["--", *job] if job else []))
            if job:
                self._check(job)
        elif name == "make":
            _check_target(words[1:])
        else:
            assert name in (*_OTHERS, "export", "cd", "mkdir", "curl"), f"nothing is known of {name}"
        for word in words:
            if word.endswith((".yaml", ".txt")) and "/" not in word.lstrip("./") and not (self.folder / word).exists():
                assert (ROOT / word).exists(), f"there is no {word}"


def _ended_well(done: CompletedProcess) -> None:
    assert done.returncode == 0, f"it ended with {done.returncode}: {done.stderr[-2000:]}"


def _split(words: list[str], at: str) -> tuple[list[str], str, list[str]]:
    place = words.index(at) if at in words else len(words)
    return words[:place], at, words[place + 1 :]


def _completed(recipe: dict) -> dict:
    """Part of a recipe, with a catalogue where it names none."""
    catalog = recipe.get("catalog") or {}
    return recipe | {"catalog": catalog if "root" in catalog or "synthetic" in catalog else catalog | {"root": "shop"}}


def _check_options(command, words: list[str]) -> dict:
    """What the words mean to the command, by option; click's UsageError where it has no such command, option or value."""
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{command.name} has no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    parsed = command.make_context(command.name, list(words)).params
    _check_recipe(parsed.get("recipe"), parsed.get("overrides"))
    return parsed


def _check_job(module: str, words: list[str]) -> None:
    """A job has the command of the command line of its name, or a recipe, overrides and `--wait`."""
    commands, name = typer.main.get_command(cli.app).commands, module.removeprefix("jobs.")
    same = {"append_items": "append"}.get(name, name.replace("_", "-"))
    if same in commands and name != "evaluate":
        _check_options(commands[same], words)
        return
    parser = _Arguments()
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append")
    parser.add_argument("--wait", action="store_true")
    asked = parser.parse_args(words)
    _check_recipe(asked.recipe, asked.set)


def _check_recipe(path: str | None, overrides: list[str] | None) -> None:
    if path is not None:
        Recipe.load(path, list(overrides or []))


def _check_target(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), f"the Makefile has {targets}, not {words}"


def _replica(store: str):
    """A replica as Serve would start it on this store, but in this process."""
    wrapped = serve_app.RetrieverReplica.func_or_class.__mro__
    own = next(one for one in wrapped if one.__init__.__qualname__ == "RetrieverReplica.__init__")
    return own(serve_app.AppSettings(store=store, updates=True, follow=False))
