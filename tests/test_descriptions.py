"""Markdown, the format of a description, and what no description can bring onto a page."""

import html
import random
import re
import time

import pytest

import devpi_lite as d
from webpages import Description

REL = ' rel="nofollow noopener ugc"'
KEYS = ' tabindex="0"'


def shown(markdown, **options):
    """Markdown as HTML, without what every outside link has, and what scrolls."""
    return d.render_markdown(markdown, **options).replace(REL, "").replace(KEYS, "")


def source(markdown):
    return "<pre%s>%s</pre>" % (KEYS, html.escape(markdown))


def test_what_scrolls_sideways_can_be_scrolled_by_keys():
    assert d.render_markdown("    a") == '<pre tabindex="0"><code>a\n</code></pre>'
    assert d.render_markdown("|a|\n|-|") == '<table tabindex="0"><thead><tr><th>a</th></tr></thead></table>'
    assert d.render_markdown("<pre tabindex=9>a</pre><p tabindex=9>b</p>") == '<pre tabindex="0">a</pre><p>b</p>\n'


# -- blocks


@pytest.mark.parametrize("markdown, page", [
    # headings: one level down, with the ids of GitHub
    ("# Pluggy", '<h2 id="readme-pluggy">Pluggy</h2>'),
    ("What's *new*?\n===", '<h2 id="readme-whats-new">What&#x27;s <em>new</em>?</h2>'),
    ("two\nlines\n---", '<h3 id="readme-two-lines">two\nlines</h3>'),
    ("###### Deep ######", '<h6 id="readme-deep">Deep</h6>'),
    ("## a_b C ##", '<h3 id="readme-a_b-c">a_b C</h3>'),
    ("####### seven\n\n#hash", "<p>####### seven</p><p>#hash</p>"),
    ("# A\n# A\n# A", '<h2 id="readme-a">A</h2><h2 id="readme-a-1">A</h2><h2 id="readme-a-2">A</h2>'),
    ("# ![logo](https://a.example/l.png) Tool", '<h2 id="readme-tool">[image: logo] Tool</h2>'),
    ("# Größe 🚀", '<h2 id="readme-größe-">Größe 🚀</h2>'),
    # paragraphs and breaks
    ("one\n  two  \nthree\\\nfour\n\nfive", "<p>one\ntwo<br>\nthree<br>\nfour</p><p>five</p>"),
    ("a\r\nb \rc", "<p>a\nb\nc</p>"),
    ("a\n***\nb\n\n- - -\n___", "<p>a</p><hr><p>b</p><hr><hr>"),
    # code
    ("    a <b>\n\n\tc\n\nd", "<pre><code>a &lt;b&gt;\n\nc\n</code></pre><p>d</p>"),
    ("a\n    b", "<p>a\nb</p>"),
    ("```python\nx = '<'\n```", "<pre><code class=\"lang-python\">x = &#x27;&lt;&#x27;\n</code></pre>"),
    ("~~~ c++ x\n```\n~~~~", '<pre><code class="lang-c++">```\n</code></pre>'),
    ("``` a\"b\nx", "<pre><code>x\n</code></pre>"),
    ("```" + "a" * 51 + "\nx", "<pre><code>x\n</code></pre>"),
    ("  ```\n  a\n   b\n c\n  ```", "<pre><code>a\n b\nc\n</code></pre>"),
    ("```\n\n\n", "<pre><code>\n\n</code></pre>"),
    ("``` a`b ```", "<p><code>a`b</code></p>"),
    # quotes, with lines that lack the mark
    ("> a\nb\n> - c\nd\n\ne", "<blockquote><p>a\nb</p><ul><li>c\nd</li></ul></blockquote><p>e</p>"),
    ("> a\n---", "<blockquote><p>a</p></blockquote><hr>"),
    (">     code\n>\n>>x", "<blockquote><pre><code>code\n</code></pre>"
                           "<blockquote><p>x</p></blockquote></blockquote>"),
    (">\t\tcode", "<blockquote><pre><code>  code\n</code></pre></blockquote>"),
    # lists
    ("- a\n- b\n  - c\n* d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ul><li>d</li></ul>"),
    ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("- a\n\n  b\n- c", "<ul><li><p>a</p><p>b</p></li><li><p>c</p></li></ul>"),
    ("- a\n  - b\n\n    c\n- d", "<ul><li>a<ul><li><p>b</p><p>c</p></li></ul></li><li>d</li></ul>"),
    ("- ```\n  x\n\n  y\n  ```\n- z", "<ul><li><pre><code>x\n\ny\n</code></pre></li><li>z</li></ul>"),
    ("3. a\n4. b\n\n1) c", '<ol start="3"><li>a</li><li>b</li></ol><ol><li>c</li></ol>'),
    ("year\n1999. was\n1. is", "<p>year\n1999. was</p><ol><li>is</li></ol>"),
    ("-\n  a\n-\n\n  b", "<ul><li>a</li><li></li></ul><p>b</p>"),
    ("-     code\n10. b", "<ul><li><pre><code>code\n</code></pre></li></ul>"
                          '<ol start="10"><li>b</li></ol>'),
    ("-a\n1.b\n1234567890. c", "<p>-a\n1.b\n1234567890. c</p>"),
    ("- [ ] todo\n- [x] done\n- [y] no\n- [x]",
     '<ul><li><input type="checkbox" aria-label="Task" disabled> todo</li>'
     '<li><input type="checkbox" aria-label="Task" disabled checked> done</li><li>[y] no</li><li>[x]</li></ul>'),
    ("- [ ] a\n\n- b",
     '<ul><li><p><input type="checkbox" aria-label="Task" disabled> a</p></li><li><p>b</p></li></ul>'),
    ("0. a", '<ol start="0"><li>a</li></ol>'),
    # what defines no link
    ("[x]:\n\n[x]", "<p>[x]:</p><p>[x]</p>"),
    ("[ ]: x.example", "<p>[ ]: x.example</p>"),
    ("[x]: (b\n\n[x]", "<p>[x]: (b</p><p>[x]</p>"),
    # tables
    ("|a|b|c|\n|:-|:-:|-:|\n|1|`x\\|y`|\n| *2* | | | 4 |\n\nend",
     '<table><thead><tr><th align="left">a</th><th align="center">b</th><th align="right">c</th>'
     '</tr></thead><tbody><tr><td align="left">1</td><td align="center"><code>x|y</code></td>'
     '<td align="right"></td></tr><tr><td align="left"><em>2</em></td><td align="center"></td>'
     '<td align="right"></td></tr></tbody></table><p>end</p>'),
    ("text\na | b\n- | -", "<p>text\na | b</p><ul><li>| -</li></ul>"),
    ("text\na | b\n--- | ---\n> q", "<p>text</p><table><thead><tr><th>a</th><th>b</th></tr></thead>"
                                    "</table><blockquote><p>q</p></blockquote>"),
    ("[x]: https://x.example\n---\n[y]: https://x.example\n-|-", "<hr><p>-|-</p>"),
    ("a | b\n--- | --- | ---", "<p>a | b\n--- | --- | ---</p>"),
])
def test_blocks(markdown, page):
    assert shown(markdown) == page


