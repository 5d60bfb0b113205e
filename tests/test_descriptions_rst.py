"""reStructuredText: what docutils shows, and nothing unsafe."""

import random
import re

import pytest

import devpi_lite as d
from webpages import Description

REL = ' rel="nofollow noopener ugc"'


def link(href, text):
    return f'<a href="{href}"{REL}>{text}</a>'


def shown(text):
    return d.render_rst(text).replace(' tabindex="0"', "")


def errors(text):
    return d._rst_tree(text, d.Deadline(10))[1]


# -- inline markup


@pytest.mark.parametrize("text, html", [
    ("*a* **b** ``c``", "<em>a</em> <strong>b</strong> <code>c</code>"),
    ("x*y* 2*3*4 a*", "x*y* 2*3*4 a*"),
    ("(*a*), '*b*'.", "(<em>a</em>), &#x27;<em>b</em>&#x27;."),
    ('"*" (*) [*] {*} <*>', "&quot;*&quot; (*) [*] {*} &lt;*&gt;"),
    ("* a*", "<ul><li>a*</li></ul>"),
    (r"\*a* \\ re\ *Structured*\ Text", r"*a* \ re<em>Structured</em>Text"),
    (r"``\a\ \* ` b``", r"<code>\a\ \* ` b</code>"),
    ("*a **b** c*", "<em>a **b*</em> c*"),
    ('"*a*" *"b* "', "&quot;<em>a</em>&quot; <em>&quot;b</em> &quot;"),
    ('*"b* "', "<em>&quot;b</em> &quot;"),
    (r"``a\`` b ****", r"<code>a\</code> b ****"),
    ("«*a*» — *b*—", "«<em>a</em>» — <em>b</em>—"),
    ("a\nb", "a\nb"),
    ("`a` :sub:`b` :sup:`c` `d`:strong:", "<em>a</em> <sub>b</sub> <sup>c</sup> <strong>d</strong>"),
    (":code:`x` :literal:`a\\b` :kbd:`q`", "<code>x</code> <code>a\\b</code> <kbd>q</kbd>"),
    (":py:func:`~os.path.join` :class:`!str`", "<code>join</code> <code>str</code>"),
    (":ref:`a title <label>` :doc:`b`", "a title b"),
    (":pep:`8`, :rfc:`9110#section-2`",
     link("https://peps.python.org/pep-0008", "PEP 8") + ", "
     + link("https://tools.ietf.org/html/rfc9110.html#section-2", "RFC 9110")),
    ("a < b & c > d", "a &lt; b &amp; c &gt; d"),
])
def test_inline_markup_is_recognized_as_docutils_does(text, html):
    assert shown(text) in (html, f"<p>{html}</p>")


@pytest.mark.parametrize("text, html", [
    ("http://a.example/b_(c). x", link("http://a.example/b_(c", "http://a.example/b_(c") + "). x"),
    ("<https://a.example/?q=1#f>", "&lt;" + link("https://a.example/?q=1#f",
                                                 "https://a.example/?q=1#f") + "&gt;"),
    ("git+https://a.example", "git+https://a.example"),
    ("me@a.example, a@b", link("mailto:me@a.example", "me@a.example") + ", "
     + link("mailto:a@b", "a@b")),
    ("javascript:alert(1)", "javascript:alert(1)"),
    ("`a <https://x.example/a b>`_", link("https://x.example/ab", "a")),
    ("`<https://x.example>`_", link("https://x.example", "https://x.example")),
    ("`a <me@x.example>`__", link("mailto:me@x.example", "a")),
    ("`a <b.rst>`_", "a"),
    ("`a < b>`_", "`a &lt; b&gt;`_"),
    (r"`a <https://x.example/b\_>`_", link("https://x.example/b_", "a")),
    (r"a\@b.example", "a@b.example"),
    ("`a <https://x.example>`_ a_", link("https://x.example", "a") + " "
     + link("https://x.example", "a")),
    ("nothing_ `at all`_ here__", "nothing_ `at all`_ here__"),
])
def test_links_stand_in_text(text, html):
    assert shown(text) == f"<p>{html}</p>"


