# Installs t5g2 into an environment of its own and puts it on the PATH of the steps that follow.
#
# PARITY_INSTALL   checkout: the revision that this action came with; anything else is a version of t5g2convert
# PARITY_ACTION    the folder of the action
# PARITY_VENV      the environment to make; one that is there is used
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_CACHE_DIR) hold, as for a torch without CUDA.
set -euo pipefail

checkout=$(cd "$PARITY_ACTION/../../.." && pwd)
python -c 'import sys; sys.exit("t5g2 needs Python 3.11 or newer: run actions/setup-python first" if sys.version_info < (3, 11) else 0)'
[ -x "$PARITY_VENV/bin/python" ] || python -m venv "$PARITY_VENV"
if [ "$PARITY_INSTALL" = checkout ]; then
  wanted=$checkout
else
  wanted=t5g2convert==$PARITY_INSTALL
fi
"$PARITY_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$checkout/constraints.txt" "$wanted"
echo "$PARITY_VENV/bin" >> "$GITHUB_PATH"
"$PARITY_VENV/bin/t5g2" --version
