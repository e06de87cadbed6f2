# shellcheck shell=bash
# shellcheck disable=SC2154 # script, root and arguments are set by the script that sources this
# To be sourced by the launch scripts of this folder, which then call
#
#   run PRESET TP PP EP FLAGS...
#
# with a preset of pretrain_gpt_moe.py --model, the published sizes of tensor, pipeline and expert parallelism, and what
# else the run needs. It prints a plan (DRY_RUN=1) or starts the run: under SLURM with srun, elsewhere with torchrun.

usage() {
    cat <<END
Usage: [VARIABLE=VALUE ...] bash   $script [FLAGS of pretrain_gpt_moe.py]    on this machine's GPUs, or its CPU
       [VARIABLE=VALUE ...] sbatch $script [FLAGS ...]    as a SLURM job; sbatch's own flags before the script win
       DRY_RUN=1            bash   $script [FLAGS ...]    print the plan and the command, and start nothing
END
    cat <<'END'

Everything can be changed from the environment:

  variable         what it is                                                     default
  DATA_PATH        PREFIX of a dataset, or a blend: "0.7 PREFIX1 0.3 PREFIX2"     none: it has to be given
  TRAIN_DATA_PATH, VALID_DATA_PATH, TEST_DATA_PATH
                   in place of DATA_PATH: a path for each set, in the same forms; none
                   VALID and TEST also "NAME1=PREFIX1 PREFIX2", with a loss each
  TOKENIZER_TYPE   of pretrain_gpt_moe.py --tokenizer-type                        GPT2BPETokenizer
  VOCAB_FILE       GPT2BPETokenizer: vocab.json                                   gpt2-vocab.json
  MERGE_FILE       GPT2BPETokenizer: merges.txt                                   gpt2-merges.txt
  TOKENIZER_MODEL  the others, but for ByteTokenizer: their file                  none
  SAVE             folder of the checkpoints and of metrics.jsonl                 checkpoints/RUN_NAME
  LOAD             folder to resume from; with the flag --finetune, folder of     SAVE
                   the weights to start from
  RUN_NAME         name in logs and plots                                         the script's, 350M_MoE128
  TRAIN_TOKENS     length of the run; the learning rate's decay stays             300B
  NNODES           nodes                                                          the SLURM job's, else 1
  GPUS_PER_NODE    processes on a node                                            the SLURM job's, else this machine's GPUs
  TP, PP, EP       tensor, pipeline and expert parallelism                        as published, less where there are
                                                                                  fewer processes
  MICRO_BATCH      sequences of one forward pass                                  as published
  GLOBAL_BATCH     sequences of an update                                         as published
  RECIPE           published, recommended (balanced experts, stable training)     auto: as recommended for experts in a model
                   or auto; the plan and the log say what the other would set     that was not published
  EXTRA_ARGS       more flags of pretrain_gpt_moe.py, after all others            none
  LAUNCHER         srun (one task a GPU), torchrun or deepspeed (one a node)      srun in a SLURM job, else torchrun
  SRUN_ARGS        more flags of srun, such as --output=%x-%j-%N.log              none
  REQUEUE          0: a SLURM job does not put itself back into the queue         1
  CONTAINER_IMAGE  image for srun --container-image (pyxis): a .sqsh file or      none: no container
                   REGISTRY#IMAGE:TAG
  CONTAINER_MOUNTS more folders for the container, SRC:DST,SRC:DST; this          none
                   checkout and the working directory are there
  NODE_RANK, MASTER_ADDR, MASTER_PORT
                   several nodes without SLURM: this node's number, the first     0, none, 29500
                   node's name, a free port there
  PYTHON           the interpreter; with CONTAINER_IMAGE the one in the image     .venv/bin/python of this checkout, else
                                                                                  python3; in an image python3
  DRY_RUN          1: print the plan and the command; command: the command alone  none
  GPU              the plan's kind of GPU (tools/plan_run.py --help lists them)   A100
  PLAN_ARGS        more flags of tools/plan_run.py, such as --price-per-gpu-hour  none

A dry run outside a SLURM job plans for the nodes and GPUs of the script's #SBATCH lines: NNODES alone changes the nodes,
GPUS_PER_NODE alone is one node.
END
}

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    if [[ $# -gt 0 ]]; then printf '  %s\n' "$@" >&2; fi
    exit 2
}

requested() { # NAME: what the script's #SBATCH line --NAME= says
    sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$script"
}

gpus_here() {
    if command -v nvidia-smi >/dev/null; then nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true; else echo 0; fi
}

most() { # WANTED LIMIT: the largest number from 1 to WANTED that divides both, so that what was planned for more fits
    local number
    for ((number = $1 < $2 ? $1 : $2; number > 1; number--)); do
        if (($1 % number == 0 && $2 % number == 0)); then break; fi
    done
    echo $((number > 1 ? number : 1))
}

find_sizes() { # sets NNODES and GPUS_PER_NODE
    local tasks=${SLURM_NTASKS_PER_NODE:-}
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        [[ "$SLURM_JOB_ID" =~ ^[0-9]+$ && -n "${SLURM_JOB_NODELIST:-}" ]] ||
            fail "SLURM_JOB_ID is '$SLURM_JOB_ID' and SLURM_JOB_NODELIST '${SLURM_JOB_NODELIST:-}': not those of a job" \
                "Outside of one: unset SLURM_JOB_ID; else submit with: sbatch $script"
        : "${NNODES:=${SLURM_JOB_NUM_NODES:-1}}"
        : "${GPUS_PER_NODE:=${tasks:-${SLURM_GPUS_ON_NODE:-1}}}"
    elif [[ -n "${DRY_RUN:-}" && -z "${GPUS_PER_NODE:-}" ]]; then
        : "${NNODES:=$(requested nodes)}"
        GPUS_PER_NODE=$(requested ntasks-per-node)
    fi
    : "${NNODES:=1}"
    if [[ -z "${GPUS_PER_NODE:-}" ]]; then
        GPUS_PER_NODE=$(gpus_here)
        if ((GPUS_PER_NODE == 0)); then GPUS_PER_NODE=1; fi
    fi
    for name in NNODES GPUS_PER_NODE ${TP:+TP} ${PP:+PP} ${EP:+EP}; do
        [[ "${!name}" =~ ^[1-9][0-9]{0,5}$ ]] || fail "$name is '${!name}'; give a whole number from 1 to 999999"
    done
    if ! [[ "${MASTER_PORT:-1}" =~ ^[1-9][0-9]{0,4}$ && "${MASTER_PORT:-1}" -lt 65536 ]]; then
        fail "MASTER_PORT is '$MASTER_PORT'; give the number of a free port, from 1 to 65535"
    fi
}

find_python() { # sets PYTHON, for this machine, and interpreter, for the trainer
    interpreter=
    if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
        interpreter=${PYTHON:-python3}
        PYTHON=
    fi
    if [[ -z "${PYTHON:-}" ]]; then
        PYTHON=python3
        if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "$root/.venv/bin/python" ]]; then
            PYTHON="$root/.venv/bin/python"
        fi
    fi
    command -v "$PYTHON" >/dev/null ||
        fail "PYTHON is '$PYTHON', which is no program here; give the path of a Python that has torch, or leave it out"
    if [[ "${DRY_RUN:-}" == 1 || (-z "$interpreter" && "${DRY_RUN:-}" != command) ]]; then
        "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
            fail "PYTHON is '$PYTHON', $(command -v "$PYTHON"), which has no torch; activate the environment that has it," \
                "or give PYTHON=PATH, or make one: source tools/setup_env.sh && setup_env"
    fi
    : "${interpreter:=$PYTHON}"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

