#!/bin/sh
# Says what a person has to know about this container, then becomes the command that was given.
set -eu

cache="$HOME/.cache"
if [ ! -w "$cache" ]; then
  echo "sana: $cache cannot be written by user $(id -u), so nothing that is downloaded can be kept;" \
    "add --user \"\$(id -u):\$(id -g)\" to docker run, or mount a folder of user $(id -u)." >&2
fi

case "${1:-} ${2:-} $*" in
  "sana app "*--port* | "sana app "*--help*) ;;
  "sana app "*)
    address="$(hostname -I 2>/dev/null | cut -d ' ' -f 1)"
    echo "sana: this machine opens the page at http://${address:-127.0.0.1}:$DEMO_PORT when it is ready," \
      "and with docker run -p 127.0.0.1:$DEMO_PORT:$DEMO_PORT at http://127.0.0.1:$DEMO_PORT" >&2
    ;;
esac

exec "$@"