# -- inline


@pytest.mark.parametrize("markdown, page", [
    ("*a* _b_ **c** __d__ ***e***",
     "<em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <em><strong>e</strong></em>"),
    ("snake_case_name 2*3*4 a * b *", "snake_case_name 2<em>3</em>4 a * b *"),
    ("**a *b* c** *a **b** c*",
     "<strong>a <em>b</em> c</strong> <em>a <strong>b</strong> c</em>"),
    ("*a **b* c**", "<em>a <em><em>b</em> c</em></em>"),
    ("**a*b **c", "**a*b **c"),
    ('a**"b"**c', 'a**&quot;b&quot;**c'),
    ('a**"b"** *"c"*d', 'a**&quot;b&quot;** *&quot;c&quot;*d'),
    ('a_"b"_ "_c_" _d_e a"_f_', 'a_&quot;b&quot;_ &quot;<em>c</em>&quot; _d_e a&quot;<em>f</em>'),
    ("a**€b€** c", "a**€b€** c"),
    ('"_(a)_"', "&quot;<em>(a)</em>&quot;"),
    ("*a_ _b*", "<em>a_ _b</em>"),
    ("**a*b*** ***a** b*", "<strong>a<em>b</em></strong> <em><strong>a</strong> b</em>"),
    ("a***b***c", "a<em><strong>b</strong></em>c"),
    ("*foo**bar**baz*", "<em>foo<strong>bar</strong>baz</em>"),
    ("**~~a~~**b *~~c*~~", "<strong><del>a</del></strong>b <em>~~c</em>~~"),
    ("~~a~~ ~b~ ~~~c~~~ ~~d~", "<del>a</del> <del>b</del> ~~~c~~~ ~~d~"),
    ("`a*b*` `` ` `` ` ` `x  \ny` `open", "<code>a*b*</code> <code>`</code> <code> </code> "
                                          "<code>x   y</code> `open"),
    ("\\*a\\* \\<b> \\a &lt;c&gt; &copy; &#65; &nope; &", "*a* &lt;b&gt; \\a &lt;c&gt; © A &amp;nope; &amp;"),
    # links
    ("[a](https://x.example 'T')", '<a href="https://x.example" title="T">a</a>'),
    ("[*a* [b]](<https://x.example/a b>)", '<a href="https://x.example/a%20b"><em>a</em> [b]</a>'),
    ("[a](https://x.example/(b)(c)) )", '<a href="https://x.example/(b)(c)">a</a> )'),
    ("[a [b](https://x.example) c](https://y.example)",
     '[a <a href="https://x.example">b</a> c](<a href="https://y.example">https://y.example</a>)'),
    ("[a [b](https://x.example) c] [d](https://y.example)",
     '[a <a href="https://x.example">b</a> c] <a href="https://y.example">d</a>'),
    ("[a" + " " * 998 + "b]\n\n[a b]: https://x.example", "[a" + " " * 998 + "b]"),
    ("[x] [y][X] [x][] [none][no] [x]: z\n\n[x]: https://x.example\n  \"T\"",
     '<a href="https://x.example" title="T">x</a> <a href="https://x.example" title="T">y</a> '
     '<a href="https://x.example" title="T">x</a> [none][no] '
     '<a href="https://x.example" title="T">x</a>: z'),
    ("[x]\n\n[x]: https://first.example\n[x]: https://second.example",
     '<a href="https://first.example">x</a>'),
    ("[ẞ]\n\n[SS]: https://x.example", '<a href="https://x.example">ẞ</a>'),
    ("[a](docs/x.md) [b](/x) [c](//x.example) [d]()", "a b c d"),
    ("[top](#Usage) [u](#größe)", '<a href="#readme-Usage">top</a> <a href="#readme-gr%C3%B6%C3%9Fe">u</a>'),
    ("<https://x.example/a_b> <me@x.example> <b@d",
     '<a href="https://x.example/a_b">https://x.example/a_b</a> '
     '<a href="mailto:me@x.example">me@x.example</a> &lt;b@d'),
    # links without brackets
    ("see https://x.example/a_b_c?d=e&f, (http://y.example/g(h)) or www.z.example.",
     'see <a href="https://x.example/a_b_c?d=e&amp;f">https://x.example/a_b_c?d=e&amp;f</a>, '
     '(<a href="http://y.example/g(h)">http://y.example/g(h)</a>) or '
     '<a href="http://www.z.example">www.z.example</a>.'),
    ("(www.x.example) *www.y.example* -www.z.example",
     '(<a href="http://www.x.example">www.x.example</a>) '
     '<em><a href="http://www.y.example">www.y.example</a></em> -www.z.example'),
    ("*https://x.example/* xhttps://y https://a_b.c www. awww.x",
     '<em><a href="https://x.example/">https://x.example/</a></em> xhttps://y https://a_b.c www. awww.x'),
    ("mail first_last@x.example. not@x, a@b.c_ @x.example",
     'mail <a href="mailto:first_last@x.example">first_last@x.example</a>. not@x, a@b.c_ @x.example'),
    ("[me@x.example](https://x.example) a@b.example@c.example",
     '<a href="https://x.example">me@x.example</a> a@<a href="mailto:b.example@c.example">b.example@c.example</a>'),
    ("https://x.example/a&copy; [a](https://x.example/(b)",
     '<a href="https://x.example/a">https://x.example/a</a>© '
     '[a](<a href="https://x.example/(b)">https://x.example/(b)</a>'),
    ("`https://x.example` [https://y.example](https://z.example) [https://w.example",
     '<code>https://x.example</code> <a href="https://z.example">https://y.example</a> '
     '[https://w.example'),
    # images
    ("![a *b*](https://x.example/i.png) ![](https://x.example/i.png)!", "[image: a b] !"),
    ("[![build](https://x.example/b.svg)](https://x.example)",
     '<a href="https://x.example">build</a>'),
    ("[![a](b) text](https://x.example)", '<a href="https://x.example">[image: a] text</a>'),
    ("[![](https://x.example/b.svg)](https://x.example) []", " []"),
    ("[![a](b)![](c)\n![d](e)](https://x.example)", '<a href="https://x.example">a d</a>'),
    ("![a [b](https://x.example) c](https://y.example/i)", "[image: a b c]"),
])
def test_inline(markdown, page):
    assert shown(markdown) == "<p>%s</p>" % page