add_data() { # FLAG WORDS: adds them to the array data, if there are words
    local -a words=()
    read -r -a words <<<"$2"
    if [[ ${#words[@]} -gt 0 ]]; then data+=("$1" "${words[@]}"); fi
}

find_data() { # sets the array data; what is missing or wrong is the trainer's to say
    data=()
    add_data --data-path "${DATA_PATH:-}"
    add_data --train-data-path "${TRAIN_DATA_PATH:-}"
    add_data --valid-data-path "${VALID_DATA_PATH:-}"
    add_data --test-data-path "${TEST_DATA_PATH:-}"
    if [[ "${DRY_RUN:-}" == 1 && ${#data[@]} -eq 0 ]]; then data=(--data-path DATA_PATH); fi
    : "${TOKENIZER_TYPE:=GPT2BPETokenizer}"
    if [[ "$TOKENIZER_TYPE" == GPT2BPETokenizer ]]; then
        : "${VOCAB_FILE:=gpt2-vocab.json}" "${MERGE_FILE:=gpt2-merges.txt}"
    fi
    data+=(--tokenizer-type "$TOKENIZER_TYPE" ${VOCAB_FILE:+--vocab-file "$VOCAB_FILE"}
        ${MERGE_FILE:+--merge-file "$MERGE_FILE"} ${TOKENIZER_MODEL:+--tokenizer-model "$TOKENIZER_MODEL"})
}

find_layout() { # PRESET'S TP PP EP: sets TP, PP, EP; what was published is lowered to what this many processes allow
    local world=$((NNODES * GPUS_PER_NODE)) given="${TP:-}${PP:-}${EP:-}" replicas
    : "${TP:=$(most "$1" "$GPUS_PER_NODE")}"
    : "${PP:=$(most "$2" "$((world / TP > 0 ? world / TP : 1))")}"
    replicas=$((world / (TP * PP)))
    : "${EP:=$(most "$3" "$((replicas > 0 ? replicas : 1))")}"
    if [[ -z "$given" && "$TP $PP $EP" != "$1 $2 $3" ]]; then
        echo "note: for $world processes, not as published: TP $1 -> $TP, PP $2 -> $PP, EP $3 -> $EP" >&2
    fi
}

start_with() { # sets the array command, before the trainer's own words
    local -a more=() torchrun srun
    read -r -a more <<<"${SRUN_ARGS:-}"
    torchrun=("$interpreter" "$root/tools/torchrun.py" --nproc-per-node "$GPUS_PER_NODE")
    srun=(srun --nodes "$NNODES" --kill-on-bad-exit=1 --distribution=block)
    # --ntasks: without it the number of the job's tasks wins over --ntasks-per-node
    # --cpus-per-task: since SLURM 22.05 a step does not take this over from its job
    if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then srun+=(--cpus-per-task "$SLURM_CPUS_PER_TASK"); fi
    if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
        srun+=(--container-image "$CONTAINER_IMAGE" --container-workdir "$PWD"
            --container-mounts "$root:$root,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    elif [[ -n "${CONTAINER_MOUNTS:-}" ]]; then
        fail "CONTAINER_MOUNTS is set, and CONTAINER_IMAGE is not"
    fi
    local in_job=${SLURM_JOB_ID:-} task="$root/examples_moe/slurm/task.sh"
    if [[ -n "${DRY_RUN:-}" && "$NNODES" -gt 1 && -z "${MASTER_ADDR:-}" ]]; then in_job=planned; fi
    local launcher=torchrun first=FIRST_NODE port=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}
    if [[ -n "$in_job" ]]; then
        launcher=srun
        if [[ "$in_job" != planned ]]; then
            read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
                fail "scontrol does not tell the nodes of job $SLURM_JOB_ID, '$SLURM_JOB_NODELIST'" \
                    "Outside of a job: unset SLURM_JOB_ID"
        fi
    fi
    case "${LAUNCHER:-$launcher}" in
        srun)
            [[ -n "$in_job" ]] || fail "LAUNCHER=srun outside a SLURM job; submit with: sbatch $script"
            command=("${srun[@]}" --ntasks $((NNODES * GPUS_PER_NODE)) --ntasks-per-node "$GPUS_PER_NODE"
                ${more[@]+"${more[@]}"} bash "$task" 0 "$interpreter")
            ;;
        torchrun)
            if [[ -n "$in_job" ]]; then # task.sh passes the signals on, so torchrun is to heed none of them
                command=("${srun[@]}" --ntasks "$NNODES" --ntasks-per-node 1 ${more[@]+"${more[@]}"}
                    bash "$task" 1 "${torchrun[@]}" --signals-to-handle SIGINT --nnodes "$NNODES" --rdzv-backend c10d
                    --rdzv-id "$RUN_NAME" --rdzv-endpoint "${MASTER_ADDR:-$first}:$port")
                return
            fi
            torchrun+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
            if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
                fail "CONTAINER_IMAGE is for jobs of SLURM; submit with: sbatch $script, or start this script in a container"
            elif ((NNODES > 1)); then
                [[ -n "${MASTER_ADDR:-}" && -n "${NODE_RANK:-}" ]] ||
                    fail "NNODES is $NNODES outside a SLURM job; on each node give NODE_RANK, from 0, and MASTER_ADDR"
                [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]{0,5})$ && "$NODE_RANK" -lt "$NNODES" ]] ||
                    fail "NODE_RANK is '$NODE_RANK'; give a whole number from 0 to $((NNODES - 1)), one less than NNODES"
                command=("${torchrun[@]}" --nnodes "$NNODES" --node-rank "$NODE_RANK"
                    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
            else
                command=("${torchrun[@]}" --standalone)
            fi
            ;;
        deepspeed)
            [[ -n "$in_job" ]] || fail "LAUNCHER=deepspeed outside a SLURM job; submit with: sbatch $script"
            write_hostfile
            # shellcheck disable=SC2016 # expanded on the node
            command=("${srun[@]}" --ntasks "$NNODES" --ntasks-per-node 1 ${more[@]+"${more[@]}"} bash "$task" 2
                bash -c 'exec "$0" -m deepspeed.launcher.runner --node_rank "$SLURM_NODEID" "$@"' "$interpreter"
                --hostfile "$SAVE/hostfile" --no_ssh --master_addr "${MASTER_ADDR:-$first}" --master_port "$port")
            ;;
        *) fail "LAUNCHER is '$LAUNCHER'; expected srun, torchrun or deepspeed" ;;
    esac
}

