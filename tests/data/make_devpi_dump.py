"""Makes a dump as a real devpi-server writes it, with the facts that it holds:

    python tests/data/make_devpi_dump.py ENVIRONMENT [tests/data]

ENVIRONMENT is a virtual environment with a devpi-server, 1.1 to 7, and no plugins:

    Python 2.7      1.1 (with bottle 0.11.6), 1.2.2, 2.0.7, 2.2.2, 2.6.1, 3.1.2, 4.3.2
    Python 3.6      4.9.0 (with pyramid below 2, ruamel.yaml)
    Python 3.7      5.5.1 (the same)        3.8: 6.0.0 (with ruamel.yaml)       3.9: 6.9.0
    Python 3.13     6.20.3, 7.0.0b4

The server is started on a fresh directory, filled by HTTP with what its version can hold, and
exported by its own command.  `dump_of_devpi_VERSION.zip` has the dump as it is below `export/`, and
`facts.json`: who is in there with which password, the indexes (in the words of 6.20), and of each
release what was put in: some metadata, files with hashes and history, documentation, test results.
tests/test_import_dumps.py imports each and compares.
"""

import json
import pathlib
import sys
import tempfile
import zipfile

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from devpi_server import DevpiServer  # noqa: E402
from devpi_site import Site, fill, outside  # noqa: E402


def main(environment, target=TESTS / "data"):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        upstream = outside()
        server = DevpiServer(folder / "server", environment)
        site = Site(server, upstream)
        try:
            server.start()
            fill(site)
        except AssertionError:
            print(server.output(), file=sys.stderr)
            raise
        finally:
            if server.running:
                server.stop()
            upstream.stop()
        server.export(
            folder / "export", *["--include-mirrored-files"] if server.release >= (5, 0) else [])
        if server.release < (5, 0):     # nothing of mirrors but their configuration
            site.releases.pop("root/sea", None)
        facts = {"version": server.version, "passwords": site.passwords, "users": site.users,
                 "indexes": site.indexes, "releases": site.releases}
        path = pathlib.Path(target, "dump_of_devpi_%s.zip" % server.version)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in sorted((folder / "export").rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(folder).as_posix())
            archive.writestr("facts.json", json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