def test_links_to_headings_lead_to_them():
    page = shown("[a](#install) [b](#Install)\n\n# Install")
    assert re.findall('href="#(.*?)"', page) == re.findall('id="(.*?)"', page) * 2 == ["readme-install"] * 2
    page = shown('[a](#Install) [b](< #%49nstall >)\n\n# Install\n\n<a id="Install"></a>')
    assert re.findall('href="#(.*?)"', page) == ["readme-Install"] * 2


def test_images_are_shown_on_demand_from_https_alone():
    badge = "[![build](https://x.example/b.svg 'T')](https://x.example) ![a](http://x.example/a) ![r](r.png)"
    assert shown(badge, shows_images=True) == (
        '<p><a href="https://x.example"><img src="https://x.example/b.svg" alt="build" title="T"></a>'
        ' [image: a] [image: r]</p>')
    assert shown("<img src='https://x.example/i'>", shows_images=True) == '<img src="https://x.example/i" alt="">\n'
    assert shown("[![](https://x.example/i)](https://x.example)", shows_images=True) == (
        '<p><a href="https://x.example"><img src="https://x.example/i" alt=""></a></p>')


# -- HTML in Markdown


@pytest.mark.parametrize("markdown, page", [
    ('<p align="center">\n<img src="https://x.example/l.png" alt="Logo" width="10">\n</p>',
     '<p align="center">\n[image: Logo]\n</p>\n'),
    ('<h1 align=center>Tool</h1>\n\ntext', '<h2 align="center" id="readme-tool">Tool</h2>\n<p>text</p>'),
    ('<div align="center">\n\n# Tool\n\n<b>x</b> y\n\n</div>\nz',
     '\n<h2 align="center" id="readme-tool">Tool</h2><p align="center"><strong>x</strong> y</p>\nz\n'),
    ("<center>a<div>b</div></center>", '<p align="center">a</p><p align="center">b</p>\n'),
    ("<details open>\n<summary>More</summary>\n\n- a\n\n</details>\n\nend",
     "<details>\n<summary>More</summary>\n<ul><li>a</li></ul></details>\n<p>end</p>"),
    ('<a href="https://x.example"><img src="https://x.example/b.svg" alt="badge"></a>',
     '<p><a href="https://x.example">badge</a></p>'),
    ('a<br/>b<br>c <kbd>Ctrl</kbd> H<sub>2</sub>O <i>i</i> <u>u</u>',
     '<p>a<br>b<br>c <kbd>Ctrl</kbd> H<sub>2</sub>O <em>i</em> u</p>'),
    ("a <!-- b\nc --> d\n\n<!--\n\n# no\n\n-->\n", "<p>a  d</p>\n"),
    ('<a name="x"></a>\n[y](#x)', '<p><a id="readme-x"></a>\n<a href="#readme-x">y</a></p>'),
    ("a <!--> b --> <!*c*> <![CDATA[*d* > e]]>",
     "<p>a  b --&gt; &lt;!<em>c</em>&gt; &lt;![CDATA[*d* &gt; e]]&gt;</p>"),
    ('<a id="x"/>b <kbd/>c <a href="https://x.example"/>d',
     '<p><a id="readme-x"></a>b <kbd></kbd>c <a href="https://x.example">d</a></p>'),
    ("<a href=https://x.example/?a&amp;b href=https://y.example>c<a href=https://z.example>d</a>",
     '<p><a href="https://x.example/?a&amp;b">c</a><a href="https://z.example">d</a></p>'),
    ("<a href=https://x.example>*[a](https://y.example)*</a>", '<p><a href="https://x.example"><em>a</em></a></p>'),
    ('<div align="center"><b>x</b></div>', '<p align="center"><strong>x</strong></p>\n'),
    ('<h2 id="own">A</h2>\n\n# own', '<h3 id="readme-own">A</h3>\n<h2 id="readme-own-1">own</h2>'),
    ("pip install <name> && <x-y>z</x-y>",
     "<p>pip install &lt;name&gt; &amp;&amp; &lt;x-y&gt;z&lt;/x-y&gt;</p>"),
    ("<b>*a*\n\nb</b> </i>c", "<p><strong><em>a</em></strong></p><p>b c</p>"),
    ("<table><tr><td>a<td colspan=2>b<tr><td>\n\n**c**\n\n</table>\n\nd",
     '<table><tr><td>a</td><td colspan="2">b</td></tr><tr><td>\n<p><strong>c</strong></p></td></tr>'
     '</table>\n<p>d</p>'),
    ("<ul><li>a<li>b<ul><li>c</ul><li>d</ul>",
     "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>\n"),
    ("> <details>\n\nout", "<blockquote><details>\n</details></blockquote><p>out</p>"),
    ("<pre>\na &lt; <b>b</b>\n\n  c</pre>", "<pre>\na &lt; <strong>b</strong>\n\n  c</pre>\n"),
    ('<a href="https://x.example">\nhttps://y.example</a>',
     '<a href="https://x.example">\nhttps://y.example</a>\n'),
])
def test_html(markdown, page):
    assert shown(markdown) == page


