"""Asks the server in this container whether it lives; exit code 0 or 1. SANA_HEALTH_URL chooses another address.

Whatever is answered below 500 is a sign of life: a page that wants a password answers 401. Proxies are not asked.
"""

import os
import sys
import urllib.error
import urllib.request


def is_alive(url: str, seconds: float = 8) -> bool:
    """Returns whether something answers at an address, and not with a failure of its own."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as answer:
            return answer.status < 500
    except urllib.error.HTTPError as answer:
        return answer.code < 500
    except OSError:  # refused, reset or too slow; URLError is one
        return False


def main() -> int:
    """Returns the exit code that Docker reads."""
    url = os.environ.get("SANA_HEALTH_URL") or f"http://127.0.0.1:{os.environ.get('DEMO_PORT', '15432')}/"
    return 0 if is_alive(url) else 1


if __name__ == "__main__":
    sys.exit(main())