write_hostfile() { # SAVE/hostfile, of the job's nodes
    if [[ -n "${DRY_RUN:-}" ]]; then return; fi
    make_empty hostfile
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$GPUS_PER_NODE/" >"$SAVE/hostfile"
}

make_empty() { # FILE of SAVE; an old one is emptied and not removed, since other nodes may not see a new one at once over NFS
    { mkdir -p "$SAVE" && : >"$SAVE/$1"; } 2>/dev/null ||
        fail "SAVE is '$SAVE', and $(uname -n) cannot write there; give a folder that all nodes can write to"
}

# -------------------------------------------------------------------------------------------------------- SLURM's jobs

run_in_job() { # COMMAND...: runs it, unless the run is finished; requeues the job if it was stopped and should go on
    local status=0 reason
    if [[ " ${flags[*]} " == *" --preflight-only "* ]]; then exec "$@"; fi # trains nothing
    if [[ -s "$SAVE/ended.json" ]] && "$PYTHON" "$root/tools/run_finished.py" "${flags[@]}" 2>/dev/null; then return; fi
    make_empty ended.json
    trap : TERM USR1 # SLURM tells the tasks, and they save; wait for them
    "$@" || status=$?
    reason=$(sed -n 's/.*"reason": "\([^"]*\)".*/\1/p' "$SAVE/ended.json" || true)
    case "$reason" in
        SIGUSR1 | "the time limit") requeue "stopped by $reason" ;;
    esac
    return "$status"
}