@pytest.mark.parametrize("text, html", [
    ("a_ A_\n\n.. _a: https://x.example", link("https://x.example", "a") + " "
     + link("https://x.example", "A")),
    ("`a b`_\n\n.. _A  b: https://x.example", link("https://x.example", "a b")),
    ("`a: b`_\n\n.. _`a: b`: https://x.example", link("https://x.example", "a: b")),
    ("a_\n\n.. _a: https://x.example/\n   long", link("https://x.example/long", "a")),
    ("a__ `b c`__\n\n__ https://x.example\n.. __: https://y.example",
     link("https://x.example", "a") + " " + link("https://y.example", "b c")),
    ("a_\n\n.. _a: b_\n.. _b: `c d`_\n.. _c d: https://x.example", link("https://x.example", "a")),
    ("a_ b_\n\n.. _a:\n.. _b: https://x.example", link("https://x.example", "a") + " "
     + link("https://x.example", "b")),
    ("`x <a_>`_\n\n.. _a: https://x.example", link("https://x.example", "x")),
    ("a:b_\n\n.. _`a:b`: https://x.example", link("https://x.example", "a:b")),
    (":sub:`a`_\n\n.. _a: https://x.example", ":sub:`a`_"),
    ("a_\n\n.. _a: b_\n.. _b: a_", "a_"),
])
def test_a_reference_leads_to_its_target(text, html):
    assert shown(text) == f"<p>{html}</p>"


def test_a_reference_leads_into_the_page():
    assert shown("One\n===\n\nTo two_, One_, here_ and _`here`.\n\n.. _two:\n\nText") == (
        '<h2 id="readme-one">One</h2><p>To <a href="#readme-two">two</a>, '
        '<a href="#readme-one">One</a>, <a href="#readme-here">here</a> and '
        '<span id="readme-here">here</span>.</p><span id="readme-two"></span><p>Text</p>')


def test_what_is_substituted_may_stand_anywhere():
    assert shown("|a| |B| |c|_ |no|\n\n.. |a| replace:: *x* |b|\n.. |b| unicode:: 0xA9 U+2014\n"
                 ".. |c| replace:: text\n.. _c: https://x.example\n") == (
        f"<p><em>x</em> ©— ©— {link('https://x.example', 'text')} |no|</p>")


def test_a_number_beyond_unicode_is_text():
    assert shown("|a|\n\n.. |a| unicode:: 0x110000\n") == "<p>0x110000</p>"


def test_names_of_substitutions_may_differ_in_case_alone():
    assert shown("|a| |A|\n\n.. |A| replace:: x\n.. |a| replace:: y\n") == "<p>y x</p>"


def test_substitutions_that_contain_each_other_are_left_as_they_are():
    assert shown("|a|\n\n.. |a| replace:: |b|\n.. |b| replace:: |a|\n") == "<p>|a|</p>"


def test_substitutions_do_not_multiply_a_text():
    text = "".join(f".. |a{n}| replace:: {f'|a{n + 1}| ' * 30}\n" for n in range(9))
    assert len(shown(f"{text}.. |a9| replace:: {'x' * 1000}\n\n|a0| |a5| |a9|")) < 100_000


@pytest.mark.parametrize("label, shown_label", [
    ("1", "1"), ("#", "1"), ("#n", "1"), ("*", "*"), ("CIT2002", "CIT2002")])
def test_a_footnote_is_linked(label, shown_label):
    html = shown(f"A [{label}]_\n\n.. [{label}] Note\n")
    id = re.sub("[*]", "", f"readme-footnote-{shown_label.lower()}")
    assert html == (f'<p>A <sup><a href="#{id}">[{shown_label}]</a></sup></p>'
                    f'<dl><dt id="{id}">[{shown_label}]</dt><dd>Note</dd></dl>')


def test_the_name_of_a_footnote_is_a_target():
    assert '<a href="#readme-footnote-1">n</a>' in shown("n_\n\n.. [#n] Note\n")


