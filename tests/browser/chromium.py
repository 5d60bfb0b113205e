"""A real browser for tests: Debian's Chromium, with tools that find barriers (axe-core) and faulty HTML (html-validate).

`make browser` installs them into .interop/browser; they are used by tests alone.
"""

import json
import os
import pathlib
import shutil
import subprocess
import typing

HERE = pathlib.Path(__file__).resolve().parent
INTEROP = HERE.parents[1] / ".interop"
MODULES, SHOTS = INTEROP / "browser" / "node_modules", INTEROP / "shots"
SPHINX = INTEROP / "browser" / "sphinx" / "bin" / "sphinx-build"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def program():
    """The path of Chromium or a relative of its; None without one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def lacking():
    """What is missing for a browser, in a sentence; "" if nothing is."""
    if not shutil.which("node"):
        return "there is no Node.js (Debian: apt-get install nodejs npm)"
    if not program():
        return "there is no Chromium (Debian: apt-get install chromium)"
    for module in "playwright-core", "axe-core", "html-validate":
        if not (MODULES / module).is_dir():
            return "the npm package %s is not in %s: run `make browser`" % (module, MODULES)
    return ""


class Visit(typing.NamedTuple):
    """What a browser shows."""

    status: int
    url: str
    title: str
    text: str           # as a reader sees it
    width: int          # of the window
    excess: int         # pixels of the page beyond it
    barriers: list      # serious and critical ones
    invalid: list       # faults of the HTML
    messages: list      # errors and warnings of the console, violations of the Content-Security-Policy among them
    foreign: list       # URLs on other hosts that were asked for since the visit before
    requests: list      # all URLs that were
    shot: typing.Optional[str]  # the path of the picture
    value: typing.Any   # of the expression

    @property
    def faults(self):
        """A line for all that no page of ours may have."""
        sideways = ["it has to be scrolled sideways by %d pixels" % self.excess] if self.excess > 0 else []
        return [*sideways, *("barrier: " + text for text in self.barriers), *("HTML: " + text for text in self.invalid),
                *("console: " + text for text in self.messages), *("asks elsewhere: " + url for url in self.foreign)]


class Browser:
    """A browser, which shows one page at a time.

    `shot` is the name of a picture in .interop/shots/; `axe`: whether to look for barriers, which takes 0.1 to 0.5 s.
    """

    def __init__(self):
        SHOTS.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ, NODE_PATH=str(MODULES), CHROMIUM=program())
        self.process = subprocess.Popen(["node", str(HERE / "visit.js")], env=environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, encoding="utf-8")

    def visit(self, url, width=1280, dark=False, scripts=True, shot=None, cookies=None, axe=True):
        """Opens a URL in a fresh profile, which has these cookies, {name: value}."""
        return self._order("visit", shot, axe, url=url, width=width, dark=dark, scripts=scripts, cookies=cookies or {})

    def go(self, url, shot=None, axe=False):
        """Opens a URL in the profile of the page before."""
        return self._order("go", shot, axe, url=url)

    def resize(self, width, dark=False, shot=None, axe=True):
        """Gives the window another width and scheme; the page is not loaded again."""
        return self._order("resize", shot, axe, width=width, dark=dark)

    def click(self, selector, inside=False, shot=None, axe=False):
        """Clicks on what a CSS selector (or Playwright's `text=...`) finds, and waits for the page that it leads to.

        `inside`: in the frame of the page.
        """
        return self._order("click", shot, axe, selector=selector, inside=inside)

    def fill(self, selector, text, inside=False, shot=None, axe=False):
        """Writes into a field of a form."""
        return self._order("fill", shot, axe, selector=selector, text=text, inside=inside)

    def choose(self, selector, text):
        """Chooses from a list of a form."""
        return self._order("choose", None, False, selector=selector, text=text)

    def attach(self, selector, *paths):
        """Chooses files for a field of a form."""
        return self._order("attach", None, False, selector=selector, paths=[str(path) for path in paths])

    def press(self, *keys):
        """Presses keys, one after the other, and waits for the page that they lead to."""
        return self._order("press", None, False, keys=keys)

    def wait(self, selector, inside=False, hidden=False):
        """Waits until that can be seen; `hidden`: until it is there."""
        return self._order("wait", None, False, selector=selector, inside=inside, hidden=hidden)

    def look(self):
        """The page as it is now."""
        return self._order("look", None, False)

    def value(self, expression, inside=False):
        """The value of an expression in the page's JavaScript."""
        return self._order("look", None, False, expression=expression, inside=inside).value

    def _order(self, action, shot, axe, **more):
        path = str(SHOTS / (shot + ".png")) if shot else None
        self.process.stdin.write(json.dumps(dict(more, do=action, shot=path, axe=axe)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the browser ended: see standard error"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return Visit(**answer)

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
