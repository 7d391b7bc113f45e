#!/bin/sh
# All that is measured on a card, in nine minutes: first what is timed, on a
# card of its own; then training, while other programs are checked and compiled;
# then the times of these.
#
# Usage: run.sh PROGRAMS FASHION_MNIST OUTPUT
set -u
programs=$1 data=$2 output=$3
here=$(dirname "$0")
mkdir -p "$output"
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2

python3 "$here/card.py" --programs "$programs" --output "$output/first" \
    --seconds 350 --reserve 150 --threads 14 \
    --parts smoke core large bfloat16 profile optimized \
    --torch_sides plain FP "FP NCHW" > "$output/first.log" 2>&1

trained=$(mktemp -u)
(
    timeout 140 python3 "$here/train.py" --programs "$programs" \
        --data "$data" --output "$output" --seconds 105 \
        > "$output/training.log" 2>&1
    touch "$trained"
) &
python3 "$here/card.py" --programs "$programs" --output "$output/second" \
    --seconds 180 --reserve 60 --threads 10 --no_torch \
    --parts check others --after "$trained" > "$output/second.log" 2>&1
wait
rm -f "$trained"
cat "$output/first.log" "$output/second.log" "$output/training.log"
