"""The real nginx in front of servers, with TLS."""

import contextlib
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.parse

import pytest

from harness import eventually

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(
    not (NGINX and shutil.which("openssl")), reason="nginx or openssl is not installed")

MAIN = """\
daemon off;
%(user)s
pid %(directory)s/nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path %(directory)s/body;
    proxy_temp_path %(directory)s/proxy;
    fastcgi_temp_path %(directory)s/fastcgi;
    uwsgi_temp_path %(directory)s/uwsgi;
    scgi_temp_path %(directory)s/scgi;
    include %(directory)s/devpi_lite.conf;
}
"""
# uv takes no certificate authority for a server
CERTIFICATE = """\
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
CN = localhost
[extensions]
subjectAltName = DNS:localhost
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_certificate(folder):
    """(certificate, key) of localhost, signed by itself."""
    (folder / "config").write_text(CERTIFICATE)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-config", str(folder / "config"), "-keyout", str(folder / "key.pem"),
         "-out", str(folder / "cert.pem")],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "cert.pem", folder / "key.pem"


class Nginx:
    """A running nginx; its configuration is `folder`/devpi_lite.conf."""

    def __init__(self, folder):
        self.folder = folder
        # its workers read what the tests may read alone
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        (folder / "main.conf").write_text(
            MAIN % {"directory": folder, "user": "user root;" if root else ""})
        self.command = [NGINX, "-p", str(folder), "-c", str(folder / "main.conf")]

    def start(self, port):
        with open(str(self.folder / "log"), "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        eventually(lambda: self._listens(port))
        return self

    def _listens(self, port):
        assert self.process.poll() is None, self.log()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def log(self):
        return (self.folder / "log").read_text()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@contextlib.contextmanager
def running_nginx(folder, port):
    nginx = Nginx(folder).start(port)
    try:
        yield nginx
    finally:
        nginx.stop()


class Outside:
    """What is behind the URL, as its clients see it: `trust` is what they need to believe it."""

    def __init__(self, url, certificate):
        self.url, self.certificate = url, certificate
        # pip without truststore, and requests, read names of their own
        self.trust = dict.fromkeys(
            ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT"), str(certificate))

    def request(self, method, path, body=None, source="127.0.0.1", **headers):
        """(status, headers, body) of a path below the URL, asked for from that address."""
        parts = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=60,
            context=ssl.create_default_context(cafile=str(self.certificate)),
            source_address=(source, 0))
        try:
            connection.request(method, parts.path + path, body, headers=headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def get(self, path, source="127.0.0.1", **headers):
        return self.request("GET", path, source=source, **headers)
