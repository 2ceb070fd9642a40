"""Says what importing modules changes in their process: `python -m tests.import_effects`.

Standard input is JSON: `first`, the modules that may change what they like, and `then`, those that
may not. Standard output is JSON, too: what each of the latter changed.
"""

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
import warnings


def state():
    """Return what an import must leave alone."""
    loggers = {"root": logging.root, **logging.root.manager.loggerDict}
    found = {f"level of logger {k}": getattr(v, "level", None) for k, v in loggers.items()}
    found |= {f"variable {name}": value for name, value in os.environ.items()}
    found |= {f"thread {thread.name}": True for thread in threading.enumerate()}
    found |= {f"handler of signal {s:d}": signal.getsignal(s) for s in signal.valid_signals()}
    found["working directory"] = os.getcwd()
    found["import path"] = list(sys.path)
    found["warning filters"] = list(warnings.filters)
    found["handlers of the root logger"] = list(logging.root.handlers)
    if torch := sys.modules.get("torch"):
        found["threads of torch"] = torch.get_num_threads()
    return found


def effects_of(module):
    """Import a module and return the names of what that changed; a new logger is no change."""
    before = state()
    importlib.import_module(module)
    after = state()
    own = {name for name in after.keys() - before.keys() if "logger" not in name}
    return sorted(own | {name for name in before if after.get(name) != before[name]})


def main():
    asked = json.load(sys.stdin)
    for module in asked["first"]:
        with contextlib.suppress(ImportError):  # what is imported from a module need not be one
            importlib.import_module(module)
    found = {module: effects_of(module) for module in asked["then"]}
    json.dump({module: effects for module, effects in found.items() if effects}, sys.stdout)


if __name__ == "__main__":
    main()
