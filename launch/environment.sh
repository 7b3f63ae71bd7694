# shellcheck shell=bash
# Sourced by the other scripts: makes .venv in the repository and installs ksl_ds there, once for each state of the package files.
# Usage: source launch/environment.sh EXTRA ...      (extras of setup.cfg, such as test)

need() { # need COMMAND PACKAGE: one line and the end when a system package is missing
    if ! eval "$1" >/dev/null 2>&1; then
        echo "Please install $2 first, for example with: apt-get install $2" >&2
        exit 1
    fi
}

PYTHON=${PYTHON:-python3}
need "command -v $PYTHON" python3
need "$PYTHON -c 'import sys; assert sys.version_info >= (3, 10)'" "python3 (3.10 or newer; PYTHON=/path/to/python chooses one)"
need "$PYTHON -c 'import ensurepip, venv'" python3-venv

extras=$(IFS=,; echo "$*")
stamp=.venv/installed-$(cat setup.cfg setup.py launch/constraints.txt <(echo "$extras") | sha256sum | cut -c1-16)
if [ ! -f "$stamp" ]; then
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    echo "installing ksl_ds into .venv (once; a few minutes)"
    # DS_BUILD_OPS=0: none of DeepSpeed's compiled operations is used.
    DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --constraint launch/constraints.txt --editable ".${extras:+[$extras]}"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"

# Where there is no GPU, ranks are CPU processes that share the cores.
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
fi
