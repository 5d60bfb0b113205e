"""An upload of 2 GB: neither the client nor the server needs more memory for it."""

from harness import PROGRAM, Server
from test_client_upload import upload_large


def test_2_gb(tmp_path):
    server = Server(tmp_path / "server", "--max-request-body-size", str(3 << 30), script=PROGRAM).start()
    try:
        server.add_user("alice")
        upload_large(tmp_path, server, 2 * 10 ** 9)
    finally:
        server.stop()
