"""functions: reward functions + groups -> outcomes, each call in a worker process

A reward function is the user's code and may hang, crash or be killed: it runs in processes that are kept
open between iterations (pebble), and only the rollouts that it fails on are lost. Time-outs are kept twice.
A watchdog thread in the worker (faulthandler: no Python, so code that holds the interpreter lock cannot stop
it) ends the worker, also when our own process is dead; its clock starts after the import of the function's
module. pebble's clock includes that import, and is the second line.
"""

import difflib
import faulthandler
import importlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from importlib.machinery import ModuleSpec, PathFinder
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

from pebble import ProcessExpired, ProcessPool

from grpo.errors import EngineError, UsageError
from grpo.score import call
from grpo.score.call import FunctionSpec, GroupCall
from grpo.score.outcome import Outcome, one_line
from grpo.score.rewards import BUILT_IN
