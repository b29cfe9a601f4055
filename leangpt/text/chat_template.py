"""A chat template filled in, in a process of its own: its author is a stranger.

Run as a program it reads {"template", "values"} as JSON from stdin, values being a list of dicts,
and writes {"texts"} or {"error"} to stdout. Jinja's sandbox keeps a template from reaching things,
not from running for ever: a few nested loops or doublings are enough. So the process has SECONDS of
the processor and MEMORY, and ends when they are spent.
"""

import json
import signal
import subprocess
import sys
from datetime import datetime

SECONDS = 1.0  # of the processor, once jinja2 is there
PATIENCE = 30  # seconds by the clock, on a machine with other things to do
MEMORY = 2**30  # bytes of addresses beyond what the process has when it starts
LONGEST = 2**24  # characters of text


def render_alone(template: str, values: dict) -> str:
    """render in another process. Raises ValueError with one line for whatever goes wrong there."""
    return render_several(template, [values])[0]


def render_several(template: str, values: list[dict]) -> list[str]:
    """render_alone of each of `values`, all in one process, which has no more time for it."""
    asked = json.dumps({"template": template, "values": values})
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],  # -P: not the neighbours of this file for modules
            input=asked,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"not done after {PATIENCE} s") from None
    if done.returncode < 0:  # a signal
        raise ValueError(f"it takes more than {SECONDS:g} s or {MEMORY >> 20} MiB")
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["texts"]


def render(template: str, values: dict) -> str:
    """The text of a Jinja template, as `transformers` renders chats. Raises what Jinja raises.

    Beyond Jinja's own, templates may use raise_exception, strftime_now, a tojson that escapes no
    HTML, loop controls and {% generation %}, which marks what an assistant said.
    """
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

        def content(self, caller):
            return caller()

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(format):
        return datetime.now().strftime(format)

    def make_dict(*entries, **named):
        return dict(*entries, **named)

    def check_name(name):
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no {name}")

    class PlainNamespace(Namespace):  # without names that mean something to Python itself
        def __init__(*args, **named):
            self, *rest = args
            for name in dict(*rest, **named):
                check_name(name)
            Namespace.__init__(self, *rest, **named)

        def __setitem__(self, name, value):
            check_name(name)
            Namespace.__setitem__(self, name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": make_dict,
        "namespace": PlainNamespace,
    }
    return environment.from_string(template).render(**values)


def limit_this_process():
    """No more than SECONDS and MEMORY from here on, as far as the system keeps such limits."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends a process
    try:
        import resource

        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
    except (ImportError, OSError):  # Windows; macOS, which does not keep this limit
        return
    addresses = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main():
    """This file run as a program: {"template", "values"} on stdin -> {"texts"} or {"error"}."""
    import jinja2.ext  # noqa: F401  before the limits
    import jinja2.sandbox  # noqa: F401

    asked = json.loads(sys.stdin.buffer.read())
    limit_this_process()
    try:
        texts = [render(asked["template"], values) for values in asked["values"]]
        length = sum(map(len, texts))
        if length > LONGEST:
            raise ValueError(f"it makes {length:,} characters of a message")
        answer = {"texts": texts}
    except Exception as error:  # a stranger's program: it may fail in any way there is
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