def test_footnotes_without_numbers_take_those_that_are_free():
    html = shown("[#]_ [#b]_ [#]_\n\n.. [2] two\n.. [#] first\n.. [#b] named\n.. [#] last\n")
    assert re.findall(r">(\[\w\])</a>", html) == ["[1]", "[3]", "[4]"]
    assert re.findall(r">(\[\w\])</dt>", html) == ["[2]", "[1]", "[3]", "[4]"]


# -- images


BADGE = (".. image:: https://x.example/a.svg\n   :target: https://x.example/\n   :alt: build\n")


def test_an_image_is_its_text_unless_images_are_shown():
    assert shown(BADGE) == f"<p>{link('https://x.example/', 'build')}</p>"
    assert d.render_rst(BADGE, shows_images=True) == "<p>" + link(
        "https://x.example/", '<img src="https://x.example/a.svg" alt="build">') + "</p>"


def test_images_after_each_other_share_a_paragraph():
    assert shown(BADGE + "\n" + BADGE).count("<p>") == 1


def test_an_image_may_be_substituted_and_lead_to_a_name():
    assert shown("|a|\n\n.. |a| image:: https://x.example/a.svg\n   :target: b_\n"
                 ".. _b: https://b.example\n") == f"<p>{link('https://b.example', 'a')}</p>"


def test_a_figure_has_a_caption():
    assert shown(".. figure:: https://x.example/a.png\n   :alt: A\n\n   The *caption*\n") == (
        "<p>[image: A]</p><p>The <em>caption</em></p>")


# -- titles


def levels(text):
    return re.findall(r'<h(\d) id="[^"]*">(.*?)</h', shown(text))


@pytest.mark.parametrize("text, found", [
    ("A\n=\n\nx\n\nB\n-\n\nC\n-\n", "2A 3B 3C"),
    ("A\n=\n\nB\n=\n\nC\n-\n", "2A 2B 3C"),
    ("=====\n  A\n=====\n\nB\n=\n", "2A 3B"),
    ("A\n=\n\nB\n-\n\nC\n~\n", "2A 3B 3C"),
    ("x\n\nA\n=\n\nB\n-\n\nC\n~\n", "2A 3B 4C"),
    ("A\n=\n\nx\n\nB\n-\n\nC\n~\n", "2A 3B 4C"),
    ("Aaaaaaa\n====\n", "2Aaaaaaa"),
    ("Aaaaaaa\n===\n", ""),
    ("漢字\n====\n", "2漢字"),
    ("漢字\n===\n", ""),
    ("e\u0301e\u0301\n==\n", "2e\u0301e\u0301"),
    ("A\n=\n\nB\n-\n\nC\n~\n\nD\n-\n\nE\n=\n", "2A 3B 4C 3D 2E"),
])
def test_a_title_has_the_level_of_its_style(text, found):
    assert " ".join("".join(pair) for pair in levels(text)) == found


def test_titles_have_ids_of_their_own():
    assert re.findall('id="(.*?)"', shown("What's new?\n===========\n\nA\n-\n\nA\n-\n")) == [
        "readme-whats-new", "readme-a", "readme-a-1"]


# -- blocks


