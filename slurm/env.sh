# Sourced by every script of this folder; sbatch starts them in the repository's root, where you submitted them.
# tools/launch.py fills PIVOTRL_* from cluster.* (the prefix that its --dry-run prints); by hand they may be left out.
set -uo pipefail
PYTHON=${PIVOTRL_PYTHON:-.venv/bin/python}
read -ra SRUN_OPTIONS <<<"${PIVOTRL_SRUN:-}" # pyxis: --container-image=... --container-mounts=...
read -ra INSIDE <<<"${PIVOTRL_INSIDE:-}"     # apptainer: apptainer exec --nv --bind ... image

export PYTHONUNBUFFERED=1           # logs appear when they are written, and a killed process loses none
export OMP_NUM_THREADS=1            # many processes share a node: their OpenMP threads would spin against each other
export TOKENIZERS_PARALLELISM=false # the tokenizer's threads warn and deadlock when a process forks
export HF_HUB_OFFLINE=1             # models are folders here; compute nodes often have no way to the hub and would wait for it
# One hardware queue, so that kernels start in the order in which they are issued: Megatron hides the communication of tensor
# and context parallelism behind matrix products that way (Hopper; newer GPUs do not need it).
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}    # a failed link says so in the log; INFO shows which network NCCL chose
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 # a collective that fails or hangs ends its process instead of blocking the job to its limit
export TORCH_FR_BUFFER_SIZE=2000         # keeps the last collectives, which tell the rank that did not join a hung one
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # NVLink SHARP takes GPU memory in every process group; a layout has dozens of them

ATTEMPT=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} # a requeued job has the same id, and must not meet its former self

# A step of the job. srun would bind a task to one core; ours start one process a GPU.
step() { srun --cpu-bind=none "${SRUN_OPTIONS[@]}" "$@"; }

# COUNT of the job's nodes behind the first SKIP, by name. With --relative=0 srun takes other nodes while a step before is still ending
# on the first one: training would sit on the servers' nodes, and wait for them.
hosts() {
    local all IFS=,
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "${all[*]:$1:$2}"
}

# One process on the first node, where the batch script runs: alone RECIPE overrides...
alone() { step --nodes=1 --ntasks=1 --nodelist="$(hosts 0 1)" "${INSIDE[@]}" "$PYTHON" "$@"; }

# torchrun on the first N nodes: distributed N RECIPE overrides...
# When a node's processes have ended, the others get two minutes to end as well.
distributed() {
    local nodes=$1
    shift
    step --nodes="$nodes" --ntasks="$nodes" --nodelist="$(hosts 0 "$nodes")" --ntasks-per-node=1 --wait=120 "${INSIDE[@]}" "$PYTHON" -m pivotrl.launch \
        --nnodes="$nodes" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --rdzv-backend=c10d --rdzv-id="$ATTEMPT" \
        --rdzv-endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 10000))" "$@"
}

# vLLM servers: serve srun-options... -- overrides... Each task tells its number, which names the files that its addresses stand in.
serve() {
    local options=()
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    step "${options[@]}" --ntasks-per-node=1 bash -c 'exec "$@" --node "$SLURM_PROCID"' serve \
        "${INSIDE[@]}" "$PYTHON" tools/serve_rollouts.py --name "$ATTEMPT" "$@"
}

# Exit code 85: asked to leave, and saved. Slurm starts the job again, where it goes on.
finish() {
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    if (($1 == 85)); then scontrol requeue "${job:-$SLURM_JOB_ID}"; fi # an array's own id would requeue all of its tasks
    exit "$1"
}