# -- what a page never has


SCHEMES = ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\tscript:alert(1)", "java\nscript:x", "\x01javascript:x",
           "&#106;avascript:x", "&#x6A;avascript:x", "javascript&colon;x", "javascript&#58;x", "java&Tab;script:x",
           "java&NewLine;script:x", "data:text/html,<script>x</script>", "data:image/svg+xml;base64,AA", "vbscript:x",
           "file:///etc/passwd", "//evil.example", "/\\evil.example", "\\\\evil.example", "https:evil", "http:/+api",
           " javascript:x", "javascript&#x3a;//https://x", "%6Aavascript:x", "feed:javascript:x", "view-source:x", "x:y"]

VECTORS = [
    "<script>alert(1)</script>", "<SCRIPT SRC=https://evil.example/x.js></SCRIPT>", "<script/x>a</script>",
    "<script>\n\na\n\n</script>", "<<script>alert(1)//<</script>", "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<img src=x onerror=alert(1)>", "<img src='https://x.example/i' onload='alert(1)'>", '<img """><script>x</script>">',
    "<img/src=x/onerror=alert(1)>", "<IMG SRC=`javascript:x`>", "<img src=\"https://x.example/\" onerror\n=\n'x'>",
    "<a href='https://x.example' onclick=alert(1)>x</a>", "<a href=https://x.example style=x:expression(1)>y</a>",
    "<a href=\"https://x.example/'\" title='\"><script>x</script>'>y</a>", "<a href='https://x.example\" onmouseover=\"x'>y</a>",
    "<p onmouseover=alert(1)>x", "<p style='background:url(javascript:x)'>x</p>", "<p class='admin lang-x' id='content'>x</p>",
    "<svg onload=alert(1)>", "<svg><script>x</script></svg>", "<math><mtext></form><form><mglyph><style></math><img src onerror=x>",
    "<style>*{display:none}</style>", "<style>@import 'https://evil.example';</style>", "<link rel=stylesheet href=x>",
    "<iframe src=https://evil.example></iframe>", "<object data=x></object>", "<embed src=x>", "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>", "<form action=/+login><input name=password></form>",
    "<input type=text autofocus onfocus=x>", "<input type=checkbox onclick=x checked>", "<button formaction=javascript:x>x",
    "<video src=x onerror=x></video>", "<details open ontoggle=alert(1)>x", "<body onload=x>", "<noscript><p title='</noscript><img src=x onerror=x>'>",
    "<template><script>x</script></template>", "<textarea><script>x</script></textarea>", "<title><script>x</script></title>", "<plaintext>x", "<xmp>x",
    "<!-- x --><script>x</script>", "<!--><script>x</script>-->", "<!-- --!><script>x</script> -->", "<![CDATA[<script>x</script>]]>",
    "<!DOCTYPE x [<!ENTITY y '<script>'>]>", "<?php echo '<script>'; ?>", "<?xml-stylesheet href='javascript:x'?>",
    "<a\x00href=javascript:x>y", "<scr\x00ipt>x</script>", "<p\x0conclick=x>y", "<p/onclick=x>y", "</p onclick=x>", "<p id=x id=y>", "<td colspan=-1 rowspan=1e9>x",
    "<ol start='1\" onclick=\"x'>", "<b <script>x</script>>y</b>", "<b", "<a href=\"", "<a href=\"https://x.example", "</", "<", "<!", "<!--", "<?", "&lt;script&gt;x", "&#60;script&#62;",
    "`<script>`", "    <script>x</script>", "```<script>\n<script>\n```", "```\"onclick=x\nx\n```", "``` a&quot;b\n```", "# <script>x</script>", "# \" onclick=x",
    "![\" onerror=\"x](https://x.example/i)", "![x](https://x.example/\"onerror=x)", "![<script>](https://x.example/i)", "![[x](javascript:y)](z)",
    "[x](https://x.example \"' onclick=x <script>\")", "[x](<https://x.example/\"><script>>)", "[<script>x</script>](https://x.example)", "[x](#\" onclick=x)", "[x](#<script>)", "[x](#\ud800)",
    "https://x.example/<script>", "https://x.example/\"onclick=x", "https://x.example/'><script>x", "www.x.example\"><b", "a@x.example\"onclick",
    "|<script>|\n|-|\n|<img src=x onerror=x>|", "[x]: javascript:y\n\n[x]", "[x]: https://x.example '\"><script>'\n\n[x] ![x]", "- [x] <script>x",
    "\ud800<b>\udfff</b>", "\ufdd0\uffff\x85", "[a](https://x.example/\ud800)", "[image: <script>]", "<b><i><p>x</b></i></p>", "</b></p></div></td></table>",
    "<a href=https://x.example><a href=https://y.example>z</a>[t](https://z.example)</a>", "<table><td><tr></thead><b>", "<p><p><li><li><dd><dt></p>"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_other_scheme_becomes_a_link(scheme):
    forms = ["[x](%s)", "[x](<%s>)", "![x](%s)", "<%s>", "[x]\n\n[x]: %s", "<a href='%s'>x</a>", '<a href="%s">\n', "<a href=%s>x",
             "<img src='%s' alt=x>", "[![x](%s)](%s)"]
    for form in forms:
        page = d.render_markdown(form.replace("%s", scheme), shows_images=True)
        Description(page)
        # "https://x" behind another scheme is text, which becomes a link by itself
        assert not re.search("(?:href|src)=\"(?!https://x[\"%])", page), form
    assert d.safe_url(html.unescape(scheme)) is None


@pytest.mark.parametrize("vector", VECTORS)
def test_hostile_html_is_text(vector):
    for markdown in (vector, "a " + vector + " b", "> - " + vector.replace("\n", "\n>   "), "<div>\n" + vector + "\n</div>",
                     "<p>" + vector, vector + "\n\n" + vector, "*[%s](https://x.example)*" % vector):
        for shows_images in (False, True):
            Description(d.render_markdown(markdown, shows_images))


def test_random_texts_keep_to_the_list():
    pieces = VECTORS + SCHEMES + list("*_`~[]()<>!#-+|:&;\\\"'\n\n\n \t\0") + [
        "](", "![", "- ", "1. ", "> ", "```", "\n\n", "    ", "<b>", "</b>", "<p>", "</p>", "<a href='https://x.example'>",
        "</a>", "<td>", "<li>", "<details>", "<div align=center>", "</div>", "&amp;", "|-|-|\n", "[x]: https://x.example\n", "[x]",
        "https://x.example", "www.x.example", "a@x.example", "word", "é", "🚀"]
    for seed in range(300):
        draw = random.Random(seed)
        markdown = "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 60)))
        page = d.render_markdown(markdown, seed % 2 == 0)
        try:
            Description(page)
        except AssertionError as error:
            raise AssertionError("seed %d: %r" % (seed, markdown)) from error


# -- the tree, and links on other pages


def test_only_listed_tags_and_attributes_of_a_tree_are_written():
    tree = [d.Node("p", ["<", d.Node("script", ["x"]), d.Node("", ["y"])], {"onclick": "x", "align": "CENTER"}),
            d.Node("input", (), {"type": "text"}), d.Node("td", ["z"], {"colspan": "2"}),
            d.Node("th", (), {"rowspan": "2"}),
            d.Node("ul", (), {"href": "https://x.example", "type": "a", "start": "2", "alt": "x"}),
            *(d.Node("ol", (), {"start": number}) for number in ("-1", "\u0661", "1" * 10, "123456789"))]
    assert d.safe_html(tree) == (
        '<p align="center">&lt;xy</p><td colspan="2">z</td><th rowspan="2"></th><ul></ul>'
        '<ol></ol><ol></ol><ol></ol><ol start="123456789"></ol>')
    assert d.SAFE_TAGS == Description.TAGS | {"h1"}


def test_a_deep_tree_is_written():
    node = "x"
    for _ in range(5000):
        node = d.Node("em", [node])
    assert d.safe_html([node]) == "<em>" * 5000 + "x" + "</em>" * 5000


@pytest.mark.parametrize("url, link", [
    ("https://x.example", "https://x.example"), (" HTTP://X.example/a b\n", "http://X.example/a%20b"),
    ("https://x.example/ä?b=\"c\"&d=%20#e", "https://x.example/%C3%A4?b=%22c%22&d=%20#e"), ("http://[::1]:80/", "http://[::1]:80/"),
    ("mailto:me@x.example", "mailto:me@x.example"), ("#top", None), ("ht\ttps://x.example", "https://x.example"),
    ("", None), ("x.example", None), ("/x", None), ("https://", None), ("https:///x", None), ("ftp://x.example", None), ("mailto:", None)])
def test_a_link_of_a_page_has_a_harmless_scheme(url, link):
    assert d.safe_url(url) == link
    assert d.outside_link(url, "<x>") == (
        '<a href="%s"%s>&lt;x&gt;</a>' % (html.escape(link), REL) if link else "&lt;x&gt;")


# -- limits


def test_a_description_beyond_the_limits_is_shown_as_its_source(monkeypatch):
    deep = "> " * 17 + "*a* <b>"
    assert d.render_markdown(deep[2:]).startswith("<blockquote>" * 16 + "<p><em>a</em>")
    assert d.render_markdown(deep) == source(deep)
    monkeypatch.setattr(d.Limits, "description", 100)
    assert d.render_markdown("*" + "ä" * 49 + "*") == "<p><em>%s</em></p>" % ("ä" * 49)
    assert d.render_markdown("*" + "ä" * 50 + "*") == source("*%s*" % ("ä" * 50))


@pytest.mark.parametrize("kind", ["- a\n", "*a* <b>", "# a\n\n", "|a|\n|-|\n", "[a](b) "])
def test_a_description_that_takes_too_long_is_shown_as_its_source(kind, monkeypatch):
    monkeypatch.setattr(d.Limits, "description_time", 0.02)
    long, start = kind * 30_000, time.thread_time()
    assert d.render_markdown(long) == source(long)
    assert time.thread_time() - start < 1.5


@pytest.mark.parametrize("hostile", [
    "[" * 50_000, "![" * 20_000, "[" * 20_000 + "]" * 20_000, "[a](" * 5_000, "[a](<b" * 5_000, '[a](b "' * 5_000, "[[a](b)" * 4_000,
    "[a]: b\n" * 4_000, "[a]: https://x.example/" + "x" * 1900 + "\n\n" + "[a]" * 20_000,
    "*a **b " * 3000 + "c** d* " * 3000, "*a " * 50_000, "*a_ " * 20_000, "a**b_" * 10_000, "~a ~~b " * 8_000,
    " ".join("`" * (number % 300 + 1) for number in range(1500)), "`a``" * 20_000, "<" * 50_000, "<!--" * 60_000, "<?" * 20_000,
    '<a b="' * 15_000, "<a" + " b" * 50_000, "<a" + " " * 100_000, "&" * 50_000, "&amp" * 20_000, "www.a_" * 12_000, "http://" * 8_000,
    "http://a.b/" + ")" * 100_000, "http://a.b/" + "&a;" * 50_000, "@" * 100_000, "a@" * 30_000, "a" * 200_000, "# a" + "#" * 100_000 + " b",
    "a" + (" " * 1000 + "a") * 300, "\t" * 50_000 + "a", ">\n" * 8_000, "<b>" * 8_000, "<div>" * 8_000, "<ul><li>" * 4_000,
    "|a" * 3_000 + "|\n" + "|-" * 3_000 + "|\n" + "|x|\n" * 2_000, "|" * 50_000 + "\n" + "|" * 50_000, "# a\n" * 4_000, "\\" * 50_000],
    ids=lambda text: text[:8].strip() or "blanks")
def test_hostile_markdown_takes_linear_time(hostile, monkeypatch):
    """In quadratic time each would take longer than the limit, tenfold at least."""
    monkeypatch.setattr(d.Limits, "description_time", 3)
    start = time.thread_time()
    page = d.render_markdown(hostile)
    assert page != source(hostile)
    assert time.thread_time() - start < 3       # within a text the limit is looked at rarely
    assert len(page) < 600_000


# -- the format


MARKDOWN, RST, PLAIN = "# T\n\n[a](https://x.example)\n", "T\n=\n\n.. note:: x\n\n`a <b>`_\n", "just words"


@pytest.mark.parametrize("content_type, form", [
    ("text/markdown", "markdown"), ("Text/Markdown; charset=UTF-8; variant=GFM", "markdown"), ("text/markdown;variant=CommonMark", "markdown"),
    ("text/x-markdown", "markdown"), ("text/prs.fallenstein.rst", "rst"),
    ("text/x-rst", "rst"), ("text/x-rst; charset=UTF-8", "rst"), ("text/plain", "plain"), ("text/plain; charset=\"UTF-8\"", "plain")])
def test_the_content_type_tells_the_format(content_type, form):
    assert {d.description_format(text, content_type) for text in (MARKDOWN, RST, PLAIN)} == {form}


@pytest.mark.parametrize("content_type", [None, "", "UNKNOWN", "text/html", "a\r\nb: c", "é;;", "markdown"])
def test_without_a_known_content_type_its_looks_tell_it(content_type):
    assert d.description_format(MARKDOWN, content_type) == "markdown"
    assert d.description_format("a\n\n```sh\nx\n```\n", content_type) == "markdown"
    assert d.description_format(RST, content_type) == "rst"
    assert d.description_format("T\n=\n\nuse it::\n\n    # not a heading\n", content_type) == "rst"
    assert d.description_format("use::\n\n    a\n\n*b", content_type) == "rst"
    assert d.description_format(PLAIN, content_type) == "rst"
    assert d.description_format("just *words", content_type) == "plain"


def test_the_looks_of_a_text_beyond_the_limits_are_not_studied(monkeypatch):
    monkeypatch.setattr(d.Limits, "description", len(MARKDOWN) - 1)
    assert d.description_format(MARKDOWN, None) == "plain"


def test_a_description_is_rendered_by_its_format():
    assert d.description_html("*a*", "text/markdown") == "<p><em>a</em></p>"
    assert d.description_html("*a* <", "text/plain") == source("*a* <")
    assert d.description_html(".. image:: https://x.example/i\n   :ALT: a\n      b", "text/x-rst", shows_images=True) \
        == '<p><img src="https://x.example/i" alt="a b"></p>'
    assert d.description_html("![a](https://x.example/i)", "text/markdown; variant=GFM", shows_images=True) \
        == '<p><img src="https://x.example/i" alt="a"></p>'
