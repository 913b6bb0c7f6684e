"""A Hub on this machine, where publishing can be tried: `python -m tests.hub`.

It speaks the Hub's protocol to the real client, keeps all in memory and asks nothing of the network. The first
line on stdout is JSON: the environment variables with which the client goes there. It ends with its standard
input, so with whoever started it, or with Ctrl-C.
"""

import json
import secrets
import sys
from contextlib import suppress

from .hub_writing import Account, WritableHub


def main() -> None:
    token = f"hf_{secrets.token_hex(16)}"
    hub = WritableHub(accounts={token: Account()})
    server = hub.start()
    # LFS, since a Xet store has a protocol of its own
    client = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    print(json.dumps(client), flush=True)
    with suppress(KeyboardInterrupt):
        sys.stdin.read()
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    main()
