"""A browser for tests: cookies, links and forms of pages, as they are without scripts."""

import html.parser
import http.cookiejar
import urllib.parse
import urllib.request

from archives import multipart
from harness import BROWSER, Reply

FORM = "application/x-www-form-urlencoded"


class Page(html.parser.HTMLParser):
    """A reply as a page: its `text`, `links` and `forms`."""

    def __init__(self, reply, url):
        super().__init__()
        self.reply, self.status, self.url, self.forms, self.links, self.text = reply, reply.status, url, [], {}, ""
        self._form = self._link = self._area = self._select = None
        self._hidden = 0
        self.feed(reply.body.decode())
        self.text = " ".join(self.text.split())

    @property
    def path(self):
        """The path and query that it was found at, after redirects."""
        parts = urllib.parse.urlsplit(self.url)
        return parts.path + ("?" + parts.query if parts.query else "")

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "form":
            self._form = Form(given.get("action", ""), given.get("method", "get"), given.get("enctype", FORM), {})
            self.forms.append(self._form)
        elif tag == "input" and self._form and "name" in given:
            kind = given.get("type", "text")
            if kind not in ("checkbox", "file") or "checked" in given:
                self._form.fields[given["name"]] = given.get("value", "on")
        elif tag == "textarea" and self._form:
            self._area = given["name"]
            self._form.fields[self._area] = ""
        elif tag == "select" and self._form:
            self._select = given["name"]
        elif tag == "option" and self._select:
            if "selected" in given or self._select not in self._form.fields:
                self._form.fields[self._select] = given["value"]
        elif tag == "a":
            self._link = given.get("href")
        self._hidden += tag in ("style", "script")

    def handle_endtag(self, tag):
        if tag == "form":
            self._form = None
        elif tag == "select":
            self._select = None
        elif tag == "textarea":
            self._area = None
        elif tag == "a":
            self._link = None
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data):
        if self._area:
            self._form.fields[self._area] += data
        if self._link is not None:
            self.links[data.strip()] = self._link
        if not self._hidden:
            self.text += data + " "

    def form(self, ending="", **has):
        """The form whose action ends so, not one to log out or to search."""
        found = [form for form in self.forms if form.action.partition("?")[0].endswith(ending)
                 and form.method == "post" and (ending or not form.action.endswith("+logout"))
                 and all(form.fields.get(key) == value for key, value in has.items())]
        assert found, (ending, has, self.forms, self.text)
        return found[0]


class Form:
    def __init__(self, action, method, enctype, fields):
        self.action, self.method, self.enctype, self.fields = action, method, enctype, fields

    def __repr__(self):
        return "<%s %s %s>" % (self.method, self.action, self.fields)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class Browser:
    """Keeps cookies, follows redirects, sends forms with Origin and Sec-Fetch-Site as Chromium does."""

    def __init__(self, server):
        self.server, self.jar = server, http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), _Stay, urllib.request.HTTPCookieProcessor(self.jar))

    @property
    def cookies(self):
        return {cookie.name: cookie.value for cookie in self.jar}

    def send(self, method, path, body=None, headers=(), follow=True):
        """The `Page` that comes."""
        url = urllib.parse.urljoin(self.server.url + "/", path)
        for _ in range(6):
            sent = {"Accept": BROWSER, **dict(headers)}
            if method == "POST":
                sent.setdefault("Origin", self.server.url)
                sent.setdefault("Sec-Fetch-Site", "same-origin")
                sent = {name: value for name, value in sent.items() if value is not None}
            request = urllib.request.Request(url, body, sent, method=method)
            try:
                response = self.opener.open(request, timeout=60)
            except urllib.error.HTTPError as error:
                response = error
            reply = Reply(response)
            if reply.status not in (302, 303) or not follow:
                return Page(reply, url)
            url = urllib.parse.urljoin(url, reply.headers["Location"])
            method, body, headers = "GET", None, ()
        raise AssertionError("redirected without end: " + url)

    def get(self, path, **options):
        return self.send("GET", path, **options)

    def submit(self, form, headers=(), follow=True, files=None, **fields):
        """Send a form with some of its fields changed; None leaves one out."""
        fields = {name: value for name, value in {**form.fields, **fields}.items() if value is not None}
        if form.enctype == FORM:
            body, kind = urllib.parse.urlencode(fields).encode(), FORM
        else:
            body, kind = multipart(fields, {"content": files} if files else {})
        return self.send("POST", form.action, body, {"Content-Type": kind, **dict(headers)}, follow)

    def log_in(self, user, password="pw", path="/+login"):
        return self.submit(self.get(path).form("/+login"), user=user, password=password)

    def do(self, path, _headers=(), **fields):
        """Open a page with a form, and send that."""
        page = self.get(path)
        assert page.status == 200, (page.status, page.text)
        return self.submit(page.form(path.partition("?")[0]), headers=_headers, **fields)