@pytest.mark.parametrize("text, html", [
    ("- a\n- b\n\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("-\va", "<ul><li>a</li></ul>"),
    ("* a\n\n  b\n* c", "<ul><li><p>a</p><p>b</p></li><li><p>c</p></li></ul>"),
    ("- a\n\n+ b", "<ul><li>a</li></ul><ul><li>b</li></ul>"),
    ("3. a\n4. b\n#. c", '<ol start="3"><li>a</li><li>b</li><li>c</li></ol>'),
    ("1. a\n2. b\n\n4. d", '<ol><li>a</li><li>b</li></ol><ol start="4"><li>d</li></ol>'),
    ("(a) a\n(b) b\n\n(i) x\n(ii) y",
     '<ol><li>a</li><li>b</li></ol><ol><li>x</li><li>y</li></ol>'),
    ("#) a\n#) b", "<ol><li>a</li><li>b</li></ol>"),
    ("IV. a\nV. b", '<ol start="4"><li>a</li><li>b</li></ol>'),
    ("2020. A year\nof text", "<p>2020. A year\nof text</p>"),
    ("ivi. a", "<p>ivi. a</p>"),
    ("term\n  what\nother : kind\n  more\n\n  text",
     "<dl><dt>term</dt><dd>what</dd><dt>other : kind</dt><dd><p>more</p><p>text</p></dd></dl>"),
    (":A: b\n:Long name: c\n   d", "<dl><dt>A</dt><dd>b</dd><dt>Long name</dt><dd>c\nd</dd></dl>"),
    ("-a, --all=FILE  Do it\n/V  <x>",
     "<dl><dt><kbd>-a, --all=FILE</kbd></dt><dd>Do it</dd>"
     "<dt><kbd>/V</kbd></dt><dd>&lt;x&gt;</dd></dl>"),
    ("--- x", "<p>--- x</p>"),
    ("-a", "<p>-a</p>"),
    ("(1. a", "<p>(1. a</p>"),
    ("a::\n\n   b\n     c\n\nd", "<p>a:</p><pre><code>b\n  c\n</code></pre><p>d</p>"),
    ("a ::\n\n> b\n> c\n\nd", "<p>a</p><pre><code>&gt; b\n&gt; c\n</code></pre><p>d</p>"),
    ("::\n\n  *a*\n\n\n  b", "<pre><code>*a*\n\n\nb\n</code></pre>"),
    (">>> 1 < 2\nTrue\n\na",
     '<pre><code class="lang-pycon">&gt;&gt;&gt; 1 &lt; 2\nTrue\n</code></pre><p>a</p>'),
    ("| a *b*\n|   c\n  d\n| e", "<p>a <em>b</em><br>\xa0\xa0\xa0\xa0c d<br>e</p>"),
    ("a\n\n  b\n\n  -- Me", "<p>a</p><blockquote><p>b</p><p>— Me</p></blockquote>"),
    ("a\n\n    b\n\n  c", "<p>a</p><blockquote><blockquote><p>b</p></blockquote><p>c</p></blockquote>"),
    ("a\n\n----\n\nb", "<p>a</p><hr><p>b</p>"),
    (".. a comment\n   with <b>\n\na", "<p>a</p>"),
    ("..\n\n  quote", "<blockquote><p>quote</p></blockquote>"),
    ("a\tb\r\n\r\n\r\nc\rd", "<p>a       b</p><p>c\nd</p>"),
    ("a\0b\vc\fd\ufeffe", "<p>a\ufffdb c de</p>"),
    ("", ""),
])
def test_blocks_are_read_as_docutils_does(text, html):
    assert shown(text) == html


@pytest.mark.parametrize("text, html", [
    ("+---+---+\n| a | b |\n+===+===+\n| c     |\n+---+---+\n| d | e |\n|   +---+\n|   | f |\n"
     "+---+---+",
     "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td colspan=\"2\">c</td></tr>"
     "<tr><td rowspan=\"2\">d</td><td>e</td></tr><tr><td>f</td></tr></tbody></table>"),
    ("+-----+\n| - a |\n| - b |\n+-----+",
     "<table><tbody><tr><td><ul><li>a</li><li>b</li></ul></td></tr></tbody></table>"),
    ("+------+\n| 漢字 |\n+------+", "<table><tbody><tr><td>漢字</td></tr></tbody></table>"),
    ("==  ==  ==\na b     c\n------  --\nd   e   f\n==  ==  ==\n1   2   3\n    4\n==  ==  ==\n",
     "<table><thead><tr><th colspan=\"2\">a b</th><th>c</th></tr>"
     "<tr><th>d</th><th>e</th><th>f</th></tr></thead>"
     "<tbody><tr><td>1</td><td>2\n4</td><td>3</td></tr></tbody></table>"),
    ("=  =\na  more than it says\n=  =",
     "<table><tbody><tr><td>a</td><td>more than it says</td></tr></tbody></table>"),
    (".. list-table:: T\n   :header-rows: 1\n   :stub-columns: 1\n\n   * - a\n     - b\n"
     "   * - c\n     - *d*\n",
     "<p><strong>T</strong></p><table><thead><tr><th>a</th><th>b</th></tr></thead>"
     "<tbody><tr><th>c</th><td><em>d</em></td></tr></tbody></table>"),
    ('.. csv-table::\n   :header: "A, x", B\n\n   "1 ""q""", *2*\n',
     "<table><thead><tr><th>A, x</th><th>B</th></tr></thead>"
     "<tbody><tr><td>1 &quot;q&quot;</td><td><em>2</em></td></tr></tbody></table>"),
    (".. csv-table::\n   :delim: space\n\n   a b", "<table><tbody><tr><td>a</td><td>b</td></tr></tbody></table>"),
    (".. list-table::\n   :header-rows: 999999\n\n   * - a", "<table><tbody><tr><td>a</td></tr></tbody></table>"),
    (".. table:: T\n\n   = =\n   a b\n   = =\n",
     "<p><strong>T</strong></p><table><tbody><tr><td>a</td><td>b</td></tr></tbody></table>"),
])
def test_tables_are_read_with_their_spans(text, html):
    assert shown(text) == html


@pytest.mark.parametrize("text, html", [
    (".. code-block:: Python\n   :linenos:\n\n   if a < b:\n       c\n",
     '<pre><code class="lang-python">if a &lt; b:\n    c\n</code></pre>'),
    (".. code::\n\n   a", "<pre><code>a\n</code></pre>"),
    ('.. sourcecode:: a"b\n\n   c', "<pre><code>c\n</code></pre>"),
    (".. note:: a\n   b\n\n   c",
     "<blockquote><p><strong>Note</strong></p><p>a\nb</p><p>c</p></blockquote>"),
    (".. warning::\n   :class: x\n\n   a",
     "<blockquote><p><strong>Warning</strong></p><p>a</p></blockquote>"),
    (".. admonition:: *T*\n\n   a",
     "<blockquote><p><strong><em>T</em></strong></p><p>a</p></blockquote>"),
    (".. topic:: T\n\n   a", "<blockquote><p><strong>T</strong></p><p>a</p></blockquote>"),
    (".. rubric:: R", "<p><strong>R</strong></p>"),
    (".. contents:: C\n   :local:\n\na", "<p>a</p>"),
    (".. container:: c\n\n   a", "<p>a</p>"),
    (".. class:: c\n\n   a", "<p>a</p>"),
    (".. only:: html\n\n   a", "<p>a</p>"),
    (".. epigraph::\n\n   a\n\n   -- b", "<blockquote><p>a</p><p>— b</p></blockquote>"),
    (".. parsed-literal::\n\n   *a*\n     b", "<pre><em>a</em>\n  b</pre>"),
    (".. role:: py(code)\n   :language: python\n\n:py:`a`", "<p><code>a</code></p>"),
    (".. default-role:: literal\n\n`a`", "<p><code>a</code></p>"),
])
def test_directives_are_shown(text, html):
    assert shown(text) == html


@pytest.mark.parametrize("directive", [
    ".. raw:: html\n\n   <script>alert(1)</script>", ".. include:: /etc/passwd",
    ".. csv-table:: a\n   :file: /etc/passwd", ".. csv-table:: a\n   :url: https://x.example\n\n   a",
    ".. math::\n\n   a < b", ".. nobody-knows:: it\n   :a: b\n\n   c", ".. image::",
    ".. list-table::\n\n   a"])
def test_what_is_not_understood_is_shown_as_it_was_written(directive):
    assert shown(f"before\n\n{directive}\n\n*after*") == (
        f"<p>before</p><pre>{d.escaped(directive)}</pre><p><em>after</em></p>")


def test_a_substitution_without_a_directive_is_a_comment():
    assert shown("before\n\n.. |a|\n\n*after*") == "<p>before</p><p><em>after</em></p>"


@pytest.mark.parametrize("broken", [
    "+---+\n| a\n+---+", "+---+\n| a |", "== ==\na  b", "== ==\nabcde\n== ==", "*a", "`a", ":sub:`a`_", "``a", "|a",
    "====\na\n\nb", "a::\n\nb", "- a\nb", "a_", "[1]_", "|a|", ":no:`a`", "a\nb\n  c",
    "a_\n\n.. _a: https://x.example\n.. _a: https://y.example", ".. foo:: a", "a__", "__ https://x.example", "A\n=\n\nB\n-\n\nC\n=\n\nD\n~\n", "Abcdef\n====",
    "  - a\n\n  B\n  =\n", ".. image:: a\n\n   b", "----\n\na", "====\n====", ".. [1] a\nb",
    ".. seealso:: a", ".. only:: html\n\n   a", ".. role:: r(raw)\n   :format: html", ".. code:: a\n   b\n\n   c",
    '.. code:: a"b\n\n   c', ".. list-table::\n\n   * - a\n     - b\n   * - c", ".. note:: a\n\n   ----\n\n   b"])
def test_an_error_costs_its_own_block(broken):
    assert errors(f"{broken}\n\nafter *all*\n") > 0
    assert "after <em>all</em>" in shown(f"{broken}\n\nafter *all*\n")
    assert d.has_rst_errors(broken)


@pytest.mark.parametrize("text", [
    "A\n=\n\n- a\n- b\n\na_\n\n.. _a: https://x.example\n.. _A: https://x.example\n",
    "Just text, and more.", "* a\n* b", "“*”", "«*»",
    ":a: b\n:c: d", "-a  b\n-c  d",
    "a : b\n  c\nd\n  e", "| a\n| b", ".. note:: a", "1. a\n2. b", "", "a *b* `c <https://x.example>`_"])
def test_a_text_without_errors_has_none(text):
    assert not errors(text) and not d.has_rst_errors(text)


def test_markdown_is_not_taken_for_text_without_errors():
    assert d.has_rst_errors("# A\n\n* a\n  * b\n* c\n\n[x](https://x.example) `a` and `b\n")


# -- limits


def test_a_list_nested_too_deep_is_shown_as_text():
    depth = d.Limits.description_depth
    html = shown("- " * (depth + 5) + "*a*")
    assert html.count("<ul>") == depth + 1 and "<pre>- - - - *a*</pre>" in html


def test_a_text_beyond_the_limits_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr(d.Limits, "description", 10)
    assert shown("*a* <b> 123") == "<pre>*a* &lt;b&gt; 123</pre>"


def test_a_text_that_takes_too_long_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr(d.Limits, "description_time", 0)
    assert shown("*a*\n\n*b*") == "<pre>*a*\n\n*b*</pre>"


def test_a_table_of_empty_cells_is_shown_as_it_is():
    columns = "= " * 200 + "="
    table = f"{columns}\n" + "a\n" * 200 + columns
    assert shown(f"{table}\n\n*a*") == f"<pre>{table}\n\n*a*</pre>"


SIZE = 40_000
SLOW = {name: (text * SIZE)[:SIZE] for name, text in {
    "stars": "*a ", "backquotes": "`a ", "literals": "``a ", "bars": "|a ", "words": ")aaaaaaaaa_)",
    "references": "a_ ", "anonymous": "a__ ", "brackets": "[a", "roles": ":a:", "dashes": "a-",
    "schemes": "(http:[", "addresses": "a@", "questions": "http://a?", "escapes": "\\*", "urls": "`a <",
    "bullets": "- a\n", "numbers": "#. a\n", "fields": ":a: b\n", "colons": ":a", "options": "-a, ",
    "definitions": "a\n b\n", "comments": ".. a\n", "targets": ".. _a:\n", "substitutions": ".. |a|\n",
    "footnotes": ".. [*] a\n", "tops": "== ==\n", "grids": "+--+\n|  |\n+--+\n\n", "rules": "====\n\n",
    "titles": "a\n=\n", "literal blocks": "::\n\n a\n\n", "doctests": ">>> a\n", "quotes": " a\n\n -- b\n\n",
    "images": ".. image:: a\n", "figures": ".. figure:: a\n\n   a\n\n", "letters": "a", "blanks": " ",
}.items()}
SLOW.update({
    "rows of plus": "\n".join(["+-" + "+" * 90 + "-+"] * 90),
    "a hollow grid": "\n".join(["+-" + "-+" * 99 + "+"] + ["|" + " " * 200 + "|"] * 200
                               + ["+" + "-" * 200 + "+"]),
    "an open target": ".. _`" + "a`" * 20_000, "blanks in a link": "`a" + " " * SIZE + "<b>`_",
    "blanks in a role": ":a:`x" + " " * SIZE + "<", "steps": "\n".join(" " * n + "a" for n in range(280)),
    "a chain": "".join(f".. _a{n}: a{n + 1}_\n" for n in range(2000)) + "a0_ " * 2000,
    "a cycle": ".. |a| replace:: " + "|b| " * 3000 + "\n.. |b| replace:: " + "|a| " * 3000,
    "columns": "= " * 900 + "=\n" + "a\n" * 15_000 + "= " * 900 + "=",
})


@pytest.mark.parametrize("name", SLOW)
def test_a_hostile_text_takes_time_in_proportion_to_its_length(name):
    """Each takes less than 0.2 s, and many times as much if its time grows with the square."""
    try:
        d.safe_html(d._rst_tree(SLOW[name], d.Deadline(1.5))[0])
    except d.TooMuch as reason:
        assert name == "columns" and "empty cells" in str(reason)


# -- safety


EVIL = ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\tscript:alert(1)", "\x01javascript:alert(1)",
        "data:text/html,<script>alert(1)</script>", "vbscript:x", "//evil.example", "https:evil",
        "file:///etc/passwd", '" onmouseover="alert(1)', "'><script>alert(1)</script>",
        "&#106;avascript:alert(1)", "https://x.example/\"onclick=alert(1)//", "http://x.example/<script>"]
