#!/bin/sh
# CIFAR-10 from its zip to samples: decoded once, trained for a few hundred steps, stopped, gone on with, sampled.
#
#     examples/cifar10.sh ZIP [FOLDER [OPTION ...]]
#
# ZIP is in EDM's layout; FOLDER (runs/cifar10) gets data, run and samples; further options are those of `stablefield
# train`, as --set training.images=6400.
#
# The settings are the published ones but for the width of the network, the batch and how long it trains: enough to see
# everything work in ten to twenty minutes on two cores, and colours and shapes in the samples, but no objects yet.
# Called again it goes on where it was.
set -eu
zip=${1:?usage: examples/cifar10.sh ZIP [FOLDER [OPTION ...]]}
folder=${2:-runs/cifar10}
[ $# -lt 2 ] && shift || shift 2
PATH=$(dirname "$0")/../.venv/bin:$PATH

mkdir -p "$folder"
[ -e "$folder/data" ] || stablefield data convert "$zip" "$folder/data"
stablefield data inspect "$folder/data" --sheet "$folder/data.png"

if [ ! -e "$folder/run" ]; then
    stablefield train --recipe cifar10-ncsnpp-edm-stf --data "$folder/data" --out "$folder/run" \
        --set network.model_channels=32 --set network.num_blocks=2 \
        --set training.batch_size=32 --set training.images=12800 --set training.ramp=3200 \
        --set training.ema_half_life=2000 --set training.log_every=640 --set training.sample_every=0 "$@" &
    pid=$!
    # stopped, as a cluster would, when the first figures are there
    until [ -s "$folder/run/metrics.jsonl" ] || ! kill -0 $pid 2>/dev/null; do sleep 1; done
    kill -TERM $pid 2>/dev/null || true
    wait $pid || [ $? = 143 ]
fi
stablefield train --resume "$folder/run"

stablefield sample "$folder/run" --seeds 0-63
echo "data $folder/data.png, samples $folder/run/samples/grid.png"