this_job() { # how scontrol names this job; the bare number of an array's last task is the whole array's too
    echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
}

may_requeue() { # a batch job that goes on, submitted without --no-requeue
    local job
    [[ "${REQUEUE:-1}" != 0 ]] || return
    job=$(scontrol --oneliner show job "$(this_job)") || return
    [[ "$job " == *" JobState=RUNNING "* && "$job " == *" BatchFlag=1 "* && "$job " == *" Requeue=1 "* ]]
}

requeue() { # WHY: once from each checkpoint, or a job whose time is too short would go round for ever
    local from
    may_requeue || return 0
    from="$SLURM_JOB_ID $(cat "$SAVE/latest" 2>/dev/null || echo start)"
    if [[ "$(cat "$SAVE/requeued" 2>/dev/null)" == "$from" ]]; then
        echo "error: $1, and not requeued: no checkpoint was made since the last time; a longer --time may help" >&2
        return
    fi
    echo "$from" >"$SAVE/requeued"
    echo "$1; requeueing the job"
    scontrol requeue "$(this_job)" || echo "error: the job could not be requeued; submit it again" >&2
}

run() { # PRESET TP PP EP FLAGS...
    local preset=$1 published=("$2" "$3" "$4") extra=() data=() command=() trainer flags plan interpreter
    shift 4
    case "${arguments[0]:-}" in -h | --help) usage && exit 0 ;; esac
    : "${RUN_NAME:=$(basename "$script" .sh | sed 's/^pretrain_gpt_//')}"
    : "${SAVE:=checkpoints/$RUN_NAME}"
    : "${LOAD:=$SAVE}"
    find_sizes
    find_python
    find_data
    find_layout "${published[@]}"
    read -r -a extra <<<"${EXTRA_ARGS:-}"

    flags=(--model "$preset" --recipe "${RECIPE:-auto}" --tensor-model-parallel-size "$TP"
        --pipeline-model-parallel-size "$PP" "$@")
    if [[ "${published[2]}" -gt 1 ]]; then flags+=(--moe-expert-parallel-size "$EP"); fi
    if [[ "${published[0]}" -gt 1 && "$TP" == 1 ]]; then # what goes with tensor parallelism goes without it
        flags+=(--no-sequence-parallel --no-enable-expert-tensor-parallelism)
    fi
    if [[ -n "${TRAIN_TOKENS:-}" ]]; then flags+=(--train-tokens "$TRAIN_TOKENS"); fi
    if [[ -n "${MICRO_BATCH:-}" ]]; then flags+=(--micro-batch-size "$MICRO_BATCH"); fi
    if [[ -n "${GLOBAL_BATCH:-}" ]]; then flags+=(--global-batch-size "$GLOBAL_BATCH"); fi
    flags+=("${data[@]}" --run-name "$RUN_NAME" --save "$SAVE" --load "$LOAD" --preflight --watchdog-factor 20)
    flags+=(${arguments[@]+"${arguments[@]}"} ${extra[@]+"${extra[@]}"})

    start_with
    trainer=("${command[@]}" "$root/pretrain_gpt_moe.py" "${flags[@]}")
    case "${DRY_RUN:-}" in
        "") if [[ -n "${SLURM_JOB_ID:-}" ]]; then run_in_job "${trainer[@]}"; else exec "${trainer[@]}"; fi ;;
        command) printf '%q ' "${trainer[@]}" && echo ;;
        1)
            read -r -a plan <<<"--gpu ${GPU:-A100} ${PLAN_ARGS:-}"
            "$PYTHON" "$root/tools/plan_run.py" --world-size $((NNODES * GPUS_PER_NODE)) \
                --gpus-per-node "$GPUS_PER_NODE" "${plan[@]}" "${flags[@]}"
            printf '\nThe command:\n'
            printf '%q ' "${trainer[@]}" && echo
            ;;
        *) fail "DRY_RUN is '$DRY_RUN'; expected 1 or command" ;;
    esac
}
