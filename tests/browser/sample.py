"""A server with something on each of its pages, for tests that look at them."""

import contextlib
import dataclasses
import typing
import urllib.parse

from harness import (
    SIMPLE_JSON, Server, Upstream, documentation, eventually, links, patched, path_of, sdist, submit, upload, upload_docs, wheel)
from webpages import RESULT

LONG_WORD = "a_word_that_is_much_longer_than_a_narrow_window_is_wide_and_has_no_place_to_break_" * 2
SUMMARY = "A summary that is long enough to need more than a single line in a narrow window, as many summaries are"
MARKDOWN = """# demo

A *library* that [shows](https://example.org/) what a **page** can hold, `code` and %s too.

![build](https://img.example.org/badge.svg)

```python
def a_line_that_scrolls(in_itself, because_it, has_more_characters, than_a_narrow_window, has_columns): return 1
```

| Option | What it does | Since | Default | Type | Environment variable |
|--------|:-------------|------:|:-------:|------|----------------------|
| `jobs` | how many run | 1.0 | 4 | int | `DEMO_JOBS_AT_THE_SAME_TIME` |

> A quote with a list:
> 1. one
> 2. two
>    - [x] done
>    - [ ] to do

<details><summary>More</summary>folded <kbd>Ctrl</kbd></details>
""" % LONG_WORD
RST = """====
demo
====

.. image:: https://img.example.org/badge.svg

A *library* with a literal block::

    def a_line_that_scrolls(in_itself, because_it, has_more_characters, than_a_narrow_window, has_columns): return 1

.. note:: Notes are quotes.

=========  ============================  =====================
Option     What it does                  Environment variable
=========  ============================  =====================
``jobs``   how many run at a time        ``DEMO_JOBS_AT_THE_SAME_TIME_%s``
=========  ============================  =====================

Term
    Its definition [1]_, and :pep:`503`.

:Field: its value

.. [1] A footnote.
""" % ("X" * 40)
DOCUMENTATION = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>demo</title></head>
<body><main><h1>demo</h1><p>How it is used.</p></main><script>document.title = "demo, scripted"</script></body></html>
"""
TAGS = ("cp313-cp313-manylinux2014_x86_64", "cp313-cp313-manylinux2014_aarch64", "cp313-cp313-macosx_11_0_arm64",
        "cp313-cp313-win_amd64", "cp314-cp314t-manylinux2014_x86_64", "py3-none-any")


class Sample(typing.NamedTuple):
    server: Server
    upstream: Upstream

    @property
    def result(self):
        """The path of a page with a test result."""
        home = "alice/dev/demo/1.0"
        name = links(self.server, home, "toxresult")[0]["href"].rpartition("/")[2]
        return "/%s/+toxresults/%s/%s" % (home, wheel_of("demo", "1.0").filename, name)


@contextlib.contextmanager
def sample(folder):
    """A server with alice, who has stages and a mirror, and bob, who has nothing; with what pages can show of it."""
    upstream = Upstream().start()
    server = Server(folder / "server", script=patched(folder, "devpi_lite.Limits.counts_pause = 0.05\n")).start()
    try:
        fill(server, upstream)
        yield Sample(server, upstream)
    finally:
        server.kill()
        upstream.stop()


def fill(server, upstream):
    for number in range(105):
        upstream.publish("upstream-%03d" % number, "1.0")
    upstream.publish(described("mirrored", "1.0", MARKDOWN), core_metadata=True)
    server.add_user("alice")
    server.add_user("bob")
    server.patch("/alice", {"title": "Alice A.", "email": "alice@example.org", "description": SUMMARY}, user="alice")
    server.add_mirror("alice/mirror", upstream, title="What we use", mirror_web_url_fmt="https://example.org/{name}")
    server.add_index("alice/empty", bases=[])
    server.add_index("alice/prod", bases=["alice/mirror"], volatile=False)
    server.add_index("alice/dev", bases=["alice/prod", "alice/mirror"], title="What is being worked on", description=SUMMARY,
                     mirror_whitelist=["demo"], acl_toxresult_upload=["alice", ":developers", ":AUTHENTICATED:"])
    fill_stage(server)
    upload(server, "alice/prod", wheel_of("demo", "1.0"), wheel("demo", "0.9"))

    for path in ("/alice/mirror/+simple/", "/alice/mirror/+simple/mirrored/"):
        assert server.get(path, headers={"Accept": SIMPLE_JSON}).status == 200
    for _ in range(3):
        server.fetch("alice/dev", wheel_of("demo", "1.0").filename, "demo")
    eventually(lambda: server.get("/alice/dev/demo/+downloads").result["total"] >= 3)
    eventually(lambda: server.get("/+search?query=demo").result["total"] >= 4)
    eventually(lambda: server.get("/+search?query=upstream").result["names"]["total"] >= 105)


def fill_stage(server):
    upload(server, "alice/dev", wheel_of("demo", "1.0"), sdist("demo", "1.0"), fields=text_fields(MARKDOWN, "text/markdown"))
    for tag in TAGS:
        upload(server, "alice/dev", wheel("demo", "1.1", tag=tag, summary=SUMMARY), fields=text_fields(RST, "text/x-rst"))
    upload(server, "alice/dev", wheel("demo", "2.0rc1", summary=SUMMARY, requires_dist=["mirrored<2"]))
    upload(server, "alice/dev", wheel("a-project-with-a-name-of-many-words-that-does-not-fit-into-a-narrow-window", "1.0"))
    for number in range(3):
        upload(server, "alice/dev", wheel("needs-demo-%d" % number, "1.0", requires_dist=["demo>=1"]))
    upload(server, "alice/dev", wheel("withdrawn", "1.0"), wheel("withdrawn", "0.9"), wheel("harmful", "1.0"))
    assert server.patch("/alice/dev/withdrawn/1.0", {"yanked": "loses data"}, user="alice").status == 200
    status = {"project-status": {"status": "quarantined", "reason": "steals keys"}}
    assert server.patch("/alice/dev/harmful", status, user="alice").status == 200
    upload_docs(server, "alice/dev", documentation("demo", "1.0", DOCUMENTATION))
    upload_docs(server, "alice/dev", documentation("demo", "1.1", DOCUMENTATION))
    submit(server, "alice/dev", "without-files", "1.0")
    for _ in range(2):
        assert server.post(path_of(wheel_of("demo", "1.0"), "alice/dev"), RESULT, user="alice").status == 200


def wheel_of(name, version):
    """The wheel of alice/dev that has members of every kind."""
    code = "def %s():\n    return '<b>%s</b>'\n" % (LONG_WORD, version)
    members = {"demo/code.py": code.encode(), "demo/data.bin": b"\0\1\2" * 99, "demo/<b>&\u202e.py": b"odd = True\n",
               "demo/%s/%s.py" % (LONG_WORD, LONG_WORD): b"long = True\n",
               "%s-%s.dist-info/licenses/LICENSE" % (name, version): b"Do as you like.\n"}
    return wheel(name, version, extra_members=members, summary=SUMMARY, requires_python=">=3.8",
                 requires_dist=["other-lib>=1", "mirrored", "needs-demo-1; extra == 'all'"])


def text_fields(description, content_type):
    """Fields of an upload with a description."""
    return {"description": description, "description_content_type": content_type, "author": "Alice A.",
            "license": "MIT", "keywords": "demo,page", "project_urls": "Source, https://example.org/demo",
            "classifiers": ["Programming Language :: Python :: 3", "Topic :: Software Development :: Libraries"]}


def described(name, version, description):
    """A wheel with a description in Markdown in its metadata."""
    plain = wheel(name, version)
    metadata = plain.metadata + b"Description-Content-Type: text/markdown\n\n" + description.encode()
    return dataclasses.replace(wheel(name, version, metadata=metadata), metadata=metadata)


def quoted(path):
    return urllib.parse.quote(path)
