#!/bin/sh
# CIFAR-10 from its ZIP file to samples: decode, train a few hundred steps, stop, resume, sample.
#
#     examples/cifar10.sh ZIP [FOLDER [OPTION ...]]
#
# ZIP is in EDM's layout. Data, run and samples are written to FOLDER (default: runs/cifar10). Further options are passed
# to `stablefield train`, for example --set training.images=6400.
#
# The settings are the published ones except for the width of the network, the batch size and the number of images. It
# takes ten to twenty minutes on two cores; the samples show colours and shapes, but no objects yet. If it is stopped,
# the same command resumes the run.
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
        --set training.batch_size=32 --set training.images=12800 --set training.learning_rate_warmup=3200 \
        --set training.ema_half_life=2000 --set training.log_every=640 --set training.sample_every=0 "$@" &
    pid=$!
    # stop it as a cluster would (SIGTERM), once the first metrics are written
    until [ -s "$folder/run/metrics.jsonl" ] || ! kill -0 $pid 2>/dev/null; do sleep 1; done
    kill -TERM $pid 2>/dev/null || true
    wait $pid || [ $? = 143 ]
fi
stablefield train --resume "$folder/run"

stablefield sample "$folder/run" --seeds 0-63
echo "data $folder/data.png, samples $folder/run/samples/samples.png"
