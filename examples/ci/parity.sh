#!/bin/sh
# Parity in any CI: sh parity.sh SOURCE OUTPUT [REPORTS [OPTION...]]
#
# SOURCE is a Gemma 3, a folder or a model of the Hub; OUTPUT is the T5Gemma 2 that was made of it, a folder or a model of
# the Hub, org/name[@revision], which is downloaded: @refs/pr/3 is what pull request 3 would bring. REPORTS, parity without
# it, gets parity.json, parity.xml (JUnit) and parity.html. Further options are those of t5g2 verify.
#
# The exit code is that of t5g2 verify: 0 verified, 6 not equal, others where it could not be judged.
set -eu

if [ $# -lt 2 ]; then
  echo "usage: parity.sh SOURCE OUTPUT [REPORTS [OPTION...]]" >&2
  exit 2
fi
source=$1 output=$2 reports=${3:-parity}
shift $(($# < 3 ? $# : 3))

if [ ! -d "$output" ]; then
  case $output in
    *@*) revision=${output#*@} ;;
    *) revision=main ;;
  esac
  folder=$(hf download "${output%%@*}" --revision "$revision" --quiet) || {
    echo "parity.sh: $output is no folder here, and the Hub does not give it" >&2
    exit 7
  }
  output=$folder
fi

# An earlier verdict must not be taken for this one.
mkdir -p "$reports"
rm -f "$reports/parity.json" "$reports/parity.xml" "$reports/parity.html"
code=0
t5g2 verify "$output" --source "$source" --no-record --junit "$reports/parity.xml" --html "$reports/parity.html" \
  --json "$@" > "$reports/parity.json" || code=$?
# Both files are made before anything is judged; where there is no verdict they are empty.
for file in "$reports/parity.xml" "$reports/parity.html"; do
  [ -s "$file" ] || rm -f "$file"
done
# One line for each check, or the error, from the JSON.
python3 - "$reports/parity.json" <<'PYTHON'
import json, sys
document = json.load(open(sys.argv[1], encoding="utf-8"))
for check in document.get("checks", []):
    print("passed" if check["passed"] else "FAILED", check["name"], ascii(check["detail"]))
if "error" in document:
    print("error", ascii(document["error"]["message"]))
PYTHON
exit "$code"