PLACES = ["`a <{}>`_", "a_\n\n.. _a: {}", "a__\n\n__ {}", ".. image:: {}",
          ".. image:: https://x.example/a.png\n   :target: {}", ".. image:: x\n   :alt: {}",
          ".. figure:: {}\n   :target: {}\n\n   {}", ".. code:: {}\n\n   {}", ":{}: {}", "{}\n====",
          "``{}``", ".. raw:: html\n\n   {}", ".. |a| image:: {}\n\n|a|", ".. _{}:\n\n`{}`_", "[{}]_",
          ".. [{}] {}", ":role:`{}`", ".. role:: {}(raw)\n   :format: html", "| {}\n| {}", "- {}", ">>> {}",
          ".. csv-table:: {}\n\n   {}, {}", ".. class:: {}\n\n   {}", ".. container:: {}\n\n   {}",
          ".. note::\n   :class: {}\n   :name: {}\n\n   {}", ".. topic:: {}\n\n   {}", "{}", ".. {}:: {}"]


@pytest.mark.parametrize("place", PLACES)
def test_nothing_unsafe_comes_out(place):
    for evil in EVIL:
        text = place.replace("{}", evil)
        for shows_images in (False, True):
            out = d.render_rst(text, shows_images)
            Description(out)
            assert "<script" not in out


PIECES = [*"*`_|:\\[]<>-=+#.~^\"'(){}/@! \n\n\n\n\n", "``", "**", "a", "b c", "  ", "   ", "\n  ", "\n   ", ".. ",
          ".. _a: ", ".. |a| ", "replace:: ", "image:: ", "::\n\n", "====\n", "----\n", "+---+\n", "| a |\n",
          "= =\n", "a_ ", "[1]_", ".. [1] ", "- ", "1. ", ":a: ", "-a  b", ">>> ", "http://x.example", "m@x.y",
          "<b>", "</p>", "&lt;", "\0", "\x85", "\ud800", "漢", "é", ":sub:`x`", ".. note::\n", "list-table::\n\n",
          "   * - ", ".. csv-table::\n\n   ", "   :header-rows: 1\n", ".. code::", "\t"]


@pytest.mark.parametrize("seed", range(400))
def test_any_text_is_shown_safely(seed):
    chance = random.Random(seed)
    text = "".join(chance.choice(PIECES) for _ in range(chance.randrange(60)))
    d._rst_tree(text, d.Deadline(10))
    Description(d.render_rst(text, shows_images=True))
