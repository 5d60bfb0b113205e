"""A browser for tests: cookies, links and forms of pages, as they are without scripts."""

import http.cookiejar
import urllib.parse
import urllib.request

from archives import multipart
from harness import BROWSER, Reply
import webpages

FORM = "application/x-www-form-urlencoded"


class Page(webpages.Page):
    """A page with its `forms`, and where it was found."""

    def __init__(self, reply, url):
        self.status, self.url, self.forms = reply.status, url, []
        super().__init__(reply)

    @property
    def path(self):
        """The path and query that it was found at, after redirects."""
        parts = urllib.parse.urlsplit(self.url)
        return parts.path + ("?" + parts.query if parts.query else "")

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        given = dict(attributes)
        if tag == "form":
            self.forms.append(Form(given.get("action", ""), given.get("method", "get"), given.get("enctype", FORM), {}))
        if self._around("form") is None:
            return

        fields = self.forms[-1].fields
        if tag == "input" and "name" in given:
            kind = given.get("type", "text")
            if kind not in ("checkbox", "file") or "checked" in given:
                fields[given["name"]] = given.get("value", "on")
        elif tag == "textarea":
            fields[given["name"]] = ""
        elif tag == "option":
            name = self._around("select")["name"]
            if "selected" in given or name not in fields:
                fields[name] = given["value"]

    def handle_data(self, data):
        super().handle_data(data)
        area = self._around("textarea")
        if area is not None:
            self.forms[-1].fields[area["name"]] += data

    def _around(self, tag):
        """The attributes of the innermost open element with this tag; None if there is none."""
        return next((attributes for name, attributes, _ in reversed(self.open) if name == tag), None)

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


def logged_in(server, user):
    """A `Browser` in which the user has logged in."""
    browser = Browser(server)
    assert "Log out" in browser.log_in(user, server.passwords[user]).text
    return browser
