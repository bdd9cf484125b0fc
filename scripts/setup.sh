#!/bin/sh
# Set up the virtual environment that every make target runs in; do nothing when it is up to date.
#
#   PYTHON  the interpreter to use; otherwise the environment's own, then python3.12, python3.11, python3
#   VENV    the folder of the environment; otherwise .venv
#
# The stamp inside the environment says what was installed. It reads "unfinished" from before the first
# package until after the last, so a set-up that was interrupted is started afresh and never trusted.
# No C compiler is needed: every package is installed from a wheel. Until an interpreter is found, only
# the shell's own commands are used, so that the sentence comes out on the barest machine too.
set -eu

case $0 in */*) cd "${0%/*}/.." ;; *) cd .. ;; esac
VENV=${VENV:-.venv}
stamp=$VENV/.robustkit-setup

say() { printf '%s\n' "$*" >&2; }
die() { say "robustkit: $*"; exit 2; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
supported() { case $1 in 3.11 | 3.12) ;; *) return 1 ;; esac; }
makes_venvs() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }
how='install one (Debian 12 or Ubuntu 24.04: apt install python3 python3-venv; macOS: brew install python@3.12)'

# What the environment must have been made from: when this changes, it is set up again.
fingerprint() {
    "$1" -c '
import hashlib, sys
total = hashlib.sha256(repr(sys.version_info[:2]).encode())
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        total.update(hashlib.sha256(file.read()).digest())
print(total.hexdigest())' pyproject.toml constraints.txt scripts/setup.sh
}

# 1. Which interpreter.
python='' version='' unusable='' found=''
if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null 2>&1 ||
        die "PYTHON=$PYTHON is not a command here: name a Python 3.11 or 3.12, or $how."
    version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON does not run: name a Python 3.11 or 3.12, or $how."
    supported "$version" || die "PYTHON=$PYTHON is Python $version, and robustkit needs 3.11 or 3.12: $how."
    python=$PYTHON
elif [ -x "$VENV/bin/python" ] && version=$(version_of "$VENV/bin/python") && supported "$version"; then
    python=$VENV/bin/python
else
    for candidate in python3.12 python3.11 python3; do
        version=$(version_of "$candidate") || continue
        supported "$version" || { found="${found:+$found, }$candidate ($version)"; continue; }
        makes_venvs "$candidate" && { python=$candidate; break; }
        unusable=${unusable:-$version}
    done
    if [ -z "$python" ] && [ -n "$unusable" ]; then
        die "Python $unusable is here without its venv module: install it (Debian or Ubuntu:" \
            "apt install python$unusable-venv), then run the same command again."
    fi
    [ -n "$python" ] || die "Python 3.11 or 3.12 is needed, and this machine has ${found:-no Python}: $how," \
        "or name one with PYTHON=/path/to/python3.12."
fi

# 2. Is there anything to do?
here=$(pwd)
key="$(fingerprint "$python") $here"
state=''
[ ! -f "$stamp" ] || state=$(cat "$stamp")
[ "$state" != "$key" ] || exit 0

# 3. Set up; a second set-up started meanwhile waits for this one and then starts over.
if [ -z "${ROBUSTKIT_SETUP_LOCKED:-}" ] && command -v flock >/dev/null 2>&1; then
    ROBUSTKIT_SETUP_LOCKED=1 exec flock .setup-lock sh scripts/setup.sh
fi

fresh=no
if [ "$(version_of "$VENV/bin/python" || true)" != "$version" ]; then
    fresh=yes # none yet, or of another Python
elif [ "$state" = unfinished ]; then
    fresh=yes # half-installed packages
elif [ -n "$state" ] && [ "${state#* }" != "$here" ]; then
    fresh=yes # the clone was moved or copied: the scripts in bin/ name the old place
fi
if [ $fresh = yes ]; then
    if [ "$python" = "$VENV/bin/python" ]; then
        # The environment cannot rebuild itself: it is emptied while it runs.
        python=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
    fi
    makes_venvs "$python" || die "Python $version is here without its venv module: install it (Debian or" \
        "Ubuntu: apt install python$version-venv), then run the same command again."
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        die "VENV=$VENV is a folder with something else in it: name another with VENV=..., or remove it."
    fi
    "$python" -m venv --clear "$VENV" || die "Python $version could not make $VENV (its message is above):" \
        "check the disk space and the folder's permissions, then run the same command again."
fi
printf 'unfinished\n' >"$stamp"

say "Setting up $VENV with Python $version: about 220 packages, once, in one to five minutes."
quiet='-q -q' # errors only, unless someone is there to watch the progress
[ ! -t 1 ] || quiet=''
install() {
    # shellcheck disable=SC2086 # $quiet is a list of options
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip install $quiet \
        -c constraints.txt "$@" ||
        die "the packages could not be installed (pip's message is above): check the network and the disk" \
            "space, or name a mirror with PIP_INDEX_URL or PIP_FIND_LINKS, then run the same command again."
}
# setuptools first and pinned like the rest: pip would otherwise fetch whichever is newest to build with.
install setuptools
install --no-build-isolation -e '.[course,peers,cluster,postgres,serve,tensorboard,dev]'

printf '%s\n' "$key" >"$stamp.new"
mv -f "$stamp.new" "$stamp"
say "Set up: $VENV is ready."
