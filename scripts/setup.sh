# Sourced by demo.sh and test.sh: goes to the root and makes .venv with the given requirements file.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  echo "== making .venv"
  python3 -m venv .venv
fi
if ! cmp -s "$1" ".venv/installed-$1" || [ requirements.txt -nt ".venv/installed-$1" ]; then
  echo "== installing $1 (PyTorch is a large download)"
  .venv/bin/python -m pip install --disable-pip-version-check -r "$1"
  cp "$1" ".venv/installed-$1"
fi
source .venv/bin/activate
